//! Whose guest's turn it is: gives the workers of a machine to its guests.
//!
//! A guest has a scheduler of its own ([`super::Sched`]) for its threads; a machine has one roster for its guests.
//! A guest with threads that wait for a worker stands in the *line*, once, whatever their number. A worker takes
//! the first guest of the line and asks its scheduler for a thread; if more of them wait, the guest is in the line
//! again, at its tail, before the worker runs the first. A machine with one guest is a line of at most one.
//!
//! * **No wake-up is lost.** The scheduler keeps, under its own lock, whether its guest is *listed*: in the line,
//!   or with a worker that is about to ask. Whoever makes a thread ready lists the guest if it is not listed;
//!   whoever asks takes the mark off first and lists it again if it leaves somebody behind. So a guest with a ready
//!   thread is listed unless its world is stopped, and then going on lists it.
//! * **Turns.** A guest that waits while every worker is busy gets the one that has worked for one guest longest, as
//!   soon as that is 5 ms: the worker is *told*, puts its thread back, and takes the first of the line. Guests
//!   so take workers in turn, whatever the number of their threads. Turns within a guest are `turns.rs`'s.
//! * **Rounds.** One clock thread serves all guests. A scheduler says when it wants its round (`plan`), at most
//!   one time; the clock thread sleeps until the first. It sleeps where it likes, with an *alarm* that ends its sleep.
//! * **Rests.** When every worker has waited for a second, and there is a guest that may wait longer, each is told once to
//!   *rest* ([`Roster::may_rest`]): it gives its virtual CPU back. The next task wakes who gets it. Waking costs something, so
//!   a machine whose rests are short, because its guest has something to do every few seconds, waits longer and
//!   longer before the next one: it rests for nine tenths of the time or not at all.
//!
//! What it is not: it knows nothing of threads, and weighs no guest against another.
//!
//! Lock order: its lock is a leaf, taken with a scheduler's queues held.

use std::collections::{BTreeSet, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use parking_lot::Condvar;

use super::Kick;
use super::turns::{LEAD, PATIENCE};
use crate::locks::{WaitGuard, WaitMutex, rank};

#[cfg(test)]
mod tests;

/// One of the guests of a machine, as long as the machine lives: numbers are not used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct GuestId(u64);

/// What a worker does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Task {
    /// Asks this guest's scheduler for a thread ([`super::Sched::start`]): it must.
    Guest(GuestId),
    /// What it was asked to do when there is no thread.
    Errand,
    /// Gives its virtual CPU back until there is something else to do: all workers are told so.
    Rest,
    /// Nothing any more: the machine has ended.
    End,
}

/// Whether everybody in the line has a worker that is on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Line {
    /// There are as many idle workers.
    Served,
    /// Somebody waits for a worker that is busy.
    Waits,
}

/// How long all workers wait before the machine rests...
const REST_AFTER: Duration = Duration::from_secs(1);
/// ... and at most, if it is woken soon each time...
const REST_AFTER_MOST: Duration = Duration::from_secs(64);
/// ... which is before it has rested for so many times as long.
const REST_WORTH: u32 = 9;

/// What decides whether a machine may rest.
struct Rests {
    workers: usize,
    /// Whether there is a guest. A machine without one is kept for the next, which is to have it at once.
    occupied: Box<dyn Fn() -> bool + Send + Sync>,
}

/// The line, the workers and the rounds of a machine.
pub struct Roster {
    inner: WaitMutex<rank::Roster, Inner>,
    /// Signalled when the line grows, for an errand, and at the end.
    work: Condvar,
    /// Ends the clock thread's sleep: when a round is planned before its end, and at the machine's end.
    alarm: OnceLock<Alarm>,
    closed: AtomicBool,
    guests: AtomicU64,
    from: Instant,
    rests: OnceLock<Rests>,
}

