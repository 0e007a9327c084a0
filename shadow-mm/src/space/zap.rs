//! Taking the pages of a range away. The mappings are the caller's business.

use crate::addr::VpnRange;
use crate::backend::Platform;
use crate::flush::{Flush, TableEdits};
use crate::manager::Manager;
use crate::pfn::PfnDatabase;
use crate::pte::{Entry, EntryFlags, ValidEntry};
use crate::shadow::LeafRun;
use crate::space::{Space, SpaceState};
use crate::stats::add;

impl<P: Platform> Manager<P> {
    /// Empties every entry of the range, drops what the entries referred to, and frees the tables that
    /// became empty. The frames wait for the flush. Pages beyond the user range are left alone: there
    /// are the supervisor's tables, which all spaces share.
    pub(crate) fn zap(
        &self,
        space: &Space<P>,
        state: &mut SpaceState<P::Backing>,
        range: VpnRange,
        flush: &mut Flush,
    ) {
        let part = if cfg!(mutant = "supervisor_zapped") {
            Some(range)
        } else {
            self.user_part(range)
        };
        let Some(range) = part.filter(|_| state.alive) else {
            return;
        };
        let cursor = space.cursor(&self.store);
        let mut found = false;
        cursor.for_each_leaf(range, |run| {
            found = true;
            self.zap_leaf(space, state, run, flush);
        });
        if found {
            state.tables -= cursor.prune(&mut self.pfns.lock(), range, flush);
        }
    }

    fn zap_leaf(
        &self,
        space: &Space<P>,
        state: &mut SpaceState<P::Backing>,
        run: LeafRun,
        flush: &mut Flush,
    ) {
        let cursor = space.cursor(&self.store);
        let mut db = self.pfns.lock();
        let mut edits = TableEdits::new(run.table);
        let mut removed = 0;
        for (index, vpn) in run.pages() {
            if cursor.leaf(run.table, index) == Entry::Empty {
                continue;
            }
            if let Entry::Valid(old) = cursor.remove(&mut db, run.table, index) {
                drop_page(&mut db, state, old);
                if cfg!(mutant = "early_reuse") {
                    db.release(old.frame);
                } else {
                    flush.hold(old.frame);
                }
                edits.add(index, vpn);
                removed += 1;
            }
        }
        flush.absorb(edits);
        add(&self.counters.entries_written, removed);
    }
}

/// A space's entry for a frame is gone: the share, the clone block's reference and the counts follow.
/// The frame keeps a reference for the flush.
pub(super) fn drop_page<B: Clone + Eq>(
    db: &mut PfnDatabase,
    state: &mut SpaceState<B>,
    old: ValidEntry,
) {
    if old.flags.contains(EntryFlags::DIRTY) {
        db.mark_modified(old.frame);
    }
    match db.block_of(old.frame) {
        Some(block) => {
            state.descriptors.drop_reference(db, block);
        }
        // A section's page, or one its section has lost.
        None if old.flags.contains(EntryFlags::PROTOTYPE) => {}
        None => state.private -= 1,
    }
    db.drop_share_held(old.frame);
    state.resident -= 1;
}
