//! Clone headers, clone blocks and clone descriptors: the sharing of private pages after a fork.
//!
//! * A **clone block** is a fork prototype: the entry of one shared page and the number of page-table
//!   entries that refer to it. While a block lives, its frame is owned by the block.
//! * A **clone header** is the array of blocks one fork made.
//! * A **clone descriptor** is one space's interest in one header: how many of the space's entries refer
//!   to the header's blocks. It is kept in the space; the header counts the descriptors.
//!
//! Blocks that are made one by one, when a shared table is copied, have neither: see [`super::lazy`].
//!
//! A block at zero gives its frame back; a descriptor at zero leaves its space; a header nobody
//! describes is freed with its blocks. Everything here is protected by the PFN lock.

use alloc::vec::Vec;

use super::lazy::LazyBlocks;
use crate::addr::{PAGE_SIZE, Pfn};
use crate::page_file::Slot;

/// The number of a clone header; reused once the header is freed.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct HeaderId(u32);

impl HeaderId {
    /// How many headers can be alive at once; what a prototype entry can name.
    pub const COUNT: u32 = 1 << 17;

    /// The header with this number, or `None` if it is not below [`HeaderId::COUNT`].
    #[must_use]
    pub const fn new(number: u32) -> Option<Self> {
        if number < Self::COUNT {
            Some(Self(number))
        } else {
            None
        }
    }

    /// The number.
    #[must_use]
    pub const fn get(self) -> u32 {
        self.0
    }
}

/// Names one clone block.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct BlockId {
    /// The header the block is in.
    pub header: HeaderId,
    /// Its place there.
    pub index: u32,
}

impl BlockId {
    /// How many blocks one header can have; what a prototype entry can name.
    pub const PER_HEADER: u32 = 1 << 28;
}

/// Where the page of a clone block is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum BlockContent {
    /// In this frame: mapped, or in transition.
    Resident(Pfn),
    /// In this slot of the page file.
    PageFile(Slot),
    /// It is zeroes, and has no frame.
    Zero,
}

/// One fork prototype.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Block {
    /// Where the page is; means nothing once the count is zero.
    content: BlockContent,
    /// Page-table entries that refer to the block, valid or not.
    count: u32,
}

const _: () = assert!(size_of::<Block>() <= 16);

impl Block {
    pub(crate) fn count(&self) -> u32 {
        self.count
    }

    /// Where the page is, while the block lives.
    pub(crate) fn content(&self) -> Option<BlockContent> {
        (self.count > 0).then_some(self.content)
    }
}

/// The blocks one fork made.
#[derive(Debug)]
pub(crate) struct Header {
    blocks: Vec<Block>,
    /// Descriptors in spaces.
    spaces: u32,
    /// Blocks whose count is not zero.
    live: u32,
}

impl Header {
    pub(crate) fn blocks(&self) -> &[Block] {
        &self.blocks
    }

    /// Pages of the host's memory its blocks take, rounded up.
    pub(crate) fn pages(&self) -> u64 {
        (self.blocks.capacity() * size_of::<Block>()).div_ceil(PAGE_SIZE) as u64
    }

    pub(crate) fn spaces(&self) -> u32 {
        self.spaces
    }

    pub(crate) fn live(&self) -> u32 {
        self.live
    }
}

/// No further header or block can be made.
#[derive(Debug)]
pub(crate) struct CloneTableFull;

/// All clone headers of a manager.
#[derive(Debug, Default)]
pub(crate) struct CloneTable {
    headers: Vec<Option<Header>>,
    vacant: Vec<HeaderId>,
    live_blocks: u64,
    pub(crate) lazy: LazyBlocks,
}

impl CloneTable {
    /// Makes a header with room for `capacity` blocks, described by one space. It is the last
    /// allocation a fork needs from here: making blocks in it cannot fail.
    pub(crate) fn reserve(&mut self, capacity: u64) -> Result<HeaderId, CloneTableFull> {
        if capacity > u64::from(BlockId::PER_HEADER) {
            return Err(CloneTableFull);
        }
        let mut blocks = Vec::new();
        blocks
            .try_reserve_exact(capacity as usize)
            .map_err(|_| CloneTableFull)?;
        let header = Header {
            blocks,
            spaces: 1,
            live: 0,
        };
        if let Some(id) = self.vacant.pop() {
            self.headers[id.0 as usize] = Some(header);
            return Ok(id);
        }
        let id = u32::try_from(self.headers.len())
            .ok()
            .and_then(HeaderId::new)
            .filter(|id| *id != HeaderId::LAZY);
        let id = id.ok_or(CloneTableFull)?;
        self.headers.try_reserve(1).map_err(|_| CloneTableFull)?;
        self.vacant
            .try_reserve(self.headers.len() + 1)
            .map_err(|_| CloneTableFull)?;
        self.headers.push(Some(header));
        Ok(id)
    }

