//! A machine with several virtual CPUs for each guest, and shoot-downs between them.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::sync::{Arc, Weak};

use shadow_mm::sim::{SimFile, SimMmu};
use shadow_mm::{
    Access, Denied, FaultOutcome, Flush, ForkMode, FrameStore, GuestVa, IoTicket, Limits, Manager,
    MapKind, MapRequest, NoFrame, PAGE_SIZE, PageIn, Pfn, PfnRange, Placement, PoolLayout,
    Progress, Prot, Space, Thaw, TrimMode, VadFlags, VadTag, Vpn, VpnRange,
};
use shuttle::sync::Mutex;

use crate::platform::{Model, ModelStore};

pub(crate) type Mm = Manager<Model>;

/// First page the guests map.
pub(crate) const BASE: u64 = 0x1_0000;
pub(crate) const RW: Prot = Prot::READ.union(Prot::WRITE);
/// Data frames of the machine.
const DATA: u32 = 48;

/// Frames of a layer.
pub(crate) const LAYER: u32 = 3;

/// Slots of the page file.
const SLOTS: u64 = 32;

/// What the page file and a written file contain: the first bytes of each page, by offset.
pub(crate) type Disk = Arc<Mutex<BTreeMap<u64, [u8; 4]>>>;

/// A machine with a small pool.
pub(crate) fn machine() -> Arc<Mm> {
    let frames = |start, count| PfnRange {
        start: Pfn::new(start),
        count,
    };
    let layout = PoolLayout {
        data: frames(16, DATA),
        tables: frames(16 + DATA, 32),
    };
    let limits = Limits {
        user_end: va(0x7f80_0000_0000),
        min_va: va(0x1_0000),
    };
    let store = ModelStore::new(frames(0, 16 + DATA + 32 + LAYER));
    let mm = Manager::new(store, layout, limits).expect("a manager");
    mm.add_page_file(SLOTS).expect("a page file");
    mm.set_fork_mode(MODE.get());
    GUESTS.take();
    Arc::new(mm)
}

/// The frames of a layer: those above the pool.
pub(crate) fn layer(mm: &Mm) -> PfnRange {
    PfnRange {
        start: Pfn::new(mm.layout().tables.end() as u32),
        count: LAYER,
    }
}

// Shuttle runs all threads of a schedule on one of the host's.
std::thread_local! {
    /// How guests are forked.
    pub(crate) static MODE: Cell<ForkMode> = const { Cell::new(ForkMode::Eager) };
    /// All guests of the schedule: a wide flush is for all of them.
    static GUESTS: RefCell<Vec<Weak<Guest>>> = const { RefCell::new(Vec::new()) };
}

fn va(address: u64) -> GuestVa {
    GuestVa::new(address).expect("a canonical address")
}

pub(crate) fn vpn(page: u64) -> Vpn {
    Vpn::new(page).expect("a page number")
}

pub(crate) fn pages(start: u64, count: u64) -> VpnRange {
    VpnRange::new(vpn(start), count).expect("a range")
}

/// What byte a page of a file is full of.
pub(crate) fn file_byte(file_page: u64) -> u8 {
    0xf0 + (file_page as u8 & 7)
}

/// A guest process that runs on two virtual CPUs.
pub(crate) struct Guest {
    pub(crate) mm: Arc<Mm>,
    pub(crate) space: Arc<Space<Model>>,
    cpus: [Mutex<SimMmu>; 2],
    page_file: Disk,
}

impl Guest {
    pub(crate) fn new(mm: &Arc<Mm>) -> Arc<Self> {
        let space = mm.create_space().expect("a space");
        Self::of(mm, space, Disk::default())
    }

    /// Another guest of the same machine.
    pub(crate) fn another(&self) -> Arc<Self> {
        let space = self.mm.create_space().expect("a space");
        Self::of(&self.mm, space, Arc::clone(&self.page_file))
    }

    fn of(mm: &Arc<Mm>, space: Arc<Space<Model>>, page_file: Disk) -> Arc<Self> {
        let cpus = [0, 1].map(|_| Mutex::new(SimMmu::new(space.root())));
        let guest = Arc::new(Self {
            mm: Arc::clone(mm),
            space,
            cpus,
            page_file,
        });
        GUESTS.with_borrow_mut(|all| all.push(Arc::downgrade(&guest)));
        guest
    }

