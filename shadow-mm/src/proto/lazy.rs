//! Clone blocks made one by one, when a shared table is copied.
//!
//! They have no header of their own: one pseudo-header, [`HeaderId::LAZY`], stands for all of them, no
//! space describes it, and a block's place is used again once nothing refers to it.

use alloc::vec::Vec;

use super::clone_block::{Block, HeaderId};
use crate::addr::PAGE_SIZE;

impl HeaderId {
    /// Stands for the blocks made one by one.
    pub(crate) const LAZY: Self = match Self::new(Self::COUNT - 1) {
        Some(id) => id,
        None => unreachable!(),
    };
}

/// Blocks in one piece of memory: a page's worth, so that growing never moves what is there.
const CHUNK: usize = PAGE_SIZE / size_of::<Block>();

/// The blocks.
#[derive(Debug, Default)]
pub(crate) struct LazyBlocks {
    chunks: Vec<Vec<Block>>,
    /// Places of blocks that nothing refers to.
    vacant: Vec<u32>,
    live: u64,
    /// Blocks that may still have to be made: one for each private page in a shared table, and one for each forked page.
    promised: u64,
    /// Forked pages: those without a block, because they have not left memory since they are more than one entry's.
    pub(crate) forked: u64,
}

impl LazyBlocks {
    /// Makes a block; gives back its place.
    #[inline]
    pub(super) fn make(&mut self, block: Block) -> u32 {
        self.live += 1;
        if let Some(place) = self.vacant.pop() {
            if let Some(old) = self.get_mut(place) {
                *old = block;
            }
            return place;
        }
        let full = self.chunks.len().saturating_sub(1) * CHUNK;
        match self.chunks.last_mut() {
            Some(chunk) if chunk.len() < CHUNK => {
                chunk.push(block);
                (full + chunk.len() - 1) as u32
            }
            Some(_) | None => self.make_chunk(block),
        }
    }

    /// Makes a block in a chunk of its own; gives back its place.
    fn make_chunk(&mut self, block: Block) -> u32 {
        let mut chunk = Vec::with_capacity(CHUNK);
        chunk.push(block);
        self.chunks.push(chunk);
        ((self.chunks.len() - 1) * CHUNK) as u32
    }

    /// Nothing refers to the block any more.
    #[inline]
    pub(super) fn vacate(&mut self, place: u32) {
        self.live -= 1;
        if self.live == 0 {
            self.chunks = Vec::new();
            self.vacant = Vec::new();
        } else {
            self.vacant.push(place);
        }
    }

    #[inline]
    pub(super) fn get(&self, place: u32) -> Option<&Block> {
        self.chunks
            .get(place as usize / CHUNK)?
            .get(place as usize % CHUNK)
    }

    #[inline]
    pub(super) fn get_mut(&mut self, place: u32) -> Option<&mut Block> {
        self.chunks
            .get_mut(place as usize / CHUNK)?
            .get_mut(place as usize % CHUNK)
    }

    /// So many more may have to be made.
    pub(crate) fn promise(&mut self, blocks: u64) {
        self.promised += blocks;
    }

    /// So many fewer.
    pub(crate) fn unpromise(&mut self, blocks: u64) {
        debug_assert!(blocks <= self.promised, "a block was not promised");
        self.promised -= blocks;
    }

    /// Blocks that may still have to be made.
    pub(crate) fn promised(&self) -> u64 {
        self.promised
    }

    /// Blocks something refers to.
    pub(crate) fn live(&self) -> u64 {
        self.live
    }

    /// Pages of the host's memory that those there are and may be take.
    pub(crate) fn pages(&self) -> u64 {
        (self.live + self.promised).div_ceil(CHUNK as u64)
    }

    /// The blocks and their places, those without references too.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (u32, &Block)> {
        (0..).zip(self.chunks.iter().flatten())
    }
}
