//! The guests of a machine, and what the machine's threads need to serve them all.
//!
//! A machine's workers and its clock thread belong to no guest: the roster ([`Roster`]) tells them which one is next, by
//! number, and here is the guest of that number.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use super::victim::Leaving;
use super::worker::Shared;
use crate::linux::events::Events;
use crate::linux::sched::roster::{GuestId, Roster};
use crate::locks::{Mutex, rank};
use crate::memory::Memory;

/// Rounds that the clock thread makes without a look at the host's descriptors.
const ROUNDS: u64 = 16;

/// The guests of a machine.
pub struct Guests {
    /// Who gets a worker.
    pub roster: Arc<Roster>,
    /// The memory they share.
    pub memory: Arc<Memory>,
    all: Mutex<rank::MachineGuests, HashMap<GuestId, Arc<Shared>>>,
    /// How many they are, for who may not wait for the lock.
    count: Arc<AtomicUsize>,
    /// Who gives back memory, if somebody had to.
    pub(super) leaving: Mutex<rank::LeavingSpace, Leaving>,
    /// The machine has failed or ended: nobody comes any more.
    closed: AtomicBool,
}

impl Guests {
    /// A machine without guests.
    #[must_use]
    pub fn new(roster: Arc<Roster>, memory: Arc<Memory>) -> Self {
        Self {
            roster,
            memory,
            all: Mutex::default(),
            count: Arc::default(),
            leaving: Mutex::default(),
            closed: AtomicBool::new(false),
        }
    }

    /// One more. In a machine that runs, its world must be stopped until now: a worker that hears of a guest it does not
    /// find asks no more.
    pub fn add(&self, guest: &Arc<Shared>) {
        let id = guest.kernel.sched.guest();
        let mut all = self.all.lock();
        all.insert(id, Arc::clone(guest));
        self.count.store(all.len(), Ordering::SeqCst);
        drop(all);
        if self.closed.load(Ordering::SeqCst) {
            guest.kernel.sched.end();
        }
    }

    /// One less: it has ended, and no worker has a thread of it.
    pub fn remove(&self, guest: &Shared) {
        let mut all = self.all.lock();
        let removed = all.remove(&guest.kernel.sched.guest());
        self.count.store(all.len(), Ordering::SeqCst);
        drop(all);
        // Not with the lock: it may be the last of it.
        drop(removed);
    }

    /// Has the machine rest when its `workers` wait for guests that wait.
    pub fn may_rest(&self, workers: usize) {
        let count = Arc::clone(&self.count);
        let occupied = move || count.load(Ordering::SeqCst) > 0;
        self.roster.may_rest(workers, Box::new(occupied));
    }

    /// Whether nobody comes any more.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.closed.load(Ordering::SeqCst)
    }

    /// One of them.
    #[must_use]
    pub fn get(&self, id: GuestId) -> Option<Arc<Shared>> {
        self.all.lock().get(&id).map(Arc::clone)
    }

    /// All of them.
    pub(super) fn everyone(&self) -> Vec<Arc<Shared>> {
        self.all.lock().values().map(Arc::clone).collect()
    }

    /// Ends the machine and all guests in it.
    pub fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
        for guest in self.everyone() {
            guest.kernel.sched.end();
        }
        self.roster.close();
    }

    /// What the clock thread does, until the machine ends: rounds, and in between it looks at the descriptors of the host that
    /// guests wait for. However many rounds are due, it looks now and then.
    pub fn run_clock(&self, events: &Events) {
        let mut rounds = 0_u64;
        while let Some(id) = self.roster.next_round(|left| events.look(left)) {
            if let Some(guest) = self.get(id) {
                guest.round();
            }
            rounds += 1;
            if rounds.is_multiple_of(ROUNDS) {
                events.look(Some(Duration::ZERO));
            }
        }
    }
}

/// Ends the machine if the thread that holds it panics: the others must not wait for it.
pub(super) struct EndOnPanic<'a>(pub(super) &'a Guests);

impl Drop for EndOnPanic<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.close();
        }
    }
}
