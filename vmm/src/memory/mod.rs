//! Guest memory: the frame pool, the memory manager over it, the pager that does its reads, and the
//! sections of mapped files.

use std::fmt::Debug;
use std::sync::{Arc, OnceLock};

use shadow_mm::{
    Access, Denied, FaultOutcome, Flush, ForkError, Forked, GuestVa, Manager, NoFrame, Pending,
    Pfn, Pin, PinOutcome, Progress,
};

pub use content::{Backing, Content, FileId, Version};
pub use flushes::{Eject, Entry as FlushEntry, Flushes, ShootdownStats, Spare, WakeIdle};
pub use guard::{GuardCounters, GuardReport};
pub use keep::{Copying, Kept};
pub use layer::{Layer, is_frozen};
pub use page_file::{PageFile, PageFileError};
pub use paging::Fault;
pub use pool::{FRAME, OpenFrames, Pool, PoolError, ShowLayer};
pub use reclaim::Room;
pub use sections::{Intent, MappedFile, Sections};
pub use shadow_mm::Space;
pub use stored::{Stored, StoredError, Unread};

mod aides;
mod content;
mod flushes;
mod guard;
mod keep;
mod layer;
mod looks;
mod page_file;
mod pager;
mod paging;
#[cfg(test)]
mod paging_tests;
mod pool;
mod reclaim;
mod sections;
mod stored;
mod writeback;

/// What the memory manager is instantiated with.
#[derive(Debug)]
pub struct VmmPlatform;

impl shadow_mm::Platform for VmmPlatform {
    type Store = Pool;
    type Lock = crate::locks::MemoryLocks;
    type Backing = Backing;
}

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
    /// The files that are mapped.
    pub sections: Sections,
    bell: writeback::Bell,
    aides: aides::Aides,
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
            sections: Sections::default(),
            bell: writeback::Bell::default(),
            aides: aides::Aides::default(),
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
                PinOutcome::Read(ticket) => match self.fill(ticket) {
                    FaultOutcome::Denied(denied) => return Err(AccessError::Denied(denied)),
                    other => self.settle(other),
                },
                PinOutcome::PageIn(ticket) => match self.page_in(ticket) {
                    FaultOutcome::Denied(denied) => return Err(AccessError::Denied(denied)),
                    other => self.settle(other),
                },
                PinOutcome::Wait(pending) => self.wait(&pending).map_err(AccessError::Denied)?,
                PinOutcome::Thaw(wanted) => match self.thaw(&wanted) {
                    Ok(()) => {}
                    Err(NoFrame) if self.make_room() => {}
                    Err(NoFrame) => return Err(AccessError::NoMemory),
                },
                PinOutcome::Collided => self.reads.wait(seen),
                PinOutcome::Again(flush) => self.submit(flush),
                PinOutcome::Denied(denied) => return Err(AccessError::Denied(denied)),
                PinOutcome::NoMemory if self.make_room() => {}
                PinOutcome::NoMemory => return Err(AccessError::NoMemory),
            }
        }
    }

    /// Writes back what was stored to mapped files, so that their pages can be taken; true if that
    /// made frames available. No lock may be held.
    pub(super) fn relieve(&self) -> bool {
        let before = self.manager.available();
        if self.sections.untidy() {
            self.sections.tidy(self);
        }
        self.manager.available() > before
    }

    /// Waits until a read that somebody else does has ended.
    ///
    /// # Errors
    /// It failed.
    pub fn wait(&self, pending: &Pending) -> Result<(), Denied> {
        loop {
            let seen = self.reads.seen();
            match pending.progress() {
                Progress::UnderWay => self.reads.wait(seen),
                Progress::Ended => return Ok(()),
                Progress::Failed => return Err(Denied::IoError),
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
            self.frames_came_back(1);
        }
    }

    /// Copies an address space. When this returns, no other thread of the parent's stores to what is its child's page
    /// too, or runs on the root it had before. No lock may be held.
    ///
    /// # Errors
    /// As [`Manager::fork`].
    pub fn fork(
        &self,
        parent: &Arc<Space<VmmPlatform>>,
    ) -> Result<Arc<Space<VmmPlatform>>, ForkError> {
        let forked = match self.manager.fork(parent) {
            // What a copy was promised comes back.
            Err(
                ForkError::NoMemory { .. }
                | ForkError::NoCommit { .. }
                | ForkError::NoCloneBlocks { .. },
            ) if self.wait_for_copies() => self.manager.fork(parent),
            tried => tried,
        };
        Ok(self.forked(parent, forked?))
    }

    /// Has a fork's flush done; gives back the child.
    fn forked(
        &self,
        parent: &Space<VmmPlatform>,
        mut forked: Forked<VmmPlatform>,
    ) -> Arc<Space<VmmPlatform>> {
        let under_way = forked.flush.take_fork();
        self.submit(forked.flush);
        self.quiesce(parent);
        // Who wants to copy one of the parent's pages waits for this as for a read.
        drop(under_way);
        self.reads.notify();
        forked.child
    }

    /// Waits until no virtual CPU runs `space` with translations that were taken away before this call.
    /// No lock may be held.
    pub fn quiesce(&self, space: &Space<VmmPlatform>) {
        self.flushes.quiesce(space);
    }

    /// Has the flushes that wait finished soon, so that their frames come back, and waits for it. False if
    /// none was. No lock may be held, and the caller is no worker: on some hosts it takes one.
    pub fn finish_flushes(&self) -> bool {
        if !self.flushes.pending() {
            return false;
        }
        let before = self.flushes.stats().acknowledged;
        self.flushes.hurry();
        self.flushes.settle();
        self.flushes.stats().acknowledged > before
    }

    /// Tears an address space down: nothing runs in it any more, or ever will.
    pub fn delete_space(&self, space: &Arc<Space<VmmPlatform>>) {
        // Even one without translations: a virtual CPU may have the root loaded.
        self.submit_any(self.manager.delete_space(space));
        if self.sections.untidy() {
            self.views_changed();
        }
    }

    /// Acknowledges flushes.
    pub fn acknowledge(&self, flushes: Vec<Flush>) {
        if flushes.is_empty() {
            return;
        }
        let count = flushes.len() as u64;
        for flush in flushes {
            self.manager.flushed(flush);
        }
        self.frames_came_back(count);
    }

    /// Performs one read of the memory manager: the file's bytes into its frames.
    /// The answer is that of the fault the read was for, made again.
    pub fn fill(&self, ticket: shadow_mm::IoTicket<VmmPlatform>) -> FaultOutcome<VmmPlatform> {
        pager::fill(self, ticket)
    }

    /// A shared mapping may have gone: what was stored to it is to be written soon, and what nobody
    /// maps let go.
    pub fn views_changed(&self) {
        self.call_writeback();
        self.bell.ring();
    }

    /// Takes what is left of an outcome whose only point was its side effects.
    fn settle(&self, outcome: FaultOutcome<VmmPlatform>) {
        if let FaultOutcome::Resolved(resolution) = outcome {
            self.submit(resolution.flush);
        }
    }
}
