//! Flushes that wait for a virtual CPU: what each must do before it enters the guest, and when the
//! frames a flush protects may be used again.
//!
//! * Every virtual CPU that has a flush's root loaded is marked *stale*: it flushes its TLB before it
//!   runs that root again, whether or not another one has done so.
//! * Where KVM shadows, the tables a flush names must be touched by the monitor once, by whichever
//!   virtual CPU next runs that address space; the tables of a deleted space, by any.
//! * A flush is acknowledged (its frames go back) when that has happened. An address space runs on
//!   one virtual CPU at a time, so no other can still be using the old translations then.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use guest::abi;
use shadow_mm::{Flush, Pfn, SpaceId};

use crate::hv::probe::Paging;
use crate::locks::{Mutex, rank};

/// What one virtual CPU has loaded.
#[derive(Debug, Default)]
struct Tlb {
    root: AtomicU64,
    stale: AtomicBool,
}

/// Flushes that wait.
#[derive(Debug)]
pub struct Flushes {
    paging: Paging,
    cpus: Vec<Tlb>,
    /// Flushes in `queues`, to skip the lock when there are none.
    waiting: AtomicUsize,
    queues: Mutex<rank::FlushQueues, Queues>,
}

#[derive(Debug, Default)]
struct Queues {
    by_space: HashMap<SpaceId, Vec<Flush>>,
    /// Of spaces that are gone.
    dead: Vec<Flush>,
}

/// What a virtual CPU has taken on itself to do while entering.
#[derive(Debug, Default)]
pub struct FlushWork {
    flushes: Vec<Flush>,
    /// Words for the monitor to touch.
    pub touches: Vec<u64>,
    /// Whether there is anything to do.
    pub needed: bool,
}

/// Touches of dead spaces' tables one entry does besides its own: bounds the time a thread pays for
/// others.
const DEAD_PER_ENTRY: usize = 64;

impl Flushes {
    /// For `cpus` virtual CPUs on a host that pages this way.
    #[must_use]
    pub fn new(paging: Paging, cpus: usize) -> Self {
        Self {
            paging,
            cpus: std::iter::repeat_with(Tlb::default).take(cpus).collect(),
            waiting: AtomicUsize::new(0),
            queues: Mutex::default(),
        }
    }

    /// Queues a flush of a space that lives.
    pub fn submit(&self, flush: Flush) {
        self.mark_stale(flush.root());
        let mut queues = self.queues.lock();
        queues
            .by_space
            .entry(flush.space())
            .or_default()
            .push(flush);
        self.waiting.fetch_add(1, Ordering::SeqCst);
    }

    /// Queues the last flush of a space, and what still waited for it. Gives back the flushes that
    /// need nothing more: where the processor walks the tables nobody can use a dead root's
    /// translations, since whoever has it loaded flushes before it runs anything.
    #[must_use]
    pub fn submit_dead(&self, flush: Flush) -> Vec<Flush> {
        self.mark_stale(flush.root());
        let mut queues = self.queues.lock();
        let mut all = queues.by_space.remove(&flush.space()).unwrap_or_default();
        self.waiting.fetch_sub(all.len(), Ordering::SeqCst);
        all.push(flush);
        match self.paging {
            Paging::Hardware => all,
            Paging::Shadow => {
                self.waiting.fetch_add(all.len(), Ordering::SeqCst);
                queues.dead.append(&mut all);
                all
            }
        }
    }

    fn mark_stale(&self, root: Pfn) {
        for cpu in &self.cpus {
            if cpu.root.load(Ordering::SeqCst) == root.gpa() {
                cpu.stale.store(true, Ordering::SeqCst);
            }
        }
    }

    /// What virtual CPU `cpu` must do to enter `space` on `root`.
    #[must_use]
    pub fn take(&self, cpu: usize, space: SpaceId, root: Pfn) -> FlushWork {
        let stale = self.cpus[cpu].stale.swap(false, Ordering::SeqCst);
        let switched = self.cpus[cpu].root.swap(root.gpa(), Ordering::SeqCst) != root.gpa();
        let mut work = FlushWork {
            needed: stale || switched,
            ..FlushWork::default()
        };
        if self.waiting.load(Ordering::SeqCst) == 0 {
            return work;
        }
        let mut queues = self.queues.lock();
        work.flushes = queues.by_space.remove(&space).unwrap_or_default();
        work.needed |= !work.flushes.is_empty();
        if self.paging == Paging::Shadow {
            work.touches = work.flushes.iter().flat_map(touches).collect();
            // Those of dead spaces ride along when the monitor is entered anyway, or are many.
            while (work.needed || queues.dead.len() > DEAD_PER_ENTRY)
                && work.touches.len() < abi::LIST_LENGTH
            {
                let Some(flush) = queues.dead.pop() else {
                    break;
                };
                work.touches.extend(touches(&flush));
                work.flushes.push(flush);
                work.needed = true;
            }
        }
        self.waiting.fetch_sub(work.flushes.len(), Ordering::SeqCst);
        work
    }

    /// The entry happened: the flushes to acknowledge.
    #[must_use]
    pub fn done(work: FlushWork) -> Vec<Flush> {
        work.flushes
    }

    /// The entry did not happen: everything is due again.
    pub fn undo(&self, cpu: usize, space: SpaceId, work: FlushWork) {
        if work.needed {
            self.cpus[cpu].stale.store(true, Ordering::SeqCst);
        }
        if !work.flushes.is_empty() {
            self.waiting.fetch_add(work.flushes.len(), Ordering::SeqCst);
            let mut queues = self.queues.lock();
            for flush in work.flushes {
                if flush.space() == space {
                    queues.by_space.entry(space).or_default().push(flush);
                } else {
                    queues.dead.push(flush);
                }
            }
        }
    }

    /// Whether dead spaces' frames wait for a touch.
    #[must_use]
    pub fn dead_wait(&self) -> bool {
        self.waiting.load(Ordering::SeqCst) != 0 && !self.queues.lock().dead.is_empty()
    }

    /// Has the next entry of `cpu` go through the monitor, and so take dead spaces' touches along.
    pub fn hurry(&self, cpu: usize) {
        self.cpus[cpu].stale.store(true, Ordering::SeqCst);
    }

    /// Everything that waits: for the end of the machine, when no virtual CPU will run again.
    #[must_use]
    pub fn drain(&self) -> Vec<Flush> {
        let mut queues = self.queues.lock();
        let mut all: Vec<_> = queues
            .by_space
            .drain()
            .flat_map(|(_, flushes)| flushes)
            .collect();
        all.append(&mut queues.dead);
        self.waiting.store(0, Ordering::SeqCst);
        all
    }
}

/// The words to touch for a flush.
fn touches(flush: &Flush) -> impl Iterator<Item = u64> {
    let entries = flush
        .entries()
        .iter()
        .map(|e| abi::TABLES_VA + e.table.gpa() + e.index.get() as u64 * 8);
    let tables = flush
        .tables()
        .iter()
        .map(|t| abi::TABLES_VA + t.gpa() + abi::TOUCH_TABLE);
    entries.chain(tables)
}
