//! The Linux layer: what a process guest sees as its kernel.
//!
//! All state of a process guest is *data we own*: the process tree, file descriptions with their
//! offsets, pipes, signals, timers and blocked calls are records. A host file descriptor appears
//! only at the edge, inside a [`file::File`]. A call that blocks becomes a [`call::CallRecord`]
//! and a [`call::Wait`]: the thread is parked as data and the same call is made again when
//! something it waits for has happened.
//!
//! This module does not know KVM, and does not decide memory policy: it asks `shadow-mm`.
//!
//! One family of calls a file; each exports a `TABLE` of [`call::Entry`] that [`table`] collects.

pub mod call;
pub mod events;
pub mod exec;
pub mod fd;
pub mod file;
pub mod freezes;
pub mod fs;
pub mod kernel;
pub mod mm;
pub mod net;
pub mod offset;
pub mod proc;
pub mod process;
pub mod saved;
pub mod sched;
pub mod signal;
pub mod stdio;
pub mod stop;
pub mod table;
#[cfg(test)]
pub(crate) mod testing;
pub mod thread;
pub mod time;
pub mod timers;
pub mod tty;
pub mod user_mem;
pub mod vdso;

/// The guest's error numbers (errno(3)); the same numbers as the host's.
pub use rustix::io::Errno;
