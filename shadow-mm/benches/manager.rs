//! What the manager's own work costs, without a virtual machine or a disk: faults, trims, transfers to and from a page
//! file that only counts, and what it keeps for each MiB. `cargo bench -p shadow-mm`.
//!
//! Times are of one run on a simulated pool (plain memory); no exit, no flush of a real TLB and no I/O is in them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use shadow_mm::sim::{SimPlatform, SimStore};
use shadow_mm::{
    Access, FaultOutcome, GuestVa, Limits, Manager, MapKind, MapRequest, PAGE_SIZE, Pfn, PfnRange,
    Placement, PoolLayout, Prot, Space, TrimMode, VadFlags, VadTag, Vpn,
};

type Sim = SimPlatform<parking_lot::RawMutex>;
type Mm = Manager<Sim>;
type Guest = Arc<Space<Sim>>;

/// Pages each measurement is about: 64 MiB.
const PAGES: u64 = 16 * 1024;
const BASE: u64 = 0x1_0000;

/// A manager with `data` frames for pages, and a space with `PAGES` pages.
fn machine(data: u64) -> (Mm, Guest) {
    let zone = |start: u64, count: u64| PfnRange {
        start: Pfn::new(start as u32),
        count: count as u32,
    };
    let layout = PoolLayout {
        data: zone(1, data),
        tables: zone(1 + data, 512),
    };
    let va = |at| GuestVa::new(at).expect("canonical");
    let limits = Limits {
        user_end: va(0x7f80_0000_0000),
        min_va: va(0x1_0000),
    };
    let store = SimStore::new(zone(0, 1 + data + 512));
    let mm = Mm::new(store, layout, limits).expect("a manager");
    mm.add_page_file(2 * PAGES).expect("a page file");
    let space = mm.create_space().expect("a space");
    let request = MapRequest {
        placement: Placement::Fixed(Vpn::new(BASE).expect("a page")),
        count: PAGES,
        prot: Prot::READ | Prot::WRITE,
        kind: MapKind::Anonymous,
        flags: VadFlags::empty(),
        tag: VadTag::default(),
    };
    let mapped = mm.map(&space, request).expect("a mapping");
    mm.flushed(mapped.flush);
    (mm, space)
}

/// Every page once, in an order no window follows.
fn scattered() -> impl Iterator<Item = u64> {
    (0..PAGES).map(|n| n * 6151 % PAGES)
}

fn fault(mm: &Mm, space: &Guest, page: u64, access: Access) {
    let at = Vpn::new(BASE + page).expect("a page").va();
    let mut outcome = mm.fault(space, at, access);
    if let FaultOutcome::PageIn(ticket) = outcome {
        let length = ticket.length();
        outcome = mm.complete_page_in(ticket, Ok(length));
    }
    match outcome {
        FaultOutcome::Resolved(done) => mm.flushed(done.flush),
        other => panic!("{other:?}"),
    }
}

fn timed(body: impl FnOnce()) -> Duration {
    let start = Instant::now();
    body();
    start.elapsed()
}

fn row(what: &str, took: Duration, faults: u64) {
    let per = took.as_nanos() as f64 / PAGES as f64;
    let faults = faults as f64 / PAGES as f64;
    println!("{what:<52} {per:>10.0} {faults:>10.3}");
}

fn touch_all(mm: &Mm, space: &Guest, access: Access) -> Duration {
    timed(|| scattered().for_each(|page| fault(mm, space, page, access)))
}

fn trim_all(mm: &Mm, space: &Guest) -> Duration {
    timed(|| {
        let trimmed = mm.trim(space, PAGES, TrimMode::Any);
        assert_eq!(trimmed.pages, PAGES);
        mm.flushed(trimmed.flush);
    })
}

fn write_all(mm: &Mm) -> Duration {
    timed(|| {
        while let Some(ticket) = mm.start_write() {
            let _ = mm.complete_write(ticket, Ok(()));
        }
    })
}

