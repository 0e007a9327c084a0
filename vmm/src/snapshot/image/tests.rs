//! Memory saved and loaded: content, sharing, and what a guest may do with it afterwards.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use shadow_mm::{
    Access, FrameStore, GuestVa, Limits, Manager, MapKind, MapRequest, Pfn, PfnRange, Placement,
    PoolLayout, Prot, Section, Sharing, VadFlags, VadTag, VpnRange,
};
use vm_memory::Bytes;

use super::{Image, ImageLoader, ImageWriter, LoadError, Pages, Saved};
use crate::hv::probe::Paging;
use crate::memory::{AccessError, Backing, Flushes, Memory, PageFile, Pool, Space, VmmPlatform};
use crate::snapshot::format::PartKind;
use crate::snapshot::read::Snapshot;
use crate::snapshot::records::{
    ContentRef, LoadContents, LoadMemory, MemoryError, SaveContents, SaveMemory, SpaceRef,
};
use crate::snapshot::write::{Base, Writer};

pub(super) type Guest = Arc<Space<VmmPlatform>>;

pub(super) const RW: Prot = Prot::READ.union(Prot::WRITE);
const START: u64 = 0x100;
const PAGES: u64 = 200;

fn loader(memory: &Arc<Memory>, snapshot: &Arc<Snapshot>) -> Result<ImageLoader, LoadError> {
    let image = Arc::new(Image::read(snapshot)?);
    ImageLoader::new(memory, (image, Pages::Read), Arc::default())
}

/// No files are mapped here.
pub(super) struct NoFiles;

impl SaveContents for NoFiles {
    fn content(&mut self, _: &Backing) -> Result<ContentRef, MemoryError> {
        Err("no files here".into())
    }
}

impl LoadContents for NoFiles {
    fn content(&self, _: ContentRef) -> Result<Backing, MemoryError> {
        Err("no files here".into())
    }
}

pub(super) fn memory(frames: u32) -> Arc<Memory> {
    let range = |start, count| PfnRange {
        start: Pfn::new(start),
        count,
    };
    let layout = PoolLayout {
        tables: range(1, 511),
        data: range(512, frames),
    };
    let va = |at| GuestVa::new(at).unwrap();
    let limits = Limits {
        user_end: va(0x7f80_0000_0000),
        min_va: va(0x1_0000),
    };
    let pool = Pool::new(512 + u64::from(frames)).unwrap();
    let manager = Manager::new(pool, layout, limits).unwrap();
    Arc::new(Memory::new(manager, Flushes::new(Paging::Hardware, 1)))
}

pub(super) fn range(start: u64, count: u64) -> VpnRange {
    super::range(start, count).unwrap()
}

pub(super) fn map(
    memory: &Memory,
    space: &Guest,
    at: VpnRange,
    prot: Prot,
    kind: MapKind<Backing>,
) {
    let request = MapRequest {
        placement: Placement::Fixed(at.start()),
        count: at.count(),
        prot,
        kind,
        flags: VadFlags::empty(),
        tag: VadTag(7),
    };
    memory.submit(memory.manager.map(space, request).unwrap().flush);
}

pub(super) fn va(page: u64) -> GuestVa {
    GuestVa::new(page * 4096).unwrap()
}

pub(super) fn put(memory: &Memory, space: &Guest, page: u64, value: u64) {
    let store = |pool: &Pool, frame| pool.frame(frame).write_obj(value, 8).unwrap();
    // On a host with much to do the pager may be late.
    for _ in 0..200 {
        match memory.with_page(space, va(page), Access::Write, store) {
            Err(AccessError::NoMemory) => std::thread::sleep(Duration::from_millis(20)),
            done => return done.unwrap(),
        }
    }
    panic!("no memory for page {page:#x}");
}

