//! The operations on frames: take, activate, share, hold, release.

use super::entry::{Owner, PfnEntry, PfnFlags, PfnState};
use super::token::{FreeFrame, ReadyFrame, Taken, ZeroedFrame};
use super::zone::Zone;
use crate::addr::{Pfn, PfnRange};
use crate::proto::{BlockId, CloneTable, SectionTable};

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
    data: Zone,
    tables: Zone,
    pub(crate) clones: CloneTable,
    pub(crate) sections: SectionTable,
    /// Frames with at least one write pin: zero lets a fork skip looking for them.
    write_pinned: u32,
    #[cfg(feature = "fault-injection")]
    pub(crate) faults: crate::limits::FailPlan,
}

impl PfnDatabase {
    /// The database of two zones whose frames read as zero; `None` if it does not fit in memory.
    pub(crate) fn new(data: PfnRange, tables: PfnRange) -> Option<Self> {
        Some(Self {
            data: Zone::new(data)?,
            tables: Zone::new(tables)?,
            clones: CloneTable::default(),
            sections: SectionTable::default(),
            write_pinned: 0,
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
    /// A data frame that was never used comes last: touching one costs the host a page fault, zeroing a
    /// used one costs only 4 KiB of stores. A table frame that was never used comes first: a host that
    /// shadows page tables knows nothing stale about it.
    pub(crate) fn take(&mut self, kind: ZoneKind, want: Want) -> Option<Taken> {
        if self.injected_failure() {
            return None;
        }
        let zone = self.zone_mut(kind);
        let free = |pfn| Taken::Free(FreeFrame::new(pfn));
        let zeroed = |pfn| Taken::Zeroed(ZeroedFrame::new(pfn));
        match (kind, want) {
            (ZoneKind::Data, Want::Zeroes) => (zone.pop_zeroed().map(zeroed))
                .or_else(|| zone.pop_free().map(free))
                .or_else(|| zone.take_untouched().map(zeroed)),
            (ZoneKind::Data, Want::Anything) => (zone.pop_free().map(free))
                .or_else(|| zone.pop_zeroed().map(zeroed))
                .or_else(|| zone.take_untouched().map(zeroed)),
            (ZoneKind::Tables, _) => (zone.take_untouched().map(zeroed))
                .or_else(|| zone.pop_zeroed().map(zeroed))
                .or_else(|| zone.pop_free().map(free)),
        }
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
        self.entry_mut(pfn).refs -= 1;
        self.zone_of(pfn).push(pfn, state);
    }

    /// Gives back a frame that was filled for a mapping that is gone.
    pub(crate) fn discard(&mut self, frame: ReadyFrame) {
        self.release(frame.into_pfn());
    }

    /// Makes a frame active with share count 1: mapped by one entry, or a table with nothing in it.
    pub(crate) fn activate(&mut self, frame: ReadyFrame, owner: Owner) -> Pfn {
        let pfn = frame.into_pfn();
        let entry = self.entry_mut(pfn);
        entry.refs -= 1;
        entry.share = 1;
        entry.owner = owner;
        self.zone_of(pfn).set_state(pfn, PfnState::Active);
        pfn
    }

    /// One more entry maps the frame; or, for a table, one more of its entries is in use.
    pub(crate) fn add_share(&mut self, pfn: Pfn) {
        let entry = self.entry_mut(pfn);
        debug_assert_eq!(entry.state, PfnState::Active, "{pfn:?} is not active");
        entry.share += 1;
    }

    /// One entry of a table fewer is in use; gives back the table's share count, which never falls
    /// below one here.
    pub(crate) fn drop_table_entry(&mut self, table: Pfn) -> u32 {
        let entry = self.entry_mut(table);
        debug_assert!(entry.share > 1, "{table:?} has no entry to lose");
        entry.share -= 1;
        entry.share
    }

    /// One entry fewer maps the frame, but a stale translation may: the frame is held for the flush,
    /// and [`Self::release`] ends that. At share zero it is in flight and has no owner, unless a section
    /// still has it.
    pub(crate) fn drop_share_held(&mut self, pfn: Pfn) {
        let entry = self.entry_mut(pfn);
        debug_assert!(entry.share > 0, "{pfn:?} lost more shares than it had");
        entry.refs += 1;
        entry.share -= u32::from(cfg!(not(mutant = "lost_share")));
        if entry.share == 0 {
            if !matches!(entry.owner, Owner::Section { .. }) {
                entry.owner = Owner::None;
            }
            self.zone_of(pfn).set_state(pfn, PfnState::InFlight);
        }
    }

    /// A reference ends. A frame with neither reference nor share goes to the free list.
    pub(crate) fn release(&mut self, pfn: Pfn) {
        let entry = self.entry_mut(pfn);
        debug_assert!(entry.refs > 0, "{pfn:?} released once too often");
        entry.refs -= 1;
        if entry.refs == 0 && entry.share == 0 {
            self.zone_of(pfn).push(pfn, PfnState::Free);
        }
    }

    /// Pins a mapped frame, or one of a section; `write` if the holder may store into it.
    pub(crate) fn pin(&mut self, pfn: Pfn, write: bool) {
        let entry = self.entry_mut(pfn);
        debug_assert!(
            entry.share > 0 || entry.refs > 0,
            "{pfn:?} is pinned but free"
        );
        entry.refs += 1;
        if write {
            entry.write_pins += 1;
            entry.flags |= PfnFlags::MODIFIED;
            if entry.write_pins == 1 {
                self.write_pinned += 1;
            }
        }
    }

    /// Ends a pin.
    pub(crate) fn unpin(&mut self, pfn: Pfn, write: bool) {
        let entry = self.entry_mut(pfn);
        if write {
            debug_assert!(entry.write_pins > 0, "{pfn:?} has no write pin");
            // Its holder may have stored after the page was written back.
            entry.flags |= PfnFlags::MODIFIED;
            entry.write_pins -= 1;
            if entry.write_pins == 0 {
                self.write_pinned -= 1;
            }
        }
        self.release(pfn);
    }

    /// Frames with a write pin.
    pub(crate) fn write_pinned(&self) -> u32 {
        self.write_pinned
    }

    /// The dirty bit of an entry that maps the frame is about to be lost: keep it here.
    pub(crate) fn mark_modified(&mut self, pfn: Pfn) {
        self.entry_mut(pfn).flags |= PfnFlags::MODIFIED;
    }

    pub(crate) fn set_owner(&mut self, pfn: Pfn, owner: Owner) {
        self.entry_mut(pfn).owner = owner;
    }

    /// The clone block that owns the frame, if one does.
    pub(crate) fn block_of(&self, pfn: Pfn) -> Option<BlockId> {
        match self.entry(pfn).owner {
            Owner::Clone(block) => Some(block),
            Owner::None
            | Owner::Entry { .. }
            | Owner::Section { .. }
            | Owner::Root
            | Owner::Supervisor => None,
        }
    }

    /// Whether the only entry left of a clone block may take the frame over: nobody else refers to the
    /// block, and no pin or unacknowledged flush lets anybody else still look at the frame.
    pub(crate) fn last_reference(&self, pfn: Pfn, block: BlockId) -> bool {
        let held = self.entry(pfn).refs > 0 && cfg!(not(mutant = "held_taken"));
        self.clones.references(block) == 1 && !held
    }

    pub(crate) fn entry(&self, pfn: Pfn) -> &PfnEntry {
        if self.tables.range().contains(pfn) {
            self.tables.entry(pfn)
        } else {
            self.data.entry(pfn)
        }
    }

    pub(super) fn entry_mut(&mut self, pfn: Pfn) -> &mut PfnEntry {
        self.zone_of(pfn).entry_mut(pfn)
    }

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
