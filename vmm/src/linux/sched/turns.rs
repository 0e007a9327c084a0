//! Whose turn it is: who runs, who waits for a worker, and who gives way to whom.
//!
//! Every thread has an account of the time it has run ([`Thread::account`]). The thread with least in its
//! account runs next, and one that runs gives way once it is [`LEAD`] ahead of one that waits: two that only
//! compute change places every two [`LEAD`]s. A thread that has slept does not get back all it has not used:
//! when it wakes, its account is lifted to [`LEAD`] behind those that compute. So whoever sleeps more than it
//! runs takes the processor from one that only computes as soon as it wakes, as programs that divide up the
//! time among themselves expect (a lock that is asked for every 5 ms by those who wait for it, say), and
//! nobody starves: who wakes often catches up with the others.
//!
//! What it is not: there are no priorities, no nice values, and no thread is kept on a processor. Time is
//! the host's, not what the host gave the worker of it; so an account is at most [`FURTHEST`] ahead of the
//! others when its thread starts to wait.
//!
//! Plain data under the scheduler's lock: a time is a parameter, in nanoseconds of any clock that does not go
//! back.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::Kick;
use crate::linux::thread::{Thread, Tid};

/// How far ahead of one that waits a running thread gets, and how far behind those that run one that wakes
/// starts.
pub(super) const LEAD: u64 = 5_000_000;
/// How far ahead of all others a thread is at most when it starts to wait.
const FURTHEST: u64 = 8 * LEAD;
/// A thread that was told to give way and has not done it in this time is told again.
pub(super) const PATIENCE: u64 = 2 * LEAD;

/// Why a thread waits for a worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Arrival {
    /// It is new.
    New,
    /// What it slept for has happened.
    Woken,
    /// It was taken from a worker.
    TakenOff,
}

/// Why a thread leaves its worker although it could go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leave {
    /// It was told to, perhaps for another reason: if somebody has run less.
    IfBehind,
    /// It wants to (sched_yield(2)): after everybody who waits.
    Last,
    /// It is another guest's turn.
    ForGuest,
}

/// A thread that a worker has.
struct Running {
    kick: Arc<dyn Kick>,
    /// Its account at `since`.
    account: u64,
    since: u64,
    /// When it was told to give way.
    told: Option<u64>,
}

impl Running {
    fn account(&self, now: u64) -> u64 {
        self.account + now.saturating_sub(self.since)
    }
}

/// Those that run and those that would.
#[derive(Default)]
pub(super) struct Turns {
    /// Least account first; of equal ones, who came first.
    ready: BTreeMap<(u64, u64), Box<Thread>>,
    running: BTreeMap<Tid, Running>,
    arrivals: u64,
    /// The least account of all that ran or would; never goes back.
    floor: u64,
}

impl Turns {
    /// Whether nobody waits.
    pub(super) fn is_empty(&self) -> bool {
        self.ready.is_empty()
    }

    /// How many run.
    pub(super) fn running(&self) -> usize {
        self.running.len()
    }

    /// Those that wait, in the order they would run in.
    pub(super) fn ready(&self) -> impl Iterator<Item = &Thread> {
        self.ready.values().map(|thread| &**thread)
    }

    /// Takes all that wait.
    pub(super) fn drain(&mut self) -> impl Iterator<Item = Box<Thread>> {
        std::mem::take(&mut self.ready).into_values()
    }

    /// How to interrupt a thread that runs.
    pub(super) fn kick_of(&self, tid: Tid) -> Option<&dyn Kick> {
        self.running.get(&tid).map(|running| &*running.kick)
    }

    /// Kicks all that run.
    pub(super) fn kick_all(&self) {
        self.running
            .values()
            .for_each(|running| running.kick.kick());
    }

    /// A running thread gets another number.
    pub(super) fn renamed(&mut self, old: Tid, new: Tid) {
        if let Some(running) = self.running.remove(&old) {
            self.running.insert(new, running);
        }
    }

