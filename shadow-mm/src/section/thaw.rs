//! A store to a page of a section that is a layer's: the page is *thawed*, copied into a frame of the section's own, and
//! whoever maps the layer's frame loses it first.
//!
//! Views map a layer's frame read-only in as many spaces as like, and one store changes the page for all of them. So the
//! page cannot be mapped from the moment it is copied until each space has lost its entries and the flushes of that are
//! done: else somebody might store to the copy, and tell another who still sees the layer. It is as if it were being read:
//! who wants it waits. Pages that nobody stores to stay the layer's.

use alloc::vec::Vec;

use crate::addr::{Pfn, VpnRange};
use crate::backend::Platform;
use crate::flush::{Flush, TableEdits};
use crate::manager::{Demand, Manager};
use crate::pfn::Want;
use crate::proto::{Section, SectionPage};
use crate::pte::Entry;
use crate::section::punch::part;
use crate::space::{Space, SpaceState};
use crate::stats::add;

/// Pages of a section to be thawed. It holds nothing: dropping it costs nothing.
#[derive(Clone, Debug)]
#[must_use = "who wants to store has Manager::thaw copy the pages"]
pub struct Thaw<B> {
    section: Section<B>,
    first: SectionPage,
    count: usize,
}

/// No frame is left for a page of a section.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("no frame is left")]
pub struct NoFrame;

impl<B: Clone> Thaw<B> {
    /// The page that is wanted, and `count` pages in all if the layer has them and frames are not short.
    pub(crate) fn new(section: &Section<B>, first: SectionPage, count: usize) -> Self {
        Self {
            section: section.clone(),
            first,
            count: count.max(1),
        }
    }

    /// The same, and as many as `pages` in all.
    pub fn ahead(self, pages: usize) -> Self {
        Self {
            count: self.count.max(pages),
            ..self
        }
    }
}

impl<P: Platform> Manager<P> {
    /// Copies pages of a layer into frames of their section's own, as far as nobody has done so. `done` has the flushes done, and
    /// returns when they are: no virtual CPU reads the layer's pages there any more. No lock may be held, and `done`
    /// may wait.
    ///
    /// # Errors
    /// [`NoFrame`]; nothing has changed then.
    pub fn thaw(
        &self,
        wanted: &Thaw<P::Backing>,
        done: impl FnOnce(Vec<Flush>),
    ) -> Result<(), NoFrame> {
        let section = &wanted.section;
        let sources = self.frozen_sources(wanted);
        if sources.is_empty() {
            return Ok(());
        }
        let demand = Demand {
            tables: 0,
            data: 1,
            extra: sources.len() - 1,
            want: Want::Anything,
        };
        let reserve = self.reserve(demand).ok_or(NoFrame)?;
        let frames = reserve.data.into_iter().map(|frame| frame.forget_content());
        let copies: Vec<_> = frames
            .zip(sources)
            .map(|(frame, (page, from))| (page, frame.copy_of(from, &self.store)))
            .collect();
        let first = wanted.first.get();
        let range = first..first + copies.len() as u64;
        let mut thawed = Vec::new();
        let mut db = self.pfns.lock();
        for (page, copy) in copies {
            match db
                .sections
                .get_mut(section.id())
                .cut_frozen(page.get()..page.get() + 1)
            {
                0 => db.discard(copy),
                _ => thawed.push(db.begin_thaw(section.id(), page, copy)),
            }
        }
        drop(db);
        add(&self.counters.pages_thawed, thawed.len() as u64);
        let mut flushes = Vec::new();
        self.for_each_viewer(section, |space, state, views| {
            let mut flush = space.no_flush();
            for range in views.iter().filter_map(|view| part(view, &range)) {
                self.drop_frozen(space, state, range, &mut flush);
            }
            flushes.push(flush.finish());
        });
        done(flushes);
        let mut db = self.pfns.lock();
        thawed.into_iter().for_each(|frame| db.end_thaw(frame));
        Ok(())
    }

    /// The wanted page and those that follow it, as far as they are a layer's, with its frames.
    fn frozen_sources(&self, wanted: &Thaw<P::Backing>) -> Vec<(SectionPage, Pfn)> {
        let db = self.pfns.lock();
        let state = db.sections.get(wanted.section.id());
        let first = wanted.first.get();
        let pages = (first..first + wanted.count as u64).map_while(|page| {
            let page = SectionPage::new(page)?;
            Some((page, state.frozen(page)?))
        });
        pages.collect()
    }

    /// Empties the entries of views' pages that map a layer's frame; what lies over the space's image stays. Tables may
    /// be shared: such entries say nothing that the section does not, and go for all.
    pub(super) fn drop_frozen(
        &self,
        space: &Space<P>,
        state: &mut SpaceState<P::Backing>,
        range: VpnRange,
        flush: &mut Flush,
    ) {
        if !state.alive {
            return;
        }
        let cursor = space.cursor(&self.store);
        let mut emptied = false;
        cursor.for_each_leaf(range, |run| {
            let mut db = self.pfns.lock();
            let mut edits = TableEdits::new(run.table);
            for (index, vpn) in run.pages() {
                let frozen = matches!(cursor.leaf(run.table, index), Entry::Frozen(_));
                if frozen && state.images.find(vpn).is_none() && cfg!(not(mutant = "thaw_unseen")) {
                    cursor.remove(&mut db, run.table, index);
                    if cfg!(not(mutant = "thaw_unflushed")) {
                        edits.add(index, vpn);
                    }
                    add(&self.counters.entries_written, 1);
                    emptied |= !run.shared;
                }
            }
            drop(db);
            if run.shared && !edits.is_empty() {
                flush.widen();
            }
            flush.absorb(edits);
        });
        if emptied {
            state.tables -= cursor.prune(&mut self.pfns.lock(), range, flush);
        }
    }
}