/// Ends a sleep, or the next one if none has begun. Called with the roster's lock held.
pub type Alarm = Box<dyn Fn() + Send + Sync>;

/// What a worker is doing for a guest.
struct Seat {
    guest: GuestId,
    kick: Arc<dyn Kick>,
    since: u64,
    /// When it was told to give way.
    told: Option<u64>,
}

/// What the clock thread has to do at some time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Due {
    /// Turns between guests.
    Turns,
    /// A guest's round.
    Guest(GuestId),
}

#[derive(Default)]
struct Inner {
    waiting: VecDeque<GuestId>,
    idle: usize,
    seats: Vec<Option<Seat>>,
    due: BTreeSet<(u64, Due)>,
    /// Until when the clock thread sleeps, if it does.
    sleeps_until: Option<u64>,
    /// When turns are looked at: the one entry for it in `due`.
    turns_at: Option<u64>,
    /// Since when all workers wait.
    quiet_since: Option<u64>,
    /// All were told to rest, and none has had anything to do since.
    resting: bool,
    /// When they were told.
    rests_since: u64,
    /// How often in a row a rest was short.
    short_rests: u32,
    /// Rests so far, and the last one that each worker knows of.
    rests: u64,
    rested: Vec<u64>,
}

impl Default for Roster {
    fn default() -> Self {
        Self {
            inner: WaitMutex::default(),
            work: Condvar::new(),
            alarm: OnceLock::new(),
            closed: AtomicBool::new(false),
            guests: AtomicU64::new(0),
            from: Instant::now(),
            rests: OnceLock::new(),
        }
    }
}

impl std::fmt::Debug for Roster {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Roster")
            .field("closed", &self.closed)
            .field("guests", &self.guests)
            .finish_non_exhaustive()
    }
}

impl Roster {
    /// A number for one more guest.
    pub(super) fn enrol(&self) -> GuestId {
        GuestId(self.guests.fetch_add(1, Ordering::Relaxed))
    }

    /// Nanoseconds by the clock that measures turns and that rounds are planned by.
    pub(super) fn now(&self) -> u64 {
        self.from.elapsed().as_nanos() as u64
    }

    /// A guest that is not in the line goes to its tail.
    pub(super) fn put(&self, guest: GuestId) -> Line {
        let mut inner = self.inner.lock();
        inner.waiting.push_back(guest);
        if inner.idle > 0 {
            self.work.notify_one();
        }
        self.take_turns(&mut inner);
        inner.line()
    }

    /// Whether everybody in the line gets a worker at once.
    pub(super) fn line(&self) -> Line {
        self.inner.lock().line()
    }

    /// A guest is no more: neither in the line nor with a round at `planned`.
    pub(super) fn strike(&self, guest: GuestId, planned: Option<u64>) {
        let mut inner = self.inner.lock();
        inner.waiting.retain(|waiting| *waiting != guest);
        if let Some(at) = planned {
            inner.due.remove(&(at, Due::Guest(guest)));
        }
    }

    /// What worker number `worker` does next, waiting for it; its last guest has it no more. `kick` takes it out of
    /// a guest. `errand` says whether there is one: it is asked under the lock and takes none.
    pub fn next(&self, worker: usize, kick: &Arc<dyn Kick>, errand: impl Fn() -> bool) -> Task {
        let mut inner = self.inner.lock();
        inner.leave(worker);
        loop {
            if self.is_closed() {
                return Task::End;
            }
            if inner.is_to_rest(worker) {
                return Task::Rest;
            }
            if let Some(guest) = inner.waiting.pop_front() {
                let since = self.now();
                inner.stirs(since);
                inner.seats[worker] = Some(Seat {
                    guest,
                    kick: Arc::clone(kick),
                    since,
                    told: None,
                });
                self.take_turns(&mut inner);
                return Task::Guest(guest);
            }
            if errand() {
                inner.stirs(self.now());
                return Task::Errand;
            }
            self.wait_for_work(&mut inner);
        }
    }

