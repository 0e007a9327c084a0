use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;
use crate::linux::testing::Machine;

const MS: u64 = 1_000_000;

#[derive(Default)]
struct Kicks(AtomicUsize);

impl Kick for Kicks {
    fn kick(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

/// One processor, on which time passes when it is said to.
struct Processor {
    machine: Machine,
    turns: Turns,
    now: u64,
    kicks: Arc<Kicks>,
    runs: Option<Box<Thread>>,
    next_tid: Tid,
}

impl Processor {
    fn new() -> Self {
        Self {
            machine: Machine::new(),
            turns: Turns::default(),
            now: 0,
            kicks: Arc::default(),
            runs: None,
            next_tid: 100,
        }
    }

    /// A thread that never ran.
    fn thread(&mut self) -> Box<Thread> {
        self.next_tid += 1;
        let mut thread = self.machine.first();
        thread.tid = self.next_tid;
        thread
    }

    fn join(&mut self, thread: Box<Thread>, why: Arrival) {
        self.turns.join(thread, why, self.now);
        self.look();
    }

    /// A new thread, and its number.
    fn spawn(&mut self) -> Tid {
        let thread = self.thread();
        let tid = thread.tid;
        self.join(thread, Arrival::New);
        tid
    }

    /// Does what a worker and the clock would: the next look is due after what is returned.
    fn look(&mut self) -> Option<u64> {
        let before = self.kicks.0.load(Ordering::SeqCst);
        let next = self.turns.take_turns(self.now);
        let kicked = self.kicks.0.load(Ordering::SeqCst) > before;
        if kicked && let Some(thread) = self.runs.take() {
            self.leave(thread, Leave::IfBehind);
            return self.turns.take_turns(self.now);
        }
        self.start();
        next
    }

    fn leave(&mut self, thread: Box<Thread>, how: Leave) {
        self.runs = self.turns.leave(thread, how, self.now).err();
        self.start();
    }

    fn start(&mut self) {
        if self.runs.is_none() {
            let kick: Arc<dyn Kick> = Arc::clone(&self.kicks) as _;
            self.runs = self.turns.start(&kick, self.now);
        }
    }

    /// The running thread sleeps.
    fn park(&mut self) -> Box<Thread> {
        let mut thread = self.runs.take().expect("one runs");
        thread.account = self.turns.stop(thread.tid, self.now);
        self.start();
        thread
    }

    /// Lets time pass; who ran how long.
    fn pass(&mut self, time: u64) -> BTreeMap<Tid, u64> {
        let (end, mut ran) = (self.now + time, BTreeMap::new());
        while self.now < end {
            let next = self.look().unwrap_or(u64::MAX);
            let step = next.min(end - self.now);
            assert!(step > 0, "the clock would spin");
            if let Some(tid) = self.running() {
                *ran.entry(tid).or_default() += step;
            }
            self.now += step;
        }
        self.look();
        ran
    }

    fn running(&self) -> Option<Tid> {
        self.runs.as_ref().map(|thread| thread.tid)
    }
}

#[test]
fn those_that_compute_share_the_processor() {
    let mut cpu = Processor::new();
    let all = [cpu.spawn(), cpu.spawn(), cpu.spawn()];
    let ran = cpu.pass(3_000 * MS);
    for tid in all {
        assert!(ran[&tid].abs_diff(1_000 * MS) <= 2 * LEAD, "{ran:?}");
    }
    // And not in smaller pieces than needed.
    assert!(cpu.kicks.0.load(Ordering::SeqCst) <= 3_000 / 5);
}

/// What Python's threads rely on: whoever waits for its lock asks for it after 5 ms, and runs then.
#[test]
fn one_that_wakes_takes_the_processor_from_one_that_computes_at_once() {
    let mut cpu = Processor::new();
    let sleeper = cpu.spawn();
    let computes = cpu.spawn();
    let mut asleep = Some(cpu.park());
    for _ in 0..100 {
        cpu.pass(5 * MS);
        assert_eq!(cpu.running(), Some(computes));
        cpu.join(asleep.take().unwrap(), Arrival::Woken);
        assert_eq!(cpu.running(), Some(sleeper));
        cpu.pass(MS / 10);
        asleep = Some(cpu.park());
    }
}

#[test]
fn who_always_wakes_does_not_starve_others() {
    let mut cpu = Processor::new();
    cpu.spawn();
    let computes = cpu.spawn();
    let (mut ran, start) = (0, cpu.now);
    while cpu.now < start + 2_000 * MS {
        // Sleeps for no time after each 100 us.
        ran += cpu.pass(MS / 10).get(&computes).copied().unwrap_or(0);
        if cpu.running() != Some(computes) {
            let thread = cpu.park();
            cpu.join(thread, Arrival::Woken);
        }
    }
    assert!(ran.abs_diff(1_000 * MS) <= 4 * LEAD, "{ran}");
}

#[test]
fn long_sleep_is_no_claim_and_long_run_no_debt() {
    let mut cpu = Processor::new();
    let long = cpu.spawn();
    let other = cpu.spawn();
    cpu.pass(MS);
    assert_eq!(cpu.running(), Some(long));
    let asleep = cpu.park();
    assert_eq!(cpu.running(), Some(other));
    cpu.pass(60_000 * MS);
    cpu.join(asleep, Arrival::Woken);
    assert_eq!(cpu.running(), Some(long));
    let ran = cpu.pass(1_000 * MS);
    assert!(ran[&long].abs_diff(500 * MS) <= 2 * LEAD, "{ran:?}");
    // The other one has run alone for a minute, and is as good as a new one.
    let new = cpu.spawn();
    let ran = cpu.pass(900 * MS);
    for tid in [long, other, new] {
        assert!(ran[&tid].abs_diff(300 * MS) <= 4 * LEAD, "{ran:?}");
    }
}

#[test]
fn host_that_stood_still_is_not_charged_for_long() {
    let mut cpu = Processor::new();
    let first = cpu.spawn();
    cpu.spawn();
    assert_eq!(cpu.running(), Some(first));
    cpu.now += 60_000 * MS;
    cpu.look();
    let ran = cpu.pass(1_000 * MS);
    assert!(ran[&first] >= 500 * MS - FURTHEST, "{ran:?}");
}

#[test]
fn yielding_thread_comes_after_all_that_wait() {
    let mut cpu = Processor::new();
    let all = [cpu.spawn(), cpu.spawn(), cpu.spawn()];
    for n in 0..9 {
        assert_eq!(cpu.running(), Some(all[n % 3]));
        let thread = cpu.runs.take().unwrap();
        cpu.leave(thread, Leave::Last);
    }
}

#[test]
fn kick_for_another_reason_takes_nothing_from_who_is_behind() {
    let mut cpu = Processor::new();
    let first = cpu.spawn();
    cpu.spawn();
    let thread = cpu.runs.take().unwrap();
    cpu.leave(thread, Leave::IfBehind);
    assert_eq!(cpu.running(), Some(first), "the other one has not run less");
}

#[test]
fn of_two_processors_the_one_furthest_ahead_is_taken_and_told_once() {
    let mut cpu = Processor::new();
    let kicks: [Arc<Kicks>; 2] = Default::default();
    for (n, kicks) in kicks.iter().enumerate() {
        let thread = cpu.thread();
        cpu.turns.join(thread, Arrival::New, n as u64 * 3 * MS);
        let kick: Arc<dyn Kick> = Arc::clone(kicks) as _;
        assert!(cpu.turns.start(&kick, n as u64 * 3 * MS).is_some());
    }
    let told = || [0, 1].map(|n: usize| kicks[n].0.load(Ordering::SeqCst));
    // Equal accounts would be an accident: the second one ran as long, and starts where the first was.
    let thread = cpu.thread();
    cpu.turns.join(thread, Arrival::New, 4 * MS);
    assert_eq!(cpu.turns.take_turns(4 * MS), Some(LEAD));
    assert_eq!(told(), [0, 0]);
    let next = cpu.turns.take_turns(4 * MS + LEAD);
    assert_eq!((told().iter().sum::<usize>(), next), (1, Some(PATIENCE)));
    assert_eq!(cpu.turns.take_turns(5 * MS + LEAD), Some(PATIENCE - MS));
    assert_eq!(told().iter().sum::<usize>(), 1);
    // Told again when it does not hear, and the other one too for a second that waits.
    let thread = cpu.thread();
    cpu.turns.join(thread, Arrival::Woken, 6 * MS + LEAD);
    cpu.turns.take_turns(6 * MS + LEAD);
    assert_eq!(told(), [1, 1]);
    cpu.turns.take_turns(6 * MS + LEAD + PATIENCE);
    assert_eq!(told(), [2, 2]);
}
