//! The modified writer's side of the page file (system 13): what to write, and what became of it.

use alloc::vec::Vec;

use super::{SlotMap, WriteTicket};
use crate::backend::Platform;
use crate::limits::LayoutError;
use crate::manager::Manager;
use crate::outcome::IoFailed;
use crate::pfn::{PfnState, ZoneKind};
use crate::stats::add;

/// Most pages one write takes: 128 KiB.
const CLUSTER_PAGES: u32 = 32;

/// What became of a write's pages.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Written {
    /// Pages that are in the page file now, and whose frames can be taken.
    pub stored: u64,
    /// Pages that were stored to or given up meanwhile, or were not written: their slots are free again.
    pub kept: u64,
}

impl<P: Platform> Manager<P> {
    /// Gives the manager a page file of `pages` pages, before the first space is made.
    ///
    /// # Errors
    /// [`LayoutError::OutOfMemory`] if so many slots cannot be kept account of.
    pub fn add_page_file(&self, pages: u64) -> Result<(), LayoutError> {
        let slots = SlotMap::new(pages).ok_or(LayoutError::OutOfMemory { frames: pages })?;
        let mut db = self.pfns.lock();
        debug_assert_eq!(db.slots.count(), 0, "there is a page file already");
        db.slots = slots;
        Ok(())
    }

    /// The next write that should be done, oldest pages first. `None` if no page is to be written or the
    /// page file is full.
    #[must_use]
    pub fn start_write(&self) -> Option<WriteTicket> {
        let (mut db, run) = loop {
            let mut db = self.pfns.lock();
            let more = db.reap();
            let modified = db.zone(ZoneKind::Data).list_len(PfnState::Modified);
            let run = match modified {
                0 => return None,
                pages => db.slots.take_run(pages.min(CLUSTER_PAGES)),
            };
            match run {
                Some(run) => break (db, run),
                // Dropped sections still have slots.
                None if more => {}
                None => return None,
            }
        };
        let frames: Vec<_> = (0..run.count).filter_map(|_| db.begin_write()).collect();
        debug_assert_eq!(frames.len(), run.count as usize);
        add(&self.counters.writes_issued, 1);
        Some(WriteTicket { run, frames })
    }

    /// Takes the result of a write. Pages that nobody stored to meanwhile go to the standby list; the
    /// others, and all if the write failed, stay as they were before it.
    pub fn complete_write(&self, ticket: WriteTicket, result: Result<(), IoFailed>) -> Written {
        let mut written = Written::default();
        let mut db = self.pfns.lock();
        for (n, frame) in (0u32..).zip(ticket.frames) {
            let Some(slot) = ticket.run.first.ahead(n) else {
                continue;
            };
            match db.end_write(frame, slot, result.is_ok()) {
                true => written.stored += 1,
                false => written.kept += 1,
            }
        }
        drop(db);
        add(&self.counters.pages_written, written.stored);
        add(&self.counters.writes_failed, u64::from(result.is_err()));
        written
    }
}
