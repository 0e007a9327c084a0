//! Going back to what lies under a space: a clone becomes its template again.
//!
//! What a space has for itself is given up, wherever it is; pages of layers are mapped again where they were. What shows a
//! section's own frames stays, and so do the mappings, the image and the tables. Leaf tables in which everything is a
//! layer's are not looked into: their entries are counted ([`crate::pfn`]). So what it costs is a look at the upper
//! tables, and the leaf tables with pages that were stored to.
//!
//! Mappings that have changed since are the caller's business: [`Manager::shape`] tells whether they have.

use alloc::vec::Vec;

use crate::addr::{TABLE_ENTRIES, Vpn, VpnRange};
use crate::backend::Platform;
use crate::flush::{Flush, TableEdits};
use crate::manager::{Demand, Manager};
use crate::pte::Entry;
use crate::shadow::{Cursor, LeafRun};
use crate::space::books::Books;
use crate::space::frozen::frozen_around;
use crate::space::own::Owning;
use crate::space::zap::drop_entry;
use crate::space::{Space, SpaceState};
use crate::stats::add;

/// Why a space did not go back. Nothing has changed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ResetError {
    /// The space is being torn down.
    #[error("the address space is being torn down")]
    SpaceDeleted,
    /// It shares tables, and there is no memory for copies of them.
    #[error("no memory for copies of {tables} page tables")]
    NoMemory {
        /// Tables to be copied.
        tables: usize,
    },
}

/// What is mapped where in a space, and what lies under it, as far as two moments can be told apart.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Shape(u64, u64);

impl<P: Platform> Manager<P> {
    /// The space's shape: as long as it is the same, no mapping and nothing of the image has changed.
    #[must_use]
    pub fn shape(&self, space: &Space<P>) -> Shape {
        let state = space.state.lock();
        Shape(state.vads.changes(), state.images.changes())
    }

    /// Gives up all pages that the space has for itself: what lies under them is seen again, the image, a private
    /// view's file, or zeroes. Shared memory is as it is.
    ///
    /// # Errors
    /// See [`ResetError`]; nothing has changed then.
    pub fn reset_to_image(&self, space: &Space<P>) -> Result<Flush, ResetError> {
        let mut flush = space.no_flush();
        let mut state = space.state.lock();
        let end = self.limits.user_end.vpn().get();
        let all = Vpn::new(0).and_then(|zero| VpnRange::between(zero, end));
        let all = all.filter(|_| state.alive);
        let all = all.ok_or(ResetError::SpaceDeleted)?;
        let needs = self.range_needs(space, all);
        let tables = needs.tables();
        let reserve = self.reserve_for(needs, Demand::tables(tables));
        let mut reserve = reserve.ok_or(ResetError::NoMemory { tables })?;
        let owning = Owning {
            tables: &mut reserve.tables,
            flush: &mut flush,
        };
        self.own_range((space, &mut *state), all, owning);
        self.give_back(reserve);
        let cursor = space.cursor(&self.store);
        let mut emptied = Vec::new();
        cursor.for_each_leaf(all, |run| {
            if self.reset_leaf(&cursor, &mut state, run, &mut flush) {
                emptied.push(run.range());
            }
        });
        for range in emptied {
            state.tables -= cursor.prune(&mut self.pfns.lock(), range, &mut flush);
        }
        state.forget_peaks();
        add(&self.counters.resets, 1);
        Ok(flush.finish())
    }

    /// Gives up the pages of one leaf table; true if nothing is left in it.
    fn reset_leaf(
        &self,
        cursor: &Cursor<'_, P::Store>,
        state: &mut SpaceState<P::Backing>,
        run: LeafRun,
        flush: &mut Flush,
    ) -> bool {
        let mut db = self.pfns.lock();
        if db.entry(run.table).unfrozen() == 0 {
            return false;
        }
        let mut edits = TableEdits::new(run.table);
        let (mut given_up, mut written) = ([false; TABLE_ENTRIES], 0);
        for (index, vpn) in run.pages() {
            match cursor.leaf(run.table, index) {
                Entry::Empty | Entry::Frozen(_) => continue,
                Entry::Valid(entry) if db.is_sections(entry) => continue,
                Entry::Valid(_)
                | Entry::DemandZero(_)
                | Entry::Decommitted
                | Entry::Prototype(_)
                | Entry::Transition(_)
                | Entry::PageFile(_) => {}
            }
            let old = cursor.remove(&mut db, run.table, index);
            if drop_entry(&mut db, &mut Books::Own(&mut *state), old, flush) {
                edits.add(index, vpn);
            }
            given_up[index.get()] = true;
            written += 1;
        }
        add(&self.counters.pages_reset, written);
        if written > 0 {
            let frozen = frozen_around(state, run.range().start());
            for (index, entry) in frozen.into_iter().filter(|(i, _)| given_up[i.get()]) {
                cursor.put(&mut db, (run.table, index), Entry::Frozen(entry));
                written += 1;
            }
        }
        // A table that has something has a share besides its own.
        let empty = db.entry(run.table).share() == 1;
        drop(db);
        flush.absorb(edits);
        add(&self.counters.entries_written, written);
        empty
    }
}
