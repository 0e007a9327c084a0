//! The model: what every page of every space must contain, and what is still under way.

use std::collections::BTreeMap;

use shadow_mm::sim::SimFile;
use shadow_mm::{
    Access, CommitLimit, Denied, Flush, FrameStore, IoTicket, PageIn, Pfn, Pin, Prot,
    SupervisorRights, Vpn, WriteTicket,
};

use super::common::{Cpu, Mm, Sim, manager, va, vpn};
use super::ops::{Op, PAGES, Page, ReadEnd};

/// The bytes of a page that the model looks at.
pub(crate) const SLOTS: [usize; 3] = [0, 2048, 4095];
pub(crate) type Bytes = [u8; 3];
/// Most spaces alive at once.
const MAX_SPACES: usize = 4;
/// A supervisor page that must survive everything.
const SUPERVISOR_VA: u64 = 0x7f80_0000_0000;

/// What the page of a file contains before anybody stores to it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct FilePage {
    pub(crate) file: SimFile,
    /// Offset of the page in the file, in bytes.
    pub(crate) offset: u64,
    /// Bytes of the page that are in the file; zero: beyond the end.
    pub(crate) valid: usize,
    /// Whether the page begins before the end.
    pub(crate) backed: bool,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct PageModel {
    pub(crate) prot: Prot,
    pub(crate) file: Option<FilePage>,
    pub(crate) bytes: Bytes,
    pub(crate) dont_fork: bool,
    pub(crate) wipe: bool,
}

pub(crate) struct Process {
    pub(crate) cpu: Cpu,
    /// A second vCPU of the same space, whose TLB learns nothing from the first one's faults.
    pub(crate) other: Cpu,
    pub(crate) pages: BTreeMap<u64, PageModel>,
    /// A number for pins to refer to.
    pub(crate) id: u64,
}

pub(crate) struct Pinned {
    pub(crate) pin: Pin,
    /// The page, while it is still the one that was pinned: process and page number.
    pub(crate) at: Option<(u64, u64)>,
    /// What a read pin must go on showing.
    pub(crate) bytes: Bytes,
    pub(crate) tainted: bool,
}

/// A write under way, and what its pages contained when it began.
pub(crate) struct Writing {
    pub(crate) ticket: WriteTicket,
    pub(crate) bytes: Vec<Bytes>,
}

pub(crate) struct World {
    pub(crate) mm: Mm,
    pub(crate) processes: Vec<Process>,
    pub(crate) pins: Vec<Pinned>,
    pub(crate) reads: Vec<IoTicket<Sim>>,
    pub(crate) unacknowledged: Vec<Flush>,
    pub(crate) page_ins: Vec<PageIn<Sim>>,
    pub(crate) writes: Vec<Writing>,
    /// What the page file contains, by offset.
    pub(crate) page_file: BTreeMap<u64, Bytes>,
    next_id: u64,
    frames: (u64, u64),
}

pub(crate) type Outcome = Result<(), String>;

impl World {
    pub(crate) fn new(data: u32, tables: u32, slots: u64, limit: CommitLimit) -> Self {
        let mm = manager(data, tables);
        mm.set_commit_limit(limit);
        mm.add_page_file(slots).expect("a page file");
        mm.map_supervisor(va(SUPERVISOR_VA), 1, 1, SupervisorRights::USER)
            .expect("a monitor");
        let active = mm.stats().tables.active;
        let mut world = Self {
            mm,
            processes: Vec::new(),
            pins: Vec::new(),
            reads: Vec::new(),
            unacknowledged: Vec::new(),
            page_ins: Vec::new(),
            writes: Vec::new(),
            page_file: BTreeMap::new(),
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
        let spaces: Vec<_> = self.processes.iter().map(|p| p.cpu.space.clone()).collect();
        self.mm
            .check(&spaces)
            .map_err(|violation| format!("{violation}"))?;
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
        self.finish_transfers()?;
        self.perform(Op::Acknowledge)?;
        self.check()?;
        let stats = self.mm.stats();
        let data = (
            stats.data.available(),
            stats.data.active,
            stats.data.in_flight,
        );
        let tables = (stats.tables.active, stats.tables.in_flight);
        let clones = (stats.clone_blocks, stats.clone_headers);
        let owned = (
            stats.data.standby,
            stats.data.modified,
            stats.page_file_used + stats.commit_charged,
        );
        if data == (self.frames.0, 0, 0)
            && tables == (self.frames.1, 0)
            && clones == (0, 0)
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
    pub(crate) fn flush(&mut self, which: usize, flush: Flush) {
        self.processes[which].cpu.mmu.flush(&flush);
        self.processes[which].other.mmu.flush(&flush);
        self.unacknowledged.push(flush);
    }

    /// Pages of a process changed hands or content: pins on them are detached, or moved.
    pub(crate) fn move_pins(&mut self, id: u64, place: impl Fn(u64) -> Option<u64>) {
        for pinned in &mut self.pins {
            if let Some((owner, page)) = pinned.at.filter(|(owner, _)| *owner == id) {
                pinned.at = place(page).map(|page| (owner, page));
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
        match model.file {
            Some(file) if !file.backed => Err(Denied::BeyondEnd),
            _ => Ok(()),
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
