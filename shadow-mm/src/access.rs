//! What a mapping allows and what an access wants.

use bitflags::bitflags;

bitflags! {
    /// The protection of a mapping, in the guest's terms; empty is `PROT_NONE`.
    ///
    /// The hardware cannot forbid reading a page that may be written or executed (Intel SDM vol 3,
    /// section 4.6), so every non-empty protection is readable.
    #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
    pub struct Prot: u8 {
        /// Loads.
        const READ = 1;
        /// Stores.
        const WRITE = 2;
        /// Instruction fetches.
        const EXEC = 4;
    }
}

impl Prot {
    /// Whether an access of this kind is allowed.
    #[must_use]
    pub fn allows(self, access: Access) -> bool {
        match access {
            Access::Read => !self.is_empty(),
            Access::Write => self.contains(Self::WRITE),
            Access::Execute => self.contains(Self::EXEC),
        }
    }
}

/// The kind of an access.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Access {
    /// A load.
    Read,
    /// A store.
    Write,
    /// An instruction fetch.
    Execute,
}

/// The guest's own fault: what becomes a signal.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, thiserror::Error)]
pub enum Denied {
    /// No mapping covers the address (`SIGSEGV`, `SEGV_MAPERR`).
    #[error("no mapping covers the address")]
    NotMapped,
    /// The mapping forbids the access (`SIGSEGV`, `SEGV_ACCERR`).
    #[error("the mapping forbids the access")]
    Protection,
    /// The page lies wholly beyond the end of the mapped file (`SIGBUS`).
    #[error("the page lies beyond the end of the mapped file")]
    BeyondEnd,
    /// The page could not be read (`SIGBUS`).
    #[error("the page could not be read")]
    IoError,
    /// The page is one more than its file in memory may have (`SIGBUS`).
    #[error("there is no room for a page more")]
    NoSpace,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn write_only_mapping_is_readable() {
        assert!(Prot::WRITE.allows(Access::Read));
        assert!(!Prot::WRITE.allows(Access::Execute));
        assert!(!Prot::empty().allows(Access::Read));
    }
}
