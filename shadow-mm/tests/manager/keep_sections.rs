//! Sections kept as they were, of what goes on: what it costs, and what the model rarely gets to.

use std::collections::BTreeMap;

use super::common::{BASE, Cpu, Guest, Mm, RW, manager, range, request};
use shadow_mm::sim::SimFile;
use shadow_mm::{
    Access, BeingKept, Charge, FailPlan, ForkMode, FrameStore, KeepSectionError, KeptPage,
    KeptSection, MapKind, PAGE_SIZE, PinOutcome, Prot, Section, SectionError, SectionPage,
    SectionStore, Sharing, VadAdvice,
};

/// Pages of the section: three leaf tables of the views.
const PAGES: u64 = 1330;
/// Those that it has at first. Some more are made ahead.
const HAS: u64 = PAGES - 40;

/// Two processes that share memory, each page of which begins with its number.
struct Scene {
    mm: Mm,
    section: Section<SimFile>,
    cpus: [Cpu; 2],
}

fn shared(section: &Section<SimFile>) -> MapKind<SimFile> {
    MapKind::View {
        section: section.clone(),
        offset: 0,
        sharing: Sharing::Shared,
    }
}

fn number(page: u64) -> u8 {
    page as u8 | 1
}

impl Scene {
    fn new(data: u32) -> Self {
        let mm = manager(data, 100);
        mm.set_fork_mode(ForkMode::Shared);
        let bytes = PAGES * PAGE_SIZE as u64;
        let section = mm.create_shared_memory(bytes, Charge::Charged);
        let section = section.expect("a section");
        let cpus = [(); 2].map(|()| {
            let space = mm.create_space().expect("a space");
            let mapped = mm.map(&space, request(BASE, PAGES, RW, shared(&section)));
            mm.flushed(mapped.expect("a view").flush);
            Cpu::new(&space)
        });
        let mut scene = Self { mm, section, cpus };
        (0..HAS).for_each(|page| scene.store(0, page, number(page)));
        (0..HAS).for_each(|page| assert_eq!(scene.load(1, page), number(page)));
        scene
    }

    fn store(&mut self, who: usize, page: u64, byte: u8) {
        let stored = self.cpus[who].store(&self.mm, BASE + page, byte);
        stored.expect("a store");
    }

    fn load(&mut self, who: usize, page: u64) -> u8 {
        self.cpus[who].load(&self.mm, BASE + page).expect("a load")
    }

    fn keep_spaces(&mut self) -> Vec<Guest> {
        let cpus = self.cpus.iter_mut();
        let kept = cpus.map(|cpu| {
            let kept = self.mm.keep(&cpu.space).expect("it is kept");
            cpu.flush(&self.mm, kept.flush);
            kept.child
        });
        kept.collect()
    }

    /// What the pages began with, of those that were not zeroes.
    fn was(&self, kept: &KeptSection<SimFile>) -> BTreeMap<u64, u8> {
        let (mut found, mut bytes) = (BTreeMap::new(), [0; PAGE_SIZE]);
        let mut from = SectionPage::new(0);
        while let Some((page, what)) = from.and_then(|at| self.mm.next_kept(kept, at, &mut bytes)) {
            match what {
                KeptPage::Bytes if bytes[0] != 0 => drop(found.insert(page.get(), bytes[0])),
                KeptPage::Bytes | KeptPage::Zero => {}
                other @ (KeptPage::Slot(_) | KeptPage::Busy) => panic!("{page:?}: {other:?}"),
            }
            from = SectionPage::new(page.get() + 1);
        }
        found
    }

    fn check(&self, more: &[Guest]) {
        let mut spaces: Vec<_> = self.cpus.iter().map(|cpu| cpu.space.clone()).collect();
        spaces.extend_from_slice(more);
        self.mm.check(&spaces).expect("in order");
    }

    fn delete(&self, spaces: &[Guest]) {
        for space in spaces {
            self.mm.flushed(self.mm.delete_space(space));
        }
    }

    /// What was kept of the section is as it was; it goes, and then the kept spaces and all else do.
    fn end_as_it_was(self, kept: KeptSection<SimFile>, spaces: &[Guest]) {
        self.check(spaces);
        assert!(self.was(&kept) == whole());
        drop(kept);
        self.delete(spaces);
        self.end();
    }

