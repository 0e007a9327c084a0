//! Guests as saved data.
//!
//! A snapshot has two halves. [`records`] are the Linux layer's: processes, threads, open files, pipes,
//! signals, timers. The memory image is the memory manager's: spaces, sections, pages. The seam between
//! them is [`records::memory`].
//!
//! On disk both are one file, which [`image`] puts the memory into: [`mod@format`] says what it looks like, [`mod@write`] how one comes to be,
//! [`read`] how it is read. It is written once and never changed. What makes it trustworthy:
//!
//! * it is written under no name and gets its own only once all of it is on the disk, so whoever kills
//!   the VMM finds the old file;
//! * every byte of it is covered by a checksum. The header's and the parts' are verified when it is
//!   opened, before anything runs; a page's when it is read, together with its cluster's;
//! * a file that somebody has written to since it was finished is known by its time and inode, and all of its pages are
//!   looked at before anything runs ([`read::Snapshot::check`]). So a damaged one is refused, and opening one that is as
//!   it was takes no longer for a large one.
//!
//! The checksums are against accidents. Who can write to a snapshot can make the guest in it do
//! anything the guest could do: trust it as little as the guest.

pub mod format;
pub mod guest;
pub mod image;
pub mod read;
pub mod records;
mod seal;
pub mod write;

#[cfg(test)]
mod tests;
