//! Faults on views of sections, and on pages that lie over an image ([`crate::space::image`]): those are
//! private views of the image's section, whatever the mapping is.
//!
//! A private view maps the section's own frame, read-only and copy-on-write: the text of a library is in
//! the pool once, whoever runs it. A store there copies the page at once, without mapping it first. A
//! shared view maps the frame with all the rights the mapping has, and hardware's dirty bit tells that
//! it was stored to.
//!
//! One fault maps every resident neighbour in its aligned window (*map-around*): an exit costs far more
//! than an entry.

use alloc::sync::Arc;
use alloc::vec::Vec;

use crate::access::{Access, Denied, Prot};
use crate::addr::{Level, Pfn, TABLE_ENTRIES, Vpn, VpnRange};
use crate::backend::Platform;
use crate::flush::TableEdits;
use crate::manager::{Demand, Manager};
use crate::outcome::{FaultKind, FaultOf, FaultOutcome};
use crate::pfn::{Owner, Taken, Want};
use crate::proto::{Pending, Proto, Section, SectionPage};
use crate::pte::{Entry, EntryFlags, ValidEntry};
use crate::section::{NoFrame, NoSpace};
use crate::space::ahead::{copied_ahead, note_made};
use crate::space::books::Books;
use crate::space::fault::{resolution, used, window};
use crate::space::file_read::{Started, note_read, read_window};
use crate::space::image::{Origin, Source};
use crate::space::own::Owning;
use crate::space::unread::Unread;
use crate::space::view_in::ViewIn;
use crate::space::zap::drop_page;
use crate::space::{Space, SpaceState};
use crate::stats::add;
use crate::vad::Sharing;

/// Pages of the aligned window within which one fault maps all that is resident. Twenty times a shell
/// starting `true` took 758 faults with 16 pages, 647 with 32, 571 with 64, 501 with 128, which also
/// wrote a third more entries than 16.
const MAP_AROUND: u64 = 64;
/// Pages of the aligned window within which one store copies all that is resident. The same run took
/// 118 such faults with 4 pages, 87 with 8, 75 with 16, and copied 253 pages each time: relocation
/// stores to all of them anyway.
const COPY_AROUND: u64 = 16;
/// How often a page that goes again before it can be mapped is looked for.
const TRIES: usize = 8;

/// A page of a view.
#[derive(Clone)]
struct Target<B> {
    section: Section<B>,
    page: SectionPage,
    /// Whether the access makes a copy of it.
    copies: bool,
}

/// Why a page was not made.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Unmade {
    /// No frame is left.
    NoMemory,
    /// The section may not have it.
    NoSpace,
}

