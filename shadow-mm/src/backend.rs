//! What the embedder supplies: guest RAM, locks, and a handle for mapped files.

use core::fmt::Debug;

use crate::addr::{EntryIndex, Pfn};

/// The embedder's types.
pub trait Platform: 'static {
    /// Guest RAM.
    type Store: FrameStore;
    /// The raw mutex every lock of the manager is made of.
    type Lock: lock_api::RawMutex + Send + Sync;
    /// The handle of a mapped file. The manager keeps clones of it in VADs and I/O tickets, compares
    /// them, and drops them when nothing maps the file any more, the last one with no lock held.
    type Backing: Clone + Eq + Send + Sync + Debug;
}

/// Guest RAM, by frame.
///
/// Table entries are accessed atomically, because hardware (or KVM) sets accessed and dirty bits at
/// any moment. Frames outside the pool are never named. An offset or length that leaves the frame is a
/// bug of the manager, and an implementation may assert.
pub trait FrameStore: Send + Sync {
    /// Reads one table entry.
    fn load(&self, table: Pfn, index: EntryIndex) -> u64;
    /// Replaces one table entry and gives back what it was.
    fn swap(&self, table: Pfn, index: EntryIndex, new: u64) -> u64;
    /// Replaces one table entry if it is still `current`; otherwise says what it is.
    ///
    /// # Errors
    /// The entry's value, if that is not `current`. There are no spurious failures.
    fn compare_exchange(
        &self,
        table: Pfn,
        index: EntryIndex,
        current: u64,
        new: u64,
    ) -> Result<u64, u64>;
    /// Fills a frame with zeroes.
    fn zero(&self, frame: Pfn);
    /// Copies a whole frame.
    fn copy(&self, from: Pfn, to: Pfn);
    /// Reads bytes of one frame, from byte `offset`.
    fn read(&self, frame: Pfn, offset: usize, into: &mut [u8]);
    /// Writes bytes of one frame, from byte `offset`.
    fn write(&self, frame: Pfn, offset: usize, from: &[u8]);
}
