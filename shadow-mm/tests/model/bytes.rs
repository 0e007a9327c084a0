//! Sections that are the bytes of a file in memory: loads and stores without a view, holes, promises.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use shadow_mm::{
    Allowance, BeingKept, FaultOutcome, FrameStore, NoSpace, SectionAt, SectionIn, SectionPage,
    SectionStore,
};

use super::common::Sim;
use super::ops::ReadEnd;
use super::verbs::agree;
use super::world::{At, Outcome, SLOTS, World};

/// Pages that files in memory may have together.
const PAGES: u64 = 11;

/// The size of a file system in memory.
#[derive(Debug, Default)]
pub(crate) struct Room(AtomicU64);

impl Room {
    pub(crate) fn used(&self) -> u64 {
        self.0.load(Ordering::SeqCst)
    }
}

impl Allowance for Room {
    fn take(&self, pages: u64) -> bool {
        let more = |used| (used + pages <= PAGES).then_some(used + pages);
        let order = Ordering::SeqCst;
        self.0.fetch_update(order, order, more).is_ok()
    }

    fn give(&self, pages: u64) {
        assert!(self.0.fetch_sub(pages, Ordering::SeqCst) >= pages);
    }
}

impl World {
    /// A store through a descriptor.
    pub(crate) fn store_bytes(
        &mut self,
        number: usize,
        page: u64,
        (slot, byte): (u8, u8),
    ) -> Outcome {
        if self.files[number].file.is_some() {
            return Ok(());
        }
        let section = self.files[number].section.clone();
        let at = SectionPage::new(page).expect("a page");
        for _ in 0..6 {
            match self.mm.section_page_to_store(&section, at) {
                SectionStore::There(pin) => {
                    let mut bytes = self.files[number].bytes(page);
                    agree("stored to", self.bytes(pin.pfn()), bytes)?;
                    let slot = usize::from(slot);
                    bytes[slot] = byte;
                    self.mm.store().write(pin.pfn(), SLOTS[slot], &[byte]);
                    self.mm.unpin_stored(pin);
                    self.put(At::File(number, page), bytes);
                    let same = |at: Option<At>| at == Some(At::File(number, page));
                    let pins = self.pins.iter_mut().filter(|p| same(p.at));
                    pins.for_each(|p| p.tainted = true);
                    return Ok(());
                }
                SectionStore::BeyondEnd => return agree("end", self.files[number].valid(page), 0),
                SectionStore::NoSpace => return Ok(()),
                SectionStore::Frozen(thaw) => {
                    if !self.thaw(&thaw) {
                        return Ok(());
                    }
                }
                SectionStore::In(how) => {
                    if !self.bring(how)? {
                        return Ok(());
                    }
                }
            }
        }
        Err("the store never ends".into())
    }

    /// A load through a descriptor.
    pub(crate) fn load_bytes(&mut self, number: usize, page: u64) -> Outcome {
        if self.files[number].file.is_some() {
            return Ok(());
        }
        let section = self.files[number].section.clone();
        let at = SectionPage::new(page).expect("a page");
        for _ in 0..6 {
            let expected = self.files[number].bytes(page);
            match self.mm.section_page(&section, at) {
                SectionAt::Absent => return agree("absent", [0; 3], expected),
                SectionAt::Resident(pin) => {
                    let seen = self.bytes(pin.pfn());
                    self.mm.unpin(pin);
                    return agree("loaded", seen, expected);
                }
                SectionAt::PagedOut => {
                    let how = self.mm.section_page_in(&section, at);
                    if !self.bring(how)? {
                        return Ok(());
                    }
                }
                SectionAt::Reading(_) => return Err("a file's page".into()),
            }
        }
        Err("the load never ends".into())
    }

    /// Whether to look again.
    fn bring(&mut self, how: SectionIn<Sim>) -> Result<bool, String> {
        match how {
            SectionIn::PageIn(ticket) => match self.fill_page_in(ticket, ReadEnd::Whole) {
                FaultOutcome::Collided => Ok(true),
                other => Err(format!("{other:?} for a page without a fault")),
            },
            SectionIn::Read(ticket) => match self.fill(ticket, ReadEnd::Whole) {
                FaultOutcome::Collided => Ok(true),
                other => Err(format!("{other:?} for a page without a fault")),
            },
            SectionIn::Collided | SectionIn::NoMemory => Ok(false),
            SectionIn::Again => Ok(true),
        }
    }

    /// A hole.
    pub(crate) fn punch(&mut self, number: usize, page: u64, count: u64) -> Outcome {
        if self.files[number].file.is_some() {
            return Ok(());
        }
        let section = self.files[number].section.clone();
        match self.mm.punch_section(&section, page..page + count) {
            Ok(flushes) => flushes.into_iter().for_each(|f| self.flush_space(f)),
            Err(BeingKept) => return agree("kept", self.keeper.keeps(number), true),
        }
        for page in page..page + count {
            self.files[number].store(page, [0; 3]);
            for n in 0..self.pins.len() {
                if self.pins[n].at != Some(At::File(number, page)) {
                    continue;
                }
                self.pins[n].tainted = true;
                let at = SectionPage::new(page).expect("a page");
                let still = match self.mm.section_page(&section, at) {
                    SectionAt::Resident(pin) => {
                        let same = pin.pfn() == self.pins[n].pin.pfn();
                        self.mm.unpin(pin);
                        same
                    }
                    SectionAt::Absent | SectionAt::PagedOut | SectionAt::Reading(_) => false,
                };
                if !still {
                    self.pins[n].at = None;
                }
            }
        }
        Ok(())
    }

    /// Promises: what is refused changes nothing.
    pub(crate) fn reserve(&mut self, number: usize, page: u64, count: u64) -> Outcome {
        if self.files[number].file.is_some() {
            return Ok(());
        }
        let section = &self.files[number].section;
        let before = self.mm.section_extent(section);
        match self.mm.reserve_section(section, page..page + count) {
            Ok(()) => Ok(()),
            Err(NoSpace) => agree("refused", self.mm.section_extent(section), before),
        }
    }

    /// What files in memory have is what was taken for them.
    pub(crate) fn check_room(&self, rooms: &[Arc<Room>]) -> Outcome {
        let used: u64 = rooms.iter().map(|room| room.used()).sum();
        let files = self.files.iter().filter(|file| file.room.is_some());
        let had: u64 = files.map(|f| self.mm.section_extent(&f.section)).sum();
        agree("room", used, had)
    }
}
