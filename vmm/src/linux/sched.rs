//! Who runs, who waits, and for what: run queue, wait queues and deadlines.
//!
//! Threads are records ([`Thread`]). A worker takes one from the run queue, owns it while it runs
//! it, and gives it back when it blocks or it is another's turn (`turns.rs`). There are no lost wake-ups: a handler
//! remembers [`Sched::epoch`] before it looks at any condition, and [`Sched::park`] refuses to
//! park if anything was woken since.
//!
//! One per guest. Several guests may share a machine's workers: which guest a worker asks is the
//! [`roster`]'s business.
//!
//! Lock order: this lock is taken with the kernel's state lock or an object's lock held, and only
//! the roster's is taken under it.

use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use parking_lot::Condvar;

use super::call::{Wait, WaitKey};
use super::thread::{Thread, Tid};
use crate::locks::{WaitMutex, rank};

mod clock;
pub mod roster;
pub mod stop;
#[cfg(test)]
mod tests;
mod turns;

use roster::{GuestId, Line, Roster};
pub use turns::Leave;
use turns::{Arrival, Turns};

/// Stops a worker's virtual CPU from outside, so that it looks at its thread again.
pub trait Kick: Send + Sync {
    /// Makes the worker leave the guest soon (no effect if it is not in it).
    fn kick(&self);
}

/// Run queue, wait queues, deadlines.
pub struct Sched {
    queues: WaitMutex<rank::SchedQueues, Queues>,
    /// The machine's.
    roster: Arc<Roster>,
    /// Which of its guests this is.
    guest: GuestId,
    /// Signalled when the world stands still, and when it ends.
    rested: Condvar,
    /// Whether it is to stand still: a look without the lock.
    stopping: AtomicBool,
    epoch: AtomicU64,
    next_key: AtomicU64,
    ended: AtomicBool,
    at_end: OnceLock<AtEnd>,
}

/// Called when a guest has ended, with locks held: it takes none but the last of their order.
pub type AtEnd = Box<dyn Fn() + Send + Sync>;

impl Default for Sched {
    /// Of the only guest of a machine.
    fn default() -> Self {
        Self::new(&Arc::default())
    }
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
    turns: Turns,
    parked: HashMap<Tid, (Box<Thread>, Wait)>,
    waiters: HashMap<WaitKey, BTreeSet<Tid>>,
    deadlines: BTreeSet<(u64, Tid)>,
    /// The guest is in the roster's line, or with a worker that is about to [`Sched::start`] a thread.
    listed: bool,
    /// When the clock thread makes its next round, by the roster's clock; `None`: it was not asked to.
    planned: Option<u64>,
    /// The clock thread is at work for this guest.
    in_round: bool,
    /// How many want the world to stand still.
    stops: usize,
}

impl Sched {
    /// For one more guest of the machine with this roster.
    #[must_use]
    pub fn new(roster: &Arc<Roster>) -> Self {
        Self {
            queues: WaitMutex::default(),
            roster: Arc::clone(roster),
            guest: roster.enrol(),
            rested: Condvar::new(),
            stopping: AtomicBool::new(false),
            epoch: AtomicU64::new(0),
            next_key: AtomicU64::new(0),
            ended: AtomicBool::new(false),
            at_end: OnceLock::new(),
        }
    }

    /// Who is told of the guest's end, besides those that wait for it; nobody is if it has ended before. Once.
    pub fn at_end(&self, told: AtEnd) {
        let first = self.at_end.set(told).is_ok();
        debug_assert!(first, "somebody is told already");
    }

    /// Which guest of its machine it is for.
    pub fn guest(&self) -> GuestId {
        self.guest
    }

