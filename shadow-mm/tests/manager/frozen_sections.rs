//! Shared memory and files in memory over a layer: nothing is done for a page before it is stored to, and then all who share
//! it see the store.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

use super::common::{BASE, Cpu, LAYER, Mm, RW, layer, manager, request, vpn};
use super::room::{Room, page};
use shadow_mm::sim::SimFile;
use shadow_mm::{
    Access, Charge, CommitLimit, Extent, Extents, FailPlan, FaultOutcome, Flush, ForkMode,
    FrameStore, LayError, MapKind, PAGE_SIZE, Pfn, ResetSectionError, Section, SectionAt,
    SectionError, SectionStore, Sharing,
};

/// Pages of the file; the layer has those from the second on.
const PAGES: u64 = LAYER as u64 + 4;
const FIRST: u64 = 1;
/// Pages that the file system has.
const ROOM: u64 = 2 * PAGES;

fn all() -> Extents {
    let run = Extent {
        first: FIRST,
        count: LAYER.into(),
        stored: 0,
    };
    Extents::new([run]).expect("a run")
}

/// A file in memory whose pages are a layer's, page `n` of which begins with `n + 1`, and two processes that map it.
struct Scene {
    mm: Mm,
    image: Section<SimFile>,
    section: Section<SimFile>,
    room: Arc<Room>,
    cpus: [Cpu; 2],
}

impl Scene {
    fn empty(mode: ForkMode) -> Self {
        let file = |mm: &Mm, room: &Arc<Room>| mm.create_file_section(Arc::clone(room) as _);
        Self::over(mode, file)
    }

