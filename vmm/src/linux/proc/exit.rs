//! The end of threads and processes.
//!
//! A process ends in three steps, by its last thread: what others may wait for is taken out of the
//! record under the lock; files and memory go without it (closing may wake readers); then the
//! record becomes a zombie, its children get a new parent and its own parent is told. So nobody
//! sees a dead process that still holds a pipe.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::futex::robust;
use super::groups;
use crate::linux::call::{Arg, Args, Ctx, Entry, Stop, SysResult, WaitKey};
use crate::linux::kernel::Kernel;
use crate::linux::process::{
    AddressSpace, FdTable, INIT, Life, Pid, SigFields, SigInfo, State, Usage,
};
use crate::linux::sched::Sched;
use crate::linux::signal::info::cld;
use crate::linux::signal::{SIG_IGN, action, sa, send};
use crate::linux::thread::Thread;

/// The family's calls.
pub const TABLE: &[Entry] = &[
    Entry {
        nr: 60,
        name: "exit",
        args: &[Arg::Int],
        handler: sys_exit,
    },
    Entry {
        nr: 231,
        name: "exit_group",
        args: &[Arg::Int],
        handler: sys_exit_group,
    },
];

/// A process without threads: its files and memory, to be given up without the state lock.
struct Remains {
    files: FdTable,
    mm: Option<Arc<AddressSpace>>,
}

/// Ends the calling thread; the last one's status is the process's.
fn sys_exit(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    thread_exit(c, (a.i32(0) & 0xff) << 8);
    Err(Stop::Exited)
}

fn sys_exit_group(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let status = (a.i32(0) & 0xff) << 8;
    {
        let mut state = c.k.state();
        end_process(&c.k.sched, &mut state, c.t, status);
    }
    thread_exit(c, status);
    Err(Stop::Exited)
}

/// Ends the process of a thread that is not in the guest, with a wait status: the others leave as soon as they notice. The
/// first status stays.
pub fn end_process(sched: &Sched, state: &mut State, t: &Thread, status: i32) {
    let Some(p) = state.procs.get_mut(&t.pid) else {
        return;
    };
    if p.exiting.is_none() && !p.is_zombie() {
        p.exiting = Some(status);
        // A kick of its own worker would reach the thread that runs there next.
        t.shared.call_attention();
        for &tid in p.threads.keys().filter(|&&tid| tid != t.tid) {
            send::notify(sched, p, tid);
        }
        sched.wake(WaitKey::Continued(t.pid));
    }
}

/// The end of the calling thread; with the last one, of its process, with this wait status unless it has one. The
/// caller drops the record.
pub fn thread_exit(c: &mut Ctx<'_>, status: i32) {
    c.t.call = None;
    if let Some(look) = c.k.main_ends.get()
        && is_end_of_main(&c.k.state(), c.t.pid)
    {
        look();
    }
    robust::thread_ends(c);
    clear_child_tid(c);
    let Some(remains) = leave(c, status) else {
        return;
    };
    drop(remains.files);
    c.k.io.locks.process_ended(c.k, c.t.pid);
    AddressSpace::retire(&c.t.mm, remains.mm);
    let mut state = c.k.state();
    bury(c.k, &mut state, c.t.pid);
}

/// Whether a thread of `pid` that ends is the last one of the first program.
fn is_end_of_main(state: &State, pid: Pid) -> bool {
    let process = state.procs.get(&pid).filter(|_| pid == state.main);
    process.is_some_and(|p| p.threads.len() == 1)
}

/// Tells whoever shares the memory that this thread is over (`CLONE_CHILD_CLEARTID`).
pub(crate) fn clear_child_tid(c: &mut Ctx<'_>) {
    let va = std::mem::take(&mut c.t.clear_child_tid);
    // The thread's own handle and its process's are two.
    if va != 0 && Arc::strong_count(&c.t.mm) > 2 && c.mem().write_obj(va, &0_u32).is_ok() {
        super::futex::wake_one(c, va);
    }
}

/// Takes the thread out of its process. The last one gets what the process leaves behind.
fn leave(c: &mut Ctx<'_>, status: i32) -> Option<Remains> {
    let mut state = c.k.state();
    super::futex::forget(&mut state, c.t.tid);
    let p = state.procs.get_mut(&c.t.pid)?;
    let used = c.t.shared.cpu_time.load(Ordering::Relaxed);
    p.threads.remove(&c.t.tid)?;
    p.usage.cpu_ns = p.usage.cpu_ns.saturating_add(used);
    p.thread_pending.remove(&c.t.tid);
    p.thread_masks.remove(&c.t.tid);
    p.thread_names.remove(&c.t.tid);
    if !p.threads.is_empty() {
        // A signal for the process may have been this thread's to take.
        send::retarget(&c.k.sched, p, u64::MAX);
        if p.exec.is_some() && p.threads.len() == 1 {
            c.k.sched.wake(WaitKey::Alone(c.t.pid));
        }
        return None;
    }
    p.exiting.get_or_insert(status);
    p.usage.note_peak(&c.t.mm);
    let files = std::mem::take(&mut p.files);
    let mut mm = p.mm.take();
    // The guest ends with it.
    if c.t.pid == state.main {
        state.main_mm = mm.take();
    }
    Some(Remains { files, mm })
}

