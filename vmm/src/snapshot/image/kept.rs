//! The memory of a guest that is made of an image again and again, in one machine.
//!
//! A guest that has ended leaves its address spaces here. They go back to the image, which gives up only what they have for
//! themselves, and are the next guest's as they are: page tables, mapped pages of layers and of files included. Some pages
//! that it has stored to they keep, with what the image has in them ([`KEPT`]). If their
//! mappings are not what they were, as [`shadow_mm::Shape`] tells at once, those are made so first. Spaces that are gone, of
//! processes that executed another program or ended, are loaded anew.
//!
//! A space that shares memory with others is always loaded anew: shared memory, files in memory, files of the host that are
//! stored to through it. What such memory has was changed for all of them.
//!
//! A file of the host that stays mapped stays open. Whoever takes the spaces looks first whether those files are
//! what they were ([`KeptMemory::files`]).

use std::collections::BTreeMap;
use std::sync::Arc;

use shadow_mm::{Keep, Shape};

use super::KindData;
use super::load::{Image, ImageLoader, Loaded};
use super::reshape::{Form, reshape};
use crate::memory::{Backing, Memory, Space, VmmPlatform};
use crate::snapshot::records::{
    BytesRef, ContentRef, LoadBytes, LoadContents, LoadMemory, MemoryError, SpaceRef,
};

type GuestSpace = Arc<Space<VmmPlatform>>;

/// Pages that the spaces of a guest keep for the next one: all, if there are few, since putting them back costs as little
/// as looking whether they were stored to. Otherwise, up to 4 MiB of what was stored to.
const KEPT: Keep = Keep {
    most: 1024,
    unseen: 64,
};

/// Spaces of an image, with what loads those that are not there.
pub struct KeptMemory {
    image: ImageLoader,
    /// As the image has them. While a guest has them, those that can be kept.
    spaces: BTreeMap<SpaceRef, KeptSpace>,
    /// Spaces that the guest was given so far.
    given: Vec<(SpaceRef, GuestSpace)>,
}

/// A space of the image.
struct KeptSpace {
    space: GuestSpace,
    /// What tells that nothing of its form has changed.
    shape: Shape,
    /// What it has mapped.
    form: Form,
    /// Pages it has for itself, as long as no guest has it.
    pages: u64,
}

/// What became of the spaces of a guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Left {
    /// They are what the image has.
    pub kept: usize,
    /// They were torn down.
    pub dropped: usize,
    /// Pages that those which are kept have for themselves.
    pub pages: u64,
}

impl KeptMemory {
    /// Nothing is there yet.
    #[must_use]
    pub fn new(image: ImageLoader) -> Self {
        Self {
            image,
            spaces: BTreeMap::new(),
            given: Vec::new(),
        }
    }

    /// The image.
    #[must_use]
    pub fn image(&self) -> &Arc<Image> {
        self.image.image()
    }

    /// What is known of what was loaded last.
    #[must_use]
    pub fn loaded(&self) -> &Arc<Loaded> {
        self.image.loaded()
    }

    /// Files that kept spaces map, by the numbers the records have for them.
    pub fn files(&self) -> impl Iterator<Item = (ContentRef, &Backing)> {
        self.image.contents()
    }

    /// A guest was made; nothing has run. From now on it is known by which of its spaces can be kept.
    pub fn is_given(&mut self) {
        let memory = self.image.memory();
        self.given.extend(self.loaded().take_spaces());
        for (at, space) in std::mem::take(&mut self.given) {
            // A range that is empty in every guest was emptied.
            let shape = memory.manager.shape(&space);
            let known = self.spaces.get(&at);
            if known.is_none_or(|known| known.shape != shape) && self.can_be_kept(at) {
                let form = Form::of(memory, &space);
                let kept = KeptSpace {
                    space,
                    shape,
                    form,
                    pages: 0,
                };
                self.spaces.insert(at, kept);
            }
        }
        self.image.forget_sections();
    }