/// Uses every frame for something else.
fn evict_all(mm: &Mm) {
    let eater = mm.create_space().expect("a space");
    let request = MapRequest {
        placement: Placement::Fixed(Vpn::new(BASE).expect("a page")),
        count: 2 * PAGES,
        prot: Prot::READ | Prot::WRITE,
        kind: MapKind::Anonymous,
        flags: VadFlags::empty(),
        tag: VadTag::default(),
    };
    mm.flushed(mm.map(&eater, request).expect("a mapping").flush);
    for page in 0..2 * PAGES {
        if mm.available() == 0 {
            break;
        }
        fault(mm, &eater, page, Access::Write);
    }
    mm.flushed(mm.delete_space(&eater));
}

fn faults() {
    let (mm, space) = machine(2 * PAGES);
    let fresh = touch_all(&mm, &space, Access::Write);
    row("demand zero, frames never used", fresh, PAGES);
    row("trim", trim_all(&mm, &space), 0);
    let soft = touch_all(&mm, &space, Access::Read);
    row("soft fault", soft, PAGES);
    trim_all(&mm, &space);
    row("write to the page file, bookkeeping", write_all(&mm), 0);
    evict_all(&mm);
    let before = mm.stats().page_ins;
    // A page that a neighbour's read has brought costs a soft fault.
    let took = timed(|| (0..PAGES).for_each(|page| fault(&mm, &space, page, Access::Read)));
    row(
        "page in, in order, bookkeeping (reads a page)",
        took,
        mm.stats().page_ins - before,
    );
    trim_all(&mm, &space);
    write_all(&mm);
    evict_all(&mm);
    let before = mm.stats().page_ins;
    let took = touch_all(&mm, &space, Access::Read);
    row(
        "page in, scattered, bookkeeping (reads a page)",
        took,
        mm.stats().page_ins - before,
    );
    let flush = mm.delete_space(&space);
    mm.flushed(flush);
}

/// Whether free frames were zeroed before they are wanted.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Frames {
    ZeroedAhead,
    ToBeZeroed,
}

fn demand_zero(frames: Frames) {
    let (mm, space) = machine(PAGES);
    touch_all(&mm, &space, Access::Write);
    let range = shadow_mm::VpnRange::new(Vpn::new(BASE).expect("a page"), PAGES);
    let flush = mm.discard(&space, range.expect("a range")).flush;
    mm.flushed(flush);
    if frames == Frames::ZeroedAhead {
        assert_eq!(mm.zero_ahead(PAGES as usize), PAGES as usize);
    }
    let name = match frames {
        Frames::ZeroedAhead => "zeroed ahead",
        Frames::ToBeZeroed => "to be zeroed",
    };
    let took = touch_all(&mm, &space, Access::Write);
    row(&format!("demand zero, used frames {name}"), took, PAGES);
}

/// Bytes kept for each MiB of pages that are in memory.
fn overhead() {
    /// Of one frame's entry in the PFN database, and of one clone block: both are asserted at compile time.
    const ENTRY: u64 = 32;
    const BLOCK: u64 = 16;
    let (mm, space) = machine(2 * PAGES);
    touch_all(&mm, &space, Access::Write);
    let mib = (PAGES * PAGE_SIZE as u64) >> 20;
    let tables = |mm: &Mm| mm.stats().tables.active * PAGE_SIZE as u64;
    let print = |what: &str, tables: u64, blocks: u64| {
        let entries = PAGES * ENTRY;
        println!(
            "{what:<52} {:>10} {:>10} {:>10} {:>10}",
            tables / mib,
            entries / mib,
            blocks / mib,
            (tables + entries + blocks) / mib
        );
    };
    println!(
        "\n{:<52} {:>10} {:>10} {:>10} {:>10}",
        "bytes a resident MiB", "tables", "entries", "blocks", "all"
    );
    print("one space", tables(&mm), 0);
    let forked = mm.fork(&space).expect("a fork");
    mm.flushed(forked.flush);
    print(
        "parent and child, all shared",
        tables(&mm),
        mm.stats().clone_blocks * BLOCK,
    );
}

fn main() {
    println!("{:<52} {:>10} {:>10}", "64 MiB, a page", "ns", "faults");
    faults();
    demand_zero(Frames::ToBeZeroed);
    demand_zero(Frames::ZeroedAhead);
    overhead();
}
