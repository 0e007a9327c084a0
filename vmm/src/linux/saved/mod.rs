//! The Linux layer's records as data that can be written down, and a guest made of them again.
//!
//! The saved types are beside their owners (`proc::saved`, `fs::saved`, `fd::pipe`, `net`, ...), implement
//! `serde`'s traits and know nothing of an encoding. Objects that several records share (a pipe by its ends, a
//! description by descriptors, an inode by names) are in tables ([`tables`]) and named by their number there,
//! so what was shared is shared again, and a circle is no problem.
//!
//! What is in guest memory is not here: [`crate::snapshot::records::memory`] is the seam to whoever keeps it.
//!
//! # What comes back how
//! * A blocked call is a record with its deadline; it is made again when the guest goes on, and blocks
//!   again unless what it waits for has happened.
//! * Pipes, sockets, event counters, timers, epolls, files in memory: with all that is in them.
//! * Files of the host are opened again by their place and must be what they were ([`crate::linux::fs::saved`]).
//! * Standard descriptors are those of the VMM that makes the guest again.
//! * Time goes on where it stood ([`crate::linux::time::saved`]).
//! * What must differ between two guests made of one: [`identity`].
//!
//! # Known holes
//! A file of the host that is open and was renamed, or was deleted and is open for writing only, is refused. What
//! a terminal had not delivered yet stays there. A guest with `--guard-alloc` is refused.

pub mod content;
pub mod error;
pub mod file;
pub mod identity;
mod load;
mod people;
pub mod records;
mod save;
pub mod tables;
#[cfg(test)]
pub(crate) mod tests;

pub use error::{Damaged, Refused, RestoreError};
pub use file::SavedFile;
pub use load::{Loader, Parts, Place, restore};
pub use records::Records;
pub use save::{Saver, save};