    /// A guest could not be made: the spaces that it was given are gone with it. The others are given up.
    pub fn is_refused(&mut self) {
        let given = std::mem::take(&mut self.given);
        let gone = |at: &SpaceRef| given.iter().any(|(of, _)| of == at);
        self.spaces.retain(|at, _| !gone(at));
        self.discard();
    }

    /// Whether memory that others share is none of the space's.
    fn can_be_kept(&self, at: SpaceRef) -> bool {
        let data = self.image.image().data();
        let alone = |kind: KindData| match kind {
            KindData::Anonymous => true,
            KindData::Private { section, .. } | KindData::Shared { section, .. } => {
                let section = data.sections.get(section as usize);
                let section = section.filter(|section| section.writer.is_none());
                // Files of the host are the same for each guest, files in memory each guest's own.
                section
                    .and_then(|section| section.content)
                    .is_some_and(|file| self.files().any(|(known, _)| known == file))
            }
        };
        let space = data.spaces.get(at.0 as usize);
        space.is_some_and(|space| space.vads.iter().all(|vad| alone(vad.kind)))
    }

    /// The guest has ended, and has left these spaces, which nobody uses or deletes any more. They go back to the image, or are
    /// torn down.
    pub fn take_back(&mut self, left: &[GuestSpace]) -> Left {
        let memory = Arc::clone(self.image.memory());
        let mut report = Left::default();
        let theirs = |space: &GuestSpace| left.iter().any(|own| Arc::ptr_eq(own, space));
        let mut keep = KEPT;
        self.spaces.retain(|_, space| {
            let kept = theirs(&space.space) && space.goes_back(&memory, keep);
            report.kept += usize::from(kept);
            if kept {
                report.pages += space.pages;
                keep = keep.less(space.pages);
            }
            kept
        });
        for space in left {
            if !self.wants(space) {
                memory.delete_space(space);
                report.dropped += 1;
            }
        }
        report
    }

    /// Whether a space is one that may be kept.
    #[must_use]
    pub fn wants(&self, space: &GuestSpace) -> bool {
        self.spaces
            .values()
            .any(|own| Arc::ptr_eq(&own.space, space))
    }

    /// Pages that the spaces have for themselves, while no guest has them.
    pub fn pages(&self) -> u64 {
        self.spaces.values().map(|own| own.pages).sum()
    }

    /// The spaces that are there, while no guest has them.
    pub fn spaces(&self) -> impl Iterator<Item = &GuestSpace> {
        self.spaces.values().map(|own| &own.space)
    }

    /// Gives up the spaces that are there, while no guest has them.
    pub fn discard(&mut self) {
        let memory = self.image.memory();
        for own in std::mem::take(&mut self.spaces).into_values() {
            memory.delete_space(&own.space);
        }
    }
}

impl KeptSpace {
    /// Has it be what the image says, with pages of its own as `keep` says. False if it cannot.
    fn goes_back(&mut self, memory: &Memory, keep: Keep) -> bool {
        if memory.manager.shape(&self.space) != self.shape {
            if let Err(error) = reshape(memory, &self.space, &self.form) {
                tracing::debug!(%error, "a space is not kept");
                return false;
            }
            self.shape = memory.manager.shape(&self.space);
        }
        match memory.manager.reset_to_image(&self.space, keep) {
            Ok(back) => {
                memory.submit(back.flush);
                self.pages = back.kept;
                true
            }
            Err(error) => {
                tracing::debug!(%error, "a space is not kept");
                false
            }
        }
    }
}

impl LoadMemory for KeptMemory {
    fn needs_contents(&self) -> bool {
        self.spaces.len() < self.image.image().data().spaces.len()
    }

    fn space(
        &mut self,
        at: SpaceRef,
        contents: &dyn LoadContents,
    ) -> Result<GuestSpace, MemoryError> {
        match self.spaces.get(&at) {
            Some(own) => {
                self.given.push((at, Arc::clone(&own.space)));
                Ok(Arc::clone(&own.space))
            }
            None => self.image.space(at, contents),
        }
    }

    fn bytes(&mut self, at: BytesRef, into: &dyn LoadBytes) -> Result<u64, MemoryError> {
        self.image.bytes(at, into)
    }
}
