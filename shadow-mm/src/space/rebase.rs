//! Rebasing: a space whose pages were copied to a layer comes to lie on it.
//!
//! A space is kept ([`Manager::keep`]), the kept one's pages are copied to a layer, and the space goes on meanwhile. What
//! it has not changed since is in memory twice then. Where the space still has a leaf table together with the kept one, nothing
//! that the table translates has changed: so the space gets a table of its own there, in which the layer's pages are mapped, and the
//! image lies under them. The table that both had is left to the kept space, and so are the frames, which go with it. It costs one
//! entry of a page directory to be flushed, and no entry of the old table changes.
//!
//! A leaf table that is the space's own is left alone, and so are its pages: something was stored to in those 2 MiB, and who stores
//! there again would pay a copy for each page.

use alloc::sync::Arc;
use alloc::vec::Vec;

use crate::addr::{EntryIndex, Level, TABLE_ENTRIES, Vpn, VpnRange};
use crate::backend::Platform;
use crate::flush::Flush;
use crate::manager::{Demand, Manager};
use crate::pte::{Entry, ValidEntry};
use crate::shadow::NewLeaf;
use crate::space::frozen::frozen_around;
use crate::space::own::{Owning, span};
use crate::space::{Space, SpaceState};
use crate::stats::add;
use crate::vad::{ImageRun, Sharing};

/// Pages that lie on an image.
#[derive(Debug)]
#[must_use]
pub struct Rebased {
    /// What the space had there before.
    pub flush: Flush,
    /// Pages that the image has now.
    pub pages: u64,
}

/// Why a space was not rebased. Nothing has changed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum RebaseError {
    /// The space is being torn down.
    #[error("the address space is being torn down")]
    SpaceDeleted,
    /// There is no frame for a page table.
    #[error("no memory for {tables} page tables")]
    NoMemory {
        /// Tables to be made.
        tables: usize,
    },
}

/// What a copy of a leaf table has instead of twins.
pub(super) struct Overlay {
    covered: [bool; TABLE_ENTRIES],
    pages: Vec<(EntryIndex, ValidEntry)>,
}

impl Overlay {
    /// Whether the copy has no twin of an entry.
    pub(super) fn covers(&self, index: EntryIndex) -> bool {
        self.covered[index.get()]
    }

    /// Puts the layer's pages into the copy.
    pub(super) fn fill(&self, leaf: &mut NewLeaf) {
        for (index, entry) in &self.pages {
            leaf.put(*index, Entry::Frozen(*entry).encode());
        }
    }
}

impl<P: Platform> Manager<P> {
    /// Whether a space has changed nothing that the leaf table of `page` translates since `kept` was kept of it, which is still
    /// there: whether [`Self::rebase`] would do something. None if the space is being torn down.
    #[must_use]
    pub fn is_as_kept(&self, space: &Space<P>, kept: &Space<P>, page: Vpn) -> Option<bool> {
        let state = space.state.lock();
        state.alive.then(|| self.has_same_leaf(space, kept, page))
    }

    fn has_same_leaf(&self, space: &Space<P>, kept: &Space<P>, page: Vpn) -> bool {
        let own = space.cursor(&self.store).find_leaf(page);
        own.is_some() && own == kept.cursor(&self.store).find_leaf(page)
    }

    /// Has those pages of a space that the leaf table of `page` translates lie on `image`: runs of the pages of a layer, rising, to
    /// which `kept` was copied, a space that was kept of this one and is still there. Nothing is done, and no page is counted, where the space has
    /// changed something since then.
    ///
    /// # Errors
    /// See [`RebaseError`]; nothing has changed then.
    pub fn rebase(
        &self,
        space: &Space<P>,
        kept: &Space<P>,
        page: Vpn,
        image: &[ImageRun<P::Backing>],
    ) -> Result<Rebased, RebaseError> {
        let mut rebased = Rebased {
            flush: space.no_flush(),
            pages: 0,
        };
        let Some(table) = span(Level::Directory, page) else {
            return Ok(rebased);
        };
        let parts = parts_of(image, table);
        let mut state = space.state.lock();
        if !state.alive {
            return Err(RebaseError::SpaceDeleted);
        }
        if parts.is_empty() || !parts.iter().all(|part| can_lie(&state, part)) {
            return Ok(rebased);
        }
        let needs = self.needs(space, page);
        let tables = needs.tables();
        let reserve = self.reserve_for(needs, Demand::tables(tables));
        let mut reserve = reserve.ok_or(RebaseError::NoMemory { tables })?;
        // What lay there before goes without the PFN lock.
        let mut before = Vec::new();
        let mut db = self.pfns.lock();
        if self.has_same_leaf(space, kept, page) || cfg!(mutant = "rebased_unseen") {
            rebased.pages = parts.iter().map(|part| part.range.count()).sum();
            let overlay = lay(&mut state, parts, (page, &mut before));
            let owning = Owning {
                tables: &mut reserve.tables,
                flush: &mut rebased.flush,
            };
            self.own_leaf_over((space, &mut *state), &mut db, (page, &overlay), owning);
            add(&self.counters.pages_frozen, overlay.pages.len() as u64);
            add(&self.counters.pages_rebased, rebased.pages);
        }
        drop(db);
        drop(before);
        self.give_back(reserve);
        rebased.flush = rebased.flush.finish();
        Ok(rebased)
    }
}

/// What of an image is under the pages of a range.
fn parts_of<B: Clone>(image: &[ImageRun<B>], range: VpnRange) -> Vec<ImageRun<B>> {
    let first = image.partition_point(|run| run.range.end() <= range.start().get());
    let runs = image.iter().skip(first);
    runs.map_while(|run| run.part(range)).collect()
}

/// Whether a run of an image can lie under a space: all of it is a layer's, and under private mappings.
fn can_lie<B: Clone + Eq>(state: &SpaceState<B>, part: &ImageRun<B>) -> bool {
    let private = |vpn: Vpn| {
        let vad = state.vads.find(vpn);
        let view = vad.map(|vad| vad.view());
        view.is_some_and(|view| view.is_none_or(|(_, _, sharing)| sharing == Sharing::Private))
    };
    let there = |vpn: Vpn| part.page(vpn).and_then(|page| part.section.frozen(page));
    let mut pages = part.range.iter();
    pages.all(|vpn| private(vpn) && there(vpn).is_some())
}

/// Puts the parts of an image under the pages of one leaf table; what was there goes to `before`.
fn lay<B: Clone + Eq>(
    state: &mut SpaceState<B>,
    parts: Vec<ImageRun<B>>,
    (page, before): (Vpn, &mut Vec<ImageRun<B>>),
) -> Overlay {
    let mut covered = [false; TABLE_ENTRIES];
    for part in parts {
        for vpn in part.range.iter() {
            covered[vpn.index(Level::Leaf).get()] = true;
        }
        before.extend(state.carve_image(part.range));
        Arc::make_mut(&mut state.images).insert(part);
    }
    let mut pages = frozen_around(state, page);
    pages.retain(|(index, _)| covered[index.get()]);
    Overlay { covered, pages }
}
