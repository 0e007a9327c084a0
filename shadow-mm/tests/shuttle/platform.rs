//! Locks and guest RAM whose every use is a scheduling point.
#![expect(unsafe_code, reason = "lock_api's raw mutex is an unsafe trait")]

use std::sync::atomic::Ordering::SeqCst;

use lock_api::RawMutex;
use shadow_mm::sim::{SimFile, SimStore};
use shadow_mm::{EntryIndex, FrameStore, Pfn, PfnRange, Platform};
use shuttle::future::batch_semaphore::{BatchSemaphore, Fairness};
use shuttle::sync::atomic::AtomicU64;

/// A mutex that the scheduler knows: a semaphore with one permit.
pub(crate) struct ModelLock(BatchSemaphore);

// SAFETY: there is one permit, taken by whoever locks and given back by whoever unlocks.
unsafe impl RawMutex for ModelLock {
    const INIT: Self = Self(BatchSemaphore::const_new(1, Fairness::Unfair));

    type GuardMarker = lock_api::GuardSend;

    fn lock(&self) {
        self.0.acquire_blocking(1).expect("never closed");
    }

    fn try_lock(&self) -> bool {
        self.0.try_acquire(1).is_ok()
    }

    unsafe fn unlock(&self) {
        self.0.release(1);
    }
}

/// Guest RAM; page tables are looked at and changed one step at a time.
pub(crate) struct ModelStore {
    ram: SimStore<parking_lot::RawMutex>,
    step: AtomicU64,
}

impl ModelStore {
    pub(crate) fn new(range: PfnRange) -> Self {
        Self {
            ram: SimStore::new(range),
            step: AtomicU64::new(0),
        }
    }

    /// Lets another thread go first.
    fn step(&self) {
        self.step.load(SeqCst);
    }
}

impl FrameStore for ModelStore {
    fn load(&self, table: Pfn, index: EntryIndex) -> u64 {
        self.step();
        self.ram.load(table, index)
    }

    fn swap(&self, table: Pfn, index: EntryIndex, new: u64) -> u64 {
        self.step();
        self.ram.swap(table, index, new)
    }

    fn compare_exchange(&self, t: Pfn, index: EntryIndex, old: u64, new: u64) -> Result<u64, u64> {
        self.step();
        self.ram.compare_exchange(t, index, old, new)
    }

    fn zero(&self, frame: Pfn) {
        self.step();
        self.ram.zero(frame);
    }

    fn copy(&self, from: Pfn, to: Pfn) {
        self.step();
        self.ram.copy(from, to);
    }

    fn read(&self, frame: Pfn, offset: usize, into: &mut [u8]) {
        self.step();
        self.ram.read(frame, offset, into);
    }

    fn write(&self, frame: Pfn, offset: usize, from: &[u8]) {
        self.step();
        self.ram.write(frame, offset, from);
    }
}

/// The platform of the model.
pub(crate) struct Model;

impl Platform for Model {
    type Store = ModelStore;
    type Lock = ModelLock;
    type Backing = SimFile;
}
