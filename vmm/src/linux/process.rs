//! Processes: the records behind a pid. All are kept in [`State`], under one lock that is never
//! held across the virtual CPU or a host file operation.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde::{Deserialize, Serialize};

use super::Errno;
use super::file::{Description, Location};
use super::mm::guard::{self, GuardHeap};
use super::proc::futex::FutexTable;
use super::proc::posix_timers::PosixTimers;
use super::thread::{ThreadShared, Tid};
use crate::locks::{Mutex, rank};
use crate::memory::{Memory, Space, VmmPlatform};

/// Process id, as the guest sees it.
pub type Pid = i32;

/// Pid 1: the machine's own reaper, a record without a program. The first program is pid 2.
pub const INIT: Pid = 1;

/// Number of signals (signal(7)).
pub const SIGNALS: usize = 64;

/// A space and what the Linux layer knows about it. Shared by `vfork` until `execve`. When its last
/// user goes, the memory goes: nobody else deletes a space.
#[derive(Debug)]
pub struct AddressSpace {
    /// The memory manager's space.
    pub space: Arc<Space<VmmPlatform>>,
    /// The layout `execve` made.
    pub layout: Mutex<rank::Layout, MmLayout>,
    /// What guards its mappings, with `--guard-alloc`.
    pub guards: Option<Mutex<rank::Guards, GuardHeap>>,
    memory: Arc<Memory>,
    deleted: AtomicBool,
    /// What tells it from the spaces of other guests is still to be written into it.
    same_as_others: AtomicBool,
}

impl AddressSpace {
    /// Takes over `space`, one of `memory`'s.
    #[must_use]
    pub fn new(
        memory: &Arc<Memory>,
        space: Arc<Space<VmmPlatform>>,
        layout: MmLayout,
    ) -> Arc<Self> {
        Arc::new(Self {
            space,
            layout: Mutex::new(layout),
            guards: memory.guard.get().map(|_| Mutex::default()),
            memory: Arc::clone(memory),
            deleted: AtomicBool::new(false),
            same_as_others: AtomicBool::new(false),
        })
    }

    /// It is to be told from the spaces of other guests ([`crate::linux::saved::identity::renew`]) before a program
    /// runs in it.
    pub(super) fn renew_later(&self) {
        self.same_as_others.store(true, Ordering::SeqCst);
    }

    /// Whether that is to be done, by the caller.
    pub(super) fn take_renewal(&self) -> bool {
        self.same_as_others.load(Ordering::Relaxed)
            && self.same_as_others.swap(false, Ordering::SeqCst)
    }

    /// Gives up `own`, the calling thread's process's handle, when the thread itself still holds
    /// `mm`: if nobody else uses it, the memory is free when this returns.
    pub fn retire(mm: &Arc<Self>, own: Option<Arc<Self>>) {
        drop(own);
        if Arc::strong_count(mm) == 1 {
            let layout = mm.layout.lock();
            let brk = (layout.brk_start, layout.brk);
            drop(layout);
            mm.check_guards(brk);
            mm.delete();
        }
    }

    /// The guards of a forked child's address space are those of its parent's.
    pub fn inherit_guards(&self, parent: &Self, pid: Pid) {
        if let (Some(own), Some(parents)) = (&self.guards, &parent.guards) {
            let mut guards = parents.lock().clone();
            guards.set_pid(pid);
            *own.lock() = guards;
        }
    }

    /// Looks at what guards the mappings for the last time.
    fn check_guards(&self, brk: (u64, u64)) {
        if let Some(guards) = self.guards.as_ref().filter(|_| !self.is_deleted()) {
            guard::check_all(&self.memory, &self.space, &guards.lock(), brk);
        }
    }

    /// Leaves the space to somebody else, to delete or to use. None if it is deleted already. Its process has ended.
    pub(super) fn leave(&self) -> Option<Arc<Space<VmmPlatform>>> {
        let deleted = self.deleted.swap(true, Ordering::SeqCst);
        (!deleted).then(|| Arc::clone(&self.space))
    }