    /// Makes a block that so many entries refer to.
    #[inline]
    pub(crate) fn make_block(
        &mut self,
        header: HeaderId,
        content: BlockContent,
        count: u32,
    ) -> BlockId {
        self.live_blocks += 1;
        if header == HeaderId::LAZY {
            let index = self.lazy.make(Block { content, count });
            return BlockId { header, index };
        }
        let owner = self.header_mut(header);
        let index = owner.blocks.len() as u32;
        debug_assert!(
            owner.blocks.len() < owner.blocks.capacity(),
            "a fork reserved too little"
        );
        owner.blocks.push(Block { content, count });
        owner.live += 1;
        BlockId { header, index }
    }

    /// One more entry refers to the block.
    #[inline]
    pub(crate) fn add_reference(&mut self, block: BlockId) {
        self.block_mut(block).count += 1;
    }

    /// One entry fewer refers to the block. If it was the last, gives back what the block held.
    #[inline]
    pub(crate) fn drop_reference(&mut self, id: BlockId) -> Option<BlockContent> {
        let block = self.block_mut(id);
        debug_assert!(block.count > 0, "clone block dropped below zero");
        block.count = block.count.saturating_sub(1);
        if block.count > 0 {
            return None;
        }
        let content = block.content;
        if id.header == HeaderId::LAZY {
            self.lazy.vacate(id.index);
        } else {
            self.header_mut(id.header).live -= 1;
        }
        self.live_blocks -= 1;
        Some(content)
    }

    /// Where a living block's page is.
    pub(crate) fn content(&self, id: BlockId) -> BlockContent {
        let block = self.block(id);
        debug_assert!(block.is_some_and(|b| b.count > 0), "{id:?} is dead");
        block.map_or(BlockContent::Zero, |b| b.content)
    }

    /// The page of a living block is elsewhere now.
    pub(crate) fn set_content(&mut self, id: BlockId, content: BlockContent) {
        self.block_mut(id).content = content;
    }

    /// How many entries refer to the block.
    pub(crate) fn references(&self, block: BlockId) -> u32 {
        self.block(block).map_or(0, |b| b.count)
    }

    /// One more space describes the header.
    pub(crate) fn describe(&mut self, header: HeaderId) {
        self.header_mut(header).spaces += 1;
    }

    /// A space's descriptor of the header reached zero. The last one frees the header; gives back how
    /// many pages that frees.
    pub(crate) fn undescribe(&mut self, id: HeaderId) -> u64 {
        let header = self.header_mut(id);
        header.spaces -= 1;
        if header.spaces > 0 {
            return 0;
        }
        let freed = header.pages();
        debug_assert_eq!(header.live, 0, "a clone header died with live blocks");
        debug_assert!(
            header.blocks.iter().all(|b| b.count == 0),
            "a clone block is not at zero"
        );
        self.headers[id.0 as usize] = None;
        self.vacant.push(id);
        freed
    }

    /// Gives back what a header reserved beyond the blocks it made: so many pages.
    pub(crate) fn trim(&mut self, id: HeaderId) -> u64 {
        let header = self.header_mut(id);
        let before = header.pages();
        if header.blocks.len() < header.blocks.capacity() / 2 {
            header.blocks.shrink_to_fit();
        }
        before.saturating_sub(header.pages())
    }

    /// Blocks that are referred to.
    pub(crate) fn live_blocks(&self) -> u64 {
        self.live_blocks
    }

    /// Every live header.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (HeaderId, &Header)> {
        let named = self.headers.iter().enumerate();
        named.filter_map(|(n, h)| Some((HeaderId(n as u32), h.as_ref()?)))
    }

    pub(crate) fn header(&self, id: HeaderId) -> Option<&Header> {
        self.headers.get(id.0 as usize)?.as_ref()
    }

    fn header_mut(&mut self, id: HeaderId) -> &mut Header {
        self.headers[id.0 as usize]
            .as_mut()
            .expect("a live clone header")
    }

    /// A block, dead or alive, if there is or was one of this name.
    pub(crate) fn block(&self, id: BlockId) -> Option<&Block> {
        if id.header == HeaderId::LAZY {
            return self.lazy.get(id.index);
        }
        self.header(id.header)?.blocks.get(id.index as usize)
    }

    #[inline]
    fn block_mut(&mut self, id: BlockId) -> &mut Block {
        if id.header == HeaderId::LAZY {
            return self.lazy.get_mut(id.index).expect("a live clone block");
        }
        &mut self.header_mut(id.header).blocks[id.index as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_dies_with_its_last_descriptor() {
        let mut table = CloneTable::default();
        let header = table.reserve(1).expect("room");
        let block = table.make_block(header, BlockContent::Resident(Pfn::new(7)), 2);
        table.describe(header);
        assert!(table.drop_reference(block).is_none());
        table.undescribe(header);
        assert!(table.drop_reference(block).is_some());
        assert!(table.header(header).is_some());
        table.undescribe(header);
        assert!(table.header(header).is_none());
        assert_eq!(table.reserve(1).expect("room"), header);
    }

    #[test]
    fn absurd_capacity_is_refused() {
        assert!(CloneTable::default().reserve(u64::MAX).is_err());
    }
}
