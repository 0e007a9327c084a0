//! Sending: who gets a signal, what it does at once, and who has to look.

use super::info::{FIRST_REAL_TIME, SI_USER, cld};
use super::{Effect, STOPPING, bit, effect, sa};
use crate::linux::Errno;
use crate::linux::call::WaitKey;
use crate::linux::kernel::Kernel;
use crate::linux::process::{INIT, Life, Pid, Process, SigFields, SigInfo, State, Unreported};
use crate::linux::sched::Sched;
use crate::linux::thread::Tid;

/// `RLIMIT_SIGPENDING`'s index.
const RLIMIT_SIGPENDING: usize = 11;

/// Most signals one process may have queued, whatever its limit says.
const QUEUE_MAX: usize = 65_536;

/// Sends to a process: any of its threads takes it. Zombies take it and nothing happens.
///
/// # Errors
/// `ESRCH`; `EAGAIN` if a real-time signal finds the queue full.
pub fn send_to_process(
    k: &Kernel,
    state: &mut State,
    pid: Pid,
    info: SigInfo,
) -> Result<(), Errno> {
    send(&k.sched, state, pid, None, info)
}

/// Sends to one thread.
///
/// # Errors
/// `ESRCH`; `EAGAIN` if a real-time signal finds the queue full.
pub fn send_to_thread(k: &Kernel, state: &mut State, tid: Tid, info: SigInfo) -> Result<(), Errno> {
    let pid = state.owner_of(tid).ok_or(Errno::SRCH)?;
    send(&k.sched, state, pid, Some(tid), info)
}

/// Sends to every process of a group.
///
/// # Errors
/// `ESRCH` if the group is empty.
pub fn send_to_group(k: &Kernel, state: &mut State, pgid: Pid, info: SigInfo) -> Result<(), Errno> {
    group(&k.sched, state, pgid, info)
}

/// As [`send_to_group`].
pub(crate) fn group(
    sched: &Sched,
    state: &mut State,
    pgid: Pid,
    info: SigInfo,
) -> Result<(), Errno> {
    let members = members(state, pgid);
    if members.is_empty() {
        return Err(Errno::SRCH);
    }
    for pid in members {
        // A full queue of one member is no reason to spare the others.
        let _ = send(sched, state, pid, None, info);
    }
    Ok(())
}

/// The processes of a group, zombies included.
#[must_use]
pub fn members(state: &State, pgid: Pid) -> Vec<Pid> {
    state
        .procs
        .values()
        .filter(|p| p.pgid == pgid && p.pid != INIT)
        .map(|p| p.pid)
        .collect()
}

/// As [`send_to_process`], or to the one thread `tid`.
pub(crate) fn send(
    sched: &Sched,
    state: &mut State,
    pid: Pid,
    tid: Option<Tid>,
    info: SigInfo,
) -> Result<(), Errno> {
    let bit = bit(info.signo);
    let p = state.process_mut(pid)?;
    if pid == INIT || p.is_zombie() || bit == 0 {
        return Ok(());
    }
    if bit & STOPPING != 0 {
        discard(p, super::bit(libc::SIGCONT));
    } else if info.signo == libc::SIGCONT {
        discard(p, STOPPING);
        resume(sched, state, pid);
    }
    let p = state.process_mut(pid)?;
    if effect(p, info.signo) == Effect::Ignore && !blocked_somewhere(p, tid, bit) {
        return Ok(());
    }
    let limited = info.signo >= FIRST_REAL_TIME && !info.is_timers();
    if limited && queued(p) >= queue_limit(p) {
        // As Linux: only who queues hears of it; kill(2) succeeds if the signal is pending anyway.
        let pending = tid
            .and_then(|tid| p.thread_pending.get(&tid))
            .unwrap_or(&p.pending);
        let counted = info.code == SI_USER && pending.has(info.signo);
        return if counted { Ok(()) } else { Err(Errno::AGAIN) };
    }
    if tid.is_some_and(|tid| !p.threads.contains_key(&tid)) {
        // A leader that has ended before the others.
        return Ok(());
    }
    match tid {
        Some(tid) => p.thread_pending.entry(tid).or_default().push(info),
        None => p.pending.push(info),
    }
    if let Some(target) = target(p, tid, bit) {
        notify(sched, p, target);
    }
    if info.signo == libc::SIGKILL {
        sched.wake(WaitKey::Continued(pid));
    }
    sched.wake(WaitKey::Signal(pid));
    Ok(())
}

