//! The bytes of a section that is a file's storage, for an embedder that reads and writes the file: pages that
//! come to be, come back from the page file, or are promised, without a space that has a view.
//!
//! Loading is [`Manager::section_page`], with [`Manager::section_page_in`] for what is in the page file; storing
//! is [`Manager::section_page_to_store`]. Views see the same frames: what one stores the other loads.

use alloc::vec::Vec;
use core::ops::Range;

use crate::backend::Platform;
use crate::manager::Manager;
use crate::outcome::{IoTicket, Pin};
use crate::page_file::PageIn;
use crate::proto::{Proto, Section, SectionPage};
use crate::section::{AT_ONCE, NoFrame, NoSpace, SectionAt, Thaw};
use crate::space::{Unmade, Unread, ViewIn};

/// What it takes to have a page of a section in memory.
#[derive(Debug)]
#[must_use]
pub enum SectionIn<P: Platform> {
    /// This is to be read, and given to [`Manager::complete_page_in`].
    PageIn(PageIn<P>),
    /// This is to be read, and given to [`Manager::complete_read`].
    Read(IoTicket<P>),
    /// Somebody reads it: wait until a read ends, and look again.
    Collided,
    /// No frame is left.
    NoMemory,
    /// It is elsewhere by now: look again.
    Again,
}

/// A page of a section that is to be stored to.
#[derive(Debug)]
#[must_use]
pub enum SectionStore<P: Platform> {
    /// Here; the pin ends with [`Manager::unpin_stored`].
    There(Pin),
    /// Not in memory yet.
    In(SectionIn<P>),
    /// It is a layer's: have it copied ([`Manager::thaw`]), and look again.
    Frozen(Thaw<P::Backing>),
    /// The section may not have the page.
    NoSpace,
    /// The page lies beyond the section's end.
    BeyondEnd,
}

impl<P: Platform> Manager<P> {
    /// Begins to read a page that is in the page file or in an image, and its neighbours.
    pub fn section_page_in(
        &self,
        section: &Section<P::Backing>,
        page: SectionPage,
    ) -> SectionIn<P> {
        let unread = {
            let db = self.pfns.lock();
            db.sections.get(section.id()).unread(page).is_some()
        };
        if unread {
            return match self.take_for_bytes(section, page) {
                Unread::Read(ticket) => SectionIn::Read(ticket),
                Unread::Wait(_) => SectionIn::Collided,
                Unread::NoMemory => SectionIn::NoMemory,
                Unread::Again => SectionIn::Again,
            };
        }
        let reading = {
            let db = self.pfns.lock();
            let there = db.sections.get(section.id()).resident(page).is_some();
            there && db.mappable(section.id(), page).is_none()
        };
        if reading {
            return SectionIn::Collided;
        }
        match self.start_view_in(section, page, None) {
            ViewIn::PageIn(ticket) => SectionIn::PageIn(ticket),
            ViewIn::NoMemory => SectionIn::NoMemory,
            ViewIn::Again => SectionIn::Again,
        }
    }

    /// A page to be stored to: made, of zeroes, if the section does not have it.
    pub fn section_page_to_store(
        &self,
        section: &Section<P::Backing>,
        page: SectionPage,
    ) -> SectionStore<P> {
        debug_assert!(section.backing().is_none(), "a file is written, not this");
        let (there, frozen) = {
            let db = self.pfns.lock();
            let state = db.sections.get(section.id());
            (state.contains(page), state.frozen(page).is_some())
        };
        if !there {
            return SectionStore::BeyondEnd;
        }
        if frozen {
            return SectionStore::Frozen(Thaw::new(section, page, 1));
        }
        match self.section_page(section, page) {
            SectionAt::Resident(pin) => match self.put_aside(section.id(), page) {
                Ok(()) => SectionStore::There(pin),
                Err(NoFrame) => {
                    self.unpin(pin);
                    SectionStore::In(SectionIn::NoMemory)
                }
            },
            SectionAt::PagedOut => SectionStore::In(self.section_page_in(section, page)),
            SectionAt::Reading(_) => SectionStore::In(SectionIn::Collided),
            SectionAt::Absent => match self.make_zeroes(section, page, 1) {
                Ok(_) => SectionStore::In(SectionIn::Again),
                Err(Unmade::NoMemory) => SectionStore::In(SectionIn::NoMemory),
                Err(Unmade::NoSpace) => SectionStore::NoSpace,
            },
        }
    }

    /// Ends a pin of a page that was stored to. What was written to the page file meanwhile is stale.
    pub fn unpin_stored(&self, pin: Pin) {
        let (pfn, _) = pin.into_parts();
        let mut db = self.pfns.lock();
        if cfg!(not(mutant = "store_unnoticed")) {
            db.mark_modified(pfn);
        }
        db.release(pfn);
    }

    /// Promises pages that the section does not have: storing to them later needs no room.
    ///
    /// # Errors
    /// [`NoSpace`]; nothing is promised then.
    pub fn reserve_section(
        &self,
        section: &Section<P::Backing>,
        pages: Range<u64>,
    ) -> Result<(), NoSpace> {
        let id = section.id();
        let mut made = Vec::new();
        let mut from = pages.start;
        let mut result = Ok(());
        while from < pages.end && result.is_ok() {
            let mut db = self.pfns.lock();
            db.reap();
            let until = pages.end.min(from + AT_ONCE as u64);
            for page in (from..until).filter_map(SectionPage::new) {
                let state = db.sections.get(id);
                let has = state.pages.contains_key(&page) || state.is_below(page);
                if !state.contains(page) || has {
                    continue;
                }
                result = db.charge_page(id, page);
                if result.is_err() {
                    break;
                }
                let state = db.sections.get_mut(id);
                state.pages.insert(page, Proto::Zeroes);
                made.push(page);
            }
            from = until;
        }
        if result.is_err() {
            self.unreserve(section, &made);
        }
        result
    }

    /// Takes promises back, of pages that nobody has touched meanwhile.
    fn unreserve(&self, section: &Section<P::Backing>, pages: &[SectionPage]) {
        let mut db = self.pfns.lock();
        for page in pages {
            let state = db.sections.get_mut(section.id());
            if matches!(state.pages.get(page), Some(Proto::Zeroes)) {
                state.pages.remove(page);
                db.discharge_pages(section.id(), 1);
            }
        }
    }
}
