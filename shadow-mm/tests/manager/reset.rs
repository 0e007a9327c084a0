//! Going back to what lies under a space: what it gives up, what it keeps, and what it must not keep.

use super::common::page_file::{File, evict_all, trim};
use super::common::{BASE, Cpu, Guest, LAYER, Mm, RW, manager, map_anon, over_layer, range, vpn};
use shadow_mm::{
    Access, FaultOutcome, ForkMode, FrameStore, Keep, PageInfo, Pin, PinOutcome, Prot,
};

#[test]
fn space_that_goes_back_has_nothing_of_its_own_and_needs_no_fault_to_read() {
    for mode in [ForkMode::Eager, ForkMode::Shared] {
        let mm = manager(64, 64);
        mm.set_fork_mode(mode);
        let (space, _section) = over_layer(&mm);
        map_anon(&mm, &space, BASE + 100, 8, RW);
        let mut cpu = Cpu::new(&space);
        assert_eq!(cpu.load(&mm, BASE), Ok(1));
        let shape = mm.shape(&space);
        for call in 1..4_u8 {
            for page in [0, 3, 7, 100, 104] {
                cpu.store(&mm, BASE + page, 100 + call).expect("a store");
            }
            let forked = mm.fork(&space).expect("a fork");
            cpu.flush(&mm, forked.flush);
            cpu.store(&mm, BASE + 3, 1).expect("a store");
            mm.flushed(mm.delete_space(&forked.child));
            assert_eq!(mm.shape(&space), shape);
            let back = mm.reset_to_image(&space, Keep::NONE).expect("a reset");
            assert!(!back.flush.is_empty() && back.kept == 0);
            cpu.flush(&mm, back.flush);
            let usage = mm.usage(&space);
            assert_eq!((usage.private, usage.peak_resident), (0, usage.resident));
            let faults = mm.stats().faults_mapped;
            for page in 0..LAYER {
                assert_eq!(cpu.load(&mm, BASE + u64::from(page)), Ok(page as u8 + 1));
            }
            assert_eq!(mm.stats().faults_mapped, faults, "what was there is mapped");
            assert_eq!(cpu.load(&mm, BASE + 100), Ok(0));
            go_back(&mm, &space);
            let stats = mm.stats();
            assert_eq!((stats.data.active, stats.data.in_flight), (0, 0));
            cpu.mmu.flush_all();
            mm.check(core::slice::from_ref(&space)).expect("invariants");
        }
        let mapped = mm.protect(&space, range(BASE, 1), Prot::READ);
        mm.flushed(mapped.flush);
        assert_ne!(mm.shape(&space), shape);
    }
}

/// Gives up all it has.
fn go_back(mm: &Mm, space: &Guest) {
    let back = mm.reset_to_image(space, Keep::NONE).expect("a reset");
    mm.flushed(back.flush);
}

/// What a reset costs goes by the tables that were stored to.
#[test]
fn tables_without_stores_are_not_looked_into() {
    let mm = manager(64, 64);
    let (space, _section) = over_layer(&mm);
    let mut cpu = Cpu::new(&space);
    assert_eq!(cpu.load(&mm, BASE), Ok(1));
    let written = mm.stats().entries_written;
    go_back(&mm, &space);
    let stats = mm.stats();
    assert_eq!((stats.entries_written, stats.pages_reset), (written, 0));
    cpu.store(&mm, BASE + 2, 5).expect("a store");
    go_back(&mm, &space);
    assert_eq!(mm.stats().pages_reset, 1);
}

/// Goes back, may keep so many pages; says how many it did, and whether nothing is to be flushed.
fn keep(mm: &Mm, cpu: &mut Cpu, most: u64) -> (u64, bool) {
    keep_stored(mm, cpu, Keep { most, unseen: 64 })
}

