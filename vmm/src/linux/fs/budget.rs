//! How many bytes of the VMM's own memory the guest's files may use.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::io::Errno;

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
        self.used
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |used| {
                used.checked_add(bytes).filter(|&sum| sum <= self.limit)
            })
            .map_err(|_| Errno::NOSPC)?;
        if let Some(parent) = &self.parent
            && let Err(error) = parent.take(bytes)
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
