//! The verbs on sections: making one, its size, its pages, writing them back. Handles and prototypes
//! are in `proto/section.rs`; faults on views are in `space/view.rs`.

mod content;
mod keep;
mod lay;
mod punch;
mod reset;
mod resize;
mod thaw;
mod viewers;
mod write_back;

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;

use crate::addr::{PAGE_SIZE, PfnRange};
use crate::backend::Platform;
use crate::commit::NoCommit;
use crate::limits::PoolLayout;
use crate::manager::Manager;
use crate::outcome::{Pin, PinKind};
use crate::pfn::PfnState;
use crate::proto::{Extent, Pending, Proto, Section, SectionPage};

pub use content::{SectionIn, SectionStore};
pub use keep::{BeingKept, KeepSectionError, KeptPage, KeptSection};
pub use lay::LayError;
pub use reset::ResetSectionError;
pub use thaw::{NoFrame, Thaw};
pub use write_back::{WriteBack, WriteFailed};

/// Pages of a section looked at in one go, with the PFN lock held.
const AT_ONCE: usize = 256;

/// Why a section cannot be made.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum SectionError {
    /// The table of sections cannot grow.
    #[error("no memory for a section")]
    NoMemory,
    /// So much memory cannot be promised (`ENOMEM`).
    #[error("{pages} pages of shared memory cannot be promised")]
    NoCommit {
        /// Pages that would be charged.
        pages: u64,
    },
    /// It is kept as it was: its pages may go when that is over.
    #[error(transparent)]
    BeingKept(#[from] BeingKept),
    /// The frames are the pool's own, or none at all.
    #[error("the frames {layer:?} cannot be a layer")]
    NoLayer {
        /// The frames.
        layer: PfnRange,
    },
}

/// Whether memory is charged that a section over zeroes may come to use.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Charge {
    /// All of it, when the section is made.
    Charged,
    /// Nothing (`MAP_NORESERVE`, files): touching a page may find that there is no memory.
    Uncharged,
    /// A page when the section comes to have it (files in memory): touching it may find that there is no room.
    ByPage,
}

/// Who says whether a section may have more pages, besides the commit account: the size limit of a file system
/// in memory. It is asked with the PFN lock held, and must neither wait nor call back.
pub trait Allowance: fmt::Debug + Send + Sync {
    /// Takes so many pages, if they are there.
    #[must_use]
    fn take(&self, pages: u64) -> bool;

    /// Gives pages back.
    fn give(&self, pages: u64);
}

/// A file in memory may not have more pages (`ENOSPC`): too much memory is promised, or it has its share.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("no room for a page more")]
pub struct NoSpace;

impl Charge {
    /// Pages charged for so many bytes.
    pub(crate) fn pages(self, bytes: u64) -> u64 {
        match self {
            Self::Charged => bytes.div_ceil(PAGE_SIZE as u64),
            Self::Uncharged | Self::ByPage => 0,
        }
    }
}

/// The bytes of whole pages.
fn whole_pages(bytes: u64) -> u64 {
    let size = PAGE_SIZE as u64;
    bytes.div_ceil(size).saturating_mul(size)
}

/// Where a page of a section is, for an embedder that wants its bytes.
#[derive(Debug)]
#[must_use]
pub enum SectionAt {
    /// Not in memory: what the file has is what there is; zeroes where there is no file.
    Absent,
    /// In the page file or in an image, or just being read from there: a view brings it, or [`Manager::section_page_in`].
    PagedOut,
    /// In a frame, pinned, which may be a layer's. The embedder may load there.
    Resident(Pin),
    /// Being read: wait, and ask again.
    Reading(Pending),
}

impl<P: Platform> Manager<P> {
    /// Makes a section of `bytes` bytes over a file, or over zeroes. What is over zeroes has whole pages, which are
    /// charged.
    ///
    /// # Errors
    /// See [`SectionError`].
    pub fn create_section(
        &self,
        backing: Option<P::Backing>,
        bytes: u64,
    ) -> Result<Section<P::Backing>, SectionError> {
        match backing {
            Some(file) => self.make_section(Some(file), (bytes, None), (Charge::Uncharged, None)),
            None => self.create_shared_memory(bytes, Charge::Charged),
        }
    }

