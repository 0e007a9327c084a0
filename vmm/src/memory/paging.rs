//! What a fault needs of the host: reads of files and of the page file, and waiting for those of
//! others.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Condvar;
use shadow_mm::{
    Access, Denied, FaultKind, FaultOutcome, Flush, FrameStore, GuestVa, IoFailed, NoFrame, PageIn,
    Slot, Space, Thaw,
};

use super::flushes::concerns;
use super::{Backing, FRAME, Memory, VmmPlatform};
use crate::locks::{WaitMutex, rank};

/// What a fault came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The page is there: go on.
    Resolved(FaultKind),
    /// Something was read: go on, and perhaps fault again.
    Read,
    /// The guest's own fault.
    Denied(Denied),
    /// No frame is left.
    NoMemory,
}

/// Longest wait for an event; whoever waits looks again then.
const PATIENCE: Duration = Duration::from_millis(100);

/// Something that happens again and again, and that others wait for.
#[derive(Debug, Default)]
pub(super) struct Event {
    count: AtomicU64,
    lock: WaitMutex<rank::PagingEvents, ()>,
    happened: Condvar,
}

impl Event {
    /// How often it has happened; to be asked before looking for a reason to wait.
    pub(super) fn seen(&self) -> u64 {
        self.count.load(Ordering::SeqCst)
    }

    /// It happened.
    pub(super) fn notify(&self) {
        self.count.fetch_add(1, Ordering::SeqCst);
        drop(self.lock.lock());
        self.happened.notify_all();
    }

    /// Waits until it happens once more than `seen`, or for a while.
    pub(super) fn wait(&self, seen: u64) {
        self.wait_for(seen, PATIENCE);
    }

    /// The same, for at most `time`.
    pub(super) fn wait_for(&self, seen: u64, time: Duration) {
        let mut guard = self.lock.lock();
        if self.count.load(Ordering::SeqCst) == seen {
            guard.wait_for(&self.happened, time);
        }
    }
}

impl Memory {
    /// Resolves a page fault of the guest's. No lock may be held.
    pub fn fault(&self, space: &Arc<Space<VmmPlatform>>, va: GuestVa, access: Access) -> Fault {
        self.watch_level();
        let mut read = false;
        loop {
            let seen = self.reads.seen();
            let mut outcome = self.manager.fault(space, va, access);
            if let FaultOutcome::Read(ticket) = outcome {
                read = true;
                outcome = self.fill(ticket);
            } else if let FaultOutcome::PageIn(ticket) = outcome {
                outcome = self.page_in(ticket);
            }
            match outcome {
                FaultOutcome::Resolved(resolution) => {
                    let kind = resolution.kind;
                    self.submit(resolution.flush);
                    return if read {
                        Fault::Read
                    } else {
                        Fault::Resolved(kind)
                    };
                }
                FaultOutcome::Wait(pending) => {
                    read = true;
                    if let Err(denied) = self.wait(&pending) {
                        return Fault::Denied(denied);
                    }
                }
                FaultOutcome::Thaw(wanted) => match self.thaw(&wanted) {
                    Ok(()) => {}
                    Err(NoFrame) if self.relieve() => {}
                    Err(NoFrame) => return Fault::NoMemory,
                },
                FaultOutcome::Collided => self.reads.wait(seen),
                FaultOutcome::Denied(denied) => return Fault::Denied(denied),
                FaultOutcome::NoMemory if self.relieve() => {}
                FaultOutcome::NoMemory => return Fault::NoMemory,
                // The page went before it could be mapped, or the place is another by now. The ticket
                // is done without: whoever wants the page asks again.
                FaultOutcome::Read(ticket) => drop(ticket),
                FaultOutcome::PageIn(ticket) => self.settle(self.page_in(ticket)),
            }
        }
    }

    /// Has pages of a layer copied for all who share them. When this returns, no virtual CPU reads the layer's there any more.
    ///
    /// # Errors
    /// No frame is left.
    pub(super) fn thaw(&self, wanted: &Thaw<Backing>) -> Result<(), NoFrame> {
        let thawed = self.manager.thaw(wanted, |flushes: Vec<Flush>| {
            let stale = flushes.iter().filter(|flush| !flush.is_empty());
            let whose: Vec<_> = stale.map(concerns).collect();
            flushes.into_iter().for_each(|flush| self.submit(flush));
            whose
                .into_iter()
                .for_each(|space| self.flushes.quiesce_for(space));
        });
        self.reads.notify();
        thawed
    }

    /// Performs one read of the page file: slots into frames, through a bounce buffer and with no lock
    /// held.
    pub(super) fn page_in(&self, ticket: PageIn<VmmPlatform>) -> FaultOutcome<VmmPlatform> {
        let result = self.read_pages(&ticket);
        let outcome = self.manager.complete_page_in(ticket, result);
        self.reads.notify();
        outcome
    }

    /// What is in a slot of the page file. The caller looks again whether its page is still there.
    ///
    /// # Errors
    /// The host's.
    pub fn read_slot(&self, slot: Slot, into: &mut [u8; FRAME]) -> std::io::Result<()> {
        let file = self.page_file.get().ok_or(std::io::ErrorKind::NotFound)?;
        match file.read(slot.offset(), into)? {
            FRAME => Ok(()),
            _ => Err(std::io::ErrorKind::UnexpectedEof.into()),
        }
    }

    fn read_pages(&self, ticket: &PageIn<VmmPlatform>) -> Result<usize, IoFailed> {
        let file = self.page_file.get().ok_or(IoFailed)?;
        let mut buffer = vec![0_u8; ticket.length()];
        let read = file.read(ticket.offset(), &mut buffer).map_err(|error| {
            file.report("read", &error);
            IoFailed
        })?;
        for (frame, bytes) in ticket.frames().iter().zip(buffer[..read].chunks(FRAME)) {
            self.manager.store().write(*frame, 0, bytes);
        }
        Ok(read)
    }
}
