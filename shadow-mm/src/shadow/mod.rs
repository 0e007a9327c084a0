//! The shadow page tables: the hardware page table *is* the page table, there is no second copy.

mod cursor;
mod new_leaf;
mod prune;
mod share;

pub(crate) use cursor::{Cursor, LeafRun, TableCount, decode_leaf, retarget};
pub(crate) use new_leaf::NewLeaf;

use crate::addr::EntryIndex;

/// The slot of every top-level table that belongs to the supervisor; guests map below it.
pub(crate) const SUPERVISOR_SLOT: EntryIndex = match EntryIndex::new(255) {
    Some(index) => index,
    None => unreachable!(),
};

/// The first page of the supervisor slot: 0x7f80_0000_0000.
pub(crate) const SUPERVISOR_FIRST_PAGE: u64 = 255 << 27;
