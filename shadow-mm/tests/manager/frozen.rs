//! Spaces over a layer: what they read is mapped and not copied, and what they store to is theirs.

use super::common::{
    BASE, Cpu, Guest, LAYER, Mm, RW, layer, manager, over_layer, range, request, vpn,
};
use shadow_mm::sim::SimFile;
use shadow_mm::{
    Access, ForkMode, FrameStore, MapError, MapKind, PageInfo, Pfn, PfnRange, PinOutcome, Prot,
    SavedPage, SectionError, Sharing,
};

fn pages(mm: &Mm, space: &Guest) -> Vec<PageInfo> {
    let mut pages = Vec::new();
    mm.resident_pages(space, range(BASE, LAYER.into()), |_, page| pages.push(page));
    pages
}

#[test]
fn pages_that_are_read_take_no_frames() {
    let mm = manager(64, 64);
    let (space, _section) = over_layer(&mm);
    let mut cpu = Cpu::new(&space);
    let before = mm.stats();
    for page in 0..LAYER {
        assert_eq!(cpu.load(&mm, BASE + u64::from(page)), Ok(page as u8 + 1));
    }
    let after = mm.stats();
    assert_eq!(after.data, before.data, "data frames");
    assert_eq!(after.pages_copied, 0);
    assert_eq!(after.pages_frozen, u64::from(LAYER));
    assert_eq!(after.faults_mapped, 1, "one fault fills the leaf table");
    assert_eq!(mm.usage(&space).resident, 0);
    assert!(pages(&mm, &space).iter().all(|page| page.frozen));
    mm.check(&[space]).expect("invariants");
}

#[test]
fn stored_page_is_the_spaces_own_and_the_layer_stays() {
    for read_first in [true, false] {
        let mm = manager(64, 64);
        let (space, _section) = over_layer(&mm);
        let [mut cpu, mut other, mut reader] = [(); 3].map(|()| Cpu::new(&space));
        if read_first {
            assert_eq!(other.load(&mm, BASE + 3), Ok(4));
            assert_eq!(reader.load(&mm, BASE + 3), Ok(4));
        }
        let mut stored = cpu.touch(&mm, BASE + 3, Access::Read).expect("a frame");
        if read_first {
            assert!(layer(&mm).contains(stored));
        }
        let outcome = mm.fault(&space, vpn(BASE + 3).va(), Access::Write);
        let shadow_mm::FaultOutcome::Resolved(done) = outcome else {
            panic!("{outcome:?}");
        };
        reader.drop_stale(&done.flush);
        other.flush(&mm, done.flush);
        stored = other.touch(&mm, BASE + 3, Access::Write).expect("a frame");
        mm.store().write(stored, 0, &[99]);
        assert!(!layer(&mm).contains(stored));
        assert_eq!(other.load(&mm, BASE + 3), Ok(99));
        assert_eq!(reader.load(&mm, BASE + 3), Ok(99), "who only reads");
        let mut byte = [0];
        mm.store()
            .read(Pfn::new(layer(&mm).start.get() + 3), 0, &mut byte);
        assert_eq!(byte, [4], "the layer");
        assert_eq!(mm.usage(&space).private, 1);
        mm.check(&[space]).expect("invariants");
    }
}

#[test]
fn forks_read_the_same_layer() {
    for mode in [ForkMode::Eager, ForkMode::Shared] {
        let mm = manager(64, 64);
        mm.set_fork_mode(mode);
        let (parent, _section) = over_layer(&mm);
        let mut cpu = Cpu::new(&parent);
        assert_eq!(cpu.load(&mm, BASE), Ok(1));
        let forked = mm.fork(&parent).expect("a fork");
        cpu.flush(&mm, forked.flush);
        let mut child = Cpu::new(&forked.child);
        child.store(&mm, BASE, 50).expect("a store");
        cpu.store(&mm, BASE + 1, 60).expect("a store");
        assert_eq!(
            (cpu.load(&mm, BASE), child.load(&mm, BASE)),
            (Ok(1), Ok(50))
        );
        let second = (cpu.load(&mm, BASE + 1), child.load(&mm, BASE + 1));
        assert_eq!(second, (Ok(60), Ok(2)));
        assert_eq!(mm.stats().data.active, 2, "one copy each");
        mm.check(&[parent, forked.child]).expect("invariants");
    }
}

