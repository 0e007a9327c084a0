//! Shared memory and files in memory over an image that is read: nothing is done for a page before somebody wants it, and then
//! it is read once for all who share it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

use super::common::{BASE, Cpu, Mm, RW, Sim, manager, request, vpn};
use super::room::{Room, page};
use shadow_mm::sim::SimFile;
use shadow_mm::{
    Access, CommitLimit, Denied, Extent, Extents, FailPlan, FaultOutcome, ForkMode, FrameStore,
    IoFailed, IoTicket, LayError, MapKind, PAGE_SIZE, Pfn, Progress, Section, SectionAt, SectionIn,
    SectionStore, Sharing,
};

/// Pages of the file; the image has all from the second on, and one before and after them that nobody wants.
const PAGES: u64 = 40;
const FIRST: u64 = 1;
const STORED: u64 = 1;
const HAS: u64 = PAGES - FIRST;
/// Pages charged for the private mapping.
const PRIVATE: u64 = PAGES;
/// Pages that the file system has.
const ROOM: u64 = 2 * PAGES;
/// Frames of the pool.
const FRAMES: u64 = 100;

fn all() -> Extents {
    let run = Extent {
        first: FIRST,
        count: HAS,
        stored: STORED,
    };
    Extents::new([run]).expect("a run")
}

/// What a page of the file begins with.
fn byte(number: u64) -> u8 {
    match number {
        0 => 0,
        _ => (number - FIRST + STORED) as u8 + 100,
    }
}

/// Reads what a ticket is for: page `n` of the image begins with `n + 100`.
fn fill(mm: &Mm, ticket: IoTicket<Sim>) -> FaultOutcome<Sim> {
    let first = ticket.offset() / PAGE_SIZE as u64;
    for (ahead, frame) in ticket.frames().iter().enumerate() {
        mm.store().zero(*frame);
        mm.store()
            .write(*frame, 0, &[(first + ahead as u64) as u8 + 100]);
    }
    let length = ticket.length();
    mm.complete_read(ticket, Ok(length))
}

/// A file in memory whose pages are in an image, and processes that map it: two that share it, and one that has it for itself.
struct Scene {
    mm: Mm,
    image: Section<SimFile>,
    section: Section<SimFile>,
    room: Arc<Room>,
    cpus: [Cpu; 3],
}

impl Scene {
    fn empty() -> Self {
        let mm = manager(FRAMES as u32, 40);
        mm.set_fork_mode(ForkMode::Shared);
        let bytes = (STORED + HAS + 1) * PAGE_SIZE as u64;
        let image = mm.create_section(Some(SimFile(1)), bytes);
        let room = Arc::new(Room(AtomicU64::new(ROOM)));
        let section = mm.create_file_section(Arc::clone(&room) as _);
        let (image, section) = (image.expect("a section"), section.expect("a section"));
        let sized = mm.resize_section(&section, PAGES * PAGE_SIZE as u64);
        assert!(sized.expect("a size").is_empty());
        let sharings = [Sharing::Shared, Sharing::Shared, Sharing::Private];
        let cpus = sharings.map(|sharing| {
            let space = mm.create_space().expect("a space");
            let view = MapKind::View {
                section: section.clone(),
                offset: 0,
                sharing,
            };
            let mapped = mm.map(&space, request(BASE, PAGES, RW, view));
            mm.flushed(mapped.expect("a mapping").flush);
            Cpu::new(&space)
        });
        Self {
            mm,
            image,
            section,
            room,
            cpus,
        }
    }

    fn new() -> Self {
        let scene = Self::empty();
        let laid = scene.mm.lay_section(&scene.section, &scene.image, &all());
        assert_eq!(laid, Ok(()));
        scene
    }

    fn fault(&self, cpu: usize, n: u64, access: Access) -> FaultOutcome<Sim> {
        self.mm
            .fault(&self.cpus[cpu].space, vpn(BASE + n).va(), access)
    }

