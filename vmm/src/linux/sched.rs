//! Who runs, who waits, and for what: run queue, wait queues and deadlines.
//!
//! Threads are records ([`Thread`]). A worker takes one from the run queue, owns it while it runs
//! it, and gives it back when it blocks or its slice is over. There are no lost wake-ups: a handler
//! remembers [`Sched::epoch`] before it looks at any condition, and [`Sched::park`] refuses to
//! park if anything was woken since.
//!
//! Lock order: this lock is a leaf; it is taken with the kernel's state lock or an object's lock
//! held, and nothing is locked under it.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::Condvar;

use super::call::{Wait, WaitKey};
use super::thread::{Thread, Tid};
use crate::locks::{WaitMutex, rank};

pub mod stop;
#[cfg(test)]
mod tests;

/// Stops a worker's virtual CPU from outside, so that it looks at its thread again.
pub trait Kick: Send + Sync {
    /// Makes the worker leave the guest soon (no effect if it is not in it).
    fn kick(&self);
}

/// What a worker does next.
#[derive(Debug)]
pub enum Next {
    /// Runs this thread.
    Thread(Box<Thread>),
    /// What it was asked to do when there is no thread.
    Errand,
    /// Nothing any more: the machine has ended.
    End,
}

/// Run queue, wait queues, deadlines.
#[derive(Default)]
pub struct Sched {
    queues: WaitMutex<rank::SchedQueues, Queues>,
    /// Signalled when the run queue grows or the machine ends.
    runnable: Condvar,
    /// Signalled when a deadline earlier than all others appears.
    earlier: Condvar,
    /// Signalled when the world stands still.
    rested: Condvar,
    /// Whether it is to stand still: a look without the lock.
    stopping: AtomicBool,
    epoch: AtomicU64,
    next_key: AtomicU64,
    ended: AtomicBool,
    /// Counts [`Sched::clock_changed`], for a change that comes between a tick and its sleep.
    clock_changes: AtomicU64,
}

impl std::fmt::Debug for Sched {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sched")
            .field("epoch", &self.epoch)
            .finish_non_exhaustive()
    }
}

#[derive(Default)]
struct Queues {
    run: VecDeque<Box<Thread>>,
    parked: HashMap<Tid, (Box<Thread>, Wait)>,
    waiters: HashMap<WaitKey, BTreeSet<Tid>>,
    deadlines: BTreeSet<(u64, Tid)>,
    running: BTreeMap<Tid, Arc<dyn Kick>>,
    idle_workers: usize,
    /// Since when threads have been waiting while every worker has one, in the machine's time: a slice later they
    /// get their turn.
    crowded_since: Option<u64>,
    /// The clock thread sleeps for longer than a slice, or without a limit: it must hear of the next crowd.
    clock_dozes: bool,
    /// How many want the world to stand still.
    stops: usize,
    clock: stop::Clock,
}

impl Sched {
    /// A fresh id for [`WaitKey::Object`].
    pub fn new_key(&self) -> WaitKey {
        WaitKey::Object(self.next_key.fetch_add(1, Ordering::Relaxed))
    }

    /// The next key's number.
    pub fn next_key(&self) -> u64 {
        self.next_key.load(Ordering::Relaxed)
    }

    /// Keys made from now on have numbers from `least` on: smaller ones may be known to the guest.
    pub fn keys_from(&self, least: u64) {
        self.next_key.fetch_max(least, Ordering::Relaxed);
    }

