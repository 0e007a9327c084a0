//! I/O under way: what a ticket, the pages it is for, and those who wait for it have in common.

use alloc::sync::Arc;
use core::sync::atomic::{AtomicU8, Ordering};

use super::bell::Bell;
use super::section::SectionId;

const UNDER_WAY: u8 = 0;
const DONE: u8 = 1;
const FAILED: u8 = 2;
const ABANDONED: u8 = 3;

/// One transfer.
#[derive(Debug, Default)]
pub(crate) struct Record {
    state: AtomicU8,
}

impl Record {
    pub(crate) fn is_abandoned(&self) -> bool {
        self.state.load(Ordering::Acquire) == ABANDONED
    }
}

/// A ticket's hold on its record: dropping it without an end abandons the transfer, and the next
/// operation takes the frames back.
#[derive(Debug)]
pub(crate) struct Claim {
    record: Arc<Record>,
    bell: Arc<Bell>,
    section: SectionId,
}

impl Claim {
    pub(crate) fn new(record: &Arc<Record>, bell: &Arc<Bell>, section: SectionId) -> Self {
        Self {
            record: Arc::clone(record),
            bell: Arc::clone(bell),
            section,
        }
    }

    pub(crate) fn record(&self) -> &Arc<Record> {
        &self.record
    }

    /// The transfer ended well.
    pub(crate) fn done(self) {
        self.record.state.store(DONE, Ordering::Release);
    }

    /// The transfer failed.
    pub(crate) fn failed(self) {
        self.record.state.store(FAILED, Ordering::Release);
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let dropped = self.record.state.compare_exchange(
            UNDER_WAY,
            ABANDONED,
            Ordering::AcqRel,
            Ordering::Acquire,
        );
        if dropped.is_ok() {
            self.bell.ring(self.section);
        }
    }
}

/// What became of a transfer somebody waits for.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Progress {
    /// It is not done: wait on.
    UnderWay,
    /// It ended: make the access again.
    Ended,
    /// It failed: the access fails with [`crate::Denied::IoError`] for all who waited.
    Failed,
}

/// A transfer that somebody else does and this access must wait for (a *collided* fault).
#[derive(Clone, Debug)]
#[must_use = "wait until it is no longer under way"]
pub struct Pending {
    record: Arc<Record>,
}

impl Pending {
    pub(crate) fn new(record: &Arc<Record>) -> Self {
        Self {
            record: Arc::clone(record),
        }
    }

    /// How far it is.
    #[must_use]
    pub fn progress(&self) -> Progress {
        match self.record.state.load(Ordering::Acquire) {
            UNDER_WAY => Progress::UnderWay,
            FAILED => Progress::Failed,
            _ => Progress::Ended,
        }
    }
}
