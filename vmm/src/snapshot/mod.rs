//! Guests as saved data.
//!
//! A snapshot has two halves. [`records`] are the Linux layer's: processes, threads, open files, pipes,
//! signals, timers. The memory image is the memory manager's: spaces, sections, pages. The seam between
//! them is [`records::memory`].

pub mod records;
