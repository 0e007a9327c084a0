//! How whoever drops a section's handle, or a ticket, tells the holder of the PFN lock.

use alloc::vec::Vec;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::section::SectionId;

/// Rings when something was dropped that only the PFN lock's holder can clean up, and says of which sections: those
/// whose numbers leave the rung mark when they are divided by [`Self::MARKS`].
#[derive(Debug, Default)]
pub(crate) struct Bell {
    rung: AtomicBool,
    marks: [AtomicU64; Self::WORDS],
}

impl Bell {
    const WORDS: usize = 16;
    pub(super) const MARKS: usize = Self::WORDS * u64::BITS as usize;

    fn mark(id: SectionId) -> usize {
        id.get() as usize % Self::MARKS
    }

    pub(crate) fn ring(&self, id: SectionId) {
        let mark = Self::mark(id);
        let bit = 1 << (mark % u64::BITS as usize);
        self.marks[mark / u64::BITS as usize].fetch_or(bit, Ordering::Release);
        self.rung.store(true, Ordering::Release);
    }

    /// Takes the marks that were rung; nobody has told of them before.
    pub(super) fn silence(&self) -> Vec<usize> {
        let mut marks = Vec::new();
        if !self.rung.swap(false, Ordering::Acquire) {
            return marks;
        }
        for (n, word) in self.marks.iter().enumerate() {
            let word = word.swap(0, Ordering::Acquire);
            let set = (0..u64::BITS as usize).filter(|bit| word >> bit & 1 == 1);
            marks.extend(set.map(|bit| n * u64::BITS as usize + bit));
        }
        marks
    }
}
