//! Faults on pages that have been here before: in transition, in the page file, or behind a clone block
//! that no entry of this space maps.
//!
//! The PFN lock alone protects the entry of a page in transition: the frame may be taken for something
//! else, and the entry rewritten, at any moment before. So every look is followed by what is done
//! about it with that lock held, and where the lock must be let go in between, the caller looks again.

use alloc::sync::Arc;

use crate::access::{Access, Prot};
use crate::addr::{EntryIndex, Pfn, Vpn};
use crate::backend::Platform;
use crate::manager::{Demand, Manager};
use crate::outcome::{FaultKind, FaultOutcome};
use crate::page_file::Slot;
use crate::pfn::{Original, Owner, PfnDatabase, PfnFlags, Want};
use crate::proto::{BlockContent, BlockId};
use crate::pte::{Entry, EntryFlags, ValidEntry};
use crate::space::fault::{Found, resolution, used, window};
use crate::space::{Space, SpaceState};
use crate::stats::add;
use crate::vad::FaultAround;

/// A fault on an entry that is in use and not valid.
#[derive(Clone, Copy)]
pub(super) struct Absent {
    pub(super) vpn: Vpn,
    pub(super) access: Access,
    /// What the mapping allows.
    pub(super) prot: Prot,
    pub(super) place: (Pfn, EntryIndex),
    /// Whether the table is shared: the page comes back for all who share it, under the PFN lock alone.
    pub(super) shared: bool,
}

impl Absent {
    /// The entry is valid now.
    fn count<B: Clone + Eq>(&self, state: &mut SpaceState<B>) {
        if self.shared {
            state.inherited += 1;
        } else {
            state.gained_resident(1);
        }
    }
}

/// What an entry in use turns out to be once the PFN lock is held.
enum Seen {
    /// It is valid now; a block's page is still to be copied for a store.
    Mapped(Option<Found>),
    /// A read or a change of somebody else's is under way.
    Busy,
    Slot(Slot),
    ZeroBlock(BlockId),
    /// The access can simply be tried again.
    Again,
}

impl<P: Platform> Manager<P> {
    /// Brings a page back. Without I/O if its frame still has it.
    pub(super) fn bring_back(
        &self,
        space: &Arc<Space<P>>,
        state: &mut SpaceState<P::Backing>,
        absent: Absent,
    ) -> FaultOutcome<P> {
        let seen = self.map_resident(space, &mut self.pfns.lock(), absent);
        match seen {
            Seen::Mapped(block_page) => {
                absent.count(state);
                add(&self.counters.entries_written, 1);
                match block_page {
                    Some(found) => self.break_copy(space, state, absent.vpn, found),
                    None => {
                        let mapped = 1 + self.map_following(space, state, absent);
                        FaultOutcome::Resolved(resolution(space, FaultKind::Soft, mapped))
                    }
                }
            }
            Seen::Busy => FaultOutcome::Collided,
            Seen::Slot(slot) => self.start_page_in(space, absent, slot),
            Seen::ZeroBlock(block) => self.fill_zero_block(space, state, absent, block),
            Seen::Again => FaultOutcome::Resolved(resolution(space, FaultKind::Spurious, 0)),
        }
    }