    /// A thread waits for a worker from now on.
    pub(super) fn join(&mut self, mut thread: Box<Thread>, why: Arrival, now: u64) {
        let floor = self.raise_floor(now);
        let least = match why {
            Arrival::Woken => floor.saturating_sub(LEAD),
            Arrival::New => floor,
            Arrival::TakenOff => 0,
        };
        thread.account = thread.account.clamp(least, floor + FURTHEST);
        self.insert(thread);
    }

    /// A worker gets the thread whose turn it is; `kick` interrupts that worker.
    pub(super) fn start(&mut self, kick: &Arc<dyn Kick>, now: u64) -> Option<Box<Thread>> {
        let (_, thread) = self.ready.pop_first()?;
        let running = Running {
            kick: Arc::clone(kick),
            account: thread.account,
            since: now,
            told: None,
        };
        self.running.insert(thread.tid, running);
        Some(thread)
    }

    /// A worker has a thread no more. What its account is then.
    pub(super) fn stop(&mut self, tid: Tid, now: u64) -> u64 {
        self.raise_floor(now);
        let running = self.running.remove(&tid);
        running.map_or(self.floor, |running| running.account(now))
    }

    /// A running thread gives its worker up if it is another's turn.
    ///
    /// # Errors
    /// The thread, which goes on.
    pub(super) fn leave(
        &mut self,
        mut thread: Box<Thread>,
        how: Leave,
        now: u64,
    ) -> Result<(), Box<Thread>> {
        let Some(running) = self.running.get_mut(&thread.tid) else {
            return Err(thread);
        };
        let mut account = running.account(now);
        let ready = |entry: Option<(&(u64, u64), _)>| entry.map(|(&(account, _), _)| account);
        let (first, last) = (
            ready(self.ready.first_key_value()),
            ready(self.ready.last_key_value()),
        );
        let leaves = match how {
            Leave::IfBehind => first.is_some_and(|first| first < account),
            Leave::Last => last.is_some(),
            Leave::ForGuest => true,
        };
        if !leaves {
            (running.account, running.since, running.told) = (account, now, None);
            return Err(thread);
        }
        if how == Leave::Last {
            account = account.max(last.unwrap_or(0));
        }
        self.stop(thread.tid, now);
        thread.account = account;
        self.join(thread, Arrival::TakenOff, now);
        Ok(())
    }

    /// Tells threads to give way to those that wait, if no worker is free for them; says in how many
    /// nanoseconds there may be more to do.
    pub(super) fn take_turns(&mut self, now: u64) -> Option<u64> {
        if self.ready.is_empty() {
            return None;
        }
        let mut next: Option<u64> = None;
        let mut again = |after: u64| next = Some(next.map_or(after, |least| least.min(after)));
        let mut places = 0;
        for running in self.running.values_mut() {
            let since = running.told.map(|at| now.saturating_sub(at));
            match since.filter(|&since| since < PATIENCE) {
                Some(since) => {
                    places += 1;
                    again(PATIENCE - since);
                }
                None => running.told = None,
            }
        }
        for &(account, _) in self.ready.keys().skip(places) {
            let candidates = self.running.values_mut().filter(|r| r.told.is_none());
            let Some(ahead) = candidates.max_by_key(|r| r.account(now)) else {
                break;
            };
            let early = (account + LEAD).saturating_sub(ahead.account(now));
            if early > 0 {
                again(early);
                break;
            }
            ahead.kick.kick();
            ahead.told = Some(now);
            again(PATIENCE);
        }
        next
    }

    fn insert(&mut self, thread: Box<Thread>) {
        self.arrivals += 1;
        self.ready.insert((thread.account, self.arrivals), thread);
    }

    /// Brings the floor up to the least account of all that run or would.
    fn raise_floor(&mut self, now: u64) -> u64 {
        let running = self.running.values().map(|running| running.account(now));
        let ready = self
            .ready
            .first_key_value()
            .map(|(&(account, _), _)| account);
        if let Some(least) = running.chain(ready).min() {
            self.floor = self.floor.max(least);
        }
        self.floor
    }
}

#[cfg(test)]
mod tests;
