//! The verbs of sections that are a file's bytes, with every single allocation failing: they say so, and what the
//! section has, what is charged and what the file system gave are exactly as before. And that what they store stays.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

use super::common::page_file::{File, evict_all, trim};
use super::common::{BASE, Cpu, Mm, RW, manager, request, vpn};
use super::room::{Room, page};
use shadow_mm::sim::SimFile;
use shadow_mm::{
    Access, CommitLimit, FailPlan, FaultOutcome, Flush, FrameStore, IoFailed, MapKind, PAGE_SIZE,
    Section, SectionAt, SectionIn, SectionStore, Sharing,
};

const PAGE: u64 = PAGE_SIZE as u64;
/// Pages the file system has, and pages the file has room for.
const ROOM: u64 = 40;
const PAGES: u64 = 24;
/// Pages that are stored to through the view, and have left memory: those from 0 on.
const OUT: u64 = 4;
/// Pages that are in memory and mapped: those from here on.
const HERE: u64 = 8;

/// A file in memory some of whose pages are in the page file, some mapped, and most nowhere.
struct Scene {
    mm: Mm,
    section: Section<SimFile>,
    room: Arc<Room>,
    cpu: Cpu,
    file: File,
}

impl Scene {
    fn new() -> Self {
        let mm = manager(64, 30);
        mm.add_page_file(32).expect("a page file");
        let room = Arc::new(Room(AtomicU64::new(ROOM)));
        let section = mm.create_file_section(Arc::clone(&room) as _);
        let section = section.expect("a section");
        let sized = mm.resize_section(&section, PAGES * PAGE);
        assert!(sized.expect("a size").is_empty());
        let space = mm.create_space().expect("a space");
        let view = MapKind::View {
            section: section.clone(),
            offset: 0,
            sharing: Sharing::Shared,
        };
        let mapped = mm.map(&space, request(BASE, PAGES, RW, view));
        mm.flushed(mapped.expect("a mapping").flush);
        let mut cpu = Cpu::new(&space);
        // Downwards: what is touched upwards is mapped ahead.
        (0..OUT)
            .rev()
            .for_each(|n| cpu.store(&mm, BASE + n, 1).expect("a store"));
        trim(&mm, &mut cpu, 1000);
        let mut file = File::default();
        file.write_all(&mm);
        evict_all(&mm);
        (HERE..HERE + 2)
            .rev()
            .for_each(|n| cpu.store(&mm, BASE + n, 2).expect("a store"));
        let scene = Self {
            mm,
            section,
            room,
            cpu,
            file,
        };
        assert_eq!(scene.extent(), OUT + 2);
        scene
    }

    fn extent(&self) -> u64 {
        self.mm.section_extent(&self.section)
    }

    /// All that an operation that failed must not have changed.
    fn photograph(&self) -> [u64; 7] {
        let stats = self.mm.stats();
        [
            self.extent(),
            self.mm.section_resident(&self.section),
            stats.commit_charged,
            stats.page_file_used,
            stats.data.available(),
            stats.tables.available(),
            self.room.0.load(SeqCst),
        ]
    }

    /// Stores a byte, as an embedder does; false if there is no memory or no room.
    fn write(&self, number: u64) -> bool {
        loop {
            match self.mm.section_page_to_store(&self.section, page(number)) {
                SectionStore::There(pin) => {
                    self.mm.store().write(pin.pfn(), 0, &[7]);
                    self.mm.unpin_stored(pin);
                    return true;
                }
                SectionStore::In(SectionIn::PageIn(ticket)) => {
                    self.file.read(&self.mm, &ticket);
                    let length = ticket.length();
                    let _ = self.mm.complete_page_in(ticket, Ok(length));
                }
                SectionStore::In(SectionIn::Again) => {}
                SectionStore::Frozen(thaw) => {
                    let done = |flushes: Vec<Flush>| {
                        flushes.into_iter().for_each(|flush| self.mm.flushed(flush));
                    };
                    if self.mm.thaw(&thaw, done).is_err() {
                        return false;
                    }
                }
                SectionStore::In(SectionIn::NoMemory) | SectionStore::NoSpace => return false,
                SectionStore::In(SectionIn::Collided | SectionIn::Read(_))
                | SectionStore::BeyondEnd => {
                    panic!("nobody reads, and the file is longer")
                }
            }
        }
    }

    fn close(mut self) {
        assert_eq!(self.mm.check(&[Arc::clone(&self.cpu.space)]), Ok(()));
        assert_eq!(self.cpu.load(&self.mm, BASE + HERE + 1), Ok(2));
        assert_eq!(self.room.0.load(SeqCst), ROOM - self.extent());
        drop(self.section);
        let flush = self.mm.delete_space(&self.cpu.space);
        self.mm.flushed(flush);
        assert_eq!(self.mm.check(&[]), Ok(()));
        let stats = self.mm.stats();
        assert_eq!((stats.commit_charged, stats.page_file_used), (0, 0));
        assert_eq!(stats.data.available(), stats.data.total);
        assert_eq!(self.room.0.load(SeqCst), ROOM);
    }
}