impl<P: Platform> Manager<P> {
    /// An access to a page of a view that has no entry.
    pub(super) fn view_fault(
        &self,
        space: &Arc<Space<P>>,
        state: &mut SpaceState<P::Backing>,
        vpn: Vpn,
        access: Access,
    ) -> FaultOutcome<P> {
        let Some(target) = target(state, vpn, access) else {
            return FaultOutcome::Denied(Denied::BeyondEnd);
        };
        if let Some(frame) = target.section.frozen(target.page) {
            return match target.copies {
                true => self.copy_frozen(space, state, vpn, frame),
                false => self.map_frozen(space, state, vpn, access),
            };
        }
        for _ in 0..TRIES {
            let mut db = self.pfns.lock();
            db.reap();
            let section = db.sections.get(target.section.id());
            if !section.contains(target.page) {
                return FaultOutcome::Denied(Denied::BeyondEnd);
            }
            if let Some(frame) = section.frozen(target.page) {
                drop(db);
                return match access {
                    Access::Write if !target.copies => self.to_be_thawed(state, vpn),
                    Access::Write => self.copy_frozen(space, state, vpn, frame),
                    Access::Read | Access::Execute => self.map_frozen(space, state, vpn, access),
                };
            }
            if section.unread(target.page).is_some() {
                drop(db);
                let fault = fault_of(space, vpn, access);
                match self.take_from_image(&target.section, target.page, Some(fault)) {
                    Unread::Read(ticket) => return FaultOutcome::Read(ticket),
                    Unread::Wait(pending) => return FaultOutcome::Wait(pending),
                    Unread::NoMemory => return FaultOutcome::NoMemory,
                    Unread::Again => continue,
                }
            }
            match section.pages.get(&target.page) {
                Some(Proto::Resident(_)) => {
                    let Some(from) = db.mappable(target.section.id(), target.page) else {
                        return FaultOutcome::Collided;
                    };
                    if target.copies {
                        db.hold(from);
                        drop(db);
                        return self.copy_view(space, state, vpn, from);
                    }
                    drop(db);
                    let aside = match access {
                        Access::Write => self.put_aside(target.section.id(), target.page),
                        Access::Read | Access::Execute => Ok(()),
                    };
                    if aside == Err(NoFrame) {
                        return FaultOutcome::NoMemory;
                    }
                    if let Some(outcome) = self.map_view(space, state, vpn, access) {
                        return outcome;
                    }
                }
                Some(Proto::PageFile(_)) => {
                    drop(db);
                    let fault = fault_of(space, vpn, access);
                    match self.start_view_in(&target.section, target.page, Some(fault)) {
                        ViewIn::PageIn(ticket) => return FaultOutcome::PageIn(ticket),
                        ViewIn::NoMemory => return FaultOutcome::NoMemory,
                        ViewIn::Again => {}
                    }
                }
                Some(Proto::Reading(record)) => return FaultOutcome::Wait(Pending::new(record)),
                None if section.file => {
                    drop(db);
                    let fault = fault_of(space, vpn, access);
                    let window = read_window(state, vpn, self.clusters);
                    match self.start_read(&target.section, (target.page, window), Some(fault)) {
                        Started::Read(ticket) => {
                            note_read(state, vpn, window, &ticket);
                            return FaultOutcome::Read(ticket);
                        }
                        Started::NoMemory => return FaultOutcome::NoMemory,
                        Started::Again => {}
                    }
                }
                None | Some(Proto::Zeroes) => {
                    drop(db);
                    let most = window(state, vpn);
                    let made = match self.make_zeroes(&target.section, target.page, most) {
                        Ok(made) => made,
                        Err(Unmade::NoMemory) => return FaultOutcome::NoMemory,
                        Err(Unmade::NoSpace) => return FaultOutcome::Denied(Denied::NoSpace),
                    };
                    note_made(state, vpn, made as usize);
                }
            }
        }
        // Frames are so short that pages are taken as fast as they come.
        FaultOutcome::NoMemory
    }

    /// Makes a page of zeroes, and the absent pages after it, the section's; gives back how many there
    /// were at most.
    pub(crate) fn make_zeroes(
        &self,
        section: &Section<P::Backing>,
        page: SectionPage,
        most: usize,
    ) -> Result<u64, Unmade> {
        let demand = Demand {
            tables: 0,
            data: 1,
            extra: most.saturating_sub(1),
            want: Want::Zeroes,
        };
        let reserve = self.reserve(demand).ok_or(Unmade::NoMemory)?;
        let made = reserve.data.len() as u64;
        let frames = reserve.data.into_iter().map(|frame| self.zeroed(frame));
        let frames: Vec<_> = frames.collect();
        let mut db = self.pfns.lock();
        let id = section.id();
        let mut result = Ok(made);
        for (ahead, frame) in frames.into_iter().enumerate() {
            let state = db.sections.get(id);
            let page = SectionPage::new(page.get() + ahead as u64);
            let zeroes = |page: &SectionPage| match state.pages.get(page) {
                None => !state.is_below(*page) || cfg!(mutant = "zeroes_over_layer"),
                Some(Proto::Zeroes) => true,
                Some(Proto::Resident(_) | Proto::Reading(_) | Proto::PageFile(_)) => false,
            };
            let page = page.filter(|page| state.contains(*page) && zeroes(page));
            let charged = page.map(|page| db.charge_page(id, page).map(|()| page));
            match charged {
                Some(Ok(page)) => db.make_resident(id, page, frame.into()),
                Some(Err(NoSpace)) if ahead == 0 => {
                    result = Err(Unmade::NoSpace);
                    db.give_back(Taken::Zeroed(frame));
                }
                Some(Err(NoSpace)) | None => db.give_back(Taken::Zeroed(frame)),
            }
        }
        result
    }