pub(super) fn get(memory: &Memory, space: &Guest, page: u64) -> u64 {
    // It may be a layer's.
    let load = |pool: &Pool, frame| {
        let mut bytes = [0; 8];
        pool.read(frame, 8, &mut bytes);
        u64::from_ne_bytes(bytes)
    };
    memory
        .with_page(space, va(page), Access::Read, load)
        .unwrap()
}

fn save(memory: &Memory, path: &Path, base: Option<&Snapshot>, spaces: &[&Guest]) -> u64 {
    let base = base.map(Snapshot::as_base);
    let writer = Writer::create(path, base).unwrap();
    let mut pages = 0;
    write_to(memory, (writer, base), spaces, &mut |n| pages += n);
    pages
}

/// Writes a template.
pub(super) fn write(memory: &Memory, writer: Writer, spaces: &[&Guest]) -> std::fs::File {
    write_to(memory, (writer, None), spaces, &mut |_| ())
}

fn write_to(
    memory: &Memory,
    (writer, base): (Writer, Option<Base>),
    spaces: &[&Guest],
    progress: &mut dyn FnMut(u64),
) -> std::fs::File {
    let mut image = ImageWriter::new(memory, writer, base, progress);
    for (n, space) in spaces.iter().enumerate() {
        let at = image.space(space, &mut NoFiles).unwrap();
        assert_eq!(at, SpaceRef(n as u32));
    }
    let saved = image.finish().unwrap();
    let parts = [(PartKind::Spaces, saved.spaces.as_slice())];
    saved.writer.finish(&parts).unwrap().file
}

fn load(memory: &Arc<Memory>, snapshot: &Arc<Snapshot>, spaces: u32) -> Vec<Guest> {
    let mut loader = loader(memory, snapshot).unwrap();
    (0..spaces)
        .map(|n| loader.space(SpaceRef(n), &NoFiles).unwrap())
        .collect()
}

fn open(path: &Path, base: Option<&Arc<Snapshot>>) -> Arc<Snapshot> {
    Arc::new(Snapshot::open(path, base.cloned()).unwrap())
}

pub(super) fn done(memory: &Memory, spaces: &[&Guest]) {
    spaces.iter().for_each(|space| memory.delete_space(space));
    memory.acknowledge(memory.flushes.drain());
}

#[test]
fn forked_spaces_come_back_with_what_they_share_stored_once() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.snap");
    let old = memory(2000);
    let parent = old.manager.create_space().unwrap();
    map(&old, &parent, range(START, PAGES), RW, MapKind::Anonymous);
    for page in (START..START + PAGES).step_by(2) {
        put(&old, &parent, page, page);
    }
    let forked = old.manager.fork(&parent).unwrap();
    let child = forked.child;
    old.submit(forked.flush);
    put(&old, &child, START, 1);
    put(&old, &child, START + 1, 2);
    // Out of reach of any access, and still to be kept.
    let closed = old
        .manager
        .protect(&child, range(START + 4, 1), Prot::empty());
    old.submit(closed.flush);
    let written = save(&old, &path, None, &[&parent, &child]);
    assert_eq!(written, PAGES / 2 + 2);

    let new = memory(2000);
    let snapshot = open(&path, None);
    let spaces = load(&new, &snapshot, 2);
    let before = new.manager.stats();
    assert_eq!(
        (before.data.active, before.section_pages),
        (0, 0),
        "nothing was read yet"
    );
    let opened = new.manager.protect(&spaces[1], range(START + 4, 1), RW);
    new.submit(opened.flush);
    for page in START..START + PAGES {
        let value = if page % 2 == 0 { page } else { 0 };
        assert_eq!(get(&new, &spaces[0], page), value);
        let value = match page - START {
            0 => 1,
            1 => 2,
            _ => value,
        };
        assert_eq!(get(&new, &spaces[1], page), value);
    }
    done(&old, &[&parent, &child]);
    done(&new, &[&spaces[0], &spaces[1]]);
    assert_eq!(new.manager.stats().data.active, 0);
}

