//! Trims, the page file and soft faults, one scenario at a time. The random ones are `tests/model`.

use super::common::page_file::{File, evict_all, trim};
use super::common::{BASE, Cpu, Guest, Mm, RW, manager, map_anon, range, vpn};
use shadow_mm::{
    Access, Denied, FaultKind, FaultOutcome, IoFailed, PAGE_SIZE, PageIn, Pin, PinOutcome, TrimMode,
};

/// A space with `pages` pages from BASE on, each with its number in it.
fn scene(data: u32, slots: u64, pages: u64) -> (Mm, Cpu) {
    let mm = manager(data, 40);
    mm.add_page_file(slots).expect("a page file");
    let space = mm.create_space().expect("a space");
    map_anon(&mm, &space, BASE, 64, RW);
    let mut cpu = Cpu::new(&space);
    // Downwards, so that nothing is mapped ahead.
    for page in (0..pages).rev() {
        cpu.store(&mm, BASE + page, page as u8 + 1)
            .expect("a store");
    }
    (mm, cpu)
}

fn fault(mm: &Mm, cpu: &mut Cpu, page: u64, access: Access) -> FaultKind {
    match mm.fault(&cpu.space, vpn(page).va(), access) {
        FaultOutcome::Resolved(done) => {
            cpu.flush(mm, done.flush);
            done.kind
        }
        other => panic!("{other:?}"),
    }
}

fn page_in(mm: &Mm, cpu: &Cpu, page: u64, access: Access) -> PageIn<super::common::Sim> {
    match mm.fault(&cpu.space, vpn(page).va(), access) {
        FaultOutcome::PageIn(ticket) => ticket,
        other => panic!("{other:?}"),
    }
}

fn close(mm: &Mm, spaces: &[&Guest]) {
    for space in spaces {
        let flush = mm.delete_space(space);
        mm.flushed(flush);
    }
    mm.check(&[]).expect("consistent at the end");
    let stats = mm.stats();
    assert_eq!(stats.data.available(), stats.data.total);
    assert_eq!((stats.data.standby, stats.page_file_used), (0, 0));
}

#[test]
fn walk_over_pages_that_left_maps_ahead() {
    let (mm, mut cpu) = scene(200, 100, 64);
    trim(&mm, &mut cpu, 64);
    let mut file = File::default();
    file.write_all(&mm);
    let mut faults = 0;
    for page in 0..64 {
        let at = vpn(BASE + page).va();
        faulted(&mm, &mut cpu, &file, at, &mut faults);
        assert_eq!(cpu.load(&mm, BASE + page), Ok(page as u8 + 1));
    }
    assert_eq!(faults, 7, "1, 2, 4, 8, 16, 32 pages and one");
    trim(&mm, &mut cpu, 64);
    file.write_all(&mm);
    evict_all(&mm);
    faults = 0;
    for page in 0..64 {
        let at = vpn(BASE + page).va();
        faulted(&mm, &mut cpu, &file, at, &mut faults);
        assert_eq!(cpu.load(&mm, BASE + page), Ok(page as u8 + 1));
    }
    assert_eq!((mm.stats().page_ins, faults), (4, 8));
    mm.check(&[cpu.space.clone()]).expect("consistent");
    close(&mm, &[&cpu.space]);
}

/// One read of the guest's, with the fault it takes.
fn faulted(mm: &Mm, cpu: &mut Cpu, file: &File, at: shadow_mm::GuestVa, faults: &mut u32) {
    if cpu.mmu.translate(mm.store(), at, Access::Read).is_ok() {
        return;
    }
    *faults += 1;
    let mut outcome = mm.fault(&cpu.space, at, Access::Read);
    if let FaultOutcome::PageIn(ticket) = outcome {
        file.read(mm, &ticket);
        let length = ticket.length();
        outcome = mm.complete_page_in(ticket, Ok(length));
    }
    match outcome {
        FaultOutcome::Resolved(done) => cpu.flush(mm, done.flush),
        other => panic!("{other:?}"),
    }
}

#[test]
fn trimmed_page_comes_back_without_reading() {
    let (mm, mut cpu) = scene(100, 100, 8);
    assert_eq!(trim(&mm, &mut cpu, 8), 8);
    assert_eq!((mm.stats().data.modified, mm.stats().data.active), (8, 0));
    assert_eq!(
        fault(&mm, &mut cpu, BASE + 3, Access::Read),
        FaultKind::Soft
    );
    assert_eq!(cpu.load(&mm, BASE + 3), Ok(4));
    let mut file = File::default();
    assert_eq!(file.write_all(&mm), 7);
    assert_eq!(mm.stats().data.standby, 7);
    assert_eq!(
        fault(&mm, &mut cpu, BASE + 4, Access::Read),
        FaultKind::Soft
    );
    mm.check(&[cpu.space.clone()]).expect("consistent");
    close(&mm, &[&cpu.space]);
}