    /// A guest with some anonymous pages.
    pub(crate) fn with_pages(mm: &Arc<Mm>, count: u64) -> Arc<Self> {
        let guest = Self::new(mm);
        guest.map(count, MapKind::Anonymous);
        guest
    }

    pub(crate) fn map(&self, count: u64, kind: MapKind<SimFile>) {
        let request = MapRequest {
            placement: Placement::Fixed(vpn(BASE)),
            count,
            prot: RW,
            kind,
            flags: VadFlags::empty(),
            tag: VadTag::default(),
        };
        let mapped = self.mm.map(&self.space, request).expect("a mapping");
        self.shoot(mapped.flush);
    }

    /// Interrupts every virtual CPU between two of its instructions, has it drop what the flush names,
    /// and acknowledges.
    pub(crate) fn shoot(&self, flush: Flush) {
        if flush.is_wide() {
            let all: Vec<_> =
                GUESTS.with_borrow(|all| all.iter().filter_map(Weak::upgrade).collect());
            all.iter().for_each(|guest| guest.drop_stale(&flush));
        } else if !flush.is_empty() {
            self.drop_stale(&flush);
        }
        self.mm.flushed(flush);
    }

    /// The same of a flush of any space.
    pub(crate) fn shoot_any(&self, flush: Flush) {
        let whose = GUESTS.with_borrow(|all| {
            let mut all = all.iter().filter_map(Weak::upgrade);
            all.find(|guest| guest.space.id() == flush.space())
        });
        match whose {
            Some(guest) => guest.shoot(flush),
            None => self.mm.flushed(flush),
        }
    }

    /// Has pages of a layer copied.
    pub(crate) fn thaw(&self, wanted: &Thaw<SimFile>) -> Result<(), NoFrame> {
        self.mm.thaw(wanted, |flushes| {
            flushes.into_iter().for_each(|flush| self.shoot_any(flush));
        })
    }

    fn drop_stale(&self, flush: &Flush) {
        for cpu in &self.cpus {
            let mut cpu = cpu.lock().expect("a virtual CPU");
            cpu.flush(flush);
            cpu.set_root(self.space.root());
        }
    }

    /// Does what a fork does for its parent's virtual CPUs, and makes the child a guest.
    pub(crate) fn fork(&self) -> Option<Arc<Self>> {
        let forked = self.mm.fork(&self.space).ok()?;
        self.shoot(forked.flush);
        Some(Self::of(
            &self.mm,
            forked.child,
            Arc::clone(&self.page_file),
        ))
    }

    /// Stores a byte on virtual CPU `cpu`.
    pub(crate) fn store(&self, cpu: usize, page: u64, at: usize, byte: u8) -> Result<(), Denied> {
        self.access(cpu, page, Access::Write, |frame| {
            self.mm.store().write(frame, at, &[byte]);
        })
    }

    /// Loads a byte on virtual CPU `cpu`.
    pub(crate) fn load(&self, cpu: usize, page: u64, at: usize) -> Result<u8, Denied> {
        let mut byte = [0];
        self.access(cpu, page, Access::Read, |frame| {
            self.mm.store().read(frame, at, &mut byte);
        })?;
        Ok(byte[0])
    }

    /// One instruction: translated and done without an interrupt in between, or a fault, and again.
    fn access(
        &self,
        cpu: usize,
        page: u64,
        access: Access,
        instruction: impl FnOnce(Pfn),
    ) -> Result<(), Denied> {
        let at = vpn(page).va();
        for _ in 0..10_000 {
            {
                let mut mmu = self.cpus[cpu].lock().expect("a virtual CPU");
                if let Ok(found) = mmu.translate(self.mm.store(), at, access) {
                    instruction(found.frame);
                    return Ok(());
                }
            }
            self.settle(self.mm.fault(&self.space, at, access))?;
            // Who enters again does so with the root there is now, and not before others have told what
            // they took away.
            while self.space.unannounced() != 0 {
                shuttle::thread::yield_now();
            }
            let mut mmu = self.cpus[cpu].lock().expect("a virtual CPU");
            mmu.set_root(self.space.root());
        }
        panic!("page {page:#x} faults for ever");
    }

