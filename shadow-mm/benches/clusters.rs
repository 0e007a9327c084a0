//! How large reads of the page file and of files should be: a guest with four times the memory there is, under each size.
//! `cargo bench -p shadow-mm --bench clusters`.
//!
//! What is counted for each page that is touched: faults (exits, where a guest runs), reads, and pages read. The
//! time has the reads in it, of a real unnamed file, and the manager's own work; no exit, and no flush of a real TLB.
//! The file is in the host's cache, mostly: a slower disk would be for larger reads where pages are used together, and for smaller ones where not.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use shadow_mm::sim::{SimFile, SimMmu, SimPlatform, SimStore};
use shadow_mm::{
    Access, Clusters, FaultOutcome, Flush, GuestVa, Limits, Manager, MapKind, MapRequest,
    PAGE_SIZE, Pfn, PfnRange, Placement, PoolLayout, Prot, Sharing, Space, TrimMode, VadFlags,
    VadTag, Vpn,
};

type Sim = SimPlatform<parking_lot::RawMutex>;

/// Pages the guest has: 64 MiB.
const PAGES: u64 = 16 * 1024;
/// Frames there are for them.
const FRAMES: u64 = PAGES / 4;
/// Pages that are touched under each size.
const TOUCHES: u64 = 2 * PAGES;
const BASE: u64 = 0x1_0000;

/// In which order pages are touched.
#[derive(Clone, Copy)]
enum Order {
    Upwards,
    /// So many pages upwards, at places as good as random.
    Runs(u64),
}

impl Order {
    fn page(self, touch: u64) -> u64 {
        match self {
            Self::Upwards => touch % PAGES,
            Self::Runs(length) => {
                let run = touch / length;
                let place = (run ^ run >> 3).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
                (place % PAGES + touch % length) % PAGES
            }
        }
    }

    fn name(self) -> String {
        match self {
            Self::Upwards => "upwards".to_owned(),
            Self::Runs(1) => "single pages anywhere".to_owned(),
            Self::Runs(length) => format!("runs of {length} anywhere"),
        }
    }
}

/// Where pages come from.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Source {
    PageFile,
    File,
}

struct Guest {
    mm: Manager<Sim>,
    space: Arc<Space<Sim>>,
    cpu: SimMmu,
    disk: File,
    faults: u64,
}

fn va(page: u64) -> GuestVa {
    Vpn::new(page).expect("a page").va()
}

fn manager(clusters: Clusters) -> Manager<Sim> {
    let zone = |start: u64, count: u64| PfnRange {
        start: Pfn::new(start as u32),
        count: count as u32,
    };
    let layout = PoolLayout {
        data: zone(1, FRAMES),
        tables: zone(1 + FRAMES, 128),
    };
    let limits = Limits {
        user_end: GuestVa::new(0x7f80_0000_0000).expect("canonical"),
        min_va: va(0x10),
    };
    let store = SimStore::new(zone(0, 1 + FRAMES + 128));
    let mm = Manager::new(store, layout, limits).expect("a manager");
    mm.add_page_file(2 * PAGES).expect("a page file");
    mm.with_clusters(clusters)
}

/// A file of as many bytes as the guest has, that nobody else knows.
fn disk() -> File {
    let path = std::env::temp_dir().join(format!("vmm-bench-{}", std::process::id()));
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&path);
    let file = file.expect("a file");
    std::fs::remove_file(path).expect("its name");
    let block = vec![1; PAGE_SIZE << 8];
    for at in (0..2 * PAGES).step_by(1 << 8) {
        let written = file.write_all_at(&block, at * PAGE_SIZE as u64);
        written.expect("room");
    }
    file
}

impl Guest {
    /// A guest none of whose pages is in memory.
    fn new(source: Source, clusters: Clusters) -> Self {
        let mm = manager(clusters);
        let space = mm.create_space().expect("a space");
        let kind = match source {
            Source::PageFile => MapKind::Anonymous,
            Source::File => MapKind::View {
                section: mm
                    .create_section(Some(SimFile(1)), PAGES * PAGE_SIZE as u64)
                    .expect("a section"),
                offset: 0,
                sharing: Sharing::Shared,
            },
        };
        let request = MapRequest {
            placement: Placement::Fixed(Vpn::new(BASE).expect("a page")),
            count: PAGES,
            prot: Prot::READ | Prot::WRITE,
            kind,
            flags: VadFlags::empty(),
            tag: VadTag::default(),
        };
        mm.flushed(mm.map(&space, request).expect("a mapping").flush);
        let cpu = SimMmu::new(space.root());
        let mut guest = Self {
            mm,
            space,
            cpu,
            disk: disk(),
            faults: 0,
        };
        if source == Source::PageFile {
            (0..PAGES).for_each(|page| guest.touch(page, Access::Write));
            guest.make_room(FRAMES);
        }
        guest.faults = 0;
        guest
    }

