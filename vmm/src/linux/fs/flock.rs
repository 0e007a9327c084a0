//! flock(2): advisory locks on whole files, held by open descriptions, known inside this machine.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::linux::call::WaitKey;
use crate::linux::sched::Sched;
use crate::locks::{Mutex, rank};

type FileId = (u64, u64);

/// The locks of a machine.
#[derive(Debug, Default)]
pub struct Flocks {
    held: Mutex<rank::FlockTable, HashMap<FileId, Held>>,
    next_owner: AtomicU64,
}

#[derive(Debug)]
struct Held {
    key: WaitKey,
    exclusive: bool,
    owners: Vec<u64>,
}

/// A lock that is held; given up when dropped.
pub struct FlockGuard {
    locks: Arc<Flocks>,
    sched: Arc<Sched>,
    file: FileId,
    owner: u64,
    exclusive: bool,
}

impl std::fmt::Debug for FlockGuard {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FlockGuard")
            .field("file", &self.file)
            .field("exclusive", &self.exclusive)
            .finish_non_exhaustive()
    }
}

impl Flocks {
    /// Takes a lock on `file`, or tells what to wait for.
    ///
    /// # Errors
    /// The key that is woken when a lock on it is given up.
    pub fn take(
        self: &Arc<Self>,
        sched: &Arc<Sched>,
        file: FileId,
        exclusive: bool,
    ) -> Result<FlockGuard, WaitKey> {
        let mut held = self.held.lock();
        let owner = self.next_owner.fetch_add(1, Ordering::Relaxed);
        let entry = held.entry(file).or_insert_with(|| Held {
            key: sched.new_key(),
            exclusive,
            owners: Vec::new(),
        });
        if !entry.owners.is_empty() && (exclusive || entry.exclusive) {
            return Err(entry.key);
        }
        entry.exclusive = exclusive;
        entry.owners.push(owner);
        Ok(FlockGuard {
            locks: Arc::clone(self),
            sched: Arc::clone(sched),
            file,
            owner,
            exclusive,
        })
    }
}

impl FlockGuard {
    /// Whether it excludes all others.
    #[must_use]
    pub fn is_exclusive(&self) -> bool {
        self.exclusive
    }
}

impl Drop for FlockGuard {
    fn drop(&mut self) {
        let mut held = self.locks.held.lock();
        let Some(entry) = held.get_mut(&self.file) else {
            return;
        };
        entry.owners.retain(|&owner| owner != self.owner);
        let key = entry.key;
        if entry.owners.is_empty() {
            held.remove(&self.file);
        }
        drop(held);
        self.sched.wake(key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exclusive_after_shared_waits_until_given_up() {
        let (locks, sched) = (Arc::new(Flocks::default()), Arc::new(Sched::default()));
        let one = locks.take(&sched, (1, 1), false).unwrap();
        let two = locks.take(&sched, (1, 1), false).unwrap();
        assert!(locks.take(&sched, (1, 1), true).is_err());
        drop((one, two));
        assert!(locks.take(&sched, (1, 1), true).is_ok());
        assert!(locks.held.lock().is_empty());
    }
}
