//! A machine that many guests of one template share: isolation by process.
//!
//! The machine is made once, with the template's image in it: a guest, the *seed*, that never runs. Every other guest
//! is a [`Tenant`]: a Linux layer of its own, made of the template's records, with address spaces that are forks of the
//! seed's ([`Seeds`]). A tenant has no virtual CPU and no thread of the host: the machine's workers run it when it has
//! something to do. One that waits is its records and the roots of its page tables.
//!
//! What tenants share, and what follows from it:
//!
//! * the virtual machine and this process. What keeps them apart is what keeps processes apart: page tables, and
//!   this crate's care with numbers. Each has its own process numbers, descriptors, files in memory, sockets;
//! * guest memory, first come, first served, and promised to nobody: a tenant that takes all of it makes others wait for
//!   frames, and whoever finds none is killed, as with overcommitment;
//! * workers, in turn ([`crate::linux::sched::roster`]);
//! * the vDSO's page, which has no clock: programs make the call.
//!
//! An ended tenant gives back all it had of the machine when it is waited for or dropped.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::builder::Machine;
use super::hardware::Hardware;
use super::report::MemoryReport;
use super::restored::load;
use super::stats::Counters;
use super::strace::Strace;
use super::threads::Threads;
use super::worker::{Limit, Shared};
use super::{
    HostSide, ProcessSignals, RunError, STATUS_FAILURE, STATUS_TIMEOUT, Wanted, exit_status,
};
use crate::hv::kvm::vcpu::Vcpu;
use crate::linux::events::Events;
use crate::linux::kernel::Kernel;
use crate::linux::sched::Sched;
use crate::linux::stdio::{self, Ends, Given};
use crate::linux::table::Table;
use crate::linux::thread::XsaveArea;
use crate::linux::time::TscInfo;
use crate::linux::vdso::{self, data};
use crate::locks::{Mutex, rank};
use crate::snapshot::image::{Loaded, Seeds};
use crate::snapshot::read::Snapshot;
use crate::snapshot::records::{Identity, Parts, Place, Records, restore};

/// A machine that guests of one template share.
pub struct SharedMachine {
    /// Until the end.
    live: Option<Live>,
    seeds: Seeds,
    records: Records,
    fpu: (XsaveArea, u64),
    events: Arc<Events>,
    strace: bool,
    /// Guests made so far.
    made: AtomicU64,
}

/// Guests that are made before flushes are waited for.
const PACE: u64 = 32;

/// A machine that runs; its own guest is the seed.
struct Live {
    machine: Machine,
    /// Touched at the end only.
    threads: Mutex<rank::MachineThreads, Threads>,
}

/// A guest to be.
#[derive(Debug, Default)]
pub struct Wish {
    /// Which one it is.
    pub identity: Identity,
    /// Its descriptors 0 to 2.
    pub ends: Ends,
    /// It ends after this long.
    pub timeout: Option<Duration>,
}

/// A guest in a shared machine. Dropping it ends it.
pub struct Tenant {
    machine: Arc<SharedMachine>,
    guest: Arc<Shared>,
}

impl SharedMachine {
    /// Makes the machine, without tenants. Its memory is promised to nobody, whatever `wanted` says.
    ///
    /// # Errors
    /// The host cannot make a machine, the snapshot is damaged, or a guest of it cannot be.
    pub fn start(
        wanted: &Wanted,
        snapshot: &Arc<Snapshot>,
        records: Records,
    ) -> Result<Arc<Self>, RunError> {
        let wanted = Wanted {
            commit: crate::config::Commit::Over,
            fork: crate::config::ForkMode::Shared,
            ..wanted.clone()
        };
        let loaded = Arc::new(Loaded::default());
        let image = |hardware: &Hardware| load(hardware, snapshot, &loaded);
        let host = HostSide {
            stdio: Given::inherited().map_err(RunError::Stdio)?,
            signals: ProcessSignals::LeftAlone,
        };
        let machine = Machine::restore(&wanted, &records, Identity::default(), host, image)?;
        let seed = &machine.shared.kernel;
        // For ever: nothing was run yet.
        seed.sched.stop();
        let page = vdso::page(&seed.memory);
        data::publish(&page, None, machine.shared.cpu_source);
        let image = load(&machine.hardware, snapshot, &Arc::default()).map_err(RunError::Image)?;
        let seeds = Seeds::new(&seed.memory, image, &loaded, |at| records.is_hosts(at));
        let fresh = machine.cpus.lock().first().map(Vcpu::fpu).transpose();
        let fresh = fresh.map_err(RunError::Cpu)?.ok_or(RunError::NoCpu)?;
        let components = machine.hardware.profile.state_components;
        let threads = Mutex::new(machine.start_threads()?);
        Ok(Arc::new(Self {
            seeds,
            records,
            fpu: (fresh, components),
            events: Arc::default(),
            strace: wanted.strace,
            made: AtomicU64::new(0),
            live: Some(Live { machine, threads }),
        }))
    }

