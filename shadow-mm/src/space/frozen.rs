//! Pages of frozen layers: mapped where they are, never changed.
//!
//! A layer is frames beyond the pool that were somebody's memory once and are nobody's to change now: a template's. They
//! have no entry in the PFN database. Entries that map them ([`Entry::Frozen`]) are read-only whatever the mapping
//! allows; they are not counted, neither as resident nor as anybody's share, do not age, and are never trimmed. Only a space's image
//! ([`crate::space::image`]) names a layer's pages, and an entry is only what the image says already: it can be made
//! at any time, for nothing, and none is made before its leaf table is faulted in.
//!
//! One fault fills the leaf table it is in: every empty entry of a page that a layer has. A store copies the page into
//! a frame of the pool, and there is no last reference that could make do without: the frame is a changed one for every
//! virtual CPU that has the translation.

use alloc::sync::Arc;
use alloc::vec::Vec;

use crate::access::{Access, Denied, Prot};
use crate::addr::{EntryIndex, Level, Pfn, Vpn, VpnRange};
use crate::backend::{FrameStore, Platform};
use crate::flush::TableEdits;
use crate::manager::{Demand, Manager};
use crate::outcome::{FaultKind, FaultOutcome};
use crate::pfn::{Owner, PfnDatabase};
use crate::proto::SectionPage;
use crate::pte::{Entry, EntryFlags, ValidEntry};
use crate::section::Thaw;
use crate::shadow::Cursor;
use crate::space::ahead::{copied_ahead, note_made};
use crate::space::fault::{resolution, used};
use crate::space::own::{Owning, span};
use crate::space::view::view_flags;
use crate::space::{Space, SpaceState};
use crate::stats::add;
use crate::vad::Sharing;

impl<P: Platform> Manager<P> {
    /// Maps a page of a layer that has no entry, and every other one of its leaf table.
    pub(super) fn map_frozen(
        &self,
        space: &Arc<Space<P>>,
        state: &mut SpaceState<P::Backing>,
        vpn: Vpn,
        access: Access,
    ) -> FaultOutcome<P> {
        let cursor = space.cursor(&self.store);
        let needs = self.needs(space, vpn);
        let demand = Demand::tables(needs.tables());
        let Some(mut reserve) = self.reserve_for(needs, demand) else {
            return FaultOutcome::NoMemory;
        };
        let mut pages = frozen_around(state, vpn);
        let mut outcome = resolution(space, FaultKind::Mapped, 0);
        let mut db = self.pfns.lock();
        let owning = Owning {
            tables: &mut reserve.tables,
            flush: &mut outcome.flush,
        };
        let table = self.own_leaf((space, &mut *state), &mut db, vpn, owning);
        // What sections have may change for all who share it until here.
        pages.extend(frozen_views(state, &db, vpn));
        for (index, entry) in pages {
            if cursor.leaf(table, index) == Entry::Empty {
                cursor.put(&mut db, (table, index), Entry::Frozen(entry));
                outcome.mapped += 1;
            }
        }
        drop(db);
        cursor.mark_used(table, vpn.index(Level::Leaf), used(access));
        self.give_back(reserve);
        if cfg!(mutant = "frozen_counted") {
            state.gained_resident(outcome.mapped.into());
        }
        add(&self.counters.entries_written, outcome.mapped.into());
        add(&self.counters.pages_frozen, outcome.mapped.into());
        FaultOutcome::Resolved(outcome)
    }

    /// A store to a layer's page that others share: what is to be copied, and the pages after it if the guest stores to one after
    /// the other.
    pub(super) fn to_be_thawed(
        &self,
        state: &mut SpaceState<P::Backing>,
        vpn: Vpn,
    ) -> FaultOutcome<P> {
        let source = state.source(vpn);
        let target = source.and_then(|source| Some((source.page(vpn)?, source)));
        let Some((page, source)) = target else {
            return FaultOutcome::Denied(Denied::NotMapped);
        };
        let frozen = {
            let db = self.pfns.lock();
            db.sections.get(source.section.id()).frozen(page).is_some()
        };
        if !frozen {
            // Somebody thaws it, and has not come to this space yet.
            return FaultOutcome::Collided;
        }
        let ahead = copied_ahead(state, vpn).count();
        note_made(state, vpn, ahead as usize);
        FaultOutcome::Thaw(Thaw::new(&source.section, page, ahead as usize))
    }

