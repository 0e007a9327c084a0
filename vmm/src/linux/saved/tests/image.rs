//! A memory image that is kept in memory.

use std::collections::BTreeMap;
use std::sync::Arc;

use shadow_mm::{
    Access, FrameStore, MapKind, MapRequest, Placement, Prot, Section, SectionId, SectionPage,
    SectionStore, Sharing, VadFlags, VadTag, Vpn, VpnRange,
};

use crate::memory::{Backing, Intent, Memory, Space, VmmPlatform};
use crate::snapshot::records::{
    BytesRef, ContentRef, LoadBytes, LoadContents, LoadMemory, MemoryError, PAGE_BYTES, Page,
    SaveContents, SaveMemory, SpaceRef, SparseBytes,
};

/// What was kept.
pub(crate) struct Image {
    memory: Arc<Memory>,
    spaces: Vec<Vec<Range>>,
    bytes: Vec<(u64, BTreeMap<u64, Page>)>,
    /// Sections without a content, by what they were known by.
    sections: BTreeMap<SectionId, Section<Backing>>,
}

struct Range {
    pages: VpnRange,
    prot: Prot,
    kind: Kind,
    flags: VadFlags,
    tag: VadTag,
    held: Vec<(Vpn, Page)>,
}

#[derive(Clone, Copy)]
enum Kind {
    Anonymous,
    Content(ContentRef, u64, Sharing),
    Section(SectionId, u64, Sharing),
}

impl Image {
    pub(crate) fn new(memory: &Arc<Memory>) -> Self {
        Self {
            memory: Arc::clone(memory),
            spaces: Vec::new(),
            bytes: Vec::new(),
            sections: BTreeMap::new(),
        }
    }

    /// To be loaded into another memory from now on.
    pub(crate) fn load_into(&mut self, memory: &Arc<Memory>) {
        self.memory = Arc::clone(memory);
        self.sections.clear();
    }

    fn section(&mut self, id: SectionId) -> Section<Backing> {
        let memory = &self.memory;
        let made = || memory.manager.create_section(None, 1 << 20).unwrap();
        self.sections.entry(id).or_insert_with(made).clone()
    }

    /// Has a page of a file in memory.
    fn store(&self, section: &Section<Backing>, number: u64, bytes: &Page) {
        let (manager, page) = (&self.memory.manager, SectionPage::new(number).unwrap());
        let end = (number + 1) * PAGE_BYTES as u64;
        if manager.section_size(section) < end {
            assert!(manager.resize_section(section, end).unwrap().is_empty());
        }
        for _ in 0..8 {
            if let SectionStore::There(pin) = manager.section_page_to_store(section, page) {
                manager.store().write(pin.pfn(), 0, bytes);
                manager.unpin_stored(pin);
                return;
            }
        }
        panic!("page {number} of a file is not there");
    }

    fn put(&self, space: &Arc<Space<VmmPlatform>>, range: &Range) {
        let protected = self
            .memory
            .manager
            .protect(space, range.pages, Prot::READ | Prot::WRITE);
        self.memory.submit(protected.flush);
        for (page, bytes) in &range.held {
            let put = |store: &crate::memory::Pool, pfn| store.write(pfn, 0, bytes);
            self.memory
                .with_page(space, page.va(), Access::Write, put)
                .unwrap();
        }
        let protected = self.memory.manager.protect(space, range.pages, range.prot);
        self.memory.submit(protected.flush);
    }
}

impl SaveMemory for Image {
    fn space(
        &mut self,
        space: &Arc<Space<VmmPlatform>>,
        contents: &mut dyn SaveContents,
    ) -> Result<SpaceRef, MemoryError> {
        let mut ranges = Vec::new();
        let mut from = Vpn::new(0);
        while let Some(vad) = from.and_then(|at| self.memory.manager.query(space, at)) {
            from = Vpn::new(vad.range.end());
            let kind = match (&vad.kind, vad.view()) {
                (MapKind::View { sharing, .. }, Some((section, offset))) => match section.file() {
                    Some(b) => Kind::Content(contents.content(b)?, offset, *sharing),
                    None => Kind::Section(section.id(), offset, *sharing),
                },
                _ => Kind::Anonymous,
            };
            let rereads = matches!(kind, Kind::Content(_, _, Sharing::Shared));
            let mut held = Vec::new();
            for n in 0..vad.range.count() {
                let page = Vpn::new(vad.range.start().get() + n).unwrap();
                let mut bytes = [0; PAGE_BYTES];
                let take = |store: &crate::memory::Pool, pfn| store.read(pfn, 0, &mut bytes);
                if !rereads
                    && self
                        .memory
                        .with_page(space, page.va(), Access::Read, take)
                        .is_ok()
                {
                    held.push((page, bytes));
                }
            }
            ranges.push(Range {
                pages: vad.range,
                prot: vad.prot,
                kind,
                flags: vad.flags,
                tag: vad.tag,
                held,
            });
        }
        self.spaces.push(ranges);
        Ok(SpaceRef(self.spaces.len() as u32 - 1))
    }

    fn bytes(&mut self, bytes: &dyn SparseBytes) -> Result<BytesRef, MemoryError> {
        let mut pages = BTreeMap::new();
        for page in bytes.pages() {
            bytes.read(page, pages.entry(page).or_insert([0; PAGE_BYTES]))?;
        }
        self.bytes.push((bytes.length(), pages));
        Ok(BytesRef(self.bytes.len() as u32 - 1))
    }
}

impl LoadMemory for Image {
    fn space(
        &mut self,
        at: SpaceRef,
        contents: &dyn LoadContents,
    ) -> Result<Arc<Space<VmmPlatform>>, MemoryError> {
        let number = at.0 as usize;
        if number >= self.spaces.len() {
            return Err("no such space".into());
        }
        let ranges = std::mem::take(&mut self.spaces[number]);
        let memory = Arc::clone(&self.memory);
        let space = memory.manager.create_space()?;
        for range in &ranges {
            let view = |section, offset, sharing| MapKind::View {
                section,
                offset,
                sharing,
            };
            let kind = match range.kind {
                Kind::Anonymous => MapKind::Anonymous,
                Kind::Section(id, offset, sharing) => view(self.section(id), offset, sharing),
                Kind::Content(at, offset, sharing) => {
                    let intent = match sharing {
                        Sharing::Shared => Intent::Write,
                        Sharing::Private => Intent::Read,
                    };
                    let backing = contents.content(at)?;
                    view(
                        memory.sections.open(&memory, &backing, intent)?,
                        offset,
                        sharing,
                    )
                }
            };
            let mapped = memory.manager.map(
                &space,
                MapRequest {
                    placement: Placement::Fixed(range.pages.start()),
                    count: range.pages.count(),
                    prot: range.prot,
                    kind,
                    flags: range.flags,
                    tag: range.tag,
                },
            )?;
            memory.submit(mapped.flush);
            self.put(&space, range);
        }
        self.spaces[number] = ranges;
        Ok(space)
    }

    fn bytes(&mut self, at: BytesRef, into: &dyn LoadBytes) -> Result<u64, MemoryError> {
        let (length, pages) = self.bytes.get(at.0 as usize).ok_or("no such bytes")?;
        for (&number, bytes) in pages {
            self.store(into.section(), number, bytes);
        }
        Ok(*length)
    }
}
