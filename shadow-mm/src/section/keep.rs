//! Keeping a section as it is for a while: what spaces share, and files in memory, to be looked at while they go on.
//!
//! It costs the same whatever the size of the section, because nobody can store to it at that moment: all spaces with views that
//! share their stores are kept too ([`Manager::keep`]), so that every path to such a page begins with an entry without the
//! writable bit. A store makes its path the space's own first ([`crate::space`]), and that *closes* the pages of a
//! section that is kept: their entries are copy-on-write, as are those that are made while it is kept. Who opens one, or
//! stores without a view, has the page *put aside* first: copied to a section of the keeper's, which is one over zeroes
//! like any other, so that what is in it can go to the page file too. The frame itself stays where it is mapped.
//!
//! A page that comes to be later is settled at once, and so is a layer's that is thawed; what leaves the section for the
//! page file, or comes back, is what it was. Pages still to be kept cannot be cut off or punched out ([`BeingKept`]).
//!
//! [`KeptSection`] is the keeper's; dropping it is the end, which the next who holds the PFN lock for long sees to. Entries
//! stay copy-on-write until somebody stores there.

use core::ops::Range;

use crate::addr::{Level, PAGE_SIZE, Pfn, SpaceId};
use crate::backend::{FrameStore, Platform};
use crate::manager::{Demand, Manager, Reserve};
use crate::page_file::Slot;
use crate::pfn::{Owner, PfnDatabase, PfnFlags, Want};
use crate::proto::{Proto, Section, SectionId, SectionPage, SectionState};
use crate::pte::UpperEntry;
use crate::section::{Charge, NoFrame, SectionError};
use crate::stats::add;
use crate::vad::Sharing;

/// Why a section was not kept. Nothing has changed but that pages may be put aside that nobody looks at.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum KeepSectionError {
    /// Its pages are a file's.
    #[error("the pages of a file are not kept")]
    OfFile,
    /// It is kept already.
    #[error("the section is kept already")]
    Kept,
    /// A space can store to it at once: it is not one that was just kept.
    #[error("space {space} can store to the section")]
    Open {
        /// The space.
        space: SpaceId,
    },
    /// No frame is left for a page that is pinned to be stored to.
    #[error(transparent)]
    NoFrame(#[from] NoFrame),
    /// There can be no section for the copies.
    #[error(transparent)]
    NoSection(#[from] SectionError),
}

/// The section is kept as it was, and would lose pages of that.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the section is kept as it was")]
pub struct BeingKept;

/// A section as it was when it was kept, for as long as this lives.
#[derive(Debug)]
#[must_use = "dropping it is the end of keeping"]
pub struct KeptSection<B> {
    /// What was put aside. It is dropped first.
    copies: Section<B>,
    section: Section<B>,
}

/// What a page of a kept section was.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[must_use]
pub enum KeptPage {
    /// These bytes.
    Bytes,
    /// What is in this slot of the page file, if the page still is there once the slot was read: ask again.
    Slot(Slot),
    /// Zeroes, or a layer's.
    Zero,
    /// It is on its way into memory: ask again.
    Busy,
}

/// Where a page of a kept section is.
enum Place {
    /// In this frame, which is held: the section's own, or that of a copy.
    Frame(Pfn, Whose),
    Elsewhere(KeptPage),
}

/// Whose frame the content is in.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Whose {
    /// The section's: it can change once it was put aside.
    Live,
    Aside,
}

impl SectionState {
    /// Whether pages of a range may go.
    pub(crate) fn can_lose(&self, pages: Range<u64>) -> Result<(), BeingKept> {
        let Some(first) = SectionPage::new(pages.start).filter(|_| self.kept.is_some()) else {
            return Ok(());
        };
        let mut had = self.pages.range(first..);
        let stays = had
            .by_ref()
            .take_while(|(page, _)| page.get() < pages.end)
            .any(|(page, proto)| self.is_to_be_kept(*page) && !matches!(proto, Proto::Zeroes));
        match stays && cfg!(not(mutant = "kept_cut")) {
            true => Err(BeingKept),
            false => Ok(()),
        }
    }
}

impl<P: Platform> Manager<P> {
    /// Keeps a section over zeroes as it is. All spaces with views of it that share their stores must have been kept
    /// ([`Self::keep`]) since anything ran in them, nothing may run in them, and nobody may be storing to it.
    ///
    /// # Errors
    /// See [`KeepSectionError`]. It must be read before anything goes on then.
    pub fn keep_section(
        &self,
        section: &Section<P::Backing>,
    ) -> Result<KeptSection<P::Backing>, KeepSectionError> {
        let bytes = {
            let mut db = self.pfns.lock();
            db.reap();
            let state = db.sections.get(section.id());
            if state.file {
                return Err(KeepSectionError::OfFile);
            }
            if state.kept.is_some() {
                return Err(KeepSectionError::Kept);
            }
            state.bytes
        };
        let kept = KeptSection {
            copies: self.create_shared_memory(bytes, Charge::Uncharged)?,
            section: section.clone(),
        };
        let mut open = None;
        self.for_each_viewer(section, |space, _, views| {
            let cursor = space.cursor(&self.store);
            let shared = views.iter().filter(|view| view.sharing == Sharing::Shared);
            let root = (cursor.root(), Level::Root);
            let mut entries = shared.flat_map(|view| cursor.children(root, view.range));
            if entries.any(|(_, _, entry)| matches!(entry, UpperEntry::Table(_))) {
                open = Some(space.id());
            }
        });
        if let Some(space) = open {
            return Err(KeepSectionError::Open { space });
        }
        let pinned = {
            let mut db = self.pfns.lock();
            if db.sections.get(section.id()).kept.is_some() {
                return Err(KeepSectionError::Kept);
            }
            db.sections.keep(section.id(), kept.copies.id());
            pinned(&db, section.id())
        };
        for page in pinned {
            // What was put aside so far goes with `kept`.
            self.put_aside(section.id(), page)?;
        }
        Ok(kept)
    }

