//! Stopping the world: no guest thread runs, and none is given to a worker.
//!
//! Every thread is then a record in the run queue or in a wait queue: out of the guest, its FPU state in its
//! record, and out of every system call. A call that was under way has ended, or is put aside to be made
//! again. Host I/O that a worker was doing has come back first. The clock thread leaves it alone too: no deadline
//! passes and no timer sends a signal. What the host does meanwhile (a descriptor that becomes ready) only
//! moves threads from a wait queue to the run queue.
//!
//! It counts: whoever stops a world that is stopped already shares it, and it goes on when the last one lets
//! it.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::{Arrival, Queues, Sched};
use crate::linux::call::Wait;
use crate::linux::thread::{Thread, Tid};

/// What a stop took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Halt {
    /// Threads that had to be taken from their workers.
    pub kicked: usize,
}

/// A thread of a stopped world.
#[derive(Clone, Copy, Debug)]
pub struct Resting<'a> {
    /// Its record.
    pub thread: &'a Thread,
    /// What it waits for; `None` if it would run.
    pub wait: Option<&'a Wait>,
}

impl Sched {
    /// Stops the world; waits for it. To be undone by [`Sched::go_on`]. Not for a worker, which would wait
    /// for itself. Also returns when the machine ends meanwhile.
    pub fn stop(&self) -> Halt {
        let mut q = self.queues.lock();
        q.stops += 1;
        self.stopping.store(true, Ordering::SeqCst);
        let kicked = q.turns.running();
        q.turns.kick_all();
        while !q.at_rest() && !self.ended.load(Ordering::SeqCst) {
            q.wait(&self.rested);
        }
        Halt { kicked }
    }

    /// Undoes one [`Sched::stop`].
    pub fn go_on(&self) {
        let mut q = self.queues.lock();
        debug_assert!(q.stops > 0, "it was not stopped");
        q.stops = q.stops.saturating_sub(1);
        if q.stops == 0 {
            self.stopping.store(false, Ordering::SeqCst);
            self.plan(&mut q, self.now());
            self.after_unpark(&mut q);
            self.rested.notify_all();
        }
    }

    /// As [`Sched::go_on`], of a world that has not moved yet: its first round ([`Sched::round`]) is made here, so that nobody is
    /// woken for it.
    pub fn begin(&self, now: impl Fn() -> u64, tick: impl FnOnce() -> Option<u64>) {
        let due = tick();
        let mut q = self.queues.lock();
        debug_assert!(q.stops > 0, "it was not stopped");
        q.stops = q.stops.saturating_sub(1);
        if q.stops == 0 {
            self.stopping.store(false, Ordering::SeqCst);
            self.end_round(&mut q, now(), due);
            self.rested.notify_all();
        }
    }

    /// Waits until no thread of a guest that has ended is with a worker, the clock thread has left it, and nobody looks at
    /// it standing still any more. False if that does not come.
    #[must_use]
    pub fn wait_until_left(&self, patience: Duration) -> bool {
        let until = Instant::now() + patience;
        let mut q = self.queues.lock();
        debug_assert!(self.has_ended(), "it goes on");
        while !q.at_rest() || q.stops > 0 {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            q.wait_for(&self.rested, left);
        }
        true
    }

    /// Whether somebody stops the world: a worker puts its thread back ([`Sched::put_back`]).
    pub fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::SeqCst)
    }

    /// Whether the world stands still.
    pub fn is_stopped(&self) -> bool {
        let q = self.queues.lock();
        q.stops > 0 && q.at_rest()
    }

    /// A running thread goes to the run queue, because the world is stopped.
    pub fn put_back(&self, mut thread: Box<Thread>) {
        let mut q = self.queues.lock();
        let now = self.now();
        thread.account = q.turns.stop(thread.tid, now);
        q.turns.join(thread, Arrival::TakenOff, now);
        self.left(&q);
        self.after_unpark(&mut q);
    }

    /// Looks at every thread of a stopped world: those that would run first, in their order. Nothing may be
    /// locked in `look` that comes before the queues.
    pub fn each_resting(&self, mut look: impl FnMut(Resting<'_>)) {
        let q = self.queues.lock();
        debug_assert!(q.stops > 0 && q.at_rest(), "the world moves");
        for thread in q.turns.ready() {
            look(Resting { thread, wait: None });
        }
        let mut parked: Vec<Tid> = q.parked.keys().copied().collect();
        parked.sort_unstable();
        for (thread, wait) in parked.iter().filter_map(|tid| q.parked.get(tid)) {
            let wait = Some(wait);
            look(Resting { thread, wait });
        }
    }

    /// Whether threads are given out.
    pub(super) fn gives_out(&self, q: &Queues) -> bool {
        q.stops == 0 && !self.has_ended()
    }

    /// A thread has left its worker, or the clock thread the guest: tells who waits for that.
    pub(super) fn left(&self, q: &Queues) {
        if (q.stops > 0 || self.has_ended()) && q.at_rest() {
            self.rested.notify_all();
        }
    }
}

