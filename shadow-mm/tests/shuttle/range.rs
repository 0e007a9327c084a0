//! Faults on one page, and against what takes the page away.

use std::sync::Arc;

use shadow_mm::{Denied, MapKind};
use shuttle::thread;

use crate::guest::{BASE, Guest, finish, machine, pages};
use crate::schedules;

#[test]
fn faults_on_one_anonymous_page_make_one_page() {
    schedules(|| {
        let mm = machine();
        let guest = Guest::with_pages(&mm, 4);
        let threads = [0, 1].map(|cpu| {
            let guest = Arc::clone(&guest);
            thread::spawn(move || guest.store(cpu, BASE, cpu, 7).expect("a store"))
        });
        for t in threads {
            t.join().expect("a thread");
        }
        for at in 0..2 {
            assert_eq!(guest.load(0, BASE, at), Ok(7), "a store was lost");
        }
        assert_eq!(mm.usage(&guest.space).resident, 1);
        finish(&mm, &[&guest]);
    });
}

/// What a thread stores never lands in a page that is another guest's by now.
fn taken_away(take: fn(&Guest)) {
    let mm = machine();
    let (guest, other) = (Guest::with_pages(&mm, 3), Guest::with_pages(&mm, 3));
    let writer = {
        let guest = Arc::clone(&guest);
        thread::spawn(move || {
            for byte in 1..4 {
                match guest.store(0, BASE + 1, 0, byte) {
                    Ok(()) | Err(Denied::NotMapped | Denied::Protection) => {}
                    Err(other) => panic!("{other:?}"),
                }
            }
        })
    };
    let taker = {
        let guest = Arc::clone(&guest);
        thread::spawn(move || take(&guest))
    };
    // Takes frames as they come free: none may have a byte of the other guest's in it.
    for page in BASE..BASE + 3 {
        assert_eq!(other.load(0, page, 0), Ok(0), "somebody else's byte");
    }
    writer.join().expect("a thread");
    taker.join().expect("a thread");
    for page in BASE..BASE + 3 {
        assert_eq!(other.load(1, page, 0), Ok(0), "somebody else's byte");
    }
    finish(&mm, &[&guest, &other]);
}

#[test]
fn unmap_against_faults() {
    schedules(|| {
        taken_away(|guest| {
            let flush = guest.mm.unmap(&guest.space, pages(BASE, 3));
            guest.shoot(flush.expect("an unmap"));
        });
    });
}

#[test]
fn discard_against_faults() {
    schedules(|| {
        taken_away(|guest| {
            let done = guest.mm.discard(&guest.space, pages(BASE, 3));
            done.result.expect("all mapped");
            guest.shoot(done.flush);
        });
    });
}

#[test]
fn protection_against_faults() {
    schedules(|| {
        taken_away(|guest| {
            let done = guest
                .mm
                .protect(&guest.space, pages(BASE, 3), shadow_mm::Prot::READ);
            done.result.expect("all mapped");
            guest.shoot(done.flush);
            let before = guest.load(1, BASE + 1, 0);
            assert_eq!(guest.load(0, BASE + 1, 0), before, "stored after the flush");
        });
    });
}

#[test]
fn mapping_over_against_faults() {
    schedules(|| taken_away(|guest| guest.map(3, MapKind::Anonymous)));
}