    /// The first page from `from` on that the section has, had, or came to have: which it is, and what it was. Bytes go to
    /// `into`.
    pub fn next_kept(
        &self,
        kept: &KeptSection<P::Backing>,
        from: SectionPage,
        into: &mut [u8; PAGE_SIZE],
    ) -> Option<(SectionPage, KeptPage)> {
        loop {
            let (page, place) = self.find_kept(kept, from)?;
            let (frame, whose) = match place {
                Place::Elsewhere(what) => return Some((page, what)),
                Place::Frame(frame, whose) => (frame, whose),
            };
            self.store.read(frame, 0, into);
            let mut db = self.pfns.lock();
            db.release(frame);
            let pending = db.sections.get(kept.section.id()).is_to_be_kept(page);
            // If it was put aside meanwhile, it may have been stored to: what was put aside is not.
            if whose == Whose::Aside || pending || cfg!(mutant = "kept_unlooked") {
                return Some((page, KeptPage::Bytes));
            }
        }
    }

    /// The first page from `from` on, and where what it was is.
    fn find_kept(
        &self,
        kept: &KeptSection<P::Backing>,
        from: SectionPage,
    ) -> Option<(SectionPage, Place)> {
        let mut db = self.pfns.lock();
        let (live, aside) = (
            db.sections.get(kept.section.id()),
            db.sections.get(kept.copies.id()),
        );
        let first = |state: &SectionState| state.pages.range(from..).next().map(|(page, _)| *page);
        let page = [first(live), first(aside)].into_iter().flatten().min()?;
        if page.get() >= live.kept.as_ref()?.end {
            return None;
        }
        let (state, whose) = match live.is_to_be_kept(page) {
            true => (live, Whose::Live),
            false => (aside, Whose::Aside),
        };
        let place = match state.pages.get(&page) {
            None | Some(Proto::Zeroes) => Place::Elsewhere(KeptPage::Zero),
            Some(Proto::PageFile(slot)) => Place::Elsewhere(KeptPage::Slot(*slot)),
            Some(Proto::Reading(_)) => Place::Elsewhere(KeptPage::Busy),
            Some(Proto::Resident(frame)) => {
                match db.entry(*frame).flags.contains(PfnFlags::READING) {
                    true => Place::Elsewhere(KeptPage::Busy),
                    false => Place::Frame(*frame, whose),
                }
            }
        };
        if let Place::Frame(frame, _) = place {
            db.hold(frame);
        }
        Some((page, place))
    }

    /// Puts aside what a page of a section is, if the section is kept and the page is in memory and still to be kept. It may be
    /// stored to then.
    pub(crate) fn put_aside(&self, id: SectionId, page: SectionPage) -> Result<(), NoFrame> {
        let mut db = self.pfns.lock();
        if db.sections.keeping == 0 {
            return Ok(());
        }
        db.reap();
        if still_there(&db, id, page).is_none() {
            return Ok(());
        }
        drop(db);
        let demand = Demand {
            want: Want::Anything,
            ..Demand::one_page()
        };
        let Reserve { tables, mut data } = self.reserve(demand).ok_or(NoFrame)?;
        debug_assert!(tables.is_empty(), "no table was asked for");
        let frame = data.pop().ok_or(NoFrame)?;
        let mut db = self.pfns.lock();
        let Some(from) = still_there(&db, id, page) else {
            db.give_back(frame);
            return Ok(());
        };
        db.hold(from);
        drop(db);
        // Nobody stores there before it is put aside.
        let copy = frame.forget_content().copy_of(from, &self.store);
        add(&self.counters.pages_put_aside, 1);
        let mut db = self.pfns.lock();
        db.release(from);
        match db.sections.get(id).is_to_be_kept(page) {
            true => db.put_aside(id, page, copy),
            false => db.discard(copy),
        }
        Ok(())
    }
}

/// The frame of a page that is still to be kept.
fn still_there(db: &PfnDatabase, id: SectionId, page: SectionPage) -> Option<Pfn> {
    let pending = db.sections.get(id).is_to_be_kept(page);
    db.mappable(id, page).filter(|_| pending)
}

/// The pages of a section that are pinned to be stored to.
fn pinned(db: &PfnDatabase, id: SectionId) -> alloc::vec::Vec<SectionPage> {
    let frames = db.write_pinned().iter();
    let pages = frames.filter_map(|frame| match db.entry(*frame).owner {
        Owner::Section { section, page } if section == id => Some(page),
        Owner::Section { .. }
        | Owner::None
        | Owner::Entry { .. }
        | Owner::Clone(_)
        | Owner::Entries
        | Owner::Tables
        | Owner::Root
        | Owner::Supervisor => None,
    });
    pages.collect()
}
