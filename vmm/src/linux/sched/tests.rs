use std::sync::atomic::AtomicUsize;
use std::time::{Duration, Instant};

use super::*;
use crate::linux::testing::Machine;

#[derive(Default)]
struct Kicks(AtomicUsize);

impl Kick for Kicks {
    fn kick(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
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
        scope.spawn(|| sched.run_clock(now, || Some(AN_HOUR)));
        assert!(soon(|| sched.queues.lock().clock_sleeps > 0));
        body();
        let kicked = soon(|| kicks.0.load(Ordering::SeqCst) > 1);
        sched.end();
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
        assert!(matches!(sched.next(&kick, || false), Next::Thread(_)));
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
        let worker = scope.spawn(|| sched.next(&kick, || false));
        assert!(soon(|| sched.queues.lock().idle_workers == 1));
        kicked_beside_the_clock(sched, &kicks, || {
            sched.enqueue(first);
            sched.enqueue(second);
            assert!(matches!(worker.join().unwrap(), Next::Thread(_)));
        })
    });
    assert!(kicked, "the one that waits never gets its turn");
}
