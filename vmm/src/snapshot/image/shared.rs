//! The pages of what processes share: sections over nothing, and files in memory.
//!
//! They are the layer's for a guest over one; for any other they are in the snapshot, and read when somebody wants them. Nothing is
//! done for each of them here.

use std::sync::Arc;

use super::load::{ImageLoader, LoadError};
use super::{ImageData, Runs, SectionData};
use crate::memory::Backing;
use crate::snapshot::records::{BytesRef, LoadBytes, MemoryError};
use shadow_mm::{Charge, Extent, Extents, Section};

/// Where sections and files in memory have which pages of the snapshot; none of those that make no sense, or that no section
/// can have.
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
    /// Has a section that has no pages have those of the image.
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

    /// A section over nothing, with its pages.
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
        self.lay(&section, data.bytes, extents)?;
        Ok(section)
    }

    pub(super) fn load_bytes(
        &self,
        at: BytesRef,
        into: &dyn LoadBytes,
    ) -> Result<u64, MemoryError> {
        let of = Arc::clone(&self.of);
        let data = of.data.bytes.get(at.0 as usize);
        let data = data.ok_or(LoadError::Nonsense("files in memory"))?;
        let extents = of.extents.bytes.get(at.0 as usize);
        self.lay(into.section(), data.length, extents)?;
        Ok(data.length)
    }
}
