//! Sections whose pages are a layer's until they are stored to, or an image's until they are wanted.

use shadow_mm::sim::SimFile;
use shadow_mm::{Extent, Extents, LayError, PAGE_SIZE, Thaw};

use super::verbs::agree;
use super::world::{Bytes, Outcome, World};

/// Runs of a section's pages, with the layer's or image's first: some of them neighbours in one of both only.
const RUNS: [(u64, u64, u64); 4] = [(1, 2, 4), (3, 1, 0), (6, 3, 6), (9, 1, 9)];

impl World {
    /// Lays a section over the layer or the image, if it can have pages there.
    pub(crate) fn lay(&mut self, number: usize, over: usize) -> Outcome {
        let run = |(first, count, stored)| Extent {
            first,
            count,
            stored,
        };
        let extents = Extents::new(RUNS.map(run)).expect("runs");
        let file = &self.files[number];
        let had = self.mm.section_extent(&file.section);
        let (section, image) = (&file.section, &self.files[over].section);
        match self.mm.lay_section(section, image, &extents) {
            Ok(()) => {}
            Err(LayError::NotEmpty) => {
                let fits = extents.end() * PAGE_SIZE as u64 <= file.size;
                let empty = file.file.is_none() && had == 0;
                return agree("could be laid", fits && empty, false);
            }
            Err(LayError::NoSpace { .. }) => {
                agree("limited", file.room.is_some(), true)?;
                return agree("extent", self.mm.section_extent(section), had);
            }
            Err(LayError::NoSuchPages) => return Err("these pages are there".into()),
        }
        agree("extent", self.mm.section_extent(section), extents.pages())?;
        for (first, count, stored) in RUNS {
            for ahead in 0..count {
                let before = self.files[number].bytes(first + ahead);
                agree("an empty page", before, Bytes::default())?;
                let bytes = self.files[over].on_disk(stored + ahead);
                self.files[number].store(first + ahead, bytes);
            }
        }
        Ok(())
    }

    /// Has pages copied that somebody wants to store to; false if there is no frame.
    pub(crate) fn thaw(&mut self, wanted: &Thaw<SimFile>) -> bool {
        let mut flushes = Vec::new();
        let thawed = self.mm.thaw(wanted, |made| flushes = made);
        flushes
            .into_iter()
            .for_each(|flush| self.flush_space(flush));
        thawed.is_ok()
    }
}