fn keep_stored(mm: &Mm, cpu: &mut Cpu, keep: Keep) -> (u64, bool) {
    let back = mm.reset_to_image(&cpu.space, keep).expect("a reset");
    let quiet = back.flush.is_empty();
    cpu.flush(mm, back.flush);
    assert_eq!(mm.usage(&cpu.space).private, back.kept);
    (back.kept, quiet)
}

fn check(mm: &Mm, cpus: &[&Cpu]) {
    let spaces: Vec<Guest> = cpus.iter().map(|cpu| cpu.space.clone()).collect();
    mm.check(&spaces).expect("invariants");
}

/// A space over a layer, with a page of anonymous memory besides.
fn scene() -> (Mm, Cpu) {
    let mm = manager(64, 64);
    let (space, _section) = over_layer(&mm);
    map_anon(&mm, &space, BASE + 100, 8, RW);
    let cpu = Cpu::new(&space);
    (mm, cpu)
}

fn is_own(mm: &Mm, space: &Guest, page: u64) -> bool {
    let mut own = false;
    let look = |_, page: PageInfo| own = !page.frozen;
    mm.resident_pages(space, range(page, 1), look);
    own
}

#[test]
fn kept_pages_have_what_lies_under_them_and_take_no_fault() {
    let (mm, mut cpu) = scene();
    for call in 1..4_u8 {
        let before = mm.stats();
        for page in [0, 3, 100] {
            assert_eq!(
                cpu.load(&mm, BASE + page),
                Ok(if page == 100 { 0 } else { page as u8 + 1 })
            );
            cpu.store(&mm, BASE + page, 200 + call).expect("a store");
        }
        let after = mm.stats();
        if call > 1 {
            assert_eq!(
                after.entries_written, before.entries_written,
                "no entry changes"
            );
            assert_eq!(after.faults_copy_on_write, before.faults_copy_on_write);
        }
        assert_eq!(keep(&mm, &mut cpu, 3), (3, true));
        check(&mm, &[&cpu]);
        assert_eq!(mm.stats().pages_put_back, u64::from(call) * 3);
    }
    assert_eq!(keep(&mm, &mut cpu, 0), (0, false));
    check(&mm, &[&cpu]);
    for page in [0, 3, 100] {
        assert_eq!(
            cpu.load(&mm, BASE + page),
            Ok(if page == 100 { 0 } else { page as u8 + 1 })
        );
    }
}

#[test]
fn no_more_are_kept_than_may_be() {
    let (mm, mut cpu) = scene();
    for page in [1, 5, 8, 101] {
        cpu.store(&mm, BASE + page, 77).expect("a store");
    }
    assert_eq!(keep(&mm, &mut cpu, 2), (2, false));
    check(&mm, &[&cpu]);
    for page in [1, 5, 8] {
        assert_eq!(is_own(&mm, &cpu.space, BASE + page), page == 8);
        assert_eq!(cpu.load(&mm, BASE + page), Ok(page as u8 + 1));
    }
    assert_eq!(cpu.load(&mm, BASE + 101), Ok(0));
}

/// Of many, those that the guest has stored to since are worth keeping.
#[test]
fn pages_that_are_not_stored_to_again_are_given_up_if_there_are_many() {
    let (mm, mut cpu) = scene();
    let keep = Keep { most: 6, unseen: 3 };
    for page in [1, 5, 8, 100] {
        cpu.store(&mm, BASE + page, 77).expect("a store");
    }
    assert_eq!(keep_stored(&mm, &mut cpu, keep), (4, true));
    check(&mm, &[&cpu]);
    for page in [1, 100] {
        cpu.store(&mm, BASE + page, 77).expect("a store");
    }
    assert_eq!(keep_stored(&mm, &mut cpu, keep), (2, false));
    check(&mm, &[&cpu]);
    // They are few now.
    assert_eq!(keep_stored(&mm, &mut cpu, keep), (2, true));
    for page in [1, 5, 8, 100] {
        assert_eq!(
            is_own(&mm, &cpu.space, BASE + page),
            [1, 100].contains(&page)
        );
        let content = if page == 100 { 0 } else { page as u8 + 1 };
        assert_eq!(cpu.load(&mm, BASE + page), Ok(content));
    }
    check(&mm, &[&cpu]);
}

