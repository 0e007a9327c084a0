//! What a manager is given to work with.

use crate::addr::{GuestVa, PfnRange};

/// The two zones of the frame pool.
///
/// Table frames have a zone of their own so that an embedder can map the zones differently. Every frame
/// of both must read as zero when the manager is made.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PoolLayout {
    /// Frames for guest pages.
    pub data: PfnRange,
    /// Frames for page tables.
    pub tables: PfnRange,
}

/// The part of the address range guests may map.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// The first address a guest may not map; at most 0x7f80_0000_0000, where the supervisor slot begins.
    pub user_end: GuestVa,
    /// The lowest address a guest may map (`mmap_min_addr`).
    pub min_va: GuestVa,
}

/// Pages of the aligned window, around the page that is wanted, that one read may fill: powers of two, 64 at most, so that no
/// window crosses a leaf table. The defaults are what `cargo bench -p shadow-mm --bench clusters` showed to be good (docs/mm-model.md).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Clusters {
    /// Of the page file.
    pub page_file: u8,
    /// Of a file...
    pub file: u8,
    /// ... and of one that the guest reads on where the last read ended: twice the last time, up to this.
    pub file_most: u8,
}

impl Default for Clusters {
    fn default() -> Self {
        Self {
            page_file: 16,
            file: 16,
            file_most: 64,
        }
    }
}

impl Clusters {
    pub(crate) fn are_valid(self) -> bool {
        let sizes = [self.page_file, self.file, self.file_most];
        sizes.iter().all(|n| n.is_power_of_two() && *n <= 64)
    }
}

/// Why a manager cannot be made.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum LayoutError {
    /// A zone contains frame 0, which an all-zero entry names.
    #[error("the zone {zone:?} contains frame 0")]
    FrameZero {
        /// The zone.
        zone: PfnRange,
    },
    /// A zone is empty, or its last frame's number does not fit.
    #[error("the zone {zone:?} is empty or too high")]
    BadZone {
        /// The zone.
        zone: PfnRange,
    },
    /// The zones overlap.
    #[error("the data zone {data:?} and the table zone {tables:?} overlap")]
    ZonesOverlap {
        /// The data zone.
        data: PfnRange,
        /// The table zone.
        tables: PfnRange,
    },
    /// The user range is empty, unaligned, or reaches into the supervisor slot.
    #[error("guests cannot be limited to {min_va}..{user_end}")]
    BadUserRange {
        /// The lower limit asked for.
        min_va: GuestVa,
        /// The upper limit asked for.
        user_end: GuestVa,
    },
    /// The PFN database of so many frames does not fit in memory.
    #[error("no memory for the PFN database of {frames} frames")]
    OutOfMemory {
        /// Frames in both zones.
        frames: u64,
    },
}

impl PoolLayout {
    /// Checks the zones.
    pub(crate) fn validate(&self) -> Result<(), LayoutError> {
        for zone in [self.data, self.tables] {
            if zone.start.get() == 0 {
                return Err(LayoutError::FrameZero { zone });
            }
            if zone.count == 0 || zone.end() > u64::from(u32::MAX) {
                return Err(LayoutError::BadZone { zone });
            }
        }
        if self.data.overlaps(self.tables) {
            return Err(LayoutError::ZonesOverlap {
                data: self.data,
                tables: self.tables,
            });
        }
        Ok(())
    }
}

impl Limits {
    /// Checks the range.
    pub(crate) fn validate(&self) -> Result<(), LayoutError> {
        let (min_va, user_end) = (self.min_va, self.user_end);
        let aligned = min_va.offset() == 0 && user_end.offset() == 0;
        let below_supervisor = user_end.vpn().get() <= crate::shadow::SUPERVISOR_FIRST_PAGE;
        if aligned && below_supervisor && min_va < user_end {
            Ok(())
        } else {
            Err(LayoutError::BadUserRange { min_va, user_end })
        }
    }
}

/// Which of a manager's internal allocations a test lets fail.
#[cfg(feature = "fault-injection")]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FailPlan {
    /// None.
    Never,
    /// One: after this many more that succeed.
    Once(u64),
    /// All, after this many more that succeed.
    From(u64),
}

#[cfg(feature = "fault-injection")]
impl FailPlan {
    /// Counts one allocation; true if it must fail.
    pub(crate) fn strike(&mut self) -> bool {
        let (Self::Once(left) | Self::From(left)) = self else {
            return false;
        };
        if *left > 0 {
            *left -= 1;
            return false;
        }
        if matches!(self, Self::Once(_)) {
            *self = Self::Never;
        }
        true
    }
}
