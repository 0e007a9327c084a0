//! Writing the memory image of a guest.
//!
//! While the guest stands still, only what cannot be had later is copied, and that is mostly nothing. The private pages of its
//! spaces are *kept* ([`Memory::keep`]), and so is what its processes share and what is in files in memory
//! ([`ImageWriter::keep_shared`]); all of it is written by [`ImageWriter::finish`], which is called once the guest goes on
//! ([`super::pages`], [`super::sections`]). A space that cannot be kept (there is no room for the promises, or spaces do not
//! share tables) has its pages copied at once, and so has what it shares.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;

use shadow_mm::{
    Charge, FrameStore, KeptSection, MapKind, PageKey, Pfn, PfnRange, Section, SectionId,
    SectionPage, Sharing, VadInfo, Vpn, VpnRange,
};

use super::rebase::Copied;
use super::{
    BytesData, ImageData, KindData, Run, Runs, SectionData, SectionRef, SpaceData, VadData,
};
use crate::memory::{Backing, FRAME, Kept, Memory, Space, Unread, VmmPlatform};
use crate::snapshot::format::{SnapshotId, StoredPage};
use crate::snapshot::records::{
    BytesRef, ContentRef, MemoryError, SaveContents, SaveMemory, SpaceRef, SparseBytes,
};
use crate::snapshot::write::{Base, WriteError, Writer};

/// Why an image could not be written.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// The snapshot's file.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// The page file, or the snapshot that the guest itself came from.
    #[error("a page of the guest's memory cannot be read")]
    Read(#[source] io::Error),
    /// A page is on its way into memory, and does not arrive.
    #[error("page {0} of the guest's memory does not come back")]
    Stuck(Vpn),
    /// The same of a page that processes share, or of a file in memory.
    #[error("page {0:?} of the guest's shared memory does not come back")]
    SharedStuck(SectionPage),
    /// Shared memory is in the page file, and there is no room to bring it back.
    #[error("the guest's shared memory finds no room to be read")]
    NoMemory,
    /// The encoding refused.
    #[error("the memory cannot be encoded")]
    Encode(#[source] postcard::Error),
    /// More of something than a snapshot can have.
    #[error("more than 4294967295 {0}")]
    TooMany(&'static str),
}

/// An image that was written.
#[derive(Debug)]
pub struct Saved<'a> {
    /// What has the pages; the parts are still to be added.
    pub writer: Writer,
    /// The part that says where they are.
    pub spaces: Vec<u8>,
    /// What was copied to it, if it is a template.
    pub copied: Option<Copied<'a>>,
}

/// A space whose pages are written when the guest goes on.
#[derive(Debug)]
pub(super) struct Later<'a> {
    pub(super) at: SpaceRef,
    /// What goes on.
    pub(super) of: Arc<Space<VmmPlatform>>,
    pub(super) kept: Kept<'a>,
    /// Its private mappings.
    pub(super) private: Vec<VadInfo<Backing>>,
}

/// What has pages that are not a space's.
#[derive(Clone, Copy, Debug)]
pub(super) enum Whose {
    Section(SectionRef),
    Bytes(BytesRef),
}

/// Where a page is that a section has.
pub(super) type SectionKey = (SectionId, SectionPage);

/// Writes an image.
pub struct ImageWriter<'a> {
    pub(super) memory: &'a Memory,
    writer: Writer,
    /// The snapshot that the new one builds on.
    pub(super) base: Option<SnapshotId>,
    pub(super) data: ImageData,
    pub(super) written: HashMap<PageKey, StoredPage>,
    pub(super) copied: HashMap<SectionKey, StoredPage>,
    sections: HashMap<SectionId, SectionRef>,
    /// Spaces whose pages are still to be written.
    later: Vec<Later<'a>>,
    /// What is shared and not kept yet.
    pub(super) shared: Vec<(Whose, Section<Backing>)>,
    /// What is shared, whose pages are still to be written.
    pub(super) kept: Vec<(Whose, KeptSection<Backing>)>,
    /// Pages of a layer that the guest came from: they are as they are.
    frozen: Vec<(Whose, Vec<(u64, PfnRange)>)>,
    /// Pages of a snapshot that it came from, which nobody has read.
    pub(super) unread: Vec<(Whose, Unread)>,
    /// Told of the pages written.
    progress: &'a mut dyn FnMut(u64),
}

