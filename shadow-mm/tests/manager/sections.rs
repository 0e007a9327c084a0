//! Sections: one copy of a file's pages, shared memory, reads that others wait for, truncation, writing
//! back.

use super::common::{BASE, Cpu, Guest, Mm, RW, Sim, manager, map_anon, range, request, vpn};
use shadow_mm::sim::SimFile;
use shadow_mm::{
    Access, Denied, FaultKind, FaultOutcome, Flush, FrameStore, IoFailed, IoTicket, MapKind,
    PAGE_SIZE, Pending, PinOutcome, Progress, Prot, Section, SectionAt, SectionPage, Sharing,
    WriteFailed,
};

const PAGE: u64 = PAGE_SIZE as u64;

fn file(mm: &Mm, bytes: u64) -> Section<SimFile> {
    mm.create_section(Some(SimFile(3)), bytes)
        .expect("a section")
}

fn view(section: &Section<SimFile>, first: u64, sharing: Sharing) -> MapKind<SimFile> {
    MapKind::View {
        section: section.clone(),
        offset: first * PAGE,
        sharing,
    }
}

fn map(mm: &Mm, space: &Guest, start: u64, count: u64, kind: MapKind<SimFile>) {
    map_as(mm, space, (start, count), RW, kind);
}

fn map_as(mm: &Mm, space: &Guest, (start, count): (u64, u64), prot: Prot, kind: MapKind<SimFile>) {
    let mapped = mm.map(space, request(start, count, prot, kind));
    mm.flushed(mapped.expect("a mapping").flush);
}

fn started(mm: &Mm, space: &Guest, page: u64, access: Access) -> IoTicket<Sim> {
    match mm.fault(space, vpn(page).va(), access) {
        FaultOutcome::Read(ticket) => ticket,
        other => panic!("{other:?}"),
    }
}

fn collided(mm: &Mm, space: &Guest, page: u64) -> Pending {
    match mm.fault(space, vpn(page).va(), Access::Read) {
        FaultOutcome::Wait(pending) => pending,
        other => panic!("{other:?}"),
    }
}

fn resolved(mm: &Mm, outcome: FaultOutcome<Sim>) -> (FaultKind, u32) {
    match outcome {
        FaultOutcome::Resolved(done) => {
            mm.flushed(done.flush);
            (done.kind, done.mapped)
        }
        other => panic!("{other:?}"),
    }
}

fn frame_of(mm: &Mm, section: &Section<SimFile>, page: u64) -> Option<shadow_mm::Pfn> {
    match mm.section_page(section, SectionPage::new(page).expect("a page")) {
        SectionAt::PagedOut => panic!("there is no page file"),
        SectionAt::Resident(pin) => {
            let frame = pin.pfn();
            mm.unpin(pin);
            Some(frame)
        }
        SectionAt::Absent | SectionAt::Reading(_) => None,
    }
}

#[test]
fn fault_reads_its_aligned_window_of_the_file_at_once() {
    let mm = manager(64, 16);
    let space = mm.create_space().expect("a space");
    // From page 1 of the file on, 30 pages of which 20.5 are in the file.
    let section = file(&mm, 21 * PAGE + 2048);
    map(&mm, &space, BASE, 30, view(&section, 1, Sharing::Private));
    let first = started(&mm, &space, BASE + 3, Access::Read);
    assert_eq!((first.offset(), first.length()), (0, 16 * PAGE_SIZE));
    let second = started(&mm, &space, BASE + 20, Access::Read);
    let expected = (16 * PAGE, 5 * PAGE_SIZE + 2048, 6);
    let told = (second.offset(), second.length(), second.frames().len());
    assert_eq!(told, expected);
    let last = second.frames()[5];
    mm.store().write(last, 0, &[1; 4096]);
    let outcome = mm.complete_read(second, Ok(5 * PAGE_SIZE + 2048));
    assert_eq!(resolved(&mm, outcome).0, FaultKind::FileRead);
    let mut edge = [9, 9];
    mm.store().read(last, 2047, &mut edge);
    assert_eq!(edge, [1, 0], "the tail of the last page is zero");
    let beyond = mm.fault(&space, vpn(BASE + 21).va(), Access::Read);
    assert!(matches!(beyond, FaultOutcome::Denied(Denied::BeyondEnd)));
    let failed = mm.complete_read(first, Err(IoFailed));
    assert!(matches!(failed, FaultOutcome::Denied(Denied::IoError)));
    assert_eq!(mm.check(&[space]), Ok(()));
}