#[test]
fn what_a_guest_does_to_restored_memory_is_what_it_does_to_any() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.snap");
    let old = memory(2000);
    let space = old.manager.create_space().unwrap();
    map(&old, &space, range(START, PAGES), RW, MapKind::Anonymous);
    (START..START + PAGES).for_each(|page| put(&old, &space, page, page));
    save(&old, &path, None, &[&space]);
    let new = memory(2000);
    let snapshot = open(&path, None);
    let guest = load(&new, &snapshot, 1).remove(0);
    let manager = &new.manager;
    // Forgotten: zeroes, not the image.
    new.submit(manager.discard(&guest, range(START + 10, 5)).flush);
    assert_eq!(get(&new, &guest, START + 12), 0);
    assert_eq!(get(&new, &guest, START + 15), START + 15);
    // Unmapped, and mapped anew: zeroes.
    new.submit(manager.unmap(&guest, range(START + 20, 5)).unwrap());
    map(&new, &guest, range(START + 20, 5), RW, MapKind::Anonymous);
    assert_eq!(get(&new, &guest, START + 22), 0);
    // Moved: it is there, and no longer here.
    let to = super::range(0x9000, 1).unwrap().start();
    let request = shadow_mm::RemapRequest {
        old: range(START + 30, 10),
        new_count: 12,
        may_move: true,
        fixed: Some(to),
    };
    new.submit(manager.remap(&guest, request).unwrap().flush);
    assert_eq!(get(&new, &guest, 0x9003), START + 33);
    assert_eq!(get(&new, &guest, 0x900b), 0);
    // A child sees the image too, and keeps it when the parent stores.
    let forked = manager.fork(&guest).unwrap();
    new.submit(forked.flush);
    put(&new, &guest, START + 50, 1);
    assert_eq!(get(&new, &forked.child, START + 50), START + 50);
    assert_eq!(get(&new, &guest, START + 50), 1);
    // Saved again, on the first: only what changed is written.
    let second = dir.path().join("b.snap");
    assert_eq!(save(&new, &second, Some(&snapshot), &[&guest]), 1);
    let third = memory(2000);
    let guests = load(&third, &open(&second, Some(&snapshot)), 1);
    for (page, value) in [
        (START, START),
        (START + 12, 0),
        (START + 22, 0),
        (START + 50, 1),
        (START + 51, START + 51),
        (0x9003, START + 33),
    ] {
        assert_eq!(get(&third, &guests[0], page), value, "{page:#x}");
    }
    done(&new, &[&guest, &forked.child]);
}

#[test]
fn shared_memory_is_shared_again() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.snap");
    let old = memory(2000);
    let section: Section<Backing> = old.manager.create_section(None, 64 * 4096).unwrap();
    let view = || MapKind::View {
        section: section.clone(),
        offset: 4096,
        sharing: Sharing::Shared,
    };
    let spaces = [(); 2].map(|()| old.manager.create_space().unwrap());
    for space in &spaces {
        map(&old, space, range(START, 60), RW, view());
    }
    put(&old, &spaces[0], START + 30, 5);
    assert_eq!(save(&old, &path, None, &[&spaces[0], &spaces[1]]), 1);
    let new = memory(2000);
    let again = load(&new, &open(&path, None), 2);
    assert_eq!(get(&new, &again[1], START + 30), 5);
    put(&new, &again[1], START + 2, 6);
    assert_eq!(get(&new, &again[0], START + 2), 6);
    done(&new, &[&again[0], &again[1]]);
}