    /// Makes a section over zeroes: `bytes` bytes, rounded up to whole pages.
    ///
    /// # Errors
    /// See [`SectionError`].
    pub fn create_shared_memory(
        &self,
        bytes: u64,
        charge: Charge,
    ) -> Result<Section<P::Backing>, SectionError> {
        self.make_section(None, (whole_pages(bytes), None), (charge, None))
    }

    /// Makes an empty section that is to be a file's bytes: its pages are charged when it comes to have them, and
    /// taken from `allowance`.
    ///
    /// # Errors
    /// See [`SectionError`].
    pub fn create_file_section(
        &self,
        allowance: Arc<dyn Allowance>,
    ) -> Result<Section<P::Backing>, SectionError> {
        self.make_section(None, (0, None), (Charge::ByPage, Some(allowance)))
    }

    /// Makes a section whose pages are the frames of a *layer*: frames beyond the pool that nobody stores to as long
    /// as the manager lives, and that the store reads like any other. It can only be put under a space
    /// ([`Manager::attach_image`]); `backing` has the same bytes.
    ///
    /// # Errors
    /// See [`SectionError`].
    pub fn create_frozen_section(
        &self,
        backing: P::Backing,
        layer: PfnRange,
    ) -> Result<Section<P::Backing>, SectionError> {
        let PoolLayout { data, tables } = self.layout;
        let beyond = !layer.overlaps(data) && !layer.overlaps(tables);
        if !beyond || layer.start.get() == 0 || layer.end() > u64::from(u32::MAX) {
            return Err(SectionError::NoLayer { layer });
        }
        let bytes = u64::from(layer.count) * PAGE_SIZE as u64;
        let charge = (Charge::Uncharged, None);
        self.make_section(Some(backing), (bytes, Some(layer)), charge)
    }

    fn make_section(
        &self,
        backing: Option<P::Backing>,
        (bytes, layer): (u64, Option<PfnRange>),
        (charge, allowance): (Charge, Option<Arc<dyn Allowance>>),
    ) -> Result<Section<P::Backing>, SectionError> {
        let mut db = self.pfns.lock();
        db.reap();
        if db.injected_failure() {
            return Err(SectionError::NoMemory);
        }
        let pages = charge.pages(bytes);
        let promised = db.commit.charge(pages);
        promised.map_err(|NoCommit| SectionError::NoCommit { pages })?;
        let made = db
            .sections
            .create(backing, (bytes, layer), (charge, allowance));
        if made.is_err() {
            db.commit.release(pages);
        }
        made.map_err(|_| SectionError::NoMemory)
    }

    /// Where a section ends, in bytes.
    #[must_use]
    pub fn section_size(&self, section: &Section<P::Backing>) -> u64 {
        self.pfns.lock().sections.get(section.id()).bytes
    }

    /// Whether the section's memory was charged when it was made.
    #[must_use]
    pub fn section_charge(&self, section: &Section<P::Backing>) -> Charge {
        self.pfns.lock().sections.get(section.id()).charge
    }

    /// Pages charged for a section, whether or not it has them.
    #[must_use]
    pub fn section_charged(&self, section: &Section<P::Backing>) -> u64 {
        self.pfns.lock().sections.get(section.id()).charged()
    }

    /// Frames a section has.
    #[must_use]
    pub fn section_resident(&self, section: &Section<P::Backing>) -> u64 {
        let db = self.pfns.lock();
        let pages = db.sections.get(section.id()).pages.values();
        let resident = pages.filter(|proto| matches!(proto, Proto::Resident(_)));
        resident.count() as u64
    }

    /// Pages a section has, wherever they are, those that are only promised included.
    #[must_use]
    pub fn section_extent(&self, section: &Section<P::Backing>) -> u64 {
        self.pfns.lock().sections.get(section.id()).extent()
    }

