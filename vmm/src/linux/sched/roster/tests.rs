use std::sync::atomic::AtomicUsize;

use super::*;
use crate::linux::call::{Wait, WaitKey};
use crate::linux::sched::tests::nap;
use crate::linux::sched::{Leave, Sched};
use crate::linux::testing::Machine;
use crate::linux::thread::{Thread, Tid};

/// Takes a worker out of the guest.
#[derive(Default)]
struct Kicked(AtomicBool);

impl Kick for Kicked {
    fn kick(&self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// Guests of one machine, with threads of their own.
struct Guests {
    machine: Machine,
    roster: Arc<Roster>,
    scheds: Vec<Arc<Sched>>,
}

impl Guests {
    fn new(count: usize) -> Self {
        let roster = Arc::default();
        Self {
            machine: Machine::new(),
            scheds: (0..count).map(|_| Arc::new(Sched::new(&roster))).collect(),
            roster,
        }
    }

    fn thread(&self, tid: Tid) -> Box<Thread> {
        let mut thread = self.machine.first();
        thread.tid = tid;
        thread
    }

    fn of(&self, id: GuestId) -> usize {
        let found = self.scheds.iter().position(|sched| sched.guest() == id);
        found.expect("a guest of this machine")
    }

    /// Worker number `worker`, until the machine ends. `run` runs a thread of a guest until it is told by
    /// `Kicked`, or to its end.
    fn work(&self, worker: usize, mut run: impl FnMut(usize, Box<Thread>, &Kicked)) {
        let kicked = Arc::new(Kicked::default());
        let kick: Arc<dyn Kick> = Arc::clone(&kicked) as _;
        while let Task::Guest(id) = self.roster.next(worker, &kick, || false) {
            let guest = self.of(id);
            if let Some(thread) = self.scheds[guest].start(&kick) {
                run(guest, thread, &kicked);
            }
        }
    }

    /// The clock thread, until the machine ends.
    fn clock(&self) {
        while let Some(id) = self.roster.next_round(nap) {
            self.scheds[self.of(id)].round(|| 0, || None);
        }
    }

    fn end(&self) {
        for sched in &self.scheds {
            sched.end();
        }
        self.roster.close();
    }
}

const GUESTS: usize = 3;
const THREADS: usize = 4;
const TOKENS: usize = 2;
const STEPS: usize = 20_000;

fn key(thread: usize) -> WaitKey {
    WaitKey::Object(thread as u64)
}

/// A few tokens go round between threads of several guests; a thread without one waits, so that a guest is idle
/// most of the time, and one wake-up that nobody hears stops everything. Worlds are stopped meanwhile.
#[test]
fn no_wake_up_is_lost_between_guests() {
    let guests = Guests::new(GUESTS);
    let tokens: [[AtomicUsize; THREADS]; GUESTS] = Default::default();
    let steps = AtomicUsize::new(0);
    for (sched, tokens) in guests.scheds.iter().zip(&tokens) {
        for (n, held) in tokens.iter().enumerate() {
            held.store(usize::from(n < TOKENS), Ordering::SeqCst);
            sched.enqueue(guests.thread(n as Tid));
        }
    }
    let pass = |guest: usize, thread: usize| {
        let step = steps.fetch_add(1, Ordering::SeqCst);
        let (to, next) = match step % 3 {
            0 => ((guest + 1) % GUESTS, thread),
            _ => (guest, (thread + 1) % THREADS),
        };
        tokens[to][next].fetch_add(1, Ordering::SeqCst);
        guests.scheds[to].wake(key(next));
    };
    let take = |held: &AtomicUsize| {
        let fewer = |count: usize| count.checked_sub(1);
        held.fetch_update(Ordering::SeqCst, Ordering::SeqCst, fewer)
            .is_ok()
    };
    let run = |guest: usize, mut thread: Box<Thread>, _: &Kicked| {
        let (sched, n) = (&guests.scheds[guest], thread.tid as usize);
        loop {
            if sched.is_stopping() {
                return sched.put_back(thread);
            }
            let seen = sched.epoch();
            if take(&tokens[guest][n]) {
                pass(guest, n);
            }
            match sched.park(thread, Wait::on(key(n)), seen) {
                Ok(()) => return,
                Err(again) => thread = again,
            }
        }
    };
    let (ended, until) = (
        AtomicBool::new(false),
        Instant::now() + Duration::from_secs(60),
    );
    std::thread::scope(|scope| {
        for worker in 0..3 {
            let (guests, run) = (&guests, run);
            scope.spawn(move || guests.work(worker, run));
        }
        scope.spawn(|| guests.clock());
        scope.spawn(|| {
            while !ended.load(Ordering::SeqCst) {
                for sched in &guests.scheds {
                    sched.stop();
                    std::thread::yield_now();
                    sched.go_on();
                }
                std::thread::sleep(Duration::from_micros(200));
            }
        });
        while steps.load(Ordering::SeqCst) < STEPS && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(1));
        }
        ended.store(true, Ordering::SeqCst);
        guests.end();
    });
    let steps = steps.load(Ordering::SeqCst);
    assert!(
        steps >= STEPS,
        "all stand still after {steps} steps: {tokens:?}"
    );
}

