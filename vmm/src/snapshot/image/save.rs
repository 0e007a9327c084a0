//! Writing the memory image of a stopped guest.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;

use shadow_mm::{
    Charge, ImageRun, MapKind, PageKey, Section, SectionId, SectionPage, Sharing, VadInfo, Vpn,
    VpnRange,
};

use super::look::{Look, is_zero};
use super::scratch::Scratch;
use super::{
    BytesData, ImageContent, ImageData, KindData, Run, Runs, SectionData, SectionRef, SpaceData,
    VadData,
};
use crate::memory::{Backing, FRAME, Memory, Space, VmmPlatform};
use crate::snapshot::format::{SnapshotId, StoredPage};
use crate::snapshot::records::{
    BytesRef, ContentRef, MemoryError, Page, SaveContents, SaveMemory, SpaceRef, SparseBytes,
};
use crate::snapshot::write::{Base, WriteError, Writer};

/// Entries looked at in one go, with the space locked.
const AT_ONCE: usize = 512;

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
pub struct Saved {
    /// What has the pages; the parts are still to be added.
    pub writer: Writer,
    /// The part that says where they are.
    pub spaces: Vec<u8>,
}

/// Where a page is that a section has.
type SectionKey = (SectionId, SectionPage);

/// Writes an image.
pub struct ImageWriter<'a> {
    memory: &'a Memory,
    writer: Writer,
    /// The snapshot that the new one builds on.
    base: Option<SnapshotId>,
    data: ImageData,
    written: HashMap<PageKey, StoredPage>,
    copied: HashMap<SectionKey, StoredPage>,
    sections: HashMap<SectionId, SectionRef>,
    /// Told of the pages written.
    progress: &'a mut dyn FnMut(u64),
}

fn number(count: usize, what: &'static str) -> Result<u32, SaveError> {
    u32::try_from(count).map_err(|_| SaveError::TooMany(what))
}

