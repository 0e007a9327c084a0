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

/// A thread waits while another one runs, and the clock has something to do only in an hour.
#[test]
fn clock_that_dozes_hears_of_a_crowd() {
    let machine = Machine::new();
    let sched = &machine.k.sched;
    let mut first = machine.first();
    let second = machine.fork(&mut first);
    let kicks = Arc::new(Kicks::default());
    let kick: Arc<dyn Kick> = Arc::clone(&kicks) as _;
    let start = Instant::now();
    let now = || start.elapsed().as_nanos() as u64;
    std::thread::scope(|scope| {
        scope.spawn(|| sched.run_clock(1_000_000, now, || Some(AN_HOUR)));
        assert!(soon(|| sched.queues.lock().clock_dozes));
        sched.enqueue(first);
        let Next::Thread(first) = sched.next(&kick, || false) else {
            panic!("no thread");
        };
        assert_eq!(kicks.0.load(Ordering::SeqCst), 0, "nobody waits");
        sched.enqueue(second);
        let kicked = soon(|| kicks.0.load(Ordering::SeqCst) > 1);
        sched.forget(first.tid);
        sched.end();
        assert!(kicked, "the one that waits never gets its turn");
    });
}

/// Two wait when a worker becomes free: one of them goes on waiting.
#[test]
fn clock_that_dozes_hears_of_a_crowd_that_a_worker_leaves_behind() {
    let machine = Machine::new();
    let sched = &machine.k.sched;
    let mut first = machine.first();
    let second = machine.fork(&mut first);
    let kicks = Arc::new(Kicks::default());
    let kick: Arc<dyn Kick> = Arc::clone(&kicks) as _;
    let start = Instant::now();
    let now = || start.elapsed().as_nanos() as u64;
    std::thread::scope(|scope| {
        scope.spawn(|| sched.run_clock(1_000_000, now, || None));
        let worker = scope.spawn(|| sched.next(&kick, || false));
        assert!(soon(|| sched.queues.lock().idle_workers == 1));
        assert!(soon(|| sched.queues.lock().clock_dozes));
        sched.enqueue(first);
        sched.enqueue(second);
        assert!(matches!(worker.join().unwrap(), Next::Thread(_)));
        let kicked = soon(|| kicks.0.load(Ordering::SeqCst) > 1);
        sched.end();
        assert!(kicked, "the one that waits never gets its turn");
    });
}
