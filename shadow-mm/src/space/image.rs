//! A space over an image: attaching one, and telling where the content of a page without an entry is.

use alloc::sync::Arc;
use alloc::vec::Vec;

use crate::access::Prot;
use crate::addr::{PAGE_SIZE, Vpn, VpnRange};
use crate::backend::Platform;
use crate::manager::Manager;
use crate::proto::{Section, SectionPage};
use crate::pte::Entry;
use crate::space::{Space, SpaceState};
use crate::vad::{ImageRun, Sharing};

/// Why an image was not attached. Nothing has changed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ImageError {
    /// The space is being torn down.
    #[error("the address space is being torn down")]
    SpaceDeleted,
    /// Part of the range is not mapped privately.
    #[error("page {vpn} is not private memory")]
    NotPrivate {
        /// The first page of which that is so.
        vpn: Vpn,
    },
    /// A page of the range has content already.
    #[error("page {vpn} has content already")]
    InUse {
        /// Such a page.
        vpn: Vpn,
    },
    /// The section has not so many pages, or none that can be read again.
    #[error("the section has no page {page:?}")]
    NoSuchPage {
        /// The first page that was asked for.
        page: SectionPage,
    },
}

/// What a source of pages is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Origin {
    /// What the mapping says.
    View,
    /// The image under it.
    Image,
}

/// Where pages without an entry come from: a view of a section, or the image.
#[derive(Clone)]
pub(crate) struct Source<B> {
    pub(crate) section: Section<B>,
    /// A page and the section's page it is.
    start: (Vpn, u64),
    /// The pages of which that goes on to be so.
    pub(crate) range: VpnRange,
    pub(crate) sharing: Sharing,
    pub(crate) prot: Prot,
    /// Where pages that were just made ahead of the guest end.
    pub(crate) ahead: u64,
    pub(crate) origin: Origin,
}

impl<B> Source<B> {
    /// The section's page that one of the pages shows.
    pub(crate) fn page(&self, vpn: Vpn) -> Option<SectionPage> {
        let ahead = vpn.get().checked_sub(self.start.0.get())?;
        SectionPage::new(self.start.1 + ahead)
    }
}

impl<B: Clone + Eq> SpaceState<B> {
    /// Where a mapped page's content comes from; `None` means zeroes.
    pub(crate) fn source(&self, vpn: Vpn) -> Option<Source<B>> {
        let vad = self.vads.find(vpn)?;
        let range = self.images.extent(vpn, vad.range);
        let (section, start, (sharing, origin)) = match (self.images.find(vpn), vad.view()) {
            (Some(run), _) => {
                let start = (run.range.start(), run.first.get());
                (&run.section, start, (Sharing::Private, Origin::Image))
            }
            (None, Some((section, first, sharing))) => {
                let start = (vad.range.start(), first);
                (section, start, (sharing, Origin::View))
            }
            (None, None) => return None,
        };
        Some(Source {
            section: section.clone(),
            start,
            range,
            sharing,
            prot: vad.prot,
            ahead: vad.around.next,
            origin,
        })
    }

    /// Pages were taken away: so is the image under them.
    pub(crate) fn carve_image(&mut self, range: VpnRange) -> Vec<ImageRun<B>> {
        if self.images.overlapping(range).next().is_none() {
            return Vec::new();
        }
        Arc::make_mut(&mut self.images).carve(range)
    }
}

impl<P: Platform> Manager<P> {
    /// Puts an image under pages that are mapped privately and have no content yet: until they are
    /// stored to, they are the section's pages from `first` on. The section must be over a file, and must
    /// never change its size.
    ///
    /// # Errors
    /// See [`ImageError`]; nothing has changed then.
    pub fn attach_image(
        &self,
        space: &Space<P>,
        range: VpnRange,
        section: &Section<P::Backing>,
        first: SectionPage,
    ) -> Result<(), ImageError> {
        let mut state = space.state.lock();
        if !state.alive {
            return Err(ImageError::SpaceDeleted);
        }
        let mut at = range.start().get();
        for vad in state.vads.overlapping(range) {
            let shared = vad.view().is_some_and(|(_, _, s)| s == Sharing::Shared);
            if shared || vad.range.start().get() > at {
                break;
            }
            at = vad.range.end();
        }
        if let Some(vpn) = Vpn::new(at).filter(|vpn| range.contains(*vpn)) {
            return Err(ImageError::NotPrivate { vpn });
        }
        let under = state.images.overlapping(range).next();
        let used = under.map(|run| run.range.start().max(range.start()));
        if let Some(vpn) = used.or_else(|| self.first_used(space, range)) {
            return Err(ImageError::InUse { vpn });
        }
        let bytes = (first.get() + range.count()) * PAGE_SIZE as u64;
        let has = |db: &crate::pfn::PfnDatabase| {
            let section = db.sections.get(section.id());
            section.file && section.bytes >= bytes
        };
        if !has(&self.pfns.lock()) {
            return Err(ImageError::NoSuchPage { page: first });
        }
        let section = section.clone();
        Arc::make_mut(&mut state.images).insert(ImageRun {
            range,
            section,
            first,
        });
        Ok(())
    }

    /// A page of the range whose entry is in use.
    fn first_used(&self, space: &Space<P>, range: VpnRange) -> Option<Vpn> {
        let cursor = space.cursor(&self.store);
        let mut used = None;
        cursor.for_each_leaf(range, |run| {
            let mut pages = run.pages();
            let found = pages.find(|(index, _)| cursor.leaf(run.table, *index) != Entry::Empty);
            used = used.or(found.map(|(_, vpn)| vpn));
        });
        used
    }
}