    /// Does what a fault's outcome asks for.
    pub(crate) fn settle(&self, outcome: FaultOutcome<Model>) -> Result<(), Denied> {
        match outcome {
            FaultOutcome::Resolved(resolution) => {
                self.shoot(resolution.flush);
                Ok(())
            }
            FaultOutcome::Read(ticket) => {
                let length = self.fill(&ticket);
                let completed = self.mm.complete_read(ticket, Ok(length));
                self.settle(completed)
            }
            FaultOutcome::Wait(pending) => loop {
                match pending.progress() {
                    Progress::UnderWay => shuttle::thread::yield_now(),
                    Progress::Ended => return Ok(()),
                    Progress::Failed => return Err(Denied::IoError),
                }
            },
            FaultOutcome::PageIn(ticket) => {
                self.read_slots(&ticket);
                let length = ticket.length();
                let completed = self.mm.complete_page_in(ticket, Ok(length));
                self.settle(completed)
            }
            FaultOutcome::Thaw(thaw) => {
                let _ = self.thaw(&thaw);
                Ok(())
            }
            // Somebody reads it, or the flush of a fork is not done; or somebody has all frames, for a while.
            FaultOutcome::Collided | FaultOutcome::NoMemory => {
                shuttle::thread::yield_now();
                Ok(())
            }
            FaultOutcome::Denied(denied) => Err(denied),
        }
    }

    pub(crate) fn fill(&self, ticket: &IoTicket<Model>) -> usize {
        let first = ticket.offset() / PAGE_SIZE as u64;
        for (n, frame) in ticket.frames().iter().enumerate() {
            let content = [file_byte(first + n as u64); PAGE_SIZE];
            self.mm.store().write(*frame, 0, &content);
        }
        ticket.length()
    }

    pub(crate) fn read_slots(&self, ticket: &PageIn<Model>) {
        for (n, frame) in (0u64..).zip(ticket.frames()) {
            let at = ticket.offset() + n * PAGE_SIZE as u64;
            let bytes = self.page_file.lock().expect("the page file")[&at];
            self.mm.store().write(*frame, 0, &bytes);
        }
    }

    /// Copies frames to a file.
    pub(crate) fn copy_out(&self, disk: &Disk, offset: u64, frames: &[Pfn]) {
        for (n, frame) in (0u64..).zip(frames) {
            let mut bytes = [0; 4];
            self.mm.store().read(*frame, 0, &mut bytes);
            let at = offset + n * PAGE_SIZE as u64;
            disk.lock().expect("a disk").insert(at, bytes);
        }
    }

    /// Takes all pages away that can be taken.
    pub(crate) fn trim(&self) {
        let trimmed = self.mm.trim(&self.space, 1000, TrimMode::Any);
        self.shoot(trimmed.flush);
    }

    /// One write to the page file, if there is something to be written.
    pub(crate) fn write_modified(&self) {
        if let Some(ticket) = self.mm.start_write() {
            self.copy_out(&self.page_file, ticket.offset(), ticket.frames());
            let _ = self.mm.complete_write(ticket, Ok(()));
        }
    }

    /// Uses every frame for something else that can be.
    pub(crate) fn take_standby(&self) {
        let eater = self.another();
        eater.map(u64::from(DATA), MapKind::Anonymous);
        for page in BASE.. {
            let fault = self.mm.fault(&eater.space, vpn(page).va(), Access::Write);
            match fault {
                FaultOutcome::Resolved(done) => eater.shoot(done.flush),
                _ => break,
            }
        }
        eater.delete();
    }

    /// Ends the guest.
    pub(crate) fn delete(&self) {
        let flush = self.mm.delete_space(&self.space);
        self.shoot(flush);
    }
}

/// The end of a schedule: everything adds up with the guests alive, and is home once they are gone.
pub(crate) fn finish(mm: &Mm, guests: &[&Arc<Guest>]) {
    let spaces: Vec<_> = guests.iter().map(|guest| guest.space.clone()).collect();
    mm.check(&spaces).expect("with the guests alive");
    for guest in guests {
        guest.delete();
    }
    mm.check(&[]).expect("with the guests gone");
    let stats = mm.stats();
    assert_eq!(stats.data.available(), u64::from(DATA), "{stats:?}");
    assert_eq!(
        (stats.clone_headers, stats.page_file_used),
        (0, 0),
        "{stats:?}"
    );
}
