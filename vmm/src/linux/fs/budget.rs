//! How many bytes the guest's files in memory may use, in all and of one file system.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::io::Errno;
use shadow_mm::Allowance;

/// Bytes of a page of a file.
const PAGE: u64 = 4096;
/// What the VMM keeps of a page of a file, besides its bytes.
const RECORD: u64 = 64;

/// A limit on bytes, inside a wider one.
#[derive(Debug)]
pub struct Budget {
    limit: u64,
    used: AtomicU64,
    parent: Option<Arc<Budget>>,
}

impl Budget {
    /// A limit of `limit` bytes, all of which also count against `parent`.
    #[must_use]
    pub fn new(limit: u64, parent: Option<Arc<Self>>) -> Arc<Self> {
        Arc::new(Self {
            limit,
            used: AtomicU64::new(0),
            parent,
        })
    }

    /// Takes `bytes`.
    ///
    /// # Errors
    /// `ENOSPC`; nothing was taken.
    pub fn take(&self, bytes: u64) -> Result<(), Errno> {
        self.take_part(bytes, bytes)
    }

    /// Takes `bytes` here and, `above` of them, of the wider limit.
    fn take_part(&self, bytes: u64, above: u64) -> Result<(), Errno> {
        self.used
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |used| {
                used.checked_add(bytes).filter(|&sum| sum <= self.limit)
            })
            .map_err(|_| Errno::NOSPC)?;
        if let Some(parent) = &self.parent
            && let Err(error) = parent.take(above)
        {
            self.used.fetch_sub(bytes, Ordering::SeqCst);
            return Err(error);
        }
        Ok(())
    }

    /// Gives `bytes` back that were taken.
    pub fn give(&self, bytes: u64) {
        self.used.fetch_sub(bytes, Ordering::SeqCst);
        if let Some(parent) = &self.parent {
            parent.give(bytes);
        }
    }

    /// The limit, and the bytes in use.
    #[must_use]
    pub fn usage(&self) -> (u64, u64) {
        (self.limit, self.used.load(Ordering::SeqCst))
    }
}

/// The pages of files: they count against the file system's own size, and only their records against what the VMM
/// keeps for all; the pages themselves are the guest's memory.
impl Allowance for Budget {
    fn take(&self, pages: u64) -> bool {
        let bytes = if self.parent.is_some() { PAGE } else { RECORD };
        let [bytes, records] = [bytes, RECORD].map(|size| pages.saturating_mul(size));
        self.take_part(bytes, records).is_ok()
    }

    fn give(&self, pages: u64) {
        match &self.parent {
            Some(parent) => {
                self.used.fetch_sub(pages * PAGE, Ordering::SeqCst);
                parent.give(pages * RECORD);
            }
            None => self.give(pages * RECORD),
        }
    }
}

/// Bytes taken from a budget for as long as this lives.
#[derive(Debug)]
pub(super) struct Charge {
    budget: Arc<Budget>,
    bytes: u64,
}

impl Charge {
    /// Takes `bytes`.
    pub(super) fn new(budget: &Arc<Budget>, bytes: u64) -> Result<Self, Errno> {
        budget.take(bytes)?;
        Ok(Self {
            budget: Arc::clone(budget),
            bytes,
        })
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.budget.give(self.bytes);
    }
}