/// Guests whose threads only compute take a worker in turn, whatever the number of their threads.
#[test]
fn guests_that_compute_take_turns() {
    let guests = Guests::new(3);
    for (n, sched) in guests.scheds.iter().enumerate() {
        for thread in 0..=2 * n {
            sched.enqueue(guests.thread(thread as Tid));
        }
    }
    let turns: [AtomicUsize; 3] = Default::default();
    let run = |guest: usize, mut thread: Box<Thread>, kicked: &Kicked| {
        let sched: &Sched = &guests.scheds[guest];
        turns[guest].fetch_add(1, Ordering::SeqCst);
        while !sched.has_ended() {
            if !kicked.0.swap(false, Ordering::SeqCst) {
                std::thread::yield_now();
                continue;
            }
            let how = if guests.roster.gives_way(0) {
                Leave::ForGuest
            } else {
                Leave::IfBehind
            };
            match sched.yield_running(thread, how) {
                Ok(()) => return,
                Err(again) => thread = again,
            }
        }
        sched.forget(thread.tid);
    };
    std::thread::scope(|scope| {
        scope.spawn(|| guests.work(0, run));
        scope.spawn(|| guests.clock());
        let until = Instant::now() + Duration::from_secs(60);
        let least = || turns.iter().map(|turns| turns.load(Ordering::SeqCst)).min();
        while least() < Some(10) && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(1));
        }
        guests.end();
    });
    let turns = turns.map(AtomicUsize::into_inner);
    let (least, most) = (turns.iter().min().unwrap(), turns.iter().max().unwrap());
    assert!(*least >= 10 && most - least <= 2, "{turns:?}");
}

/// One guest takes no notice of another one's stop, and a guest that is no more is in no line.
#[test]
fn guests_stop_and_go_for_themselves() {
    let mut guests = Guests::new(2);
    let kick: Arc<dyn Kick> = Arc::new(Kicked::default());
    let ids: Vec<GuestId> = guests.scheds.iter().map(|sched| sched.guest()).collect();
    let next = |guests: &Guests| guests.roster.next(0, &kick, || true);
    guests.scheds[0].stop();
    for sched in &guests.scheds {
        sched.enqueue(guests.thread(1));
    }
    assert_eq!(next(&guests), Task::Guest(ids[1]));
    let thread = guests.scheds[1].start(&kick).expect("it does not stop");
    assert_eq!(next(&guests), Task::Errand);
    guests.scheds[0].go_on();
    guests.scheds[1].put_back(thread);
    guests.scheds[1].clock_changed();
    drop(guests.scheds.pop());
    assert_eq!(next(&guests), Task::Guest(ids[0]));
    assert!(guests.scheds[0].start(&kick).is_some());
    assert_eq!(next(&guests), Task::Errand);
    // It was to have a round after it went on; the other one has none any more.
    assert_eq!(guests.roster.next_round(nap), Some(ids[0]));
    guests.roster.close();
    assert_eq!(guests.roster.next_round(nap), None);
    assert_eq!(next(&guests), Task::End);
}

