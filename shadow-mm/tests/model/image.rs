//! Images under spaces, and what a snapshot would keep of a space.

use std::collections::BTreeMap;

use shadow_mm::{
    GoneBack, ImageError, Keep, PageKey, Pfn, ResetError, SavedPage, SectionPage, VpnRange,
};

use super::common::{Guest, LAYER, layer, range, vpn};
use super::ops::FROZEN;
use super::verbs::{agree, fresh};
use super::world::{Bytes, Outcome, PageModel, World};

impl World {
    pub(crate) fn attach(
        &mut self,
        which: usize,
        range: VpnRange,
        (image, first): (usize, u64),
    ) -> Outcome {
        let space = self.processes[which].cpu.space.clone();
        let section = self.files[image].section.clone();
        let page = SectionPage::new(first).expect("a page");
        let done = self.mm.attach_image(&space, range, &section, page);
        let pages = &self.processes[which].pages;
        let mut all = range.start().get()..range.end();
        let missing = all.find(|page| {
            let model = pages.get(page);
            model.is_none_or(|model| model.view.is_some_and(|view| view.is_shared()))
        });
        match (done, missing) {
            (Err(ImageError::NotPrivate { vpn: at }), Some(missing)) => {
                return agree("not private", at, vpn(missing));
            }
            // A page of zeroes may have an entry or none.
            (Err(ImageError::InUse { .. }), None) => return Ok(()),
            (Err(ImageError::NoSuchPage { .. }), None) => {
                let end = (first + range.count()) * 4096;
                return agree("no such page", end > self.files[image].size, true);
            }
            (Ok(()), None) => {}
            (done, missing) => return Err(format!("attach: {done:?}, missing {missing:?}")),
        }
        for (ahead, at) in (range.start().get()..range.end()).enumerate() {
            let Some(model) = self.processes[which].pages.get_mut(&at) else {
                continue;
            };
            if model.image.is_some() || model.own.is_some_and(|own| own != Bytes::default()) {
                return Err(format!("an image hides what page {at:#x} has"));
            }
            (model.own, model.image) = (None, Some((image, first + ahead as u64)));
        }
        Ok(())
    }

    /// Gives up the pages that a space has for itself, but for those it may keep.
    pub(crate) fn reset(&mut self, which: usize, keep: Keep) -> Outcome {
        let space = self.processes[which].cpu.space.clone();
        let shape = self.mm.shape(&space);
        let GoneBack { flush, kept } = match self.mm.reset_to_image(&space, keep) {
            Ok(back) => back,
            Err(ResetError::NoMemory { .. }) => return Ok(()),
            Err(other) => return Err(other.to_string()),
        };
        self.flush(which, flush);
        agree("shape", self.mm.shape(&space), shape)?;
        let process = &mut self.processes[which];
        let id = process.id;
        for model in process.pages.values_mut() {
            model.own = fresh(model.view).filter(|_| model.image.is_none());
        }
        self.move_pins(id, |_| None);
        agree("no more kept than may be", kept.min(keep.most), kept)?;
        agree("private", self.mm.usage(&space).private, kept)
    }

    /// Nobody ever stores to a layer.
    pub(crate) fn check_layer(&self) -> Outcome {
        let first = layer(&self.mm).start.get();
        for page in 0..LAYER {
            let has = self.bytes(Pfn::new(first + page));
            agree(
                "a layer's page",
                has,
                self.files[FROZEN].on_disk(page.into()),
            )?;
        }
        Ok(())
    }

    /// Puts the content of a space together from what a snapshot would keep.
    pub(crate) fn save(&mut self, which: usize) -> Outcome {
        let space = self.processes[which].cpu.space.clone();
        let found = self.found_in(&space, |_, _| Ok(()))?;
        found.compare(&self.to_be_kept(which))
    }

    /// What a snapshot would keep of a process: of each of its own pages.
    pub(crate) fn to_be_kept(&self, which: usize) -> BTreeMap<u64, ToKeep> {
        let pages = self.processes[which].pages.iter();
        let private = pages.filter(|(at, model)| {
            **at < 1 << 35 && !model.view.is_some_and(|view| view.is_shared())
        });
        let content = |model: &PageModel| match model.own {
            Some(own) => Some(own),
            None => model
                .image
                .map(|(image, page)| self.files[image].bytes(page)),
        };
        let kept = private.map(|(at, model)| {
            let bytes = content(model);
            let absent = fresh(model.view);
            (*at, ToKeep { bytes, absent })
        });
        kept.collect()
    }

    /// What a snapshot would find in a space. `note` is told of each page of the space's own that has a key; those of
    /// sections follow their files, and are one thing only while nothing else goes on.
    pub(crate) fn found_in(
        &self,
        space: &Guest,
        mut note: impl FnMut(PageKey, Bytes) -> Outcome,
    ) -> Result<Found, String> {
        let mut found = Found::default();
        for run in self.mm.image_runs(space) {
            for (ahead, page) in run.range.iter().enumerate() {
                let file = self.files.iter().find(|file| file.section == run.section);
                let file = file.ok_or("an image of no section")?;
                let bytes = file.bytes(run.first.get() + ahead as u64);
                found.pages.insert(page.get(), bytes);
            }
        }
        let (mut noted, mut views) = (Ok(()), Vec::new());
        let mut from = Some(range(0, 1 << 35));
        while let Some(part) = from {
            let next = self.mm.saved_pages(space, part, 3, |vpn, page| {
                let (key, bytes) = match page {
                    SavedPage::Frame(key, frame) => (Some(key), self.bytes(frame)),
                    SavedPage::Slot(key, slot) => {
                        let bytes = self.page_file.get(&slot.offset());
                        (Some(key), bytes.copied().unwrap_or([0xbb; 3]))
                    }
                    SavedPage::Zero => (None, Bytes::default()),
                    // Its section has it; but it must be what the section has.
                    SavedPage::View(key, frame) => {
                        views.push((vpn.get(), key, self.bytes(frame)));
                        return;
                    }
                    SavedPage::Busy => {
                        found.busy.push(vpn.get());
                        return;
                    }
                };
                found.pages.insert(vpn.get(), bytes);
                if let (Some(key), Ok(())) = (key, &noted) {
                    noted = note(key, bytes);
                }
            });
            from = next.and_then(|next| VpnRange::between(next, 1 << 35));
        }
        let mut shown = BTreeMap::new();
        for (page, key, bytes) in views {
            if let (Some(below), Ok(())) = (found.pages.get(&page), &noted) {
                noted = agree("a page of an image", bytes, *below);
            }
            if noted.is_ok() {
                noted = agree(
                    "a section's page",
                    bytes,
                    *shown.entry(key).or_insert(bytes),
                );
            }
        }
        noted.map(|()| found)
    }
}

/// A page that a snapshot would keep: what it has, and what it has if nothing is found of it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ToKeep {
    pub(crate) bytes: Option<Bytes>,
    absent: Option<Bytes>,
}

/// What a snapshot would find.
#[derive(Default)]
pub(crate) struct Found {
    pages: BTreeMap<u64, Bytes>,
    /// On their way into memory.
    busy: Vec<u64>,
}

impl Found {
    pub(crate) fn compare(mut self, expected: &BTreeMap<u64, ToKeep>) -> Outcome {
        for (at, page) in expected.iter().filter(|(at, _)| !self.busy.contains(at)) {
            let kept = self.pages.remove(at).or(page.absent);
            if kept != page.bytes {
                let expected = page.bytes;
                return Err(format!("page {at:#x}: keeps {kept:?}, not {expected:?}"));
            }
        }
        Ok(())
    }
}