fn whole(range: VpnRange, from: Vpn) -> Option<VpnRange> {
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
            progress,
        }
    }

    /// Ends the image.
    ///
    /// # Errors
    /// It cannot be encoded.
    pub fn finish(self) -> Result<Saved, SaveError> {
        let spaces = postcard::to_stdvec(&self.data).map_err(SaveError::Encode)?;
        let writer = self.writer;
        Ok(Saved { writer, spaces })
    }

    fn add_page(&mut self, bytes: &[u8; FRAME]) -> Result<StoredPage, SaveError> {
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
        let mut data = SpaceData {
            limits: (usage.working_set_min, usage.working_set_max),
            working_set: self.working_set(space),
            ..SpaceData::default()
        };
        let images = self.memory.manager.image_runs(space);
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
                self.save_pages(space, &vad, &images, &mut data.pages)?;
            }
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

    /// The pages of one private mapping: what has an entry, and what only the image has.
    fn save_pages(
        &mut self,
        space: &Space<VmmPlatform>,
        vad: &VadInfo<Backing>,
        images: &[ImageRun<Backing>],
        runs: &mut Runs,
    ) -> Result<(), SaveError> {
        let memory = self.memory;
        let mut at = vad.range.start();
        let mut part = Some(vad.range);
        while let Some(range) = part {
            let mut looks = Vec::new();
            let next = memory
                .manager
                .saved_pages(space, range, AT_ONCE, |vpn, page| {
                    looks.push((vpn, Look::new(memory, page)));
                });
            for (vpn, look) in looks {
                self.save_image(images, VpnRange::between(at, vpn.get()), runs)?;
                self.save_page(space, vad, (vpn, look), runs)?;
                at = Vpn::new(vpn.get() + 1).unwrap_or(vpn);
            }
            part = next.and_then(|next| whole(range, next));
        }
        self.save_image(images, whole(vad.range, at), runs)
    }

    /// One page that has an entry.
    fn save_page(
        &mut self,
        space: &Space<VmmPlatform>,
        vad: &VadInfo<Backing>,
        (vpn, look): (Vpn, Look),
        runs: &mut Runs,
    ) -> Result<(), SaveError> {
        let bytes = look.settle(self.memory, space, vpn)?;
        let zeroes = bytes.as_ref().is_none_or(|(_, bytes)| is_zero(bytes));
        if zeroes && vad.kind == MapKind::Anonymous {
            return Ok(());
        }
        let stored = match bytes {
            None => self.add_page(&[0; FRAME])?,
            Some((key, bytes)) => match self.written.get(&key) {
                Some(stored) => *stored,
                None => {
                    let stored = self.add_page(&bytes)?;
                    self.written.insert(key, stored);
                    stored
                }
            },
        };
        runs.push(vpn.get(), stored);
        Ok(())
    }

    /// Pages that are still as the snapshot has them that the guest came from.
    fn save_image(
        &mut self,
        images: &[ImageRun<Backing>],
        range: Option<VpnRange>,
        runs: &mut Runs,
    ) -> Result<(), SaveError> {
        let Some(range) = range else { return Ok(()) };
        for run in images {
            let Some(part) = run.range.intersect(range) else {
                continue;
            };
            for vpn in part.iter() {
                let ahead = vpn.get() - run.range.start().get();
                let page = SectionPage::new(run.first.get() + ahead);
                let page = page.ok_or(SaveError::TooMany("pages"))?;
                let stored = self.image_page(&run.section, page)?;
                runs.push(vpn.get(), stored);
            }
        }
        Ok(())
    }

    /// Where a page of the old snapshot is in the new one: where it was, if the new one builds on it.
    fn image_page(
        &mut self,
        section: &Section<Backing>,
        page: SectionPage,
    ) -> Result<StoredPage, SaveError> {
        let key = (section.id(), page);
        if let Some(stored) = self.copied.get(&key) {
            return Ok(*stored);
        }
        let gone = || SaveError::Read(io::ErrorKind::NotFound.into());
        let content = section.backing().ok_or_else(gone)?;
        let image = Arc::clone(&content.0).as_any();
        let image = image.downcast_ref::<ImageContent>();
        if self.base.is_some() && image.map(|image| image.snapshot().id()) == self.base {
            return Ok(StoredPage::new(page.get()));
        }
        let mut bytes = Box::new([0; FRAME]);
        let read = content.0.read_at(page.offset(), &mut bytes[..]);
        read.map_err(SaveError::Read)?;
        let stored = self.add_page(&bytes)?;
        self.copied.insert(key, stored);
        Ok(stored)
    }

    /// Pages used lately, in runs.
    fn working_set(&self, space: &Space<VmmPlatform>) -> Vec<(u64, u64)> {
        let mut set: Vec<(u64, u64)> = Vec::new();
        let end = self.memory.manager.limits().user_end.vpn().get();
        let mut part = Vpn::new(0).and_then(|zero| VpnRange::between(zero, end));
        while let Some(range) = part {
            let visit = |vpn: Vpn, page: shadow_mm::PageInfo| {
                if !page.accessed && page.age > 0 {
                    return;
                }
                match set.last_mut() {
                    Some((start, count)) if *start + *count == vpn.get() => *count += 1,
                    Some(_) | None => set.push((vpn.get(), 1)),
                }
            };
            let manager = &self.memory.manager;
            let next = manager.resident_from(space, range, AT_ONCE, visit);
            part = next.and_then(|next| whole(range, next));
        }
        set
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
            None => data.pages = self.section_pages(section)?,
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

    /// The pages of a section over nothing.
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

    fn save_bytes(&mut self, bytes: &dyn SparseBytes) -> Result<BytesRef, SaveError> {
        let at = BytesRef(number(self.data.bytes.len(), "files in memory")?);
        let mut data = BytesData {
            length: bytes.length(),
            pages: Runs::default(),
        };
        let mut page: Page = [0; FRAME];
        for n in bytes.pages() {
            bytes.read(n, &mut page).map_err(SaveError::Read)?;
            if !is_zero(&page) {
                let stored = self.add_page(&page)?;
                data.pages.push(n, stored);
            }
        }
        self.data.bytes.push(data);
        Ok(at)
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
