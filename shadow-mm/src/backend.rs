//! What the embedder supplies: guest RAM, locks, and a handle for mapped files.

use core::fmt::Debug;

use crate::addr::{EntryIndex, Pfn, PfnRange, TABLE_ENTRIES, UsedEntries};

/// The embedder's types.
pub trait Platform: 'static {
    /// Guest RAM.
    type Store: FrameStore;
    /// The raw mutexes the manager's locks are made of: one type for all of them, or a type for each
    /// place in the tree.
    type Lock: Locks;
    /// The handle of a mapped file. The manager keeps clones of it in VADs and I/O tickets, compares
    /// them, and drops them when nothing maps the file any more, the last one with no lock held.
    type Backing: Clone + Eq + Send + Sync + Debug;
}

/// The raw mutexes of the manager's locks, by their place in the tree of locks (see the crate's
/// documentation). Any raw mutex is a family of its own that does not tell the places apart; an embedder
/// that checks the order gives each place a type that knows its rank.
pub trait Locks: 'static {
    /// Of changes of the supervisor's tables.
    type Supervisor: lock_api::RawMutex + Send + Sync;
    /// Of a space.
    type Space: lock_api::RawMutex + Send + Sync;
    /// Of a section. None has a lock of its own today.
    type Section: lock_api::RawMutex + Send + Sync;
    /// Of the PFN database.
    type Pfns: lock_api::RawMutex + Send + Sync;
    /// Of the list of spaces: the last.
    type Registry: lock_api::RawMutex + Send + Sync;
}

impl<L: lock_api::RawMutex + Send + Sync + 'static> Locks for L {
    type Supervisor = L;
    type Space = L;
    type Section = L;
    type Pfns = L;
    type Registry = L;
}

/// The lock of a space.
pub(crate) type SpaceMutex<P, T> = lock_api::Mutex<<<P as Platform>::Lock as Locks>::Space, T>;
/// A locked space.
pub(crate) type SpaceGuard<'a, P, T> =
    lock_api::MutexGuard<'a, <<P as Platform>::Lock as Locks>::Space, T>;
/// The lock of the PFN database.
pub(crate) type PfnMutex<P, T> = lock_api::Mutex<<<P as Platform>::Lock as Locks>::Pfns, T>;
/// The lock of the list of spaces.
pub(crate) type RegistryMutex<P, T> =
    lock_api::Mutex<<<P as Platform>::Lock as Locks>::Registry, T>;
/// The lock of the supervisor's tables.
pub(crate) type SupervisorMutex<P> =
    lock_api::Mutex<<<P as Platform>::Lock as Locks>::Supervisor, ()>;

/// Guest RAM, by frame.
///
/// Table entries are accessed atomically, because hardware (or KVM) sets accessed and dirty bits at
/// any moment. Frames outside the pool are never named. An offset or length that leaves the frame is a
/// bug of the manager, and an implementation may assert.
pub trait FrameStore: Send + Sync {
    /// Reads one table entry.
    fn load(&self, table: Pfn, index: EntryIndex) -> u64;
    /// Reads all entries of a table, each as [`Self::load`] does. A store that can look at a table as a whole is faster at
    /// it than one that is asked for each.
    fn entries(&self, table: Pfn) -> [u64; TABLE_ENTRIES] {
        let mut words = [0; TABLE_ENTRIES];
        for (index, word) in EntryIndex::all().zip(&mut words) {
            *word = self.load(table, index);
        }
        words
    }
    /// Which entries of a table are not zero.
    fn used(&self, table: Pfn) -> UsedEntries {
        UsedEntries::of(&self.entries(table))
    }
    /// Fills a table of zeroes that nobody else knows of yet: hardware has not seen it.
    fn fill(&self, table: Pfn, entries: &[u64; TABLE_ENTRIES]) {
        for (index, new) in EntryIndex::all().zip(entries).filter(|(_, new)| **new != 0) {
            self.swap(table, index, *new);
        }
    }
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
    /// Replaces entries of a table that were `old` when they were looked at by what `new` says, those where it says something
    /// else. Bits that hardware has set in one since, which is all that can have changed, stay set.
    fn exchange(&self, table: Pfn, old: &[u64; TABLE_ENTRIES], new: &[u64; TABLE_ENTRIES]) {
        for (index, (old, new)) in EntryIndex::all().zip(old.iter().zip(new)) {
            exchange_word(*old, *new, |old, new| {
                self.compare_exchange(table, index, old, new)
            });
        }
    }
    /// Data frames that were never used are about to be: from now on guests may reach them. Called once for each, in order,
    /// with the PFN lock held; what makes frames reachable may so be made as they are used. False if that cannot be:
    /// then these frames and those after them do not exist.
    fn open(&self, frames: PfnRange) -> bool {
        let _all_are_reachable = frames;
        true
    }
    /// Fills a frame with zeroes.
    fn zero(&self, frame: Pfn);
    /// Fills free frames with zeroes that follow each other, in a way that takes no memory of the host until they are used, if there is one.
    fn discard(&self, frames: PfnRange) {
        (0..frames.count).for_each(|n| self.zero(Pfn::new(frames.start.get() + n)));
    }
    /// Copies a whole frame.
    fn copy(&self, from: Pfn, to: Pfn);
    /// Reads bytes of one frame, from byte `offset`.
    fn read(&self, frame: Pfn, offset: usize, into: &mut [u8]);
    /// Writes bytes of one frame, from byte `offset`.
    fn write(&self, frame: Pfn, offset: usize, from: &[u8]);
}

/// Replaces an entry that was `old` by `new` and the bits that are set in it by now, if the two differ; `compare` is
/// [`FrameStore::compare_exchange`] of that entry. For implementations of [`FrameStore::exchange`].
#[inline]
pub fn exchange_word(old: u64, new: u64, compare: impl Fn(u64, u64) -> Result<u64, u64>) {
    if old == new {
        return;
    }
    let mut seen = old;
    while let Err(now) = compare(seen, new | (seen & !old)) {
        seen = now;
    }
}
