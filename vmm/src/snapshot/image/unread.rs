//! Writing pages of shared memory and files in memory that the guest has never asked for: they are in the snapshot it was made of,
//! and the new one has them too, or builds on that.

use shadow_mm::SectionPage;

use super::Runs;
use super::save::{ImageWriter, SaveError};

impl ImageWriter<'_> {
    /// Writes them. The guest may go on before.
    pub(super) fn save_unread(&mut self) -> Result<(), SaveError> {
        for (whose, (image, extents)) in std::mem::take(&mut self.unread) {
            // What was read while it was looked at has been written.
            let known = self.pages_of(whose).cloned().unwrap_or_default();
            let mut runs = Runs::default();
            for extent in extents {
                for ahead in (0..extent.count).filter(|n| !known.has(extent.first + n)) {
                    let page = SectionPage::new(extent.stored + ahead);
                    let page = page.ok_or(SaveError::TooMany("pages"))?;
                    let stored = self.image_page(&image, page)?;
                    runs.push(extent.first + ahead, stored);
                }
            }
            if let Some(pages) = self.pages_of(whose) {
                pages.0.append(&mut runs.0);
                pages.0.sort_by_key(|run| run.start);
            }
        }
        Ok(())
    }
}

impl Runs {
    /// Whether a page is in one of them; they rise.
    fn has(&self, page: u64) -> bool {
        let after = self.0.partition_point(|run| run.start <= page);
        let run = self.0[..after].last();
        run.is_some_and(|run| page - run.start < run.count)
    }
}
