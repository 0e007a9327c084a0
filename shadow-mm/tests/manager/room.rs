//! A file system's room, which the sections of its files ask for pages.

use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

use shadow_mm::{Allowance, SectionPage};

/// Pages that are left.
#[derive(Debug)]
pub(super) struct Room(pub(super) AtomicU64);

impl Allowance for Room {
    fn take(&self, pages: u64) -> bool {
        let less = |left: u64| left.checked_sub(pages);
        self.0.fetch_update(SeqCst, SeqCst, less).is_ok()
    }

    fn give(&self, pages: u64) {
        self.0.fetch_add(pages, SeqCst);
    }
}

pub(super) fn page(number: u64) -> SectionPage {
    SectionPage::new(number).expect("a page")
}
