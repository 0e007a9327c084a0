//! Going back to what lies under a space: a clone becomes its template again.
//!
//! What a space has for itself is given up, wherever it is; pages of layers are mapped again where they were. What shows a
//! section's own frames stays, and so do the mappings, the image and the tables.
//!
//! Some pages the space *keeps*: frames, entries and all, and what lies under them is copied there. That takes less than a
//! fault, no entry changes and no virtual CPU has anything to flush; and who stores to the same pages again, as most do who
//! are asked the same again, has them. Kept is what looks like a page that was just stored to for the first time: mapped, writable,
//! nobody else's, and of no file. It counts as the space's own as before.
//!
//! Only what mappings can have is looked at, and leaf tables in which everything is a layer's are not looked into: their
//! entries are counted ([`crate::pfn`]). So what it costs is a look at the entries of leaf tables that there are, and
//! the leaf tables with pages that were stored to.
//!
//! Mappings that have changed since are the caller's business: [`Manager::shape`] tells whether they have.

use alloc::vec::Vec;
use core::ops::ControlFlow;

use crate::access::Prot;
use crate::addr::{Level, Pfn, TABLE_ENTRIES, Vpn, VpnRange};
use crate::backend::{FrameStore, Platform};
use crate::flush::{Flush, TableEdits};
use crate::manager::{Demand, Manager};
use crate::pfn::PfnDatabase;
use crate::pte::{Entry, EntryFlags, ValidEntry};
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

/// A space that went back.
#[derive(Debug)]
#[must_use]
pub struct GoneBack {
    /// What went.
    pub flush: Flush,
    /// Pages that it still has for itself, with what lies under them in them.
    pub kept: u64,
}

/// What is in a page of a space's own that nobody has stored to.
#[derive(Clone, Copy, Debug)]
enum Content {
    Zeroes,
    /// What a frame of a layer has.
    Of(Pfn),
}

/// A space on its way back.
struct Going<'a, P: Platform> {
    cursor: Cursor<'a, P::Store>,
    state: &'a mut SpaceState<P::Backing>,
    flush: Flush,
    /// Pages it may keep, besides those it does.
    spare: u64,
    /// Frames that it keeps.
    kept: Vec<(Pfn, Content)>,
    /// Whose tables have nothing in them any more.
    emptied: Vec<VpnRange>,
}

impl<P: Platform> Manager<P> {
    /// The space's shape: as long as it is the same, no mapping and nothing of the image has changed.
    #[must_use]
    pub fn shape(&self, space: &Space<P>) -> Shape {
        let state = space.state.lock();
        Shape(state.vads.changes(), state.images.changes())
    }

    /// Gives up the pages that the space has for itself: what lies under them is seen again, the image, a private
    /// view's file, or zeroes. Shared memory is as it is. Of those pages that can be stored to now, it keeps `most`, and
    /// has what lies under them copied there.
    ///
    /// # Errors
    /// See [`ResetError`]; nothing has changed then.
    pub fn reset_to_image(&self, space: &Space<P>, most: u64) -> Result<GoneBack, ResetError> {
        let mut flush = space.no_flush();
        let mut state = space.state.lock();
        if !state.alive {
            return Err(ResetError::SpaceDeleted);
        }
        let cursor = space.cursor(&self.store);
        let spans = leaf_spans(state.vads.iter().map(|vad| vad.range));
        if shares_tables(&cursor, &spans) {
            self.own_all((space, &mut *state), &mut flush)?;
        }
        let mut going = Going {
            cursor,
            state: &mut *state,
            flush,
            spare: most,
            kept: Vec::new(),
            emptied: Vec::new(),
        };
        for span in spans {
            let runs = space.cursor(&self.store);
            runs.for_each_leaf(span, |run| self.reset_leaf(&mut going, run));
        }
        Ok(self.end_reset(going))
    }

    /// Owns every leaf table.
    fn own_all(
        &self,
        (space, state): (&Space<P>, &mut SpaceState<P::Backing>),
        flush: &mut Flush,
    ) -> Result<(), ResetError> {
        let end = self.limits.user_end.vpn().get();
        let all = Vpn::new(0).and_then(|zero| VpnRange::between(zero, end));
        let Some(all) = all else { return Ok(()) };
        let needs = self.range_needs(space, all);
        let tables = needs.tables();
        let reserve = self.reserve_for(needs, Demand::tables(tables));
        let mut reserve = reserve.ok_or(ResetError::NoMemory { tables })?;
        let owning = Owning {
            tables: &mut reserve.tables,
            flush,
        };
        self.own_range((space, state), all, owning);
        self.give_back(reserve);
        Ok(())
    }

    /// Fills the pages that are kept, and frees the tables that are empty.
    fn end_reset(&self, going: Going<'_, P>) -> GoneBack {
        let Going {
            cursor,
            state,
            mut flush,
            kept,
            emptied,
            ..
        } = going;
        // The space is locked and the tables are its own: nobody else comes to these frames.
        for (frame, content) in &kept {
            match content {
                Content::Of(_) if cfg!(mutant = "kept_unfilled") => {}
                Content::Of(from) => self.store.copy(*from, *frame),
                Content::Zeroes => self.store.zero(*frame),
            }
        }
        for range in emptied {
            state.tables -= cursor.prune(&mut self.pfns.lock(), range, &mut flush);
        }
        state.forget_peaks();
        add(&self.counters.resets, 1);
        add(&self.counters.pages_put_back, kept.len() as u64);
        GoneBack {
            flush: flush.finish(),
            kept: kept.len() as u64,
        }
    }

