//! What the memory manager itself does for a fork and for the stores after it, beside `fork(2)` of a program of the same
//! size: no virtual machine, no exit, no flush of a TLB. What a fork costs on a host is this, and as many exits as there are
//! faults.
//!
//! The pool is plain memory, which is touched before.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use shadow_mm::sim::SimMmu;
use shadow_mm::{
    Access, CommitLimit, EntryIndex, FaultOutcome, ForkMode, FrameStore, GuestVa, Limits, Manager,
    MapKind, MapRequest, PAGE_SIZE, Pfn, PfnRange, Placement, Platform, PoolLayout, Prot,
    TABLE_ENTRIES, VadFlags, VadTag, Vpn, exchange_word,
};

const BASE: u64 = 0x1_0000;
/// One page in so many is stored to.
const APART: u64 = 100;

/// Guest RAM in plain memory.
struct Ram(Vec<AtomicU64>);

/// A machine without a machine.
struct Plain;

impl Platform for Plain {
    type Store = Ram;
    type Lock = parking_lot::RawMutex;
    type Backing = ();
}

impl Ram {
    fn new(frames: u64) -> Self {
        // Touched, so that no page fault of the host is measured.
        let words = frames * TABLE_ENTRIES as u64;
        Self((0..words).map(|_| AtomicU64::new(0)).collect())
    }

    fn frame(&self, frame: Pfn) -> &[AtomicU64] {
        let at = frame.get() as usize * TABLE_ENTRIES;
        &self.0[at..at + TABLE_ENTRIES]
    }
}

impl FrameStore for Ram {
    fn load(&self, table: Pfn, index: EntryIndex) -> u64 {
        self.frame(table)[index.get()].load(Ordering::Relaxed)
    }

    fn swap(&self, table: Pfn, index: EntryIndex, new: u64) -> u64 {
        self.frame(table)[index.get()].swap(new, Ordering::SeqCst)
    }

    fn compare_exchange(
        &self,
        table: Pfn,
        index: EntryIndex,
        current: u64,
        new: u64,
    ) -> Result<u64, u64> {
        let word = &self.frame(table)[index.get()];
        word.compare_exchange(current, new, Ordering::SeqCst, Ordering::SeqCst)
    }

    fn exchange(&self, table: Pfn, old: &[u64; TABLE_ENTRIES], new: &[u64; TABLE_ENTRIES]) {
        for (word, (old, new)) in self.frame(table).iter().zip(old.iter().zip(new)) {
            exchange_word(*old, *new, |old, new| {
                word.compare_exchange(old, new, Ordering::SeqCst, Ordering::SeqCst)
            });
        }
    }

    fn fill(&self, table: Pfn, entries: &[u64; TABLE_ENTRIES]) {
        let words = self.frame(table).iter().zip(entries);
        words.for_each(|(word, entry)| word.store(*entry, Ordering::Relaxed));
    }

    fn zero(&self, frame: Pfn) {
        self.fill(frame, &[0; TABLE_ENTRIES]);
    }

    fn copy(&self, from: Pfn, to: Pfn) {
        for (from, to) in self.frame(from).iter().zip(self.frame(to)) {
            to.store(from.load(Ordering::Relaxed), Ordering::Relaxed);
        }
    }

    fn read(&self, _frame: Pfn, _offset: usize, _into: &mut [u8]) {
        unreachable!("nothing here has bytes");
    }

    fn write(&self, _frame: Pfn, _offset: usize, _from: &[u8]) {
        unreachable!("nothing here has bytes");
    }
}

/// In what order pages are stored to.
#[derive(Clone, Copy)]
enum Order {
    /// Upwards, each as far from the last one.
    Even,
    /// The same pages, mixed.
    Mixed,
}

/// What was done.
struct Work {
    fork: Duration,
    stores: Duration,
    faults: u64,
    copied: u64,
}