    /// Over another section, which gets the file's size.
    fn over(
        mode: ForkMode,
        make: impl FnOnce(&Mm, &Arc<Room>) -> Result<Section<SimFile>, SectionError>,
    ) -> Self {
        let mm = manager(64, 40);
        mm.set_fork_mode(mode);
        let frames = layer(&mm);
        for n in 0..LAYER {
            let frame = Pfn::new(frames.start.get() + n);
            mm.store().write(frame, 0, &[n as u8 + 1]);
        }
        let image = mm.create_frozen_section(SimFile(1), frames);
        let room = Arc::new(Room(AtomicU64::new(ROOM)));
        let section = make(&mm, &room);
        let (image, section) = (image.expect("a section"), section.expect("a section"));
        let sized = mm.resize_section(&section, PAGES * PAGE_SIZE as u64);
        assert!(sized.expect("a size").is_empty());
        let cpus = [Sharing::Shared; 2].map(|sharing| {
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

    fn new(mode: ForkMode) -> Self {
        let scene = Self::empty(mode);
        let laid = scene.mm.lay_section(&scene.section, &scene.image, &all());
        assert_eq!(laid, Ok(()));
        scene
    }

    fn load(&mut self, cpu: usize, n: u64) -> u8 {
        self.cpus[cpu].load(&self.mm, BASE + n).expect("a load")
    }

    /// Has a fault thaw what it wants, and both lose what they have of it; gives how many pages were copied.
    fn thaw(&mut self, cpu: usize, n: u64) -> u64 {
        let before = self.mm.stats().pages_thawed;
        let at = vpn(BASE + n).va();
        let outcome = self.mm.fault(&self.cpus[cpu].space, at, Access::Write);
        let FaultOutcome::Thaw(wanted) = outcome else {
            panic!("{outcome:?}");
        };
        let mut flushes = Vec::new();
        let thawed = self.mm.thaw(&wanted, |made| flushes = made);
        thawed.expect("frames");
        self.flush(flushes);
        self.mm.stats().pages_thawed - before
    }

    fn flush(&mut self, flushes: Vec<Flush>) {
        for flush in flushes {
            for cpu in &mut self.cpus {
                cpu.drop_stale(&flush);
            }
            self.mm.flushed(flush);
        }
    }

    fn store(&mut self, cpu: usize, n: u64, byte: u8) {
        self.cpus[cpu]
            .store(&self.mm, BASE + n, byte)
            .expect("a store");
    }

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

    fn close(self) {
        let Self {
            mm, section, cpus, ..
        } = self;
        let spaces: Vec<_> = cpus.iter().map(|cpu| Arc::clone(&cpu.space)).collect();
        assert_eq!(mm.check(&spaces), Ok(()));
        let first = layer(&mm).start.get();
        for n in 0..LAYER {
            let mut byte = [0];
            mm.store().read(Pfn::new(first + n), 0, &mut byte);
            assert_eq!(byte, [n as u8 + 1], "the layer");
        }
        drop(section);
        for space in spaces {
            mm.flushed(mm.delete_space(&space));
        }
        assert_eq!(mm.check(&[]), Ok(()));
        let stats = mm.stats();
        assert_eq!(stats.data.available(), stats.data.total);
        assert_eq!((stats.commit_charged, self.room.0.load(SeqCst)), (0, ROOM));
    }
}

#[test]
fn laid_section_is_charged_and_takes_no_frames_however_it_is_read() {
    for mode in [ForkMode::Eager, ForkMode::Shared] {
        let mut scene = Scene::new(mode);
        let before = scene.mm.stats().data;
        assert_eq!(scene.photograph()[0], u64::from(LAYER));
        assert_eq!(scene.mm.stats().commit_charged, u64::from(LAYER));
        assert_eq!(scene.room.0.load(SeqCst), ROOM - u64::from(LAYER));
        for n in 0..u64::from(LAYER) {
            assert_eq!(
                (scene.load(0, FIRST + n), scene.load(1, FIRST + n)),
                (n as u8 + 1, n as u8 + 1)
            );
            let SectionAt::Resident(pin) = scene.mm.section_page(&scene.section, page(FIRST + n))
            else {
                panic!("page {n} is not there");
            };
            assert!(layer(&scene.mm).contains(pin.pfn()));
            scene.mm.unpin(pin);
        }
        let stats = scene.mm.stats();
        assert_eq!((stats.data, stats.pages_thawed), (before, 0));
        assert_eq!(stats.faults_mapped, 2, "one fault fills a leaf table");
        scene.close();
    }
}

#[test]
fn store_is_seen_by_all_and_copies_what_is_stored_to() {
    for mode in [ForkMode::Eager, ForkMode::Shared] {
        let mut scene = Scene::new(mode);
        assert_eq!((scene.load(0, 3), scene.load(1, 3)), (3, 3));
        assert_eq!(scene.thaw(0, 3), 1);
        scene.store(0, 3, 99);
        assert_eq!(
            (scene.load(0, 3), scene.load(1, 3), scene.load(1, 4)),
            (99, 99, 4)
        );
        // One after the other, two, four and then eight at once.
        assert_eq!([4, 6, 10].map(|n| scene.thaw(0, n)), [2, 4, 5]);
        for n in 4..PAGES - 3 {
            scene.store(1, n, n as u8);
            assert_eq!(scene.load(0, n), n as u8);
        }
        // What the layer does not have is zeroes, as ever.
        assert_eq!((scene.load(0, 0), scene.load(1, PAGES - 1)), (0, 0));
        scene.close();
    }
}

/// What a clone that shares memory leaves to the next one.
#[test]
fn section_that_is_reset_is_the_layers_again_and_stays_mapped() {
    for mode in [ForkMode::Eager, ForkMode::Shared] {
        let bytes = PAGES * PAGE_SIZE as u64;
        let shared = |mm: &Mm, _: &Arc<Room>| mm.create_shared_memory(bytes, Charge::Charged);
        let mut scene = Scene::over(mode, shared);
        let unlaid = scene.mm.reset_section(&scene.section);
        assert!(matches!(unlaid, Err(ResetSectionError::NotLaid)));
        let laid = scene.mm.lay_section(&scene.section, &scene.image, &all());
        assert_eq!(laid, Ok(()));
        let before = scene.photograph();
        for round in 0..3 {
            let child = scene.mm.fork(&scene.cpus[0].space).expect("a fork");
            scene.flush(vec![child.flush]);
            for n in [3, 7] {
                assert_eq!(scene.thaw(0, n), 1);
                scene.store(0, n, 99);
                assert_eq!((scene.load(0, n), scene.load(1, n)), (99, 99));
            }
            scene.store(1, 0, 98);
            scene.store(1, PAGES - 1, 97);
            let punched = scene.mm.punch_section(&scene.section, 9..11);
            scene.flush(punched.expect("a hole"));
            assert_eq!((scene.load(0, 9), scene.load(1, 9)), (0, 0));
            assert_eq!((scene.load(0, 12), scene.load(1, 12)), (12, 12));
            scene.mm.flushed(scene.mm.delete_space(&child.child));
            let flushes = scene.mm.reset_section(&scene.section).expect("a layer");
            scene.flush(flushes);
            assert_eq!(scene.photograph(), before, "round {round}");
            let faults = scene.mm.stats().faults_mapped;
            assert_eq!((scene.load(0, 12), scene.load(1, 12)), (12, 12));
            assert_eq!(scene.mm.stats().faults_mapped, faults, "it stays mapped");
            for n in 0..PAGES {
                let layers = (FIRST..FIRST + u64::from(LAYER)).contains(&n);
                let byte = if layers { n as u8 } else { 0 };
                assert_eq!((scene.load(0, n), scene.load(1, n)), (byte, byte), "{n}");
            }
            let flushes = scene.mm.reset_section(&scene.section).expect("a layer");
            scene.flush(flushes);
        }
        scene.close();
    }
}

#[test]
fn section_that_cannot_be_reset_is_as_it_was() {
    let mut scene = Scene::new(ForkMode::Shared);
    assert_eq!(scene.thaw(0, 3), 1);
    scene.store(0, 3, 99);
    // A file in memory is charged by the page.
    let by_page = scene.mm.reset_section(&scene.section);
    assert!(matches!(by_page, Err(ResetSectionError::NotLaid)));
    assert_eq!(scene.load(1, 3), 99);
    scene.close();

    let bytes = PAGES * PAGE_SIZE as u64;
    let shared = |mm: &Mm, _: &Arc<Room>| mm.create_shared_memory(bytes, Charge::Charged);
    let mut scene = Scene::over(ForkMode::Shared, shared);
    let laid = scene.mm.lay_section(&scene.section, &scene.image, &all());
    assert_eq!(laid, Ok(()));
    assert_eq!(scene.thaw(0, 3), 1);
    scene.store(0, 3, 99);
    let view = MapKind::View {
        section: scene.section.clone(),
        offset: 0,
        sharing: Sharing::Private,
    };
    let at = request(BASE + 2 * PAGES, PAGES, RW, view);
    let mapped = scene.mm.map(&scene.cpus[1].space, at).expect("a mapping");
    scene.mm.flushed(mapped.flush);
    let shown = scene.mm.reset_section(&scene.section);
    assert!(matches!(shown, Err(ResetSectionError::Shown)));
    assert_eq!((scene.load(1, 3), scene.load(1, 2 * PAGES + 3)), (99, 99));
    scene.close();
}

#[test]
fn descriptor_thaws_what_it_writes() {
    let mut scene = Scene::new(ForkMode::Shared);
    assert_eq!(scene.load(0, 3), 3);
    let SectionStore::Frozen(wanted) = scene.mm.section_page_to_store(&scene.section, page(3))
    else {
        panic!("it is not the layer's");
    };
    let mut flushes = Vec::new();
    let thawed = scene.mm.thaw(&wanted.ahead(4), |made| flushes = made);
    assert_eq!((thawed, scene.mm.stats().pages_thawed), (Ok(()), 4));
    scene.flush(flushes);
    let SectionStore::There(pin) = scene.mm.section_page_to_store(&scene.section, page(3)) else {
        panic!("it is not there");
    };
    scene.mm.store().write(pin.pfn(), 0, &[55]);
    scene.mm.unpin_stored(pin);
    assert_eq!(
        (scene.load(0, 3), scene.load(1, 3), scene.load(1, 4)),
        (55, 55, 4)
    );
    scene.close();
}

/// As long as others may have the layer's page, nobody gets the copy.
#[test]
fn page_that_is_being_thawed_is_waited_for() {
    let mut scene = Scene::new(ForkMode::Shared);
    assert_eq!(scene.load(1, 3), 3);
    let at = vpn(BASE + 3).va();
    let FaultOutcome::Thaw(wanted) = scene.mm.fault(&scene.cpus[0].space, at, Access::Write) else {
        panic!("it is not the layer's");
    };
    let (mm, cpus) = (&scene.mm, &scene.cpus);
    let done = |flushes: Vec<Flush>| {
        for cpu in cpus {
            let outcome = mm.fault(&cpu.space, at, Access::Write);
            assert!(matches!(outcome, FaultOutcome::Collided), "{outcome:?}");
        }
        let stored = mm.section_page_to_store(&scene.section, page(3));
        assert!(!matches!(stored, SectionStore::There(_)), "it is stored to");
        flushes.into_iter().for_each(|flush| mm.flushed(flush));
    };
    assert_eq!(mm.thaw(&wanted, done), Ok(()));
    match mm.fault(&cpus[0].space, at, Access::Write) {
        FaultOutcome::Resolved(resolution) => mm.flushed(resolution.flush),
        other => panic!("{other:?}"),
    }
    drop(wanted);
    for cpu in &mut scene.cpus {
        *cpu = Cpu::new(&cpu.space);
    }
    scene.close();
}

#[test]
fn cut_and_punched_pages_are_zeroes_and_given_back() {
    for mode in [ForkMode::Eager, ForkMode::Shared] {
        let mut scene = Scene::new(mode);
        for n in 0..PAGES {
            assert_eq!(scene.load(0, n), scene.load(1, n));
        }
        assert_eq!(scene.thaw(1, 5), 1);
        scene.store(1, 5, 99);
        let had = scene.mm.section_extent(&scene.section);
        let flushes = scene.mm.punch_section(&scene.section, 4..7);
        scene.flush(flushes.expect("nothing is kept"));
        assert_eq!(scene.mm.section_extent(&scene.section), had - 3);
        assert_eq!([3, 4, 5, 6, 7].map(|n| scene.load(0, n)), [3, 0, 0, 0, 7]);
        let cut = scene
            .mm
            .resize_section(&scene.section, 8 * PAGE_SIZE as u64);
        scene.flush(cut.expect("shorter"));
        let grown = scene
            .mm
            .resize_section(&scene.section, PAGES * PAGE_SIZE as u64);
        scene.flush(grown.expect("longer"));
        assert_eq!([7, 8, 9].map(|n| scene.load(1, n)), [7, 0, 0]);
        scene.close();
    }
}

#[test]
fn section_that_has_pages_or_is_too_short_is_not_laid() {
    let scene = Scene::new(ForkMode::Shared);
    let before = scene.photograph();
    let lay = |section, image, extents: &Extents| scene.mm.lay_section(section, image, extents);
    assert_eq!(
        lay(&scene.section, &scene.image, &all()),
        Err(LayError::NotEmpty)
    );
    let other = scene.mm.create_file_section(Arc::clone(&scene.room) as _);
    let other = other.expect("a section");
    assert_eq!(lay(&other, &scene.image, &all()), Err(LayError::NotEmpty));
    assert_eq!(
        lay(&other, &scene.section, &all()),
        Err(LayError::NoSuchPages)
    );
    let beyond = Extent {
        first: 0,
        count: 2,
        stored: u64::from(LAYER) - 1,
    };
    let beyond = Extents::new([beyond]).expect("a run");
    assert_eq!(
        lay(&other, &scene.image, &beyond),
        Err(LayError::NoSuchPages)
    );
    drop(other);
    assert_eq!(
        scene
            .mm
            .check(&scene.cpus.each_ref().map(|cpu| Arc::clone(&cpu.space))),
        Ok(())
    );
    assert_eq!(scene.photograph(), before);
    scene.close();
}

#[test]
fn laying_without_room_or_memory_leaves_no_trace() {
    let pages = LAYER.into();
    for how in 0..3 {
        let scene = Scene::empty(ForkMode::Shared);
        match how {
            0 => scene.mm.fail_allocations(FailPlan::Once(0)),
            1 => scene.mm.set_commit_limit(CommitLimit::Pages(pages - 1)),
            _ => scene.room.0.store(pages - 1, SeqCst),
        }
        let before = scene.photograph();
        let laid = scene.mm.lay_section(&scene.section, &scene.image, &all());
        assert_eq!(laid, Err(LayError::NoSpace { pages }), "{how}");
        assert_eq!(scene.photograph(), before);
        scene.mm.set_commit_limit(CommitLimit::Unlimited);
        scene.room.0.store(ROOM, SeqCst);
        let laid = scene.mm.lay_section(&scene.section, &scene.image, &all());
        assert_eq!(laid, Ok(()));
        scene.close();
    }
}

#[test]
fn thaw_without_a_frame_leaves_no_trace() {
    let mut failed = 0;
    for nth in 0..3 {
        for plan in [FailPlan::Once(nth), FailPlan::From(nth)] {
            let mut scene = Scene::new(ForkMode::Shared);
            assert_eq!(scene.load(1, 3), 3);
            let at = vpn(BASE + 3).va();
            let FaultOutcome::Thaw(wanted) =
                scene.mm.fault(&scene.cpus[0].space, at, Access::Write)
            else {
                panic!("it is not the layer's");
            };
            let before = scene.photograph();
            scene.mm.fail_allocations(plan);
            let mut flushes = Vec::new();
            let thawed = scene.mm.thaw(&wanted, |made| flushes = made);
            scene.mm.fail_allocations(FailPlan::Never);
            scene.flush(flushes);
            drop(wanted);
            if thawed.is_err() {
                failed += 1;
                assert_eq!(scene.photograph(), before);
                assert_eq!(scene.thaw(0, 3), 1);
            }
            scene.store(0, 3, 77);
            assert_eq!((scene.load(1, 3), scene.load(0, 3)), (77, 77));
            scene.close();
        }
    }
    assert_eq!(failed, 2, "one frame, once and for good");
}
