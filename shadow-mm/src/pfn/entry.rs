//! One frame's entry in the PFN database.

use bitflags::bitflags;

use crate::addr::{EntryIndex, Pfn};
use crate::proto::{BlockId, SectionId, SectionPage};

/// Where a frame is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
pub enum PfnState {
    /// On the zeroed list (or never touched: such frames read as zero).
    Zeroed,
    /// On the free list; its content is somebody's past.
    Free,
    /// Mapped by at least one valid entry, or a page table in use.
    Active,
    /// Not mapped, and not reusable yet: held by an unacknowledged flush, an I/O ticket, a pin, or an
    /// operation under way.
    InFlight,
}

impl PfnState {
    /// How many states there are.
    pub(crate) const COUNT: usize = 4;
}

/// The back pointer of a frame: what has to change when the frame goes elsewhere.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Owner {
    /// Nobody: the frame is on a list or in flight.
    None,
    /// This entry, in this table. The table is also the *containing* frame, whose share count this
    /// frame's entry holds up.
    Entry { table: Pfn, index: EntryIndex },
    /// A clone block; any number of entries map the frame.
    Clone(BlockId),
    /// A page of a section; any number of entries map the frame.
    Section {
        section: SectionId,
        page: SectionPage,
    },
    /// An address space: the frame is its top-level table.
    Root,
    /// The manager: the frame is the table of the supervisor slot that every root names.
    Supervisor,
}

bitflags! {
    /// Facts about a frame.
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    pub(crate) struct PfnFlags: u8 {
        /// The content was stored to through an entry that is gone or was copied: the dirty bit lives
        /// here from then on.
        const MODIFIED = 1;
    }
}

/// The end of an intrusive list.
pub(crate) const NO_LINK: u32 = u32::MAX;

/// What is known of one frame. Protected by the PFN lock.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PfnEntry {
    /// Valid entries that map the frame; for a table, entries in use plus one.
    pub(crate) share: u32,
    /// Pins, unacknowledged flushes and operations that hold the frame.
    pub(crate) refs: u32,
    pub(crate) owner: Owner,
    /// Next frame of the list the frame is on, relative to its zone.
    pub(crate) next: u32,
    /// How many of the references may store into the frame.
    pub(crate) write_pins: u32,
    pub(crate) state: PfnState,
    pub(crate) flags: PfnFlags,
}

const _: () = assert!(size_of::<PfnEntry>() <= 32);

impl PfnEntry {
    /// The entry of a frame that was never used.
    pub(crate) const UNTOUCHED: Self = Self {
        share: 0,
        refs: 0,
        owner: Owner::None,
        next: NO_LINK,
        write_pins: 0,
        state: PfnState::Zeroed,
        flags: PfnFlags::empty(),
    };
}