    /// Gives up the pages of one leaf table, but for those that are kept.
    fn reset_leaf(&self, going: &mut Going<'_, P>, run: LeafRun) {
        let mut db = self.pfns.lock();
        let unfrozen = db.entry(run.table).unfrozen();
        if unfrozen == 0 {
            return;
        }
        let mut edits = TableEdits::new(run.table);
        let (mut given_up, mut written) = ([false; TABLE_ENTRIES], 0);
        for index in going.cursor.unfrozen(run.table, unfrozen) {
            let Some(vpn) = run.page(index) else { continue };
            match going.cursor.leaf(run.table, index) {
                Entry::Empty | Entry::Frozen(_) => continue,
                Entry::Valid(entry) if db.is_sections(entry) => continue,
                Entry::Valid(entry) if going.keeps(&mut db, entry, vpn) => continue,
                Entry::Valid(_)
                | Entry::DemandZero(_)
                | Entry::Decommitted
                | Entry::Prototype(_)
                | Entry::Transition(_)
                | Entry::PageFile(_) => {}
            }
            let old = going.cursor.remove(&mut db, run.table, index);
            let books = &mut Books::Own(&mut *going.state);
            if drop_entry(&mut db, books, old, &mut going.flush) {
                edits.add(index, vpn);
            }
            given_up[index.get()] = true;
            written += 1;
        }
        add(&self.counters.pages_reset, written);
        if written > 0 {
            let frozen = frozen_around(going.state, run.range().start());
            for (index, entry) in frozen.into_iter().filter(|(i, _)| given_up[i.get()]) {
                let place = (run.table, index);
                going.cursor.put(&mut db, place, Entry::Frozen(entry));
                written += 1;
            }
        }
        // A table that has something has a share besides its own.
        if db.entry(run.table).share() == 1 {
            going.emptied.push(run.range());
        }
        drop(db);
        going.flush.absorb(edits);
        add(&self.counters.entries_written, written);
    }
}

impl<P: Platform> Going<'_, P> {
    /// Whether the space keeps a page, which then has to be filled. It must be as a store to what lies under it
    /// would make it, and nobody but the space may have its frame.
    fn keeps(&mut self, db: &mut PfnDatabase, entry: ValidEntry, vpn: Vpn) -> bool {
        let state = db.entry(entry.frame);
        let alone = state.share() == 1 && (state.refs() == 0 || cfg!(mutant = "pinned_kept"));
        if self.spare == 0 || !alone {
            return false;
        }
        let Some(content) = self.untouched(entry, vpn) else {
            return false;
        };
        self.spare -= 1;
        self.kept.push((entry.frame, content));
        // What the page file has of it is out of date, whatever the dirty bit says.
        if cfg!(not(mutant = "kept_clean")) {
            db.mark_modified(entry.frame);
        }
        true
    }

    /// What is in the page of an entry if nobody has stored to it, as far as that is at hand.
    fn untouched(&self, entry: ValidEntry, vpn: Vpn) -> Option<Content> {
        let vad = self.state.vads.find(vpn)?;
        let plain = entry.flags - EntryFlags::USE == EntryFlags::private(vad.prot);
        if !vad.prot.contains(Prot::WRITE) || !(plain || cfg!(mutant = "kept_shared")) {
            return None;
        }
        match self.state.images.find(vpn) {
            Some(run) => run.section.frozen(run.page(vpn)?).map(Content::Of),
            None if vad.view().is_none() => Some(Content::Zeroes),
            None => None,
        }
    }
}

/// Whether some leaf table below is shared.
fn shares_tables<S: FrameStore>(cursor: &Cursor<'_, S>, spans: &[VpnRange]) -> bool {
    let found = |run: LeafRun| match run.shared {
        true => ControlFlow::Break(()),
        false => ControlFlow::Continue(()),
    };
    let mut spans = spans.iter();
    spans.any(|span| cursor.for_each_leaf_until(*span, found).is_break())
}

/// All pages that the leaf tables of mappings translate, which are given rising: each once, and rising.
fn leaf_spans(mappings: impl Iterator<Item = VpnRange>) -> Vec<VpnRange> {
    let pages = Level::Directory.pages();
    let mut spans: Vec<VpnRange> = Vec::new();
    for range in mappings {
        let start = Vpn::new(range.start().get() - range.start().get() % pages);
        let end = range.end().next_multiple_of(pages);
        let joined = spans
            .last()
            .filter(|last| last.end() >= range.start().get());
        let joined = joined.map(|last| last.start());
        if joined.is_some() {
            spans.pop();
        }
        let span = joined
            .or(start)
            .and_then(|start| VpnRange::between(start, end));
        spans.extend(span);
    }
    spans
}
