//! The model: what every page of every space must contain, and what is still under way.

use std::collections::BTreeMap;
use std::sync::Arc;

use shadow_mm::sim::SimFile;
use shadow_mm::{
    Access, CommitLimit, Denied, Flush, ForkMode, FrameStore, IoTicket, PageIn, Pfn, Pin, Prot,
    SupervisorRights, Vpn, WriteTicket,
};

use super::bytes::Room;
use super::common::{Cpu, Mm, Sim, manager, range, va, vpn};
use super::files::{FileModel, ViewPage};
use super::keep::Keeper;
use super::ops::{FROZEN, Op, PAGES, Page, ReadEnd};
use super::quota::Quota;

/// The bytes of a page that the model looks at.
pub(crate) const SLOTS: [usize; 3] = [0, 2048, 4095];
pub(crate) type Bytes = [u8; 3];
/// Most spaces alive at once.
const MAX_SPACES: usize = 4;
/// A supervisor page that must survive everything.
const SUPERVISOR_VA: u64 = 0x7f80_0000_0000;

#[derive(Clone, Copy, Debug)]
pub(crate) struct PageModel {
    pub(crate) prot: Prot,
    pub(crate) view: Option<ViewPage>,
    /// What lies under it: an image's section, and the page of it.
    pub(crate) image: Option<(usize, u64)>,
    /// What the space has for itself: anonymous memory, or its copy of a view's page.
    pub(crate) own: Option<Bytes>,
    pub(crate) dont_fork: bool,
    pub(crate) wipe: bool,
}

pub(crate) struct Process {
    pub(crate) cpu: Cpu,
    /// A second vCPU of the same space, whose TLB learns nothing from the first one's faults.
    pub(crate) other: Cpu,
    pub(crate) pages: BTreeMap<u64, PageModel>,
    pub(crate) quota: Quota,
    /// A number for pins to refer to.
    pub(crate) id: u64,
}

pub(crate) struct Pinned {
    pub(crate) pin: Pin,
    /// The page, while it is still the one that was pinned.
    pub(crate) at: Option<At>,
    /// What a read pin must go on showing.
    pub(crate) bytes: Bytes,
    pub(crate) tainted: bool,
}

/// Whose page a pin is on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum At {
    /// A process's own: its number and the page number.
    Own(u64, u64),
    /// A section's: its number and the page.
    File(usize, u64),
}

/// A read that was left undone, and the access it is for.
pub(crate) struct Undone {
    pub(crate) ticket: IoTicket<Sim>,
    pub(crate) at: (u64, u64),
    pub(crate) access: Access,
}

/// A write under way, and what its pages contained when it began.
pub(crate) struct Writing {
    pub(crate) ticket: WriteTicket,
    pub(crate) bytes: Vec<Bytes>,
}

pub(crate) struct World {
    pub(crate) mm: Mm,
    pub(crate) files: Vec<FileModel>,
    pub(crate) processes: Vec<Process>,
    pub(crate) pins: Vec<Pinned>,
    pub(crate) reads: Vec<Undone>,
    pub(crate) unacknowledged: Vec<Flush>,
    pub(crate) page_ins: Vec<PageIn<Sim>>,
    pub(crate) writes: Vec<Writing>,
    /// What the page file contains, by offset.
    pub(crate) page_file: BTreeMap<u64, Bytes>,
    /// All there ever were.
    pub(crate) rooms: Vec<Arc<Room>>,
    pub(crate) keeper: Keeper,
    next_id: u64,
    frames: (u64, u64),
}

pub(crate) type Outcome = Result<(), String>;

impl World {
    pub(crate) fn new(
        mode: ForkMode,
        (data, tables): (u32, u32),
        slots: u64,
        limit: CommitLimit,
    ) -> Self {
        let mm = manager(data, tables);
        mm.set_fork_mode(mode);
        mm.set_commit_limit(limit);
        mm.add_page_file(slots).expect("a page file");
        mm.map_supervisor(va(SUPERVISOR_VA), 1, 1, SupervisorRights::USER)
            .expect("a monitor");
        let active = mm.stats().tables.active;
        let files: Vec<_> = (0..=FROZEN).map(|n| FileModel::new(&mm, n)).collect();
        let rooms = files.iter().filter_map(|file| file.room.clone()).collect();
        let mut world = Self {
            mm,
            files,
            rooms,
            processes: Vec::new(),
            pins: Vec::new(),
            reads: Vec::new(),
            unacknowledged: Vec::new(),
            page_ins: Vec::new(),
            writes: Vec::new(),
            page_file: BTreeMap::new(),
            keeper: Keeper::default(),
            next_id: 0,
            frames: (u64::from(data), active),
        };
        let space = world.mm.create_space().expect("the first space");
        world.add(Cpu::new(&space), BTreeMap::new());
        world
    }

