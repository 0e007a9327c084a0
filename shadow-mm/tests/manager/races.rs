//! Hardware sets accessed and dirty bits whenever it likes: here, right after the manager looked.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering::SeqCst};

use super::common::{BASE, RW, range, request, va, vpn};
use shadow_mm::pte::{Entry, EntryFlags};
use shadow_mm::sim::{SimFile, SimStore};
use shadow_mm::{
    Access, EntryIndex, FaultKind, FaultOutcome, FrameStore, Limits, Manager, MapKind, Pfn,
    PfnRange, Platform, PoolLayout, Prot, Space,
};

/// RAM whose hardware stores through a writable entry right after one of the looks at it.
struct RacingStore {
    ram: SimStore<parking_lot::RawMutex>,
    /// How many looks are let pass before; negative: it is over.
    looks: AtomicI64,
}

impl FrameStore for RacingStore {
    fn load(&self, table: Pfn, index: EntryIndex) -> u64 {
        let seen = self.ram.load(table, index);
        if let Some(Entry::Valid(entry)) = Entry::decode(seen)
            && entry
                .flags
                .contains(EntryFlags::WRITABLE | EntryFlags::LOGICAL_WRITE)
            && self.looks.fetch_sub(1, SeqCst) == 0
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
    let looks = AtomicI64::new(-1);
    let store = RacingStore { ram, looks };
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

/// Does `change` with the store after the first look, the second, ... and says how often it came in
/// time to count.
fn race(change: impl Fn(&Manager<Racing>, &Arc<Space<Racing>>)) -> usize {
    let mut stores = 0;
    for looks in 0..4 {
        let (mm, space) = racing();
        assert_eq!(dirty(&mm, &space), [false]);
        mm.store().looks.store(looks, SeqCst);
        change(&mm, &space);
        let happened = mm.store().looks.swap(-1, SeqCst) < 0;
        stores += usize::from(happened);
        assert_eq!(dirty(&mm, &space), [happened], "stored after look {looks}");
    }
    stores
}

#[test]
fn store_during_protect_stays_dirty() {
    let stores = race(|mm, space| {
        let done = mm.protect(space, range(BASE, 1), Prot::READ);
        mm.flushed(done.flush);
    });
    assert!(stores > 1);
}

#[test]
fn store_during_fork_stays_dirty() {
    let stores = race(|mm, space| {
        let forked = mm.fork(space).expect("a fork");
        mm.flushed(forked.flush);
        assert_eq!(dirty(mm, &forked.child), [false]);
        assert_eq!(mm.check(&[space.clone(), forked.child]), Ok(()));
    });
    // It looks once, and makes its change on condition that nothing has happened since.
    assert!(stores > 0);
}
