//! Shared memory over the page file: what leaves memory, what comes back, what is charged.

use std::sync::Arc;

use super::common::page_file::{File, evict_all, trim};
use super::common::{BASE, Cpu, Guest, Mm, RW, Sim, manager, range, request, vpn};
use shadow_mm::sim::SimFile;
use shadow_mm::{
    Access, Charge, CommitLimit, Denied, FaultKind, FaultOutcome, IoFailed, MapError, MapKind,
    PAGE_SIZE, PageIn, Section, SectionAt, SectionError, SectionPage, Sharing,
};

const PAGE: u64 = PAGE_SIZE as u64;

fn view(section: &Section<SimFile>) -> MapKind<SimFile> {
    MapKind::View {
        section: section.clone(),
        offset: 0,
        sharing: Sharing::Shared,
    }
}

/// Two spaces with a view of `pages` pages of shared memory at BASE, which one of them has stored to.
fn scene(data: u32, slots: u64, pages: u64) -> (Mm, [Cpu; 2], Section<SimFile>) {
    let mm = manager(data, 60);
    mm.add_page_file(slots).expect("a page file");
    let section = mm.create_section(None, pages * PAGE).expect("a section");
    let mut cpus = [0, 1].map(|_| {
        let space = mm.create_space().expect("a space");
        let mapped = mm.map(&space, request(BASE, pages, RW, view(&section)));
        mm.flushed(mapped.expect("a mapping").flush);
        Cpu::new(&space)
    });
    for page in 0..pages {
        let byte = (page as u8).wrapping_add(1);
        cpus[0].store(&mm, BASE + page, byte).expect("a store");
    }
    (mm, cpus, section)
}

fn spaces(cpus: &[Cpu]) -> Vec<Guest> {
    cpus.iter().map(|cpu| Arc::clone(&cpu.space)).collect()
}

/// All of it is in the page file, and its frames are others'.
fn page_out(mm: &Mm, cpus: &mut [Cpu]) -> File {
    for cpu in &mut *cpus {
        trim(mm, cpu, 1000);
    }
    let mut file = File::default();
    file.write_all(mm);
    evict_all(mm);
    file
}

fn page_in(mm: &Mm, space: &Guest, page: u64) -> PageIn<Sim> {
    match mm.fault(space, vpn(page).va(), Access::Read) {
        FaultOutcome::PageIn(ticket) => ticket,
        other => panic!("{other:?}"),
    }
}

