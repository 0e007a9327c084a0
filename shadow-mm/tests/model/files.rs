//! The sections of the model: what their files contain, and what views must show.

use std::collections::BTreeMap;
use std::sync::Arc;

use shadow_mm::sim::SimFile;
use shadow_mm::{
    Charge, FrameStore, PAGE_SIZE, Pfn, Section, SectionError, SectionPage, Sharing, WriteFailed,
};

use super::bytes::Room;
use super::common::{LAYER, Mm, layer, template};
use super::ops::{BYTES, FROZEN, SHARED, WriteEnd};
use super::verbs::agree;
use super::world::{At, Bytes, Outcome, SLOTS, World, file_byte};

/// A section of a layer that has a file's bytes.
fn frozen(mm: &Mm, file: SimFile) -> Section<SimFile> {
    let layer = layer(mm);
    for page in 0..u64::from(layer.count) {
        let frame = Pfn::new(layer.start.get() + page as u32);
        for slot in SLOTS {
            let byte = file_byte(file, page * PAGE_SIZE as u64 + slot as u64);
            mm.store().write(frame, slot, &[byte]);
        }
    }
    mm.create_frozen_section(file, layer).expect("a section")
}

/// One section.
pub(crate) struct FileModel {
    pub(crate) section: Section<SimFile>,
    /// What limits its pages, if it is a file's bytes.
    pub(crate) room: Option<Arc<Room>>,
    /// The file's number; none for the sections over zeroes.
    pub(crate) file: Option<SimFile>,
    pub(crate) size: u64,
    /// Up to here the file was made by its formula.
    formula: u64,
    /// What the file has elsewhere.
    written: BTreeMap<u64, Bytes>,
    /// What views must show, where that is not what the file has.
    shown: BTreeMap<u64, Bytes>,
}

impl FileModel {
    pub(crate) fn new(mm: &Mm, number: usize) -> Self {
        let zeroes = number == SHARED || number == BYTES;
        let file = (!zeroes).then_some(SimFile(number as u32));
        let size = if number == FROZEN {
            u64::from(LAYER) * PAGE_SIZE as u64
        } else {
            end_of(file, 12 * PAGE_SIZE as u64 + 2500)
        };
        let room = (number == BYTES).then(Arc::<Room>::default);
        let section = match &room {
            Some(room) => {
                let section = mm.create_file_section(Arc::clone(room) as _);
                let section = section.expect("a section");
                let resized = mm.resize_section(&section, size);
                assert_eq!(resized.map(|flushes| flushes.len()), Ok(0));
                section
            }
            None if number == FROZEN => frozen(mm, SimFile(number as u32)),
            None => {
                let section = mm.create_section(file, size);
                // What cannot be promised may still be had.
                let section = section.or_else(|_| mm.create_shared_memory(size, Charge::Uncharged));
                section.expect("a section")
            }
        };
        Self {
            section,
            room,
            file,
            size,
            formula: if file.is_some() { size } else { 0 },
            written: BTreeMap::new(),
            shown: BTreeMap::new(),
        }
    }

    /// The section of a layer to which these pages were copied.
    pub(crate) fn template(mm: &Mm, number: usize, pages: &[Bytes]) -> Self {
        let frames = template(mm, (number - FROZEN - 1) as u32);
        for (page, bytes) in (0..).zip(pages) {
            let frame = Pfn::new(frames.start.get() + page);
            for (slot, byte) in SLOTS.iter().zip(bytes) {
                mm.store().write(frame, *slot, &[*byte]);
            }
        }
        let file = SimFile(number as u32);
        let section = mm.create_frozen_section(file, frames);
        Self {
            section: section.expect("a section"),
            room: None,
            file: Some(file),
            size: u64::from(frames.count) * PAGE_SIZE as u64,
            formula: 0,
            written: (0..).zip(pages.iter().copied()).collect(),
            shown: BTreeMap::new(),
        }
    }

    /// Bytes of a page before the end.
    pub(crate) fn valid(&self, page: u64) -> usize {
        let left = self.size.saturating_sub(page * PAGE_SIZE as u64);
        left.min(PAGE_SIZE as u64) as usize
    }

    /// What the file has.
    pub(crate) fn on_disk(&self, page: u64) -> Bytes {
        if let Some(written) = self.written.get(&page) {
            return *written;
        }
        SLOTS.map(|slot| {
            let at = page * PAGE_SIZE as u64 + slot as u64;
            match self.file {
                Some(file) if at < self.formula => file_byte(file, at),
                Some(_) | None => 0,
            }
        })
    }

    /// What a view must show.
    pub(crate) fn bytes(&self, page: u64) -> Bytes {
        self.shown
            .get(&page)
            .copied()
            .unwrap_or_else(|| self.on_disk(page))
    }

    pub(crate) fn store(&mut self, page: u64, bytes: Bytes) {
        self.shown.insert(page, bytes);
    }

    fn resize(&mut self, size: u64) {
        let size = end_of(self.file, size);
        let grown = size >= self.size;
        self.size = size;
        if grown {
            return;
        }
        let kept = size.div_ceil(PAGE_SIZE as u64);
        self.written.split_off(&kept);
        self.shown.split_off(&kept);
        let (edge, valid) = (size / PAGE_SIZE as u64, self.valid(size / PAGE_SIZE as u64));
        let cut = |bytes: &mut Bytes| {
            for (slot, byte) in SLOTS.iter().zip(bytes) {
                if *slot >= valid {
                    *byte = 0;
                }
            }
        };
        self.written.get_mut(&edge).map(cut);
        self.shown.get_mut(&edge).map(cut);
        self.formula = self.formula.min(size);
    }
}

