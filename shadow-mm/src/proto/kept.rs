//! What is known of a section that is kept as it was: which of its pages are what they were, and where the others went.

use alloc::collections::BTreeSet;

use super::section::{SectionId, SectionPage};

/// A section that is kept. A page of it is one of these:
///
/// * *still to be kept*: what the section has, or has not, is what it had. Nobody can store to it.
/// * *settled*: what it had is a page of the copies, or was zeroes, or a layer's.
///
/// A page is settled once, and stays so.
#[derive(Debug)]
pub(crate) struct KeptPages {
    /// The section that has what was put aside.
    pub(crate) copies: SectionId,
    /// One past the last page it had.
    pub(crate) end: u64,
    settled: BTreeSet<SectionPage>,
}

impl KeptPages {
    /// None of `end` pages is settled.
    pub(crate) fn new(copies: SectionId, end: u64) -> Self {
        Self {
            copies,
            end,
            settled: BTreeSet::new(),
        }
    }

    /// Whether the section's page is what it was.
    pub(crate) fn is_pending(&self, page: SectionPage) -> bool {
        page.get() < self.end && !self.settled.contains(&page)
    }

    /// What the section has from now on is not what it had.
    pub(crate) fn settle(&mut self, page: SectionPage) {
        if page.get() < self.end {
            self.settled.insert(page);
        }
    }
}
