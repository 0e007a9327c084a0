//! Spaces that are kept as they were, while what they were made of goes on.

use std::collections::{BTreeMap, BTreeSet};

use shadow_mm::{ForkError, ForkMode, ImageRun, PageKey, RebaseError, Rebased, SectionPage};

use super::common::{Guest, TEMPLATES, range, vpn};
use super::files::FileModel;
use super::image::ToKeep;
use super::keep_sections::KeptBytes;
use super::ops::FROZEN;
use super::verbs::agree;
use super::world::{Bytes, Outcome, World};

/// Pages that a leaf table translates.
const LEAF: u64 = 512;
/// Most that are kept at once.
const MAX_KEPT: usize = 3;

/// A space as it was.
struct Kept {
    space: Guest,
    /// The process it was made of.
    of: u64,
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
        let of = self.processes[which].id;
        self.keeper.kept.push(Kept {
            space,
            of,
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

    /// Copies what is kept to a layer, and has the process it was made of lie on that: where nothing has changed, it has from then on what
    /// the layer has.
    pub(crate) fn rebase(&mut self, n: usize) -> Outcome {
        let number = self.files.len();
        let Some(kept) = self.keeper.kept.get(n % self.keeper.kept.len().max(1)) else {
            return Ok(());
        };
        let which = self.processes.iter().position(|own| own.id == kept.of);
        let Some(which) = which.filter(|_| number <= FROZEN + TEMPLATES as usize) else {
            return Ok(());
        };
        let pages = kept.pages.iter();
        let pages = pages.filter_map(|(at, page)| Some((*at, page.bytes?)));
        let pages: Vec<(u64, Bytes)> = pages.collect();
        let kept = kept.space.clone();
        let bytes: Vec<Bytes> = pages.iter().map(|(_, bytes)| *bytes).collect();
        let layer = FileModel::template(&self.mm, number, &bytes);
        let image: Vec<_> = (0..)
            .zip(&pages)
            .map(|(first, (at, _))| ImageRun {
                range: range(*at, 1),
                section: layer.section.clone(),
                first: SectionPage::new(first).expect("a page"),
            })
            .collect();
        self.files.push(layer);
        let tables: BTreeSet<u64> = pages.iter().map(|(at, _)| at / LEAF).collect();
        for table in tables {
            let space = self.processes[which].cpu.space.clone();
            let done = self.mm.rebase(&space, &kept, vpn(table * LEAF), &image);
            let lies = match done {
                Ok(Rebased { flush, pages }) => {
                    self.flush(which, flush);
                    pages
                }
                Err(RebaseError::NoMemory { .. }) => continue,
                Err(other) => return Err(other.to_string()),
            };
            if lies > 0 {
                let here = (0..).zip(&pages).filter(|(_, (at, _))| at / LEAF == table);
                let here: Vec<(u64, (u64, Bytes))> = here.map(|(n, page)| (n, *page)).collect();
                agree("pages that lie on it", lies, here.len() as u64)?;
                self.lies_on(which, number, &here)?;
            }
        }
        Ok(())
    }

    /// Pages of a process are a layer's from now on, which has what they had.
    fn lies_on(&mut self, which: usize, layer: usize, pages: &[(u64, (u64, Bytes))]) -> Outcome {
        for (n, (at, bytes)) in pages {
            let had = self.to_be_kept(which).remove(at);
            let had = had.and_then(|page| page.bytes);
            agree("what is there twice", had, Some(*bytes))?;
            let process = &mut self.processes[which];
            let id = process.id;
            if let Some(model) = process.pages.get_mut(at) {
                (model.own, model.image) = (None, Some((layer, *n)));
            }
            self.move_pins(id, |page| Some(page).filter(|page| page != at));
        }
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