#[test]
fn page_file_read_brings_its_neighbours() {
    let (mm, mut cpu) = scene(100, 100, 16);
    assert_eq!(trim(&mm, &mut cpu, 16), 16);
    let mut file = File::default();
    file.write_all(&mm);
    evict_all(&mm);
    mm.check(&[cpu.space.clone()]).expect("consistent");
    let ticket = page_in(&mm, &cpu, BASE + 5, Access::Read);
    assert_eq!(ticket.frames().len(), 16);
    // Whoever wants one of them meanwhile waits.
    let other = mm.fault(&cpu.space, vpn(BASE + 6).va(), Access::Read);
    assert!(matches!(other, FaultOutcome::Collided), "{other:?}");
    file.read(&mm, &ticket);
    let length = ticket.length();
    match mm.complete_page_in(ticket, Ok(length)) {
        FaultOutcome::Resolved(done) => assert_eq!(done.kind, FaultKind::PagedIn),
        other => panic!("{other:?}"),
    }
    // Downwards, so that each takes a fault.
    for page in (0..16).rev() {
        assert!(page == 5 || fault(&mm, &mut cpu, BASE + page, Access::Read) == FaultKind::Soft);
        assert_eq!(cpu.load(&mm, BASE + page), Ok(page as u8 + 1));
    }
    close(&mm, &[&cpu.space]);
}

#[test]
fn failed_and_short_reads_leave_the_page_in_the_page_file() {
    let (mm, mut cpu) = scene(100, 100, 16);
    trim(&mm, &mut cpu, 16);
    let mut file = File::default();
    file.write_all(&mm);
    evict_all(&mm);
    for result in [Err(IoFailed), Ok(5 * PAGE_SIZE + 4095), Ok(0)] {
        let ticket = page_in(&mm, &cpu, BASE + 5, Access::Read);
        file.read(&mm, &ticket);
        match mm.complete_page_in(ticket, result) {
            FaultOutcome::Denied(Denied::IoError) => {}
            other => panic!("{other:?}"),
        }
        mm.check(&[cpu.space.clone()]).expect("consistent");
        evict_all(&mm);
    }
    let ticket = page_in(&mm, &cpu, BASE + 5, Access::Write);
    file.read(&mm, &ticket);
    let whole = ticket.length();
    assert!(matches!(
        mm.complete_page_in(ticket, Ok(whole)),
        FaultOutcome::Resolved(_)
    ));
    assert_eq!(cpu.load(&mm, BASE + 5), Ok(6));
    close(&mm, &[&cpu.space]);
}

#[test]
fn failed_write_keeps_the_pages_in_memory() {
    let (mm, mut cpu) = scene(100, 100, 8);
    trim(&mm, &mut cpu, 8);
    let ticket = mm.start_write().expect("pages to write");
    let done = mm.complete_write(ticket, Err(IoFailed));
    assert_eq!((done.stored, done.kept), (0, 8));
    let stats = mm.stats();
    assert_eq!((stats.data.modified, stats.page_file_used), (8, 0));
    assert_eq!(stats.writes_failed, 1);
    mm.check(&[cpu.space.clone()]).expect("consistent");
    assert_eq!(cpu.load(&mm, BASE), Ok(1));
    close(&mm, &[&cpu.space]);
}

/// A page that is stored to while it is written, and then shared and trimmed before the write ends: what
/// was written is old.
#[test]
fn page_stored_to_during_its_write_is_written_again() {
    let (mm, mut cpu) = scene(60, 100, 1);
    trim(&mm, &mut cpu, 1);
    let mut file = File::default();
    let ticket = mm.start_write().expect("a page to write");
    file.take(&mm, &ticket);
    cpu.store(&mm, BASE, 77).expect("a store");
    let forked = mm.fork(&cpu.space).expect("a fork");
    cpu.flush(&mm, forked.flush);
    let mut child = Cpu::new(&forked.child);
    assert_eq!(trim(&mm, &mut cpu, 9) + trim(&mm, &mut child, 9), 2);
    let done = mm.complete_write(ticket, Ok(()));
    assert_eq!((done.stored, done.kept), (0, 1));
    assert_eq!(file.write_all(&mm), 1);
    evict_all(&mm);
    for cpu in [&mut cpu, &mut child] {
        if let FaultOutcome::PageIn(ticket) = mm.fault(&cpu.space, vpn(BASE).va(), Access::Read) {
            file.read(&mm, &ticket);
            let length = ticket.length();
            let done = mm.complete_page_in(ticket, Ok(length));
            assert!(matches!(done, FaultOutcome::Resolved(_)), "{done:?}");
        }
        assert_eq!(cpu.load(&mm, BASE), Ok(77));
    }
    close(&mm, &[&cpu.space, &child.space]);
}

#[test]
fn stale_translation_keeps_a_trimmed_frame_off_the_lists() {
    let (mm, mut cpu) = scene(100, 100, 4);
    let trimmed = mm.trim(&cpu.space, 4, TrimMode::Any);
    assert_eq!(mm.stats().data.in_flight, 4);
    assert!(
        mm.start_write().is_none(),
        "a page was written before its flush"
    );
    // The vCPU stores through what it still knows.
    cpu.store(&mm, BASE, 200).expect("a stale store");
    cpu.flush(&mm, trimmed.flush);
    assert_eq!(mm.stats().data.modified, 4);
    assert_eq!(cpu.load(&mm, BASE), Ok(200));
    close(&mm, &[&cpu.space]);
}

