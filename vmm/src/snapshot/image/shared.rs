//! The pages of what processes share: sections over nothing, and files in memory.
//!
//! For a guest over a layer they are the layer's, and nothing is done for each of them; for any other they are read at once.

use std::sync::Arc;

use super::load::{ImageLoader, LoadError};
use super::scratch::Scratch;
use super::{ImageData, Runs, SectionData};
use crate::memory::{AccessError, Backing, FRAME};
use crate::snapshot::format::StoredPage;
use crate::snapshot::records::{BytesRef, LoadBytes, MemoryError, Page};
use shadow_mm::{Charge, Extent, Extents, Section};

/// Where sections and files in memory have which pages of the snapshot; none of those that make no sense, or that no layer can
/// have.
#[derive(Debug)]
pub(super) struct AllExtents {
    pub(super) sections: Vec<Option<Extents>>,
    bytes: Vec<Option<Extents>>,
}

impl AllExtents {
    pub(super) fn of(data: &ImageData) -> Self {
        Self {
            sections: data.sections.iter().map(|s| extents(&s.pages)).collect(),
            bytes: data.bytes.iter().map(|b| extents(&b.pages)).collect(),
        }
    }
}

fn extents(runs: &Runs) -> Option<Extents> {
    Extents::new(runs.0.iter().map(|run| Extent {
        first: run.start,
        count: run.count,
        stored: run.stored,
    }))
}

impl ImageLoader {
    /// Has pages of a section that has none be the layer's: nothing is done for each of them.
    fn lay(
        &self,
        section: &Section<Backing>,
        bytes: u64,
        extents: Option<&Option<Extents>>,
    ) -> Result<(), LoadError> {
        let manager = &self.memory.manager;
        let extents = extents.and_then(Option::as_ref);
        let extents = extents.ok_or(LoadError::Nonsense("pages"))?;
        if manager.section_size(section) < bytes {
            let flushes = manager.resize_section(section, bytes)?;
            flushes
                .into_iter()
                .for_each(|flush| self.memory.submit(flush));
        }
        Ok(manager.lay_section(section, &self.image, extents)?)
    }

    /// A section over nothing, with its pages in it.
    pub(super) fn make_section(
        &self,
        data: &SectionData,
        extents: Option<&Option<Extents>>,
    ) -> Result<Section<Backing>, LoadError> {
        let charge = if data.charged {
            Charge::Charged
        } else {
            Charge::Uncharged
        };
        let manager = &self.memory.manager;
        let section = manager.create_shared_memory(data.bytes, charge)?;
        if self.image.is_frozen() {
            self.lay(&section, data.bytes, extents)?;
            return Ok(section);
        }
        let scratch = Scratch::new(&self.memory)?;
        for run in &data.pages.0 {
            self.checked(run)?;
            let shown = scratch.view(&section, run.start, run.count)?;
            let mut bytes = [0; FRAME];
            for (ahead, vpn) in shown.iter().enumerate() {
                self.read(run.stored + ahead as u64, &mut bytes)?;
                scratch
                    .store(vpn.va(), &bytes)
                    .map_err(|error| match error {
                        AccessError::NoMemory => LoadError::NoMemory,
                        AccessError::Denied(_) => LoadError::Nonsense("sections"),
                    })?;
            }
            scratch.close(shown);
        }
        Ok(section)
    }

    fn read(&self, page: u64, bytes: &mut [u8; FRAME]) -> Result<(), LoadError> {
        let read = self.of.snapshot.read_pages(StoredPage::new(page), bytes);
        match read.map_err(LoadError::Page)? {
            FRAME => Ok(()),
            _ => Err(LoadError::Nonsense("pages")),
        }
    }

    pub(super) fn load_bytes(
        &self,
        at: BytesRef,
        into: &dyn LoadBytes,
    ) -> Result<u64, MemoryError> {
        let of = Arc::clone(&self.of);
        let data = of.data.bytes.get(at.0 as usize);
        let data = data.ok_or(LoadError::Nonsense("files in memory"))?;
        if self.image.is_frozen() {
            let extents = of.extents.bytes.get(at.0 as usize);
            self.lay(into.section(), data.length, extents)?;
            return Ok(data.length);
        }
        let mut bytes: Page = [0; FRAME];
        for run in &data.pages.0 {
            for ahead in 0..run.count {
                self.read(run.stored.saturating_add(ahead), &mut bytes)?;
                into.page(run.start.saturating_add(ahead), &bytes)?;
            }
        }
        Ok(data.length)
    }
}
