//! A leaf table that is made outside guest memory and written there in one piece: nobody walks through it before it is
//! named in an upper table, so its entries need no exchanges.

use super::cursor::Cursor;
use crate::addr::{EntryIndex, Pfn, TABLE_ENTRIES};
use crate::backend::FrameStore;
use crate::pfn::PfnDatabase;
use crate::pte::Entry;

/// The entries, and what is to be counted for them.
pub(crate) struct NewLeaf {
    words: [u64; TABLE_ENTRIES],
    used: u32,
    unfrozen: u16,
}

impl NewLeaf {
    pub(crate) fn new() -> Self {
        Self {
            words: [0; TABLE_ENTRIES],
            used: 0,
            unfrozen: 0,
        }
    }

    /// Fills an entry that is empty with a raw one that is not.
    #[inline]
    pub(crate) fn put(&mut self, index: EntryIndex, raw: u64) {
        debug_assert_ne!(raw, 0);
        let word = &mut self.words[index.get()];
        debug_assert_eq!(*word, 0, "an entry was installed over something");
        *word = raw;
        self.used += 1;
        self.unfrozen += u16::from(Entry::is_unfrozen(raw));
    }

    /// The same with one that maps a frame of the pool, and that [`Self::count_mapped`] counts.
    #[inline]
    pub(crate) fn put_mapped(&mut self, index: EntryIndex, raw: u64) {
        debug_assert!(Entry::is_resident(raw));
        self.words[index.get()] = raw;
    }

    /// Counts entries that map frames of the pool.
    pub(crate) fn count_mapped(&mut self, entries: u16) {
        self.used += u32::from(entries);
        self.unfrozen += entries;
    }

    /// Entries in use.
    pub(crate) fn used(&self) -> u32 {
        self.used
    }
}

impl<S: FrameStore> Cursor<'_, S> {
    /// Fills a leaf table of zeroes that nobody else knows of.
    pub(crate) fn fill(&self, db: &mut PfnDatabase, table: Pfn, leaf: &NewLeaf) {
        self.store.fill(table, &leaf.words);
        db.add_shares(table, leaf.used);
        if cfg!(not(mutant = "uncounted_entry")) {
            db.add_unfrozen(table, leaf.unfrozen);
        }
    }
}
