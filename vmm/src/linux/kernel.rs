//! The machine-wide state of the Linux layer.

use std::sync::{Arc, OnceLock};

use super::call::Ctx;
use super::exec::MachineInfo;
use super::freezes::Freezes;
use super::fs::Vfs;
use super::process::{Process, State};
use super::sched::Sched;
use super::time::Clock;
use super::tty::Tty;
use crate::locks::{Mutex, MutexGuard, rank};
use crate::memory::{Memory, Space, VmmPlatform};
use crate::snapshot::records::Identity;

/// Limits a person sets.
#[derive(Clone, Copy, Debug)]
pub struct KernelLimits {
    /// Processes (zombies included) the machine may have; more gives EAGAIN.
    pub max_procs: usize,
    /// Threads of all processes together; more gives EAGAIN.
    pub max_threads: usize,
    /// Processors the guest is told about, and workers that run it.
    pub cpus: usize,
}

/// What a kernel is made of.
#[expect(missing_docs, reason = "see the fields of `Kernel`")]
pub struct KernelParts {
    pub memory: Arc<Memory>,
    pub sched: Arc<Sched>,
    pub clock: Arc<Clock>,
    pub vfs: Vfs,
    pub tty: Option<Arc<Tty>>,
    pub limits: KernelLimits,
    pub info: MachineInfo,
}

/// Takes what the guest prints.
pub type Printed = Box<dyn Fn(&[u8]) + Send + Sync>;

/// The machine-wide state: one per virtual machine, shared by its workers.
pub struct Kernel {
    /// The memory manager, the pool and the pager.
    pub memory: Arc<Memory>,
    /// Who runs and who waits.
    pub sched: Arc<Sched>,
    /// The clock the guest reads, with and without a call.
    pub clock: Arc<Clock>,
    /// Mounts and path walking.
    pub vfs: Vfs,
    /// The terminal, if standard input is one.
    pub tty: Option<Arc<Tty>>,
    /// Record locks and what else the descriptor calls share.
    pub io: super::fd::Io,
    /// Limits.
    pub limits: KernelLimits,
    /// What programs are told about the machine.
    pub info: MachineInfo,
    /// Called when the first program's last thread ends, with its memory still there.
    pub main_ends: OnceLock<Box<dyn Fn() + Send + Sync>>,
    /// Told of what the guest prints on the VMM's standard output.
    pub printed: OnceLock<Printed>,
    /// The guest's wishes to be frozen.
    pub freezes: Arc<Freezes>,
    /// Which of several guests made of one it is; unset if it was started.
    pub identity: OnceLock<Identity>,
    /// What tells its boot from others, once somebody has read it: another one in each guest made of one.
    pub boot_id: OnceLock<String>,
    state: Mutex<rank::KernelState, State>,
}

impl Kernel {
    /// A machine's kernel with nothing but the reaper in its process tree.
    #[must_use]
    pub fn new(parts: KernelParts) -> Self {
        let KernelParts {
            memory,
            sched,
            clock,
            vfs,
            tty,
            limits,
            info,
        } = parts;
        let root = vfs.root();
        let io = super::fd::Io::new(&sched);
        let freezes = Arc::new(Freezes::new(sched.new_key()));
        Self {
            io,
            freezes,
            memory,
            sched,
            clock,
            vfs,
            tty,
            limits,
            info,
            main_ends: OnceLock::new(),
            printed: OnceLock::new(),
            identity: OnceLock::new(),
            boot_id: OnceLock::new(),
            state: Mutex::new(State::new(root)),
        }
    }

    /// Ends every process, whatever it was doing, and gives back what the guest has of its machine. Nothing of it
    /// runs any more.
    pub fn take_down(&self) {
        drop(self.sched.drain());
        let mut state = self.state();
        let left = (std::mem::take(&mut state.procs), state.main_mm.take());
        drop(state);
        // Dropped without the lock: descriptors wake what waits for them.
        drop(left);
        self.vfs.close();
    }

    /// Before [`Self::take_down`]: the address spaces of processes that `wants` says, for the caller to delete or to use. Nothing
    /// of the guest runs any more.
    pub fn leave_spaces(
        &self,
        wants: impl Fn(&Arc<Space<VmmPlatform>>) -> bool,
    ) -> Vec<Arc<Space<VmmPlatform>>> {
        let state = self.state();
        let spaces = state.procs.values().filter_map(|p| p.mm.as_ref());
        let spaces = spaces.chain(&state.main_mm);
        spaces
            .filter(|mm| wants(&mm.space))
            .filter_map(|mm| mm.leave())
            .collect()
    }

    /// Locks the process tree. Never held across the virtual CPU, a host file operation or a fault
    /// that may read a file.
    pub fn state(&self) -> MutexGuard<'_, rank::KernelState, State> {
        self.state.lock()
    }
}

impl Ctx<'_> {
    /// Runs `f` on the calling process, under the state lock.
    pub fn with_process<R>(&self, f: impl FnOnce(&mut Process) -> R) -> R {
        let mut state = self.k.state();
        let process = state
            .procs
            .get_mut(&self.t.pid)
            .expect("a running thread has a process");
        f(process)
    }
}
