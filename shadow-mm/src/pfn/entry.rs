//! One frame's entry in the PFN database.

use bitflags::bitflags;

use crate::addr::{EntryIndex, Pfn};
use crate::page_file::Slot;
use crate::proto::{BlockId, SectionId, SectionPage};

/// Where a frame is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
pub enum PfnState {
    /// On the zeroed list (or never touched: such frames read as zero).
    Zeroed,
    /// On the free list; its content is somebody's past.
    Free,
    /// On the standby list: not mapped, owned, and its content is elsewhere too, so that the frame can
    /// be taken at any moment.
    Standby,
    /// On the modified list: not mapped, owned, and its content is nowhere else yet.
    Modified,
    /// On the list of modified pages that are not for the page file: not mapped, owned by a section over a file, and
    /// stored to since they were read from it or written to it.
    ModifiedNoWrite,
    /// Mapped by at least one valid entry, or a page table in use.
    Active,
    /// Not mapped, and not reusable yet: held by an unacknowledged flush, an I/O ticket, a pin, or an
    /// operation under way. An owned frame is *in transition* here and on the two lists above.
    InFlight,
}

impl PfnState {
    /// How many states there are.
    pub(crate) const COUNT: usize = 7;

    /// Every state.
    pub(crate) const ALL: [Self; Self::COUNT] = [
        Self::Zeroed,
        Self::Free,
        Self::Standby,
        Self::Modified,
        Self::ModifiedNoWrite,
        Self::Active,
        Self::InFlight,
    ];

    /// Whether frames in this state are on a list, and so have neither shares nor references.
    #[inline]
    pub(crate) fn is_listed(self) -> bool {
        match self {
            Self::Zeroed | Self::Free | Self::Standby | Self::Modified | Self::ModifiedNoWrite => {
                true
            }
            Self::Active | Self::InFlight => false,
        }
    }
}

/// The back pointer of a frame: what has to change when the frame goes elsewhere.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Owner {
    /// Nobody: when it is let go the frame is free.
    None,
    /// This entry, in this table. The table is also the *containing* frame, whose share count this
    /// frame's entry holds up. Of a table: the only entry that names it.
    Entry { table: Pfn, index: EntryIndex },
    /// Several entries of upper tables: the frame is a table, and shared.
    Tables,
    /// A clone block; any number of entries map the frame.
    Clone(BlockId),
    /// The entries that map it, all of them copy-on-write, in tables that forks shared: the page is *forked*. It would have a
    /// clone block, which was promised; as long as it is in memory its share count says what the block would.
    Entries,
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

/// Where a frame's content is besides in the frame, as long as the frame is not modified.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Original {
    /// Nowhere: it is zeroes (or, of a modified frame, not known anywhere else).
    Zero,
    /// In the file its mapping shows.
    File,
    /// In the page file. The slot belongs to the frame's entry here.
    Slot(Slot),
}

bitflags! {
    /// Facts about a frame.
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    pub(crate) struct PfnFlags: u8 {
        /// The content differs from what [`Original`] says: it was stored to through an entry that is
        /// gone or was copied. The dirty bit lives here from then on.
        const MODIFIED = 1;
        /// A read into the frame is under way: nobody may map it.
        const READING = 2;
        /// The frame is being written out; it may be mapped, and stored to, meanwhile.
        const WRITING = 4;
    }
}

/// The end of an intrusive list.
pub(crate) const NO_LINK: u32 = u32::MAX;

/// What is known of one frame. Protected by the PFN lock.
///
/// A frame on a list has neither shares nor references, so its links live where those are counted.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PfnEntry {
    /// In use: valid entries that map the frame; for a table, entries in use plus one. On a list: the
    /// next frame, relative to the zone.
    share_or_next: u32,
    /// In use: pins, unacknowledged flushes, I/O and operations that hold the frame. On a list: the
    /// frame before.
    refs_or_prev: u32,
    pub(crate) owner: Owner,
    /// How many of the references may store into the frame. Of a table: its parents but one.
    write_pins: u32,
    original: u32,
    /// Of a leaf table: entries in use that are not a layer's pages.
    unfrozen: u16,
    state: PfnState,
    pub(crate) flags: PfnFlags,
}