    /// Whether its memory has been given back.
    pub(crate) fn is_deleted(&self) -> bool {
        self.deleted.load(Ordering::SeqCst)
    }

    fn delete(&self) {
        if !self.deleted.swap(true, Ordering::SeqCst) {
            self.memory.delete_space(&self.space);
        }
    }
}

impl Drop for AddressSpace {
    fn drop(&mut self) {
        let layout = self.layout.get_mut();
        let brk = (layout.brk_start, layout.brk);
        self.check_guards(brk);
        self.delete();
    }
}

/// Where things are in an address space (`/proc/self/stat` and brk(2)).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct MmLayout {
    /// First address of the heap.
    pub brk_start: u64,
    /// Current program break.
    pub brk: u64,
    /// Lowest and highest address of the main stack's range.
    pub stack: (u64, u64),
    /// Where the search for a place for a mapping starts, downwards.
    pub mmap_top: u64,
    /// The argument strings: first byte and end.
    pub args: (u64, u64),
    /// The environment strings: first byte and end.
    pub envs: (u64, u64),
    /// The auxiliary vector as put on the stack, for `/proc/self/auxv`.
    pub auxv: Vec<u8>,
}

impl MmLayout {
    /// The name of anonymous memory, as `/proc/PID/maps` shows it.
    #[must_use]
    pub fn area(&self, start: u64, end: u64) -> &'static str {
        if self.brk > self.brk_start && start < self.brk && end > self.brk_start {
            "[heap]"
        } else if start < self.stack.1 && end > self.stack.0 {
            "[stack]"
        } else {
            ""
        }
    }
}

/// What a process does on a signal, as given to `rt_sigaction`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SigAction {
    /// `SIG_DFL` (0), `SIG_IGN` (1) or the handler's address.
    pub handler: u64,
    /// `SA_*`.
    pub flags: u64,
    /// Return trampoline (`SA_RESTORER`).
    pub restorer: u64,
    /// Signals blocked while the handler runs.
    pub mask: u64,
}

/// A signal that was sent and not yet taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SigInfo {
    /// Signal number, 1 to 64.
    pub signo: i32,
    /// `SI_USER`, `SEGV_MAPERR`, `CLD_EXITED`, ...
    pub code: i32,
    /// `si_errno`.
    pub errno: i32,
    /// The union, by the kind of signal.
    pub fields: SigFields,
}

/// The union in `siginfo_t` (sigaction(2)).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SigFields {
    /// Sent by a process: `si_pid`, `si_uid`, and `si_value` for `sigqueue`.
    Sender {
        /// Sending process.
        pid: Pid,
        /// Its real user id.
        uid: u32,
        /// `si_value` (0 unless queued with one).
        value: u64,
    },
    /// A fault: `si_addr`.
    Fault {
        /// Faulting address, or the faulting instruction's.
        addr: u64,
    },
    /// A child: `si_pid`, `si_uid`, `si_status`.
    Child {
        /// The child.
        pid: Pid,
        /// Its real user id.
        uid: u32,
        /// Exit status or signal number.
        status: i32,
    },
    /// A timer of timer_create(2): `si_timerid`, `si_overrun`, `si_value`.
    Timer {
        /// The timer.
        id: i32,
        /// Expiries beyond the first.
        overrun: i32,
        /// As the program gave it.
        value: u64,
    },
    /// Nothing to tell.
    None,
}

/// Signals that were sent and not yet taken: a set, with one queued record per standard signal
/// and a bounded queue for real-time ones.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Pending {
    /// Bit N-1 for signal N.
    pub set: u64,
    /// In the order they were sent.
    pub queue: Vec<SigInfo>,
}

impl Pending {
    /// Whether signal `signo` is pending.
    #[must_use]
    pub fn has(&self, signo: i32) -> bool {
        self.set & super::signal::bit(signo) != 0
    }
}

