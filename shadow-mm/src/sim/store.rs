//! Guest RAM in ordinary memory. Frames are made when they are first stored to.

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, Ordering::SeqCst};

use lock_api::Mutex;

use crate::addr::{EntryIndex, PAGE_SIZE, Pfn, PfnRange, TABLE_ENTRIES};
use crate::backend::FrameStore;

type Frame = [AtomicU64; TABLE_ENTRIES];
const WORD: usize = size_of::<u64>();

/// Simulated RAM: a run of frames, all zero at first.
pub struct SimStore<L> {
    range: PfnRange,
    frames: Vec<Mutex<L, Option<Arc<Frame>>>>,
}

impl<L: lock_api::RawMutex> SimStore<L> {
    /// RAM with these frames.
    #[must_use]
    pub fn new(range: PfnRange) -> Self {
        let frames = (0..range.count).map(|_| Mutex::new(None)).collect();
        Self { range, frames }
    }

    /// Frames that were stored to.
    #[must_use]
    pub fn frames_made(&self) -> usize {
        self.frames
            .iter()
            .filter(|frame| frame.lock().is_some())
            .count()
    }

    fn slot(&self, pfn: Pfn) -> &Mutex<L, Option<Arc<Frame>>> {
        assert!(
            self.range.contains(pfn),
            "{pfn:?} is no frame of the simulated RAM"
        );
        &self.frames[(pfn.get() - self.range.start.get()) as usize]
    }

    fn existing(&self, pfn: Pfn) -> Option<Arc<Frame>> {
        self.slot(pfn).lock().clone()
    }

    fn made(&self, pfn: Pfn) -> Arc<Frame> {
        let mut slot = self.slot(pfn).lock();
        Arc::clone(
            slot.get_or_insert_with(|| Arc::new([const { AtomicU64::new(0) }; TABLE_ENTRIES])),
        )
    }
}

impl<L: lock_api::RawMutex + Send + Sync> FrameStore for SimStore<L> {
    fn load(&self, table: Pfn, index: EntryIndex) -> u64 {
        self.existing(table)
            .map_or(0, |frame| frame[index.get()].load(SeqCst))
    }

    fn swap(&self, table: Pfn, index: EntryIndex, new: u64) -> u64 {
        self.made(table)[index.get()].swap(new, SeqCst)
    }

    fn compare_exchange(
        &self,
        table: Pfn,
        index: EntryIndex,
        current: u64,
        new: u64,
    ) -> Result<u64, u64> {
        self.made(table)[index.get()].compare_exchange(current, new, SeqCst, SeqCst)
    }

    fn zero(&self, frame: Pfn) {
        *self.slot(frame).lock() = None;
    }

    fn copy(&self, from: Pfn, to: Pfn) {
        let Some(source) = self.existing(from) else {
            return self.zero(to);
        };
        let target = self.made(to);
        for (source, target) in source.iter().zip(target.iter()) {
            target.store(source.load(SeqCst), SeqCst);
        }
    }

    fn read(&self, frame: Pfn, offset: usize, into: &mut [u8]) {
        assert!(offset + into.len() <= PAGE_SIZE, "a read leaves the frame");
        let frame = self.existing(frame);
        for (at, byte) in (offset..).zip(into) {
            let word = frame
                .as_ref()
                .map_or(0, |frame| frame[at / WORD].load(SeqCst));
            *byte = word.to_le_bytes()[at % WORD];
        }
    }

    fn write(&self, frame: Pfn, offset: usize, from: &[u8]) {
        assert!(offset + from.len() <= PAGE_SIZE, "a write leaves the frame");
        let frame = self.made(frame);
        for (at, byte) in (offset..).zip(from) {
            let shift = 8 * (at % WORD);
            let change = |word: u64| Some((word & !(0xff << shift)) | (u64::from(*byte) << shift));
            // The closure never refuses, so neither does the update.
            let _ = frame[at / WORD].fetch_update(SeqCst, SeqCst, change);
        }
    }
}