const _: () = assert!(size_of::<PfnEntry>() <= 32);

/// [`Original`] in four bytes: a slot's number, or one of these.
const ORIGINAL_ZERO: u32 = u32::MAX;
const ORIGINAL_FILE: u32 = u32::MAX - 1;
const _: () = assert!(Slot::COUNT <= ORIGINAL_FILE as u64);

impl PfnEntry {
    /// The entry of a frame that was never used.
    pub(crate) const UNTOUCHED: Self = Self {
        share_or_next: NO_LINK,
        refs_or_prev: NO_LINK,
        owner: Owner::None,
        write_pins: 0,
        original: ORIGINAL_ZERO,
        unfrozen: 0,
        state: PfnState::Zeroed,
        flags: PfnFlags::empty(),
    };

    #[inline]
    pub(crate) fn state(&self) -> PfnState {
        self.state
    }

    /// Valid entries that map the frame; for a table, entries in use plus one.
    #[inline]
    pub(crate) fn share(&self) -> u32 {
        if self.state.is_listed() {
            0
        } else {
            self.share_or_next
        }
    }

    /// References that hold the frame besides its shares.
    #[inline]
    pub(crate) fn refs(&self) -> u32 {
        if self.state.is_listed() {
            0
        } else {
            self.refs_or_prev
        }
    }

    /// How many of the references may store into a data frame.
    #[inline]
    pub(crate) fn write_pins(&self) -> u32 {
        self.write_pins
    }

    pub(super) fn write_pins_mut(&mut self) -> &mut u32 {
        &mut self.write_pins
    }

    /// Of a leaf table: entries in use that are not a layer's pages.
    pub(crate) fn unfrozen(&self) -> u16 {
        self.unfrozen
    }

    #[inline]
    pub(super) fn unfrozen_mut(&mut self) -> &mut u16 {
        &mut self.unfrozen
    }

    /// How many entries of upper tables name a table.
    #[inline]
    pub(crate) fn parents(&self) -> u32 {
        self.write_pins + 1
    }

    /// The share count of a frame in use, to change it.
    #[inline]
    pub(super) fn share_mut(&mut self) -> &mut u32 {
        debug_assert!(!self.state.is_listed(), "a listed frame has no shares");
        &mut self.share_or_next
    }

    /// The reference count of a frame in use, to change it.
    #[inline]
    pub(super) fn refs_mut(&mut self) -> &mut u32 {
        debug_assert!(!self.state.is_listed(), "a listed frame has no references");
        &mut self.refs_or_prev
    }

    /// Changes the state; counts and links are as they were, for [`super::Zone`] to set.
    pub(super) fn set_state(&mut self, state: PfnState) {
        self.state = state;
    }

    /// Makes the two words the counts of a frame in use.
    pub(super) fn set_counts(&mut self, share: u32, refs: u32) {
        (self.share_or_next, self.refs_or_prev) = (share, refs);
    }

    /// The links of a frame on a list: next and previous.
    pub(super) fn links(&self) -> (u32, u32) {
        (self.share_or_next, self.refs_or_prev)
    }

    pub(super) fn set_next(&mut self, next: u32) {
        self.share_or_next = next;
    }

    pub(super) fn set_prev(&mut self, prev: u32) {
        self.refs_or_prev = prev;
    }

    #[inline]
    pub(crate) fn original(&self) -> Original {
        match self.original {
            ORIGINAL_ZERO => Original::Zero,
            ORIGINAL_FILE => Original::File,
            slot => Slot::new(slot.into()).map_or(Original::Zero, Original::Slot),
        }
    }

    #[inline]
    pub(super) fn set_original(&mut self, original: Original) {
        self.original = match original {
            Original::Zero => ORIGINAL_ZERO,
            Original::File => ORIGINAL_FILE,
            Original::Slot(slot) => slot.get(),
        };
    }
}