    /// The frame of a page, after as many faults and reads as it takes.
    fn touch(&mut self, cpu: usize, n: u64, access: Access) -> Pfn {
        let at = vpn(BASE + n).va();
        for _ in 0..4 {
            let found = self.cpus[cpu].mmu.translate(self.mm.store(), at, access);
            if let Ok(found) = found {
                return found.frame;
            }
            let outcome = match self.fault(cpu, n, access) {
                FaultOutcome::Read(ticket) => fill(&self.mm, ticket),
                other => other,
            };
            let FaultOutcome::Resolved(done) = outcome else {
                panic!("{outcome:?}");
            };
            self.cpus[cpu].flush(&self.mm, done.flush);
        }
        panic!("page {n} is never there");
    }

    fn load(&mut self, cpu: usize, n: u64) -> u8 {
        let frame = self.touch(cpu, n, Access::Read);
        self.first_byte(frame)
    }

    fn store(&mut self, cpu: usize, n: u64, byte: u8) {
        let frame = self.touch(cpu, n, Access::Write);
        self.mm.store().write(frame, 0, &[byte]);
    }

    fn first_byte(&self, frame: Pfn) -> u8 {
        let mut byte = [0];
        self.mm.store().read(frame, 0, &mut byte);
        byte[0]
    }

    /// Reads a page as a descriptor does.
    fn read(&self, n: u64) -> u8 {
        for _ in 0..4 {
            match self.mm.section_page(&self.section, page(n)) {
                SectionAt::Absent => return 0,
                SectionAt::Resident(pin) => {
                    let byte = self.first_byte(pin.pfn());
                    self.mm.unpin(pin);
                    return byte;
                }
                SectionAt::PagedOut => self.bring(n),
                SectionAt::Reading(pending) => panic!("{pending:?}"),
            }
        }
        panic!("page {n} is never there");
    }

    fn bring(&self, n: u64) {
        match self.mm.section_page_in(&self.section, page(n)) {
            SectionIn::Read(ticket) => {
                let outcome = fill(&self.mm, ticket);
                assert!(matches!(outcome, FaultOutcome::Collided), "{outcome:?}");
            }
            SectionIn::Again => {}
            SectionIn::PageIn(_) | SectionIn::Collided | SectionIn::NoMemory => {
                panic!("page {n} is not to be read")
            }
        }
    }

    /// What must not change when something fails.
    fn photograph(&self) -> [u64; 5] {
        let stats = self.mm.stats();
        [
            self.mm.section_extent(&self.section),
            self.mm.section_resident(&self.section),
            stats.commit_charged,
            stats.data.available(),
            self.room.0.load(SeqCst),
        ]
    }

    fn unread(&self) -> Vec<Extent> {
        let unread = self.mm.section_unread(&self.section);
        let (image, runs) = unread.expect("an image");
        assert_eq!(image, self.image);
        runs
    }

    fn close(self) {
        let Self {
            mm,
            section,
            image,
            cpus,
            room,
        } = self;
        let spaces: Vec<_> = cpus.iter().map(|cpu| Arc::clone(&cpu.space)).collect();
        assert_eq!(mm.check(&spaces), Ok(()));
        // The handle of the file in memory is the last one of the image.
        drop(image);
        assert_eq!(mm.check(&spaces), Ok(()));
        drop((section, cpus));
        for space in spaces {
            mm.flushed(mm.delete_space(&space));
        }
        assert_eq!(mm.check(&[]), Ok(()));
        let stats = mm.stats();
        assert_eq!(stats.data.available(), stats.data.total);
        assert_eq!((stats.sections, stats.section_pages), (0, 0));
        assert_eq!((stats.commit_charged, room.0.load(SeqCst)), (0, ROOM));
    }
}

#[test]
fn laid_section_is_charged_and_nothing_is_read() {
    let scene = Scene::new();
    let stats = scene.mm.stats();
    assert_eq!((stats.reads_issued, stats.section_pages), (0, 0));
    assert_eq!(stats.data.available(), stats.data.total);
    assert_eq!(scene.mm.section_extent(&scene.section), HAS);
    assert_eq!(stats.commit_charged, HAS + PRIVATE);
    assert_eq!(scene.room.0.load(SeqCst), ROOM - HAS);
    assert!(scene.mm.section_pages(&scene.section).is_empty());
    let run = |first, count, stored| Extent {
        first,
        count,
        stored,
    };
    assert_eq!(scene.unread(), [run(FIRST, HAS, STORED)]);
    scene.close();
}

