//! Spaces that share tables, and change something in them at once.

use std::sync::Arc;

use shadow_mm::{Access, FrameStore, Prot, SavedPage, TrimMode};
use shuttle::thread;

use crate::guest::{BASE, Guest, finish, machine, pages};
use crate::schedules;

/// A guest with two pages, and its child.
fn family() -> [Arc<Guest>; 2] {
    let parent = Guest::with_pages(&machine(), 3);
    for page in 0..2 {
        parent.store(0, BASE + page, 0, 1).expect("a store");
    }
    let child = parent.fork().expect("a fork");
    [parent, child]
}

/// Does something to each of two guests at once.
fn both(guests: &[Arc<Guest>; 2], verbs: [fn(&Guest); 2]) {
    let threads = [0, 1].map(|n| {
        let guest = Arc::clone(&guests[n]);
        thread::spawn(move || verbs[n](&guest))
    });
    for thread in threads {
        thread.join().expect("a thread");
    }
}

#[test]
fn two_guests_unshare_one_table() {
    schedules(|| {
        let guests = family();
        both(
            &guests,
            [
                |guest| guest.store(0, BASE, 0, 2).expect("a store"),
                |guest| guest.store(0, BASE, 0, 3).expect("a store"),
            ],
        );
        let seen = [0, 1].map(|n: usize| [BASE, BASE + 1].map(|page| guests[n].load(1, page, 0)));
        assert_eq!(seen, [[Ok(2), Ok(1)], [Ok(3), Ok(1)]]);
        finish(&guests[0].mm, &[&guests[0], &guests[1]]);
    });
}

/// One guest makes a page in a table that the other gets for itself.
#[test]
fn new_page_against_unsharing() {
    schedules(|| {
        let guests = family();
        both(
            &guests,
            [
                |guest| guest.store(0, BASE + 2, 0, 2).expect("a store"),
                |guest| guest.store(0, BASE, 0, 3).expect("a store"),
            ],
        );
        assert_eq!(guests[0].load(1, BASE + 2, 0), Ok(2));
        assert_eq!(guests[1].load(1, BASE + 2, 0), Ok(0));
        assert_eq!(guests[0].load(1, BASE, 0), Ok(1));
        finish(&guests[0].mm, &[&guests[0], &guests[1]]);
    });
}

/// Loads of a guest whose table the other takes pages from, on its own account or by getting it for itself.
#[test]
fn trim_against_unsharing() {
    schedules(|| {
        let guests = family();
        both(
            &guests,
            [
                |guest| {
                    let trimmed = guest.mm.trim(&guest.space, 8, TrimMode::Any);
                    guest.shoot(trimmed.flush);
                },
                |guest| {
                    guest.store(0, BASE, 0, 3).expect("a store");
                    assert_eq!(guest.load(1, BASE + 1, 0), Ok(1));
                },
            ],
        );
        let seen = [0, 1].map(|n: usize| [BASE, BASE + 1].map(|page| guests[n].load(1, page, 0)));
        assert_eq!(seen, [[Ok(1), Ok(1)], [Ok(3), Ok(1)]]);
        finish(&guests[0].mm, &[&guests[0], &guests[1]]);
    });
}

#[test]
fn exit_against_unsharing() {
    schedules(|| {
        let guests = family();
        both(
            &guests,
            [Guest::delete, |guest| {
                guest.store(0, BASE, 0, 3).expect("a store");
                guest.store(1, BASE + 1, 0, 3).expect("a store");
            }],
        );
        let seen = [BASE, BASE + 1].map(|page| guests[1].load(1, page, 0));
        assert_eq!(seen, [Ok(3), Ok(3)]);
        finish(&guests[0].mm, &[&guests[1]]);
    });
}

/// The table's other sharer unmaps what is in it, in part or whole, and forks.
#[test]
fn unmap_and_fork_against_unsharing() {
    schedules(|| {
        let guests = family();
        both(
            &guests,
            [
                |guest| {
                    let gone = guest.mm.unmap(&guest.space, pages(BASE, 1));
                    guest.shoot(gone.expect("unmapped"));
                    let child = guest.fork().expect("a fork");
                    let gone = guest.mm.unmap(&guest.space, pages(BASE, 3));
                    guest.shoot(gone.expect("unmapped"));
                    assert_eq!(child.load(0, BASE + 1, 0), Ok(1));
                    child.delete();
                },
                |guest| {
                    guest.store(0, BASE, 0, 3).expect("a store");
                    let done = guest.mm.protect(&guest.space, pages(BASE, 2), Prot::READ);
                    guest.shoot(done.flush);
                },
            ],
        );
        let found =
            guests[0]
                .mm
                .fault(&guests[0].space, crate::guest::vpn(BASE).va(), Access::Read);
        assert!(guests[0].settle(found).is_err());
        assert_eq!(guests[1].load(1, BASE, 0), Ok(3));
        finish(&guests[0].mm, &[&guests[0], &guests[1]]);
    });
}

/// What is saved of a guest is its pages, whatever becomes of their frames because of the other that has them too.
#[test]
fn saving_against_a_sharers_trim() {
    schedules(|| {
        let guests = family();
        both(
            &guests,
            [
                |guest| {
                    guest.trim();
                    guest.write_modified();
                    guest.take_standby();
                },
                |guest| {
                    let stored = pages(BASE, 2);
                    let next = guest.mm.saved_pages(&guest.space, stored, 9, |vpn, page| {
                        let SavedPage::Frame(_, frame) = page else {
                            return;
                        };
                        thread::yield_now();
                        let mut byte = [0];
                        guest.mm.store().read(frame, 0, &mut byte);
                        assert_eq!(byte, [1], "{vpn:?}");
                    });
                    assert_eq!(next, None);
                },
            ],
        );
        let seen = guests.each_ref().map(|guest| guest.load(1, BASE, 0));
        assert_eq!(seen, [Ok(1), Ok(1)]);
        finish(&guests[0].mm, &[&guests[0], &guests[1]]);
    });
}
