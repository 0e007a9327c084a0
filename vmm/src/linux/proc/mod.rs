//! Processes: their birth, death and family, who they are, what they may use, and what they can ask
//! about themselves.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::call::Entry;
use super::file::Location;
use super::kernel::Kernel;
use super::process::{AddressSpace, Credentials, FdTable, INIT, Life, Pid, Process, State};
use super::thread::{AltStack, Fpu, Regs, Starved, Thread, ThreadShared};

pub mod creds;
pub mod exit;
pub mod fork;
pub mod futex;
pub mod groups;
pub mod image;
pub mod info;
pub mod itimer;
pub mod limits;
pub mod posix_timers;
pub mod prctl;
pub mod saved;
pub mod sched;
pub mod threads;
pub mod timeval;
pub mod wait;

#[cfg(test)]
mod tests;
#[cfg(test)]
mod thread_tests;

pub use groups::tty_check;
pub use image::{Image, commit_exec};
pub use itimer::timers_due;

/// This folder's families.
pub const FAMILIES: &[&[Entry]] = &[
    creds::TABLE,
    exit::TABLE,
    fork::TABLE,
    futex::TABLE,
    groups::TABLE,
    info::TABLE,
    itimer::TABLE,
    posix_timers::TABLE,
    limits::TABLE,
    prctl::TABLE,
    sched::TABLE,
    wait::TABLE,
];

/// What the machine's first program starts with.
#[derive(Debug)]
pub struct FirstProcess {
    /// Its program.
    pub exe: Location,
    /// `comm`, at most 15 bytes of which are kept.
    pub comm: Vec<u8>,
    /// Its memory, with the program in it.
    pub mm: Arc<AddressSpace>,
    /// Its registers: the entry point and the stack.
    pub regs: Regs,
    /// Its open files.
    pub files: FdTable,
    /// Its working directory.
    pub cwd: Location,
    /// Who it is.
    pub cred: Credentials,
    /// File mode creation mask.
    pub umask: u32,
    /// The machine has a terminal, which becomes the controlling one of its session.
    pub terminal: bool,
}

/// Puts the first program's process into a machine that has none yet, pid 2 in its own session. The
/// thread is not yet in the run queue.
pub fn first_process(k: &Kernel, first: FirstProcess) -> Box<Thread> {
    let now = k.clock.monotonic();
    let mut state = k.state();
    let pid = state.main;
    state.next_pid = pid + 1;
    if first.terminal {
        state.tty.session = Some(pid);
        state.tty.foreground = pid;
    }
    let mut p = Process::new(pid, first.cwd);
    p.exe = first.exe;
    p.comm = comm(&first.comm);
    p.files = first.files;
    p.cred = first.cred;
    p.umask = first.umask;
    p.mm = Some(Arc::clone(&first.mm));
    p.started = now;
    p.rlimits[limits::NPROC] = (k.limits.max_threads as u64, k.limits.max_threads as u64);
    let thread = Thread {
        tid: pid,
        pid,
        regs: first.regs,
        fpu: Fpu::Initial,
        last_cpu: None,
        call: None,
        mask: 0,
        saved_mask: None,
        altstack: AltStack::default(),
        clear_child_tid: 0,
        robust_list: (0, 0),
        personality: 0,
        mm: first.mm,
        last_trap: (0, 0, 0),
        starved: Starved::default(),
        image: None,
        yields: false,
        account: 0,
        shared: Arc::new(ThreadShared::default()),
    };
    adopt_leader(&mut state, p, &thread);
    Box::new(thread)
}

/// Puts a new process with its first thread into the tree.
fn adopt_leader(state: &mut State, mut p: Process, thread: &Thread) {
    let pid = p.pid;
    p.threads = BTreeMap::from([(thread.tid, Arc::clone(&thread.shared))]);
    p.thread_masks = BTreeMap::from([(thread.tid, thread.mask)]);
    p.life = Life::Running;
    if let Some(parent) = state.procs.get_mut(&p.ppid) {
        parent.children.insert(pid);
    }
    state.procs.insert(pid, Box::new(p));
}

/// The name as `PR_SET_NAME` keeps it: at most 15 bytes, none of them NUL.
#[must_use]
pub fn comm(name: &[u8]) -> Vec<u8> {
    name.iter()
        .copied()
        .take_while(|&b| b != 0)
        .take(15)
        .collect()
}

/// The process group `0` means to `me`, or the one named.
fn group_or_own(me: &Process, pgid: Pid) -> Pid {
    if pgid == 0 { me.pgid } else { pgid }
}

/// Processes in the machine, the reaper not counted.
fn population(state: &State) -> usize {
    state.procs.keys().filter(|&&pid| pid != INIT).count()
}