/// How a process ended or what it is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Life {
    /// Alive.
    Running,
    /// Stopped by this signal.
    Stopped(i32),
    /// Ended, not yet waited for: the status as wait4(2) reports it.
    Zombie(i32),
}

/// A state change that `wait4` has not reported yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Unreported {
    /// Nothing.
    None,
    /// It stopped.
    Stopped,
    /// It went on.
    Continued,
}

/// Real, effective, saved and file-system ids.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Credentials {
    /// Real, effective, saved user id.
    pub uid: [u32; 3],
    /// Real, effective, saved group id.
    pub gid: [u32; 3],
    /// Supplementary groups.
    pub groups: Vec<u32>,
}

/// One entry of the descriptor table.
#[derive(Clone, Debug)]
pub struct Fd {
    /// The open file description.
    pub description: Arc<Description>,
    /// `FD_CLOEXEC`.
    pub close_on_exec: bool,
}

/// Descriptor table of a process.
#[derive(Clone, Debug, Default)]
pub struct FdTable {
    /// By number.
    pub fds: BTreeMap<i32, Fd>,
}

/// CPU time and counts (getrusage(2)), in nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Usage {
    /// Time in ring 3 and in the VMM on its behalf.
    pub cpu_ns: u64,
    /// Faults that needed no I/O.
    pub minor_faults: u64,
    /// Faults that read a file.
    pub major_faults: u64,
    /// Largest resident size, pages.
    pub peak_pages: u64,
}

/// What prctl(2) sets on a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Prctl {
    /// `PR_SET_PDEATHSIG`; 0 for none.
    pub death_signal: i32,
    /// `PR_SET_DUMPABLE`.
    pub dumpable: u64,
    /// `PR_SET_NO_NEW_PRIVS`.
    pub no_new_privs: bool,
    /// `PR_SET_CHILD_SUBREAPER`.
    pub subreaper: bool,
    /// `PR_SET_KEEPCAPS`.
    pub keep_caps: bool,
    /// `PR_SET_TIMERSLACK`, nanoseconds.
    pub timer_slack: u64,
}

impl Default for Prctl {
    fn default() -> Self {
        Self {
            death_signal: 0,
            dumpable: 1,
            no_new_privs: false,
            subreaper: false,
            keep_caps: false,
            timer_slack: 50_000,
        }
    }
}

/// A process.
#[derive(Debug)]
pub struct Process {
    /// Its id.
    pub pid: Pid,
    /// Its parent.
    pub ppid: Pid,
    /// Process group.
    pub pgid: Pid,
    /// Session.
    pub sid: Pid,
    /// It has called `execve` since its parent forked it (setpgid(2) refuses then).
    pub has_execed: bool,
    /// Alive, stopped, zombie.
    pub life: Life,
    /// What `wait4` has not heard of yet.
    pub unreported: Unreported,
    /// It is ending with this status: its threads leave as soon as they notice.
    pub exiting: Option<i32>,
    /// This thread is in `execve`: the others leave as soon as they notice.
    pub exec: Option<Tid>,
    /// Signal sent to the parent at its end (`SIGCHLD` for fork).
    pub exit_signal: i32,
    /// Children, zombies included.
    pub children: BTreeSet<Pid>,
    /// Its threads. The leader's is gone when it ended before the others.
    pub threads: BTreeMap<Tid, Arc<ThreadShared>>,
    /// Signals pending for each thread itself.
    pub thread_pending: BTreeMap<Tid, Pending>,
    /// Masks of the threads, kept equal to `Thread::mask` so that others can pick a target.
    pub thread_masks: BTreeMap<Tid, u64>,
    /// Names of threads that have one of their own (`PR_SET_NAME`).
    pub thread_names: BTreeMap<Tid, Vec<u8>>,
    /// Signals pending for the process.
    pub pending: Pending,
    /// Dispositions; index N-1 for signal N.
    pub actions: [SigAction; SIGNALS],
    /// Open files. Emptied when the process ends.
    pub files: FdTable,
    /// Working directory.
    pub cwd: Location,
    /// File mode creation mask.
    pub umask: u32,
    /// Who it is.
    pub cred: Credentials,
    /// Resource limits: soft, hard; index `RLIMIT_*`.
    pub rlimits: [(u64, u64); 16],
    /// The address space; `None` once it has ended.
    pub mm: Option<Arc<AddressSpace>>,
    /// Guest path of the running program.
    pub exe: Location,
    /// `comm` (prctl(2) `PR_SET_NAME`), at most 15 bytes.
    pub comm: Vec<u8>,
    /// Nice value.
    pub nice: i32,
    /// A `vfork` parent waits until this process calls `execve` or ends.
    pub vfork_waits: bool,
    /// `ITIMER_REAL`: next expiry (ns of `CLOCK_MONOTONIC`) and interval in ns.
    pub itimer_real: Option<(u64, u64)>,
    /// `ITIMER_VIRTUAL` and `ITIMER_PROF`: next expiry (ns of the process's CPU time) and interval.
    pub itimer_cpu: [Option<(u64, u64)>; 2],
    /// What timer_create(2) made.
    pub posix_timers: PosixTimers,
    /// What prctl(2) sets.
    pub prctl: Prctl,
    /// When it was started, ns of `CLOCK_MONOTONIC`.
    pub started: u64,
    /// What it used itself (ended threads), and what its waited-for children used.
    pub usage: Usage,
    /// See `usage`.
    pub children_usage: Usage,
}

