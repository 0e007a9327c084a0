//! Spaces that are kept as they were, while what they were made of goes on.

use std::collections::{BTreeMap, BTreeSet};

use shadow_mm::{ForkError, ForkMode, PageKey};

use super::common::Guest;
use super::image::ToKeep;
use super::keep_sections::KeptBytes;
use super::verbs::agree;
use super::world::{Bytes, Outcome, World};

/// Most that are kept at once.
const MAX_KEPT: usize = 3;

/// A space as it was.
struct Kept {
    space: Guest,
    pages: BTreeMap<u64, ToKeep>,
    /// Whose views it had: it may show them still.
    files: BTreeSet<usize>,
}

/// All that are kept.
#[derive(Default)]
pub(crate) struct Keeper {
    kept: Vec<Kept>,
    pub(crate) sections: Vec<KeptBytes>,
    /// What was found behind each key, since the last of them was deleted: it stays the same.
    keys: BTreeMap<PageKey, Bytes>,
}

impl Keeper {
    pub(crate) fn spaces(&self) -> impl Iterator<Item = &Guest> {
        self.kept.iter().map(|kept| &kept.space)
    }

    /// Whether what is kept may show a file.
    pub(crate) fn shows(&self, file: usize) -> bool {
        self.kept.iter().any(|kept| kept.files.contains(&file)) || self.keeps(file)
    }

    /// Whether a section is kept itself.
    pub(crate) fn keeps(&self, file: usize) -> bool {
        self.sections.iter().any(|kept| kept.number == file)
    }
}

impl World {
    pub(crate) fn keep(&mut self, which: usize) -> Outcome {
        if self.keeper.kept.len() >= MAX_KEPT {
            return Ok(());
        }
        let kept = match (
            self.mm.keep(&self.processes[which].cpu.space),
            self.mm.fork_mode(),
        ) {
            (Ok(kept), ForkMode::Shared) => kept,
            (Err(ForkError::NoMemory { .. } | ForkError::NoCloneBlocks { .. }), _)
            | (Err(ForkError::NotShared), ForkMode::Eager) => return Ok(()),
            (Ok(_), ForkMode::Eager) => return Err("kept without shared tables".to_owned()),
            (Err(other), _) => return Err(other.to_string()),
        };
        self.flush(which, kept.flush);
        let usage = self.mm.usage(&kept.child);
        agree("charged", usage.charged, 0)?;
        let pages = self.to_be_kept(which);
        let space = kept.child;
        let views = self.processes[which].pages.values();
        let files = views.filter_map(|page| page.view).map(|view| view.file);
        let files = files.collect();
        self.keeper.kept.push(Kept {
            space,
            pages,
            files,
        });
        Ok(())
    }

    /// What is kept is as it was.
    pub(crate) fn look_at_kept(&mut self, n: usize) -> Outcome {
        self.look_at_kept_sections()?;
        let mut keeper = std::mem::take(&mut self.keeper);
        let looked = match keeper.kept.get(n % keeper.kept.len().max(1)) {
            Some(kept) => self.compare_kept(kept, &mut keeper.keys),
            None => Ok(()),
        };
        self.keeper = keeper;
        looked
    }

    fn compare_kept(&self, kept: &Kept, keys: &mut BTreeMap<PageKey, Bytes>) -> Outcome {
        let found = self.found_in(&kept.space, |key, bytes| {
            agree("a key", bytes, *keys.entry(key).or_insert(bytes))
        })?;
        found.compare(&kept.pages)
    }

    pub(crate) fn drop_kept(&mut self, n: usize) -> Outcome {
        if !self.keeper.sections.is_empty() && (n % 2 == 1 || self.keeper.kept.is_empty()) {
            let n = n % self.keeper.sections.len();
            drop(self.keeper.sections.swap_remove(n));
            return Ok(());
        }
        if self.keeper.kept.is_empty() {
            return Ok(());
        }
        let kept = self.keeper.kept.remove(n % self.keeper.kept.len());
        self.keeper.keys.clear();
        self.unacknowledged.push(self.mm.delete_space(&kept.space));
        Ok(())
    }

    /// For the end: each is looked at, and goes.
    pub(crate) fn drop_all_kept(&mut self) -> Outcome {
        while !self.keeper.kept.is_empty() || !self.keeper.sections.is_empty() {
            self.look_at_kept(0)?;
            self.drop_kept(0)?;
            self.check()?;
        }
        Ok(())
    }
}
