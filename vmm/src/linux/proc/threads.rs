//! Threads of one process: their birth beside the others, how many there may be, and how one of them
//! gets the process for itself (`execve`).

use std::sync::Arc;

use super::population;
use crate::linux::Errno;
use crate::linux::call::{Ctx, Restart, Stop, Wait, WaitKey};
use crate::linux::process::{Process, State};
use crate::linux::signal::send;
use crate::linux::thread::{Thread, Tid};

use super::limits;

/// What is to be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum New {
    Process,
    Thread,
}

/// Threads of a process, a dead one counted as one, as it still has its id.
fn size(p: &Process) -> usize {
    p.threads.len().max(1)
}

/// The machine's limits and the user's.
///
/// # Errors
/// `EAGAIN`; also for a process that is ending, or about to be another program.
pub(super) fn may_start(c: &Ctx<'_>, state: &State, new: New) -> Result<(), Errno> {
    let me = state.process(c.t.pid)?;
    if me.is_leaving(c.t.tid) || (new == New::Process && population(state) >= c.k.limits.max_procs)
    {
        return Err(Errno::AGAIN);
    }
    let all = || state.procs.values().map(|p| &**p);
    let everybody = || all().filter(|p| p.ppid != 0);
    if everybody().map(size).sum::<usize>() >= c.k.limits.max_threads {
        return Err(Errno::AGAIN);
    }
    let uid = me.cred.uid[0];
    let mine = everybody().filter(|p| p.cred.uid[0] == uid).map(size);
    if uid != 0 && mine.sum::<usize>() as u64 >= me.rlimits[limits::NPROC].0 {
        return Err(Errno::AGAIN);
    }
    Ok(())
}

/// Gives a new thread of the calling process its id and its place.
pub(super) fn insert_thread(c: &Ctx<'_>, thread: &mut Thread) -> Result<Tid, Errno> {
    let mut state = c.k.state();
    may_start(c, &state, New::Thread)?;
    let tid = state.allocate_pid()?;
    thread.tid = tid;
    thread.pid = c.t.pid;
    let p = state.process_mut(c.t.pid)?;
    let name = p.name_of(c.t.tid).to_vec();
    p.threads.insert(tid, Arc::clone(&thread.shared));
    p.thread_masks.insert(tid, thread.mask);
    if name != p.comm {
        p.thread_names.insert(tid, name);
    }
    // A stop or a signal for the whole process may have come before there was this thread to tell.
    thread.shared.call_attention();
    Ok(tid)
}

/// Ends the other threads of the calling process, for `execve`, and gives the caller the leader's id. To be
/// called again after the wait it asks for.
///
/// # Errors
/// [`Stop::Block`] until the others are gone. `EAGAIN` if the process ends or another thread was first: nobody
/// sees it, since the caller ends too.
pub fn be_alone(c: &mut Ctx<'_>) -> Result<(), Stop> {
    let mut state = c.k.state();
    let p = state.process_mut(c.t.pid)?;
    if p.is_leaving(c.t.tid) {
        return Err(Errno::AGAIN.into());
    }
    if p.threads.len() > 1 {
        // Told once: telling moves the epoch, and the caller could never park.
        if p.exec.is_none() {
            p.exec = Some(c.t.tid);
            for &tid in p.threads.keys().filter(|&&tid| tid != c.t.tid) {
                send::notify(&c.k.sched, p, tid);
            }
        }
        return Err(Stop::Block(Wait {
            keys: vec![WaitKey::Alone(c.t.pid)],
            deadline: None,
            restart: Restart::Uninterruptible,
        }));
    }
    p.exec = None;
    p.thread_names.clear();
    let old = c.t.tid;
    take_leaders_id(p, c.t);
    c.k.sched.renamed(old, c.t.tid);
    Ok(())
}

fn take_leaders_id(p: &mut Process, t: &mut Thread) {
    let (old, new) = (t.tid, t.pid);
    if old == new {
        return;
    }
    if let Some(shared) = p.threads.remove(&old) {
        p.threads.insert(new, shared);
    }
    if let Some(mask) = p.thread_masks.remove(&old) {
        p.thread_masks.insert(new, mask);
    }
    if let Some(pending) = p.thread_pending.remove(&old) {
        p.thread_pending.insert(new, pending);
    }
    t.tid = new;
}
