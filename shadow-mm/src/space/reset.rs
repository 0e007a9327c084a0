//! Going back to what lies under a space: a clone becomes its template again.
//!
//! What a space has for itself is given up, wherever it is; pages of layers are mapped again where they were. What shows a
//! section's own frames stays, and so do the mappings, the image and the tables.
//!
//! Some pages the space *keeps*: frames, entries and all, and what lies under them is copied there. That takes less than a
//! fault, no entry changes and no virtual CPU has anything to flush; and who stores to the same pages again, as most do who
//! are asked the same again, has them. Kept is what looks like a page that was just stored to for the first time: mapped, writable,
//! nobody else's, and of no file. It counts as the space's own as before. How many there are is for the caller to say ([`Keep`]): a page that is kept
//! and never stored to again costs a copy each time.
//!
//! Only what mappings can have is looked at, and leaf tables in which everything is a layer's are not looked into: their
//! entries are counted ([`crate::pfn`]). So what it costs is a look at the entries of leaf tables that there are, and
//! the leaf tables with pages that were stored to.
//!
//! Mappings that have changed since are the caller's business: [`Manager::shape`] tells whether they have.

use alloc::vec::Vec;
use core::ops::ControlFlow;

use crate::access::Prot;
use crate::addr::{EntryIndex, Level, PAGE_SIZE, Pfn, TABLE_ENTRIES, Vpn, VpnRange};
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

/// How many pages a space may keep when it goes back.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Keep {
    /// Pages at most.
    pub most: u64,
    /// A space that has more than this for itself keeps those only that something was stored to: others are looked at, and given up.
    pub unseen: u64,
}

impl Keep {
    /// None.
    pub const NONE: Self = Self { most: 0, unseen: 0 };

    /// What other spaces may keep if one has kept so many.
    #[must_use]
    pub fn less(self, kept: u64) -> Self {
        Self {
            most: self.most.saturating_sub(kept),
            unseen: self.unseen.saturating_sub(kept),
        }
    }
}

/// What is in a page of a space's own that nobody has stored to.
#[derive(Clone, Copy, Debug)]
enum Content {
    Zeroes,
    /// What a frame of a layer has.
    Of(Pfn),
}

/// A page of a space's own, and what it has if it is one to keep.
#[derive(Clone, Copy, Debug)]
struct Own {
    index: EntryIndex,
    vpn: Vpn,
    kept: Option<(Pfn, Content)>,
}