fn resolved(mm: &Mm, cpu: &mut Cpu, outcome: FaultOutcome<Sim>) -> FaultKind {
    match outcome {
        FaultOutcome::Resolved(done) => {
            cpu.flush(mm, done.flush);
            done.kind
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn page_that_all_lost_is_on_a_list_and_comes_back_without_reading() {
    let (mm, mut cpus, section) = scene(64, 64, 8);
    assert_eq!(trim(&mm, &mut cpus[0], 8), 8);
    let stats = mm.stats();
    assert_eq!((stats.data.modified, stats.data.active), (8, 0));
    assert_eq!(cpus[1].load(&mm, BASE + 3), Ok(4));
    // One fault maps all that is there.
    assert_eq!(mm.stats().data.active, 8);
    assert_eq!(trim(&mm, &mut cpus[1], 8), 8);
    assert_eq!(File::default().write_all(&mm), 8);
    let stats = mm.stats();
    assert_eq!((stats.data.standby, stats.page_file_used), (8, 8));
    // A store makes the slot worthless once it is known of.
    cpus[0].store(&mm, BASE, 9).expect("a store");
    trim(&mm, &mut cpus[0], 8);
    let stats = mm.stats();
    assert_eq!((stats.data.standby, stats.data.modified), (7, 1));
    assert_eq!(stats.page_file_used, 7);
    assert_eq!(mm.check(&spaces(&cpus)), Ok(()));
    drop(section);
}

#[test]
fn pages_are_read_back_in_clusters_for_everybody() {
    let (mm, mut cpus, section) = scene(100, 64, 20);
    let file = page_out(&mm, &mut cpus);
    assert_eq!((mm.stats().section_pages, file.0.len()), (0, 20));
    let absent = SectionPage::new(5).expect("a page");
    assert!(matches!(
        mm.section_page(&section, absent),
        SectionAt::PagedOut
    ));
    let ticket = page_in(&mm, &cpus[1].space, BASE + 5);
    assert_eq!(ticket.frames().len(), 16);
    // Who wants a page of the run waits for it.
    let collided = mm.fault(&cpus[0].space, vpn(BASE + 6).va(), Access::Write);
    assert!(matches!(collided, FaultOutcome::Collided));
    assert!(matches!(
        mm.section_page(&section, absent),
        SectionAt::PagedOut
    ));
    assert_eq!(mm.check(&spaces(&cpus)), Ok(()));
    file.read(&mm, &ticket);
    let length = ticket.length();
    let outcome = mm.complete_page_in(ticket, Ok(length));
    let kind = resolved(&mm, &mut cpus[1], outcome);
    assert_eq!(kind, FaultKind::PagedIn);
    for cpu in &mut cpus {
        for page in 0..16 {
            assert_eq!(cpu.load(&mm, BASE + page), Ok(page as u8 + 1));
        }
    }
    assert_eq!(mm.stats().page_ins, 1);
    assert_eq!(mm.check(&spaces(&cpus)), Ok(()));
}

#[test]
fn failed_read_leaves_the_page_in_its_slot() {
    let (mm, mut cpus, _section) = scene(100, 64, 4);
    let file = page_out(&mm, &mut cpus);
    let ticket = page_in(&mm, &cpus[0].space, BASE + 1);
    let outcome = mm.complete_page_in(ticket, Err(IoFailed));
    assert!(matches!(outcome, FaultOutcome::Denied(Denied::IoError)));
    assert_eq!(
        (mm.stats().page_file_used, mm.stats().section_pages),
        (4, 0)
    );
    // Half of it arrives: the rest is where it was.
    let ticket = page_in(&mm, &cpus[0].space, BASE + 1);
    file.read(&mm, &ticket);
    let outcome = mm.complete_page_in(ticket, Ok(2 * PAGE_SIZE));
    resolved(&mm, &mut cpus[0], outcome);
    assert_eq!(mm.stats().section_pages, 2);
    assert_eq!(cpus[1].load(&mm, BASE), Ok(1));
    assert_eq!(mm.check(&spaces(&cpus)), Ok(()));
}

#[test]
fn section_that_ends_gives_back_frames_and_slots_in_every_state() {
    let (mm, mut cpus, section) = scene(100, 64, 40);
    let file = page_out(&mm, &mut cpus);
    let ticket = page_in(&mm, &cpus[0].space, BASE + 33);
    let whole = page_in(&mm, &cpus[0].space, BASE);
    file.read(&mm, &whole);
    let length = whole.length();
    let outcome = mm.complete_page_in(whole, Ok(length));
    resolved(&mm, &mut cpus[0], outcome);
    cpus[0].store(&mm, BASE + 2, 7).expect("a store");
    drop(section);
    for cpu in &mut cpus {
        let flush = mm.unmap(&cpu.space, range(BASE, 40)).expect("unmapped");
        cpu.flush(&mm, flush);
    }
    let stats = mm.stats();
    assert_eq!((stats.sections, stats.page_file_used), (0, 0));
    assert_eq!(stats.commit_charged, 0);
    // The read that comes too late brings nothing.
    let length = ticket.length();
    let outcome = mm.complete_page_in(ticket, Ok(length));
    resolved(&mm, &mut cpus[0], outcome);
    assert_eq!(mm.stats().data.available(), 100);
    assert_eq!(mm.check(&spaces(&cpus)), Ok(()));
}

#[test]
fn shrinking_frees_slots_and_charge() {
    let (mm, mut cpus, section) = scene(100, 64, 8);
    page_out(&mm, &mut cpus);
    let flushes = mm.resize_section(&section, 2 * PAGE + 1);
    flushes
        .expect("less")
        .into_iter()
        .for_each(|f| mm.flushed(f));
    assert_eq!(mm.section_size(&section), 3 * PAGE, "whole pages");
    let stats = mm.stats();
    assert_eq!((stats.page_file_used, stats.commit_charged), (3, 3));
    mm.set_commit_limit(CommitLimit::Pages(10));
    let refused = mm.resize_section(&section, 11 * PAGE).map(|f| f.len());
    assert_eq!(refused, Err(SectionError::NoCommit { pages: 8 }));
    assert!(mm.resize_section(&section, 8 * PAGE).is_ok());
    assert_eq!(cpus[0].load(&mm, BASE + 5), Ok(0), "what grew is zeroes");
    assert_eq!(mm.check(&spaces(&cpus)), Ok(()));
}

#[test]
fn shared_memory_is_charged_once_however_many_map_it() {
    let mm = manager(64, 60);
    mm.set_commit_limit(CommitLimit::Pages(10));
    let section = mm.create_section(None, 8 * PAGE - 1).expect("a section");
    assert_eq!(mm.stats().commit_charged, 8);
    let refused = mm.create_section(None, 3 * PAGE).map(|s| s.id());
    assert_eq!(refused, Err(SectionError::NoCommit { pages: 3 }));
    let free = mm.create_shared_memory(1 << 30, Charge::Uncharged);
    assert!(free.is_ok(), "not promised");
    let space = mm.create_space().expect("a space");
    let mapped = mm.map(&space, request(BASE, 8, RW, view(&section)));
    mm.flushed(mapped.expect("shared views are not charged").flush);
    let forked = mm.fork(&space).expect("nor are they in a child");
    mm.flushed(forked.flush);
    assert_eq!(mm.stats().commit_charged, 8);
    let private = mm.map(&space, request(BASE + 64, 3, RW, MapKind::Anonymous));
    assert_eq!(
        private.map(|m| m.range),
        Err(MapError::NoCommit { pages: 3 })
    );
    drop(section);
    for space in [&space, &forked.child] {
        let flush = mm.delete_space(space);
        mm.flushed(flush);
    }
    assert_eq!(mm.stats().commit_charged, 0);
    assert_eq!(mm.check(&[]), Ok(()));
}

#[test]
fn without_a_page_file_stored_pages_stay() {
    let mm = manager(64, 60);
    let section = mm.create_section(None, 8 * PAGE).expect("a section");
    let space = mm.create_space().expect("a space");
    let mapped = mm.map(&space, request(BASE, 8, RW, view(&section)));
    mm.flushed(mapped.expect("a mapping").flush);
    let mut cpu = Cpu::new(&space);
    cpu.store(&mm, BASE, 1).expect("a store");
    cpu.load(&mm, BASE + 7).expect("a load");
    assert_eq!(trim(&mm, &mut cpu, 9), 1, "the page of zeroes");
    evict_all(&mm);
    assert_eq!(mm.section_resident(&section), 1);
    assert_eq!(
        (cpu.load(&mm, BASE), cpu.load(&mm, BASE + 7)),
        (Ok(1), Ok(0))
    );
    assert_eq!(mm.check(&[space]), Ok(()));
}

/// Many pages go in pieces, each with the lock let go in between; what was charged is back at once, and nobody is told
/// that there is no memory as long as there are pieces left.
#[test]
fn large_section_goes_in_pieces() {
    let many = 1000;
    let (mm, mut cpus, section) = scene(1010, 64, many);
    let [kept, other] = &mut cpus;
    for cpu in [&mut *kept, &mut *other] {
        let flush = mm.unmap(&cpu.space, range(BASE, many)).expect("unmapped");
        cpu.flush(&mm, flush);
    }
    let before = mm.available();
    mm.set_commit_limit(CommitLimit::Pages(many));
    drop(section);
    let again = mm.create_section(None, many * PAGE).expect("the charge");
    let freed = mm.available() - before;
    assert!((1..many).contains(&freed), "{freed} pages at once");
    let mapped = mm.map(&kept.space, request(BASE, many, RW, view(&again)));
    mm.flushed(mapped.expect("a mapping").flush);
    for page in 0..many {
        assert_eq!(kept.load(&mm, BASE + page), Ok(0));
    }
    drop(again);
    for cpu in &mut cpus {
        let flush = mm.delete_space(&cpu.space);
        cpu.flush(&mm, flush);
    }
    let stats = mm.stats();
    assert_eq!((stats.data.available(), stats.sections), (1010, 0));
    assert_eq!(stats.commit_charged, 0);
    assert_eq!(mm.check(&[]), Ok(()));
}
