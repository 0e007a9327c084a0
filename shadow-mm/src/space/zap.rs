//! Taking the pages of a range away. The mappings are the caller's business.

use crate::addr::VpnRange;
use crate::backend::Platform;
use crate::flush::{Flush, TableEdits};
use crate::manager::Manager;
use crate::pfn::{Owner, PfnDatabase};
use crate::proto::BlockContent;
use crate::pte::{Entry, EntryFlags, ValidEntry};
use crate::shadow::{Cursor, LeafRun};
use crate::space::books::Books;
use crate::space::leave::Leaving;
use crate::space::{Space, SpaceState};
use crate::stats::add;

impl<P: Platform> Manager<P> {
    /// Empties every entry of the range, drops what the entries referred to, and frees the tables that
    /// became empty. The frames wait for the flush. Pages beyond the user range are left alone: there
    /// are the supervisor's tables, which all spaces share.
    ///
    /// The caller owns the edges ([`Manager::own_edges`]): a shared table then translates pages of the range
    /// only, and is let go as a whole.
    pub(crate) fn zap(
        &self,
        space: &Space<P>,
        state: &mut SpaceState<P::Backing>,
        range: VpnRange,
        flush: &mut Flush,
    ) {
        self.zap_leaving(space, state, (range, Leaving::Range), flush);
    }

    /// As [`Self::zap`], perhaps of a space that goes for good.
    pub(super) fn zap_leaving(
        &self,
        space: &Space<P>,
        state: &mut SpaceState<P::Backing>,
        (range, leaving): (VpnRange, Leaving),
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
        if cfg!(not(mutant = "image_survives")) {
            drop(state.carve_image(range));
        }
        let cursor = space.cursor(&self.store);
        let mut found = self.drop_shared(space, state, (range, leaving), flush);
        // Unsharing may have left tables with nothing in them.
        found |= leaving == Leaving::Space;
        cursor.for_each_leaf(range, |run| {
            found = true;
            self.zap_leaf(&cursor, &mut Books::Own(state), run, flush);
        });
        if found {
            state.tables -= cursor.prune(&mut self.pfns.lock(), range, flush);
        }
    }

    /// Empties the entries of the run.
    pub(super) fn zap_leaf(
        &self,
        cursor: &Cursor<'_, P::Store>,
        books: &mut Books<'_, P::Backing>,
        run: LeafRun,
        flush: &mut Flush,
    ) {
        let mut db = self.pfns.lock();
        let mut edits = TableEdits::new(run.table);
        let mut removed = 0;
        for (index, vpn) in run.used(cursor) {
            let old = cursor.remove(&mut db, run.table, index);
            if drop_entry(&mut db, books, old, flush) {
                edits.add(index, vpn);
            }
            removed += 1;
        }
        flush.absorb(edits);
        add(&self.counters.entries_written, removed);
    }
}

/// An entry is gone: what it referred to follows. True if a translation may be stale.
pub(super) fn drop_entry<B: Clone + Eq>(
    db: &mut PfnDatabase,
    books: &mut Books<'_, B>,
    old: Entry,
    flush: &mut Flush,
) -> bool {
    let stale = may_be_stale(db, old);
    match old {
        Entry::Valid(page) => {
            drop_page(db, books, page);
            if cfg!(mutant = "early_reuse") {
                db.release(page.frame);
            } else {
                flush.hold(page.frame);
            }
        }
        Entry::Transition(frame) => {
            books.lose_private(db);
            db.orphan(frame);
        }
        Entry::PageFile(slot) => {
            books.lose_private(db);
            db.slots.free(slot);
        }
        Entry::Prototype(block) => {
            if let Some(content) = books.drop_reference(db, block) {
                drop_content(db, content);
            }
        }
        // The layer has it, as before.
        Entry::Frozen(_) => {}
        Entry::Empty | Entry::DemandZero(_) | Entry::Decommitted => {}
    }
    stale
}

/// A clone block is gone, and no entry maps its page.
fn drop_content(db: &mut PfnDatabase, content: BlockContent) {
    match content {
        BlockContent::Resident(frame) => db.orphan(frame),
        BlockContent::PageFile(slot) => db.slots.free(slot),
        BlockContent::Zero => {}
    }
}

/// Whether a vCPU may still have a translation of an entry's page: always if the entry is present, and
/// else as long as the flush of the trim that made it invalid is not acknowledged.
pub(super) fn may_be_stale(db: &PfnDatabase, entry: Entry) -> bool {
    match entry {
        Entry::Valid(_) | Entry::Frozen(_) => true,
        Entry::Transition(frame) => db.is_held(frame),
        Entry::Prototype(block) => match db.clones.content(block) {
            BlockContent::Resident(frame) => db.is_held(frame),
            BlockContent::PageFile(_) | BlockContent::Zero => false,
        },
        Entry::PageFile(_) | Entry::Empty | Entry::DemandZero(_) | Entry::Decommitted => false,
    }
}

/// An entry for a frame is gone: the share, the clone block's reference and the counts follow.
/// The frame keeps a reference for the flush.
pub(super) fn drop_page<B: Clone + Eq>(
    db: &mut PfnDatabase,
    books: &mut Books<'_, B>,
    old: ValidEntry,
) {
    if old.flags.contains(EntryFlags::DIRTY) {
        db.mark_modified(old.frame);
    }
    let ownerless = match db.entry(old.frame).owner {
        Owner::Entry { .. } => {
            books.lose_private(db);
            true
        }
        Owner::Entries => db.leave_forked(old.frame),
        Owner::Clone(block) => books.drop_reference(db, block).is_some(),
        // A section's page, or one its section has lost.
        Owner::Section { .. } | Owner::None => false,
        owner @ (Owner::Tables | Owner::Root | Owner::Supervisor) => {
            debug_assert!(false, "{old:?} maps a table: {owner:?}");
            false
        }
    };
    db.drop_share_held(old.frame);
    if ownerless {
        db.orphan(old.frame);
    }
    books.lose_resident();
}