/// Shared memory of a snapshot is read when it is wanted, and what nobody wanted is in the next snapshot all the same.
#[test]
fn shared_memory_is_read_when_it_is_wanted() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let old = memory(2000);
    let section: Section<Backing> = old.manager.create_section(None, PAGES * 4096).unwrap();
    let view = MapKind::View {
        section,
        offset: 0,
        sharing: Sharing::Shared,
    };
    let first = old.manager.create_space().unwrap();
    map(&old, &first, range(START, PAGES), RW, view);
    (START..START + PAGES).for_each(|page| put(&old, &first, page, page));
    assert_eq!(save(&old, &path("a"), None, &[&first]), PAGES);
    done(&old, &[&first]);
    let new = memory(2000);
    let snapshot = open(&path("a"), None);
    let guest = load(&new, &snapshot, 1).remove(0);
    let stats = new.manager.stats();
    assert_eq!((stats.reads_issued, stats.section_pages), (0, 0));
    assert_eq!(stats.commit_charged, PAGES);
    assert_eq!(get(&new, &guest, START + 50), START + 50);
    put(&new, &guest, START + 100, 7);
    let stats = new.manager.stats();
    assert_eq!((stats.reads_issued, stats.pages_read), (2, 32));
    assert_eq!(stats.section_pages, 32, "each is in memory once");
    // With the old snapshot, what was in memory is written; without it, all of it.
    assert_eq!(save(&new, &path("b"), Some(&snapshot), &[&guest]), 32);
    assert_eq!(save(&new, &path("c"), None, &[&guest]), PAGES);
    assert_eq!(new.manager.stats().pages_read, 32, "not for the guest");
    done(&new, &[&guest]);
    for (name, base) in [("b", Some(&snapshot)), ("c", None)] {
        let third = memory(2000);
        let guest = load(&third, &open(&path(name), base), 1).remove(0);
        for page in START..START + PAGES {
            let value = if page == START + 100 { 7 } else { page };
            assert_eq!(get(&third, &guest, page), value, "{name}");
        }
        done(&third, &[&guest]);
    }
}

/// Forks that share tables: spaces are kept while they are written.
pub(super) fn sharing(frames: u32) -> Arc<Memory> {
    let memory = memory(frames);
    memory.manager.set_fork_mode(shadow_mm::ForkMode::Shared);
    memory
}

/// The same of memory that processes share: nothing of it is copied before the guest goes on.
#[test]
fn what_is_stored_to_shared_memory_once_the_guest_goes_on_is_not_in_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.snap");
    let old = sharing(2000);
    let section: Section<Backing> = old.manager.create_section(None, PAGES * 4096).unwrap();
    let spaces = [(); 2].map(|()| old.manager.create_space().unwrap());
    for space in &spaces {
        let view = MapKind::View {
            section: section.clone(),
            offset: 0,
            sharing: Sharing::Shared,
        };
        map(&old, space, range(START, PAGES), RW, view);
    }
    (0..PAGES - 50).for_each(|page| put(&old, &spaces[page as usize % 2], START + page, page + 1));
    let mut pages = 0;
    let mut progress = |n| pages += n;
    let writer = Writer::create(&path, None).unwrap();
    let mut image = ImageWriter::new(&old, writer, None, &mut progress);
    for space in &spaces {
        image.space(space, &mut NoFiles).unwrap();
    }
    image.keep_shared().unwrap();
    assert_eq!(image.pages(), 0, "nothing is copied before it goes on");
    for (n, space) in spaces.iter().enumerate() {
        (0..PAGES)
            .skip(n)
            .step_by(3)
            .for_each(|page| put(&old, space, START + page, 99));
    }
    let Saved {
        writer,
        spaces: told,
        ..
    } = image.finish().unwrap();
    assert_eq!(pages, PAGES - 50);
    let parts = [(PartKind::Spaces, told.as_slice())];
    writer.finish(&parts).unwrap();
    let new = memory(2000);
    let again = load(&new, &open(&path, None), 2);
    for page in 0..PAGES {
        let value = if page < PAGES - 50 { page + 1 } else { 0 };
        assert_eq!(get(&new, &again[0], START + page), value);
    }
    for (page, value) in [(3, 99), (4, 99), (5, 6)] {
        assert_eq!(get(&old, &spaces[1], START + page), value);
    }
    done(&new, &[&again[0], &again[1]]);
    drop(section);
    done(&old, &[&spaces[0], &spaces[1]]);
}

