//! The operations on frames: take, activate, share, hold, release.

use alloc::collections::BTreeSet;

use super::entry::{Original, Owner, PfnEntry, PfnFlags, PfnState};
use super::token::{FreeFrame, ReadyFrame, Taken, ZeroedFrame};
use super::zone::Zone;
use crate::addr::{Pfn, PfnRange};
use crate::backend::FrameStore;
use crate::commit::Commit;
use crate::page_file::SlotMap;
use crate::proto::{BlockId, CloneTable, HeaderId, SectionTable};

/// A zone is *short* when fewer than one frame in this many is left; then nothing is mapped ahead of
/// need.
const SHORT_DIVISOR: u32 = 32;

/// Which zone a frame is wanted from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum ZoneKind {
    Data,
    Tables,
}

/// What content a frame is wanted with.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Want {
    /// Zeroes, so a frame that has them already comes first.
    Zeroes,
    /// Anything: it will be overwritten, so no zeroed frame is spent if a free one will do.
    Anything,
}

/// All frames, and the clone blocks that own some of them.
#[derive(Debug)]
pub(crate) struct PfnDatabase {
    pub(super) data: Zone,
    tables: Zone,
    pub(crate) clones: CloneTable,
    pub(crate) sections: SectionTable,
    /// What was promised to guests.
    pub(crate) commit: Commit,
    /// Slots of the page file.
    pub(crate) slots: SlotMap,
    /// Slots that writes under way have taken and no page has yet.
    pub(crate) slots_in_write: u32,
    /// Frames with at least one write pin: a fork need not look for them.
    write_pinned: BTreeSet<Pfn>,
    /// The tables of all spaces, each space's counted by itself, and the supervisor's: what there would
    /// be if none were shared. See [`Self::promised_tables`].
    pub(super) table_charge: u64,
    /// Pages of the commit account charged for clone blocks that are made one by one.
    pub(super) lazy_charged: u64,
    #[cfg(feature = "fault-injection")]
    pub(crate) faults: crate::limits::FailPlan,
}

impl PfnDatabase {
    /// The database of two zones whose frames read as zero; `None` if it does not fit in memory.
    pub(crate) fn new(data: PfnRange, tables: PfnRange) -> Option<Self> {
        Some(Self {
            data: Zone::opening(data)?,
            tables: Zone::new(tables)?,
            clones: CloneTable::default(),
            sections: SectionTable::default(),
            commit: Commit::default(),
            slots: SlotMap::default(),
            slots_in_write: 0,
            write_pinned: BTreeSet::new(),
            table_charge: 0,
            lazy_charged: 0,
            #[cfg(feature = "fault-injection")]
            faults: crate::limits::FailPlan::Never,
        })
    }

    pub(crate) fn zone(&self, kind: ZoneKind) -> &Zone {
        match kind {
            ZoneKind::Data => &self.data,
            ZoneKind::Tables => &self.tables,
        }
    }

    /// Takes a frame.
    ///
    /// A frame that was never used comes late: touching one costs the host a page fault, zeroing a
    /// used one costs only 4 KiB of stores. The oldest standby page comes last: it may be wanted again.
    /// A host that shadows page tables knows nothing stale about a used table frame either: the flush that
    /// held it named it.
    pub(crate) fn take(
        &mut self,
        kind: ZoneKind,
        want: Want,
        store: &impl FrameStore,
    ) -> Option<Taken> {
        if self.injected_failure() {
            return None;
        }
        let zone = self.zone_mut(kind);
        let free = |pfn| Taken::Free(FreeFrame::new(pfn));
        let zeroed = |pfn| Taken::Zeroed(ZeroedFrame::new(pfn));
        match (kind, want) {
            (ZoneKind::Data, Want::Zeroes) => (zone.pop(PfnState::Zeroed).map(zeroed))
                .or_else(|| zone.pop(PfnState::Free).map(free))
                .or_else(|| zone.take_untouched(store).map(zeroed))
                .or_else(|| self.take_standby(store).map(free)),
            (ZoneKind::Data, Want::Anything) => (zone.pop(PfnState::Free).map(free))
                .or_else(|| zone.pop(PfnState::Zeroed).map(zeroed))
                .or_else(|| zone.take_untouched(store).map(zeroed))
                .or_else(|| self.take_standby(store).map(free)),
            (ZoneKind::Tables, _) => self.take_table(store),
        }
    }