#[test]
fn each_page_is_read_once_for_all_however_it_is_reached() {
    let mut scene = Scene::new();
    for n in 0..PAGES {
        assert_eq!(scene.load(0, n), byte(n), "page {n}");
    }
    let stats = scene.mm.stats();
    assert_eq!(stats.pages_from_image, HAS);
    // The windows of the image reach one page before and one after what the file has.
    assert_eq!(stats.pages_read, HAS + 2);
    assert_eq!(scene.unread(), []);
    for n in 0..PAGES {
        assert_eq!((scene.load(1, n), scene.load(2, n)), (byte(n), byte(n)));
        assert_eq!(scene.read(n), byte(n));
    }
    assert_eq!(scene.mm.stats().reads_issued, stats.reads_issued);
    // The image keeps only what nobody has copied.
    assert_eq!(scene.mm.section_resident(&scene.image), 2);
    scene.close();
}

#[test]
fn descriptor_reads_what_it_wants() {
    let mut scene = Scene::new();
    assert_eq!(scene.read(20), byte(20));
    let read = scene.mm.stats().reads_issued;
    assert_eq!(read, 1);
    let there = scene.mm.section_pages(&scene.section).len() as u64;
    assert_eq!(there, scene.mm.stats().pages_from_image);
    assert!(there > 1 && there < HAS, "{there}");
    // What is promised already is not promised anew.
    let before = scene.photograph();
    assert_eq!(scene.mm.reserve_section(&scene.section, 1..PAGES), Ok(()));
    assert_eq!(scene.photograph(), before);
    let SectionStore::In(SectionIn::Read(ticket)) =
        scene.mm.section_page_to_store(&scene.section, page(3))
    else {
        panic!("it is not to be read");
    };
    assert!(matches!(fill(&scene.mm, ticket), FaultOutcome::Collided));
    let stored = scene.mm.section_page_to_store(&scene.section, page(3));
    assert!(matches!(stored, SectionStore::In(SectionIn::Again)));
    let SectionStore::There(pin) = scene.mm.section_page_to_store(&scene.section, page(3)) else {
        panic!("it is not there");
    };
    assert_eq!(scene.first_byte(pin.pfn()), byte(3));
    scene.mm.store().write(pin.pfn(), 0, &[55]);
    scene.mm.unpin_stored(pin);
    assert_eq!((scene.load(0, 3), scene.load(1, 4)), (55, byte(4)));
    scene.close();
}

#[test]
fn stores_are_seen_by_all_who_share_and_by_nobody_else() {
    let mut scene = Scene::new();
    scene.store(2, 7, 33);
    scene.store(0, 6, 44);
    let seen = |scene: &mut Scene, n| [0, 1, 2].map(|cpu| scene.load(cpu, n));
    assert_eq!(seen(&mut scene, 7), [byte(7), byte(7), 33]);
    let [one, other, _] = seen(&mut scene, 6);
    assert_eq!((one, other, scene.read(6)), (44, 44, 44));
    scene.close();
}

#[test]
fn page_that_is_being_read_is_waited_for() {
    let mut scene = Scene::new();
    let FaultOutcome::Read(ticket) = scene.fault(0, 5, Access::Write) else {
        panic!("nothing is to be read");
    };
    let FaultOutcome::Wait(pending) = scene.fault(1, 5, Access::Read) else {
        panic!("it is not waited for");
    };
    let brought = scene.mm.section_page_in(&scene.section, page(5));
    assert!(matches!(brought, SectionIn::Collided));
    assert_eq!(pending.progress(), Progress::UnderWay);
    let FaultOutcome::Resolved(done) = fill(&scene.mm, ticket) else {
        panic!("it did not come");
    };
    scene.mm.flushed(done.flush);
    assert_eq!(pending.progress(), Progress::Ended);
    assert_eq!(scene.load(1, 5), byte(5));
    assert_eq!(scene.mm.stats().reads_issued, 1);
    scene.close();
}

