//! Locks that know their place in the tree of locks ([`rank`]).
//!
//! In debug builds every thread remembers which locks it holds, and taking one that does not come after
//! all of them panics with both names: *before* it blocks, so that an order that could deadlock shows
//! the first time it is used, not the first time two threads meet. In release builds these are
//! `parking_lot`'s locks and nothing else.
//!
//! What it is not: a proof. It sees only the paths that run, and of two locks with one rank only
//! that they are never held together. A lock taken with `try_lock` is remembered but not
//! checked, since it cannot block.
#![expect(
    unsafe_code,
    reason = "lock_api's raw mutex is an unsafe trait; this one hands every call on"
)]

use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};

use lock_api::RawMutex;
use parking_lot::Condvar;

pub mod rank;
mod trace;

use rank::Rank;

/// A raw mutex with a rank.
pub struct RankedRaw<R> {
    raw: parking_lot::RawMutex,
    rank: PhantomData<fn() -> R>,
}

/// A mutex with a rank.
pub type Mutex<R, T> = lock_api::Mutex<RankedRaw<R>, T>;
/// A locked [`Mutex`].
pub type MutexGuard<'a, R, T> = lock_api::MutexGuard<'a, RankedRaw<R>, T>;

// SAFETY: mutual exclusion is that of the mutex inside, to which every call goes unchanged.
unsafe impl<R: Rank> RawMutex for RankedRaw<R> {
    const INIT: Self = Self {
        raw: parking_lot::RawMutex::INIT,
        rank: PhantomData,
    };

    type GuardMarker = lock_api::GuardNoSend;

    fn lock(&self) {
        trace::check(R::PLACE);
        self.raw.lock();
        trace::taken(R::PLACE);
    }

    fn try_lock(&self) -> bool {
        let got = self.raw.try_lock();
        if got {
            trace::taken(R::PLACE);
        }
        got
    }

    unsafe fn unlock(&self) {
        trace::given_back(R::PLACE);
        // SAFETY: the caller holds this lock, and so the one inside.
        unsafe { self.raw.unlock() };
    }

    fn is_locked(&self) -> bool {
        self.raw.is_locked()
    }
}

/// A mutex with a rank that threads wait under, with a [`Condvar`].
#[derive(Debug, Default)]
pub struct WaitMutex<R, T> {
    inner: parking_lot::Mutex<T>,
    rank: PhantomData<fn() -> R>,
}

impl<R: Rank, T> WaitMutex<R, T> {
    /// A mutex around `value`.
    pub fn new(value: T) -> Self {
        Self {
            inner: parking_lot::Mutex::new(value),
            rank: PhantomData,
        }
    }

    /// Locks it.
    pub fn lock(&self) -> WaitGuard<'_, R, T> {
        trace::check(R::PLACE);
        let guard = self.inner.lock();
        trace::taken(R::PLACE);
        WaitGuard {
            guard,
            _held: Held(PhantomData),
        }
    }
}

/// A locked [`WaitMutex`].
pub struct WaitGuard<'a, R: Rank, T> {
    guard: parking_lot::MutexGuard<'a, T>,
    _held: Held<R>,
}

impl<R: Rank, T> WaitGuard<'_, R, T> {
    /// Waits to be notified, with the lock given up meanwhile.
    pub fn wait(&mut self, condvar: &Condvar) {
        condvar.wait(&mut self.guard);
    }

    /// The same, for at most `time`.
    pub fn wait_for(&mut self, condvar: &Condvar, time: std::time::Duration) {
        let _ = condvar.wait_for(&mut self.guard, time);
    }
}

impl<R: Rank, T> Deref for WaitGuard<'_, R, T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.guard
    }
}

impl<R: Rank, T> DerefMut for WaitGuard<'_, R, T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.guard
    }
}

/// Forgets the lock once the guard beside it is gone.
struct Held<R: Rank>(PhantomData<fn() -> R>);

impl<R: Rank> Drop for Held<R> {
    fn drop(&mut self) {
        trace::given_back(R::PLACE);
    }
}

/// The memory manager's locks, ranked.
#[derive(Debug)]
pub struct MemoryLocks;

impl shadow_mm::Locks for MemoryLocks {
    type Supervisor = RankedRaw<rank::Supervisor>;
    type Space = RankedRaw<rank::Space>;
    type Section = RankedRaw<rank::Section>;
    type Pfns = RankedRaw<rank::Pfns>;
    type Registry = RankedRaw<rank::SpaceRegistry>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_of_the_tree_passes() {
        let (outer, inner) = (
            Mutex::<rank::KernelState, _>::new(1),
            WaitMutex::<rank::SchedQueues, _>::new(2),
        );
        for _ in 0..2 {
            let a = outer.lock();
            let b = inner.lock();
            // Given back in any order.
            drop(a);
            drop(b);
        }
        drop((inner.lock(), ()));
        drop(outer.lock());
    }

    #[test]
    #[cfg(debug_assertions)]
    fn order_against_the_tree_panics_before_it_blocks() {
        let outer = Mutex::<rank::KernelState, _>::new(1);
        let inner = Mutex::<rank::Pfns, _>::new(2);
        let _held = inner.lock();
        let wrong = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| drop(outer.lock())));
        let text = *wrong.unwrap_err().downcast::<String>().unwrap();
        assert!(
            text.contains("KernelState") && text.contains("Pfns"),
            "{text}"
        );
        assert!(outer.try_lock().is_some(), "it was not taken");
    }

    #[test]
    #[cfg(debug_assertions)]
    fn two_locks_of_one_rank_panic() {
        let (a, b) = (
            Mutex::<rank::Space, _>::new(()),
            Mutex::<rank::Space, _>::new(()),
        );
        let _held = a.lock();
        assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| drop(b.lock()))).is_err());
    }
}