#[test]
fn all_workers_are_told_to_rest_once_if_there_is_a_guest_and_later_after_a_short_rest() {
    let roster = Roster::default();
    let occupied = Arc::new(AtomicBool::new(false));
    let there = Arc::clone(&occupied);
    roster.may_rest(2, Box::new(move || there.load(Ordering::SeqCst)));
    let rested = [(); 2].map(|()| AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for (worker, rested) in rested.iter().enumerate() {
            let roster = &roster;
            scope.spawn(move || {
                let kick: Arc<dyn Kick> = Arc::new(Kicked::default());
                loop {
                    match roster.next(worker, &kick, || false) {
                        Task::Rest => _ = rested.fetch_add(1, Ordering::SeqCst),
                        Task::Guest(_) | Task::Errand => {}
                        Task::End => return,
                    }
                }
            });
        }
        let rests = || rested.each_ref().map(|rests| rests.load(Ordering::SeqCst));
        let wait = || std::thread::sleep(REST_AFTER + Duration::from_millis(400));
        wait();
        assert_eq!(rests(), [0, 0], "the machine waits for a guest");
        occupied.store(true, Ordering::SeqCst);
        roster.put(GuestId(0));
        wait();
        assert_eq!(rests(), [1, 1]);
        roster.put(GuestId(0));
        wait();
        assert_eq!(rests(), [1, 1], "the first rest was short");
        wait();
        assert_eq!(rests(), [2, 2]);
        wait();
        assert_eq!(rests(), [2, 2], "they rest already");
        roster.close();
    });
}

#[test]
fn rests_that_are_short_come_later_and_later_until_one_is_long() {
    let mut inner = Inner::default();
    let mut now = 0;
    let mut rests = |inner: &mut Inner, time: Duration| {
        (inner.resting, inner.rests_since) = (true, now);
        now += time.as_nanos() as u64;
        inner.stirs(now);
        // One that has not rested meanwhile changes nothing.
        inner.stirs(now);
        inner.rest_after()
    };
    for doubled in 1..=6 {
        let after = rests(&mut inner, REST_AFTER);
        assert_eq!(after, REST_AFTER * (1 << doubled));
    }
    for _ in 0..100 {
        assert_eq!(rests(&mut inner, REST_AFTER), REST_AFTER_MOST);
    }
    assert_eq!(rests(&mut inner, REST_AFTER_MOST * REST_WORTH), REST_AFTER);
}

#[test]
fn alarm_sounds_once_for_a_round_before_the_end_of_the_sleep_and_at_the_end() {
    let roster = Roster::default();
    let alarms = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&alarms);
    roster.set_alarm(Box::new(move || _ = count.fetch_add(1, Ordering::SeqCst)));
    let sounded = || alarms.load(Ordering::SeqCst);
    let (first, other) = (GuestId(0), GuestId(1));
    roster.plan(other, None, Some(u64::MAX - 1));
    assert_eq!(sounded(), 0, "nobody sleeps");
    let mut slept = 0;
    let next = roster.next_round(|left| {
        slept += 1;
        if slept == 1 {
            assert!(left.is_some());
            roster.plan(first, None, Some(u64::MAX));
            assert_eq!(sounded(), 0, "it sleeps no longer");
            roster.plan(first, Some(u64::MAX), Some(0));
            roster.plan(other, Some(u64::MAX - 1), Some(1));
            assert_eq!(sounded(), 1);
        }
    });
    assert_eq!((next, slept), (Some(first), 1));
    assert_eq!(roster.next_round(|_| ()), Some(other));
    roster.close();
    assert_eq!((sounded(), roster.next_round(|_| ())), (2, None));
}