    /// Maps the pages after one that came back, as far as their frames have them, if the guest walks upwards and
    /// frames are not short; gives back how many. What is mapped so was not used: the trimmer takes it first.
    fn map_following(
        &self,
        space: &Space<P>,
        state: &mut SpaceState<P::Backing>,
        absent: Absent,
    ) -> u32 {
        let most = window(state, absent.vpn);
        let cursor = space.cursor(&self.store);
        let (table, index) = absent.place;
        let private = EntryFlags::private(absent.prot);
        let mut mapped = 0;
        let mut db = self.pfns.lock();
        let alone = absent.shared || db.short();
        for index in EntryIndex::onward(index).take(most).skip(1) {
            let (frame, flags) = match cursor.leaf(table, index) {
                Entry::Transition(frame) => (frame, private),
                Entry::Prototype(block) => match db.clones.content(block) {
                    BlockContent::Resident(frame) => (frame, private.shared()),
                    BlockContent::PageFile(_) | BlockContent::Zero => break,
                },
                Entry::Empty
                | Entry::Valid(_)
                | Entry::Frozen(_)
                | Entry::PageFile(_)
                | Entry::DemandZero(_)
                | Entry::Decommitted => break,
            };
            if alone || db.entry(frame).flags.contains(PfnFlags::READING) {
                break;
            }
            db.map_again(frame);
            cursor.replace((table, index), Entry::Valid(ValidEntry { frame, flags }));
            mapped += 1;
        }
        drop(db);
        state.gained_resident(mapped);
        add(&self.counters.entries_written, mapped);
        if let Some(vad) = state.vads.find_mut(absent.vpn) {
            vad.around = FaultAround {
                next: absent.vpn.get() + 1 + mapped,
                window: most as u8,
                ..vad.around
            };
        }
        mapped as u32
    }

    /// Looks at the entry, and maps its frame if there is one.
    fn map_resident(&self, space: &Space<P>, db: &mut PfnDatabase, absent: Absent) -> Seen {
        let (table, index) = absent.place;
        let private = EntryFlags::private(absent.prot);
        let (frame, flags) = match space.cursor(&self.store).leaf(table, index) {
            Entry::Transition(frame) => (frame, private),
            Entry::PageFile(slot) => return Seen::Slot(slot),
            Entry::Prototype(block) => match db.clones.content(block) {
                BlockContent::Resident(frame) => (frame, private.shared()),
                BlockContent::PageFile(slot) => return Seen::Slot(slot),
                BlockContent::Zero => return Seen::ZeroBlock(block),
            },
            Entry::Empty
            | Entry::Valid(_)
            | Entry::Frozen(_)
            | Entry::DemandZero(_)
            | Entry::Decommitted => {
                return Seen::Again;
            }
        };
        if db.entry(frame).flags.contains(PfnFlags::READING) {
            return Seen::Busy;
        }
        db.map_again(frame);
        let shared = flags.contains(EntryFlags::PROTOTYPE);
        let store = absent.access == Access::Write;
        let access = if shared { Access::Read } else { absent.access };
        if store && !shared {
            // What the page file has is about to be out of date: its slot is of use to others.
            db.mark_modified(frame);
        }
        let flags = flags | used(access);
        let entry = ValidEntry { frame, flags };
        space
            .cursor(&self.store)
            .replace(absent.place, Entry::Valid(entry));
        Seen::Mapped((store && shared).then_some((table, index, entry)))
    }

    /// Gives a clone block whose page is zeroes a frame again.
    fn fill_zero_block(
        &self,
        space: &Arc<Space<P>>,
        state: &mut SpaceState<P::Backing>,
        absent: Absent,
        block: BlockId,
    ) -> FaultOutcome<P> {
        let demand = Demand {
            want: Want::Zeroes,
            ..Demand::one_page()
        };
        let reserve = self.reserve(demand);
        let Some(frame) = reserve.and_then(|mut reserve| reserve.data.pop()) else {
            return FaultOutcome::NoMemory;
        };
        let frame = self.zeroed(frame);
        let mut db = self.pfns.lock();
        if db.clones.content(block) != BlockContent::Zero {
            db.discard(frame.into());
            return FaultOutcome::Resolved(resolution(space, FaultKind::Spurious, 0));
        }
        let frame = db.activate_clean(frame.into(), Owner::Clone(block), Original::Zero);
        db.clones.set_content(block, BlockContent::Resident(frame));
        let flags = EntryFlags::private(absent.prot).shared() | used(Access::Read);
        let entry = ValidEntry { frame, flags };
        let (table, index) = absent.place;
        space
            .cursor(&self.store)
            .replace(absent.place, Entry::Valid(entry));
        drop(db);
        absent.count(state);
        add(&self.counters.entries_written, 1);
        if absent.access == Access::Write {
            return self.break_copy(space, state, absent.vpn, (table, index, entry));
        }
        FaultOutcome::Resolved(resolution(space, FaultKind::DemandZero, 1))
    }
}
