//! Letting go of shared tables: what an exit costs does not depend on what it shares.

use crate::addr::{Level, Pfn, Vpn, VpnRange};
use crate::backend::Platform;
use crate::flush::Flush;
use crate::manager::Manager;
use crate::pte::UpperEntry;
use crate::shadow::{Cursor, LeafRun};
use crate::space::books::Books;
use crate::space::own::count_tables;
use crate::space::{Space, SpaceState};

/// What a space lets go of.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Leaving {
    /// Some of its pages.
    Range,
    /// All of them, for good: nothing runs in it any more, so nothing can be stale.
    Space,
}

impl<P: Platform> Manager<P> {
    /// Takes the shared tables that translate pages of the range from a space; true if there were any. Pages go
    /// with a table only if nobody else has it.
    pub(super) fn drop_shared(
        &self,
        space: &Space<P>,
        state: &mut SpaceState<P::Backing>,
        (range, leaving): (VpnRange, Leaving),
        flush: &mut Flush,
    ) -> bool {
        let cursor = space.cursor(&self.store);
        let root = (cursor.root(), Level::Root);
        self.drop_shared_below(&cursor, state, (root, range, leaving), flush)
    }

    fn drop_shared_below(
        &self,
        cursor: &Cursor<'_, P::Store>,
        state: &mut SpaceState<P::Backing>,
        ((table, level), range, leaving): ((Pfn, Level), VpnRange, Leaving),
        flush: &mut Flush,
    ) -> bool {
        let Some(below) = level.below() else {
            return false;
        };
        let mut found = false;
        for (index, part, entry) in cursor.children((table, level), range) {
            match entry {
                UpperEntry::Table(child) => {
                    let below = ((child, below), part, leaving);
                    found |= self.drop_shared_below(cursor, state, below, flush);
                }
                UpperEntry::Shared(child) => {
                    debug_assert_eq!(part.count(), level.pages(), "an edge was not owned");
                    // The tables of a space that goes are counted all at once.
                    if leaving == Leaving::Range {
                        let tables = 1 + count_tables(cursor, (child, below), part);
                        state.lose_tables(tables as u64);
                        self.pfns.lock().release_tables(tables as u64);
                        flush.edit(table, index, part.start());
                    }
                    cursor.unlink(&mut self.pfns.lock(), table, index);
                    self.drop_table(cursor, (child, below), (part.start(), leaving), flush);
                    found = true;
                }
                UpperEntry::Empty | UpperEntry::Large(_) => {}
            }
        }
        found
    }

    /// One entry that named a table is gone. If it was the last, so are the table and all below it.
    fn drop_table(
        &self,
        cursor: &Cursor<'_, P::Store>,
        (table, level): (Pfn, Level),
        (start, leaving): (Vpn, Leaving),
        flush: &mut Flush,
    ) {
        {
            let mut db = self.pfns.lock();
            if db.drop_parent(table) {
                if leaving == Leaving::Range {
                    // Until the flush is done somebody may still walk through it.
                    db.hold(table);
                    flush.hold(table);
                }
                return;
            }
        }
        // Nothing names it any more: nobody else gets here, and no lock is needed to walk it.
        let end = start.get() + level.pages() * crate::addr::TABLE_ENTRIES as u64;
        match (level.below(), VpnRange::between(start, end)) {
            (None, Some(range)) => {
                let run = LeafRun::whole(table, range);
                self.zap_leaf(cursor, &mut Books::Shared, run, flush);
            }
            (Some(below), _) => {
                for index in cursor.used(table) {
                    let child = cursor.upper(table, index).table();
                    let at = start.checked_add(index.get() as u64 * level.pages());
                    if let Some((child, at)) = child.zip(at) {
                        self.drop_table(cursor, (child, below), (at, leaving), flush);
                    }
                }
            }
            (None, None) => debug_assert!(false, "a leaf table translates no pages"),
        }
        let mut db = self.pfns.lock();
        db.retire_table(table);
        flush.whole_table(table);
        flush.hold(table);
    }
}
