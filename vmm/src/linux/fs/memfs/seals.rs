//! Seals of a file in memory (fcntl(2), `F_ADD_SEALS`): what nobody may do to it any more.
//!
//! They are looked at with the lock held that orders writes ([`super::data`]). Files that were not made to be sealed
//! begin with [`Seals::SEAL`].

use rustix::io::Errno;

bitflags::bitflags! {
    /// What may not be done to a file.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Seals: u32 {
        /// Add seals.
        const SEAL = 1;
        /// Make it shorter.
        const SHRINK = 2;
        /// Make it longer.
        const GROW = 4;
        /// Change what is in it.
        const WRITE = 8;
        /// The same, but through mappings that are there.
        const FUTURE_WRITE = 16;
        /// Change who may execute it.
        const EXEC = 32;
    }
}

impl Seals {
    /// Whether nobody may begin to change what is in the file.
    #[must_use]
    pub fn keep_content(self) -> bool {
        self.intersects(Self::WRITE | Self::FUTURE_WRITE)
    }

    /// # Errors
    /// `EPERM`.
    pub(super) fn allow_write(self) -> Result<(), Errno> {
        if self.keep_content() {
            Err(Errno::PERM)
        } else {
            Ok(())
        }
    }

    /// Whether the file may become as long as `new`.
    ///
    /// # Errors
    /// `EPERM`.
    pub(super) fn allow_size(self, old: u64, new: u64) -> Result<(), Errno> {
        let forbidden = match new.cmp(&old) {
            std::cmp::Ordering::Less => Self::SHRINK,
            std::cmp::Ordering::Equal => Self::empty(),
            std::cmp::Ordering::Greater => Self::GROW,
        };
        if self.intersects(forbidden) {
            Err(Errno::PERM)
        } else {
            Ok(())
        }
    }
}
