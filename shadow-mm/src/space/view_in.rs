//! Reading pages of shared memory back from the page file.
//!
//! As for private pages (see `page_in.rs`), but the pages belong to a section: the ticket's frames are the section's
//! from the start and marked as being read, and whoever else wants one *collides*. When the read has ended, the
//! pages are on the standby list, and the wanted one is mapped.

use alloc::vec::Vec;

use crate::addr::Pfn;
use crate::backend::Platform;
use crate::manager::{Demand, Manager};
use crate::outcome::FaultOf;
use crate::page_file::{PageIn, Slot};
use crate::pfn::{Owner, PfnDatabase, Taken, Want};
use crate::proto::{Proto, Section, SectionId, SectionPage};

/// How reading a page back began.
pub(crate) enum ViewIn<P: Platform> {
    /// This is to be read.
    PageIn(PageIn<P>),
    /// No frame is left.
    NoMemory,
    /// The page is elsewhere by now: look again.
    Again,
}

impl<P: Platform> Manager<P> {
    /// Reserves frames for a section's page and its neighbours, and says what to read into them.
    pub(crate) fn start_view_in(
        &self,
        section: &Section<P::Backing>,
        page: SectionPage,
        fault: Option<FaultOf<P>>,
    ) -> ViewIn<P> {
        let (id, window) = (section.id(), u64::from(self.clusters.page_file));
        let (first, count) = {
            let db = self.pfns.lock();
            cluster(&db, id, page, if db.short() { 1 } else { window })
        };
        let before = page.get() - first;
        let demand = Demand {
            tables: 0,
            data: before as usize + 1,
            extra: (count - before - 1) as usize,
            want: Want::Anything,
        };
        let (first, reserve) = match self.reserve(demand) {
            Some(reserve) => (first, reserve),
            None => match self.reserve(Demand::one_page()) {
                Some(reserve) => (page.get(), reserve),
                None => return ViewIn::NoMemory,
            },
        };
        let mut db = self.pfns.lock();
        let read = begin(&mut db, id, (first, page, window), reserve.data);
        drop(db);
        match read {
            Some((slot, frames, wanted)) => ViewIn::PageIn(PageIn {
                fault,
                slot,
                frames,
                wanted,
            }),
            None => ViewIn::Again,
        }
    }
}

/// The slot a section's page is in, if it is in one.
fn slot_of(db: &PfnDatabase, id: SectionId, page: u64) -> Option<Slot> {
    let section = db.sections.get(id);
    let page = SectionPage::new(page).filter(|page| section.contains(*page))?;
    match section.pages.get(&page) {
        Some(Proto::PageFile(slot)) => Some(*slot),
        Some(Proto::Resident(_) | Proto::Reading(_) | Proto::Zeroes) | None => None,
    }
}

/// The pages around the wanted one, in its aligned window, that one read can fill: the first, and how many.
fn cluster(db: &PfnDatabase, id: SectionId, page: SectionPage, window: u64) -> (u64, u64) {
    let page = page.get();
    let Some(slot) = slot_of(db, id, page) else {
        return (page, 1);
    };
    let alike = |other: u64| {
        let expected = (u64::from(slot.get()) + other).checked_sub(page);
        slot_of(db, id, other).is_some_and(|found| Some(u64::from(found.get())) == expected)
    };
    let start = page - page % window;
    let first = (start..page).rev().take_while(|p| alike(*p)).last();
    let ahead = (page + 1..start + window).take_while(|p| alike(*p)).count();
    let first = first.unwrap_or(page);
    (first, page - first + 1 + ahead as u64)
}

/// Makes the frames the section's for the pages from `first` on that still are in consecutive slots, and gives the others
/// back: the first slot, the frames, and which of them is for the wanted page. `None` if that is elsewhere.
fn begin(
    db: &mut PfnDatabase,
    id: SectionId,
    (first, wanted, window): (u64, SectionPage, u64),
    frames: Vec<Taken>,
) -> Option<(Slot, Vec<Pfn>, usize)> {
    // Looked at again: the lock was not held while the frames were taken.
    let (still, count) = cluster(db, id, wanted, window);
    let first = first.max(still);
    let end = (still + count).min(first + frames.len() as u64);
    let slot = slot_of(db, id, wanted.get()).and_then(|_| slot_of(db, id, first));
    let mut frames = frames.into_iter();
    let mut used = Vec::new();
    for page in (first..end).filter(|_| slot.is_some() && end > wanted.get()) {
        let found = slot_of(db, id, page).zip(SectionPage::new(page));
        let Some(((slot, page), frame)) = found.zip(frames.next()) else {
            break;
        };
        let pfn = db.begin_read(frame, Owner::Section { section: id, page }, slot);
        let pages = &mut db.sections.get_mut(id).pages;
        pages.insert(page, Proto::Resident(pfn));
        db.sections.resident += 1;
        used.push(pfn);
    }
    frames.for_each(|frame| db.give_back(frame));
    let at = (wanted.get() - first) as usize;
    slot.filter(|_| at < used.len())
        .map(|slot| (slot, used, at))
}
