use std::sync::atomic::AtomicUsize;
use std::time::{Duration, Instant};

use super::roster::Task;
use super::*;
use crate::linux::testing::Machine;

#[derive(Default)]
struct Kicks(AtomicUsize);

impl Kick for Kicks {
    fn kick(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

/// What a worker does next.
#[derive(Debug)]
pub(super) enum Next {
    Thread(Box<Thread>),
    Errand,
    End,
}

/// What worker `worker` of a machine does next that has only this guest.
pub(super) fn next(
    sched: &Sched,
    worker: usize,
    kick: &Arc<dyn Kick>,
    errand: impl Fn() -> bool,
) -> Next {
    loop {
        match sched.roster().next(worker, kick, &errand) {
            Task::Guest(guest) => {
                assert_eq!(guest, sched.guest());
                if let Some(thread) = sched.start(kick) {
                    return Next::Thread(thread);
                }
            }
            Task::Errand => return Next::Errand,
            Task::Rest => unreachable!("this machine may not rest"),
            Task::End => return Next::End,
        }
    }
}

/// The sleep of a clock thread without an alarm.
pub(super) fn nap(left: Option<Duration>) {
    let most = Duration::from_millis(1);
    std::thread::sleep(left.map_or(most, |left| left.min(most)));
}

/// Runs the clock of a machine that has only this guest.
pub(super) fn run_clock(
    sched: &Sched,
    now: impl Fn() -> u64,
    mut tick: impl FnMut() -> Option<u64>,
) {
    sched.clock_changed();
    while let Some(guest) = sched.roster().next_round(nap) {
        assert_eq!(guest, sched.guest());
        sched.round(&now, &mut tick);
    }
}

/// Ends the guest, and the machine.
pub(super) fn end(sched: &Sched) {
    sched.end();
    sched.roster().close();
}

const AN_HOUR: u64 = 3_600_000_000_000;

/// Whether it becomes true soon.
fn soon(condition: impl Fn() -> bool) -> bool {
    let until = Instant::now() + Duration::from_secs(20);
    while Instant::now() < until {
        if condition() {
            return true;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    false
}

/// A machine with two threads that can run, and what is counted when one is kicked.
fn two_threads() -> (Machine, [Box<Thread>; 2], Arc<Kicks>) {
    let machine = Machine::new();
    let mut first = machine.first();
    let second = machine.fork(&mut first);
    (machine, [first, second], Arc::default())
}

/// Runs the clock, which has something to do of itself only in an hour, beside `body`; then ends the machine. Whether a
/// running thread was kicked again and again.
fn kicked_beside_the_clock(sched: &Sched, kicks: &Kicks, body: impl FnOnce()) -> bool {
    let start = Instant::now();
    let now = || start.elapsed().as_nanos() as u64;
    std::thread::scope(|scope| {
        scope.spawn(|| run_clock(sched, now, || Some(AN_HOUR)));
        assert!(soon(|| {
            let planned = sched.queues.lock().planned;
            planned.is_some_and(|at| at > AN_HOUR / 2)
        }));
        body();
        let kicked = soon(|| kicks.0.load(Ordering::SeqCst) > 1);
        end(sched);
        kicked
    })
}

/// A thread waits while another one runs.
#[test]
fn clock_that_dozes_hears_of_a_crowd() {
    let (machine, [first, second], kicks) = two_threads();
    let sched = &machine.k.sched;
    let kick: Arc<dyn Kick> = Arc::clone(&kicks) as _;
    let kicked = kicked_beside_the_clock(sched, &kicks, || {
        sched.enqueue(first);
        assert!(matches!(next(sched, 0, &kick, || false), Next::Thread(_)));
        assert_eq!(kicks.0.load(Ordering::SeqCst), 0, "nobody waits");
        sched.enqueue(second);
    });
    assert!(kicked, "the one that waits never gets its turn");
}

/// Two come when one worker is free: one of them goes on waiting.
#[test]
fn clock_that_dozes_hears_of_a_crowd_that_a_worker_leaves_behind() {
    let (machine, [first, second], kicks) = two_threads();
    let sched = &machine.k.sched;
    let kick: Arc<dyn Kick> = Arc::clone(&kicks) as _;
    let kicked = std::thread::scope(|scope| {
        let worker = scope.spawn(|| next(sched, 0, &kick, || false));
        assert!(soon(|| sched.roster().idle() == 1));
        kicked_beside_the_clock(sched, &kicks, || {
            sched.enqueue(first);
            sched.enqueue(second);
            assert!(matches!(worker.join().unwrap(), Next::Thread(_)));
        })
    });
    assert!(kicked, "the one that waits never gets its turn");
}