/// The holder of a pin may store to the frame at any time.
#[test]
fn pinned_page_is_given_up_and_its_holder_keeps_the_frame() {
    let (mm, mut cpu) = scene();
    let pinned = |access| match mm.pin(&cpu.space, vpn(BASE + 2), access) {
        PinOutcome::Pinned(pin, flush) => (pin, flush),
        other => panic!("{other:?}"),
    };
    let pins: [(Pin, _); 2] = [pinned(Access::Write), pinned(Access::Read)];
    let [write, read] = pins.map(|(pin, flush)| {
        mm.flushed(flush);
        pin
    });
    assert_eq!(keep(&mm, &mut cpu, 8), (0, false));
    check(&mm, &[&cpu]);
    mm.store().write(write.pfn(), 0, &[99]);
    assert_eq!(cpu.load(&mm, BASE + 2), Ok(3));
    mm.unpin(write);
    cpu.store(&mm, BASE + 2, 50).expect("a store");
    let mut byte = [0];
    mm.store().read(read.pfn(), 0, &mut byte);
    assert_eq!(byte, [99]);
    mm.unpin(read);
    assert_eq!(keep(&mm, &mut cpu, 8), (1, true));
    check(&mm, &[&cpu]);
    assert_eq!(cpu.load(&mm, BASE + 2), Ok(3));
}

/// One that forks share would show the others what lies under this space.
#[test]
fn page_of_a_fork_is_given_up_and_the_child_keeps_its_content() {
    for mode in [ForkMode::Eager, ForkMode::Shared] {
        let (mm, mut cpu) = scene();
        mm.set_fork_mode(mode);
        cpu.store(&mm, BASE + 1, 60).expect("a store");
        cpu.store(&mm, BASE + 100, 61).expect("a store");
        let forked = mm.fork(&cpu.space).expect("a fork");
        cpu.flush(&mm, forked.flush);
        let mut child = Cpu::new(&forked.child);
        // A copy of its own.
        cpu.store(&mm, BASE + 100, 62).expect("a store");
        assert_eq!(keep(&mm, &mut cpu, 8), (1, false));
        check(&mm, &[&cpu, &child]);
        assert_eq!(child.load(&mm, BASE + 1), Ok(60));
        assert_eq!(child.load(&mm, BASE + 100), Ok(61));
        assert_eq!(cpu.load(&mm, BASE + 1), Ok(2));
        assert_eq!(cpu.load(&mm, BASE + 100), Ok(0));
        mm.flushed(mm.delete_space(&child.space));
        assert_eq!(keep(&mm, &mut cpu, 8), (1, true));
    }
}

/// The frame is mapped by one space only then, and is still both's.
#[test]
fn page_of_a_fork_that_the_child_does_not_map_is_given_up() {
    for mode in [ForkMode::Eager, ForkMode::Shared] {
        let (mm, mut cpu) = scene();
        mm.set_fork_mode(mode);
        mm.add_page_file(64).expect("a page file");
        cpu.store(&mm, BASE + 1, 60).expect("a store");
        let forked = mm.fork(&cpu.space).expect("a fork");
        cpu.flush(&mm, forked.flush);
        let mut child = Cpu::new(&forked.child);
        // Both have a table of their own.
        child.store(&mm, BASE + 2, 61).expect("a store");
        assert_eq!(trim(&mm, &mut child, 2), 2);
        keep(&mm, &mut cpu, 8);
        check(&mm, &[&cpu, &child]);
        assert_eq!(cpu.load(&mm, BASE + 1), Ok(2));
        assert_eq!(child.load(&mm, BASE + 1), Ok(60));
    }
}