    pub(crate) fn add(&mut self, cpu: Cpu, pages: BTreeMap<u64, PageModel>) {
        self.next_id += 1;
        let other = Cpu::new(&cpu.space);
        self.processes.push(Process {
            cpu,
            other,
            pages,
            quota: Quota::default(),
            id: self.next_id,
        });
    }

    pub(crate) fn is_full(&self) -> bool {
        self.processes.len() >= MAX_SPACES
    }

    pub(crate) fn apply(&mut self, op: &Op) -> Outcome {
        self.perform(*op)?;
        self.check()
    }

    pub(crate) fn check(&mut self) -> Outcome {
        let spaces = self.processes.iter().map(|p| &p.cpu.space);
        let spaces: Vec<_> = spaces.chain(self.keeper.spaces()).cloned().collect();
        self.mm
            .check(&spaces)
            .map_err(|violation| format!("{violation}"))?;
        self.note_copies();
        self.check_files()?;
        self.check_layer()?;
        self.check_room(&self.rooms)?;
        self.check_quotas()?;
        let mm = &self.mm;
        match self.processes.first_mut() {
            Some(p) => match p
                .cpu
                .mmu
                .translate(mm.store(), va(SUPERVISOR_VA), Access::Read)
            {
                Ok(found) if found.frame == Pfn::new(1) => Ok(()),
                other => Err(format!("the supervisor page is {other:?}")),
            },
            None => Ok(()),
        }
    }

    /// Ends everything that is under way, and looks for lost frames.
    pub(crate) fn close(mut self) -> Outcome {
        self.finish_transfers()?;
        // Everything the model knows must still be there.
        for which in 0..self.processes.len() {
            let pages: Vec<u64> = self.processes[which].pages.keys().copied().collect();
            for page in pages.into_iter().filter(|page| *page < 1 << 35) {
                self.access(which, page, Access::Read, |_| {})?;
            }
        }
        while !self.processes.is_empty() {
            self.perform(Op::Exit(0))?;
            self.check()?;
        }
        while !self.pins.is_empty() {
            self.perform(Op::Unpin(0, 1))?;
        }
        self.drop_all_kept()?;
        self.finish_transfers()?;
        self.perform(Op::Acknowledge)?;
        self.check()?;
        self.files.clear();
        let stats = self.mm.stats();
        self.check_room(&self.rooms)?;
        let data = (
            stats.data.available(),
            stats.data.active,
            stats.data.in_flight,
        );
        let tables = (stats.tables.active, stats.tables.in_flight);
        let clones = (stats.clone_blocks + stats.forked_pages, stats.clone_headers);
        let sections = (stats.sections, stats.section_pages);
        let owned = (
            stats.data.standby,
            stats.data.modified,
            stats.page_file_used + stats.commit_charged,
        );
        if data == (self.frames.0, 0, 0)
            && tables == (self.frames.1, 0)
            && (clones, sections) == ((0, 0), (0, 0))
            && owned == (0, 0, 0)
        {
            Ok(())
        } else {
            Err(format!("frames were lost: {stats:?}"))
        }
    }

    /// Ends everything that is read or written.
    fn finish_transfers(&mut self) -> Outcome {
        while !self.reads.is_empty() {
            self.perform(Op::FinishRead(0, ReadEnd::Whole))?;
        }
        while !self.page_ins.is_empty() {
            self.perform(Op::FinishPageIn(0, ReadEnd::Whole))?;
            self.check()?;
        }
        while !self.writes.is_empty() {
            self.perform(Op::FinishWrite(0, true))?;
            self.check()?;
        }
        Ok(())
    }

    /// Drops a flush's translations at once, and lets its frames go only later.
    pub(crate) fn flush(&mut self, which: usize, mut flush: Flush) {
        for (n, process) in self.processes.iter_mut().enumerate() {
            if n == which || flush.is_wide() {
                process.cpu.drop_stale(&flush);
                process.other.drop_stale(&flush);
            }
        }
        drop(flush.take_fork());
        self.unacknowledged.push(flush);
    }

