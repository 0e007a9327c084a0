//! A guest that asks to be frozen: what `/dev/vmm` ([`super::fs`]) and whoever freezes it say to each other.
//!
//! A write of `freeze` takes a *ticket* and waits. Who freezes the guest stops it, and writes it down
//! ([`super::saved::save`]), which *covers* the tickets that were taken by then: the guest stands still, there is no other. Once the
//! template is there it *settles* what was covered, and those who wait find their answer. In guests made of what
//! was written down the write has returned ([`Freezes::was_saved`]).
//!
//! A guest that nobody freezes gets its answer at once. What a guest can make the host do is bounded by
//! [`MOST`].

use crate::linux::Errno;
use crate::linux::call::WaitKey;
use crate::linux::sched::Sched;
use crate::locks::{Mutex, rank};
use std::sync::OnceLock;

/// How often a guest may ask in its machine's life.
pub const MOST: u64 = 64;

/// What the guest asked for, and what became of it.
#[derive(Debug)]
pub struct Freezes {
    state: Mutex<rank::Freezes, State>,
    key: WaitKey,
    freezer: OnceLock<Freezer>,
}

struct Freezer {
    name: String,
    ask: Box<dyn Fn() + Send + Sync>,
}

impl std::fmt::Debug for Freezer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Freezer").field(&self.name).finish()
    }
}

/// Tickets below `settled` have their answer.
#[derive(Debug)]
struct State {
    next: u64,
    covered: u64,
    settled: u64,
    /// How often the guest asked.
    asked: u64,
    /// What those get who were settled last.
    answer: Result<(), Errno>,
}

/// A place in the line of those who asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ticket(u64);

/// What asking came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    /// Nobody freezes this guest: it goes on.
    Nobody,
    /// It is to be waited for.
    Soon(Ticket),
}

impl Freezes {
    /// Nobody has asked. Who waits, waits for `key`.
    #[must_use]
    pub fn new(key: WaitKey) -> Self {
        let state = State {
            next: 0,
            covered: 0,
            settled: 0,
            asked: 0,
            answer: Ok(()),
        };
        Self {
            state: Mutex::new(state),
            key,
            freezer: OnceLock::new(),
        }
    }

    /// From now on `ask` is called when the guest wants to be frozen, which is known by `name`. It does not wait.
    pub fn allow(&self, name: &str, ask: Box<dyn Fn() + Send + Sync>) {
        let name = name.to_owned();
        let first = self.freezer.set(Freezer { name, ask }).is_ok();
        debug_assert!(first, "a machine is set up once");
    }

    /// What the guest is called by those who freeze it.
    #[must_use]
    pub fn name(&self) -> Option<&str> {
        self.freezer.get().map(|freezer| freezer.name.as_str())
    }

    /// What is woken when something is settled.
    #[must_use]
    pub fn key(&self) -> WaitKey {
        self.key
    }

    /// Asks for a freeze.
    ///
    /// # Errors
    /// `EDQUOT`: it was asked for often enough.
    pub fn ask(&self) -> Result<Asked, Errno> {
        let Some(freezer) = self.freezer.get() else {
            return Ok(Asked::Nobody);
        };
        let mut state = self.state.lock();
        if state.asked >= MOST {
            return Err(Errno::DQUOT);
        }
        state.asked += 1;
        let ticket = Ticket(state.next);
        state.next += 1;
        drop(state);
        (freezer.ask)();
        Ok(Asked::Soon(ticket))
    }

    /// What a ticket came to; `None`: not yet.
    #[must_use]
    pub fn answer(&self, ticket: Ticket) -> Option<Result<(), Errno>> {
        let state = self.state.lock();
        (ticket.0 < state.settled).then_some(state.answer)
    }

    /// How many were settled so far: it grows when an answer is there.
    #[must_use]
    pub fn settled(&self) -> u64 {
        self.state.lock().settled
    }

    /// Whether somebody waits for an answer.
    #[must_use]
    pub fn is_wanted(&self) -> bool {
        let state = self.state.lock();
        state.settled < state.next
    }

    /// The guest stands still and is written down: whoever has asked is part of it.
    pub fn cover(&self) {
        let mut state = self.state.lock();
        state.covered = state.next;
    }

    /// What was covered last has become a template, or could not.
    pub fn settle(&self, sched: &Sched, answer: Result<(), Errno>) {
        let mut state = self.state.lock();
        state.settled = state.covered;
        state.answer = answer;
        drop(state);
        sched.wake(self.key);
    }

    /// A freeze failed before the guest could be looked at.
    pub fn fail(&self, sched: &Sched, errno: Errno) {
        self.cover();
        self.settle(sched, Err(errno));
    }

    /// The ticket of those who had asked when the guest was written down that this one is made of: it has its
    /// answer.
    pub fn was_saved(&self) -> Ticket {
        let mut state = self.state.lock();
        if state.next == 0 {
            (state.next, state.covered, state.settled) = (1, 1, 1);
        }
        Ticket(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn freezes() -> Freezes {
        let freezes = Freezes::new(WaitKey::Object(1));
        freezes.allow("warm", Box::new(|| ()));
        freezes
    }

    fn ticket(freezes: &Freezes) -> Ticket {
        match freezes.ask().unwrap() {
            Asked::Soon(ticket) => ticket,
            Asked::Nobody => panic!("somebody does"),
        }
    }

    #[test]
    fn only_who_was_covered_gets_an_answer() {
        let sched = Sched::default();
        let freezes = freezes();
        let [a, b] = [ticket(&freezes), ticket(&freezes)];
        freezes.cover();
        let late = ticket(&freezes);
        assert_eq!(freezes.answer(a), None);
        freezes.settle(&sched, Ok(()));
        assert_eq!(
            [a, b, late].map(|t| freezes.answer(t)),
            [Some(Ok(())), Some(Ok(())), None]
        );
        assert!(freezes.is_wanted());
        freezes.fail(&sched, Errno::IO);
        assert_eq!(freezes.answer(late), Some(Err(Errno::IO)));
        assert!(!freezes.is_wanted());
    }

    #[test]
    fn nobody_waits_where_nobody_freezes() {
        let freezes = Freezes::new(WaitKey::Object(1));
        for _ in 0..2 * MOST {
            assert_eq!(freezes.ask(), Ok(Asked::Nobody));
        }
        assert_eq!(freezes.name(), None);
    }

    #[test]
    fn asking_has_a_limit() {
        let (sched, freezes) = (Sched::default(), freezes());
        for _ in 0..MOST {
            let ticket = ticket(&freezes);
            freezes.cover();
            freezes.settle(&sched, Ok(()));
            assert_eq!(freezes.answer(ticket), Some(Ok(())));
        }
        assert_eq!(freezes.ask(), Err(Errno::DQUOT));
    }

    #[test]
    fn who_was_saved_has_an_answer_and_the_next_has_none() {
        let freezes = freezes();
        let saved = freezes.was_saved();
        assert_eq!(freezes.answer(saved), Some(Ok(())));
        let next = ticket(&freezes);
        assert_eq!(freezes.answer(next), None);
        assert_eq!(freezes.was_saved(), saved);
    }
}
