//! Forks against faults, pins and other forks of the same guest.

use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;

use shadow_mm::{Access, FrameStore, PinOutcome};
use shuttle::sync::atomic::AtomicBool;
use shuttle::thread;

use crate::guest::{BASE, Guest, finish, machine, vpn};
use crate::schedules;

/// A child has what its parent stored before the fork, and nothing of what it stores after.
#[test]
fn fork_against_faults() {
    schedules(|| {
        let parent = Guest::with_pages(&machine(), 4);
        parent.store(0, BASE, 0, 1).expect("a store");
        parent.store(0, BASE + 1, 0, 1).expect("a store");
        let storing = {
            let parent = Arc::clone(&parent);
            thread::spawn(move || {
                for page in 0..3 {
                    parent.store(1, BASE + page, 0, 2).expect("a store");
                }
            })
        };
        let child = parent.fork().expect("a fork");
        let first: Vec<_> = (0..3).map(|page| child.load(0, BASE + page, 0)).collect();
        storing.join().expect("a thread");
        let later: Vec<_> = (0..3).map(|page| child.load(1, BASE + page, 0)).collect();
        assert_eq!(first, later, "the parent's store in the child");
        assert!(first[..2].iter().all(|b| matches!(b, Ok(1 | 2))));
        for page in 0..3 {
            assert_eq!(parent.load(0, BASE + page, 0), Ok(2), "a store was lost");
        }
        finish(&parent.mm, &[&parent, &child]);
    });
}

/// Two virtual CPUs store to one page while it is forked: what one of them stores through what it knew before is
/// not lost in the copy that the other makes.
#[test]
fn fork_against_stores_of_two_cpus() {
    schedules(|| {
        let parent = Guest::with_pages(&machine(), 1);
        for cpu in [0, 1] {
            parent.store(cpu, BASE, 0, 1).expect("a store");
        }
        let storing = [0, 1].map(|cpu| {
            let parent = Arc::clone(&parent);
            thread::spawn(move || parent.store(cpu, BASE, cpu + 1, 2).expect("a store"))
        });
        let child = parent.fork().expect("a fork");
        let first = [0, 1].map(|cpu| child.load(0, BASE, cpu + 1));
        for thread in storing {
            thread.join().expect("a thread");
        }
        let later = [0, 1].map(|cpu| child.load(1, BASE, cpu + 1));
        assert_eq!(first, later, "the parent's store in the child");
        for at in 1..=2 {
            assert_eq!(parent.load(0, BASE, at), Ok(2), "a store was lost");
        }
        finish(&parent.mm, &[&parent, &child]);
    });
}

#[test]
fn two_forks_of_one_guest() {
    schedules(|| {
        let parent = Guest::with_pages(&machine(), 2);
        parent.store(0, BASE, 0, 1).expect("a store");
        let forks = [0, 1].map(|_| {
            let parent = Arc::clone(&parent);
            thread::spawn(move || {
                let child = parent.fork().expect("a fork");
                child.store(0, BASE, 0, 5).expect("a store");
                child
            })
        });
        parent.store(1, BASE, 0, 2).expect("a store");
        let [a, b] = forks.map(|t| t.join().expect("a thread"));
        assert_eq!([&a, &b].map(|child| child.load(1, BASE, 0)), [Ok(5); 2]);
        assert_eq!(parent.load(0, BASE, 0), Ok(2));
        finish(&parent.mm, &[&parent, &a, &b]);
    });
}

/// What the embedder stores through a write pin after a fork is its own guest's alone.
#[test]
fn pin_against_fork() {
    schedules(|| {
        let parent = Guest::with_pages(&machine(), 1);
        parent.store(0, BASE, 0, 1).expect("a store");
        let forked = Arc::new(AtomicBool::new(false));
        let pinning = {
            let (parent, forked) = (Arc::clone(&parent), Arc::clone(&forked));
            thread::spawn(move || {
                let pin = loop {
                    match parent.mm.pin(&parent.space, vpn(BASE), Access::Write) {
                        PinOutcome::Pinned(pin, flush) => {
                            parent.shoot(flush);
                            break pin;
                        }
                        PinOutcome::Again(flush) => parent.shoot(flush),
                        PinOutcome::Collided => thread::yield_now(),
                        other => panic!("{other:?}"),
                    }
                };
                let late = forked.load(SeqCst);
                parent.mm.store().write(pin.pfn(), 0, &[2]);
                parent.mm.unpin(pin);
                late
            })
        };
        let child = parent.fork().expect("a fork");
        forked.store(true, SeqCst);
        let late = pinning.join().expect("a thread");
        let seen = child.load(0, BASE, 0);
        assert!(matches!(seen, Ok(1 | 2)), "{seen:?}");
        assert!(!late || seen == Ok(1), "stored after the fork");
        assert_eq!(parent.load(1, BASE, 0), Ok(2), "the pin's store was lost");
        finish(&parent.mm, &[&parent, &child]);
    });
}