    fn machine(&self) -> &Machine {
        let live = self.live.as_ref();
        &live.expect("it is taken when the machine goes").machine
    }

    fn seed(&self) -> &Arc<Kernel> {
        &self.machine().shared.kernel
    }

    /// Makes a guest, which goes on where the template was frozen.
    ///
    /// # Errors
    /// There is no memory for it, or a file is not what it was.
    pub fn fork(self: &Arc<Self>, wish: Wish) -> Result<Tenant, RunError> {
        let seed = self.seed();
        let sched = Arc::new(Sched::new(seed.sched.roster()));
        // Until the machine knows it.
        sched.stop();
        let stdio = stdio::open_shared(&wish.ends, &sched, &self.events);
        let parts = Parts {
            place: Place::Beside(seed),
            memory: Arc::clone(&seed.memory),
            sched: Arc::clone(&sched),
            files: stdio.files,
            tty: stdio.tty,
            tsc: TscInfo::unusable(),
            info: seed.info,
            fpu: self.fpu.clone(),
        };
        let mut memory = self.seeds.loader().map_err(RunError::Image)?;
        let kernel = restore(&self.records, parts, &mut memory, wish.identity)?;
        self.pace();
        let guest = Arc::new(Shared {
            kernel: Arc::new(kernel),
            table: Table::shared(),
            counters: Counters::default(),
            strace: self.strace.then(Strace::default),
            cpu_source: self.machine().shared.cpu_source,
            limit: Limit::default(),
        });
        if let Some(timeout) = wish.timeout {
            guest.end_after(timeout);
        }
        self.machine().guests.add(&guest);
        sched.go_on();
        let machine = Arc::clone(self);
        Ok(Tenant { machine, guest })
    }

    /// A fork gives the seed another root too, and the old one comes back with its flush. On hosts where some virtual
    /// CPU must do that, they would pile up.
    fn pace(&self) {
        if self.made.fetch_add(1, Ordering::Relaxed) % PACE == PACE - 1 {
            self.seed().memory.finish_flushes();
        }
    }

    /// What the machine's memory is used for, that of the seed included.
    #[must_use]
    pub fn memory(&self) -> MemoryReport {
        let stats = self.seed().memory.manager.stats();
        MemoryReport::new(&stats, self.machine().supervisor_tables)
    }

    /// Whether guests are forks of the seed, as most are.
    #[must_use]
    pub fn forks(&self) -> bool {
        self.seeds.are_forked()
    }
}

impl Drop for SharedMachine {
    /// Nobody is in it any more: every tenant keeps it.
    fn drop(&mut self) {
        let Some(Live {
            mut machine,
            threads,
        }) = self.live.take()
        else {
            return;
        };
        let ended = machine.end_threads(threads.into_inner(), || self.events.stop());
        if let Err(error) = &ended {
            tracing::error!(%error, "the shared machine");
        }
        match ended {
            // They still use what the machine is made of.
            Err(RunError::Stuck(_)) => std::mem::forget(machine),
            Ok(()) | Err(_) => _ = machine.take_down(),
        }
    }
}

impl Tenant {
    /// Its Linux layer.
    #[must_use]
    pub fn kernel(&self) -> &Arc<Kernel> {
        &self.guest.kernel
    }

    /// Whether it has ended.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.kernel().sched.has_ended()
    }

    /// Waits for its end, and gives back what it had. The exit status: the program's, 128 + the signal that ended it, 124 when
    /// its time was up, 125 when the machine failed.
    #[must_use]
    pub fn wait(self) -> u8 {
        let kernel = self.kernel();
        kernel.sched.wait_for_end();
        let status = kernel.state().main_status;
        match status {
            Some(status) => exit_status(status),
            None if self.guest.limit.has_passed() => STATUS_TIMEOUT,
            None => STATUS_FAILURE,
        }
    }
}

impl Drop for Tenant {
    fn drop(&mut self) {
        let kernel = &self.guest.kernel;
        kernel.sched.end();
        kernel.sched.wait_for_rest();
        let id = kernel.sched.guest();
        self.machine.machine().guests.remove(id);
        self.machine.events.forget(id);
        kernel.take_down();
        let memory = &kernel.memory;
        if memory.sections.untidy() {
            memory.views_changed();
        }
    }
}

#[cfg(test)]
mod tests;
