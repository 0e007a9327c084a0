//! Who waits for which word.

use std::collections::{HashMap, VecDeque};

use super::FutexKey;
use crate::linux::thread::Tid;

/// A thread in a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Waiter {
    tid: Tid,
    /// Which wakes it takes (`FUTEX_WAIT_BITSET`).
    bitset: u32,
}

/// Where a thread is that waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// In this word's queue.
    Queued(FutexKey),
    /// Woken; it has only to notice.
    Woken,
}

/// All waiters in futex(2). A queue that is empty is not kept.
#[derive(Debug, Default)]
pub struct FutexTable {
    queues: HashMap<FutexKey, VecDeque<Waiter>>,
    threads: HashMap<Tid, Place>,
}

impl FutexTable {
    /// Puts a thread at the end of a word's queue.
    pub fn enqueue(&mut self, tid: Tid, key: FutexKey, bitset: u32) {
        debug_assert!(!self.threads.contains_key(&tid), "a thread waits once");
        self.threads.insert(tid, Place::Queued(key));
        let waiter = Waiter { tid, bitset };
        self.queues.entry(key).or_default().push_back(waiter);
    }

    /// Wakes at most `count` waiters that take `bitset`, in the order they came.
    #[must_use]
    pub fn wake(&mut self, key: FutexKey, count: usize, bitset: u32) -> Vec<Tid> {
        let Some(queue) = self.queues.get_mut(&key) else {
            return Vec::new();
        };
        let mut woken = Vec::new();
        queue.retain(|waiter| {
            let wanted = woken.len() < count && waiter.bitset & bitset != 0;
            if wanted {
                woken.push(waiter.tid);
            }
            !wanted
        });
        if queue.is_empty() {
            self.queues.remove(&key);
        }
        for &tid in &woken {
            self.threads.insert(tid, Place::Woken);
        }
        woken
    }

    /// Moves at most `count` waiters to another word's queue; how many that were.
    pub fn requeue(&mut self, from: FutexKey, to: FutexKey, count: usize) -> usize {
        let Some(queue) = self.queues.get_mut(&from) else {
            return 0;
        };
        let moved: Vec<_> = queue.drain(..count.min(queue.len())).collect();
        if queue.is_empty() {
            self.queues.remove(&from);
        }
        if moved.is_empty() {
            return 0;
        }
        for waiter in &moved {
            self.threads.insert(waiter.tid, Place::Queued(to));
        }
        let count = moved.len();
        self.queues.entry(to).or_default().extend(moved);
        count
    }

    /// Whether a thread that waited was woken.
    #[must_use]
    pub fn woken(&self, tid: Tid) -> bool {
        self.threads.get(&tid) == Some(&Place::Woken)
    }

    /// Takes a thread out. Returns whether it had been woken.
    pub fn forget(&mut self, tid: Tid) -> bool {
        match self.threads.remove(&tid) {
            Some(Place::Woken) => true,
            Some(Place::Queued(key)) => {
                if let Some(queue) = self.queues.get_mut(&key) {
                    queue.retain(|waiter| waiter.tid != tid);
                    if queue.is_empty() {
                        self.queues.remove(&key);
                    }
                }
                false
            }
            None => false,
        }
    }

    /// Every queue: who waits, in their order, and which wakes they take.
    pub(super) fn waiters(&self) -> impl Iterator<Item = (FutexKey, Vec<(Tid, u32)>)> {
        let waiter = |w: &Waiter| (w.tid, w.bitset);
        let queue = move |(&key, queue): (&FutexKey, &VecDeque<Waiter>)| {
            (key, queue.iter().map(waiter).collect())
        };
        self.queues.iter().map(queue)
    }

    /// Who was woken and has not noticed, by number.
    pub(super) fn all_woken(&self) -> Vec<Tid> {
        let woken = self.threads.iter().filter(|&(_, &at)| at == Place::Woken);
        let mut tids: Vec<_> = woken.map(|(&tid, _)| tid).collect();
        tids.sort_unstable();
        tids
    }

    /// A thread was woken before it was saved.
    pub(super) fn restore_woken(&mut self, tid: Tid) {
        self.threads.insert(tid, Place::Woken);
    }

    /// Whether nobody waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.threads.is_empty() && self.queues.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use shadow_mm::SpaceId;

    use super::*;

    fn key(space: u64, va: u64) -> FutexKey {
        FutexKey::Private {
            space: SpaceId::new(space),
            va,
        }
    }

    fn table() -> FutexTable {
        let mut table = FutexTable::default();
        for (tid, va, bitset) in [(2, 8, 1), (3, 8, 2), (4, 12, 1), (5, 8, 1), (6, 8, 1)] {
            table.enqueue(tid, key(1, va), bitset);
        }
        table
    }

    #[test]
    fn wakes_in_order_only_what_matches() {
        let mut table = table();
        assert_eq!(table.wake(key(1, 8), 2, 1), [2, 5]);
        assert_eq!(table.wake(key(1, 8), 9, 1), [6]);
        assert!(table.wake(key(2, 8), 9, 1).is_empty());
        assert!(table.woken(2) && !table.woken(3));
        assert!(table.forget(2));
        assert!(!table.forget(3));
        assert!(!table.forget(3));
    }

    #[test]
    fn requeued_waiters_follow_their_new_word() {
        let mut table = table();
        assert_eq!(table.requeue(key(1, 8), key(1, 12), 2), 2);
        assert_eq!(table.requeue(key(1, 99), key(1, 12), 2), 0);
        assert_eq!(table.wake(key(1, 8), 9, u32::MAX), [5, 6]);
        assert_eq!(table.wake(key(1, 12), 9, u32::MAX), [4, 2, 3]);
        for tid in 2..7 {
            assert!(table.forget(tid));
        }
        assert!(table.is_empty());
    }

    #[test]
    fn waiter_that_gives_up_leaves_nothing() {
        let mut table = FutexTable::default();
        table.enqueue(2, key(1, 8), 1);
        assert!(!table.forget(2));
        assert!(table.is_empty());
    }
}