#[test]
fn text_is_in_the_pool_once_and_maps_around() {
    let mm = manager(256, 64);
    let section = file(&mm, 128 * PAGE);
    let spaces: Vec<_> = (0..4)
        .map(|_| mm.create_space().expect("a space"))
        .collect();
    for space in &spaces {
        let text = view(&section, 0, Sharing::Private);
        map_as(&mm, space, (BASE, 128), Prot::READ | Prot::EXEC, text);
    }
    let mut cpu = Cpu::new(&spaces[0]);
    for cluster in 0..8 {
        let page = BASE + 16 * cluster;
        cpu.touch(&mm, page, Access::Execute).expect("a fetch");
    }
    let frames = mm.stats().data.available();
    for space in &spaces[1..] {
        for page in [BASE + 5, BASE + 127] {
            let outcome = mm.fault(space, vpn(page).va(), Access::Execute);
            assert_eq!(resolved(&mm, outcome), (FaultKind::Mapped, 64));
        }
        assert_eq!(mm.usage(space).resident, 128);
    }
    assert_eq!(mm.stats().data.available(), frames, "no further copy");
    assert_eq!(mm.stats().reads_issued, 4);
    assert_eq!(mm.check(&spaces), Ok(()));
}

#[test]
fn walk_through_a_file_takes_longer_and_longer_reads() {
    let mm = manager(600, 64);
    let section = file(&mm, 512 * PAGE);
    // Where it is mapped and what of it are not aligned alike; a leaf table ends in the middle.
    for (start, reads, faults) in [(BASE + 3, 10, 10), (BASE + 2048 + 70, 10, 11)] {
        let space = mm.create_space().expect("a space");
        map(&mm, &space, start, 500, view(&section, 0, Sharing::Private));
        let (before, mut faulted) = (mm.stats().reads_issued, 0);
        let mut cpu = Cpu::new(&space);
        for page in start..start + 500 {
            let at = vpn(page).va();
            faulted += usize::from(cpu.mmu.translate(mm.store(), at, Access::Read).is_err());
            cpu.load(&mm, page).expect("a load");
        }
        assert_eq!((mm.stats().reads_issued - before, faulted), (reads, faults));
        let flush = mm.delete_space(&space);
        cpu.flush(&mm, flush);
        mm.section_forget(&section);
    }
}

#[test]
fn second_fault_on_a_page_being_read_waits() {
    let mm = manager(64, 64);
    let section = file(&mm, 16 * PAGE);
    let spaces: Vec<_> = (0..2)
        .map(|_| mm.create_space().expect("a space"))
        .collect();
    for space in &spaces {
        map(&mm, space, BASE, 16, view(&section, 0, Sharing::Private));
    }
    let ticket = started(&mm, &spaces[0], BASE, Access::Read);
    let pending = collided(&mm, &spaces[1], BASE + 7);
    assert_eq!(pending.progress(), Progress::UnderWay);
    let length = ticket.length();
    resolved(&mm, mm.complete_read(ticket, Ok(length)));
    assert_eq!(pending.progress(), Progress::Ended);
    let outcome = mm.fault(&spaces[1], vpn(BASE + 7).va(), Access::Read);
    assert_eq!(resolved(&mm, outcome), (FaultKind::Mapped, 16));
    assert_eq!(
        (mm.stats().reads_issued, mm.stats().faults_collided),
        (1, 1)
    );
}

#[test]
fn failed_read_is_seen_by_all_who_wait() {
    let mm = manager(64, 64);
    let section = file(&mm, 16 * PAGE);
    let space = mm.create_space().expect("a space");
    map(&mm, &space, BASE, 16, view(&section, 0, Sharing::Shared));
    let ticket = started(&mm, &space, BASE, Access::Read);
    let waiting = [collided(&mm, &space, BASE), collided(&mm, &space, BASE + 3)];
    let outcome = mm.complete_read(ticket, Err(IoFailed));
    assert!(matches!(outcome, FaultOutcome::Denied(Denied::IoError)));
    assert!(waiting.iter().all(|p| p.progress() == Progress::Failed));
    assert_eq!(mm.stats().data.available(), 64);
    drop(started(&mm, &space, BASE, Access::Read));
}

