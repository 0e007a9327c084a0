//! What each thread holds, in debug builds.

use super::rank::Place;

#[cfg(debug_assertions)]
mod held {
    use std::cell::RefCell;

    use super::Place;

    thread_local! {
        pub(super) static HELD: RefCell<Vec<Place>> = const { RefCell::new(Vec::new()) };
    }
}

/// Whether this thread may now take a lock of that place.
///
/// # Panics
/// In debug builds, if the order forbids it.
#[inline]
pub(super) fn check(place: Place) {
    #[cfg(debug_assertions)]
    {
        // A thread that ends drops its locals in an order of its own.
        let wrong = held::HELD.try_with(|held| {
            let held = held.borrow();
            held.iter().find(|other| other.rank >= place.rank).copied()
        });
        if let Ok(Some(other)) = wrong {
            assert!(
                std::thread::panicking(),
                "the lock {} is taken with {} held: against the tree in vmm/src/lib.rs",
                place.name,
                other.name
            );
        }
    }
    #[cfg(not(debug_assertions))]
    let _ = place;
}

/// It has been taken.
#[inline]
pub(super) fn taken(place: Place) {
    #[cfg(debug_assertions)]
    let _ = held::HELD.try_with(|held| held.borrow_mut().push(place));
    #[cfg(not(debug_assertions))]
    let _ = place;
}

/// It is being given back.
#[inline]
pub(super) fn given_back(place: Place) {
    #[cfg(debug_assertions)]
    let _ = held::HELD.try_with(|held| {
        let mut held = held.borrow_mut();
        if let Some(at) = held.iter().rposition(|other| other.rank == place.rank) {
            held.remove(at);
        }
    });
    #[cfg(not(debug_assertions))]
    let _ = place;
}