    fn end(self) {
        let Self { mm, section, cpus } = self;
        for cpu in cpus {
            mm.flushed(mm.delete_space(&cpu.space));
        }
        drop(section);
        let stats = mm.stats();
        let left = (stats.data.active, stats.sections, stats.section_pages);
        assert_eq!((left, stats.commit_charged), ((0, 0, 0), 0), "{stats:?}");
    }
}

fn whole() -> BTreeMap<u64, u8> {
    (0..HAS).map(|page| (page, number(page))).collect()
}

#[test]
fn what_is_stored_afterwards_is_not_seen_and_keeping_copies_nothing() {
    let mut scene = Scene::new(3000);
    let spaces = scene.keep_spaces();
    let before = scene.mm.stats();
    let kept = scene.mm.keep_section(&scene.section).expect("it is kept");
    let after = scene.mm.stats();
    assert_eq!(after.data, before.data);
    assert_eq!(after.entries_written, before.entries_written);
    // By both, in all three tables, at single pages, in a row, and without a view; and pages that were not there.
    for (who, page) in [(0, 3), (1, 4), (0, 700), (1, 701), (0, HAS - 1)] {
        scene.store(who, page, 0xee);
    }
    (100..130).for_each(|page| scene.store(1, page, 0xee));
    (PAGES - 4..PAGES).for_each(|page| scene.store(1, page, 0xee));
    let at = SectionPage::new(200).expect("a page");
    let SectionStore::There(pin) = scene.mm.section_page_to_store(&scene.section, at) else {
        panic!("it is in memory");
    };
    scene.mm.store().write(pin.pfn(), 0, &[0xee]);
    scene.mm.unpin_stored(pin);
    // Copies ahead of who stores in a row: not more than twice what he stored to.
    let aside = scene.mm.stats().pages_put_aside;
    assert!((36..72).contains(&aside), "{aside} pages were put aside");
    scene.check(&spaces);
    assert!(scene.was(&kept) == whole());
    for (page, byte) in [(3, 0xee), (4, 0xee), (5, 5), (701, 0xee), (129, 0xee)] {
        assert_eq!((scene.load(0, page), scene.load(1, page)), (byte, byte));
    }
    drop(kept);
    scene.delete(&spaces);
    let aside = scene.mm.stats().pages_put_aside;
    (0..PAGES).for_each(|page| scene.store(0, page, 7));
    assert!((0..PAGES).all(|page| scene.load(1, page) == 7));
    assert_eq!(scene.mm.stats().pages_put_aside, aside);
    scene.check(&[]);
    scene.end();
}

/// Entries that are made while the section is kept allow no more than those that there were.
#[test]
fn page_that_is_mapped_afterwards_is_closed() {
    let mut scene = Scene::new(3000);
    let space = scene.mm.create_space().expect("a space");
    let mapped = scene
        .mm
        .map(&space, request(BASE, PAGES, RW, shared(&scene.section)));
    scene.mm.flushed(mapped.expect("a view").flush);
    let mut late = Cpu::new(&space);
    let spaces = scene.keep_spaces();
    let kept = scene.mm.keep_section(&scene.section).expect("it is kept");
    assert_eq!(late.load(&scene.mm, BASE + 3), Ok(number(3)));
    late.store(&scene.mm, BASE + 3, 0xee).expect("a store");
    // A neighbour that was mapped with it.
    late.store(&scene.mm, BASE + 20, 0xee).expect("a store");
    assert_eq!(scene.mm.stats().pages_put_aside, 2);
    assert_eq!((scene.load(0, 3), scene.load(1, 20)), (0xee, 0xee));
    let all = [&spaces[..], std::slice::from_ref(&space)].concat();
    scene.end_as_it_was(kept, &all);
}

/// Pages that came to be while the section was kept are not put aside, and can go.
#[test]
fn page_that_comes_to_be_afterwards_is_not_kept() {
    let mut scene = Scene::new(3000);
    let spaces = scene.keep_spaces();
    let kept = scene.mm.keep_section(&scene.section).expect("it is kept");
    let (read, written) = (PAGES - 2, PAGES - 4);
    assert_eq!(scene.load(0, read), 0);
    scene.store(1, written, 0xee);
    assert_eq!(scene.mm.stats().pages_put_aside, 0);
    for page in [read, written] {
        let punched = scene.mm.punch_section(&scene.section, page..page + 1);
        for flush in punched.expect("nobody keeps it") {
            scene.cpus.iter_mut().for_each(|cpu| cpu.drop_stale(&flush));
            scene.mm.flushed(flush);
        }
        assert_eq!(scene.load(1, page), 0);
    }
    scene.end_as_it_was(kept, &spaces);
}