    /// Takes a table frame that was promised; a test cannot make that fail.
    pub(crate) fn take_promised(&mut self, store: &impl FrameStore) -> Option<Taken> {
        self.take_table(store)
    }

    fn take_table(&mut self, store: &impl FrameStore) -> Option<Taken> {
        let zone = &mut self.tables;
        let free = |pfn| Taken::Free(FreeFrame::new(pfn));
        let zeroed = |pfn| Taken::Zeroed(ZeroedFrame::new(pfn));
        (zone.pop(PfnState::Zeroed).map(zeroed))
            .or_else(|| zone.pop(PfnState::Free).map(free))
            .or_else(|| zone.take_untouched(store).map(zeroed))
    }

    /// Takes the oldest standby page's frame; its owner is told where the content is.
    fn take_standby(&mut self, store: &impl FrameStore) -> Option<Pfn> {
        let pfn = self.data.pop(PfnState::Standby)?;
        self.repurpose(pfn, store);
        Some(pfn)
    }

    /// Takes a free data frame, to be zeroed ahead of need.
    pub(crate) fn take_to_zero(&mut self) -> Option<FreeFrame> {
        self.data.pop(PfnState::Free).map(FreeFrame::new)
    }

    /// Takes the oldest modified page off its list.
    pub(super) fn pop_modified(&mut self) -> Option<Pfn> {
        self.data.pop(PfnState::Modified)
    }

    /// A space's descriptor of a clone header reached zero. The last one frees the header.
    pub(crate) fn undescribe(&mut self, header: HeaderId) {
        let freed = self.clones.undescribe(header);
        self.commit.release(freed);
    }

    /// Gives back what a clone header reserved beyond the blocks it made.
    pub(crate) fn trim_header(&mut self, header: HeaderId) {
        let freed = self.clones.trim(header);
        self.commit.release(freed);
    }

    /// Whether so few data frames are left that nothing should be mapped ahead of need.
    pub(crate) fn short(&self) -> bool {
        self.data.available() <= self.data.range().count / SHORT_DIVISOR
    }

    /// True if a test wants this allocation to fail.
    pub(crate) fn injected_failure(&mut self) -> bool {
        #[cfg(feature = "fault-injection")]
        return self.faults.strike();
        #[cfg(not(feature = "fault-injection"))]
        false
    }

    /// Gives back a frame that was taken and not used.
    pub(crate) fn give_back(&mut self, frame: Taken) {
        let (pfn, state) = frame.into_parts();
        *self.entry_mut(pfn).refs_mut() -= 1;
        self.zone_of(pfn).push_unowned(pfn, state);
    }

    /// Gives back a frame that was filled for a mapping that is gone.
    pub(crate) fn discard(&mut self, frame: ReadyFrame) {
        self.release(frame.into_pfn());
    }

    /// Makes a frame active with share count 1: mapped by one entry, or a table with nothing in it. Its
    /// content is nowhere else.
    pub(crate) fn activate(&mut self, frame: ReadyFrame, owner: Owner) -> Pfn {
        let pfn = self.activate_clean(frame, owner, Original::Zero);
        self.mark_modified(pfn);
        pfn
    }

    /// As [`Self::activate`], of a page whose content is in `original` too.
    pub(crate) fn activate_clean(
        &mut self,
        frame: ReadyFrame,
        owner: Owner,
        original: Original,
    ) -> Pfn {
        let pfn = frame.into_pfn();
        let entry = self.entry_mut(pfn);
        *entry.refs_mut() -= 1;
        *entry.share_mut() = 1;
        entry.owner = owner;
        entry.set_original(original);
        *entry.unfrozen_mut() = 0;
        self.zone_of(pfn).set_state(pfn, PfnState::Active);
        pfn
    }

