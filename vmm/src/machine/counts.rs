//! What a machine has counted so far, for whoever looks at it from outside.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::Machine;
use super::report::{MemoryReport, Report};
use super::worker::Shared;
use crate::hv::kvm::vm::Vm;
use crate::memory::GuardCounters;

/// A guest's counters; those of the memory manager are its machine's, which may have had other guests. It keeps the machine's memory as long as it lives.
#[derive(Clone)]
pub(crate) struct Counts {
    pub(super) shared: Arc<Shared>,
    vm: Arc<Vm>,
    /// Table frames that belong to no guest.
    supervisor_tables: u64,
    /// ioctls that were made before anybody asked for the guest.
    ioctls_before: u64,
}

impl Counts {
    /// Those of a guest in a machine that it shares.
    pub(super) fn of_one(shared: &Arc<Shared>, vm: &Arc<Vm>, supervisor_tables: u64) -> Self {
        Self {
            shared: Arc::clone(shared),
            vm: Arc::clone(vm),
            supervisor_tables,
            ioctls_before: 0,
        }
    }

    /// What has been counted.
    pub(crate) fn report(&self) -> Report {
        let memory = &self.shared.kernel.memory;
        Report {
            exits: self.shared.counters.snapshot(),
            ioctls: self.vm.ioctls.load(Ordering::Relaxed) - self.ioctls_before,
            shootdowns: memory.flushes.stats(),
            memory: MemoryReport::new(&memory.manager.stats(), self.supervisor_tables),
            guard: memory.guard.get().map(GuardCounters::snapshot),
        }
    }
}

impl Machine {
    /// Its counters.
    pub(crate) fn counts(&self) -> Counts {
        Counts {
            shared: Arc::clone(&self.shared),
            vm: Arc::clone(&self.bare.hardware.vm),
            supervisor_tables: self.bare.supervisor_tables(),
            ioctls_before: self.ioctls_before,
        }
    }
}
