//! The area of guest memory a virtual CPU shares with the monitor.

use std::sync::Arc;

use guest::abi;
use vm_memory::{Bytes, MmapRegion, VolatileMemory};

/// The area of guest memory a virtual CPU shares with the monitor: TSS, stack, list, XSAVE area.
#[derive(Clone, Debug)]
pub struct CpuArea {
    memory: Arc<MmapRegion>,
    offset: usize,
    va: u64,
}

impl CpuArea {
    /// The area at byte `offset` of `memory`, which the monitor sees at `va`.
    #[must_use]
    pub fn new(memory: Arc<MmapRegion>, offset: usize, va: u64) -> Self {
        Self { memory, offset, va }
    }

    /// Where the monitor sees it.
    #[must_use]
    pub fn va(&self) -> u64 {
        self.va
    }

    fn at(&self, offset: u64, len: usize) -> vm_memory::VolatileSlice<'_> {
        self.memory
            .get_slice(self.offset + offset as usize, len)
            .expect("inside the area")
    }

    pub(super) fn write_words(&self, offset: u64, words: &[u64]) {
        self.at(offset, words.len() * 8).copy_from(words);
    }

    pub(super) fn read_words<const N: usize>(&self, offset: u64) -> [u64; N] {
        let mut words = [0; N];
        self.at(offset, N * 8).copy_to(&mut words);
        words
    }

    /// Puts an XSAVE area in place for the monitor. False if there is no room for one of this size.
    pub(super) fn write_xsave(&self, bytes: &[u8]) -> bool {
        let fits = bytes.len() as u64 <= abi::AREA_XSAVE_BYTES;
        if fits {
            let to = self.at(abi::AREA_XSAVE, bytes.len());
            to.write_slice(bytes, 0).expect("the same length");
        }
        fits
    }

    /// Puts the TSS in place.
    pub fn write_tss(&self, bytes: &[u8]) {
        self.at(abi::AREA_TSS, bytes.len())
            .write_slice(bytes, 0)
            .expect("fits");
    }
}
