//! The clock thread: wakes what is due, and ends turns.

use std::sync::atomic::Ordering;
use std::time::Duration;

use super::{Queues, Sched, stop};

impl Sched {
    /// Runs on the clock thread: sleeps until the next deadline or the end of a turn, wakes what is due, and takes
    /// the processor from running threads when it is another's turn. Returns when the machine has ended. `now`
    /// is the machine's `CLOCK_MONOTONIC`; `tick` runs once a round and returns when it wants to run next.
    pub fn run_clock(&self, now: impl Fn() -> u64, mut tick: impl FnMut() -> Option<u64>) {
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
            self.wake_due(&mut q, at);
            let deadline = q.deadlines.first().map(|&(deadline, _)| deadline);
            let due = [deadline, due].into_iter().flatten().min();
            let due = due.map(|due| due.saturating_sub(at));
            let sleep = [due, self.take_turns(&mut q)].into_iter().flatten().min();
            // Asleep it does nothing to a stopped world, and looks for one when it wakes.
            q.clock = stop::Clock::Rests;
            match sleep.map(|sleep| sleep.max(1)) {
                Some(sleep) => {
                    q.clock_sleeps = self.now().saturating_add(sleep);
                    q.wait_for(&self.earlier, Duration::from_nanos(sleep));
                }
                None => {
                    q.clock_sleeps = u64::MAX;
                    q.wait(&self.earlier);
                }
            }
            q.clock_sleeps = 0;
        }
    }

    /// Wakes the clock thread, for a `tick` that has something earlier to do.
    pub fn clock_changed(&self) {
        let _q = self.queues.lock();
        self.clock_changes.fetch_add(1, Ordering::SeqCst);
        self.earlier.notify_one();
    }

    fn wake_due(&self, q: &mut Queues, at: u64) {
        while let Some(&(deadline, tid)) = q.deadlines.first() {
            if deadline > at {
                break;
            }
            self.epoch.fetch_add(1, Ordering::SeqCst);
            q.unpark(tid, self.now());
            self.after_unpark(q);
        }
    }

    /// Tells threads to give way to those that wait, if no worker is free for them; says in how many
    /// nanoseconds there may be more to do, and sees to it that the clock thread looks then.
    pub(super) fn take_turns(&self, q: &mut Queues) -> Option<u64> {
        if q.idle_workers > 0 {
            return None;
        }
        let now = self.now();
        let again = q.turns.take_turns(now)?;
        if now.saturating_add(again) < q.clock_sleeps {
            q.clock_sleeps = 0;
            self.earlier.notify_one();
        }
        Some(again)
    }
}