/// A host with shadow page tables may remember what a table allowed: the next store finds tables that it has never seen.
#[test]
fn tables_with_pages_to_be_kept_are_not_taken_over() {
    let mut scene = Scene::new(3000);
    for (keeps, tables) in [(true, (3, 0)), (false, (0, 3))] {
        let spaces = scene.keep_spaces();
        let kept = keeps.then(|| scene.mm.keep_section(&scene.section).expect("it is kept"));
        scene.delete(&spaces);
        let before = scene.mm.stats();
        scene.store(0, 5, 9);
        let after = scene.mm.stats();
        let moved = after.tables_moved - before.tables_moved;
        let taken = after.tables_taken_over - before.tables_taken_over;
        assert_eq!((moved, taken), tables, "kept: {keeps}");
        drop(kept);
    }
    scene.end();
}

#[test]
fn section_that_somebody_can_store_to_is_not_kept() {
    let mut scene = Scene::new(3000);
    let refused = |scene: &Scene| scene.mm.keep_section(&scene.section).map(drop);
    let open = |scene: &Scene, who: usize| {
        let space = scene.cpus[who].space.id();
        Err(KeepSectionError::Open { space })
    };
    assert_eq!(refused(&scene), open(&scene, 1));
    let spaces = scene.keep_spaces();
    // One of them goes on.
    scene.store(0, 5, 9);
    assert_eq!(refused(&scene), open(&scene, 0));
    let again = scene.keep_spaces();
    let kept = scene.mm.keep_section(&scene.section).expect("it is kept");
    assert_eq!(refused(&scene), Err(KeepSectionError::Kept));
    drop(kept);
    assert_eq!(refused(&scene), Ok(()));
    let file = scene.mm.create_section(Some(SimFile(1)), 4096);
    let file = file.expect("a section");
    let refused = scene.mm.keep_section(&file).map(drop);
    assert_eq!(refused, Err(KeepSectionError::OfFile));
    drop(file);
    scene.delete(&spaces);
    scene.delete(&again);
    scene.check(&[]);
    scene.end();
}

#[test]
fn what_is_still_to_be_kept_stays_until_it_is_not() {
    let mut scene = Scene::new(3000);
    let spaces = scene.keep_spaces();
    let kept = scene.mm.keep_section(&scene.section).expect("it is kept");
    scene.delete(&spaces);
    let short = 1000 * PAGE_SIZE as u64;
    let resized = scene.mm.resize_section(&scene.section, short);
    let refused = resized.map(|flushes| flushes.len());
    assert_eq!(refused, Err(SectionError::BeingKept(BeingKept)));
    let punched = scene.mm.punch_section(&scene.section, 10..12);
    assert_eq!(punched.map(|flushes| flushes.len()), Err(BeingKept));
    // Of what was put aside, or was not there, nothing is missed.
    (10..12).for_each(|page| scene.store(0, page, 9));
    for pages in [10..12, PAGES - 4..PAGES] {
        let punched = scene.mm.punch_section(&scene.section, pages);
        for flush in punched.expect("a hole") {
            scene.cpus.iter_mut().for_each(|cpu| cpu.drop_stale(&flush));
            scene.mm.flushed(flush);
        }
    }
    assert_eq!((scene.load(0, 10), scene.load(1, 11)), (0, 0));
    assert!(scene.was(&kept) == whole());
    drop(kept);
    for flush in scene
        .mm
        .resize_section(&scene.section, short)
        .expect("it is cut")
    {
        scene.cpus.iter_mut().for_each(|cpu| cpu.drop_stale(&flush));
        scene.mm.flushed(flush);
    }
    assert!(scene.cpus[0].load(&scene.mm, BASE + 1100).is_err());
    scene.check(&[]);
    scene.end();
}