    /// A store to a page of a layer, mapped or not: gives the space a copy of its own, and of the layer's pages after it if
    /// the guest stores to one after the other ([`crate::space::ahead`]).
    pub(super) fn copy_frozen(
        &self,
        space: &Arc<Space<P>>,
        state: &mut SpaceState<P::Backing>,
        vpn: Vpn,
        from: Pfn,
    ) -> FaultOutcome<P> {
        let cursor = space.cursor(&self.store);
        let needs = self.needs(space, vpn);
        let Some(vad) = state.vads.find(vpn) else {
            return FaultOutcome::Denied(Denied::NotMapped);
        };
        let flags = EntryFlags::private(vad.prot);
        let mapped = cursor
            .lookup(vpn)
            .filter(|found| found.entry.present().is_some());
        if let Some(found) = mapped.filter(|_| cfg!(mutant = "frozen_in_place")) {
            let flags = flags | used(Access::Write);
            cursor.rewrite(found.table, found.index, |entry| entry.with_flags(flags));
            return FaultOutcome::Resolved(resolution(space, FaultKind::MadeWritable, 1));
        }
        let sources = frozen_run(state, &cursor, (vpn, from));
        let demand = Demand {
            tables: needs.tables(),
            extra: sources.len() - 1,
            ..Demand::one_page()
        };
        let Some(mut reserve) = self.reserve_for(needs, demand) else {
            return FaultOutcome::NoMemory;
        };
        let frames = core::mem::take(&mut reserve.data).into_iter().zip(sources);
        let copies: Vec<_> = frames
            .map(|(frame, (vpn, from))| (vpn, frame.forget_content().copy_of(from, &self.store)))
            .collect();
        let made = copies.len();
        let mut outcome = resolution(space, FaultKind::CopyOnWrite, made as u32);
        let mut db = self.pfns.lock();
        let owning = Owning {
            tables: &mut reserve.tables,
            flush: &mut outcome.flush,
        };
        let table = self.own_leaf((space, &mut *state), &mut db, vpn, owning);
        let mut edits = TableEdits::new(table);
        let mut now = used(Access::Write);
        for (vpn, copy) in copies {
            let index = vpn.index(Level::Leaf);
            match cursor.remove(&mut db, table, index) {
                Entry::Empty => {}
                old => {
                    debug_assert!(
                        matches!(old, Entry::Frozen(_)),
                        "{vpn:?}: {old:?} is copied"
                    );
                    if cfg!(not(mutant = "frozen_unflushed")) {
                        edits.add(index, vpn);
                    }
                }
            }
            let (frame, flags) = (
                db.activate(copy, Owner::Entry { table, index }),
                flags | now,
            );
            cursor.install(&mut db, table, index, ValidEntry { frame, flags });
            now = EntryFlags::DIRTY;
        }
        drop(db);
        outcome.flush.absorb(edits);
        self.give_back(reserve);
        state.gained_private(made as u64);
        note_made(state, vpn, made);
        add(&self.counters.pages_copied, made as u64);
        add(&self.counters.entries_written, made as u64);
        FaultOutcome::Resolved(outcome)
    }
}

/// The pages a store copies, each with the layer's frame: the page that is stored to first.
fn frozen_run<B: Clone + Eq, S: FrameStore>(
    state: &SpaceState<B>,
    cursor: &Cursor<'_, S>,
    (vpn, from): (Vpn, Pfn),
) -> Vec<(Vpn, Pfn)> {
    let table = cursor.find_leaf(vpn);
    let entry = |vpn: Vpn| {
        table.map_or(Entry::Empty, |table| {
            cursor.leaf(table, vpn.index(Level::Leaf))
        })
    };
    let run = state.images.find(vpn);
    let ahead = copied_ahead(state, vpn).iter().skip(1);
    let ahead = ahead.map_while(|vpn| match entry(vpn) {
        Entry::Frozen(entry) => Some((vpn, entry.frame)),
        Entry::Empty => {
            let run = run.filter(|run| run.range.contains(vpn))?;
            Some((vpn, run.section.frozen(run.page(vpn)?)?))
        }
        Entry::Valid(_)
        | Entry::Transition(_)
        | Entry::PageFile(_)
        | Entry::Prototype(_)
        | Entry::DemandZero(_)
        | Entry::Decommitted => None,
    });
    core::iter::once((vpn, from)).chain(ahead).collect()
}

/// The pages of layers that the leaf table of `vpn` can translate, each with the entry it gets.
pub(super) fn frozen_around<B: Clone + Eq>(
    state: &SpaceState<B>,
    vpn: Vpn,
) -> Vec<(EntryIndex, ValidEntry)> {
    let Some(table) = span(Level::Directory, vpn) else {
        return Vec::new();
    };
    let mut pages = Vec::new();
    for run in state.images.overlapping(table) {
        let Some(range) = run
            .range
            .intersect(table)
            .filter(|_| run.section.is_frozen())
        else {
            continue;
        };
        for vad in state.vads.overlapping(range) {
            let mut flags = frozen_flags(vad.prot);
            if cfg!(mutant = "frozen_writable") {
                flags |= EntryFlags::WRITABLE;
            }
            // What may not be touched is not mapped ahead.
            let part = range.intersect(vad.range).filter(|_| !vad.prot.is_empty());
            for vpn in part.into_iter().flat_map(VpnRange::iter) {
                let frame = run.page(vpn).and_then(|page| run.section.frozen(page));
                pages.extend(
                    frame.map(|frame| (vpn.index(Level::Leaf), ValidEntry { frame, flags })),
                );
            }
        }
    }
    pages
}

/// The pages that the leaf table of `vpn` can translate and that sections have in layers, each with the entry it gets: read-only
/// whoever shares them.
fn frozen_views<B: Clone + Eq>(
    state: &SpaceState<B>,
    db: &PfnDatabase,
    vpn: Vpn,
) -> Vec<(EntryIndex, ValidEntry)> {
    let Some(table) = span(Level::Directory, vpn) else {
        return Vec::new();
    };
    let mut pages = Vec::new();
    for vad in state.vads.overlapping(table) {
        let view = vad.view().filter(|_| !vad.prot.is_empty());
        let part = table.intersect(vad.range);
        let Some(((section, first, _), part)) = view.zip(part) else {
            continue;
        };
        let section = db.sections.get(section.id());
        let ahead = |vpn: Vpn| vpn.get() - vad.range.start().get();
        let flags = frozen_flags(vad.prot);
        let shown = part.iter().filter(|vpn| state.images.find(*vpn).is_none());
        pages.extend(shown.filter_map(|vpn| {
            let page = SectionPage::new(first + ahead(vpn));
            let frame = page.and_then(|page| section.frozen(page))?;
            Some((vpn.index(Level::Leaf), ValidEntry { frame, flags }))
        }));
    }
    pages
}

/// The rights of an entry that maps a layer's frame.
pub(crate) fn frozen_flags(prot: Prot) -> EntryFlags {
    view_flags(prot, Sharing::Private)
}