/// What an embedder does before a write-back.
fn collect(mm: &Mm, cpus: &mut [&mut Cpu], section: &Section<SimFile>) {
    for flush in mm.collect_dirty(section) {
        cpus.iter_mut().for_each(|cpu| cpu.mmu.flush(&flush));
        mm.flushed(flush);
    }
}

fn resize(mm: &Mm, section: &Section<SimFile>, bytes: u64) -> Vec<Flush> {
    mm.resize_section(section, bytes)
        .expect("files are not charged")
}

#[test]
fn dropped_ticket_leaks_nothing() {
    let mm = manager(64, 64);
    let section = file(&mm, 16 * PAGE);
    let space = mm.create_space().expect("a space");
    map(&mm, &space, BASE, 16, view(&section, 0, Sharing::Shared));
    let ticket = started(&mm, &space, BASE, Access::Write);
    let pending = collided(&mm, &space, BASE);
    drop(ticket);
    assert_eq!(pending.progress(), Progress::Ended);
    assert_eq!(mm.stats().data.available(), 64);
    // The pages can be read by whoever comes next.
    let mut cpu = Cpu::new(&space);
    cpu.store(&mm, BASE, 5).expect("a store");
    collect(&mm, &mut [&mut cpu], &section);
    drop(mm.write_back(&section, 0..u64::MAX).expect("a dirty page"));
    assert!(
        mm.write_back(&section, 0..u64::MAX).is_some(),
        "not written"
    );
    assert_eq!(mm.check(&[space]), Ok(()));
}

#[test]
fn resident_pages_in_the_middle_are_covered_by_one_dummy() {
    let mm = manager(64, 64);
    let section = file(&mm, 16 * PAGE);
    let space = mm.create_space().expect("a space");
    map(&mm, &space, BASE, 16, view(&section, 0, Sharing::Private));
    // Pages 4 and 9 come in alone, because frames are short; then all is given back.
    let hog = mm.create_space().expect("a space");
    map_anon(&mm, &hog, BASE, 200, RW);
    let mut cpu = Cpu::new(&hog);
    let mut hogged = 0;
    while mm.stats().data.available() > 2 {
        cpu.store(&mm, BASE + 2 * hogged, 1).expect("a store");
        hogged += 1;
    }
    for page in [4, 9] {
        let ticket = started(&mm, &space, BASE + page, Access::Read);
        assert_eq!((ticket.offset(), ticket.frames().len()), (page * PAGE, 1));
        mm.store().write(ticket.frames()[0], 0, &[page as u8]);
        resolved(&mm, mm.complete_read(ticket, Ok(PAGE_SIZE)));
    }
    let flush = mm.delete_space(&hog);
    mm.flushed(flush);
    let ticket = started(&mm, &space, BASE + 7, Access::Read);
    let frames = ticket.frames().to_vec();
    assert_eq!((ticket.offset(), frames.len()), (0, 16));
    assert_eq!(frames[4], frames[9], "the dummy");
    for (page, frame) in frames.iter().enumerate() {
        mm.store().write(*frame, 0, &[100 + page as u8]);
    }
    resolved(&mm, mm.complete_read(ticket, Ok(16 * PAGE_SIZE)));
    let mut cpu = Cpu::new(&space);
    let bytes: Vec<_> = (0..16)
        .map(|page| cpu.load(&mm, BASE + page).expect("a load"))
        .collect();
    let mut expected: Vec<u8> = (100..116).collect();
    (expected[4], expected[9]) = (4, 9);
    assert_eq!(bytes, expected);
    assert_eq!(mm.stats().data.available(), 48);
    assert_eq!(mm.check(&[space]), Ok(()));
}

#[test]
fn ends_that_are_resident_are_not_read_again() {
    let mm = manager(640, 64);
    let section = file(&mm, 16 * PAGE);
    let space = mm.create_space().expect("a space");
    map(&mm, &space, BASE, 16, view(&section, 0, Sharing::Private));
    let ticket = started(&mm, &space, BASE, Access::Read);
    // Only the last three pages come.
    resolved(&mm, mm.complete_read(ticket, Ok(3 * PAGE_SIZE)));
    let ticket = started(&mm, &space, BASE + 8, Access::Read);
    assert_eq!((ticket.offset(), ticket.frames().len()), (3 * PAGE, 13));
}

