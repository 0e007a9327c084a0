//! Making spaces of a memory image again.
//!
//! What a snapshot says is not believed: a range that guests may not map, a page the snapshot does not
//! have, a section that is not there are errors, before anything runs.

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};

use super::shared::AllExtents;
use super::{
    ImageContent, ImageData, KindData, Run, SectionData, SectionRef, SpaceData, VadData, range,
};
use crate::locks::{Mutex, rank};
use crate::memory::{Backing, FRAME, Intent, Memory, Space, VmmPlatform};
use crate::snapshot::format::PartKind;
use crate::snapshot::read::{ReadError, Snapshot};
use crate::snapshot::records::{
    BytesRef, ContentRef, LoadBytes, LoadContents, LoadMemory, MemoryError, SpaceRef,
};
use shadow_mm::{
    CreateError, ImageError, LayError, MapError, MapKind, MapRequest, PfnRange, Placement, Prot,
    ResetSectionError, Section, SectionError, SectionPage, Sharing, VadFlags, VadTag, Vpn,
    VpnRange,
};

/// Why a memory image could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The snapshot's file.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The part is none.
    #[error("the snapshot's address spaces make no sense")]
    Decode(#[source] postcard::Error),
    /// Something in it is not there or cannot be.
    #[error("the snapshot's {0} make no sense")]
    Nonsense(&'static str),
    /// There is no table for a space.
    #[error("the guest's memory does not fit into --memory")]
    Space(#[from] CreateError),
    /// A mapping cannot be made.
    #[error("a mapping of the snapshot cannot be made again")]
    Map(#[from] MapError),
    /// Pages cannot be put under it.
    #[error("pages of the snapshot cannot be mapped")]
    Image(#[from] ImageError),
    /// A section cannot be made.
    #[error(transparent)]
    Section(#[from] SectionError),
    /// It cannot have its pages.
    #[error("the guest's shared memory and files in memory cannot be had again")]
    Lay(#[from] LayError),
    /// A mapped file.
    #[error("a mapped file cannot be mapped again")]
    File(#[source] std::io::Error),
}

/// The pages of a space that were in use when it was saved.
#[derive(Debug)]
pub struct WorkingSet {
    /// The space.
    pub space: Arc<Space<VmmPlatform>>,
    /// First pages and counts, rising.
    pub pages: Vec<(u64, u64)>,
}

/// What a snapshot says about memory, read once for all guests that are made of it.
#[derive(Debug)]
pub struct Image {
    pub(super) snapshot: Arc<Snapshot>,
    pub(super) data: ImageData,
    pub(super) extents: AllExtents,
}

impl Image {
    /// Reads it.
    ///
    /// # Errors
    /// It is damaged, or makes no sense.
    pub fn read(snapshot: &Arc<Snapshot>) -> Result<Self, LoadError> {
        let part = snapshot.part(PartKind::Spaces)?;
        let data = postcard::from_bytes(&part).map_err(LoadError::Decode)?;
        Ok(Self {
            snapshot: Arc::clone(snapshot),
            extents: AllExtents::of(&data),
            data,
        })
    }

    /// The snapshot.
    #[must_use]
    pub fn snapshot(&self) -> &Arc<Snapshot> {
        &self.snapshot
    }

    pub(super) fn data(&self) -> &ImageData {
        &self.data
    }
}

/// How a guest comes to its pages.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Pages {
    /// Each is read into a frame of its own when it is wanted.
    Read,
    /// They are these frames, page by page, until they are stored to.
    Mapped(PfnRange),
}

/// Loads an image.
pub struct ImageLoader {
    pub(super) memory: Arc<Memory>,
    pub(super) of: Arc<Image>,
    /// The section over the snapshot's pages.
    pub(super) image: Section<Backing>,
    sections: Vec<Option<Section<Backing>>>,
    /// The files of the host that sections were opened over.
    contents: BTreeMap<ContentRef, Backing>,
    loaded: Arc<Loaded>,
}

/// What is known once an image was loaded.
#[derive(Debug, Default)]
pub struct Loaded {
    content: OnceLock<Arc<ImageContent>>,
    made: Mutex<rank::WorkingSets, Made>,
}

/// The spaces that were made, until somebody takes them.
#[derive(Debug, Default)]
struct Made {
    sets: Vec<WorkingSet>,
    spaces: Vec<(SpaceRef, Arc<Space<VmmPlatform>>)>,
}

impl Loaded {
    /// What the pages come from, to be told when it fails.
    #[must_use]
    pub fn content(&self) -> Option<&Arc<ImageContent>> {
        self.content.get()
    }

    /// What is to be read ahead; once.
    #[must_use]
    pub fn take_working_sets(&self) -> Vec<WorkingSet> {
        std::mem::take(&mut self.made.lock().sets)
    }

    /// The spaces that were made; once.
    #[must_use]
    pub fn take_spaces(&self) -> Vec<(SpaceRef, Arc<Space<VmmPlatform>>)> {
        std::mem::take(&mut self.made.lock().spaces)
    }
}

impl ImageLoader {
    /// Makes a section over the snapshot's pages; no space is made yet. `loaded` is told what comes of it.
    ///
    /// # Errors
    /// There is no memory for it.
    pub fn new(
        memory: &Arc<Memory>,
        (of, pages): (Arc<Image>, Pages),
        loaded: Arc<Loaded>,
    ) -> Result<Self, LoadError> {
        let snapshot = of.snapshot();
        let content = Arc::new(ImageContent::new(Arc::clone(snapshot)));
        let backing = Backing(Arc::clone(&content) as _);
        let bytes = snapshot.pages() * FRAME as u64;
        let image = match pages {
            Pages::Read => memory.manager.create_section(Some(backing), bytes)?,
            Pages::Mapped(layer) => memory.manager.create_frozen_section(backing, layer)?,
        };
        let first = loaded.content.set(content).is_ok();
        debug_assert!(first, "another image was loaded there");
        Ok(Self {
            memory: Arc::clone(memory),
            image,
            sections: vec![None; of.data.sections.len()],
            contents: BTreeMap::new(),
            of,
            loaded,
        })
    }

    /// For other spaces with the same pages: what one has read, all find in memory.
    #[must_use]
    pub fn again(&self) -> Self {
        Self {
            memory: Arc::clone(&self.memory),
            of: Arc::clone(&self.of),
            image: self.image.clone(),
            sections: vec![None; self.of.data.sections.len()],
            contents: BTreeMap::new(),
            loaded: Arc::default(),
        }
    }

    /// The image.
    pub(super) fn image(&self) -> &Arc<Image> {
        &self.of
    }

    pub(super) fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    /// The files of the host that sections were opened over.
    pub(super) fn contents(&self) -> impl Iterator<Item = (ContentRef, &Backing)> {
        self.contents.iter().map(|(at, backing)| (*at, backing))
    }

    pub(super) fn loaded(&self) -> &Arc<Loaded> {
        &self.loaded
    }

    /// Whether a section can be as it was made once its guest has ended ([`Self::reset_sections`]): it is shared memory over a
    /// layer. Files in memory are made by the records, for each guest.
    pub(super) fn goes_back(&self, section: &SectionData) -> bool {
        self.image.is_frozen() && section.content.is_none()
    }

    /// The next guest's are others, but for those that go back.
    pub(super) fn forget_sections(&mut self) {
        for at in 0..self.sections.len() {
            if !self.goes_back(&self.of.data.sections[at]) {
                self.sections[at] = None;
            }
        }
    }

    /// All of the next guest's are others.
    pub(super) fn give_up_sections(&mut self) {
        self.sections.fill(None);
    }

    /// The sections that are there for the next guest.
    pub(super) fn kept_sections(&self) -> impl Iterator<Item = &Section<Backing>> {
        self.sections.iter().flatten()
    }

    /// Has those that are there be what they were when they were made. Nobody uses them any more.
    ///
    /// # Errors
    /// One cannot; they are to be given up.
    pub(super) fn reset_sections(&self) -> Result<(), ResetSectionError> {
        for section in self.kept_sections() {
            let flushes = self.memory.manager.reset_section(section)?;
            flushes
                .into_iter()
                .for_each(|flush| self.memory.submit(flush));
        }
        Ok(())
    }

    /// Whether forks of the image's spaces are the same as spaces loaded anew: all they share with one another is
    /// theirs to share, files of the host (`is_hosts`), and a fork loses no mapping.
    pub fn can_be_forked(&self, is_hosts: impl Fn(ContentRef) -> bool) -> bool {
        let hosts = |section: u32| {
            let section = self.of.data.sections.get(section as usize);
            section.and_then(|s| s.content).is_some_and(&is_hosts)
        };
        let alike = |vad: &VadData| {
            let lost = VadFlags::DONT_FORK.bits();
            let shares = match vad.kind {
                KindData::Anonymous => true,
                KindData::Private { section, .. } | KindData::Shared { section, .. } => {
                    hosts(section)
                }
            };
            shares && vad.flags & lost == 0
        };
        self.of.data.spaces.iter().all(|s| s.vads.iter().all(alike))
    }

    fn load_space(
        &mut self,
        at: SpaceRef,
        contents: &dyn LoadContents,
    ) -> Result<Arc<Space<VmmPlatform>>, MemoryError> {
        let of = Arc::clone(&self.of);
        let data = of.data.spaces.get(at.0 as usize);
        let data = data.ok_or(LoadError::Nonsense("address spaces"))?;
        let memory = Arc::clone(&self.memory);
        let manager = &memory.manager;
        let space = manager.create_space().map_err(LoadError::Space)?;
        let filled = self.fill_space(&space, data, contents);
        if let Err(error) = filled {
            memory.delete_space(&space);
            return Err(error);
        }
        manager.set_working_set(&space, data.limits.0, data.limits.1);
        let mut made = self.loaded.made.lock();
        made.spaces.push((at, Arc::clone(&space)));
        // What is mapped and not read comes a table at a time, when it is wanted.
        if !self.image.is_frozen() {
            made.sets.push(WorkingSet {
                space: Arc::clone(&space),
                pages: data.working_set.clone(),
            });
        }
        drop(made);
        Ok(space)
    }

    fn fill_space(
        &mut self,
        space: &Space<VmmPlatform>,
        data: &SpaceData,
        contents: &dyn LoadContents,
    ) -> Result<(), MemoryError> {
        for vad in &data.vads {
            self.map(space, vad, contents)?;
        }
        for run in &data.pages.0 {
            self.attach(space, run)?;
        }
        Ok(())
    }

    /// Maps the mappings of a space that begin in these ranges, and what lies under them; nothing is mapped there.
    pub(super) fn map_again(
        &mut self,
        space: &Space<VmmPlatform>,
        (at, ranges): (SpaceRef, &[VpnRange]),
        contents: &dyn LoadContents,
    ) -> Result<(), MemoryError> {
        let of = Arc::clone(&self.of);
        let data = of.data.spaces.get(at.0 as usize);
        let data = data.ok_or(LoadError::Nonsense("address spaces"))?;
        for range in ranges {
            let (start, end) = (range.start().get(), range.end());
            let first = data.vads.partition_point(|vad| vad.start < start);
            for vad in data.vads[first..].iter().take_while(|vad| vad.start < end) {
                self.map(space, vad, contents)?;
            }
            let first = data.pages.0.partition_point(|run| run.end() <= start);
            let runs = data.pages.0[first..].iter();
            for part in runs.map_while(|run| run.part(start..end)) {
                self.attach(space, &part)?;
            }
        }
        Ok(())
    }

    fn map(
        &mut self,
        space: &Space<VmmPlatform>,
        vad: &VadData,
        contents: &dyn LoadContents,
    ) -> Result<(), MemoryError> {
        let mut view = |section: u32, offset, sharing| -> Result<_, MemoryError> {
            let section = self.load_section(SectionRef(section), contents)?;
            Ok(MapKind::View {
                section,
                offset,
                sharing,
            })
        };
        let kind = match vad.kind {
            KindData::Anonymous => MapKind::Anonymous,
            KindData::Private { section, offset } => view(section, offset, Sharing::Private)?,
            KindData::Shared { section, offset } => view(section, offset, Sharing::Shared)?,
        };
        let nonsense = LoadError::Nonsense("mappings");
        let start = Vpn::new(vad.start).ok_or(nonsense)?;
        let nonsense = LoadError::Nonsense("mappings");
        let prot = Prot::from_bits(vad.prot).ok_or(nonsense)?;
        let nonsense = LoadError::Nonsense("mappings");
        let flags = VadFlags::from_bits(vad.flags).ok_or(nonsense)?;
        let mapped = self.memory.manager.map(
            space,
            MapRequest {
                placement: Placement::FixedNoReplace(start),
                count: vad.count,
                prot,
                kind,
                flags,
                tag: VadTag(vad.tag),
            },
        );
        self.memory.submit(mapped.map_err(LoadError::Map)?.flush);
        Ok(())
    }

    fn attach(&self, space: &Space<VmmPlatform>, run: &Run) -> Result<(), LoadError> {
        let (range, first) = self.checked(run)?;
        let manager = &self.memory.manager;
        Ok(manager.attach_image(space, range, &self.image, first)?)
    }

    /// A run whose pages the snapshot has, and guests may have.
    pub(super) fn checked(&self, run: &Run) -> Result<(VpnRange, SectionPage), LoadError> {
        let there = run
            .stored_end()
            .is_some_and(|end| end <= self.of.snapshot.pages());
        let found = range(run.start, run.count).zip(SectionPage::new(run.stored));
        found.filter(|_| there).ok_or(LoadError::Nonsense("pages"))
    }

    fn load_section(
        &mut self,
        at: SectionRef,
        contents: &dyn LoadContents,
    ) -> Result<Section<Backing>, MemoryError> {
        let nonsense = || LoadError::Nonsense("sections");
        let known = self.sections.get(at.0 as usize).ok_or_else(nonsense)?;
        if let Some(section) = known {
            return Ok(section.clone());
        }
        let of = Arc::clone(&self.of);
        let data = of.data.sections[at.0 as usize].clone();
        let section = match data.content {
            Some(_) => self.open_section(&data, contents)?,
            None => self.make_section(&data, of.extents.sections.get(at.0 as usize))?,
        };
        self.sections[at.0 as usize] = Some(section.clone());
        Ok(section)
    }

    /// A section over a file.
    fn open_section(
        &mut self,
        data: &SectionData,
        contents: &dyn LoadContents,
    ) -> Result<Section<Backing>, MemoryError> {
        let (memory, files) = (Arc::clone(&self.memory), &mut self.contents);
        let mut open = |content, intent| -> Result<_, MemoryError> {
            let backing = contents.content(content)?;
            let opened = memory.sections.open(&memory, &backing, intent);
            // A file in memory is one guest's.
            if backing.0.storage().is_none() {
                files.insert(content, backing);
            }
            Ok(opened.map_err(LoadError::File)?)
        };
        let mut section = None;
        for (content, intent) in [(data.content, Intent::Read), (data.writer, Intent::Write)] {
            if let Some(content) = content {
                section = Some(open(content, intent)?);
            }
        }
        Ok(section.ok_or(LoadError::Nonsense("sections"))?)
    }
}

impl LoadMemory for ImageLoader {
    fn space(
        &mut self,
        at: SpaceRef,
        contents: &dyn LoadContents,
    ) -> Result<Arc<Space<VmmPlatform>>, MemoryError> {
        self.load_space(at, contents)
    }

    fn bytes(&mut self, at: BytesRef, into: &dyn LoadBytes) -> Result<u64, MemoryError> {
        self.load_bytes(at, into)
    }
}
