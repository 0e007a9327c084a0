//! The pager, the page file and faults together, without a virtual CPU.

use std::sync::Arc;

use shadow_mm::{
    Access, GuestVa, Limits, Manager, MapKind, MapRequest, Pfn, PfnRange, Placement, PoolLayout,
    Prot, Space, VadFlags, VadTag,
};

use super::{AccessError, FRAME, Flushes, Memory, PageFile, Pool, VmmPlatform};
use crate::hv::probe::Paging;

const DATA_FRAMES: u64 = 96;
const FIRST: u64 = 0x10_0000;

pub(super) fn memory(file: PageFile) -> Arc<Memory> {
    let zone = |start, count| PfnRange {
        start: Pfn::new(start),
        count,
    };
    let layout = PoolLayout {
        tables: zone(1, 31),
        data: zone(32, DATA_FRAMES as u32),
    };
    let va = |at| GuestVa::new(at).unwrap();
    let limits = Limits {
        user_end: va(0x7f80_0000_0000),
        min_va: va(0x1_0000),
    };
    let manager = Manager::new(Pool::new(32 + DATA_FRAMES).unwrap(), layout, limits).unwrap();
    let memory = Memory::new(manager, Flushes::new(Paging::Hardware, 1));
    memory.add_page_file(file).unwrap();
    Arc::new(memory)
}

fn space(memory: &Memory) -> Arc<Space<VmmPlatform>> {
    let space = memory.manager.create_space().unwrap();
    let request = MapRequest {
        placement: Placement::Fixed(GuestVa::new(FIRST).unwrap().vpn()),
        count: 1000,
        prot: Prot::READ | Prot::WRITE,
        kind: MapKind::Anonymous,
        flags: VadFlags::empty(),
        tag: VadTag::default(),
    };
    memory.submit(memory.manager.map(&space, request).unwrap().flush);
    space
}

fn write(memory: &Memory, space: &Arc<Space<VmmPlatform>>, page: u64) -> Result<(), AccessError> {
    let va = GuestVa::new(FIRST + page * FRAME as u64).unwrap();
    memory.with_page(space, va, Access::Write, |pool, frame| {
        let bytes = page.to_le_bytes().repeat(FRAME / 8);
        shadow_mm::FrameStore::write(pool, frame, 0, &bytes);
    })
}

fn is_there(memory: &Memory, space: &Arc<Space<VmmPlatform>>, page: u64) -> bool {
    let va = GuestVa::new(FIRST + page * FRAME as u64).unwrap();
    let found = memory.with_page(space, va, Access::Read, |pool, frame| {
        let mut bytes = [0; FRAME];
        shadow_mm::FrameStore::read(pool, frame, 0, &mut bytes);
        bytes[..] == page.to_le_bytes().repeat(FRAME / 8)
    });
    found == Ok(true)
}

/// Runs `test` beside a pager.
fn with_pager(memory: &Arc<Memory>, test: impl FnOnce()) {
    std::thread::scope(|scope| {
        scope.spawn(|| memory.run_pager());
        while memory.wait_for_room() == super::Room::Never {
            std::thread::yield_now();
        }
        let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(test));
        memory.end_paging();
        if let Err(panic) = ended {
            std::panic::resume_unwind(panic);
        }
    });
}

#[test]
fn spaces_larger_than_the_pool_keep_their_content() {
    let dir = tempfile::tempdir().unwrap();
    let file = PageFile::create(dir.path(), 1000 * FRAME as u64).unwrap();
    let memory = memory(file);
    let spaces = [space(&memory), space(&memory)];
    with_pager(&memory, || {
        for page in 0..300 {
            write(&memory, &spaces[page as usize / 150], page).unwrap();
        }
        for page in (0..300).chain((0..300).rev()) {
            let space = &spaces[page as usize / 150];
            assert!(is_there(&memory, space, page), "page {page}");
        }
    });
    assert_eq!(memory.manager.check(&spaces), Ok(()));
    let stats = memory.manager.stats();
    assert!(stats.pages_written > 200 && stats.page_ins > 0, "{stats:?}");
    assert!(stats.page_ins < stats.pages_paged_in, "no clusters");
    spaces.iter().for_each(|space| memory.delete_space(space));
    let stats = memory.manager.stats();
    assert_eq!(
        (stats.data.available(), stats.page_file_used),
        (DATA_FRAMES, 0)
    );
}

#[test]
fn who_needs_more_tables_than_there_are_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let file = PageFile::create(dir.path(), 1000 * FRAME as u64).unwrap();
    let memory = memory(file);
    let space = space(&memory);
    let request = MapRequest {
        placement: Placement::Fixed(GuestVa::new(1 << 32).unwrap().vpn()),
        count: 512 * 4096,
        prot: Prot::READ | Prot::WRITE,
        kind: MapKind::Anonymous,
        flags: VadFlags::NO_RESERVE,
        tag: VadTag::default(),
    };
    let mapped = memory.manager.map(&space, request).unwrap();
    let first = mapped.range.start().va().get();
    memory.submit(mapped.flush);
    with_pager(&memory, || {
        let touched = (0..4096).take_while(|n| {
            let va = GuestVa::new(first + n * 512 * FRAME as u64).unwrap();
            memory
                .with_page(&space, va, Access::Write, |_, _| ())
                .is_ok()
        });
        let touched = touched.count() as u64;
        let stats = memory.manager.stats();
        assert!(touched > 0 && touched < 4096, "{touched}");
        assert!(stats.data.available() > 0, "{stats:?}");
    });
    memory.delete_space(&space);
}

#[test]
fn page_file_that_cannot_be_written_loses_nothing() {
    let memory = memory(PageFile::full_device(1000));
    let space = space(&memory);
    with_pager(&memory, || {
        let written = (0..300).take_while(|page| write(&memory, &space, *page).is_ok());
        let written = written.count() as u64;
        assert!(
            (DATA_FRAMES / 2..=DATA_FRAMES).contains(&written),
            "{written} pages"
        );
        for page in 0..written {
            assert!(is_there(&memory, &space, page), "page {page}");
        }
    });
    let stats = memory.manager.stats();
    assert!(
        stats.writes_failed > 0 && stats.page_file_used == 0,
        "{stats:?}"
    );
    assert_eq!(memory.manager.check(&[Arc::clone(&space)]), Ok(()));
    memory.delete_space(&space);
}