impl Queues {
    pub(super) fn at_rest(&self) -> bool {
        self.turns.running() == 0 && !self.in_round
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, AtomicU64};
    use std::time::{Duration, Instant};

    use super::super::Kick;
    use super::super::tests::{Next, end, next, run_clock};
    use super::*;
    use crate::linux::call::WaitKey;
    use crate::linux::testing::Machine;

    /// A guest that spins until it is kicked.
    #[derive(Default)]
    struct Spinner {
        kicked: AtomicBool,
        kicks: AtomicU64,
    }

    impl Kick for Spinner {
        fn kick(&self) {
            self.kicks.fetch_add(1, Ordering::SeqCst);
            self.kicked.store(true, Ordering::SeqCst);
        }
    }

    fn worker(sched: &Sched, spinner: &Arc<Spinner>, turns: &AtomicU64) {
        let kick: Arc<dyn Kick> = Arc::clone(spinner) as _;
        while let Next::Thread(thread) = next(sched, 0, &kick, || false) {
            while !sched.is_stopping() && !sched.has_ended() {
                turns.fetch_add(1, Ordering::SeqCst);
                while !spinner.kicked.swap(false, Ordering::SeqCst) && !sched.has_ended() {
                    std::thread::yield_now();
                }
            }
            sched.put_back(thread);
        }
    }

    #[test]
    fn stopped_world_has_its_threads_in_the_queue_and_goes_on() {
        let m = Machine::new();
        let sched = Arc::clone(&m.k.sched);
        sched.enqueue(m.first());
        let (spinner, turns) = (Arc::new(Spinner::default()), AtomicU64::new(0));
        let ticks = AtomicU64::new(0);
        std::thread::scope(|scope| {
            scope.spawn(|| worker(&sched, &spinner, &turns));
            scope.spawn(|| {
                let start = Instant::now();
                let now = || start.elapsed().as_nanos() as u64;
                run_clock(&sched, now, || {
                    ticks.fetch_add(1, Ordering::SeqCst);
                    Some(now() + 1_000_000)
                });
            });
            for round in 0..50 {
                while turns.load(Ordering::SeqCst) == 0 || ticks.load(Ordering::SeqCst) == 0 {
                    std::thread::yield_now();
                }
                let halt = sched.stop();
                assert!(halt.kicked <= 1 && sched.is_stopped());
                let mut seen = 0;
                sched.each_resting(|rest| seen += usize::from(rest.wait.is_none()));
                assert_eq!(seen, 1);
                turns.store(0, Ordering::SeqCst);
                ticks.store(0, Ordering::SeqCst);
                if round == 0 {
                    std::thread::sleep(Duration::from_millis(20));
                }
                assert_eq!(turns.load(Ordering::SeqCst), 0);
                assert_eq!(ticks.load(Ordering::SeqCst), 0);
                sched.go_on();
            }
            end(&sched);
        });
        assert!(spinner.kicks.load(Ordering::SeqCst) > 0);
    }

    #[test]
    fn world_stopped_twice_goes_on_after_both() {
        let sched = Sched::default();
        sched.stop();
        sched.stop();
        sched.go_on();
        assert!(sched.is_stopped());
        sched.go_on();
        assert!(!sched.is_stopped() && !sched.is_stopping());
    }

    #[test]
    fn what_is_woken_meanwhile_stays_in_the_queue() {
        let m = Machine::new();
        let sched = &m.k.sched;
        let thread = m.first();
        let key = sched.new_key();
        assert!(matches!(key, WaitKey::Object(_)));
        sched.park(thread, Wait::on(key), sched.epoch()).unwrap();
        sched.stop();
        let waits = || {
            let mut waits = Vec::new();
            sched.each_resting(|rest| waits.push(rest.wait.is_some()));
            waits
        };
        assert_eq!(waits(), [true]);
        sched.wake(key);
        assert_eq!(waits(), [false]);
        let kick: Arc<dyn Kick> = Arc::new(Spinner::default());
        assert!(matches!(next(sched, 0, &kick, || true), Next::Errand));
        sched.go_on();
        assert!(matches!(next(sched, 0, &kick, || true), Next::Thread(_)));
    }
}
