//! The spare virtual CPU's thread: it touches tables when nobody else can ([`crate::memory::Flushes`]), and runs no program.
//!
//! Most machines never call it, so thread and virtual CPU are made at the first call. The virtual CPU goes when the machine
//! rests; the thread stays until the machine ends. A host that refuses one is asked again at the next call: whoever calls asks
//! again when nothing comes of it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use shadow_mm::Pfn;

use super::crew::Crew;
use super::guests::{EndOnPanic, Guests};
use super::kick::take_no_signals;
use super::staff::Failure;
use super::worker::{self, Worker};
use crate::hv::CpuError;
use crate::hv::kvm::vcpu::{CpuSetup, Vcpu};
use crate::hv::kvm::vm::Vm;
use crate::locks::{Mutex, rank};

/// What the virtual CPU is made of.
pub(super) struct Made {
    pub(super) vm: Arc<Vm>,
    pub(super) setup: CpuSetup,
    /// See [`crate::hv::probe::HostProfile::state_components`].
    pub(super) components: u64,
    /// A root without programs.
    pub(super) idle: Pfn,
}

/// The thread, or what it will be.
pub(super) struct Spare {
    guests: Arc<Guests>,
    failure: Failure,
    made: Made,
    thread: Mutex<rank::Aide, Option<Crew>>,
    rests: AtomicBool,
}

impl Spare {
    pub(super) fn new(guests: &Arc<Guests>, failure: &Failure, made: Made) -> Arc<Self> {
        Arc::new(Self {
            guests: Arc::clone(guests),
            failure: Arc::clone(failure),
            made,
            thread: Mutex::default(),
            rests: AtomicBool::new(false),
        })
    }

    fn run(&self) {
        take_no_signals();
        let _end = EndOnPanic(&self.guests);
        if let Err(error) = self.serve() {
            self.failure.lock().get_or_insert(error);
            self.guests.close();
        }
    }

    fn serve(&self) -> Result<(), CpuError> {
        let memory = &self.guests.memory;
        let mut worker = None;
        while !self.guests.is_closed() {
            if memory.flushes.take_call() {
                if worker.is_none() {
                    worker = self.worker();
                }
                if let Some(worker) = &mut worker {
                    worker.errands()?;
                }
            } else if self.rests.swap(false, Ordering::SeqCst) {
                worker = None;
                memory.acknowledge(memory.flushes.rested());
            } else {
                std::thread::park();
            }
        }
        Ok(())
    }

    /// None if the host has no virtual CPU for it now.
    fn worker(&self) -> Option<Worker> {
        let Made {
            vm,
            setup,
            components,
            idle,
        } = &self.made;
        let made = Vcpu::new(vm, setup.clone()).map_err(worker::refused);
        let made = made.and_then(|cpu| {
            let guests = Arc::clone(&self.guests);
            Worker::new(guests, cpu, *components, *idle)
        });
        made.inspect_err(|error| tracing::warn!(%error, "no spare virtual CPU"))
            .ok()
    }

    /// Waits for the thread, if there is one, once the machine has ended.
    ///
    /// # Errors
    /// Its name, if it does not come back.
    pub(super) fn join(&self) -> Result<(), Vec<String>> {
        let crew = self.thread.lock().take();
        crew.map_or(Ok(()), |crew| {
            crew.unpark();
            crew.join()
        })
    }
}

/// As the flushes know it.
pub(super) struct Calls(pub(super) std::sync::Weak<Spare>);

impl crate::memory::Spare for Calls {
    fn call(&self) {
        let Some(spare) = self.0.upgrade() else {
            return;
        };
        let mut thread = spare.thread.lock();
        if let Some(crew) = &*thread {
            return crew.unpark();
        }
        if spare.guests.is_closed() {
            return;
        }
        let mut crew = Crew::new();
        let body = Arc::clone(&spare);
        let name = format!("vcpu{}", spare.made.setup.index);
        match crew.start(&name, move || body.run()) {
            Ok(()) => *thread = Some(crew),
            Err(error) => tracing::warn!(%error, "no thread for the spare virtual CPU"),
        }
    }

    fn rest(&self) {
        let Some(spare) = self.0.upgrade() else {
            return;
        };
        if let Some(crew) = &*spare.thread.lock() {
            spare.rests.store(true, Ordering::SeqCst);
            crew.unpark();
        }
    }
}