impl World {
    pub(crate) fn resize(&mut self, number: usize, size: u64) -> Outcome {
        let old = self.files[number].size;
        let resized = self.mm.resize_section(&self.files[number].section, size);
        let flushes = match resized {
            Ok(flushes) => flushes,
            Err(SectionError::BeingKept(_)) => {
                return agree("kept", self.keeper.keeps(number), true);
            }
            Err(_) => return agree("refused", self.files[number].file, None),
        };
        for flush in flushes {
            self.flush_space(flush);
        }
        self.files[number].resize(size);
        let size = self.files[number].size;
        if size >= old {
            return Ok(());
        }
        let kept = size.div_ceil(PAGE_SIZE as u64);
        for process in &mut self.processes {
            for model in process.pages.values_mut() {
                if model
                    .view
                    .is_some_and(|v| v.file == number && v.page >= kept)
                {
                    (model.own, model.image) = (None, None);
                }
            }
        }
        let gone: Vec<_> = self
            .processes
            .iter()
            .flat_map(|p| {
                let pages = p.pages.iter();
                let beyond = pages
                    .filter(|(_, m)| m.view.is_some_and(|v| v.file == number && v.page >= kept));
                beyond
                    .map(|(page, _)| At::Own(p.id, *page))
                    .collect::<Vec<_>>()
            })
            .collect();
        for pinned in &mut self.pins {
            let beyond =
                matches!(pinned.at, Some(At::File(file, page)) if file == number && page >= kept);
            if beyond || pinned.at.is_some_and(|at| gone.contains(&at)) {
                pinned.at = None;
            }
            if matches!(pinned.at, Some(At::File(file, _)) if file == number) {
                pinned.tainted = true;
            }
        }
        Ok(())
    }

    pub(crate) fn write_back(&mut self, number: usize, end: WriteEnd) -> Outcome {
        if self.files[number].file.is_none() {
            return Ok(());
        }
        let section = self.files[number].section.clone();
        for flush in self.mm.collect_dirty(&section) {
            self.flush_space(flush);
        }
        let mut from = 0;
        while let Some(ticket) = self.mm.write_back(&section, from..u64::MAX) {
            from = ticket.offset() + (ticket.frames().len() * PAGE_SIZE) as u64;
            let first = ticket.offset() / PAGE_SIZE as u64;
            for (ahead, frame) in ticket.frames().iter().enumerate() {
                let page = first + ahead as u64;
                let seen = self.bytes(*frame);
                let expected = self.files[number].bytes(page);
                if seen != expected {
                    return Err(format!("writes {seen:?} for page {page}, not {expected:?}"));
                }
                if matches!(end, WriteEnd::Whole) {
                    self.files[number].written.insert(page, seen);
                    self.files[number].shown.remove(&page);
                }
            }
            match end {
                WriteEnd::Whole => self.mm.complete_write_back(ticket, Ok(())),
                WriteEnd::Failed => self.mm.complete_write_back(ticket, Err(WriteFailed)),
                WriteEnd::Dropped => drop(ticket),
            }
        }
        if matches!(end, WriteEnd::Whole) && !self.files[number].shown.is_empty() {
            return Err(format!(
                "pages were not written: {:?}",
                self.files[number].shown
            ));
        }
        Ok(())
    }

    pub(crate) fn forget_clean(&mut self, number: usize) -> Outcome {
        self.mm.section_forget(&self.files[number].section);
        Ok(())
    }

    /// The old section lives on in its views, which the model forgets by unmapping them.
    pub(crate) fn new_section(&mut self, number: usize) -> Outcome {
        let viewed = |process: &super::world::Process| {
            let mut views = process.pages.values().filter_map(|m| m.view);
            views.any(|view| view.file == number)
        };
        let viewed = self.processes.iter().any(viewed) || self.keeper.shows(number);
        if viewed || !self.reads.is_empty() {
            return Ok(());
        }
        for pinned in &mut self.pins {
            if matches!(pinned.at, Some(At::File(file, _)) if file == number) {
                pinned.at = None;
            }
        }
        self.files[number] = FileModel::new(&self.mm, number);
        self.rooms.extend(self.files[number].room.clone());
        Ok(())
    }

    /// Every page a section has in memory is what its views must show.
    pub(crate) fn check_files(&self) -> Outcome {
        for file in &self.files {
            for page in 0..16 {
                let number = SectionPage::new(page).expect("a page");
                if let shadow_mm::SectionAt::Resident(pin) =
                    self.mm.section_page(&file.section, number)
                {
                    let (seen, expected) = (self.bytes(pin.pfn()), file.bytes(page));
                    self.mm.unpin(pin);
                    if seen != expected {
                        return Err(format!("page {page} is {seen:?}, not {expected:?}"));
                    }
                }
            }
        }
        Ok(())
    }
}

/// Where a section can end: over zeroes with a whole page.
fn end_of(file: Option<SimFile>, size: u64) -> u64 {
    match file {
        Some(_) => size,
        None => size.next_multiple_of(PAGE_SIZE as u64),
    }
}

/// A page of a view.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct ViewPage {
    pub(crate) file: usize,
    pub(crate) page: u64,
    pub(crate) sharing: Sharing,
}

impl ViewPage {
    pub(crate) fn is_shared(&self) -> bool {
        self.sharing == Sharing::Shared
    }
}