fn work(mode: ForkMode, order: Order, pages: u64) -> Result<Work, String> {
    let failed = |error: &dyn std::fmt::Display| error.to_string();
    let (tables, data) = (pages / 128 + 64, pages + pages / 16);
    let ram = Ram::new(1 + data + tables);
    let zone = |start: u64, count: u64| PfnRange {
        start: Pfn::new(start as u32),
        count: count as u32,
    };
    let layout = PoolLayout {
        data: zone(1, data),
        tables: zone(1 + data, tables),
    };
    let va = |at| GuestVa::new(at).ok_or("not canonical");
    let limits = Limits {
        user_end: va(0x7f80_0000_0000)?,
        min_va: va(0x1_0000)?,
    };
    let mm = Manager::<Plain>::new(ram, layout, limits).map_err(|e| failed(&e))?;
    mm.set_commit_limit(CommitLimit::Unlimited);
    mm.set_fork_mode(mode);
    let space = mm.create_space().map_err(|e| failed(&e))?;
    let request = MapRequest {
        placement: Placement::Fixed(Vpn::new(BASE).ok_or("no page")?),
        count: pages,
        prot: Prot::READ | Prot::WRITE,
        kind: MapKind::Anonymous,
        flags: VadFlags::empty(),
        tag: VadTag::default(),
    };
    let mapped = mm.map(&space, request).map_err(|e| failed(&e))?;
    mm.flushed(mapped.flush);
    let store = |page: u64| -> Result<u64, String> {
        let at = Vpn::new(BASE + page).ok_or("no page")?.va();
        match mm.fault(&space, at, Access::Write) {
            FaultOutcome::Resolved(done) => {
                mm.flushed(done.flush);
                Ok(u64::from(done.mapped))
            }
            _ => Err(format!("a store to page {page} was not resolved")),
        }
    };
    let mut next = 0;
    while next < pages {
        next += store(next)?.max(1);
    }
    let before = (Instant::now(), mm.stats());
    let forked = mm.fork(&space).map_err(|e| failed(&e))?;
    mm.flushed(forked.flush);
    let fork = before.0.elapsed();
    let count = pages.div_ceil(APART);
    let (mut stores, mut faults) = (Duration::ZERO, 0);
    for nth in 0..count {
        let nth = match order {
            Order::Even => nth,
            // The prime is far above the counts: each once.
            Order::Mixed => nth * 1_000_003 % count,
        };
        let page = nth * APART;
        let at = Vpn::new(BASE + page).ok_or("no page")?.va();
        // The processor's look at the tables is not the manager's work.
        let mut processor = SimMmu::new(space.root());
        if processor.translate(mm.store(), at, Access::Write).is_err() {
            let start = Instant::now();
            store(page)?;
            stores += start.elapsed();
            faults += 1;
        }
    }
    Ok(Work {
        fork,
        stores,
        faults,
        copied: mm.stats().pages_copied - before.1.pages_copied,
    })
}

/// The rows of a size; `native` is how many nanoseconds a program's fork and the stores take.
fn rows(mib: u64, native: f64) -> Result<(), String> {
    let native = native / 1e3;
    println!("{mib} MiB: fork(2) and the stores: {native:.0} us");
    let kinds = [
        (ForkMode::Shared, Order::Even, "shared, at even distances"),
        (ForkMode::Shared, Order::Mixed, "shared, the same mixed"),
        (ForkMode::Eager, Order::Even, "eager, at even distances"),
    ];
    for (mode, order, name) in kinds {
        let work = work(mode, order, (mib << 20) / PAGE_SIZE as u64)?;
        let us = |time: Duration| time.as_secs_f64() * 1e6;
        let all = us(work.fork) + us(work.stores);
        println!(
            "  {name:<28} {:>10.1} {:>10.1} {:>8.2} {:>8} {:>8}",
            us(work.fork),
            us(work.stores),
            all / native,
            work.faults,
            work.copied,
        );
    }
    Ok(())
}

/// The table; `native` runs a workload of the benchmark's program, and says how many nanoseconds its line took that has this
/// in its name.
pub(crate) fn table(native: impl Fn(&[&str], &str) -> Result<f64, String>) -> Result<(), String> {
    println!("one page in {APART} stored to after a fork: the manager's own work");
    println!(
        "  {:<28} {:>10} {:>10} {:>8} {:>8} {:>8}",
        "", "fork, us", "stores, us", "ratio", "faults", "copied"
    );
    [128, 1024].into_iter().try_for_each(|mib: u64| {
        let args = ["after-write-1", "3", &mib.to_string()];
        rows(mib, native(&args, "with the fork")?)
    })
}
