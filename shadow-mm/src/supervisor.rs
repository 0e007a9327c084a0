//! The supervisor slot: tables every root shares, for the ring-0 monitor and what it shows ring 3.

use bitflags::bitflags;

use crate::addr::{GuestVa, Level, Pfn, PfnRange, TABLE_ENTRIES, Vpn, VpnRange};
use crate::backend::Platform;
use crate::manager::{Demand, Manager};
use crate::pte::{Entry, EntryFlags, UpperEntry, ValidEntry};
use crate::shadow::{Cursor, SUPERVISOR_FIRST_PAGE, SUPERVISOR_SLOT, TableCount};

bitflags! {
    /// What may be done with supervisor memory besides reading it in ring 0.
    #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
    pub struct SupervisorRights: u8 {
        /// Stores, in ring 0.
        const WRITE = 1;
        /// Instruction fetches.
        const EXEC = 2;
        /// Ring 3 may read it too, and execute it if [`Self::EXEC`] is set. Never with [`Self::WRITE`].
        const USER = 4;
    }
}

/// Why supervisor memory cannot be mapped. Nothing has changed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum SupervisorError {
    /// The address is not page aligned, there are no pages, or they leave the supervisor slot.
    #[error("{pages} pages at {va} do not lie in the supervisor slot")]
    OutsideSlot {
        /// The first address.
        va: GuestVa,
        /// How many pages.
        pages: u64,
    },
    /// A frame number does not fit.
    #[error("{pages} frames from {first:#x} are too high")]
    FrameTooHigh {
        /// The first frame number.
        first: u64,
        /// How many frames.
        pages: u64,
    },
    /// Frames of the data zone belong to guests.
    #[error("{pages} frames from {first:#x} reach into the data zone")]
    DataZone {
        /// The first frame number.
        first: u64,
        /// How many frames.
        pages: u64,
    },
    /// Ring 3 must not write supervisor memory.
    #[error("ring 3 must not write supervisor memory")]
    UserWrite,
    /// Something is mapped there: what is mapped is never replaced.
    #[error("page {vpn} of the supervisor slot is mapped already")]
    Overlap {
        /// The first page that is.
        vpn: Vpn,
    },
    /// No table frame is left.
    #[error("no table frame is left")]
    NoMemory,
}

/// One leaf of a supervisor mapping.
#[derive(Clone, Copy, Debug)]
struct Leaf {
    vpn: Vpn,
    frame: Pfn,
    level: Level,
}

impl<P: Platform> Manager<P> {
    /// Maps frames outside the data zone into the slot all spaces share: 2 MiB leaves where alignment
    /// and length allow, else 4 KiB. `first_frame` is a guest-physical address divided by 4096.
    ///
    /// Spaces that exist see it at once; no flush is needed.
    ///
    /// # Errors
    /// See [`SupervisorError`]; nothing has changed then.
    pub fn map_supervisor(
        &self,
        va: GuestVa,
        first_frame: u64,
        pages: u64,
        rights: SupervisorRights,
    ) -> Result<(), SupervisorError> {
        if rights.contains(SupervisorRights::USER | SupervisorRights::WRITE) {
            return Err(SupervisorError::UserWrite);
        }
        let range = slot_range(va, pages).ok_or(SupervisorError::OutsideSlot { va, pages })?;
        let first = self.foreign_frame(first_frame, pages)?;
        let _serialised = self.supervisor_lock.lock();
        // A root of no space: its only entry is the supervisor slot.
        let mut count = TableCount::default();
        count.add(range);
        let demand = Demand::tables(count.tables());
        let mut reserve = self.reserve(demand).ok_or(SupervisorError::NoMemory)?;
        let cursor = Cursor::new(&self.store, self.supervisor);
        let taken = leaves(range, first).find(|leaf| occupied(&cursor, *leaf));
        if let Some(leaf) = taken {
            self.give_back(reserve);
            return Err(SupervisorError::Overlap { vpn: leaf.vpn });
        }
        let flags = leaf_flags(rights);
        let mut db = self.pfns.lock();
        for Leaf { vpn, frame, level } in leaves(range, first) {
            let table =
                cursor.ensure_from(&mut db, (vpn, Level::Pointers), level, &mut reserve.tables);
            let entry = ValidEntry { frame, flags };
            match level {
                Level::Leaf => cursor.install(&mut db, table, vpn.index(level), entry),
                Level::Directory | Level::Pointers | Level::Root => {
                    cursor.install_large(&mut db, table, vpn.index(level), entry);
                }
            }
        }
        drop(db);
        self.give_back(reserve);
        Ok(())
    }

    fn foreign_frame(&self, first: u64, pages: u64) -> Result<Pfn, SupervisorError> {
        let too_high = SupervisorError::FrameTooHigh { first, pages };
        let start = u32::try_from(first).map_err(|_| too_high)?;
        let count = u32::try_from(pages).map_err(|_| too_high)?;
        let frames = PfnRange {
            start: Pfn::new(start),
            count,
        };
        if frames.end() > u64::from(u32::MAX) {
            return Err(too_high);
        }
        if frames.overlaps(self.layout.data) {
            return Err(SupervisorError::DataZone { first, pages });
        }
        Ok(frames.start)
    }
}

/// The pages, if they all lie in the supervisor slot.
fn slot_range(va: GuestVa, pages: u64) -> Option<VpnRange> {
    let range = VpnRange::new(va.vpn(), pages)?;
    let inside = range.start().get() >= SUPERVISOR_FIRST_PAGE
        && range.last().index(Level::Root) == SUPERVISOR_SLOT;
    (va.offset() == 0 && inside).then_some(range)
}

/// The range cut into the largest leaves that fit.
fn leaves(range: VpnRange, first: Pfn) -> impl Iterator<Item = Leaf> {
    const LARGE: u64 = TABLE_ENTRIES as u64;
    let mut done = 0;
    core::iter::from_fn(move || {
        if done == range.count() {
            return None;
        }
        let vpn = range.start().checked_add(done)?;
        let frame = Pfn::new(first.get() + done as u32);
        let aligned = vpn.get() % LARGE == 0 && u64::from(frame.get()) % LARGE == 0;
        let level = if aligned && range.count() - done >= LARGE {
            Level::Directory
        } else {
            Level::Leaf
        };
        done += level.pages();
        Some(Leaf { vpn, frame, level })
    })
}

fn occupied<S: crate::backend::FrameStore>(cursor: &Cursor<'_, S>, leaf: Leaf) -> bool {
    let vpn = leaf.vpn;
    let UpperEntry::Table(directory) = cursor.upper(cursor.root(), vpn.index(Level::Pointers))
    else {
        return false;
    };
    match cursor.upper(directory, vpn.index(Level::Directory)) {
        UpperEntry::Empty => false,
        UpperEntry::Large(_) => true,
        UpperEntry::Table(_) | UpperEntry::Shared(_) if leaf.level == Level::Directory => true,
        UpperEntry::Table(table) | UpperEntry::Shared(table) => {
            cursor.leaf(table, vpn.index(Level::Leaf)) != Entry::Empty
        }
    }
}

fn leaf_flags(rights: SupervisorRights) -> EntryFlags {
    // Used and modified from the start: hardware then never writes these entries.
    let mut flags = EntryFlags::ACCESSED | EntryFlags::DIRTY;
    flags.set(
        EntryFlags::WRITABLE,
        rights.contains(SupervisorRights::WRITE),
    );
    flags.set(EntryFlags::USER, rights.contains(SupervisorRights::USER));
    flags.set(
        EntryFlags::NO_EXECUTE,
        !rights.contains(SupervisorRights::EXEC),
    );
    flags
}