#[test]
fn cut_and_punched_pages_are_zeroes_and_never_read() {
    let mut scene = Scene::new();
    assert_eq!(scene.load(0, 5), byte(5));
    let had = scene.mm.section_extent(&scene.section);
    let flushes = scene
        .mm
        .punch_section(&scene.section, 4..20)
        .expect("nothing is kept");
    flushes.into_iter().for_each(|f| scene.mm.flushed(f));
    let pages = scene.mm.section_extent(&scene.section);
    // Pages that somebody maps stay, as zeroes.
    assert!(pages >= had - 16 && pages < had, "{pages} of {had}");
    assert_eq!(scene.room.0.load(SeqCst), ROOM - pages);
    scene.cpus = scene.cpus.each_ref().map(|cpu| Cpu::new(&cpu.space));
    let read = scene.mm.stats().reads_issued;
    for n in 4..20 {
        assert_eq!((scene.load(1, n), scene.read(n)), (0, 0));
    }
    assert_eq!(scene.mm.stats().reads_issued, read);
    for bytes in [30, PAGES].map(|pages| pages * PAGE_SIZE as u64) {
        let resized = scene.mm.resize_section(&scene.section, bytes);
        let flushes = resized.expect("a size").into_iter();
        flushes.for_each(|f| scene.mm.flushed(f));
    }
    assert_eq!((scene.load(1, 29), scene.load(1, 30)), (byte(29), 0));
    assert!(scene.unread().iter().all(|run| run.first + run.count <= 30));
    scene.close();
}

#[test]
fn page_that_was_cut_while_it_was_read_is_zeroes() {
    let mut scene = Scene::new();
    let FaultOutcome::Read(ticket) = scene.fault(0, 5, Access::Read) else {
        panic!("nothing is to be read");
    };
    let flushes = scene
        .mm
        .punch_section(&scene.section, 5..6)
        .expect("nothing is kept");
    flushes.into_iter().for_each(|f| scene.mm.flushed(f));
    let FaultOutcome::Resolved(done) = fill(&scene.mm, ticket) else {
        panic!("it is not resolved");
    };
    scene.mm.flushed(done.flush);
    assert_eq!([5, 6].map(|n| scene.load(0, n)), [0, byte(6)]);
    scene.close();
}

#[test]
fn failed_read_leaves_no_trace() {
    let mut scene = Scene::new();
    let before = (scene.photograph(), scene.unread());
    for round in 0..3 {
        let FaultOutcome::Read(ticket) = scene.fault(0, 5, Access::Write) else {
            panic!("nothing is to be read");
        };
        let FaultOutcome::Wait(pending) = scene.fault(1, 6, Access::Read) else {
            panic!("it is not waited for");
        };
        match round {
            0 => drop(ticket),
            _ => {
                let failed = scene.mm.complete_read(ticket, Err(IoFailed));
                let denied = matches!(failed, FaultOutcome::Denied(Denied::IoError));
                assert!(denied, "{failed:?}");
                assert_eq!(pending.progress(), Progress::Failed);
            }
        }
        let spaces = scene.cpus.each_ref().map(|cpu| Arc::clone(&cpu.space));
        assert_eq!(scene.mm.check(&spaces), Ok(()));
        assert_eq!((scene.photograph(), scene.unread()), before);
    }
    let SectionIn::Read(ticket) = scene.mm.section_page_in(&scene.section, page(5)) else {
        panic!("nothing is to be read");
    };
    let failed = scene.mm.complete_read(ticket, Err(IoFailed));
    assert!(matches!(failed, FaultOutcome::Denied(Denied::IoError)));
    assert_eq!((scene.photograph(), scene.unread()), before);
    assert_eq!((scene.load(0, 5), scene.load(1, 6)), (byte(5), byte(6)));
    scene.close();
}

