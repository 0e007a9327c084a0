//! Sections that are kept as they were, while what is mapped and stored goes on.

use std::collections::BTreeMap;

use shadow_mm::sim::SimFile;
use shadow_mm::{
    ForkMode, KeepSectionError, KeptPage, KeptSection, PAGE_SIZE, Pfn, Section, SectionPage,
};

use super::verbs::agree;
use super::world::{Bytes, Outcome, SLOTS, World};

/// A section as it was.
pub(crate) struct KeptBytes {
    pub(crate) number: usize,
    kept: KeptSection<SimFile>,
    pages: Vec<Bytes>,
    /// What of it was not its own: a layer's, or an image's that nobody had asked for.
    elsewhere: BTreeMap<u64, Elsewhere>,
}

/// Where a page is that is not the section's own.
enum Elsewhere {
    Layer(Pfn),
    Image(Bytes),
}

impl World {
    /// Keeps a section, with the spaces that may store to it.
    pub(crate) fn keep_section(&mut self, number: usize) -> Outcome {
        let mut closed = true;
        for which in 0..self.processes.len() {
            match self.mm.keep(&self.processes[which].cpu.space) {
                Ok(kept) => {
                    self.flush(which, kept.flush);
                    self.unacknowledged.push(self.mm.delete_space(&kept.child));
                }
                Err(_) => closed = false,
            }
        }
        let section = self.files[number].section.clone();
        let known = self.keeper.keeps(number);
        let kept = match self.mm.keep_section(&section) {
            Ok(kept) => kept,
            Err(KeepSectionError::Kept) => return agree("kept", known, true),
            Err(KeepSectionError::Open { .. }) => {
                let eager = self.mm.fork_mode() == ForkMode::Eager;
                return agree("open", closed && !eager, false);
            }
            Err(KeepSectionError::NoFrame(_) | KeepSectionError::NoSection(_)) => return Ok(()),
            Err(other @ KeepSectionError::OfFile) => return Err(other.to_string()),
        };
        agree("kept twice", known, false)?;
        let end = self.files[number].size / PAGE_SIZE as u64;
        let pages = (0..end).map(|page| self.files[number].bytes(page));
        let layers = self.mm.section_frozen(&section).into_iter();
        let layers = layers.flat_map(|(first, frames)| {
            let frame = move |n: u32| Pfn::new(frames.start.get() + n);
            (0..frames.count).map(move |n| (first + u64::from(n), Elsewhere::Layer(frame(n))))
        });
        let unread = self.unread(&section);
        let kept = KeptBytes {
            number,
            kept,
            pages: pages.collect(),
            elsewhere: layers.chain(unread).collect(),
        };
        self.keeper.sections.push(kept);
        Ok(())
    }

    /// The pages that a section has in an image and nobody has asked for.
    fn unread(&self, section: &Section<SimFile>) -> Vec<(u64, Elsewhere)> {
        let Some((image, runs)) = self.mm.section_unread(section) else {
            return Vec::new();
        };
        let image = self.files.iter().find(|f| f.section.id() == image.id());
        let image = image.expect("sections are laid over files of the model");
        let pages = runs.iter().flat_map(|run| {
            let page = |n| Elsewhere::Image(image.on_disk(run.stored + n));
            (0..run.count).map(move |n| (run.first + n, page(n)))
        });
        pages.collect()
    }

    /// What is kept of sections is as it was.
    pub(crate) fn look_at_kept_sections(&self) -> Outcome {
        self.keeper
            .sections
            .iter()
            .try_for_each(|kept| self.compare_section(kept))
    }

    fn compare_section(&self, kept: &KeptBytes) -> Outcome {
        let mut found: BTreeMap<u64, Option<Bytes>> = BTreeMap::new();
        let mut from = SectionPage::new(0);
        let mut bytes = Box::new([0; PAGE_SIZE]);
        while let Some((page, what)) =
            from.and_then(|from| self.mm.next_kept(&kept.kept, from, &mut bytes))
        {
            let seen = match what {
                KeptPage::Bytes => Some(SLOTS.map(|slot| bytes[slot])),
                KeptPage::Slot(slot) => {
                    let bytes = self.page_file.get(&slot.offset());
                    Some(bytes.copied().unwrap_or([0xbb; 3]))
                }
                KeptPage::Busy => None,
                KeptPage::Zero => {
                    from = SectionPage::new(page.get() + 1);
                    continue;
                }
            };
            found.insert(page.get(), seen);
            from = SectionPage::new(page.get() + 1);
        }
        for (page, expected) in (0u64..).zip(&kept.pages) {
            let elsewhere = kept.elsewhere.get(&page).map(|place| match place {
                Elsewhere::Layer(frame) => self.bytes(*frame),
                Elsewhere::Image(bytes) => *bytes,
            });
            let seen = match (found.remove(&page), elsewhere) {
                (Some(None), None) => continue,
                (Some(Some(bytes)), None) => bytes,
                (None, bytes) => bytes.unwrap_or_default(),
                (Some(_), Some(_)) => return Err(format!("page {page} is in two places")),
            };
            agree("a page that is kept", (page, seen), (page, *expected))?;
        }
        agree("pages beyond the end", found.len(), 0)
    }
}
