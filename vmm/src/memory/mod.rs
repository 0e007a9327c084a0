//! Guest memory: the frame pool, the memory manager over it, and the pager that does its reads.

use std::fmt::Debug;
use std::sync::{Arc, OnceLock};

use shadow_mm::{Access, Denied, FaultOutcome, Flush, GuestVa, Manager, Pfn, Pin, PinOutcome};

pub use flushes::{Eject, Entry as FlushEntry, Flushes, ShootdownStats, WakeIdle};
pub use guard::{GuardCounters, GuardReport};
pub use page_file::{PageFile, PageFileError};
pub use paging::Fault;
pub use pool::{FRAME, Pool, PoolError};
pub use reclaim::Room;
pub use shadow_mm::Space;

mod flushes;
mod guard;
mod page_file;
mod pager;
mod paging;
#[cfg(test)]
mod paging_tests;
mod pool;
mod reclaim;

/// What the memory manager is instantiated with.
#[derive(Debug)]
pub struct VmmPlatform;

impl shadow_mm::Platform for VmmPlatform {
    type Store = Pool;
    type Lock = crate::locks::MemoryLocks;
    type Backing = Backing;
}

/// Content behind a private file mapping.
pub trait Content: Debug + Send + Sync {
    /// Reads at `offset`; fewer bytes than asked only at the end of the file.
    ///
    /// # Errors
    /// The host's.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> std::io::Result<usize>;

    /// Device and inode, as `/proc/PID/maps` shows them.
    fn identity(&self) -> (u64, u64);

    /// Guest path, for `/proc/PID/maps`.
    fn path(&self) -> Vec<u8>;
}

/// Handle of a mapped file, held by the ranges that map it. Two handles are equal if they are the
/// same open file, so that neighbouring ranges of it can be one.
#[derive(Clone, Debug)]
pub struct Backing(pub Arc<dyn Content>);

impl PartialEq for Backing {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for Backing {}

/// Why guest memory could not be accessed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AccessError {
    /// The guest may not.
    Denied(Denied),
    /// No frame is left.
    NoMemory,
}

/// The memory manager with its pool, and the flushes that wait for a virtual CPU to do them.
pub struct Memory {
    /// The manager.
    pub manager: Manager<VmmPlatform>,
    /// Flushes that wait for a virtual CPU.
    pub flushes: Flushes,
    page_file: OnceLock<PageFile>,
    /// Ends of reads of the page file, for those who want the same pages.
    reads: paging::Event,
    reclaim: reclaim::Reclaim,
    /// Set if guests' anonymous mappings are guarded.
    pub guard: OnceLock<GuardCounters>,
}

impl Debug for Memory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Memory")
            .field("flushes", &self.flushes)
            .finish_non_exhaustive()
    }
}

impl Memory {
    /// Wraps a manager.
    #[must_use]
    pub fn new(manager: Manager<VmmPlatform>, flushes: Flushes) -> Self {
        Self {
            manager,
            flushes,
            guard: OnceLock::new(),
            page_file: OnceLock::new(),
            reads: paging::Event::default(),
            reclaim: reclaim::Reclaim::default(),
        }
    }

    /// Gives it a file for pages that find no room; once, before anything runs.
    ///
    /// # Errors
    /// The manager has no memory to keep account of so many pages.
    pub fn add_page_file(&self, file: PageFile) -> Result<(), shadow_mm::LayoutError> {
        self.manager.add_page_file(file.pages())?;
        let first = self.page_file.set(file).is_ok();
        debug_assert!(first, "there is a page file already");
        Ok(())
    }

    /// Runs `f` on the frame behind one page, pinned for the time. Breaks copy-on-write for
    /// writing, reads files, sets accessed and dirty.
    ///
    /// # Errors
    /// The guest may not, or no frame is left.
    pub fn with_page<R>(
        &self,
        space: &Arc<Space<VmmPlatform>>,
        va: GuestVa,
        access: Access,
        f: impl FnOnce(&Pool, Pfn) -> R,
    ) -> Result<R, AccessError> {
        let pin = self.pin(space, va, access)?;
        let result = f(self.manager.store(), pin.pfn());
        self.manager.unpin(pin);
        Ok(result)
    }

    fn pin(
        &self,
        space: &Arc<Space<VmmPlatform>>,
        va: GuestVa,
        access: Access,
    ) -> Result<Pin, AccessError> {
        loop {
            let seen = self.reads.seen();
            match self.manager.pin(space, va.vpn(), access) {
                PinOutcome::Pinned(pin, flush) => {
                    self.submit(flush);
                    return Ok(pin);
                }
                PinOutcome::Read(ticket) => self.fill(ticket),
                PinOutcome::PageIn(ticket) => match self.page_in(ticket) {
                    FaultOutcome::Resolved(resolution) => self.submit(resolution.flush),
                    FaultOutcome::Denied(denied) => return Err(AccessError::Denied(denied)),
                    _ => {}
                },
                PinOutcome::Collided => self.reads.wait(seen),
                PinOutcome::Denied(denied) => return Err(AccessError::Denied(denied)),
                PinOutcome::NoMemory if self.make_room() => {}
                PinOutcome::NoMemory => return Err(AccessError::NoMemory),
            }
        }
    }

    /// Has a flush done, of any space, running or not. Does not wait: locks may be held.
    pub fn submit(&self, flush: Flush) {
        if flush.is_empty() {
            self.manager.flushed(flush);
        } else {
            self.submit_any(flush);
        }
    }

    fn submit_any(&self, flush: Flush) {
        if let Some(done) = self.flushes.submit(flush) {
            self.manager.flushed(done);
        }
    }

    /// Waits until no virtual CPU runs `space` with translations that were taken away before this call.
    /// No lock may be held.
    pub fn quiesce(&self, space: &Space<VmmPlatform>) {
        self.flushes.quiesce(space);
    }

    /// Has the flushes that wait finished soon, so that their frames come back, and waits for it. False if
    /// none waited. No lock may be held, and the caller is no worker: on some hosts it takes one.
    pub fn finish_flushes(&self) -> bool {
        let any = self.flushes.pending();
        if any {
            self.flushes.hurry();
            self.flushes.settle();
        }
        any
    }

    /// Tears an address space down: nothing runs in it any more, or ever will.
    pub fn delete_space(&self, space: &Arc<Space<VmmPlatform>>) {
        // Even one without translations: a virtual CPU may have the root loaded.
        self.submit_any(self.manager.delete_space(space));
    }

    /// Acknowledges flushes.
    pub fn acknowledge(&self, flushes: Vec<Flush>) {
        for flush in flushes {
            self.manager.flushed(flush);
        }
    }

    /// Performs one read of the memory manager: the file's bytes into its frames.
    pub fn fill(&self, ticket: shadow_mm::IoTicket<VmmPlatform>) {
        pager::fill(self, ticket);
    }

    /// Takes what is left of an outcome whose only point was its side effects.
    fn settle(&self, outcome: shadow_mm::FaultOutcome<VmmPlatform>) {
        if let shadow_mm::FaultOutcome::Resolved(resolution) = outcome {
            self.submit(resolution.flush);
        }
    }
}