#[test]
fn rights_and_places_of_frozen_pages_change_without_copies() {
    let mm = manager(64, 64);
    let (space, _section) = over_layer(&mm);
    let mut cpu = Cpu::new(&space);
    assert_eq!(cpu.load(&mm, BASE), Ok(1));
    let protected = mm.protect(&space, range(BASE, 2), Prot::empty());
    assert!(!protected.flush.is_empty(), "a right that went");
    cpu.flush(&mm, protected.flush);
    assert_eq!(cpu.load(&mm, BASE), Err("Protection".into()));
    let protected = mm.protect(&space, range(BASE, 2), RW);
    cpu.flush(&mm, protected.flush);
    let moved = shadow_mm::RemapRequest {
        old: range(BASE + 4, 2),
        new_count: 2,
        may_move: true,
        fixed: Some(vpn(BASE + 600)),
    };
    let moved = mm.remap(&space, moved).expect("a move");
    cpu.flush(&mm, moved.flush);
    assert_eq!(cpu.load(&mm, BASE + 601), Ok(6));
    let discarded = mm.discard(&space, range(BASE + 8, 1));
    assert!(!discarded.flush.is_empty(), "a page that went");
    cpu.flush(&mm, discarded.flush);
    assert_eq!(cpu.load(&mm, BASE + 8), Ok(0), "zeroes, not the layer");
    assert_eq!(mm.stats().pages_copied, 0);
    mm.check(&[space]).expect("invariants");
}

#[test]
fn pins_for_reading_count_nothing_and_those_for_writing_copy() {
    let mm = manager(64, 64);
    let (space, _section) = over_layer(&mm);
    let free = mm.available();
    let PinOutcome::Pinned(read, flush) = mm.pin(&space, vpn(BASE), Access::Read) else {
        panic!("no pin");
    };
    mm.flushed(flush);
    assert!(layer(&mm).contains(read.pfn()) && mm.available() == free);
    let PinOutcome::Pinned(write, flush) = mm.pin(&space, vpn(BASE), Access::Write) else {
        panic!("no pin");
    };
    mm.flushed(flush);
    assert!(!layer(&mm).contains(write.pfn()));
    mm.unpin(read);
    mm.unpin(write);
    mm.check(&[space]).expect("invariants");
}

#[test]
fn snapshot_keeps_only_what_changed() {
    let mm = manager(64, 64);
    let (space, _section) = over_layer(&mm);
    let mut cpu = Cpu::new(&space);
    assert_eq!(cpu.load(&mm, BASE), Ok(1));
    cpu.store(&mm, BASE + 5, 9).expect("a store");
    let mut kept = Vec::new();
    let next = mm.saved_pages(&space, range(BASE, 600), 1000, |vpn, page| {
        assert!(matches!(page, SavedPage::Frame(_, frame) if !layer(&mm).contains(frame)));
        kept.push(vpn.get());
    });
    assert_eq!((kept, next), (vec![BASE + 5], None));
}

#[test]
fn layers_are_beyond_the_pool_and_lie_under_mappings_only() {
    let mm = manager(64, 64);
    let pool = PfnRange {
        start: Pfn::new(20),
        count: 1,
    };
    let refused = mm.create_frozen_section(SimFile(1), pool);
    assert_eq!(refused.err(), Some(SectionError::NoLayer { layer: pool }));
    let (space, section) = over_layer(&mm);
    let view = MapKind::View {
        section,
        offset: 0,
        sharing: Sharing::Shared,
    };
    let mapped = mm.map(&space, request(BASE + 0x1000, 1, RW, view));
    assert_eq!(mapped.err(), Some(MapError::Frozen));
}

#[test]
fn stores_at_even_distances_copy_ahead() {
    for read_first in [true, false] {
        let mm = manager(64, 64);
        let (space, _section) = over_layer(&mm);
        let mut cpu = Cpu::new(&space);
        if read_first {
            assert_eq!(cpu.load(&mm, BASE), Ok(1));
        }
        for page in [0, 2, 4, 6] {
            cpu.store(&mm, BASE + page, 99).expect("a store");
        }
        let stats = mm.stats();
        assert_eq!((stats.faults_copy_on_write, stats.pages_copied), (3, 4));
        assert_eq!(mm.usage(&space).private, 4);
        for page in 0..u64::from(LAYER) {
            let stored = page < 7 && page % 2 == 0;
            let byte = if stored { 99 } else { page as u8 + 1 };
            assert_eq!(cpu.load(&mm, BASE + page), Ok(byte));
        }
        mm.check(&[space]).expect("invariants");
    }
}

#[test]
fn stores_in_order_copy_ahead() {
    for read_first in [true, false] {
        let mm = manager(64, 64);
        let (space, _section) = over_layer(&mm);
        let mut cpu = Cpu::new(&space);
        if read_first {
            assert_eq!(cpu.load(&mm, BASE), Ok(1));
        }
        for page in 0..7 {
            cpu.store(&mm, BASE + page, 99).expect("a store");
        }
        let stats = mm.stats();
        assert_eq!((stats.faults_copy_on_write, stats.pages_copied), (3, 7));
        assert_eq!(mm.usage(&space).private, 7);
        for page in 0..u64::from(LAYER) {
            let byte = if page < 7 { 99 } else { page as u8 + 1 };
            assert_eq!(cpu.load(&mm, BASE + page), Ok(byte));
        }
        mm.check(&[space]).expect("invariants");
    }
}
