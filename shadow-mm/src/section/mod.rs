//! The verbs on sections: making one, its size, its pages, writing them back. Handles and prototypes
//! are in `proto/section.rs`; faults on views are in `space/view.rs`.

mod resize;
mod viewers;
mod write_back;

use alloc::vec::Vec;

use crate::backend::Platform;
use crate::manager::Manager;
use crate::outcome::Pin;
use crate::proto::{Pending, Proto, Section, SectionPage};
use crate::stats::add;

pub use write_back::{WriteBack, WriteFailed};

/// Why a section cannot be made.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum SectionError {
    /// The table of sections cannot grow.
    #[error("no memory for a section")]
    NoMemory,
}

/// Where a page of a section is, for an embedder that wants its bytes.
#[derive(Debug)]
#[must_use]
pub enum SectionAt {
    /// Not in memory: what the file has is what there is; zeroes where there is no file.
    Absent,
    /// In a frame, pinned. The embedder may load and store there.
    Resident(Pin),
    /// Being read: wait, and ask again.
    Reading(Pending),
}

impl<P: Platform> Manager<P> {
    /// Makes a section of `bytes` bytes over a file, or over zeroes.
    ///
    /// # Errors
    /// [`SectionError::NoMemory`].
    pub fn create_section(
        &self,
        backing: Option<P::Backing>,
        bytes: u64,
    ) -> Result<Section<P::Backing>, SectionError> {
        let mut db = self.pfns.lock();
        db.reap();
        if db.injected_failure() {
            return Err(SectionError::NoMemory);
        }
        let made = db.sections.create(backing, bytes);
        made.map_err(|_| SectionError::NoMemory)
    }

    /// Where a section ends, in bytes.
    #[must_use]
    pub fn section_size(&self, section: &Section<P::Backing>) -> u64 {
        self.pfns.lock().sections.get(section.id()).bytes
    }

    /// Frames a section has.
    #[must_use]
    pub fn section_resident(&self, section: &Section<P::Backing>) -> u64 {
        let db = self.pfns.lock();
        let pages = db.sections.get(section.id()).pages.values();
        let resident = pages.filter(|proto| matches!(proto, Proto::Resident(_)));
        resident.count() as u64
    }

    /// The pages a section has in memory, rising.
    #[must_use]
    pub fn section_pages(&self, section: &Section<P::Backing>) -> Vec<SectionPage> {
        let db = self.pfns.lock();
        let pages = db.sections.get(section.id()).pages.iter();
        let resident = pages.filter(|(_, proto)| matches!(proto, Proto::Resident(_)));
        resident.map(|(page, _)| *page).collect()
    }

    /// Where a page is, so that what is stored to the file elsewhere can be stored there too, and what
    /// was stored through a view can be read. The pin ends with [`Manager::unpin`].
    pub fn section_page(&self, section: &Section<P::Backing>, page: SectionPage) -> SectionAt {
        let mut db = self.pfns.lock();
        db.reap();
        match db.sections.get(section.id()).pages.get(&page) {
            None => SectionAt::Absent,
            Some(Proto::Reading(record)) => SectionAt::Reading(Pending::new(record)),
            Some(Proto::Resident(frame)) => {
                let (pfn, write) = (*frame, false);
                db.hold(pfn);
                SectionAt::Resident(Pin { pfn, write })
            }
        }
    }

    /// Frees up to `most` pages of files that nobody maps or holds and that can be read again; gives
    /// back how many.
    pub fn evict_idle(&self, most: usize) -> usize {
        let evicted = self.pfns.lock().evict_section_pages(most);
        add(&self.counters.section_pages_evicted, evicted as u64);
        evicted
    }

    /// Forgets the pages of a file that nobody maps or holds and that the file has too, because the
    /// file has changed; gives back how many. Others stay as they are.
    pub fn section_forget(&self, section: &Section<P::Backing>) -> u64 {
        let mut db = self.pfns.lock();
        let state = db.sections.get(section.id());
        let resident = state.pages.iter().filter_map(|(page, proto)| match proto {
            Proto::Resident(frame) => Some((*page, *frame)),
            Proto::Reading(_) => None,
        });
        let idle = resident.filter(|(_, frame)| state.file && db.is_idle(*frame));
        let idle: Vec<_> = idle.map(|(page, _)| page).collect();
        for page in &idle {
            db.forget_page(section.id(), *page);
        }
        idle.len() as u64
    }
}