    /// Pages of a process changed hands or content: pins on them are detached, or moved.
    pub(crate) fn move_pins(&mut self, id: u64, place: impl Fn(u64) -> Option<u64>) {
        for pinned in &mut self.pins {
            if let Some(At::Own(owner, page)) = pinned.at
                && owner == id
            {
                pinned.at = place(page).map(|page| At::Own(owner, page));
            }
        }
    }

    /// What an access to a page must come to.
    pub(crate) fn verdict(&self, which: usize, page: u64, access: Access) -> Result<(), Denied> {
        let Some(model) = self.processes[which].pages.get(&page) else {
            return Err(Denied::NotMapped);
        };
        if !model.prot.allows(access) {
            return Err(Denied::Protection);
        }
        match model.view.filter(|_| model.image.is_none()) {
            Some(view) if self.files[view.file].valid(view.page) == 0 => Err(Denied::BeyondEnd),
            Some(_) | None => Ok(()),
        }
    }

    /// Drops a flush's translations in whichever process it is about.
    pub(crate) fn flush_space(&mut self, flush: Flush) {
        let space = flush.space();
        match self
            .processes
            .iter()
            .position(|p| p.cpu.space.id() == space)
        {
            Some(which) => self.flush(which, flush),
            // A table that a kept space shares is others' too.
            None if flush.is_wide() => self.flush(usize::MAX, flush),
            None => self.unacknowledged.push(flush),
        }
    }

    /// What a page must contain.
    pub(crate) fn content(&self, model: &PageModel) -> Bytes {
        let shown = || match (model.image, model.view) {
            (Some((image, page)), _) => Some(self.files[image].bytes(page)),
            (None, view) => view.map(|view| self.files[view.file].bytes(view.page)),
        };
        model.own.or_else(shown).unwrap_or_default()
    }

    /// A store to a private view copies neighbours too: what the space has for itself now no longer
    /// follows the section.
    pub(crate) fn note_copies(&mut self) {
        for which in 0..self.processes.len() {
            let mut own = Vec::new();
            let space = self.processes[which].cpu.space.clone();
            self.mm
                .resident_pages(&space, range(0, 1 << 35), |vpn, page| {
                    if !page.shared {
                        own.push(vpn.get());
                    }
                });
            own.into_iter().for_each(|page| self.owned(which, page));
        }
    }

    /// Whose a page is, for pins.
    pub(crate) fn holder(&self, which: usize, page: u64) -> Option<At> {
        let model = self.processes[which].pages.get(&page)?;
        Some(match (model.own, model.image, model.view) {
            (None, Some((image, page)), _) => At::File(image, page),
            (None, None, Some(view)) => At::File(view.file, view.page),
            (Some(_), _, _) | (None, None, None) => At::Own(self.processes[which].id, page),
        })
    }

    /// A page's content changed.
    pub(crate) fn put(&mut self, at: At, bytes: Bytes) {
        match at {
            At::File(file, page) => self.files[file].store(page, bytes),
            At::Own(id, page) => {
                let process = self.processes.iter_mut().find(|p| p.id == id);
                if let Some(model) = process.and_then(|p| p.pages.get_mut(&page)) {
                    model.own = Some(bytes);
                }
            }
        }
    }

    /// A store made the page its space's own, if it is a private view's.
    pub(crate) fn owned(&mut self, which: usize, page: u64) {
        let Some(model) = self.processes[which].pages.get(&page).copied() else {
            return;
        };
        let private = model.image.is_some() || model.view.is_some_and(|view| !view.is_shared());
        if private && model.own.is_none() {
            let bytes = self.content(&model);
            self.processes[which]
                .pages
                .entry(page)
                .and_modify(|m| m.own = Some(bytes));
        }
    }

    pub(crate) fn bytes(&self, frame: Pfn) -> Bytes {
        SLOTS.map(|slot| {
            let mut byte = [0];
            self.mm.store().read(frame, slot, &mut byte);
            byte[0]
        })
    }
}

/// The byte a file has somewhere; never zero.
pub(crate) fn file_byte(file: SimFile, at: u64) -> u8 {
    (at / 512 * 7 + u64::from(file.0) * 31 + at) as u8 | 1
}

/// The playground's pages.
pub(crate) fn place(page: Page) -> Vpn {
    let half = u64::from(PAGES / 2);
    let page = u64::from(page);
    if page < half {
        vpn(512 * 8 - half / 2 + page)
    } else {
        vpn((3 << 27) - half / 2 + page - half)
    }
}