    /// The pages a section has in memory or in the page file, rising; not those that are a layer's.
    #[must_use]
    pub fn section_pages(&self, section: &Section<P::Backing>) -> Vec<SectionPage> {
        let db = self.pfns.lock();
        let pages = db.sections.get(section.id()).pages.iter();
        let had = |proto: &Proto| match proto {
            Proto::Resident(_) | Proto::PageFile(_) => true,
            Proto::Reading(_) | Proto::Zeroes => false,
        };
        let pages = pages.filter(|(_, proto)| had(proto));
        pages.map(|(page, _)| *page).collect()
    }

    /// The pages a section has in a layer, rising: first pages, and the layer's frames, which stay as they are.
    #[must_use]
    pub fn section_frozen(&self, section: &Section<P::Backing>) -> Vec<(u64, PfnRange)> {
        let db = self.pfns.lock();
        let frozen = db.sections.get(section.id()).frozen.as_ref();
        frozen.map_or_else(Vec::new, |frozen| frozen.frames(0..SectionPage::COUNT))
    }

    /// The pages a section has in an image, rising, and the section over that: pages that nobody has asked for yet.
    #[must_use]
    pub fn section_unread(
        &self,
        section: &Section<P::Backing>,
    ) -> Option<(Section<P::Backing>, Vec<Extent>)> {
        let db = self.pfns.lock();
        let unread = db.sections.get(section.id()).frozen.as_ref()?;
        unread.image()?;
        let runs = unread.runs(0..SectionPage::COUNT);
        Some((section.image()?.clone(), runs))
    }

    /// Where a page is, so that what is stored to the file elsewhere can be stored there too, and what
    /// was stored through a view can be read. The pin ends with [`Manager::unpin`].
    pub fn section_page(&self, section: &Section<P::Backing>, page: SectionPage) -> SectionAt {
        let mut db = self.pfns.lock();
        db.reap();
        let state = db.sections.get(section.id());
        if let Some(pfn) = state.frozen(page) {
            let kind = PinKind::Frozen;
            return SectionAt::Resident(Pin { pfn, kind });
        }
        if state.unread(page).is_some() {
            return SectionAt::PagedOut;
        }
        match state.pages.get(&page) {
            None | Some(Proto::Zeroes) => SectionAt::Absent,
            Some(Proto::Reading(record)) => SectionAt::Reading(Pending::new(record)),
            Some(Proto::PageFile(_)) => SectionAt::PagedOut,
            Some(Proto::Resident(_)) => match db.mappable(section.id(), page) {
                Some(pfn) => {
                    db.hold(pfn);
                    let kind = PinKind::Read;
                    SectionAt::Resident(Pin { pfn, kind })
                }
                None => SectionAt::PagedOut,
            },
        }
    }

    /// Forgets the pages of a file that nobody maps or holds and that the file has too, because the
    /// file has changed; gives back how many. Others stay as they are.
    pub fn section_forget(&self, section: &Section<P::Backing>) -> u64 {
        let (mut forgotten, mut from) = (0, SectionPage::new(0));
        while let Some(first) = from {
            let mut db = self.pfns.lock();
            let state = db.sections.get(section.id());
            let some = state.pages.range(first..).take(AT_ONCE);
            let some: Vec<_> = some.map(|(page, _)| *page).collect();
            let idle = |page: &SectionPage| {
                let frame = state.resident(*page).filter(|_| state.file);
                frame.is_some_and(|frame| db.entry(frame).state() == PfnState::Standby)
            };
            let idle: Vec<_> = some.iter().copied().filter(idle).collect();
            for page in &idle {
                db.forget_page(section.id(), *page);
            }
            forgotten += idle.len() as u64;
            let last = some.last().filter(|_| some.len() == AT_ONCE);
            from = last.and_then(|last| SectionPage::new(last.get() + 1));
        }
        forgotten
    }
}