    /// From now on the machine rests when its `workers` have had nothing to do for a while and it is `occupied`.
    pub fn may_rest(&self, workers: usize, occupied: Box<dyn Fn() -> bool + Send + Sync>) {
        let first = self.rests.set(Rests { workers, occupied }).is_ok();
        debug_assert!(first, "it may rest already");
    }

    /// Waits until there may be something to do, if only to rest.
    fn wait_for_work(&self, inner: &mut WaitGuard<'_, rank::Roster, Inner>) {
        inner.idle += 1;
        match self.rests.get() {
            Some(rests) if inner.idle == rests.workers && !inner.resting => {
                let now = self.now();
                let since = *inner.quiet_since.get_or_insert(now);
                let left = inner
                    .rest_after()
                    .saturating_sub(Duration::from_nanos(now - since));
                if !left.is_zero() {
                    inner.wait_for(&self.work, left);
                } else if (rests.occupied)() {
                    (inner.resting, inner.rests_since) = (true, now);
                    inner.rests += 1;
                    self.work.notify_all();
                } else {
                    inner.wait(&self.work);
                }
            }
            Some(_) | None => inner.wait(&self.work),
        }
        inner.idle -= 1;
    }

    /// Whether a worker was told to give way to another guest, and still should.
    pub fn gives_way(&self, worker: usize) -> bool {
        let mut inner = self.inner.lock();
        let Some(Some(seat)) = inner.seats.get_mut(worker) else {
            return false;
        };
        let (guest, told) = (seat.guest, seat.told.take().is_some());
        told && inner.other_waits(guest)
    }

    /// Wakes a worker that waits for a guest, to ask for errands again; false if none waits.
    pub fn wake_idle(&self) -> bool {
        let inner = self.inner.lock();
        self.work.notify_one();
        inner.idle > 0
    }

    /// A guest wants a round at `at`, and none at `planned`.
    pub(super) fn plan(&self, guest: GuestId, planned: Option<u64>, at: Option<u64>) {
        let mut inner = self.inner.lock();
        if let Some(planned) = planned {
            inner.due.remove(&(planned, Due::Guest(guest)));
        }
        if let Some(at) = at {
            self.insert(&mut inner, at, Due::Guest(guest));
        }
    }

    /// How the clock thread's sleep is ended; before it first sleeps.
    pub fn set_alarm(&self, alarm: Alarm) {
        let first = self.alarm.set(alarm).is_ok();
        debug_assert!(first, "there is one clock thread");
    }

    fn sound_alarm(&self) {
        if let Some(alarm) = self.alarm.get() {
            alarm();
        }
    }

    /// The next guest whose round is due; waits for it, and sees to turns between guests meanwhile. For the clock
    /// thread, which `sleep`s, at most so long, until its alarm or for no reason; `None` when the machine has ended.
    pub fn next_round(&self, mut sleep: impl FnMut(Option<Duration>)) -> Option<GuestId> {
        loop {
            let mut inner = self.inner.lock();
            inner.sleeps_until = None;
            if self.is_closed() {
                return None;
            }
            let now = self.now();
            match inner.due.first().copied() {
                Some((at, due)) if at <= now => {
                    inner.due.pop_first();
                    match due {
                        Due::Guest(guest) => return Some(guest),
                        Due::Turns => {
                            inner.turns_at = None;
                            self.take_turns(&mut inner);
                        }
                    }
                }
                first => {
                    inner.sleeps_until = Some(first.map_or(u64::MAX, |(at, _)| at));
                    drop(inner);
                    sleep(first.map(|(at, _)| Duration::from_nanos(at - now)));
                }
            }
        }
    }

