//! Stores to one shared page, from one guest and from several.

use std::sync::Arc;

use shuttle::sync::Mutex;
use shuttle::thread;

use crate::guest::{BASE, Guest, finish, machine};
use crate::schedules;

/// A parent with one page full of `1` at the start, and its child.
fn family() -> (Arc<Guest>, Arc<Guest>) {
    let parent = Guest::with_pages(&machine(), 1);
    parent.store(0, BASE, 0, 1).expect("a store");
    let child = parent.fork().expect("a fork");
    (parent, child)
}

#[test]
fn two_cpus_of_one_guest_break_one_copy() {
    schedules(|| {
        let (parent, child) = family();
        let threads = [0, 1].map(|cpu| {
            let child = Arc::clone(&child);
            thread::spawn(move || child.store(cpu, BASE, 8 + cpu, 9).expect("a store"))
        });
        for t in threads {
            t.join().expect("a thread");
        }
        let seen = [0, 8, 9].map(|at| child.load(0, BASE, at));
        assert_eq!(seen, [Ok(1), Ok(9), Ok(9)]);
        let seen = [0, 8, 9].map(|at| parent.load(1, BASE, at));
        assert_eq!(seen, [Ok(1), Ok(0), Ok(0)]);
        finish(&parent.mm, &[&parent, &child]);
    });
}

/// One side copies, the other finds itself the last and takes the frame over, while the first side's
/// second virtual CPU may still look at that frame.
#[test]
fn parent_and_child_store_while_the_parent_looks() {
    schedules(|| {
        let (parent, child) = family();
        let looking = {
            let parent = Arc::clone(&parent);
            thread::spawn(move || {
                for _ in 0..3 {
                    let seen = parent.load(1, BASE, 0).expect("a load");
                    assert!(seen == 1 || seen == 2, "the child's {seen} in the parent");
                }
            })
        };
        let stores = [(&parent, 2), (&child, 3)].map(|(guest, byte)| {
            let guest = Arc::clone(guest);
            thread::spawn(move || guest.store(0, BASE, 0, byte).expect("a store"))
        });
        for t in stores {
            t.join().expect("a thread");
        }
        looking.join().expect("a thread");
        assert_eq!(parent.load(1, BASE, 0), Ok(2));
        assert_eq!(child.load(1, BASE, 0), Ok(3));
        finish(&parent.mm, &[&parent, &child]);
    });
}

/// Flushes are acknowledged late, by another thread, in an order that is not theirs.
#[test]
fn flushes_acknowledged_in_any_order() {
    schedules(|| {
        let parent = Guest::with_pages(&machine(), 3);
        for page in 0..3 {
            parent.store(0, BASE + page, 0, 1).expect("a store");
        }
        let child = parent.fork().expect("a fork");
        let pending = Arc::new(Mutex::new(Vec::new()));
        let storing = {
            let (child, pending) = (Arc::clone(&child), Arc::clone(&pending));
            thread::spawn(move || {
                for page in (0..3).map(|n| crate::guest::vpn(BASE + n)) {
                    let outcome = child
                        .mm
                        .fault(&child.space, page.va(), shadow_mm::Access::Write);
                    let shadow_mm::FaultOutcome::Resolved(done) = outcome else {
                        panic!("{outcome:?}");
                    };
                    pending.lock().expect("the list").push(done.flush);
                }
            })
        };
        let acknowledging = {
            let (child, pending) = (Arc::clone(&child), Arc::clone(&pending));
            thread::spawn(move || {
                for _ in 0..4 {
                    let last = pending.lock().expect("the list").pop();
                    if let Some(flush) = last {
                        child.shoot(flush);
                    }
                    thread::yield_now();
                }
            })
        };
        for page in 0..3 {
            parent.store(1, BASE + page, 0, 2).expect("a store");
        }
        storing.join().expect("a thread");
        acknowledging.join().expect("a thread");
        let left: Vec<_> = pending.lock().expect("the list").drain(..).collect();
        left.into_iter().for_each(|flush| child.shoot(flush));
        for page in 0..3 {
            assert_eq!(child.load(0, BASE + page, 0), Ok(1));
            assert_eq!(parent.load(0, BASE + page, 0), Ok(2));
        }
        finish(&parent.mm, &[&parent, &child]);
    });
}
