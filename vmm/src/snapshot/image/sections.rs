//! Writing what processes share and what is in files in memory: sections over nothing.
//!
//! They are kept while the guest stands still, once all its spaces are, and written when it goes on. One that cannot be kept is
//! copied at once: spaces that see it were not kept, or somebody else keeps it.

use shadow_mm::{KeptPage, KeptSection, Section, SectionPage, Slot};

use super::Runs;
use super::look::{Bytes, PATIENCE, is_zero};
use super::save::{ImageWriter, SaveError};
use super::scratch::Scratch;
use crate::memory::{Backing, FRAME, Memory};

impl ImageWriter<'_> {
    /// Keeps what is shared, or writes it if that cannot be. All spaces must have been given, and the guest must still stand
    /// still.
    ///
    /// # Errors
    /// As saving a space.
    pub fn keep_shared(&mut self) -> Result<(), SaveError> {
        for (whose, section) in std::mem::take(&mut self.shared) {
            match self.memory.manager.keep_section(&section) {
                Ok(kept) => self.kept.push((whose, kept)),
                Err(error) => {
                    tracing::debug!(%error, "shared memory is copied while the guest stands still");
                    let runs = self.section_pages(&section)?;
                    self.add_runs(whose, runs);
                }
            }
        }
        Ok(())
    }

    /// Writes what was kept.
    pub(super) fn save_kept_sections(&mut self) -> Result<(), SaveError> {
        for (whose, kept) in std::mem::take(&mut self.kept) {
            let runs = self.kept_pages(&kept)?;
            self.add_runs(whose, runs);
        }
        Ok(())
    }

    fn kept_pages(&mut self, kept: &KeptSection<Backing>) -> Result<Runs, SaveError> {
        let mut runs = Runs::default();
        let mut bytes = Box::new([0; FRAME]);
        let mut from = SectionPage::new(0);
        while let Some(first) = from
            && let Some(page) = next_kept(self.memory, kept, first, &mut bytes)?
        {
            if !is_zero(&bytes) {
                let stored = self.add_page(&bytes)?;
                runs.push(page.get(), stored);
            }
            from = SectionPage::new(page.get() + 1);
        }
        Ok(runs)
    }

    /// The pages of a section that is not kept.
    fn section_pages(&mut self, section: &Section<Backing>) -> Result<Runs, SaveError> {
        let mut runs = Runs::default();
        let scratch = Scratch::new(self.memory).map_err(|_| SaveError::NoMemory)?;
        for page in self.memory.manager.section_pages(section) {
            let mut bytes = Box::new([0; FRAME]);
            let shown = scratch.view(section, page.get(), 1);
            let shown = shown.map_err(|_| SaveError::NoMemory)?;
            let loaded = scratch.load(shown.start().va(), &mut bytes);
            scratch.close(shown);
            loaded.map_err(|_| SaveError::NoMemory)?;
            if !is_zero(&bytes) {
                let stored = self.add_page(&bytes)?;
                runs.push(page.get(), stored);
            }
        }
        Ok(runs)
    }
}

/// The first page from `first` on that the section had or has, with the bytes it had. What is in the page file is read there, and
/// takes no frame: the guest may be waiting for one until this copy is done.
fn next_kept(
    memory: &Memory,
    kept: &KeptSection<Backing>,
    first: SectionPage,
    bytes: &mut [u8; FRAME],
) -> Result<Option<SectionPage>, SaveError> {
    let mut read: Option<(SectionPage, Slot, Bytes)> = None;
    for _ in 0..PATIENCE.1 {
        let Some((page, what)) = memory.manager.next_kept(kept, first, bytes) else {
            return Ok(None);
        };
        match (what, read.take()) {
            (KeptPage::Bytes, _) => return Ok(Some(page)),
            (KeptPage::Zero, _) => {
                bytes.fill(0);
                return Ok(Some(page));
            }
            (KeptPage::Slot(slot), Some((at, known, content))) if (at, known) == (page, slot) => {
                *bytes = *content;
                return Ok(Some(page));
            }
            (KeptPage::Slot(slot), _) => {
                let mut content = Box::new([0; FRAME]);
                let done = memory.read_slot(slot, &mut content);
                done.map_err(SaveError::Read)?;
                read = Some((page, slot, content));
            }
            (KeptPage::Busy, _) => std::thread::sleep(PATIENCE.0),
        }
    }
    Err(SaveError::SharedStuck(first))
}
