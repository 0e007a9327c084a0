//! Spaces kept as they were, of what goes on: what the model rarely gets to, and what is promised.

use super::common::{BASE, Cpu, Guest, Mm, RW, manager, map_anon, range, request, vpn};
use shadow_mm::sim::SimFile;
use shadow_mm::{
    CommitLimit, ForkError, ForkMode, FrameStore, MapKind, SavedPage, Sharing, VadAdvice,
};

fn sharing(data: u32, tables: u32) -> Mm {
    let mm = manager(data, tables);
    mm.set_fork_mode(ForkMode::Shared);
    mm
}

/// The first byte of each page that a space has for itself.
fn kept(mm: &Mm, space: &Guest, start: u64, count: u64) -> Vec<(u64, u8)> {
    let mut found = Vec::new();
    let visit = |page: shadow_mm::Vpn, content| {
        let mut byte = [0];
        match content {
            SavedPage::Frame(_, frame) => mm.store().read(frame, 0, &mut byte),
            SavedPage::Zero => {}
            other => panic!("{page}: {other:?}"),
        }
        found.push((page.get() - start, byte[0]));
    };
    let next = mm.saved_pages(space, range(start, count), usize::MAX, visit);
    assert_eq!(next, None);
    found
}

#[test]
fn what_the_space_does_afterwards_is_not_seen() {
    let mm = sharing(200, 40);
    let space = mm.create_space().expect("a space");
    let mut cpu = Cpu::new(&space);
    map_anon(&mm, &space, BASE, 8, RW);
    map_anon(&mm, &space, BASE + 512, 2, RW);
    for (page, advice) in [(2, VadAdvice::DontFork), (3, VadAdvice::WipeOnFork)] {
        let advised = mm.advise(&space, range(BASE + page, 1), advice);
        advised.expect("advice");
    }
    for page in [0, 1, 2, 3, 4, 512] {
        let stored = cpu.store(&mm, BASE + page, 10 + page as u8);
        stored.expect("a store");
    }
    let made = mm.keep(&space).expect("it is kept");
    cpu.flush(&mm, made.flush);
    let before = mm.stats();
    for page in 0..8 {
        cpu.store(&mm, BASE + page, 99).expect("a store");
    }
    let gone = mm.unmap(&space, range(BASE + 512, 2)).expect("unmapped");
    cpu.flush(&mm, gone);
    let whole = [(0, 10), (1, 11), (2, 12), (3, 13), (4, 14), (512, 10)];
    assert_eq!(kept(&mm, &made.child, BASE, 514), whole);
    // Stores of the space took frames, and charged nothing.
    assert!(mm.stats().data.active > before.data.active);
    assert_eq!(mm.usage(&made.child).charged, 0);
    mm.check(&[space.clone(), made.child.clone()])
        .expect("in order");
    mm.flushed(mm.delete_space(&made.child));
    assert_eq!(cpu.load(&mm, BASE + 4), Ok(99));
    mm.flushed(mm.delete_space(&space));
    assert_eq!((mm.stats().data.active, mm.stats().commit_charged), (0, 0));
}

#[test]
fn truncation_leaves_it_its_private_copies() {
    let mm = sharing(200, 40);
    let section = mm.create_section(Some(SimFile(1)), 8 * 4096);
    let section = section.expect("a section");
    let space = mm.create_space().expect("a space");
    let mut cpu = Cpu::new(&space);
    let view = MapKind::View {
        section: section.clone(),
        offset: 0,
        sharing: Sharing::Private,
    };
    let mapped = mm.map(&space, request(BASE, 8, RW, view));
    cpu.flush(&mm, mapped.expect("a view").flush);
    cpu.load(&mm, BASE + 5).expect("a load");
    cpu.store(&mm, BASE + 6, 6).expect("a store");
    let made = mm.keep(&space).expect("it is kept");
    cpu.flush(&mm, made.flush);
    let was = kept(&mm, &made.child, BASE, 8);
    assert!(was.contains(&(6, 6)));
    for flush in mm.resize_section(&section, 4096).expect("it is cut") {
        cpu.flush(&mm, flush);
    }
    assert!(cpu.load(&mm, BASE + 6).is_err(), "it lies beyond the end");
    assert_eq!(kept(&mm, &made.child, BASE, 8), was);
    let both = [space.clone(), made.child.clone()];
    mm.check(&both).expect("in order");
    both.iter()
        .for_each(|space| mm.flushed(mm.delete_space(space)));
    drop((both, space, made.child, section));
    assert_eq!(mm.stats().data.active, 0);
}

#[test]
fn shared_views_are_not_in_it() {
    let mm = sharing(200, 40);
    let section = mm.create_section(None, 4 * 4096).expect("a section");
    let space = mm.create_space().expect("a space");
    let mut cpu = Cpu::new(&space);
    let view = MapKind::View {
        section,
        offset: 0,
        sharing: Sharing::Shared,
    };
    map_anon(&mm, &space, BASE, 4, RW);
    let mapped = mm.map(&space, request(BASE + 4, 4, RW, view));
    cpu.flush(&mm, mapped.expect("a view").flush);
    (0..8).for_each(|page| cpu.store(&mm, BASE + page, 7).expect("a store"));
    let made = mm.keep(&space).expect("it is kept");
    cpu.flush(&mm, made.flush);
    assert!(mm.find_vad(&made.child, vpn(BASE + 4)).is_none());
    let mut resident = 0;
    mm.resident_pages(&made.child, range(BASE, 8), |_, _| resident += 1);
    assert_eq!(resident, 4);
    mm.check(&[space.clone(), made.child.clone()])
        .expect("in order");
}

#[test]
fn what_cannot_be_promised_is_not_kept_and_nothing_changes() {
    let mm = sharing(2000, 8);
    let space = mm.create_space().expect("a space");
    let mut cpu = Cpu::new(&space);
    map_anon(&mm, &space, BASE, 600, RW);
    (0..600).for_each(|page| cpu.store(&mm, BASE + page, 1).expect("a store"));
    let state = || {
        let stats = mm.stats();
        (stats.commit_charged, stats.data, stats.tables)
    };
    let before = state();
    // Two roots, and a table for each there is: there are not as many.
    let refused = mm.keep(&space).map(|_| ()).expect_err("no room");
    assert!(matches!(refused, ForkError::NoMemory { .. }), "{refused}");
    mm.set_commit_limit(CommitLimit::Pages(600));
    let refused = mm.keep(&space).map(|_| ()).expect_err("no promise");
    assert!(
        matches!(refused, ForkError::NoCloneBlocks { .. }),
        "{refused}"
    );
    assert_eq!(state(), before);
    mm.set_fork_mode(ForkMode::Eager);
    let refused = mm.keep(&space).map(|_| ()).expect_err("no tables");
    assert_eq!(refused, ForkError::NotShared);
    mm.check(&[space]).expect("in order");
}
