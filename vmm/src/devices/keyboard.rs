//! What the VMM's side of a console sees of the device behind it.

use serde::{Deserialize, Serialize};

/// How many characters a screen shows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScreenSize {
    /// In a row.
    pub columns: u16,
    /// Rows.
    pub rows: u16,
}

/// A device that somebody types into. None of this waits.
pub trait Keyboard: Send + Sync + std::fmt::Debug {
    /// How many more bytes may be typed now.
    fn room(&self) -> usize;

    /// Types, as far as there is room; returns how much. [`Self::feed`] comes next.
    fn input(&self, bytes: &[u8]) -> usize;

    /// Gives the guest what waits, as far as it takes it. False if something still waits that it may
    /// have later without doing anything: try again soon.
    #[must_use]
    fn feed(&self) -> bool;

    /// The screen has another size now, or still the same.
    fn resize(&self, size: ScreenSize);
}