    /// One more entry maps the frame; or, for a table, one more of its entries is in use.
    #[inline]
    pub(crate) fn add_share(&mut self, pfn: Pfn) {
        let entry = self.entry_mut(pfn);
        debug_assert_eq!(entry.state(), PfnState::Active, "{pfn:?} is not active");
        *entry.share_mut() += 1;
    }

    /// So many more entries of a table are in use.
    pub(crate) fn add_shares(&mut self, table: Pfn, entries: u32) {
        *self.entry_mut(table).share_mut() += entries;
    }

    /// So many more entries of a leaf table are not a layer's pages.
    pub(crate) fn add_unfrozen(&mut self, table: Pfn, entries: u16) {
        *self.entry_mut(table).unfrozen_mut() += entries;
    }

    /// One more entry of a leaf table is in use, and it is not a layer's page.
    #[inline]
    pub(crate) fn count_unfrozen(&mut self, table: Pfn) {
        *self.entry_mut(table).unfrozen_mut() += 1;
    }

    /// One fewer.
    #[inline]
    pub(crate) fn uncount_unfrozen(&mut self, table: Pfn) {
        let count = self.entry_mut(table).unfrozen_mut();
        debug_assert!(*count > 0, "{table:?} has only frozen entries");
        *count -= 1;
    }

    /// One entry of a table fewer is in use; gives back the table's share count, which never falls
    /// below one here.
    #[inline]
    pub(crate) fn drop_table_entry(&mut self, table: Pfn) -> u32 {
        let entry = self.entry_mut(table);
        debug_assert!(entry.share() > 1, "{table:?} has no entry to lose");
        *entry.share_mut() -= 1;
        entry.share()
    }

    /// One entry fewer maps the frame, but a stale translation may: the frame is held for the flush,
    /// and [`Self::release`] ends that. At share zero it is in flight; an owner stays its owner.
    #[inline]
    pub(crate) fn drop_share_held(&mut self, pfn: Pfn) {
        let entry = self.entry_mut(pfn);
        debug_assert!(entry.share() > 0, "{pfn:?} lost more shares than it had");
        *entry.refs_mut() += 1;
        *entry.share_mut() -= u32::from(cfg!(not(mutant = "lost_share")));
        if entry.share() == 0 {
            self.zone_of(pfn).set_state(pfn, PfnState::InFlight);
        }
    }

    /// As [`Self::drop_share_held`], of a table that is in use no more.
    pub(crate) fn drop_table_held(&mut self, table: Pfn) {
        self.drop_share_held(table);
        self.orphan(table);
    }

    /// A reference ends. What neither reference nor share keeps goes to a list: to the free list if
    /// nobody owns it, else to the modified or the standby list.
    pub(crate) fn release(&mut self, pfn: Pfn) {
        let entry = self.entry_mut(pfn);
        debug_assert!(entry.refs() > 0, "{pfn:?} released once too often");
        *entry.refs_mut() -= 1;
        if entry.refs() > 0 || entry.share() > 0 {
            return;
        }
        let (owner, flags) = (entry.owner, entry.flags);
        let zone = self.zone_of(pfn);
        match owner {
            Owner::None => zone.push_unowned(pfn, PfnState::Free),
            Owner::Entry { .. } | Owner::Clone(_) if flags.contains(PfnFlags::MODIFIED) => {
                zone.push_owned(pfn, PfnState::Modified);
            }
            Owner::Entry { .. } | Owner::Clone(_) => zone.push_owned(pfn, PfnState::Standby),
            Owner::Section { section, .. } => {
                let state = match flags.contains(PfnFlags::MODIFIED) {
                    false => PfnState::Standby,
                    true if self.sections.is_of_file(section) => PfnState::ModifiedNoWrite,
                    true => PfnState::Modified,
                };
                self.zone_of(pfn).push_owned(pfn, state);
            }
            Owner::Entries | Owner::Root | Owner::Supervisor | Owner::Tables => {
                debug_assert!(false, "{pfn:?} is in use");
            }
        }
    }