/// A child with a table of its own from the beginning, and a protection that comes and goes.
#[test]
fn forks_and_protections_open_nothing() {
    let mut scene = Scene::new(3000);
    let spaces = scene.keep_spaces();
    let kept = scene.mm.keep_section(&scene.section).expect("it is kept");
    let apart = scene.mm.advise(
        &scene.cpus[0].space,
        range(BASE + 8, 2),
        VadAdvice::DontFork,
    );
    apart.expect("advice");
    let forked = scene.mm.fork(&scene.cpus[0].space).expect("a fork");
    scene.cpus[0].flush(&scene.mm, forked.flush);
    let mut child = Cpu::new(&forked.child);
    child.store(&scene.mm, BASE + 3, 0xee).expect("a store");
    for prot in [Prot::READ, RW] {
        let some = range(BASE + 500, 30);
        let done = scene.mm.protect(&scene.cpus[1].space, some, prot);
        scene.cpus[1].flush(&scene.mm, done.flush);
    }
    (505..525).for_each(|page| scene.store(1, page, 0xee));
    let all = [&spaces[..], std::slice::from_ref(&forked.child)].concat();
    scene.end_as_it_was(kept, &all);
}

#[test]
fn page_that_is_pinned_to_be_stored_to_is_put_aside_at_once() {
    let mut scene = Scene::new(3000);
    let at = super::common::vpn(BASE + 20);
    let PinOutcome::Pinned(pin, flush) = scene.mm.pin(&scene.cpus[0].space, at, Access::Write)
    else {
        panic!("it is mapped");
    };
    scene.cpus[0].flush(&scene.mm, flush);
    let spaces = scene.keep_spaces();
    let kept = scene.mm.keep_section(&scene.section).expect("it is kept");
    assert_eq!(scene.mm.stats().pages_put_aside, 1);
    scene.mm.store().write(pin.pfn(), 0, &[0xee]);
    scene.mm.unpin(pin);
    assert!(scene.was(&kept) == whole());
    assert_eq!(scene.load(1, 20), 0xee);
    drop(kept);
    scene.delete(&spaces);
    scene.end();
}

#[test]
fn store_without_a_frame_waits_for_the_end() {
    // Room for the section, and for two pages put aside.
    let mut scene = Scene::new(HAS as u32 + 2);
    let spaces = scene.keep_spaces();
    let kept = scene.mm.keep_section(&scene.section).expect("it is kept");
    scene.delete(&spaces);
    scene.store(0, 3, 9);
    scene.store(1, 30, 9);
    let refused = scene.cpus[0].store(&scene.mm, BASE + 300, 9);
    assert_eq!(refused, Err("NoMemory".to_owned()));
    assert_eq!(scene.load(0, 300), number(300));
    assert!(scene.was(&kept) == whole());
    drop(kept);
    scene.store(0, 300, 9);
    assert_eq!(scene.load(1, 300), 9);
    scene.check(&[]);
    scene.end();
}

/// Every allocation of keeping a section fails: what there was is there, and nothing more.
#[test]
fn failed_keeping_leaves_no_trace() {
    let mut scene = Scene::new(3000);
    let at = super::common::vpn(BASE + 20);
    let PinOutcome::Pinned(pin, flush) = scene.mm.pin(&scene.cpus[0].space, at, Access::Write)
    else {
        panic!("it is mapped");
    };
    scene.cpus[0].flush(&scene.mm, flush);
    let spaces = scene.keep_spaces();
    let state = |scene: &Scene| {
        let stats = scene.mm.stats();
        (stats.sections, stats.section_pages, stats.data.active)
    };
    let before = state(&scene);
    let mut failures = 0;
    loop {
        scene.mm.fail_allocations(FailPlan::From(failures));
        let kept = scene.mm.keep_section(&scene.section);
        scene.mm.fail_allocations(FailPlan::Never);
        match kept {
            Err(KeepSectionError::NoSection(_) | KeepSectionError::NoFrame(_)) => failures += 1,
            Err(other) => panic!("{other}"),
            Ok(kept) => {
                assert!(scene.was(&kept) == whole());
                break;
            }
        }
        // What was begun goes with the next who looks.
        let absent = SectionPage::new(PAGES - 1).expect("a page");
        drop(scene.mm.section_page(&scene.section, absent));
        assert_eq!(state(&scene), before, "{failures}");
        scene.check(&spaces);
    }
    // The section for the copies, and a copy of the pinned page.
    assert!(failures >= 2, "only {failures} allocations could fail");
    scene.mm.unpin(pin);
    scene.delete(&spaces);
    scene.end();
}
