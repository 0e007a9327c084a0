//! What the tests have in common: a small pool, and short names.
#![allow(dead_code, reason = "no test uses all of it")]

pub(crate) mod page_file;

use std::sync::Arc;

use shadow_mm::sim::{SimFile, SimMmu, SimPlatform, SimStore};
use shadow_mm::{
    Access, FaultOutcome, Flush, FrameStore, GuestVa, Limits, Manager, MapKind, MapRequest, Pfn,
    PfnRange, Placement, PoolLayout, Prot, Section, SectionPage, Space, Thaw, VadFlags, VadTag,
    Vpn, VpnRange,
};

pub(crate) type Sim = SimPlatform<parking_lot::RawMutex>;
pub(crate) type Mm = Manager<Sim>;
pub(crate) type Guest = Arc<Space<Sim>>;

/// First page the tests map.
pub(crate) const BASE: u64 = 0x1_0000;
pub(crate) const RW: Prot = Prot::READ.union(Prot::WRITE);

/// Frames beyond the pool, for a layer.
pub(crate) const LAYER: u32 = 14;

/// Frames of each layer that spaces are copied to, and how many such layers there are, beyond that one.
pub(crate) const TEMPLATE: u32 = 48;
pub(crate) const TEMPLATES: u32 = 3;

/// The frames of one of those.
#[allow(dead_code, reason = "not all tests copy spaces")]
pub(crate) fn template(mm: &Mm, number: u32) -> PfnRange {
    PfnRange {
        start: Pfn::new(layer(mm).end() as u32 + number * TEMPLATE),
        count: TEMPLATE,
    }
}

/// The frames of a layer: those above the pool.
pub(crate) fn layer(mm: &Mm) -> PfnRange {
    let start = Pfn::new(mm.layout().tables.end() as u32);
    PfnRange {
        start,
        count: LAYER,
    }
}

/// A manager of `data` data frames and `tables` table frames.
pub(crate) fn manager(data: u32, tables: u32) -> Mm {
    let data = PfnRange {
        start: Pfn::new(16),
        count: data,
    };
    let tables = PfnRange {
        start: Pfn::new(16 + data.count),
        count: tables,
    };
    let ram = PfnRange {
        start: Pfn::new(0),
        count: 16 + data.count + tables.count + LAYER + TEMPLATES * TEMPLATE,
    };
    let limits = Limits {
        user_end: va(0x7f80_0000_0000),
        min_va: va(0x1_0000),
    };
    Manager::new(SimStore::new(ram), PoolLayout { data, tables }, limits).expect("a manager")
}

pub(crate) fn va(address: u64) -> GuestVa {
    GuestVa::new(address).expect("a canonical address")
}

pub(crate) fn vpn(number: u64) -> Vpn {
    Vpn::new(number).expect("a page number")
}

pub(crate) fn range(start: u64, count: u64) -> VpnRange {
    VpnRange::new(vpn(start), count).expect("a range")
}

pub(crate) fn request(
    start: u64,
    count: u64,
    prot: Prot,
    kind: MapKind<SimFile>,
) -> MapRequest<SimFile> {
    let (flags, tag) = (VadFlags::empty(), VadTag::default());
    MapRequest {
        placement: Placement::Fixed(vpn(start)),
        count,
        prot,
        kind,
        flags,
        tag,
    }
}

/// Maps anonymous pages and acknowledges the flush.
pub(crate) fn map_anon(mm: &Mm, space: &Guest, start: u64, count: u64, prot: Prot) {
    let mapped = mm
        .map(space, request(start, count, prot, MapKind::Anonymous))
        .expect("a mapping");
    mm.flushed(mapped.flush);
}

/// A space whose pages are the layer's, page by page; page `n` of the layer begins with the byte `n + 1`.
pub(crate) fn over_layer(mm: &Mm) -> (Guest, Section<SimFile>) {
    let frames = layer(mm);
    for page in 0..LAYER {
        let frame = Pfn::new(frames.start.get() + page);
        mm.store().write(frame, 0, &[page as u8 + 1]);
    }
    let section = mm.create_frozen_section(SimFile(1), frames);
    let section = section.expect("a section");
    let space = mm.create_space().expect("a space");
    map_anon(mm, &space, BASE, LAYER.into(), RW);
    let all = range(BASE, LAYER.into());
    let first = SectionPage::new(0).expect("a page");
    mm.attach_image(&space, all, &section, first)
        .expect("an image");
    (space, section)
}

/// A guest that reads and writes through a simulated MMU with a TLB.
pub(crate) struct Cpu {
    pub(crate) space: Guest,
    pub(crate) mmu: SimMmu,
}

impl Cpu {
    pub(crate) fn new(space: &Guest) -> Self {
        Self {
            space: Arc::clone(space),
            mmu: SimMmu::new(space.root()),
        }
    }

    /// Does what a flush asks for.
    pub(crate) fn drop_stale(&mut self, flush: &Flush) {
        self.mmu.flush(flush);
        self.mmu.set_root(self.space.root());
    }

    /// Does what a flush asks for, and acknowledges it.
    pub(crate) fn flush(&mut self, mm: &Mm, flush: Flush) {
        self.drop_stale(&flush);
        mm.flushed(flush);
    }

    /// Writes a byte at the start of a page.
    pub(crate) fn store(&mut self, mm: &Mm, page: u64, byte: u8) -> Result<(), String> {
        let at = self.touch(mm, page, Access::Write)?;
        mm.store().write(at, 0, &[byte]);
        Ok(())
    }

    /// Reads the byte at the start of a page.
    pub(crate) fn load(&mut self, mm: &Mm, page: u64) -> Result<u8, String> {
        let at = self.touch(mm, page, Access::Read)?;
        let mut byte = [0];
        mm.store().read(at, 0, &mut byte);
        Ok(byte[0])
    }

    /// Has pages copied, and drops what of them only this guest may see.
    pub(crate) fn thaw(&mut self, mm: &Mm, wanted: &Thaw<SimFile>) -> Result<(), String> {
        let flushed = |flushes: Vec<Flush>| {
            flushes.into_iter().for_each(|flush| self.flush(mm, flush));
        };
        mm.thaw(wanted, flushed).map_err(|error| error.to_string())
    }

    /// Makes an access until it succeeds; file reads bring zeroes.
    pub(crate) fn touch(&mut self, mm: &Mm, page: u64, access: Access) -> Result<Pfn, String> {
        let at = vpn(page).va();
        for _ in 0..4 {
            if let Ok(found) = self.mmu.translate(mm.store(), at, access) {
                return Ok(found.frame);
            }
            let mut outcome = mm.fault(&self.space, at, access);
            if let FaultOutcome::Read(ticket) = outcome {
                let length = ticket.length();
                ticket
                    .frames()
                    .iter()
                    .for_each(|frame| mm.store().zero(*frame));
                outcome = mm.complete_read(ticket, Ok(length));
            }
            match outcome {
                FaultOutcome::Resolved(resolution) => self.flush(mm, resolution.flush),
                FaultOutcome::Read(_) => return Err("a read after a read".into()),
                FaultOutcome::Wait(_) => return Err("a read under way".into()),
                FaultOutcome::Thaw(thaw) => self.thaw(mm, &thaw)?,
                FaultOutcome::PageIn(_) | FaultOutcome::Collided => {
                    return Err("no page was trimmed".into());
                }
                FaultOutcome::Denied(denied) => return Err(format!("{denied:?}")),
                FaultOutcome::NoMemory => return Err("NoMemory".into()),
            }
        }
        Err("still faulting".into())
    }
}
