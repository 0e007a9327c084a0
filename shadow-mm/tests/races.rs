//! Hardware sets accessed and dirty bits whenever it likes: here, right after the manager looked.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

use common::{BASE, RW, range, request, va, vpn};
use shadow_mm::pte::{Entry, EntryFlags};
use shadow_mm::sim::{SimFile, SimStore};
use shadow_mm::{
    Access, EntryIndex, FaultKind, FaultOutcome, FrameStore, Limits, Manager, MapKind, Pfn,
    PfnRange, Platform, PoolLayout, Prot, Space,
};

/// RAM whose hardware stores through every valid entry that is looked at, while it is armed.
struct RacingStore {
    ram: SimStore<parking_lot::RawMutex>,
    armed: AtomicBool,
}

impl FrameStore for RacingStore {
    fn load(&self, table: Pfn, index: EntryIndex) -> u64 {
        let seen = self.ram.load(table, index);
        if self.armed.load(SeqCst)
            && let Some(Entry::Valid(entry)) = Entry::decode(seen)
            && entry
                .flags
                .contains(EntryFlags::WRITABLE | EntryFlags::LOGICAL_WRITE)
        {
            let used = entry.flags | EntryFlags::ACCESSED | EntryFlags::DIRTY;
            self.ram
                .swap(table, index, Entry::Valid(entry.with_flags(used)).encode());
        }
        seen
    }
    fn swap(&self, table: Pfn, index: EntryIndex, new: u64) -> u64 {
        self.ram.swap(table, index, new)
    }
    fn compare_exchange(&self, t: Pfn, index: EntryIndex, old: u64, new: u64) -> Result<u64, u64> {
        self.ram.compare_exchange(t, index, old, new)
    }
    fn zero(&self, frame: Pfn) {
        self.ram.zero(frame);
    }
    fn copy(&self, from: Pfn, to: Pfn) {
        self.ram.copy(from, to);
    }
    fn read(&self, frame: Pfn, offset: usize, into: &mut [u8]) {
        self.ram.read(frame, offset, into);
    }
    fn write(&self, frame: Pfn, offset: usize, from: &[u8]) {
        self.ram.write(frame, offset, from);
    }
}

struct Racing;

impl Platform for Racing {
    type Store = RacingStore;
    type Lock = parking_lot::RawMutex;
    type Backing = SimFile;
}

/// A manager, and a space with one clean, writable page.
fn racing() -> (Manager<Racing>, Arc<Space<Racing>>) {
    let data = PfnRange {
        start: Pfn::new(16),
        count: 64,
    };
    let tables = PfnRange {
        start: Pfn::new(80),
        count: 32,
    };
    let ram = SimStore::new(PfnRange {
        start: Pfn::new(0),
        count: 112,
    });
    let store = RacingStore {
        ram,
        armed: AtomicBool::new(false),
    };
    let limits = Limits {
        user_end: va(0x7f80_0000_0000),
        min_va: va(0x1_0000),
    };
    let mm = Manager::new(store, PoolLayout { data, tables }, limits).expect("a manager");
    let space = mm.create_space().expect("a space");
    let wanted = request(BASE, 1, RW, MapKind::Anonymous);
    let mapped = mm.map(&space, wanted).expect("a mapping");
    mm.flushed(mapped.flush);
    match mm.fault(&space, vpn(BASE).va(), Access::Read) {
        FaultOutcome::Resolved(done) if done.kind == FaultKind::DemandZero => {
            mm.flushed(done.flush);
        }
        other => panic!("{other:?}"),
    }
    (mm, space)
}

fn dirty(mm: &Manager<Racing>, space: &Space<Racing>) -> Vec<bool> {
    let mut dirty = Vec::new();
    mm.resident_pages(space, range(BASE, 1), |_, page| dirty.push(page.dirty));
    dirty
}

#[test]
fn store_during_protect_stays_dirty() {
    let (mm, space) = racing();
    assert_eq!(dirty(&mm, &space), [false]);
    mm.store().armed.store(true, SeqCst);
    let done = mm.protect(&space, range(BASE, 1), Prot::READ);
    mm.store().armed.store(false, SeqCst);
    mm.flushed(done.flush);
    assert_eq!(dirty(&mm, &space), [true]);
}

#[test]
fn store_during_fork_stays_dirty() {
    let (mm, space) = racing();
    mm.store().armed.store(true, SeqCst);
    let forked = mm.fork(&space).expect("a fork");
    mm.store().armed.store(false, SeqCst);
    mm.flushed(forked.flush);
    assert_eq!(
        (dirty(&mm, &space), dirty(&mm, &forked.child)),
        (vec![true], vec![false])
    );
    assert_eq!(mm.check(&[space, forked.child]), Ok(()));
}
