//! The offset of an open file description.
//!
//! Whoever reads or writes at the offset holds it meanwhile, which may be long. Others may want to know where it
//! is without waiting (`/proc/PID/fdinfo`, which may even be read through the very descriptor it is about): they
//! see where it was when it was last let go.

use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::locks::{Mutex, MutexGuard, rank};

/// An offset in bytes.
#[derive(Debug, Default)]
pub struct Offset {
    held: Mutex<rank::Offset, u64>,
    seen: AtomicU64,
}

impl Offset {
    /// Holds it for a read, a write or a seek (POSIX: these are atomic among each other).
    pub fn lock(&self) -> OffsetGuard<'_> {
        OffsetGuard {
            guard: self.held.lock(),
            seen: &self.seen,
        }
    }

    /// Where it was when it was last let go. Takes no lock.
    #[must_use]
    pub fn seen(&self) -> u64 {
        self.seen.load(Ordering::Relaxed)
    }
}

/// An offset that is held.
pub struct OffsetGuard<'a> {
    guard: MutexGuard<'a, rank::Offset, u64>,
    seen: &'a AtomicU64,
}

impl Deref for OffsetGuard<'_> {
    type Target = u64;

    fn deref(&self) -> &u64 {
        &self.guard
    }
}

impl DerefMut for OffsetGuard<'_> {
    fn deref_mut(&mut self) -> &mut u64 {
        &mut self.guard
    }
}

impl Drop for OffsetGuard<'_> {
    fn drop(&mut self) {
        self.seen.store(*self.guard, Ordering::Relaxed);
    }
}