    /// To be read before looking at a condition that [`Sched::park`] may be called for.
    pub fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::SeqCst)
    }

    /// Makes every thread that waits for `key` run its call again.
    pub fn wake(&self, key: WaitKey) {
        let mut q = self.queues.lock();
        self.epoch.fetch_add(1, Ordering::SeqCst);
        let Some(tids) = q.waiters.remove(&key) else {
            return;
        };
        for tid in tids {
            q.unpark(tid);
        }
        self.after_unpark(&mut q);
    }

    /// Makes one thread look at the state: out of its wait if parked, out of the guest if running.
    pub fn interrupt(&self, tid: Tid) {
        let mut q = self.queues.lock();
        self.epoch.fetch_add(1, Ordering::SeqCst);
        if let Some(kick) = q.running.get(&tid) {
            kick.kick();
        } else if q.unpark(tid) {
            self.after_unpark(&mut q);
        }
    }

    /// Ends a thread's wait; one that is running notices by itself.
    pub fn resume(&self, tid: Tid) {
        let mut q = self.queues.lock();
        self.epoch.fetch_add(1, Ordering::SeqCst);
        if q.unpark(tid) {
            self.after_unpark(&mut q);
        }
    }

    /// The running thread `old` is now called `new`.
    pub fn renamed(&self, old: Tid, new: Tid) {
        let mut q = self.queues.lock();
        if let Some(kick) = q.running.remove(&old) {
            q.running.insert(new, kick);
        }
    }

    /// Takes a thread out of the guest for a moment if it is running, so that its CPU time is known.
    pub fn kick_running(&self, tid: Tid) {
        if let Some(kick) = self.queues.lock().running.get(&tid) {
            kick.kick();
        }
    }

    /// Adds a thread to the run queue.
    pub fn enqueue(&self, thread: Box<Thread>) {
        let mut q = self.queues.lock();
        q.run.push_back(thread);
        self.after_unpark(&mut q);
    }

    /// Parks `thread` until `wait` is over. Gives it back at once if something was woken since
    /// `seen` was read: the caller then makes the call again.
    ///
    /// # Errors
    /// The thread, when it must not sleep.
    pub fn park(&self, thread: Box<Thread>, wait: Wait, seen: u64) -> Result<(), Box<Thread>> {
        let mut q = self.queues.lock();
        if self.epoch.load(Ordering::SeqCst) != seen {
            return Err(thread);
        }
        let tid = thread.tid;
        q.running.remove(&tid);
        for key in &wait.keys {
            q.waiters.entry(*key).or_default().insert(tid);
        }
        if let Some(at) = wait.deadline {
            q.deadlines.insert((at, tid));
            self.earlier.notify_one();
        }
        q.parked.insert(tid, (thread, wait));
        self.left(&q);
        Ok(())
    }

    /// What a worker does next, waiting for it: run a thread, which is then *running* (`kick` is how
    /// others interrupt it); or, when there is none, its errand, once `errand` says there is one. `errand` is
    /// asked under the lock and takes none.
    pub fn next(&self, kick: &Arc<dyn Kick>, errand: impl Fn() -> bool) -> Next {
        let mut q = self.queues.lock();
        loop {
            if self.ended.load(Ordering::SeqCst) {
                return Next::End;
            }
            if self.gives_out(&q)
                && let Some(thread) = q.run.pop_front()
            {
                q.running.insert(thread.tid, Arc::clone(kick));
                self.rouse_clock(&mut q);
                return Next::Thread(thread);
            }
            if errand() {
                return Next::Errand;
            }
            q.idle_workers += 1;
            q.wait(&self.runnable);
            q.idle_workers -= 1;
        }
    }

    /// Wakes a worker that waits for a thread, to ask for errands again; false if none waits.
    pub fn wake_idle(&self) -> bool {
        let q = self.queues.lock();
        self.runnable.notify_one();
        q.idle_workers > 0
    }

    /// Whether a thread waits for a worker.
    pub fn others_wait(&self) -> bool {
        !self.queues.lock().run.is_empty()
    }

    /// The slice of a running thread is over: another gets its place if one waits.
    ///
    /// # Errors
    /// The thread itself, when nobody else wants to run.
    pub fn yield_running(&self, thread: Box<Thread>) -> Result<(), Box<Thread>> {
        let mut q = self.queues.lock();
        if q.run.is_empty() {
            return Err(thread);
        }
        q.running.remove(&thread.tid);
        q.run.push_back(thread);
        self.left(&q);
        self.after_unpark(&mut q);
        Ok(())
    }

    /// A running thread has ended.
    pub fn forget(&self, tid: Tid) {
        let mut q = self.queues.lock();
        q.running.remove(&tid);
        self.left(&q);
    }

    /// Ends the machine: workers return, threads stay where they are.
    pub fn end(&self) {
        self.ended.store(true, Ordering::SeqCst);
        let q = self.queues.lock();
        for kick in q.running.values() {
            kick.kick();
        }
        self.runnable.notify_all();
        self.earlier.notify_all();
        self.rested.notify_all();
    }

    /// Whether the machine has ended.
    pub fn has_ended(&self) -> bool {
        self.ended.load(Ordering::SeqCst)
    }

    /// Takes every thread that is not running, for tearing the machine down.
    pub fn drain(&self) -> Vec<Box<Thread>> {
        let mut q = self.queues.lock();
        q.waiters.clear();
        q.deadlines.clear();
        let mut all: Vec<_> = q.run.drain(..).collect();
        all.extend(q.parked.drain().map(|(_, (thread, _))| thread));
        all
    }

    /// Runs on the clock thread: sleeps until the next deadline or `slice` nanoseconds, wakes what
    /// is due, and takes the processor from running threads while others wait for one. Returns when
    /// the machine has ended. `now` is the machine's `CLOCK_MONOTONIC`; `tick` runs once a round and
    /// returns when it wants to run next.
    pub fn run_clock(
        &self,
        slice: u64,
        now: impl Fn() -> u64,
        mut tick: impl FnMut() -> Option<u64>,
    ) {
        loop {
            self.rest_clock();
            let changes = self.clock_changes.load(Ordering::SeqCst);
            let due = tick();
            let mut q = self.queues.lock();
            if self.clock_changes.load(Ordering::SeqCst) != changes {
                continue;
            }
            if self.ended.load(Ordering::SeqCst) {
                drop(q);
                self.end_clock();
                return;
            }
            if q.stops > 0 {
                continue;
            }
            let at = now();
            while let Some(&(deadline, tid)) = q.deadlines.first() {
                if deadline > at {
                    break;
                }
                self.epoch.fetch_add(1, Ordering::SeqCst);
                q.unpark(tid);
                self.after_unpark(&mut q);
            }
            let turn_over = q.take_turns(at, slice);
            let next = [q.deadlines.first().map(|&(d, _)| d), due, turn_over];
            q.clock_dozes = turn_over.is_none();
            // Asleep it does nothing to a stopped world, and looks for one when it wakes.
            q.clock = stop::Clock::Rests;
            match next.into_iter().flatten().min() {
                Some(deadline) => {
                    let sleep = std::time::Duration::from_nanos(deadline.saturating_sub(at).max(1));
                    q.wait_for(&self.earlier, sleep);
                }
                None => q.wait(&self.earlier),
            }
            q.clock_dozes = false;
        }
    }

    /// Wakes the clock thread, for a `tick` that has something earlier to do.
    pub fn clock_changed(&self) {
        let _q = self.queues.lock();
        self.clock_changes.fetch_add(1, Ordering::SeqCst);
        self.earlier.notify_one();
    }

    fn after_unpark(&self, q: &mut Queues) {
        if q.idle_workers > 0 {
            self.runnable.notify_one();
            if q.run.len() > 1 {
                self.runnable.notify_all();
            }
        }
        self.rouse_clock(q);
    }

    /// Tells the clock thread of a crowd that it does not know of: whatever it waits for may be far away.
    fn rouse_clock(&self, q: &mut Queues) {
        if q.clock_dozes && q.is_crowded() {
            q.clock_dozes = false;
            self.earlier.notify_one();
        }
    }
}

impl Queues {
    /// Threads wait, and no worker is free for them.
    fn is_crowded(&self) -> bool {
        !self.run.is_empty() && self.idle_workers == 0
    }

    /// Takes the processor from running threads if others have waited for a `slice`; says when to look
    /// again, which is never as long as nobody waits.
    fn take_turns(&mut self, now: u64, slice: u64) -> Option<u64> {
        if !self.is_crowded() {
            self.crowded_since = None;
            return None;
        }
        let since = self.crowded_since.get_or_insert(now);
        if now >= *since + slice {
            *since = now;
            for kick in self.running.values() {
                kick.kick();
            }
        }
        Some(*since + slice)
    }

    fn unpark(&mut self, tid: Tid) -> bool {
        let Some((thread, wait)) = self.parked.remove(&tid) else {
            return false;
        };
        for key in &wait.keys {
            if let Some(set) = self.waiters.get_mut(key) {
                set.remove(&tid);
                if set.is_empty() {
                    self.waiters.remove(key);
                }
            }
        }
        if let Some(at) = wait.deadline {
            self.deadlines.remove(&(at, tid));
        }
        self.run.push_back(thread);
        true
    }
}