#[test]
fn read_that_comes_too_late_still_fills_the_section() {
    let mm = manager(64, 16);
    let space = mm.create_space().expect("a space");
    let section = file(&mm, 4 * PAGE);
    map(&mm, &space, BASE, 4, view(&section, 0, Sharing::Private));
    let ticket = started(&mm, &space, BASE, Access::Read);
    map_anon(&mm, &space, BASE, 4, RW);
    resolved(&mm, mm.complete_read(ticket, Ok(4 * PAGE_SIZE)));
    assert_eq!(mm.section_resident(&section), 4);
    assert_eq!(mm.check(&[space]), Ok(()));
}

#[test]
fn shared_view_shows_stores_and_private_view_hides_them() {
    let mm = manager(64, 64);
    let section = file(&mm, 4 * PAGE);
    let (one, two) = (mm.create_space(), mm.create_space());
    let (one, two) = (one.expect("a space"), two.expect("a space"));
    map(&mm, &one, BASE, 4, view(&section, 0, Sharing::Shared));
    map(&mm, &two, BASE, 4, view(&section, 0, Sharing::Shared));
    map(&mm, &two, BASE + 8, 4, view(&section, 0, Sharing::Private));
    let (mut a, mut b) = (Cpu::new(&one), Cpu::new(&two));
    a.store(&mm, BASE + 1, 7).expect("a store");
    assert_eq!(b.load(&mm, BASE + 1), Ok(7));
    assert_eq!(b.load(&mm, BASE + 9), Ok(7), "not copied yet");
    b.store(&mm, BASE + 9, 8).expect("a store");
    assert_eq!(
        (a.load(&mm, BASE + 1), b.load(&mm, BASE + 9)),
        (Ok(7), Ok(8))
    );
    let forked = mm.fork(&two).expect("a fork");
    b.flush(&mm, forked.flush);
    let mut c = Cpu::new(&forked.child);
    c.store(&mm, BASE + 1, 9).expect("a store");
    c.store(&mm, BASE + 9, 10).expect("a store");
    assert_eq!(
        (b.load(&mm, BASE + 1), b.load(&mm, BASE + 9)),
        (Ok(9), Ok(8))
    );
    assert_eq!(mm.stats().clone_blocks, 4, "for the private copies only");
    assert_eq!(mm.check(&[one, two, forked.child]), Ok(()));
}

#[test]
fn store_to_a_private_view_copies_without_mapping_first() {
    let mm = manager(64, 64);
    let section = file(&mm, 4 * PAGE);
    let space = mm.create_space().expect("a space");
    map(&mm, &space, BASE, 4, view(&section, 0, Sharing::Private));
    Cpu::new(&space).load(&mm, BASE).expect("a load");
    let flush = mm.unmap(&space, range(BASE, 4)).expect("unmapped");
    mm.flushed(flush);
    map(&mm, &space, BASE, 4, view(&section, 0, Sharing::Private));
    let FaultOutcome::Resolved(done) = mm.fault(&space, vpn(BASE).va(), Access::Write) else {
        panic!("the page is resident");
    };
    assert_eq!(done.kind, FaultKind::CopyOnWrite);
    assert!(done.flush.is_empty() && done.flush.frames_held() == 0);
    mm.flushed(done.flush);
    assert_eq!(mm.usage(&space).private, 4, "neighbours too");
}

