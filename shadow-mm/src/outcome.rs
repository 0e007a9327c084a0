//! What an entry point tells its caller to do: every one is `#[must_use]`.

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;

use crate::access::{Access, Denied};
use crate::addr::{GuestVa, Pfn};
use crate::backend::Platform;
use crate::flush::Flush;
use crate::page_file::PageIn;
use crate::pfn::FreeFrame;
use crate::proto::{Claim, Pending, Section, SectionPage};
use crate::section::Thaw;
use crate::space::Space;

/// How a fault was resolved.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum FaultKind {
    /// A page of zeroes was made.
    DemandZero,
    /// A page was read from its file.
    FileRead,
    /// A page that a section had already was mapped.
    Mapped,
    /// A shared page was copied.
    CopyOnWrite,
    /// A page only this space still referred to became writable in place.
    MadeWritable,
    /// The page's frame still had it: no I/O.
    Soft,
    /// The page was read from the page file.
    PagedIn,
    /// The space got a table for itself that it shared, and in it the page may be stored to.
    Unshared,
    /// The access is allowed already, or what was to be done is stale: try the access again.
    Spurious,
}

/// A resolved fault: the access can be tried again once the flush is done.
#[derive(Debug)]
#[must_use]
pub struct Resolution {
    /// How.
    pub kind: FaultKind,
    /// Entries that became valid or writable, neighbours included.
    pub mapped: u32,
    /// What became stale; empty unless the page's frame changed.
    pub flush: Flush,
}

/// What became of a fault.
#[must_use]
pub enum FaultOutcome<P: Platform> {
    /// Try the access again.
    Resolved(Resolution),
    /// Read this with no lock held, then call [`crate::Manager::complete_read`].
    Read(IoTicket<P>),
    /// Somebody else is reading the page: wait, and try the access again.
    Wait(Pending),
    /// Read this from the page file with no lock held, then call
    /// [`crate::Manager::complete_page_in`].
    PageIn(PageIn<P>),
    /// The page is a layer's: have it copied for all who share it ([`crate::Manager::thaw`]), with no lock held, and try
    /// again.
    Thaw(Thaw<P::Backing>),
    /// The page is being read for somebody else, or the space is being forked: wait for the end of any read or
    /// fork, and try again.
    Collided,
    /// The guest's own fault.
    Denied(Denied),
    /// No frame is left.
    NoMemory,
}

/// The access a read was started for.
pub(crate) struct FaultOf<P: Platform> {
    pub(crate) space: Arc<Space<P>>,
    pub(crate) va: GuestVa,
    pub(crate) access: Access,
}

/// A read the embedder must do: a run of a section's pages, from its file into frames.
///
/// The frames belong to the ticket. Dropping it is as if the read had never begun: whoever waits for it
/// tries again, and the next operation takes the frames back.
#[must_use = "others wait for it until Manager::complete_read"]
pub struct IoTicket<P: Platform> {
    pub(crate) section: Section<P::Backing>,
    pub(crate) first: SectionPage,
    pub(crate) length: usize,
    pub(crate) frames: Vec<Pfn>,
    /// For each page, its frame as long as it is nobody's; none for pages that have one already.
    pub(crate) tokens: Vec<Option<FreeFrame>>,
    pub(crate) dummy: Option<FreeFrame>,
    /// The page the fault was about.
    pub(crate) wanted: SectionPage,
    /// The access it is for; none if an embedder wants the bytes of a section.
    pub(crate) fault: Option<FaultOf<P>>,
    pub(crate) claim: Claim,
}

impl<P: Platform> IoTicket<P> {
    /// The section whose file to read.
    #[must_use]
    pub fn section(&self) -> &Section<P::Backing> {
        &self.section
    }

    /// Where to begin in the file: bytes, a multiple of the page size.
    #[must_use]
    pub fn offset(&self) -> u64 {
        self.first.offset()
    }

    /// How many bytes to read: more than `frames().len() - 1` pages, at most `frames().len()` pages.
    #[must_use]
    pub fn length(&self) -> usize {
        self.length
    }

