//! Freeing tables that became empty.

use super::cursor::Cursor;
use crate::addr::{Level, Pfn, VpnRange};
use crate::backend::FrameStore;
use crate::flush::{Flush, TableEdits};
use crate::pfn::PfnDatabase;
use crate::pte::UpperEntry;

/// The share count of a table with no entry in use.
const EMPTY_TABLE_SHARE: u32 = 1;

impl<S: FrameStore> Cursor<'_, S> {
    /// Unlinks every table on the paths to the range's pages that has no entry in use any more; never
    /// the root, and never one that is or may be shared. The frames wait for the flush. Gives back how many tables went.
    pub(crate) fn prune(&self, db: &mut PfnDatabase, range: VpnRange, flush: &mut Flush) -> u64 {
        self.prune_below(db, (self.root, Level::Root), range, flush)
    }

    fn prune_below(
        &self,
        db: &mut PfnDatabase,
        (table, level): (Pfn, Level),
        range: VpnRange,
        flush: &mut Flush,
    ) -> u64 {
        let Some(below) = level.below() else { return 0 };
        let mut freed = 0;
        let mut edits = TableEdits::new(table);
        for (index, part, entry) in self.children((table, level), range) {
            let UpperEntry::Table(child) = entry else {
                continue;
            };
            freed += self.prune_below(db, (child, below), part, flush);
            if db.entry(child).share() > EMPTY_TABLE_SHARE || cfg!(mutant = "leaked_table") {
                continue;
            }
            self.unlink(db, table, index);
            db.release_tables(1);
            db.drop_table_held(child);
            flush.whole_table(child);
            flush.hold(child);
            edits.add(index, part.start());
            freed += 1;
        }
        flush.absorb(edits);
        freed
    }
}