#[test]
fn truncation_takes_pages_from_every_view() {
    let mm = manager(64, 64);
    let section = file(&mm, 8 * PAGE);
    let (one, two) = (mm.create_space(), mm.create_space());
    let (one, two) = (one.expect("a space"), two.expect("a space"));
    map(&mm, &one, BASE, 8, view(&section, 0, Sharing::Shared));
    map(&mm, &two, BASE, 6, view(&section, 2, Sharing::Private));
    let (mut a, mut b) = (Cpu::new(&one), Cpu::new(&two));
    (0..8).for_each(|page| a.store(&mm, BASE + page, 1).expect("a store"));
    (0..6).for_each(|page| b.store(&mm, BASE + page, 2).expect("a store"));
    let forked = mm.fork(&two).expect("a fork");
    b.flush(&mm, forked.flush);
    let kept = frame_of(&mm, &section, 4).expect("resident");
    mm.store().write(kept, 0, &[6; 4096]);
    let flushes = resize(&mm, &section, 4 * PAGE + 100);
    assert_eq!(flushes.len(), 3, "each space that has a view");
    for flush in flushes {
        a.mmu.flush(&flush);
        b.mmu.flush(&flush);
        mm.flushed(flush);
    }
    for (space, page) in [(&one, 5), (&two, 3), (&forked.child, 3)] {
        let outcome = mm.fault(space, vpn(BASE + page).va(), Access::Read);
        assert!(matches!(outcome, FaultOutcome::Denied(Denied::BeyondEnd)));
    }
    let mut edge = [0; 2];
    mm.store().read(kept, 99, &mut edge);
    assert_eq!(edge, [6, 0], "zero beyond the end");
    assert_eq!(b.load(&mm, BASE + 2), Ok(2), "a copy of what is left stays");
    // What grows again is empty: the file says so, not what was there.
    assert!(resize(&mm, &section, 8 * PAGE).is_empty());
    assert_eq!(a.load(&mm, BASE + 6), Ok(0));
    assert_eq!(mm.check(&[one, two, forked.child]), Ok(()));
}

#[test]
fn truncation_outruns_a_read() {
    let mm = manager(64, 64);
    let section = file(&mm, 8 * PAGE);
    let space = mm.create_space().expect("a space");
    map(&mm, &space, BASE, 8, view(&section, 0, Sharing::Shared));
    let ticket = started(&mm, &space, BASE, Access::Read);
    for frame in ticket.frames() {
        mm.store().write(*frame, 0, &[9; 4096]);
    }
    resize(&mm, &section, 2 * PAGE + 10)
        .into_iter()
        .for_each(|flush| mm.flushed(flush));
    resize(&mm, &section, 8 * PAGE);
    resolved(&mm, mm.complete_read(ticket, Ok(8 * PAGE_SIZE)));
    assert_eq!(
        mm.section_resident(&section),
        2,
        "the rest was read too early"
    );
    assert_eq!(mm.stats().data.in_flight, 0);
    assert_eq!(mm.check(&[space]), Ok(()));
}

#[test]
fn dirty_pages_are_written_once() {
    let mm = manager(64, 64);
    let section = file(&mm, 8 * PAGE - 5);
    let space = mm.create_space().expect("a space");
    map(&mm, &space, BASE, 8, view(&section, 0, Sharing::Shared));
    let mut cpu = Cpu::new(&space);
    cpu.load(&mm, BASE).expect("a load");
    assert!(mm.write_back(&section, 0..u64::MAX).is_none());
    for page in [2, 3, 7] {
        cpu.store(&mm, BASE + page, 1).expect("a store");
    }
    collect(&mm, &mut [&mut cpu], &section);
    let first = mm.write_back(&section, 0..u64::MAX).expect("two pages");
    assert_eq!((first.offset(), first.length()), (2 * PAGE, 2 * PAGE_SIZE));
    let second = mm.write_back(&section, 0..u64::MAX).expect("one page");
    assert_eq!(
        (second.offset(), second.length()),
        (7 * PAGE, PAGE_SIZE - 5)
    );
    mm.complete_write_back(second, Err(WriteFailed));
    mm.complete_write_back(first, Ok(()));
    let again = mm
        .write_back(&section, 0..u64::MAX)
        .expect("the failed one");
    assert_eq!(again.offset(), 7 * PAGE);
    mm.complete_write_back(again, Ok(()));
    assert!(!mm.section_modified(&section));
    collect(&mm, &mut [&mut cpu], &section);
    assert!(!mm.section_modified(&section), "nobody stored since");
    // A store through a mapping that is still there counts again, also one through a cached translation, and is
    // known when the mapping goes.
    cpu.store(&mm, BASE + 3, 5).expect("a store");
    collect(&mm, &mut [&mut cpu], &section);
    let third = mm.write_back(&section, 0..u64::MAX).expect("one page");
    assert_eq!((third.offset(), third.length()), (3 * PAGE, PAGE_SIZE));
    mm.complete_write_back(third, Ok(()));
    cpu.store(&mm, BASE + 2, 5).expect("a store");
    let flush = mm.unmap(&space, range(BASE, 8)).expect("unmapped");
    cpu.flush(&mm, flush);
    assert_eq!(mm.stats().data.modified_no_write, 1);
    let last = mm.write_back(&section, 0..u64::MAX).expect("modified");
    mm.complete_write_back(last, Ok(()));
    assert!(mm.write_back(&section, 0..u64::MAX).is_none());
    assert_eq!(mm.section_forget(&section), 8);
    assert_eq!(mm.stats().data.available(), 64);
}