#[test]
fn what_is_stored_once_the_guest_goes_on_is_not_in_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.snap");
    let old = sharing(2000);
    let parent = old.manager.create_space().unwrap();
    map(&old, &parent, range(START, PAGES), RW, MapKind::Anonymous);
    (START..START + PAGES).for_each(|page| put(&old, &parent, page, page));
    let child = old.fork(&parent).unwrap();
    put(&old, &child, START, 1);
    let mut pages = 0;
    let mut progress = |n| pages += n;
    let mut image = ImageWriter::new(
        &old,
        Writer::create(&path, None).unwrap(),
        None,
        &mut progress,
    );
    for space in [&parent, &child] {
        image.space(space, &mut NoFiles).unwrap();
    }
    assert_eq!(image.pages(), 0, "nothing is copied before it goes on");
    for space in [&parent, &child] {
        (START + 10..START + PAGES).for_each(|page| put(&old, space, page, 99));
        let gone = old.manager.unmap(space, range(START, 5)).unwrap();
        old.submit(gone);
    }
    let Saved {
        writer,
        spaces: told,
        ..
    } = image.finish().unwrap();
    assert_eq!(pages, PAGES + 1, "what both have is there once");
    let parts = [(PartKind::Spaces, told.as_slice())];
    writer.finish(&parts).unwrap();
    let new = memory(2000);
    let spaces = load(&new, &open(&path, None), 2);
    for page in START..START + PAGES {
        assert_eq!(get(&new, &spaces[0], page), page);
        let value = if page == START { 1 } else { page };
        assert_eq!(get(&new, &spaces[1], page), value);
    }
    done(&old, &[&parent, &child]);
    assert_eq!(old.manager.stats().data.active, 0, "nothing is kept");
    done(&new, &[&spaces[0], &spaces[1]]);
}

#[test]
fn image_that_is_given_up_keeps_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let old = sharing(2000);
    let space = old.manager.create_space().unwrap();
    map(&old, &space, range(START, PAGES), RW, MapKind::Anonymous);
    put(&old, &space, START, 1);
    let writer = Writer::create(&dir.path().join("a"), None).unwrap();
    let mut nobody = |_| ();
    let mut image = ImageWriter::new(&old, writer, None, &mut nobody);
    image.space(&space, &mut NoFiles).unwrap();
    assert_eq!(old.manager.spaces().len(), 2);
    drop(image);
    assert_eq!(old.manager.spaces().len(), 1);
    done(&old, &[&space]);
    let stats = old.manager.stats();
    assert_eq!((stats.data.active, stats.commit_charged), (0, 0));
}

#[test]
fn who_finds_no_frame_while_pages_are_copied_waits_for_the_end_of_that() {
    let old = sharing(100);
    let pager = {
        let old = Arc::clone(&old);
        std::thread::spawn(move || old.run_pager())
    };
    let space = old.manager.create_space().unwrap();
    map(&old, &space, range(START, 80), RW, MapKind::Anonymous);
    (START..START + 80).for_each(|page| put(&old, &space, page, page));
    let kept = old.keep(&space).unwrap();
    let copying = old.begin_copy();
    let (store, to) = (Arc::clone(&old), Arc::clone(&space));
    let stores = std::thread::spawn(move || {
        let put = |page| {
            let put = |pool: &Pool, frame| pool.frame(frame).write_obj(7_u64, 8).unwrap();
            store.with_page(&to, va(page), Access::Write, put)
        };
        (START..START + 80).try_for_each(put)
    });
    std::thread::sleep(Duration::from_millis(100));
    assert!(!stores.is_finished(), "there are not so many frames");
    drop(kept);
    old.acknowledge(old.flushes.drain());
    drop(copying);
    assert_eq!(stores.join().unwrap(), Ok(()));
    (START..START + 80).for_each(|page| assert_eq!(get(&old, &space, page), 7));
    // And without a copy, who finds none is told so.
    map(&old, &space, range(START + 80, 80), RW, MapKind::Anonymous);
    let all = (START + 80..START + 160).try_for_each(|page| {
        let put = |pool: &Pool, frame| pool.frame(frame).write_obj(7_u64, 8).unwrap();
        old.with_page(&space, va(page), Access::Write, put)
    });
    assert_eq!(all, Err(AccessError::NoMemory));
    done(&old, &[&space]);
    old.end_paging();
    pager.join().unwrap();
}