    /// A store to a private view: gives the space a copy of the section's page, which is held for the
    /// time, and of its neighbours. Data that is stored to at all is mostly stored to everywhere, and
    /// soon: by whoever relocates it.
    fn copy_view(
        &self,
        space: &Arc<Space<P>>,
        state: &mut SpaceState<P::Backing>,
        vpn: Vpn,
        from: Pfn,
    ) -> FaultOutcome<P> {
        let cursor = space.cursor(&self.store);
        let needs = self.needs(space, vpn);
        let Some(source) = state.source(vpn) else {
            self.release_sources(&[(vpn, from)]);
            return FaultOutcome::Denied(Denied::NotMapped);
        };
        let flags = EntryFlags::private(source.prot);
        let window = match source.origin {
            Origin::View => aligned(source.range, vpn, COPY_AROUND),
            // A clone is to have only what it changes.
            Origin::Image => copied_ahead(state, vpn),
        };
        let mut sources = self.hold_sources(space, (&source, window), (vpn, from));
        let demand = Demand {
            tables: needs.tables(),
            data: 1,
            extra: sources.len() - 1,
            want: Want::Anything,
        };
        let Some(mut reserve) = self.reserve_for(needs, demand) else {
            self.release_sources(&sources);
            return FaultOutcome::NoMemory;
        };
        // The page itself is the first.
        let unused = sources.split_off(reserve.data.len().min(sources.len()));
        self.release_sources(&unused);
        let frames = core::mem::take(&mut reserve.data);
        let copies: Vec<_> = frames
            .into_iter()
            .zip(&sources)
            .map(|(frame, (_, from))| frame.forget_content().copy_of(*from, &self.store))
            .collect();
        let made = copies.len() as u64;
        add(&self.counters.pages_copied, made);
        let mut outcome = resolution(space, FaultKind::CopyOnWrite, made as u32);
        let mut db = self.pfns.lock();
        let owning = Owning {
            tables: &mut reserve.tables,
            flush: &mut outcome.flush,
        };
        let table = self.own_leaf((space, &mut *state), &mut db, vpn, owning);
        let mut edits = TableEdits::new(table);
        for ((at, from), copy) in sources.iter().zip(copies) {
            let index = at.index(Level::Leaf);
            if let Entry::Valid(old) = cursor.remove(&mut db, table, index) {
                drop_page(&mut db, &mut Books::Own(&mut *state), old);
                outcome.flush.hold(old.frame);
                edits.add(index, *at);
            }
            let used = if *at == vpn {
                used(Access::Write)
            } else {
                EntryFlags::DIRTY
            };
            let frame = db.activate(copy, Owner::Entry { table, index });
            let flags = flags | used;
            cursor.install(&mut db, table, index, ValidEntry { frame, flags });
            db.release(*from);
        }
        drop(db);
        outcome.flush.absorb(edits);
        self.give_back(reserve);
        state.gained_private(made);
        if source.origin == Origin::Image {
            note_made(state, vpn, made as usize);
        }
        add(&self.counters.entries_written, made);
        FaultOutcome::Resolved(outcome)
    }

    /// A store to a valid entry that maps a section's own frame.
    pub(super) fn break_view(
        &self,
        space: &Arc<Space<P>>,
        state: &mut SpaceState<P::Backing>,
        vpn: Vpn,
        entry: ValidEntry,
    ) -> FaultOutcome<P> {
        self.pfns.lock().hold(entry.frame);
        self.copy_view(space, state, vpn, entry.frame)
    }

    /// The pages a store copies, with the frames they show, held: the page itself first, then its
    /// neighbours that the section has.
    fn hold_sources(
        &self,
        space: &Space<P>,
        (source, window): (&Source<P::Backing>, VpnRange),
        wanted: (Vpn, Pfn),
    ) -> Vec<(Vpn, Pfn)> {
        let cursor = space.cursor(&self.store);
        let table = cursor.find_leaf(wanted.0);
        let mut sources = Vec::from([wanted]);
        let mut db = self.pfns.lock();
        for vpn in window.iter().filter(|vpn| *vpn != wanted.0) {
            let entry = table.map_or(Entry::Empty, |table| {
                cursor.leaf(table, vpn.index(Level::Leaf))
            });
            let frame = match entry {
                Entry::Empty => {
                    let page = source.page(vpn);
                    page.and_then(|page| db.mappable(source.section.id(), page))
                }
                Entry::Valid(entry) if db.is_sections(entry) => Some(entry.frame),
                _ => None,
            };
            match (frame, source.origin) {
                (Some(frame), _) => {
                    db.hold(frame);
                    sources.push((vpn, frame));
                }
                (None, Origin::View) => {}
                (None, Origin::Image) => break,
            }
        }
        sources
    }

    fn release_sources(&self, sources: &[(Vpn, Pfn)]) {
        let mut db = self.pfns.lock();
        sources.iter().for_each(|(_, frame)| db.release(*frame));
    }