#[test]
fn page_that_may_not_be_stored_to_is_given_up() {
    let (mm, mut cpu) = scene();
    for page in [4, 100] {
        cpu.store(&mm, BASE + page, 70).expect("a store");
        let protected = mm.protect(&cpu.space, range(BASE + page, 1), Prot::READ);
        cpu.flush(&mm, protected.flush);
    }
    assert_eq!(keep(&mm, &mut cpu, 8), (0, false));
    check(&mm, &[&cpu]);
    assert_eq!(cpu.load(&mm, BASE + 4), Ok(5));
    assert!(cpu.store(&mm, BASE + 4, 1).is_err());
    assert_eq!(cpu.load(&mm, BASE + 100), Ok(0));
}

/// What the page file has of a page is not what the page has any more, though nobody stored to it.
#[test]
fn kept_page_that_came_from_the_page_file_is_written_again() {
    let (mm, mut cpu) = scene();
    mm.add_page_file(64).expect("a page file");
    let mut file = File::default();
    let pages = [6, 100];
    for page in pages {
        cpu.store(&mm, BASE + page, 80).expect("a store");
    }
    for round in 0..2 {
        assert_eq!(trim(&mm, &mut cpu, 16), 2);
        file.write_all(&mm);
        evict_all(&mm);
        let expected = |page: u64| match (round, page) {
            (0, _) => 80,
            (_, 6) => 7,
            (_, _) => 0,
        };
        for page in pages {
            let outcome = mm.fault(&cpu.space, vpn(BASE + page).va(), Access::Read);
            let FaultOutcome::PageIn(ticket) = outcome else {
                assert!(page == 100, "{outcome:?}");
                continue;
            };
            file.read(&mm, &ticket);
            let length = ticket.length();
            let FaultOutcome::Resolved(done) = mm.complete_page_in(ticket, Ok(length)) else {
                panic!("no page");
            };
            cpu.flush(&mm, done.flush);
        }
        for page in pages {
            assert_eq!(
                cpu.load(&mm, BASE + page),
                Ok(expected(page)),
                "round {round}"
            );
        }
        assert_eq!(keep(&mm, &mut cpu, 8).0, 2);
        check(&mm, &[&cpu]);
    }
}

/// A trimmed page's frame is not the space's to keep.
#[test]
fn page_that_is_not_mapped_is_given_up() {
    let (mm, mut cpu) = scene();
    mm.add_page_file(64).expect("a page file");
    cpu.store(&mm, BASE + 6, 80).expect("a store");
    assert_eq!(trim(&mm, &mut cpu, 1), 1);
    assert_eq!(keep(&mm, &mut cpu, 8).0, 0);
    check(&mm, &[&cpu]);
    assert_eq!(cpu.load(&mm, BASE + 6), Ok(7));
    assert_eq!(mm.stats().data.modified, 0);
}

/// Mappings in one leaf table, in neighbouring ones, and far apart: each leaf table is looked at once.
#[test]
fn mappings_of_all_places_are_found() {
    let mm = manager(64, 64);
    let space = mm.create_space().expect("a space");
    let mut cpu = Cpu::new(&space);
    let starts = [
        0,
        3,
        510,
        512,
        1030,
        1 << 18,
        (1 << 18) + 511,
        1 << 27,
        3 << 27,
    ];
    for start in starts {
        map_anon(&mm, &space, BASE + start, 2, RW);
        cpu.store(&mm, BASE + start + 1, 5).expect("a store");
    }
    let all = starts.len() as u64;
    assert_eq!(keep(&mm, &mut cpu, 3).0, 3);
    check(&mm, &[&cpu]);
    let stats = mm.stats();
    assert_eq!((stats.pages_reset, stats.pages_put_back), (all - 3, 3));
    for start in starts {
        assert_eq!(cpu.load(&mm, BASE + start + 1), Ok(0));
    }
}