/// Runs `operation` with its first, second, ... allocation failing, once and for good; gives back how many could.
fn exhaust(operation: impl Fn(&Scene) -> bool) -> u64 {
    for nth in 0.. {
        let mut struck = false;
        for plan in [FailPlan::Once(nth), FailPlan::From(nth)] {
            let scene = Scene::new();
            let before = scene.photograph();
            scene.mm.fail_allocations(plan);
            let done = operation(&scene);
            struck |= plan == FailPlan::Once(nth) && scene.mm.fail_plan() == FailPlan::Never;
            scene.mm.fail_allocations(FailPlan::Never);
            if !done {
                assert_eq!(scene.photograph(), before, "allocation {nth} left a trace");
            }
            scene.close();
        }
        if !struck {
            return nth;
        }
    }
    0
}

#[test]
fn failed_write_leaves_no_trace() {
    let absent = exhaust(|scene| scene.write(OUT + 1));
    assert!(absent >= 2, "a frame and a charge: {absent}");
    let paged_out = exhaust(|scene| scene.write(1));
    assert!(paged_out >= 2, "a frame for each page of the cluster");
    assert_eq!(exhaust(|scene| scene.write(HERE)), 0, "it is there");
    let mapped_absent = exhaust(|scene| {
        let at = vpn(BASE + OUT + 1).va();
        match scene.mm.fault(&scene.cpu.space, at, Access::Write) {
            FaultOutcome::Resolved(done) => {
                scene.mm.flushed(done.flush);
                true
            }
            FaultOutcome::NoMemory | FaultOutcome::Denied(_) => false,
            other => panic!("{other:?}"),
        }
    });
    assert!(mapped_absent >= 2, "a frame and a charge: {mapped_absent}");
}

#[test]
fn failed_promise_leaves_no_trace() {
    let promise = |scene: &Scene| scene.mm.reserve_section(&scene.section, 0..PAGES);
    let failures = exhaust(|scene| promise(scene).is_ok());
    assert_eq!(failures, PAGES - OUT - 2, "one for each page it lacks");
    // So it is when the commit account, or the file system, has too little.
    for less in 1..PAGES - OUT - 2 {
        let scene = Scene::new();
        let before = scene.photograph();
        let limit = scene.mm.stats().commit_charged + PAGES - OUT - 2 - less;
        scene.mm.set_commit_limit(CommitLimit::Pages(limit));
        assert!(promise(&scene).is_err());
        assert_eq!(scene.photograph(), before);
        scene.mm.set_commit_limit(CommitLimit::Unlimited);
        let there = scene.room.0.swap(PAGES - OUT - 2 - less, SeqCst);
        assert!(promise(&scene).is_err());
        assert_eq!(scene.room.0.swap(there, SeqCst), PAGES - OUT - 2 - less);
        assert_eq!(scene.photograph(), before);
        scene.close();
    }
}

/// A hole gives back; it needs nothing for that.
#[test]
fn hole_needs_no_memory() {
    let scene = Scene::new();
    scene.mm.fail_allocations(FailPlan::From(0));
    let punched = scene.mm.punch_section(&scene.section, 0..HERE);
    for flush in punched.expect("nothing is kept") {
        scene.mm.flushed(flush);
    }
    assert_eq!(scene.mm.fail_plan(), FailPlan::From(0));
    scene.mm.fail_allocations(FailPlan::Never);
    let stats = scene.mm.stats();
    assert_eq!((scene.extent(), stats.commit_charged), (2, 2));
    assert_eq!(stats.page_file_used, 0);
    scene.close();
}

#[test]
fn page_that_cannot_be_read_stays_where_it_is() {
    let scene = Scene::new();
    let before = scene.photograph();
    for result in [Err(IoFailed), Ok(0), Ok(PAGE_SIZE - 1)] {
        let SectionStore::In(SectionIn::PageIn(ticket)) =
            scene.mm.section_page_to_store(&scene.section, page(0))
        else {
            panic!("it is in memory");
        };
        let _ = scene.mm.complete_page_in(ticket, result);
        assert_eq!(scene.photograph(), before, "{result:?}");
        let at = scene.mm.section_page(&scene.section, page(0));
        assert!(matches!(at, SectionAt::PagedOut), "{at:?}");
    }
    assert!(scene.write(0));
    scene.close();
}

/// A page whose frame and slot agree is stored to by descriptor, and its frame taken: the slot is stale then.
#[test]
fn byte_that_is_written_to_a_clean_page_survives_its_eviction() {
    let mut scene = Scene::new();
    assert!(scene.write(1));
    scene.file.write_all(&scene.mm);
    evict_all(&scene.mm);
    let at = vpn(BASE + 1).va();
    let FaultOutcome::PageIn(ticket) = scene.mm.fault(&scene.cpu.space, at, Access::Read) else {
        panic!("it is in memory");
    };
    scene.file.read(&scene.mm, &ticket);
    let length = ticket.length();
    match scene.mm.complete_page_in(ticket, Ok(length)) {
        FaultOutcome::Resolved(done) => scene.cpu.flush(&scene.mm, done.flush),
        other => panic!("{other:?}"),
    }
    assert_eq!(scene.cpu.load(&scene.mm, BASE + 1), Ok(7));
    scene.close();
}
