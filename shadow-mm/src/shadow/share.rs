//! The entries that name shared tables.

use super::cursor::Cursor;
use crate::addr::{EntryIndex, Pfn};
use crate::backend::FrameStore;
use crate::pfn::PfnDatabase;
use crate::pte::UpperEntry;

impl<S: FrameStore> Cursor<'_, S> {
    /// Names a table, as one that is shared, in an empty entry of an upper table.
    pub(crate) fn link_shared(&self, db: &mut PfnDatabase, place: (Pfn, EntryIndex), below: Pfn) {
        let raw = UpperEntry::Shared(below).encode();
        let old = self.store.swap(place.0, place.1, raw);
        debug_assert_eq!(old, 0, "a table was linked over something");
        db.add_share(place.0);
    }

    /// Makes an entry that names a table name another, or the same with other rights.
    pub(crate) fn relink(&self, place: (Pfn, EntryIndex), to: UpperEntry) {
        let old = self.store.swap(place.0, place.1, to.encode());
        debug_assert!(
            UpperEntry::decode(old).is_some_and(|old| old.table().is_some()),
            "{old:#x} named no table"
        );
    }

    /// Makes every entry of an upper table that names a table name it as a shared one; true if one of
    /// them did not.
    pub(crate) fn share_entries(&self, table: Pfn) -> bool {
        let mut changed = false;
        for index in self.used(table) {
            if let UpperEntry::Table(child) = self.upper(table, index) {
                if cfg!(not(mutant = "writable_below")) {
                    self.relink((table, index), UpperEntry::Shared(child));
                }
                changed = true;
            }
        }
        changed
    }
}
