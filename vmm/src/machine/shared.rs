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
//!   frames, and when there are none, the process that has most is killed, whichever tenant it is of (`super::victim`);
//! * workers, in turn ([`crate::linux::sched::roster`]);
//! * the vDSO's page, which has no clock: programs make the call.
//!
//! An ended tenant gives back all it had of the machine when it is dropped.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::builder::Machine;
use super::guests::Guests;
use super::hardware::Hardware;
use super::report::MemoryReport;
use super::restored::load;
use super::stats::Counters;
use super::strace::Strace;
use super::worker::{Limit, Shared};
use super::{After, Counts, End, HostSide, ProcessSignals, RunError, Wanted};
use crate::hv::kvm::vm::Vm;
use crate::linux::events::Events;
use crate::linux::kernel::Kernel;
use crate::linux::sched::Sched;
use crate::linux::stdio::{self, Ends, Given};
use crate::linux::table::Table;
use crate::linux::thread::XsaveArea;
use crate::linux::time::TscInfo;
use crate::linux::vdso::{self, data};
use crate::locks::{Mutex, rank};
use crate::snapshot::image::{Image, Loaded, Seeds};
use crate::snapshot::records::{Identity, Parts, Place, Records, restore};

/// A machine that guests of one template share.
pub struct SharedMachine {
    /// Until the end; its guest is the seed.
    machine: Mutex<rank::MachineThreads, Option<Machine>>,
    guests: Arc<Guests>,
    seed: Arc<Shared>,
    vm: Arc<Vm>,
    supervisor_tables: u64,
    seeds: Seeds,
    records: Records,
    fpu: (XsaveArea, u64),
    events: Arc<Events>,
    strace: bool,
    /// Guests made so far.
    made: AtomicU64,
}

/// How long a worker may take to leave a guest that has ended.
const PATIENCE: Duration = Duration::from_secs(60);

/// Guests that are made before flushes are waited for.
const PACE: u64 = 32;

/// A guest to be.
#[derive(Clone, Debug, Default)]
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
        image: &Arc<Image>,
        records: Records,
    ) -> Result<Arc<Self>, RunError> {
        let wanted = Wanted {
            commit: crate::config::Commit::Over,
            fork: crate::config::ForkMode::Shared,
            ..wanted.clone()
        };
        let loaded = Arc::new(Loaded::default());
        let seeds = |hardware: &Hardware| load(hardware, image, &loaded);
        let host = HostSide {
            stdio: Given::inherited().map_err(RunError::Stdio)?,
            signals: ProcessSignals::LeftAlone,
        };
        let mut machine = Machine::restore(&wanted, &records, Identity::default(), host, seeds)?;
        // Its world stands still, and nobody lets it go.
        let seed = Arc::clone(&machine.shared);
        let memory = &seed.kernel.memory;
        data::publish(&vdso::page(memory), None, seed.cpu_source);
        let again = load(&machine.bare.hardware, image, &Arc::default());
        let again = again.map_err(RunError::Image)?;
        let seeds = Seeds::new(memory, again, &loaded, |at| records.is_hosts(at));
        machine.bare.staff().map_err(RunError::Thread)?;
        let components = machine.bare.hardware.profile.state_components;
        Ok(Arc::new(Self {
            seeds,
            records,
            fpu: (machine.bare.fresh().clone(), components),
            events: Arc::clone(&machine.bare.events),
            strace: wanted.strace,
            made: AtomicU64::new(0),
            guests: Arc::clone(&machine.bare.guests),
            vm: Arc::clone(&machine.bare.hardware.vm),
            supervisor_tables: machine.bare.supervisor_tables(),
            seed,
            machine: Mutex::new(Some(machine)),
        }))
    }

    fn seed(&self) -> &Arc<Kernel> {
        &self.seed.kernel
    }

    /// Makes a guest, which goes on where the template was frozen.
    ///
    /// # Errors
    /// There is no memory for it, or a file is not what it was.
    pub fn fork(self: &Arc<Self>, wish: Wish) -> Result<Tenant, RunError> {
        Ok(self.fork_seen(wish, |_| ())?.0)
    }

    /// The same, with a look at the guest before it runs: it cannot have ended yet, nor asked for anything.
    pub(crate) fn fork_seen<R>(
        self: &Arc<Self>,
        wish: Wish,
        look: impl FnOnce(&Arc<Shared>) -> R,
    ) -> Result<(Tenant, R), RunError> {
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
            tree: None,
            info: seed.info,
            fpu: self.fpu.clone(),
        };
        let mut memory = self.seeds.loader();
        let kernel = restore(&self.records, parts, &mut memory, wish.identity)?;
        self.pace();
        let guest = Arc::new(Shared {
            kernel: Arc::new(kernel),
            table: Table::shared(),
            counters: Counters::default(),
            strace: self.strace.then(Strace::default),
            cpu_source: self.seed.cpu_source,
            limit: Limit::default(),
        });
        if let Some(timeout) = wish.timeout {
            guest.end_after(timeout);
        }
        let seen = look(&guest);
        self.guests.add(&guest);
        sched.go_on();
        let machine = Arc::clone(self);
        Ok((Tenant { machine, guest }, seen))
    }

    /// A fork gives the seed another root too, and the old one comes back with its flush. On hosts where some virtual
    /// CPU must do that, they would pile up.
    fn pace(&self) {
        if self.made.fetch_add(1, Ordering::Relaxed) % PACE == PACE - 1 {
            self.seed().memory.finish_flushes();
        }
    }

    /// What one of its guests has counted; ioctls and memory are the machine's.
    pub(crate) fn counts(&self, guest: &Arc<Shared>) -> Counts {
        Counts::of_one(guest, &self.vm, self.supervisor_tables)
    }

    /// What the machine's memory is used for, that of the seed included.
    #[must_use]
    pub fn memory(&self) -> MemoryReport {
        let stats = self.seed().memory.manager.stats();
        MemoryReport::new(&stats, self.supervisor_tables)
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
        let Some(mut machine) = self.machine.lock().take() else {
            return;
        };
        let dismissed = machine.bare.dismiss();
        if let Some(error) = machine.bare.take_failure() {
            tracing::error!(%error, "the machine of many guests failed");
        }
        match dismissed {
            Ok(()) => _ = machine.take_down(After::End),
            Err(left) => {
                tracing::error!("threads of a machine do not end: {}", left.join(", "));
                // They still use what the machine is made of.
                std::mem::forget(machine);
            }
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

    /// What it and its machine have counted.
    pub(crate) fn counts(&self) -> Counts {
        self.machine.counts(&self.guest)
    }

    /// Waits for its end, and says what it was.
    #[must_use]
    pub fn wait(&self) -> End {
        let kernel = self.kernel();
        kernel.sched.wait_for_end();
        let status = kernel.state().main_status;
        match status {
            Some(status) => End::Program(status),
            None if self.guest.limit.has_passed() => End::TimedOut,
            None => End::Failed,
        }
    }
}

impl Drop for Tenant {
    fn drop(&mut self) {
        let kernel = &self.guest.kernel;
        kernel.sched.end();
        if !kernel.sched.wait_until_left(PATIENCE) {
            tracing::error!("a worker does not come back from a guest that has ended");
            return;
        }
        self.machine.guests.remove(&self.guest);
        self.machine.events.forget(kernel.sched.guest());
        kernel.take_down();
        let memory = &kernel.memory;
        if memory.sections.untidy() {
            memory.views_changed();
        }
    }
}

pub(crate) mod registry;
#[cfg(test)]
mod tests;