    /// Maps a resident page and its resident neighbours; `None` if it is no longer resident.
    fn map_view(
        &self,
        space: &Arc<Space<P>>,
        state: &mut SpaceState<P::Backing>,
        vpn: Vpn,
        access: Access,
    ) -> Option<FaultOutcome<P>> {
        let cursor = space.cursor(&self.store);
        let needs = self.needs(space, vpn);
        let demand = Demand::tables(needs.tables());
        let Some(mut reserve) = self.reserve_for(needs, demand) else {
            return Some(FaultOutcome::NoMemory);
        };
        let source = state.source(vpn)?;
        let flags = view_flags(source.prot, source.sharing);
        let mut outcome = resolution(space, FaultKind::Mapped, 0);
        let mut db = self.pfns.lock();
        let (id, wanted) = (source.section.id(), source.page(vpn)?);
        if db.mappable(id, wanted).is_some() {
            let owning = Owning {
                tables: &mut reserve.tables,
                flush: &mut outcome.flush,
            };
            let table = self.own_leaf((space, &mut *state), &mut db, vpn, owning);
            for vpn in around(&source, vpn).iter() {
                let (index, page) = (vpn.index(Level::Leaf), source.page(vpn));
                let frame = page.and_then(|page| db.mappable(id, page));
                let Some(frame) = frame.filter(|_| cursor.leaf(table, index) == Entry::Empty)
                else {
                    continue;
                };
                db.map_again(frame);
                let flags = match db.to_be_kept(frame) {
                    Some(_) if cfg!(not(mutant = "kept_mapped")) => flags.shared(),
                    Some(_) | None => flags,
                };
                cursor.install(&mut db, table, index, ValidEntry { frame, flags });
                outcome.mapped += 1;
            }
            drop(db);
            cursor.mark_used(table, vpn.index(Level::Leaf), used(access));
        } else {
            drop(db);
        }
        self.give_back(reserve);
        let mapped = u64::from(outcome.mapped);
        if mapped == 0 {
            return None;
        }
        state.gained_resident(mapped);
        add(&self.counters.entries_written, mapped);
        add(&self.counters.pages_mapped_around, mapped - 1);
        Some(FaultOutcome::Resolved(outcome))
    }
}

fn fault_of<P: Platform>(space: &Arc<Space<P>>, vpn: Vpn, access: Access) -> FaultOf<P> {
    FaultOf {
        space: Arc::clone(space),
        va: vpn.va(),
        access,
    }
}

fn target<B: Clone + Eq>(state: &SpaceState<B>, vpn: Vpn, access: Access) -> Option<Target<B>> {
    let source = state.source(vpn)?;
    Some(Target {
        page: source.page(vpn)?,
        copies: access == Access::Write && source.sharing == Sharing::Private,
        section: source.section,
    })
}

/// The rights of an entry that maps a section's own frame.
pub(crate) fn view_flags(prot: Prot, sharing: Sharing) -> EntryFlags {
    let flags = EntryFlags::private(prot);
    match sharing {
        Sharing::Private => flags.shared(),
        Sharing::Shared => flags | EntryFlags::PROTOTYPE,
    }
}

/// The pages of a source in the window of the section around one, or, if the guest walks upwards and
/// pages were just made ahead of it, up to the last of those. All are translated by one leaf table. The window
/// is aligned as the section's pages are, so that what one read brings is mapped at once.
fn around<B>(source: &Source<B>, vpn: Vpn) -> VpnRange {
    let table = vpn.get() - vpn.get() % TABLE_ENTRIES as u64;
    let before = source.page(vpn).map_or(0, |p| p.get() % MAP_AROUND);
    let start = vpn.get().saturating_sub(before).max(table);
    let end = vpn.get() + MAP_AROUND - before;
    let ahead = source.ahead.min(vpn.get() + MAP_AROUND);
    let end = end.max(ahead).min(table + TABLE_ENTRIES as u64);
    let window = Vpn::new(start).and_then(|start| VpnRange::between(start, end));
    let alone = VpnRange::new(vpn, 1).expect("a page is a range");
    window
        .and_then(|w| w.intersect(source.range))
        .unwrap_or(alone)
}

/// The pages of a range in the aligned window of `pages` around one of them.
fn aligned(range: VpnRange, vpn: Vpn, pages: u64) -> VpnRange {
    let base = Vpn::new(vpn.get() - vpn.get() % pages);
    let window = base.and_then(|base| VpnRange::new(base, pages));
    let alone = VpnRange::new(vpn, 1).expect("a page is a range");
    window.and_then(|w| w.intersect(range)).unwrap_or(alone)
}