#[test]
fn pages_in_the_page_file_are_saved_from_there() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.snap");
    let old = memory(600);
    let file = PageFile::create(dir.path(), 4 << 20).unwrap();
    old.add_page_file(file).unwrap();
    let pager = {
        let old = Arc::clone(&old);
        std::thread::spawn(move || old.run_pager())
    };
    let space = old.manager.create_space().unwrap();
    map(&old, &space, range(START, 1000), RW, MapKind::Anonymous);
    (START..START + 1000).for_each(|page| put(&old, &space, page, page));
    assert!(old.manager.stats().page_file_used > 300);
    assert_eq!(save(&old, &path, None, &[&space]), 1000);
    let new = memory(2000);
    let guest = load(&new, &open(&path, None), 1).remove(0);
    (START..START + 1000).for_each(|page| assert_eq!(get(&new, &guest, page), page));
    old.end_paging();
    pager.join().unwrap();
}

#[test]
fn image_that_names_what_is_not_there_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.snap");
    let vad = super::VadData {
        start: START,
        count: 4,
        prot: RW.bits(),
        flags: 0,
        tag: 0,
        kind: super::KindData::Anonymous,
    };
    let run = super::Run {
        start: START,
        count: 4,
        stored: 0,
    };
    let spaces = [
        (vad, super::Run { stored: 3, ..run }),
        (
            vad,
            super::Run {
                start: START + 1,
                ..run
            },
        ),
        (
            vad,
            super::Run {
                count: u64::MAX,
                ..run
            },
        ),
        (super::VadData { prot: 0xff, ..vad }, run),
        (super::VadData { start: 1, ..vad }, run),
        (super::VadData { count: 0, ..vad }, run),
        (
            super::VadData {
                kind: super::KindData::Shared {
                    section: 9,
                    offset: 0,
                },
                ..vad
            },
            run,
        ),
    ];
    for (vad, run) in spaces {
        let mut writer = Writer::create(&path, None).unwrap();
        (0..4).for_each(|n| assert!(writer.add_page(&[n; 4096]).is_ok()));
        let space = super::SpaceData {
            vads: vec![vad],
            pages: super::Runs(vec![run]),
            ..super::SpaceData::default()
        };
        let data = super::ImageData {
            spaces: vec![space],
            ..super::ImageData::default()
        };
        let part = postcard::to_stdvec(&data).unwrap();
        writer.finish(&[(PartKind::Spaces, &part)]).unwrap();
        let memory = memory(600);
        let mut loader = loader(&memory, &open(&path, None)).unwrap();
        assert!(
            loader.space(SpaceRef(0), &NoFiles).is_err(),
            "{vad:?} {run:?}"
        );
        assert!(loader.space(SpaceRef(1), &NoFiles).is_err());
        assert_eq!(memory.manager.spaces().len(), 0, "nothing is left of it");
    }
    let mut writer = Writer::create(&path, None).unwrap();
    writer.add_page(&[0; 4096]).unwrap();
    writer
        .finish(&[(PartKind::Spaces, b"\xff\xff\xff\xff\xff")])
        .unwrap();
    let refused = loader(&memory(600), &open(&path, None)).err();
    assert!(matches!(refused, Some(LoadError::Decode(_))), "{refused:?}");
}