#[test]
fn pages_nobody_maps_make_room_unless_they_are_modified() {
    let mm = manager(32, 64);
    let section = file(&mm, 16 * PAGE);
    let space = mm.create_space().expect("a space");
    map(&mm, &space, BASE, 16, view(&section, 0, Sharing::Shared));
    let mut cpu = Cpu::new(&space);
    (0..16).for_each(|page| drop(cpu.load(&mm, BASE + page)));
    cpu.store(&mm, BASE + 4, 4).expect("a store");
    let flush = mm.unmap(&space, range(BASE, 16)).expect("unmapped");
    cpu.flush(&mm, flush);
    map_anon(&mm, &space, BASE, 31, RW);
    for page in 0..31 {
        cpu.store(&mm, BASE + page, page as u8).expect("a store");
    }
    assert_eq!(mm.section_resident(&section), 1);
    assert_eq!(mm.stats().section_pages_evicted, 15);
    let full = cpu.store(&mm, BASE + 31, 1);
    assert!(full.is_err());
    assert_eq!(mm.check(&[space]), Ok(()));
}

#[test]
fn last_handle_takes_the_frames_with_it() {
    let mm = manager(64, 64);
    let section = mm.create_section(None, 64 * PAGE).expect("a section");
    let space = mm.create_space().expect("a space");
    map(&mm, &space, BASE, 64, view(&section, 0, Sharing::Shared));
    let mut cpu = Cpu::new(&space);
    (0..20).for_each(|page| cpu.store(&mm, BASE + page, 1).expect("a store"));
    drop(section);
    assert_eq!((mm.stats().sections, cpu.load(&mm, BASE)), (1, Ok(1)));
    let flush = mm.unmap(&space, range(BASE, 64)).expect("unmapped");
    cpu.flush(&mm, flush);
    let stats = mm.stats();
    assert_eq!((stats.sections, stats.section_pages), (0, 0));
    assert_eq!(stats.data.available(), 64);
    assert_eq!(mm.check(&[space]), Ok(()));
}

#[test]
fn embedder_stores_where_views_show_it() {
    let mm = manager(64, 64);
    let section = file(&mm, 4 * PAGE);
    let space = mm.create_space().expect("a space");
    map(&mm, &space, BASE, 4, view(&section, 0, Sharing::Shared));
    let page = SectionPage::new(1).expect("a page");
    assert!(matches!(mm.section_page(&section, page), SectionAt::Absent));
    let ticket = started(&mm, &space, BASE, Access::Read);
    assert!(matches!(
        mm.section_page(&section, page),
        SectionAt::Reading(_)
    ));
    resolved(&mm, mm.complete_read(ticket, Ok(4 * PAGE_SIZE)));
    let SectionAt::Resident(pin) = mm.section_page(&section, page) else {
        panic!("the page was read");
    };
    mm.store().write(pin.pfn(), 0, &[42]);
    mm.unpin(pin);
    assert_eq!(Cpu::new(&space).load(&mm, BASE + 1), Ok(42));
    let pinned = mm.pin(&space, vpn(BASE + 1), Access::Write);
    let PinOutcome::Pinned(pin, flush) = pinned else {
        panic!("the page is mapped");
    };
    mm.flushed(flush);
    let written = mm.write_back(&section, 0..u64::MAX).expect("modified");
    mm.complete_write_back(written, Ok(()));
    // The holder may have stored since.
    mm.unpin(pin);
    assert!(mm.section_modified(&section));
}