#[test]
fn page_without_a_frame_leaves_no_trace() {
    let mut failed = 0;
    for nth in 0..8 {
        for plan in [FailPlan::Once(nth), FailPlan::From(nth)] {
            let mut scene = Scene::new();
            scene.mm.fail_allocations(plan);
            let outcome = match scene.fault(0, 5, Access::Read) {
                FaultOutcome::Read(ticket) => fill(&scene.mm, ticket),
                other => other,
            };
            scene.mm.fail_allocations(FailPlan::Never);
            match outcome {
                FaultOutcome::Resolved(done) => scene.mm.flushed(done.flush),
                FaultOutcome::NoMemory => failed += 1,
                other => panic!("{other:?}"),
            }
            let stats = scene.mm.stats();
            assert_eq!(scene.mm.section_extent(&scene.section), HAS);
            let promised = (stats.commit_charged, scene.room.0.load(SeqCst));
            assert_eq!(promised, (HAS + PRIVATE, ROOM - HAS));
            for n in [5, 4, 6] {
                assert_eq!((scene.load(0, n), scene.load(1, n)), (byte(n), byte(n)));
            }
            scene.close();
        }
    }
    assert!(
        failed >= 3,
        "for the read, for the copy, for a table: {failed}"
    );
}

#[test]
fn laying_that_cannot_be_leaves_no_trace() {
    let scene = Scene::new();
    let before = scene.photograph();
    let lay = |section, image, extents: &Extents| scene.mm.lay_section(section, image, extents);
    assert_eq!(
        lay(&scene.section, &scene.image, &all()),
        Err(LayError::NotEmpty)
    );
    let beyond = Extent {
        first: 0,
        count: 2,
        stored: STORED + HAS,
    };
    let beyond = Extents::new([beyond]).expect("a run");
    let other = scene.mm.create_file_section(Arc::clone(&scene.room) as _);
    let other = other.expect("a section");
    assert_eq!(
        lay(&other, &scene.image, &beyond),
        Err(LayError::NoSuchPages)
    );
    // Not over a file in memory either.
    assert_eq!(
        lay(&other, &scene.section, &all()),
        Err(LayError::NoSuchPages)
    );
    drop(other);
    assert_eq!(scene.photograph(), before);
    scene.close();
    for how in 0..3 {
        let scene = Scene::empty();
        match how {
            0 => scene.mm.fail_allocations(FailPlan::Once(0)),
            1 => scene
                .mm
                .set_commit_limit(CommitLimit::Pages(PRIVATE + HAS - 1)),
            _ => scene.room.0.store(HAS - 1, SeqCst),
        }
        let (before, handles) = (scene.photograph(), scene.image.handles());
        let laid = scene.mm.lay_section(&scene.section, &scene.image, &all());
        assert_eq!(laid, Err(LayError::NoSpace { pages: HAS }), "{how}");
        assert_eq!(scene.photograph(), before);
        // It can have the pages of another image still.
        assert_eq!(scene.section.image(), None);
        assert_eq!(scene.image.handles(), handles);
        scene.mm.set_commit_limit(CommitLimit::Unlimited);
        scene.room.0.store(ROOM, SeqCst);
        let laid = scene.mm.lay_section(&scene.section, &scene.image, &all());
        assert_eq!(laid, Ok(()));
        scene.close();
    }
}

/// Of a section that was emptied, the pages of another image are not the old one's.
#[test]
fn emptied_section_lies_over_the_same_image_only() {
    let mut scene = Scene::new();
    for bytes in [0, PAGES * PAGE_SIZE as u64] {
        let resized = scene.mm.resize_section(&scene.section, bytes);
        let flushes = resized.expect("a size").into_iter();
        flushes.for_each(|f| scene.mm.flushed(f));
    }
    let bytes = PAGES * PAGE_SIZE as u64;
    let other = scene.mm.create_section(Some(SimFile(2)), bytes);
    let other = other.expect("a section");
    let lay = |image| scene.mm.lay_section(&scene.section, image, &all());
    assert_eq!(lay(&other), Err(LayError::NotEmpty));
    assert_eq!(lay(&scene.image), Ok(()));
    drop(other);
    assert_eq!(scene.load(0, 9), byte(9));
    scene.close();
}