/// A space on its way back.
struct Going<'a, P: Platform> {
    cursor: Cursor<'a, P::Store>,
    state: &'a mut SpaceState<P::Backing>,
    flush: Flush,
    /// Pages it may keep, besides those it does.
    spare: u64,
    /// It has so many that what was not stored to is given up.
    looks: bool,
    kept: u64,
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
    /// view's file, or zeroes. Shared memory is as it is. Of those pages that can be stored to now, it keeps as many as `keep` says, the
    /// upper ones (stacks) first, and has what lies under them copied there.
    ///
    /// # Errors
    /// See [`ResetError`]; nothing has changed then.
    pub fn reset_to_image(&self, space: &Space<P>, keep: Keep) -> Result<GoneBack, ResetError> {
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
            looks: state.private > keep.unseen,
            state: &mut *state,
            flush,
            spare: keep.most,
            kept: 0,
            emptied: Vec::new(),
        };
        for span in spans.into_iter().rev() {
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

    /// Frees the tables that are empty.
    fn end_reset(&self, going: Going<'_, P>) -> GoneBack {
        let Going {
            cursor,
            state,
            mut flush,
            kept,
            emptied,
            ..
        } = going;
        for range in emptied {
            state.tables -= cursor.prune(&mut self.pfns.lock(), range, &mut flush);
        }
        state.forget_peaks();
        add(&self.counters.resets, 1);
        add(&self.counters.pages_put_back, kept);
        let flush = flush.finish();
        GoneBack { flush, kept }
    }

    /// Gives up the pages of one leaf table, but for those that are kept.
    fn reset_leaf(&self, going: &mut Going<'_, P>, run: LeafRun) {
        let mut own = going.own_pages(&self.pfns.lock(), run);
        // The space is locked and the table is its own: nobody else comes to these pages.
        own.retain(|page| !page.kept.is_some_and(|kept| self.is_kept(going, kept)));
        if own.is_empty() {
            return;
        }
        let mut db = self.pfns.lock();
        let mut edits = TableEdits::new(run.table);
        let mut given_up = [false; TABLE_ENTRIES];
        for Own { index, vpn, .. } in &own {
            let old = going.cursor.remove(&mut db, run.table, *index);
            let books = &mut Books::Own(&mut *going.state);
            if drop_entry(&mut db, books, old, &mut going.flush) {
                edits.add(*index, *vpn);
            }
            given_up[index.get()] = true;
        }
        let frozen = frozen_around(going.state, run.range().start());
        let mut written = own.len() as u64;
        for (index, entry) in frozen.into_iter().filter(|(i, _)| given_up[i.get()]) {
            let place = (run.table, index);
            going.cursor.put(&mut db, place, Entry::Frozen(entry));
            written += 1;
        }
        // A table that has something has a share besides its own.
        if db.entry(run.table).share() == 1 {
            going.emptied.push(run.range());
        }
        drop(db);
        going.flush.absorb(edits);
        add(&self.counters.pages_reset, own.len() as u64);
        add(&self.counters.entries_written, written);
    }

    /// Keeps a page if it may, and puts back what lies under it.
    fn is_kept(&self, going: &mut Going<'_, P>, (frame, content): (Pfn, Content)) -> bool {
        if going.spare == 0 || (going.looks && self.has(frame, content)) {
            return false;
        }
        match content {
            Content::Of(_) if cfg!(mutant = "kept_unfilled") => {}
            Content::Of(from) => self.store.copy(from, frame),
            Content::Zeroes => self.store.zero(frame),
        }
        // What the page file has of it is out of date, whatever the dirty bit says.
        if cfg!(not(mutant = "kept_clean")) {
            self.pfns.lock().mark_modified(frame);
        }
        going.spare -= 1;
        going.kept += 1;
        true
    }

    /// Whether nothing else is in a frame.
    fn has(&self, frame: Pfn, content: Content) -> bool {
        let [mut has, mut had] = [[0; PAGE_SIZE]; 2];
        self.store.read(frame, 0, &mut has);
        if let Content::Of(from) = content {
            self.store.read(from, 0, &mut had);
        }
        has == had
    }
}

impl<P: Platform> Going<'_, P> {
    /// What of a leaf table is the space's own, and no section's: the upper pages first.
    fn own_pages(&self, db: &PfnDatabase, run: LeafRun) -> Vec<Own> {
        let unfrozen = db.entry(run.table).unfrozen();
        if unfrozen == 0 {
            return Vec::new();
        }
        let mut own = Vec::new();
        for index in self.cursor.unfrozen(run.table, unfrozen) {
            let Some(vpn) = run.page(index) else { continue };
            let kept = match self.cursor.leaf(run.table, index) {
                Entry::Empty | Entry::Frozen(_) => continue,
                Entry::Valid(entry) if db.is_sections(entry) => continue,
                Entry::Valid(entry) => self.to_keep(db, entry, vpn),
                Entry::DemandZero(_)
                | Entry::Decommitted
                | Entry::Prototype(_)
                | Entry::Transition(_)
                | Entry::PageFile(_) => None,
            };
            own.push(Own { index, vpn, kept });
        }
        own.reverse();
        own
    }

    /// What is to be in a page that can be kept. It must be as a store to what lies under it would make it, and
    /// nobody but the space may have its frame.
    fn to_keep(&self, db: &PfnDatabase, entry: ValidEntry, vpn: Vpn) -> Option<(Pfn, Content)> {
        let state = db.entry(entry.frame);
        let alone = state.share() == 1 && (state.refs() == 0 || cfg!(mutant = "pinned_kept"));
        let vad = self.state.vads.find(vpn)?;
        let plain = entry.flags - EntryFlags::USE == EntryFlags::private(vad.prot);
        let plain = plain || cfg!(mutant = "kept_shared");
        if !alone || !plain || !vad.prot.contains(Prot::WRITE) {
            return None;
        }
        let content = match self.state.images.find(vpn) {
            Some(run) => Content::Of(run.section.frozen(run.page(vpn)?)?),
            None if vad.view().is_none() => Content::Zeroes,
            None => return None,
        };
        Some((entry.frame, content))
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