    fn flush(&mut self, flush: Flush) {
        self.cpu.flush(&flush);
        self.mm.flushed(flush);
    }

    fn touch(&mut self, page: u64, access: Access) {
        let at = va(BASE + page);
        while self.cpu.translate(self.mm.store(), at, access).is_err() {
            self.faults += 1;
            let outcome = self.mm.fault(&self.space, at, access);
            self.settle(outcome);
            if self.mm.available() < FRAMES / 32 {
                self.make_room(FRAMES / 16);
            }
        }
    }

    fn settle(&mut self, outcome: FaultOutcome<Sim>) {
        match outcome {
            FaultOutcome::Resolved(done) => self.flush(done.flush),
            FaultOutcome::PageIn(ticket) => {
                self.read(ticket.offset(), ticket.length());
                let length = ticket.length();
                let done = self.mm.complete_page_in(ticket, Ok(length));
                self.settle(done);
            }
            FaultOutcome::Read(ticket) => {
                self.read(ticket.offset(), ticket.length());
                let length = ticket.length();
                let done = self.mm.complete_read(ticket, Ok(length));
                self.settle(done);
            }
            FaultOutcome::NoMemory => self.make_room(FRAMES / 16),
            other => panic!("{other:?}"),
        }
    }

    fn read(&self, offset: u64, length: usize) {
        let mut bytes = [0; PAGE_SIZE << 6];
        let read = self.disk.read_exact_at(&mut bytes[..length], offset);
        read.expect("what was written");
    }

    /// What the pager does: trims what was not used for long, then what was not used lately, then anything.
    fn make_room(&mut self, frames: u64) {
        for mode in [
            TrimMode::Old,
            TrimMode::Unused,
            TrimMode::Unused,
            TrimMode::Any,
        ] {
            let lacking = frames.saturating_sub(self.mm.available());
            if lacking == 0 {
                return;
            }
            let trimmed = self.mm.trim(&self.space, lacking, mode);
            self.flush(trimmed.flush);
            while let Some(ticket) = self.mm.start_write() {
                let _ = self.mm.complete_write(ticket, Ok(()));
            }
        }
    }
}

fn measure(source: Source, order: Order, pages: u8) {
    let clusters = Clusters {
        page_file: pages,
        file: pages,
        file_most: pages.max(Clusters::default().file_most),
    };
    let mut guest = Guest::new(source, clusters);
    let before = guest.mm.stats();
    let start = Instant::now();
    (0..TOUCHES).for_each(|touch| guest.touch(order.page(touch), Access::Read));
    let took: Duration = start.elapsed();
    let stats = guest.mm.stats();
    let (reads, read) = match source {
        Source::PageFile => (
            stats.page_ins - before.page_ins,
            stats.pages_paged_in - before.pages_paged_in,
        ),
        Source::File => (
            stats.reads_issued - before.reads_issued,
            stats.pages_read - before.pages_read,
        ),
    };
    let per = |n: u64| n as f64 / TOUCHES as f64;
    println!(
        "{pages:>14} {:>10.3} {:>10.3} {:>10.3} {:>10.0}",
        per(guest.faults),
        per(reads),
        per(read),
        took.as_nanos() as f64 / TOUCHES as f64
    );
}

fn main() {
    for (source, name) in [(Source::PageFile, "page file"), (Source::File, "file")] {
        for order in [Order::Upwards, Order::Runs(8), Order::Runs(1)] {
            println!(
                "\n{:<34}\n{:>14} {:>10} {:>10} {:>10} {:>10}",
                format!("{name}, {}", order.name()),
                "pages a read",
                "faults",
                "reads",
                "pages",
                "ns"
            );
            for pages in [1, 4, 8, 16, 32, 64] {
                measure(source, order, pages);
            }
        }
    }
}