fn number(count: usize, what: &'static str) -> Result<u32, SaveError> {
    u32::try_from(count).map_err(|_| SaveError::TooMany(what))
}

pub(super) fn whole(range: VpnRange, from: Vpn) -> Option<VpnRange> {
    VpnRange::between(from, range.end())
}

impl<'a> ImageWriter<'a> {
    /// Begins an image in `writer`, which builds on `base` if it builds on any.
    pub fn new(
        memory: &'a Memory,
        writer: Writer,
        base: Option<Base>,
        progress: &'a mut dyn FnMut(u64),
    ) -> Self {
        Self {
            memory,
            writer,
            base: base.map(|base| base.id),
            data: ImageData::default(),
            written: HashMap::new(),
            copied: HashMap::new(),
            sections: HashMap::new(),
            later: Vec::new(),
            shared: Vec::new(),
            kept: Vec::new(),
            frozen: Vec::new(),
            unread: Vec::new(),
            progress,
        }
    }

    /// Pages written so far.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.writer.pages()
    }

    /// Whether it is written for clones on this host, and not to a disk.
    pub(super) fn is_template(&self) -> bool {
        self.writer.is_in_memory()
    }

    /// Writes what was kept, and ends the image. The guest may go on before.
    ///
    /// # Errors
    /// As saving a space; it cannot be encoded.
    pub fn finish(mut self) -> Result<Saved<'a>, SaveError> {
        self.keep_shared()?;
        self.save_kept_sections()?;
        // Of pages that were looked at while the guest stood still, keys mean nothing any more.
        self.written.clear();
        // All of them stay until the last one is written: as long is a key of one a key of all.
        let later = std::mem::take(&mut self.later);
        for kept in &later {
            self.save_kept(kept)?;
        }
        let later = self.is_template().then_some(later);
        self.save_frozen()?;
        self.save_unread()?;
        let spaces = postcard::to_stdvec(&self.data).map_err(SaveError::Encode)?;
        Ok(Saved {
            writer: self.writer,
            spaces,
            copied: later.map(|later| Copied::new(self.memory, later, self.data)),
        })
    }

    pub(super) fn add_page(&mut self, bytes: &[u8; FRAME]) -> Result<StoredPage, SaveError> {
        (self.progress)(1);
        Ok(self.writer.add_page(bytes)?)
    }

    fn save_space(
        &mut self,
        space: &Arc<Space<VmmPlatform>>,
        contents: &mut dyn SaveContents,
    ) -> Result<SpaceRef, MemoryError> {
        let at = SpaceRef(number(self.data.spaces.len(), "address spaces")?);
        let usage = self.memory.manager.usage(space);
        let kept = self.memory.keep(space).inspect_err(|error| {
            tracing::debug!(%error, "a space is copied while the guest stands still");
        });
        let mut data = SpaceData {
            limits: (usage.working_set_min, usage.working_set_max),
            ..SpaceData::default()
        };
        let mut private = Vec::new();
        let mut from = Vpn::new(0);
        while let Some(vad) = from.and_then(|from| self.memory.manager.query(space, from)) {
            from = Vpn::new(vad.range.end());
            let kind = self.kind(&vad, contents)?;
            data.vads.push(VadData {
                start: vad.range.start().get(),
                count: vad.range.count(),
                prot: vad.prot.bits(),
                flags: (vad.flags & super::kept_flags()).bits(),
                tag: vad.tag.0,
                kind,
            });
            if vad.sharing() == Sharing::Private {
                private.push(vad);
            }
        }
        match kept {
            Ok(kept) => {
                let of = Arc::clone(space);
                self.later.push(Later {
                    at,
                    of,
                    kept,
                    private,
                });
            }
            Err(_) => self.save_private(space, &private, &mut data)?,
        }
        self.data.spaces.push(data);
        Ok(at)
    }

    fn kind(
        &mut self,
        vad: &VadInfo<Backing>,
        contents: &mut dyn SaveContents,
    ) -> Result<KindData, MemoryError> {
        let MapKind::View {
            section,
            offset,
            sharing,
        } = &vad.kind
        else {
            return Ok(KindData::Anonymous);
        };
        let (section, offset) = (self.save_section(section, contents)?.0, *offset);
        Ok(match sharing {
            Sharing::Private => KindData::Private { section, offset },
            Sharing::Shared => KindData::Shared { section, offset },
        })
    }

    fn save_section(
        &mut self,
        section: &Section<Backing>,
        contents: &mut dyn SaveContents,
    ) -> Result<SectionRef, MemoryError> {
        if let Some(known) = self.sections.get(&section.id()) {
            return Ok(*known);
        }
        let at = SectionRef(number(self.data.sections.len(), "sections")?);
        self.sections.insert(section.id(), at);
        let mut data = SectionData {
            bytes: self.memory.manager.section_size(section),
            charged: self.memory.manager.section_charge(section) == Charge::Charged,
            ..SectionData::default()
        };
        match section.file() {
            Some(backing) => {
                data.content = Some(contents.content(backing)?);
                data.writer = self.writer_of(section, contents)?;
            }
            None => {
                let unread = self.memory.manager.section_unread(section);
                let unread = unread.map(|unread| (Whose::Section(at), unread));
                self.unread.extend(unread);
                self.shared.push((Whose::Section(at), section.clone()));
                let frozen = self.memory.manager.section_frozen(section);
                self.frozen.push((Whose::Section(at), frozen));
            }
        }
        self.data.sections.push(data);
        Ok(at)
    }

    fn writer_of(
        &self,
        section: &Section<Backing>,
        contents: &mut dyn SaveContents,
    ) -> Result<Option<ContentRef>, MemoryError> {
        let file = self.memory.sections.of(section);
        let writer = file.and_then(|file| file.writer());
        writer.map(|writer| contents.content(&writer)).transpose()
    }

    fn save_bytes(&mut self, bytes: &dyn SparseBytes) -> Result<BytesRef, SaveError> {
        let at = BytesRef(number(self.data.bytes.len(), "files in memory")?);
        self.data.bytes.push(BytesData {
            length: bytes.length(),
            pages: Runs::default(),
        });
        let unread = bytes.unread().map(|unread| (Whose::Bytes(at), unread));
        self.unread.extend(unread);
        self.shared
            .push((Whose::Bytes(at), bytes.section().clone()));
        self.frozen.push((Whose::Bytes(at), bytes.frozen()));
        Ok(at)
    }

    /// Writes what is a layer's.
    fn save_frozen(&mut self) -> Result<(), SaveError> {
        for (whose, frozen) in std::mem::take(&mut self.frozen) {
            let mut runs = Runs::default();
            for (first, frames) in frozen {
                for ahead in 0..frames.count {
                    let frame = Pfn::new(frames.start.get() + ahead);
                    let page = first + u64::from(ahead);
                    let mut bytes = Box::new([0; FRAME]);
                    self.memory.manager.store().read(frame, 0, &mut bytes[..]);
                    let stored = self.add_page(&bytes)?;
                    runs.push(page, stored);
                }
            }
            self.add_runs(whose, runs);
        }
        Ok(())
    }

    /// The pages that a section or a file in memory has so far.
    pub(super) fn pages_of(&mut self, whose: Whose) -> Option<&mut Runs> {
        let (sections, bytes) = (&mut self.data.sections, &mut self.data.bytes);
        let pages = match whose {
            Whose::Section(at) => sections.get_mut(at.0 as usize).map(|s| &mut s.pages),
            Whose::Bytes(at) => bytes.get_mut(at.0 as usize).map(|b| &mut b.pages),
        };
        debug_assert!(pages.is_some(), "nothing was begun for {whose:?}");
        pages
    }

    /// Adds to them.
    pub(super) fn add_runs(&mut self, whose: Whose, mut runs: Runs) {
        if let Some(pages) = self.pages_of(whose) {
            pages.0.append(&mut runs.0);
            pages.0.sort_by_key(|run| run.start);
        }
    }
}

impl SaveMemory for ImageWriter<'_> {
    fn space(
        &mut self,
        space: &Arc<Space<VmmPlatform>>,
        contents: &mut dyn SaveContents,
    ) -> Result<SpaceRef, MemoryError> {
        self.save_space(space, contents)
    }

    fn bytes(&mut self, bytes: &dyn SparseBytes) -> Result<BytesRef, MemoryError> {
        Ok(self.save_bytes(bytes)?)
    }
}

impl Run {
    /// One past its last page of the snapshot.
    pub(super) fn stored_end(&self) -> Option<u64> {
        self.stored.checked_add(self.count)
    }
}