    /// Where the bytes go: consecutive pages, one frame each. Pages that are resident already have the
    /// same *dummy* frame, whose content is for nobody. What is not read is zeroed later.
    #[must_use]
    pub fn frames(&self) -> &[Pfn] {
        &self.frames
    }
}

/// The read of an [`IoTicket`] failed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the read of a mapped file failed")]
pub struct IoFailed;

/// A frame that stays where it is until the pin is given back. It cannot be copied.
#[derive(Debug)]
#[must_use = "the frame is freed only after Manager::unpin"]
pub struct Pin {
    pub(crate) pfn: Pfn,
    pub(crate) kind: PinKind,
}

/// What a pin allows, and where it is counted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum PinKind {
    /// Loads.
    Read,
    /// Loads and stores.
    Write,
    /// Loads from a layer's frame, which stays without being counted.
    Frozen,
}

impl Pin {
    /// The pinned frame.
    #[must_use]
    pub fn pfn(&self) -> Pfn {
        self.pfn
    }

    /// Ends the pin.
    pub(crate) fn into_parts(self) -> (Pfn, PinKind) {
        (self.pfn, self.kind)
    }

    /// Whether the holder may store into the frame.
    #[must_use]
    pub fn is_write(&self) -> bool {
        self.kind == PinKind::Write
    }
}

/// What became of a request to pin a page.
#[must_use]
pub enum PinOutcome<P: Platform> {
    /// Pinned; the guest must not resume without the flush, but the frame may be used at once.
    Pinned(Pin, Flush),
    /// Read this, call [`crate::Manager::complete_read`], and pin again.
    Read(IoTicket<P>),
    /// Somebody else is reading the page: wait, and pin again.
    Wait(Pending),
    /// Read this, call [`crate::Manager::complete_page_in`], and pin again.
    PageIn(PageIn<P>),
    /// The page is a layer's: have it copied for all who share it ([`crate::Manager::thaw`]), and pin again.
    Thaw(Thaw<P::Backing>),
    /// The page is being read for somebody else, or the space is being forked: wait for the end of any read or
    /// fork, and pin again.
    Collided,
    /// Not there yet: have this flushed, and pin again.
    Again(Flush),
    /// The guest may not access the page so.
    Denied(Denied),
    /// No frame is left.
    NoMemory,
}

impl<P: Platform> fmt::Debug for IoTicket<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IoTicket")
            .field("section", &self.section)
            .field("offset", &self.offset())
            .field("length", &self.length)
            .finish_non_exhaustive()
    }
}

impl<P: Platform> fmt::Debug for FaultOutcome<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Resolved(resolution) => f.debug_tuple("Resolved").field(resolution).finish(),
            Self::Read(ticket) => f.debug_tuple("Read").field(ticket).finish(),
            Self::Wait(pending) => f.debug_tuple("Wait").field(pending).finish(),
            Self::PageIn(ticket) => f.debug_tuple("PageIn").field(ticket).finish(),
            Self::Thaw(thaw) => f.debug_tuple("Thaw").field(thaw).finish(),
            Self::Collided => f.write_str("Collided"),
            Self::Denied(denied) => f.debug_tuple("Denied").field(denied).finish(),
            Self::NoMemory => f.write_str("NoMemory"),
        }
    }
}

impl<P: Platform> fmt::Debug for PinOutcome<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pinned(pin, flush) => f.debug_tuple("Pinned").field(pin).field(flush).finish(),
            Self::Read(ticket) => f.debug_tuple("Read").field(ticket).finish(),
            Self::Wait(pending) => f.debug_tuple("Wait").field(pending).finish(),
            Self::PageIn(ticket) => f.debug_tuple("PageIn").field(ticket).finish(),
            Self::Thaw(thaw) => f.debug_tuple("Thaw").field(thaw).finish(),
            Self::Collided => f.write_str("Collided"),
            Self::Again(flush) => f.debug_tuple("Again").field(flush).finish(),
            Self::Denied(denied) => f.debug_tuple("Denied").field(denied).finish(),
            Self::NoMemory => f.write_str("NoMemory"),
        }
    }
}