/// The controlling terminal's record.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct TtyState {
    /// Session it controls.
    pub session: Option<Pid>,
    /// Foreground process group.
    pub foreground: Pid,
    /// The host's shell continues the VMM when it was stopped: the first program's group counts as
    /// not orphaned.
    pub outer_shell: bool,
}

/// Everything the kernel lock protects.
#[derive(Debug)]
pub struct State {
    /// By pid.
    /// Each by itself: a node of the tree has room for eleven, and most guests have two.
    pub procs: BTreeMap<Pid, Box<Process>>,
    /// Next pid to try.
    pub next_pid: Pid,
    /// The terminal.
    pub tty: TtyState,
    /// The first program: when it ends, so does the machine.
    pub main: Pid,
    /// Wait status of the first program, once it has ended.
    pub main_status: Option<i32>,
    /// Its memory then, for whoever takes the guest down: the next guest may have the space ([`super::kernel::Kernel::leave_spaces`]).
    pub main_mm: Option<Arc<AddressSpace>>,
    /// Waiters in futex(2).
    pub futexes: FutexTable,
}

/// Largest pid plus one (`/proc/sys/kernel/pid_max`).
pub const PID_MAX: Pid = 32_768;

/// Where pids start again after [`PID_MAX`], as on Linux.
const PID_WRAP: Pid = 300;

impl Process {
    /// A process without threads, program or files, in its own session; for [`State::new`] and as
    /// the start of any other.
    #[must_use]
    pub fn new(pid: Pid, cwd: Location) -> Self {
        Self {
            pid,
            ppid: INIT,
            pgid: pid,
            sid: pid,
            has_execed: false,
            life: Life::Running,
            unreported: Unreported::None,
            exiting: None,
            exec: None,
            exit_signal: libc::SIGCHLD,
            children: BTreeSet::new(),
            threads: BTreeMap::new(),
            thread_pending: BTreeMap::new(),
            thread_masks: BTreeMap::new(),
            thread_names: BTreeMap::new(),
            pending: Pending::default(),
            actions: [SigAction::default(); SIGNALS],
            files: FdTable::default(),
            exe: cwd.clone(),
            cwd,
            umask: 0o022,
            cred: Credentials::default(),
            rlimits: super::proc::limits::defaults(),
            mm: None,
            comm: Vec::new(),
            nice: 0,
            vfork_waits: false,
            itimer_real: None,
            itimer_cpu: [None; 2],
            posix_timers: PosixTimers::default(),
            prctl: Prctl::default(),
            started: 0,
            usage: Usage::default(),
            children_usage: Usage::default(),
        }
    }