/// Makes a process without threads a zombie, and settles its affairs.
fn bury(k: &Kernel, state: &mut State, pid: Pid) {
    let Some(p) = state.procs.get_mut(&pid) else {
        return;
    };
    let status = p.exiting.unwrap_or(0);
    p.life = Life::Zombie(status);
    let vfork = std::mem::take(&mut p.vfork_waits);
    p.pending = Default::default();
    leave_terminal(&k.sched, state, pid);
    give_away_children(&k.sched, state, pid);
    groups::hang_up_if_orphaned(&k.sched, state, pid);
    if vfork {
        k.sched.wake(WaitKey::VforkDone(pid));
    }
    notify_parent(&k.sched, state, pid, status);
    if pid == state.main {
        state.main_status = Some(status);
        k.sched.end();
    }
}

/// The end of a session's leader hangs up the terminal's foreground group.
fn leave_terminal(sched: &Sched, state: &mut State, pid: Pid) {
    if state.tty.session != Some(pid) {
        return;
    }
    let foreground = std::mem::take(&mut state.tty.foreground);
    state.tty.session = None;
    for signo in [libc::SIGHUP, libc::SIGCONT] {
        // An empty group has nobody to hang up on.
        let _ = send::group(sched, state, foreground, SigInfo::kernel(signo));
    }
}

/// Children of the dead get the nearest subreaper, or the machine's own reaper.
fn give_away_children(sched: &Sched, state: &mut State, pid: Pid) {
    let Some(p) = state.procs.get_mut(&pid) else {
        return;
    };
    let children = std::mem::take(&mut p.children);
    let heir = heir(state, pid);
    for child in children {
        let Some(p) = state.procs.get_mut(&child) else {
            continue;
        };
        p.ppid = heir;
        p.exit_signal = libc::SIGCHLD;
        let (death_signal, zombie) = (p.prctl.death_signal, p.life);
        if let Some(new) = state.procs.get_mut(&heir) {
            new.children.insert(child);
        }
        if let Life::Zombie(status) = zombie {
            notify_parent(sched, state, child, status);
            continue;
        }
        if death_signal != 0 {
            let _ = send::send(sched, state, child, None, SigInfo::kernel(death_signal));
        }
        groups::hang_up_if_orphaned_by(sched, state, child, pid);
    }
}

/// The nearest living ancestor that wants orphans, else [`INIT`].
fn heir(state: &State, pid: Pid) -> Pid {
    let mut at = pid;
    // A chain of parents cannot be longer than there are processes.
    for _ in 0..state.procs.len() {
        let Some(p) = state.procs.get(&at) else { break };
        at = p.ppid;
        let wants = |p: &crate::linux::process::Process| p.prctl.subreaper && p.exiting.is_none();
        if at <= INIT || state.procs.get(&at).is_some_and(|p| wants(p)) {
            break;
        }
    }
    if state.procs.contains_key(&at) {
        at
    } else {
        INIT
    }
}

/// Tells the parent that a child is dead: its signal, and whoever waits; or removes the record at
/// once if the parent does not want to know.
fn notify_parent(sched: &Sched, state: &mut State, pid: Pid, status: i32) {
    let Some(p) = state.procs.get(&pid) else {
        return;
    };
    let (parent, signo, uid) = (p.ppid, p.exit_signal, p.cred.uid[0]);
    if parent == INIT {
        reap(state, pid);
        return;
    }
    let action = state
        .procs
        .get(&parent)
        .map(|p| action(p, libc::SIGCHLD))
        .unwrap_or_default();
    let ignored = action.handler == SIG_IGN;
    let unwanted = signo == libc::SIGCHLD && (ignored || action.flags & sa::NOCLDWAIT != 0);
    if signo != 0 && !(signo == libc::SIGCHLD && ignored) {
        let (code, si_status) = code_and_status(status);
        let fields = SigFields::Child {
            pid,
            uid,
            status: si_status,
        };
        let info = SigInfo {
            signo,
            code,
            errno: 0,
            fields,
        };
        // A full queue loses the signal, not the zombie.
        let _ = send::send(sched, state, parent, None, info);
    }
    if unwanted {
        reap(state, pid);
    }
    sched.wake(WaitKey::ChildOf(parent));
}

/// `si_code` and `si_status` of a wait status.
#[must_use]
pub fn code_and_status(status: i32) -> (i32, i32) {
    match status & 0x7f {
        0 => (cld::EXITED, (status >> 8) & 0xff),
        signo => (cld::KILLED, signo),
    }
}

/// Removes a zombie: its usage goes to its parent. Returns what it and its children used.
pub fn reap(state: &mut State, pid: Pid) -> Usage {
    let Some(p) = state.procs.remove(&pid) else {
        return Usage::default();
    };
    let used = p.usage.plus(&p.children_usage);
    if let Some(parent) = state.procs.get_mut(&p.ppid) {
        parent.children.remove(&pid);
        parent.children_usage = parent.children_usage.plus(&used);
    }
    used
}

impl Usage {
    /// Both together.
    #[must_use]
    pub fn plus(&self, other: &Self) -> Self {
        Self {
            cpu_ns: self.cpu_ns.saturating_add(other.cpu_ns),
            minor_faults: self.minor_faults.saturating_add(other.minor_faults),
            major_faults: self.major_faults.saturating_add(other.major_faults),
            peak_pages: self.peak_pages.max(other.peak_pages),
        }
    }
}
