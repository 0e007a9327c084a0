//! Frames in transition: owned, but mapped by nothing. Taking them back, letting them go, and telling
//! their owners when they are used for something else.

use super::database::PfnDatabase;
use super::entry::{Original, Owner, PfnFlags, PfnState};
use super::token::Taken;
use crate::addr::Pfn;
use crate::backend::FrameStore;
use crate::page_file::Slot;
use crate::proto::{BlockContent, BlockId};
use crate::pte::Entry;
use crate::shadow;

impl PfnDatabase {
    /// Maps a frame in transition once more, or one more time. It must not be being read.
    pub(crate) fn map_again(&mut self, pfn: Pfn) {
        debug_assert!(
            !self.entry(pfn).flags.contains(PfnFlags::READING),
            "{pfn:?} is mapped while it is read"
        );
        if self.entry(pfn).state().is_listed() {
            self.zone_of(pfn).unlink(pfn);
        }
        *self.entry_mut(pfn).share_mut() += 1;
        if self.entry(pfn).state() != PfnState::Active {
            self.zone_of(pfn).set_state(pfn, PfnState::Active);
        }
    }

    /// Whether something may still look at the frame besides its entries: a stale translation that no
    /// flush has ended yet, a transfer, a pin.
    pub(crate) fn is_held(&self, pfn: Pfn) -> bool {
        self.entry(pfn).refs() > 0
    }

    /// The entry or prototype that owned the frame is gone. A frame nothing holds is free at once.
    pub(crate) fn orphan(&mut self, pfn: Pfn) {
        debug_assert_eq!(self.entry(pfn).share(), 0, "{pfn:?} is still mapped");
        self.forget_original(pfn);
        let listed = self.entry(pfn).state().is_listed();
        if listed {
            self.zone_of(pfn).unlink(pfn);
        }
        self.entry_mut(pfn).owner = Owner::None;
        if listed {
            self.zone_of(pfn).push_unowned(pfn, PfnState::Free);
        }
    }

    /// A private page becomes a clone block's. A file's page, whose block would not know the file, is
    /// for the page file from then on.
    #[inline]
    pub(crate) fn give_to_block(&mut self, pfn: Pfn, block: BlockId) {
        let entry = self.entry_mut(pfn);
        entry.owner = Owner::Clone(block);
        if entry.original() == Original::File {
            self.mark_modified(pfn);
        }
    }

    /// Puts a taken frame in transition for an owner whose page will be read into it from a slot; the
    /// slot becomes the frame's. The owner's entry is the caller's business.
    pub(crate) fn begin_read(&mut self, frame: Taken, owner: Owner, slot: Slot) -> Pfn {
        let pfn = frame.into_parts().0;
        let entry = self.entry_mut(pfn);
        entry.owner = owner;
        entry.set_original(Original::Slot(slot));
        entry.flags = PfnFlags::READING;
        pfn
    }

    /// The frame has its content now, and may be mapped. The read's reference stays.
    pub(crate) fn now_read(&mut self, pfn: Pfn) {
        if cfg!(mutant = "slot_freed_early")
            && let Original::Slot(slot) = self.entry(pfn).original()
        {
            self.slots.free(slot);
        }
        self.entry_mut(pfn).flags -= PfnFlags::READING;
    }

    /// The read of a page is over. If it brought nothing, the page is back in its slot.
    pub(crate) fn end_read(&mut self, pfn: Pfn, arrived: bool, store: &impl FrameStore) {
        self.now_read(pfn);
        if !arrived && self.entry(pfn).owner != Owner::None {
            self.repurpose(pfn, store);
        }
        self.release(pfn);
    }

    /// Takes the oldest modified page to be written out: in flight, with a reference of the write's, and
    /// not modified unless it is stored to from now on.
    pub(crate) fn begin_write(&mut self) -> Option<Pfn> {
        let pfn = self.pop_modified()?;
        let entry = self.entry_mut(pfn);
        entry.flags = (entry.flags - PfnFlags::MODIFIED) | PfnFlags::WRITING;
        self.slots_in_write += 1;
        Some(pfn)
    }

    /// The write of a page to a slot is over. The page is in the slot if that succeeded and nobody stored
    /// to it meanwhile: a store through an entry that is still there will be seen when the entry goes.
    /// True if the slot is the page's now.
    pub(crate) fn end_write(&mut self, pfn: Pfn, slot: Slot, written: bool) -> bool {
        self.slots_in_write -= 1;
        let entry = self.entry_mut(pfn);
        entry.flags -= PfnFlags::WRITING;
        let again =
            entry.flags.contains(PfnFlags::MODIFIED) && cfg!(not(mutant = "unchecked_write"));
        let stored = written && !again && entry.owner != Owner::None;
        if stored {
            entry.flags -= PfnFlags::MODIFIED;
            entry.set_original(Original::Slot(slot));
        } else {
            entry.flags |= PfnFlags::MODIFIED;
            self.slots.free(slot);
        }
        self.release(pfn);
        stored
    }

    /// The frame will be used for something else: whoever owns it is told where the content is. The
    /// frame's slot becomes the owner's.
    pub(super) fn repurpose(&mut self, pfn: Pfn, store: &impl FrameStore) {
        let entry = self.entry_mut(pfn);
        let (owner, original) = (entry.owner, entry.original());
        debug_assert!(
            !entry.flags.contains(PfnFlags::MODIFIED),
            "{pfn:?} has the only copy of its page"
        );
        entry.owner = Owner::None;
        entry.flags = PfnFlags::empty();
        entry.set_original(Original::Zero);
        match (owner, original) {
            (Owner::Section { section, page }, original) => {
                self.sections.lose_frame(section, page, original);
            }
            (Owner::Entry { table, index }, Original::Slot(slot)) => {
                let (from, to) = (Entry::Transition(pfn), Entry::PageFile(slot));
                shadow::retarget(store, (table, index), from, to);
            }
            (Owner::Clone(block), Original::Slot(slot)) => {
                self.clones.set_content(block, BlockContent::PageFile(slot));
            }
            (Owner::Clone(block), Original::Zero) => {
                self.clones.set_content(block, BlockContent::Zero);
            }
            (Owner::Entry { .. } | Owner::Clone(_), Original::File | Original::Zero)
            | (Owner::None | Owner::Entries | Owner::Root | Owner::Supervisor | Owner::Tables, _) =>
            {
                debug_assert!(
                    false,
                    "{pfn:?} of {owner:?} with {original:?} is on standby"
                );
            }
        }
    }
}