    /// Ends the machine: workers and clock thread return. Its guests are ended by who closes it.
    pub fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
        let _inner = self.inner.lock();
        self.work.notify_all();
        self.sound_alarm();
    }

    /// Whether the machine has ended.
    pub fn is_closed(&self) -> bool {
        self.closed.load(Ordering::SeqCst)
    }

    /// How many workers wait for a guest.
    #[cfg(test)]
    pub(super) fn idle(&self) -> usize {
        self.inner.lock().idle
    }

    fn insert(&self, inner: &mut Inner, at: u64, due: Due) {
        inner.due.insert((at, due));
        if inner.sleeps_until.is_some_and(|until| at < until) {
            // Once is enough.
            inner.sleeps_until = None;
            self.sound_alarm();
        }
    }

    /// Tells workers to give way to guests that wait, and plans when to look again.
    fn take_turns(&self, inner: &mut Inner) {
        let now = self.now();
        let Some(after) = inner.tell(now) else { return };
        let at = now.saturating_add(after);
        if inner.turns_at.is_none_or(|planned| at < planned) {
            if let Some(planned) = inner.turns_at.replace(at) {
                inner.due.remove(&(planned, Due::Turns));
            }
            self.insert(inner, at, Due::Turns);
        }
    }
}

impl Inner {
    fn line(&self) -> Line {
        // Who is idle takes the first, so whoever had one stays served whatever comes behind.
        if self.idle >= self.waiting.len() {
            Line::Served
        } else {
            Line::Waits
        }
    }

    /// Worker `worker` works for nobody.
    fn leave(&mut self, worker: usize) {
        if self.seats.len() <= worker {
            self.seats.resize_with(worker + 1, || None);
        }
        self.seats[worker] = None;
    }

    /// Whether a worker was not told of the last rest yet; it is now.
    fn is_to_rest(&mut self, worker: usize) -> bool {
        if self.rested.len() <= worker {
            self.rested.resize(worker + 1, 0);
        }
        std::mem::replace(&mut self.rested[worker], self.rests) != self.rests
    }

    /// How long all workers wait before the next rest.
    fn rest_after(&self) -> Duration {
        let longer = REST_AFTER * (1 << self.short_rests.min(16));
        longer.min(REST_AFTER_MOST)
    }

    /// A worker has something to do.
    fn stirs(&mut self, now: u64) {
        if std::mem::take(&mut self.resting) {
            let rested = Duration::from_nanos(now - self.rests_since);
            self.short_rests = match rested < self.rest_after() * REST_WORTH {
                true => self.short_rests.saturating_add(1),
                false => 0,
            };
        }
        self.quiet_since = None;
    }

    fn other_waits(&self, guest: GuestId) -> bool {
        self.waiting.iter().take(2).any(|waiting| *waiting != guest)
    }

    /// Tells workers that it is another guest's turn. In how many nanoseconds there may be more to do.
    fn tell(&mut self, now: u64) -> Option<u64> {
        if self.line() == Line::Served {
            return None;
        }
        let mut next: Option<u64> = None;
        let mut again = |after: u64| next = Some(next.map_or(after, |least| least.min(after)));
        let mut wanted = self.waiting.len();
        for seat in self.seats.iter_mut().flatten() {
            match seat.told.map(|at| now.saturating_sub(at)) {
                Some(since) if since < PATIENCE => {
                    wanted = wanted.saturating_sub(1);
                    again(PATIENCE - since);
                }
                Some(_) | None => seat.told = None,
            }
        }
        while wanted > 0 {
            let others = |guest| self.waiting.iter().take(2).any(|waiting| *waiting != guest);
            let candidates = self.seats.iter_mut().flatten();
            let candidates = candidates.filter(|seat| seat.told.is_none() && others(seat.guest));
            let Some(seat) = candidates.min_by_key(|seat| seat.since) else {
                break;
            };
            let early = (seat.since + LEAD).saturating_sub(now);
            if early > 0 {
                again(early);
                break;
            }
            seat.kick.kick();
            seat.told = Some(now);
            again(PATIENCE);
            wanted -= 1;
        }
        next
    }
}
