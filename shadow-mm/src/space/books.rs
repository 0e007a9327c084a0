//! Whose counts the entries of a table are in.

use crate::pfn::PfnDatabase;
use crate::proto::{BlockContent, BlockId, HeaderId};
use crate::space::SpaceState;

/// Where a table's entries are counted.
///
/// What is in a shared table belongs to the table, and is charged once however many spaces reach it: its
/// private pages are the ones that clone blocks are promised for, and its valid entries are nobody's.
pub(super) enum Books<'a, B> {
    /// Of a table that only this space reaches.
    Own(&'a mut SpaceState<B>),
    /// Of a table that is shared, or counts as shared.
    Shared,
}

impl<B: Clone + Eq> Books<'_, B> {
    /// A private page is gone.
    pub(super) fn lose_private(&mut self, db: &mut PfnDatabase) {
        match self {
            Self::Own(state) => state.private -= 1,
            Self::Shared => db.unpromise_blocks(1),
        }
    }

    /// An entry is not valid any more.
    pub(super) fn lose_resident(&mut self) {
        match self {
            Self::Own(state) => state.resident -= 1,
            Self::Shared => {}
        }
    }

    /// An entry refers to the block no more. If none does, gives back what the block held.
    pub(super) fn drop_reference(
        &mut self,
        db: &mut PfnDatabase,
        block: BlockId,
    ) -> Option<BlockContent> {
        match self {
            Self::Own(state) => state.descriptors.drop_reference(db, block),
            Self::Shared => {
                debug_assert_eq!(
                    block.header,
                    HeaderId::LAZY,
                    "a shared table refers to a described block"
                );
                db.drop_block_reference(block)
            }
        }
    }
}