#[test]
fn pinned_pages_and_those_below_the_minimum_stay() {
    let (mm, mut cpu) = scene(100, 100, 30);
    mm.set_working_set(&cpu.space, 20, 25);
    let pin: Pin = match mm.pin(&cpu.space, vpn(BASE), Access::Write) {
        PinOutcome::Pinned(pin, flush) => {
            cpu.flush(&mm, flush);
            pin
        }
        other => panic!("{other:?}"),
    };
    // Looked at twice: used, then not used since.
    for taken in [0, 10, 0] {
        let trimmed = mm.trim(&cpu.space, 99, TrimMode::Unused);
        cpu.flush(&mm, trimmed.flush);
        assert_eq!(trimmed.pages, taken);
    }
    let usage = mm.usage(&cpu.space);
    assert_eq!((usage.resident, usage.peak_resident), (20, 30));
    assert_eq!((usage.working_set_min, usage.working_set_max), (20, 25));
    assert_eq!(trim(&mm, &mut cpu, 99), 19, "all but the pinned one");
    mm.unpin(pin);
    assert_eq!(trim(&mm, &mut cpu, 99), 1);
    close(&mm, &[&cpu.space]);
}

#[test]
fn used_pages_stay_young() {
    let (mm, mut cpu) = scene(100, 100, 32);
    mm.set_working_set(&cpu.space, 0, u64::MAX);
    for _ in 0..4 {
        let flush = mm.age(&cpu.space);
        cpu.flush(&mm, flush);
        (0..4).for_each(|page| assert!(cpu.load(&mm, BASE + page).is_ok()));
    }
    let trimmed = mm.trim(&cpu.space, 99, TrimMode::Old);
    cpu.flush(&mm, trimmed.flush);
    assert_eq!(trimmed.pages, 28);
    close(&mm, &[&cpu.space]);
}

#[test]
fn pages_of_zeroes_need_no_page_file() {
    let mm = manager(100, 40);
    let space = mm.create_space().expect("a space");
    map_anon(&mm, &space, BASE, 8, RW);
    let mut cpu = Cpu::new(&space);
    for page in 0..8 {
        assert_eq!(cpu.load(&mm, BASE + page), Ok(0));
    }
    cpu.store(&mm, BASE, 1).expect("a store");
    // The stored page has nowhere to go.
    assert_eq!(trim(&mm, &mut cpu, 9), 7);
    assert_eq!((mm.stats().data.active, mm.stats().data.modified), (1, 0));
    assert_eq!(cpu.load(&mm, BASE + 4), Ok(0));
    close(&mm, &[&space]);
}

#[test]
fn page_file_full_of_pages_frees_slots_as_they_come_back() {
    let (mm, mut cpu) = scene(100, 8, 8);
    trim(&mm, &mut cpu, 8);
    let mut file = File::default();
    assert_eq!(file.write_all(&mm), 8);
    assert_eq!(mm.stats().page_file_used, 8);
    // Downwards, so that each takes a fault.
    let store_all = |cpu: &mut Cpu| {
        let pages = (0..8).rev();
        pages.for_each(|page| cpu.store(&mm, BASE + page, 50).expect("a store"));
    };
    store_all(&mut cpu);
    assert_eq!(
        (mm.stats().page_file_used, mm.stats().page_file_peak),
        (0, 8)
    );
    // Pages that were read first, then stored to: their slots are worth nothing, and the file seems full.
    trim(&mm, &mut cpu, 8);
    assert_eq!(file.write_all(&mm), 8);
    (0..8).for_each(|page| assert_eq!(cpu.load(&mm, BASE + page), Ok(50)));
    store_all(&mut cpu);
    assert_eq!(mm.stats().page_file_used, 8);
    assert_eq!(trim(&mm, &mut cpu, 8), 8);
    assert_eq!(file.write_all(&mm), 8);
    close(&mm, &[&cpu.space]);
}

#[test]
fn unmapping_gives_back_frames_and_slots_in_every_state() {
    let (mm, mut cpu) = scene(100, 100, 20);
    trim(&mm, &mut cpu, 16);
    let mut file = File::default();
    file.write_all(&mm);
    evict_all(&mm);
    // Eight being read, the rest in the page file, in memory, or newly trimmed.
    let ticket = page_in(&mm, &cpu, BASE + 5, Access::Read);
    let trimmed = mm.trim(&cpu.space, 2, TrimMode::Any);
    let flush = mm.unmap(&cpu.space, range(BASE, 64)).expect("unmapped");
    mm.check(&[cpu.space.clone()]).expect("consistent");
    cpu.flush(&mm, trimmed.flush);
    cpu.flush(&mm, flush);
    let length = ticket.length();
    let done = mm.complete_page_in(ticket, Ok(length));
    assert!(matches!(&done, FaultOutcome::Resolved(r) if r.kind == FaultKind::Spurious));
    let stats = mm.stats();
    assert_eq!((stats.data.available(), stats.page_file_used), (100, 0));
    close(&mm, &[&cpu.space]);
}