/// Forgets pending signals, those of the process and of every thread.
pub(crate) fn discard(p: &mut Process, set: u64) {
    p.pending.discard(set);
    for pending in p.thread_pending.values_mut() {
        pending.discard(set);
    }
}

/// Finds takers for the signals of `set` that are pending for the process: who was to take them has ended or blocks
/// them now.
pub(crate) fn retarget(sched: &Sched, p: &Process, set: u64) {
    let mut left = p.pending.set & set;
    while left != 0 {
        let bit = left & left.wrapping_neg();
        left &= !bit;
        if let Some(tid) = target(p, None, bit) {
            notify(sched, p, tid);
        }
    }
}

/// Makes one thread look at the state.
pub(crate) fn notify(sched: &Sched, p: &Process, tid: Tid) {
    if let Some(shared) = p.threads.get(&tid) {
        shared.call_attention();
        sched.interrupt(tid);
    }
}

/// Makes all threads of a process look at the state.
pub(crate) fn notify_all(sched: &Sched, p: &Process) {
    for &tid in p.threads.keys() {
        notify(sched, p, tid);
    }
}

fn queued(p: &Process) -> usize {
    p.pending.queue.len()
        + p.thread_pending
            .values()
            .map(|q| q.queue.len())
            .sum::<usize>()
}

fn queue_limit(p: &Process) -> usize {
    usize::try_from(p.rlimits[RLIMIT_SIGPENDING].0)
        .unwrap_or(QUEUE_MAX)
        .min(QUEUE_MAX)
}

/// Whether an ignored signal is kept because a thread that could take it blocks it: it may yet be
/// waited for, or its disposition may change.
fn blocked_somewhere(p: &Process, tid: Option<Tid>, bit: u64) -> bool {
    match tid {
        Some(tid) => p.thread_masks.get(&tid).is_some_and(|mask| mask & bit != 0),
        None => p
            .thread_masks
            .get(&p.pid)
            .or_else(|| p.thread_masks.values().next())
            .is_some_and(|mask| mask & bit != 0),
    }
}

/// The thread that will take the signal: the leader if it can, else any that does not block it.
fn target(p: &Process, tid: Option<Tid>, bit: u64) -> Option<Tid> {
    let wants = |tid: &Tid| {
        bit & super::UNBLOCKABLE != 0 || p.thread_masks.get(tid).is_none_or(|mask| mask & bit == 0)
    };
    match tid {
        Some(tid) => wants(&tid).then_some(tid),
        None => std::iter::once(&p.pid)
            .chain(p.threads.keys())
            .find(|tid| p.threads.contains_key(tid) && wants(tid))
            .copied(),
    }
}

/// A stopped process goes on.
fn resume(sched: &Sched, state: &mut State, pid: Pid) {
    let Some(p) = state.procs.get_mut(&pid) else {
        return;
    };
    if let Life::Stopped(_) = p.life {
        p.life = Life::Running;
        p.unreported = Unreported::Continued;
        notify_all(sched, p);
        sched.wake(WaitKey::Continued(pid));
        notify_parent(sched, state, pid, cld::CONTINUED, libc::SIGCONT);
    }
}

/// Stops a process: the caller is one of its threads and parks itself; the others follow.
pub(crate) fn stop(sched: &Sched, state: &mut State, pid: Pid, signo: i32) {
    let Some(p) = state.procs.get_mut(&pid) else {
        return;
    };
    p.life = Life::Stopped(signo);
    p.unreported = Unreported::Stopped;
    notify_all(sched, p);
    notify_parent(sched, state, pid, cld::STOPPED, signo);
}

/// Tells the parent that a child stopped or goes on: `SIGCHLD` unless it does not want it, and
/// whoever waits.
fn notify_parent(sched: &Sched, state: &mut State, pid: Pid, code: i32, status: i32) {
    let Some(p) = state.procs.get(&pid) else {
        return;
    };
    let (parent, uid) = (p.ppid, p.cred.uid[0]);
    let Some(action) = state
        .procs
        .get(&parent)
        .map(|p| super::action(p, libc::SIGCHLD))
    else {
        return;
    };
    if action.handler != super::SIG_IGN && action.flags & sa::NOCLDSTOP == 0 {
        let fields = SigFields::Child { pid, uid, status };
        let info = SigInfo {
            signo: libc::SIGCHLD,
            code,
            errno: 0,
            fields,
        };
        // A standard signal cannot find the queue full, and the parent exists.
        let _ = send(sched, state, parent, None, info);
    }
    sched.wake(WaitKey::ChildOf(parent));
}