    /// Whether it has ended and only waits for its parent to ask.
    #[must_use]
    pub fn is_zombie(&self) -> bool {
        matches!(self.life, Life::Zombie(_))
    }

    /// Whether thread `tid` is on its way out.
    #[must_use]
    pub fn is_leaving(&self, tid: Tid) -> bool {
        self.exiting.is_some() || self.exec.is_some_and(|survivor| survivor != tid)
    }

    /// The name of one of its threads.
    #[must_use]
    pub fn name_of(&self, tid: Tid) -> &[u8] {
        self.thread_names.get(&tid).unwrap_or(&self.comm)
    }

    /// Names a thread; the leader's name is the process's.
    pub fn set_name(&mut self, tid: Tid, name: Vec<u8>) {
        if tid == self.pid {
            self.comm = name;
        } else {
            self.thread_names.insert(tid, name);
        }
    }

    /// CPU time of all its threads, ended ones included, in nanoseconds.
    #[must_use]
    pub fn cpu_ns(&self) -> u64 {
        let live = self
            .threads
            .values()
            .map(|t| t.cpu_time.load(Ordering::Relaxed));
        live.fold(self.usage.cpu_ns, u64::saturating_add)
    }
}

impl Usage {
    /// Takes note of what `mm` had resident at most.
    pub fn note_peak(&mut self, mm: &AddressSpace) {
        let peak = mm.memory.manager.usage(&mm.space).peak_resident;
        self.peak_pages = self.peak_pages.max(peak);
    }
}

impl State {
    /// A machine with nothing but its reaper, [`INIT`].
    #[must_use]
    pub fn new(root: Location) -> Self {
        let mut init = Process::new(INIT, root);
        init.ppid = 0;
        init.comm = b"init".to_vec();
        Self {
            procs: BTreeMap::from([(INIT, Box::new(init))]),
            next_pid: INIT + 1,
            tty: TtyState::default(),
            main: INIT + 1,
            main_status: None,
            main_mm: None,
            futexes: FutexTable::default(),
        }
    }

    /// An id for a new process or thread: the next one that names no thread, process, group or session.
    ///
    /// # Errors
    /// `EAGAIN` when there is none.
    pub fn allocate_pid(&mut self) -> Result<Pid, Errno> {
        for _ in 0..PID_MAX {
            let pid = self.next_pid;
            self.next_pid = if pid + 1 >= PID_MAX {
                PID_WRAP
            } else {
                pid + 1
            };
            let named = self.procs.contains_key(&pid)
                || self
                    .procs
                    .values()
                    .any(|p| p.pgid == pid || p.sid == pid || p.threads.contains_key(&pid));
            if !named {
                return Ok(pid);
            }
        }
        Err(Errno::AGAIN)
    }

    /// The process a thread belongs to: a live one, or a leader whose process still has its id.
    #[must_use]
    pub fn owner_of(&self, tid: Tid) -> Option<Pid> {
        if self.procs.contains_key(&tid) {
            return Some(tid);
        }
        self.procs
            .values()
            .find(|p| p.threads.contains_key(&tid))
            .map(|p| p.pid)
    }

    /// The process with this id, zombies included.
    ///
    /// # Errors
    /// `ESRCH`.
    pub fn process(&self, pid: Pid) -> Result<&Process, Errno> {
        self.procs.get(&pid).map(|p| &**p).ok_or(Errno::SRCH)
    }

    /// The process with this id, to change.
    ///
    /// # Errors
    /// `ESRCH`.
    pub fn process_mut(&mut self, pid: Pid) -> Result<&mut Process, Errno> {
        self.procs
            .get_mut(&pid)
            .map(|p| &mut **p)
            .ok_or(Errno::SRCH)
    }
}