    /// Pins a mapped frame, or one of a section; `write` if the holder may store into it.
    pub(crate) fn pin(&mut self, pfn: Pfn, write: bool) {
        let entry = self.entry_mut(pfn);
        debug_assert!(
            entry.share() > 0 || entry.refs() > 0,
            "{pfn:?} is pinned but free"
        );
        *entry.refs_mut() += 1;
        if write {
            *entry.write_pins_mut() += 1;
            self.write_pinned.insert(pfn);
            self.mark_modified(pfn);
        }
    }

    /// Ends a pin.
    pub(crate) fn unpin(&mut self, pfn: Pfn, write: bool) {
        if write {
            let entry = self.entry_mut(pfn);
            debug_assert!(entry.write_pins() > 0, "{pfn:?} has no write pin");
            *entry.write_pins_mut() -= 1;
            if entry.write_pins() == 0 {
                self.write_pinned.remove(&pfn);
            }
            // Its holder may have stored after the page was written out.
            self.mark_modified(pfn);
        }
        self.release(pfn);
    }

    /// Frames with a write pin.
    pub(crate) fn write_pinned(&self) -> &BTreeSet<Pfn> {
        &self.write_pinned
    }

    /// The dirty bit of an entry that maps the frame is about to be lost: keep it here. What is in the
    /// page file is out of date then, and its slot is given back.
    #[inline]
    pub(crate) fn mark_modified(&mut self, pfn: Pfn) {
        let entry = self.entry_mut(pfn);
        entry.flags |= PfnFlags::MODIFIED;
        if entry.original() != Original::Zero {
            self.forget_original(pfn);
        }
    }

    /// Gives back the slot a frame has, if it has one.
    #[inline]
    pub(super) fn forget_original(&mut self, pfn: Pfn) {
        let entry = self.entry_mut(pfn);
        if let Original::Slot(slot) = entry.original() {
            self.slots.free(slot);
        }
        self.entry_mut(pfn).set_original(Original::Zero);
    }

    #[inline]
    pub(crate) fn set_owner(&mut self, pfn: Pfn, owner: Owner) {
        self.entry_mut(pfn).owner = owner;
    }

    /// The clone block that owns the frame, if one does.
    #[inline]
    pub(crate) fn block_of(&self, pfn: Pfn) -> Option<BlockId> {
        match self.entry(pfn).owner {
            Owner::Clone(block) => Some(block),
            Owner::None
            | Owner::Entry { .. }
            | Owner::Entries
            | Owner::Section { .. }
            | Owner::Root
            | Owner::Supervisor
            | Owner::Tables => None,
        }
    }

    /// Whether the only entry left of a clone block may take the frame over: nobody else refers to the
    /// block, and no pin or unacknowledged flush lets anybody else still look at the frame.
    pub(crate) fn last_reference(&self, pfn: Pfn, block: BlockId) -> bool {
        let held = self.entry(pfn).refs() > 0 && cfg!(not(mutant = "held_taken"));
        self.clones.references(block) == 1 && !held
    }

    #[inline]
    pub(crate) fn entry(&self, pfn: Pfn) -> &PfnEntry {
        if self.tables.range().contains(pfn) {
            self.tables.entry(pfn)
        } else {
            self.data.entry(pfn)
        }
    }

    #[inline]
    pub(super) fn entry_mut(&mut self, pfn: Pfn) -> &mut PfnEntry {
        self.zone_of(pfn).entry_mut(pfn)
    }

    #[inline]
    pub(super) fn zone_of(&mut self, pfn: Pfn) -> &mut Zone {
        if self.tables.range().contains(pfn) {
            &mut self.tables
        } else {
            &mut self.data
        }
    }

    fn zone_mut(&mut self, kind: ZoneKind) -> &mut Zone {
        match kind {
            ZoneKind::Data => &mut self.data,
            ZoneKind::Tables => &mut self.tables,
        }
    }
}
