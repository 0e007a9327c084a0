//! The memory of a guest that is made of an image again and again, in one machine.
//!
//! A guest that has ended leaves its address spaces here. They go back to the image, which gives up only what they have for
//! themselves, and are the next guest's as they are: page tables, mapped pages of layers and of files included. Some pages
//! that it has stored to they keep, with what the image has in them ([`KEPT`]). If their
//! mappings are not what they were, as [`shadow_mm::Shape`] tells at once, those are made so first. Spaces that are gone, of
//! processes that executed another program or ended, are loaded anew.
//!
//! Sections that processes of a template share (`MAP_SHARED` of no file) go back too: what was stored to them is dropped, and they stay
//! mapped. What a space shows of files in memory, and of a snapshot's shared memory, which is read, goes with the guest: only those views are
//! unmapped, and the next guest's are mapped there when it gets the space. A space through which a file of the host is stored to is
//! always loaded anew.
//!
//! A file of the host that stays mapped stays open. Whoever takes the spaces looks first whether those files are
//! what they were ([`KeptMemory::files`]).

use std::collections::BTreeMap;
use std::sync::Arc;

use shadow_mm::{Keep, ResetError, Section, Shape, UnmapError, VpnRange};

use super::load::{Image, ImageLoader, Loaded};
use super::reshape::{Form, ReshapeError, reshape};
use super::{KindData, range};
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
    /// What tells that no mapping has changed since it was given.
    shape: Shape,
    /// Where it shows what is each guest's own; no mapping is there as long as no guest has it.
    own: Vec<VpnRange>,
    /// What it has mapped elsewhere.
    form: Form,
    /// Pages it has for itself, as long as no guest has it.
    pages: u64,
}

/// What a mapping shows, as far as it matters to the next guest.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Shows {
    /// The same to each guest: nothing, a file of the host that is not stored to, or shared memory that goes back.
    Same,
    /// What is each guest's own: files in memory, and shared memory that does not go back.
    Own,
    /// A file of the host that is stored to.
    Stored,
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
            if known.is_none_or(|known| known.shape != shape)
                && let Some(own) = self.own_ranges(at)
            {
                let form = Form::of(memory, &space).without(&own);
                let kept = KeptSpace {
                    space,
                    shape,
                    own,
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

    fn shows(&self, kind: KindData) -> Shows {
        let (KindData::Private { section, .. } | KindData::Shared { section, .. }) = kind else {
            return Shows::Same;
        };
        let sections = &self.image.image().data().sections;
        let Some(section) = sections.get(section as usize) else {
            return Shows::Stored;
        };
        let is_hosts = |file| self.files().any(|(known, _)| known == file);
        let shared = matches!(kind, KindData::Shared { .. });
        match (section.content, section.writer) {
            (None, _) if shared && self.image.goes_back(section) => Shows::Same,
            (Some(file), None) if is_hosts(file) => Shows::Same,
            (Some(file), Some(_)) if is_hosts(file) => Shows::Stored,
            (_, _) => Shows::Own,
        }
    }

    /// Where a space shows what is each guest's own, rising. None if the space cannot be kept.
    fn own_ranges(&self, at: SpaceRef) -> Option<Vec<VpnRange>> {
        let space = self.image.image().data().spaces.get(at.0 as usize)?;
        let mut own = Vec::new();
        for vad in &space.vads {
            match self.shows(vad.kind) {
                Shows::Same => {}
                Shows::Own => own.push(range(vad.start, vad.count)?),
                Shows::Stored => return None,
            }
        }
        Some(own)
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
        if let Err(error) = self.image.reset_sections() {
            tracing::debug!(%error, "shared memory does not go back");
            self.discard();
            report = Left {
                dropped: left.len(),
                ..Left::default()
            };
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

    /// The sections that are there, while no guest has them.
    pub fn sections(&self) -> impl Iterator<Item = &Section<Backing>> {
        self.image.kept_sections()
    }

    /// The spaces that are there, while no guest has them.
    pub fn spaces(&self) -> impl Iterator<Item = &GuestSpace> {
        self.spaces.values().map(|own| &own.space)
    }

    /// Gives up what is there, while no guest has it.
    pub fn discard(&mut self) {
        let memory = self.image.memory();
        for own in std::mem::take(&mut self.spaces).into_values() {
            memory.delete_space(&own.space);
        }
        self.image.give_up_sections();
    }
}

/// Why a space is not what the image says.
#[derive(Debug, thiserror::Error)]
enum NotBack {
    #[error("a view of what was the guest's own cannot be taken away")]
    Unmap(#[from] UnmapError),
    #[error(transparent)]
    Reshape(#[from] ReshapeError),
    #[error(transparent)]
    Reset(#[from] ResetError),
}

impl KeptSpace {
    /// Has it be what the image says, with pages of its own as `keep` says. False if it cannot.
    fn goes_back(&mut self, memory: &Memory, keep: Keep) -> bool {
        match self.try_back(memory, keep) {
            Ok(()) => true,
            Err(error) => {
                tracing::debug!(%error, "a space is not kept");
                false
            }
        }
    }

    fn try_back(&mut self, memory: &Memory, keep: Keep) -> Result<(), NotBack> {
        let manager = &memory.manager;
        let changed = manager.shape(&self.space) != self.shape;
        for range in &self.own {
            memory.submit(manager.unmap(&self.space, *range)?);
        }
        if changed {
            reshape(memory, &self.space, &self.form)?;
        }
        self.shape = manager.shape(&self.space);
        let back = manager.reset_to_image(&self.space, keep)?;
        memory.submit(back.flush);
        self.pages = back.kept;
        Ok(())
    }
}

impl LoadMemory for KeptMemory {
    fn space(
        &mut self,
        at: SpaceRef,
        contents: &dyn LoadContents,
    ) -> Result<GuestSpace, MemoryError> {
        let Some(kept) = self.spaces.get_mut(&at) else {
            return self.image.space(at, contents);
        };
        if !kept.own.is_empty() {
            self.image
                .map_again(&kept.space, (at, &kept.own), contents)?;
            kept.shape = self.image.memory().manager.shape(&kept.space);
        }
        self.given.push((at, Arc::clone(&kept.space)));
        Ok(Arc::clone(&kept.space))
    }

    fn bytes(&mut self, at: BytesRef, into: &dyn LoadBytes) -> Result<u64, MemoryError> {
        self.image.bytes(at, into)
    }
}
