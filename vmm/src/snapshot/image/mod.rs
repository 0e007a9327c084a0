//! The memory image of a snapshot: which pages the spaces, the sections and the files in memory have, and
//! where in the snapshot each page is.
//!
//! [`ImageWriter`] makes it of a guest that stands still for the beginning of that. A page that several of them share, because
//! they were forked, is written once; free frames and zeroes are not written at all. [`ImageLoader`] makes spaces
//! of it again: their mappings at once, their pages when they are touched (`docs/mm-model.md`, "Images"),
//! out of a section over the snapshot ([`ImageContent`]).
//!
//! Pages of mapped files are not in it, only what a guest has made of them for itself; files in memory
//! and anonymous shared memory are, and are read when they are wanted too (`shared.rs`).

mod content;
#[cfg(test)]
pub(crate) mod dump;
mod forked;
mod kept;
mod load;
mod look;
mod pages;
mod rebase;
mod reshape;
mod save;
mod scratch;
mod sections;
mod shared;
#[cfg(test)]
mod tests;
mod unread;

use serde::{Deserialize, Serialize};
use shadow_mm::{VadFlags, VpnRange};

use super::format::StoredPage;
use super::records::ContentRef;

pub use content::ImageContent;
pub use forked::{SeedLoader, Seeds};
pub use kept::{KeptMemory, Left};
pub use load::{Image, ImageLoader, LoadError, Loaded, Pages, WorkingSet};
pub use rebase::{Copied, RebaseError};
pub use save::{ImageWriter, SaveError, Saved};

/// A section of the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct SectionRef(u32);

/// Neighbouring pages that are neighbouring pages of the snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Run {
    /// The first page.
    start: u64,
    /// How many.
    count: u64,
    /// The snapshot's page that the first one is.
    stored: u64,
}

impl Run {
    /// The page behind the last one. A damaged run's may be any.
    fn end(&self) -> u64 {
        self.start.saturating_add(self.count)
    }

    /// What of it is in a range; none if nothing is.
    fn part(&self, range: std::ops::Range<u64>) -> Option<Self> {
        let start = self.start.max(range.start);
        let count = self.end().min(range.end).checked_sub(start)?;
        let stored = self.stored.checked_add(start - self.start)?;
        (count > 0).then_some(Self {
            start,
            count,
            stored,
        })
    }
}

/// Runs, being collected in rising order.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Runs(Vec<Run>);

impl Runs {
    fn push(&mut self, page: u64, stored: StoredPage) {
        let stored = stored.get();
        match self.0.last_mut() {
            Some(last) if last.start + last.count == page && last.stored + last.count == stored => {
                last.count += 1;
            }
            Some(_) | None => self.0.push(Run {
                start: page,
                count: 1,
                stored,
            }),
        }
    }
}

/// What a mapping is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum KindData {
    Anonymous,
    Private { section: u32, offset: u64 },
    Shared { section: u32, offset: u64 },
}

/// A mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct VadData {
    start: u64,
    count: u64,
    prot: u8,
    flags: u8,
    tag: u32,
    kind: KindData,
}

/// An address space.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct SpaceData {
    vads: Vec<VadData>,
    pages: Runs,
    /// Pages that were in use lately: first page and count.
    working_set: Vec<(u64, u64)>,
    /// The least and the most pages the trimmer is to leave it.
    limits: (u64, u64),
}

/// A section.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct SectionData {
    bytes: u64,
    /// Its memory was promised when it was made.
    charged: bool,
    /// The file it is over; without one it has its pages here.
    content: Option<ContentRef>,
    /// The same file open for writing, if it is mapped so.
    writer: Option<ContentRef>,
    pages: Runs,
}

/// A file in memory.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct BytesData {
    length: u64,
    pages: Runs,
}

/// All of it.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct ImageData {
    spaces: Vec<SpaceData>,
    sections: Vec<SectionData>,
    bytes: Vec<BytesData>,
}

/// Flags of mappings that are kept: all but the manager's own.
fn kept_flags() -> VadFlags {
    VadFlags::all() - VadFlags::CHARGED
}

/// A range, if guests may map it at all.
fn range(start: u64, count: u64) -> Option<VpnRange> {
    VpnRange::new(shadow_mm::Vpn::new(start)?, count)
}
