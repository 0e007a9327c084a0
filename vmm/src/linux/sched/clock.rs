//! A guest's share of the clock thread: wakes what is due, and ends turns.

use std::sync::atomic::Ordering;

use super::{Queues, Sched};

impl Sched {
    /// A round of the clock thread, when the roster says so: wakes what is due, takes the processor from running threads
    /// when it is another's turn, and plans the next round. `now` is the guest's `CLOCK_MONOTONIC`; `tick` is
    /// what else is done with time, and says by that clock when it wants to be called next. Nothing of it is done to a
    /// stopped world, which gets a round when it goes on.
    pub fn round(&self, now: impl Fn() -> u64, tick: impl FnOnce() -> Option<u64>) {
        {
            let mut q = self.queues.lock();
            if let Some(planned) = q.planned.take() {
                // Planned anew since the roster took it.
                self.roster.plan(self.guest, Some(planned), None);
            }
            if !self.gives_out(&q) {
                return;
            }
            q.in_round = true;
        }
        let due = tick();
        let mut q = self.queues.lock();
        q.in_round = false;
        self.left(&q);
        if self.gives_out(&q) {
            self.end_round(&mut q, now(), due);
        }
    }

    /// What follows the tick, which is to be called again at `due`.
    pub(super) fn end_round(&self, q: &mut Queues, at: u64, due: Option<u64>) {
        self.wake_due(q, at);
        let deadline = q.deadlines.first().map(|&(deadline, _)| deadline);
        if let Some(due) = [deadline, due].into_iter().flatten().min() {
            let sleep = due.saturating_sub(at).max(1);
            self.plan(q, self.now().saturating_add(sleep));
        }
        self.after_unpark(q);
    }

    /// Asks for a round, for a `tick` that has something earlier to do.
    pub fn clock_changed(&self) {
        let mut q = self.queues.lock();
        self.plan(&mut q, self.now());
    }

    /// The clock thread is to make a round at `at` or earlier.
    pub(super) fn plan(&self, q: &mut Queues, at: u64) {
        if q.planned.is_none_or(|planned| at < planned) {
            let planned = q.planned.replace(at);
            self.roster.plan(self.guest, planned, Some(at));
        }
    }

    fn wake_due(&self, q: &mut Queues, at: u64) {
        while let Some(&(deadline, tid)) = q.deadlines.first() {
            if deadline > at {
                break;
            }
            self.epoch.fetch_add(1, Ordering::SeqCst);
            q.unpark(tid, self.now());
        }
    }

    /// Tells threads to give way to those that wait, and plans a round for when there may be more to do.
    pub(super) fn take_turns(&self, q: &mut Queues) {
        let now = self.now();
        if let Some(again) = q.turns.take_turns(now) {
            self.plan(q, now.saturating_add(again));
        }
    }
}
