//! Transfers to and from the page file that the embedder must do.

use alloc::vec::Vec;
use core::fmt;

use super::{Slot, SlotRun};
use crate::addr::{PAGE_SIZE, Pfn};
use crate::backend::Platform;
use crate::outcome::FaultOf;

/// A read of the page file: consecutive slots into frames.
///
/// The frames belong to the ticket. A dropped ticket keeps them in flight for ever, and whoever waits
/// for them waits as long.
#[must_use = "others wait for it until Manager::complete_page_in"]
pub struct PageIn<P: Platform> {
    /// The fault that is made again when the read has ended; none if a section's page was wanted as such.
    pub(crate) fault: Option<FaultOf<P>>,
    pub(crate) slot: Slot,
    pub(crate) frames: Vec<Pfn>,
    /// Which of the frames is for the wanted page.
    pub(crate) wanted: usize,
}

impl<P: Platform> PageIn<P> {
    /// Where to begin in the page file, in bytes.
    #[must_use]
    pub fn offset(&self) -> u64 {
        self.slot.offset()
    }

    /// Where the bytes go: one frame for each slot.
    #[must_use]
    pub fn frames(&self) -> &[Pfn] {
        &self.frames
    }

    /// How many bytes to read.
    #[must_use]
    pub fn length(&self) -> usize {
        self.frames.len() * PAGE_SIZE
    }
}

impl<P: Platform> fmt::Debug for PageIn<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PageIn")
            .field("space", &self.fault.as_ref().map(|fault| fault.space.id()))
            .field("slot", &self.slot)
            .field("frames", &self.frames.len())
            .finish_non_exhaustive()
    }
}

/// A write to the page file: frames to consecutive slots.
///
/// The frames may be mapped and stored to while they are written; what was written of such a page is
/// thrown away. A dropped ticket keeps its frames and slots for ever.
#[derive(Debug)]
#[must_use = "the pages stay in memory until Manager::complete_write"]
pub struct WriteTicket {
    pub(crate) run: SlotRun,
    pub(crate) frames: Vec<Pfn>,
}

impl WriteTicket {
    /// Where to begin in the page file, in bytes.
    #[must_use]
    pub fn offset(&self) -> u64 {
        self.run.first.offset()
    }

    /// What to write: one frame for each slot.
    #[must_use]
    pub fn frames(&self) -> &[Pfn] {
        &self.frames
    }

    /// How many bytes to write.
    #[must_use]
    pub fn length(&self) -> usize {
        self.frames.len() * PAGE_SIZE
    }
}