    /// The roster of the machine.
    pub fn roster(&self) -> &Arc<Roster> {
        &self.roster
    }

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
        let now = self.now();
        for tid in tids {
            q.unpark(tid, now);
        }
        self.after_unpark(&mut q);
    }

    /// Makes one thread look at the state: out of its wait if parked, out of the guest if running.
    pub fn interrupt(&self, tid: Tid) {
        let mut q = self.queues.lock();
        self.epoch.fetch_add(1, Ordering::SeqCst);
        if let Some(kick) = q.turns.kick_of(tid) {
            kick.kick();
        } else if q.unpark(tid, self.now()) {
            self.after_unpark(&mut q);
        }
    }

    /// Ends a thread's wait; one that is running notices by itself.
    pub fn resume(&self, tid: Tid) {
        let mut q = self.queues.lock();
        self.epoch.fetch_add(1, Ordering::SeqCst);
        if q.unpark(tid, self.now()) {
            self.after_unpark(&mut q);
        }
    }

    /// The running thread `old` is now called `new`.
    pub fn renamed(&self, old: Tid, new: Tid) {
        self.queues.lock().turns.renamed(old, new);
    }

    /// Takes a thread out of the guest for a moment if it is running, so that its CPU time is known.
    pub fn kick_running(&self, tid: Tid) {
        if let Some(kick) = self.queues.lock().turns.kick_of(tid) {
            kick.kick();
        }
    }

    /// Adds a thread to the run queue.
    pub fn enqueue(&self, thread: Box<Thread>) {
        let mut q = self.queues.lock();
        q.turns.join(thread, Arrival::New, self.now());
        self.after_unpark(&mut q);
    }

    /// Parks `thread` until `wait` is over. Gives it back at once if something was woken since
    /// `seen` was read: the caller then makes the call again.
    ///
    /// # Errors
    /// The thread, when it must not sleep.
    pub fn park(&self, mut thread: Box<Thread>, wait: Wait, seen: u64) -> Result<(), Box<Thread>> {
        let mut q = self.queues.lock();
        if self.epoch.load(Ordering::SeqCst) != seen {
            return Err(thread);
        }
        let tid = thread.tid;
        thread.account = q.turns.stop(tid, self.now());
        for key in &wait.keys {
            q.waiters.entry(*key).or_default().insert(tid);
        }
        if let Some(at) = wait.deadline {
            q.deadlines.insert((at, tid));
            if q.deadlines.first() == Some(&(at, tid)) {
                // Only the round knows the clock that deadlines are of.
                self.plan(&mut q, self.now());
            }
        }
        q.parked.insert(tid, (thread, wait));
        self.left(&q);
        Ok(())
    }

    /// A worker that the roster has sent here gets a thread, which is then *running* (`kick` is how others
    /// interrupt it); `None` if there is none any more, or the world is stopped.
    pub fn start(&self, kick: &Arc<dyn Kick>) -> Option<Box<Thread>> {
        let mut q = self.queues.lock();
        q.listed = false;
        if !self.gives_out(&q) {
            return None;
        }
        let thread = q.turns.start(kick, self.now())?;
        self.after_unpark(&mut q);
        Some(thread)
    }

    /// Whether a thread waits for a worker.
    pub fn others_wait(&self) -> bool {
        !self.queues.lock().turns.is_empty()
    }

    /// A running thread gives its place up if it is another's turn.
    ///
    /// # Errors
    /// The thread itself, which goes on.
    pub fn yield_running(&self, thread: Box<Thread>, how: Leave) -> Result<(), Box<Thread>> {
        let mut q = self.queues.lock();
        q.turns.leave(thread, how, self.now())?;
        self.left(&q);
        self.after_unpark(&mut q);
        Ok(())
    }

    /// A running thread has ended.
    pub fn forget(&self, tid: Tid) {
        let mut q = self.queues.lock();
        q.turns.stop(tid, self.now());
        self.left(&q);
    }

    /// Ends the guest: workers leave its threads, which stay where they are.
    pub fn end(&self) {
        self.ended.store(true, Ordering::SeqCst);
        let q = self.queues.lock();
        q.turns.kick_all();
        self.rested.notify_all();
        drop(q);
        if let Some(told) = self.at_end.get() {
            told();
        }
    }

    /// Waits until the guest has ended. Workers may still be on their way out of it.
    pub fn wait_for_end(&self) {
        let mut q = self.queues.lock();
        while !self.has_ended() {
            q.wait(&self.rested);
        }
    }

    /// Whether the guest has ended.
    pub fn has_ended(&self) -> bool {
        self.ended.load(Ordering::SeqCst)
    }

    /// Takes every thread that is not running, for tearing the machine down.
    pub fn drain(&self) -> Vec<Box<Thread>> {
        let mut q = self.queues.lock();
        q.waiters.clear();
        q.deadlines.clear();
        let mut all: Vec<_> = q.turns.drain().collect();
        all.extend(q.parked.drain().map(|(_, (thread, _))| thread));
        all
    }

    /// Somebody may have come to wait for a worker: sees to it that the guest is in the line, and that turns end.
    fn after_unpark(&self, q: &mut Queues) {
        if q.turns.is_empty() || !self.gives_out(q) {
            return;
        }
        let line = if q.listed {
            self.roster.line()
        } else {
            q.listed = true;
            self.roster.put(self.guest)
        };
        match line {
            Line::Served => {}
            Line::Waits => self.take_turns(q),
        }
    }

    /// Nanoseconds by the clock that measures turns.
    fn now(&self) -> u64 {
        self.roster.now()
    }
}

impl Drop for Sched {
    fn drop(&mut self) {
        let planned = self.queues.lock().planned;
        self.roster.strike(self.guest, planned);
    }
}

impl Queues {
    fn unpark(&mut self, tid: Tid, now: u64) -> bool {
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
        self.turns.join(thread, Arrival::Woken, now);
        true
    }
}
