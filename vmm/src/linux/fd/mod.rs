//! Descriptors: the table of a process, the calls that read, write, poll and control what is
//! behind one, and the kinds of file that are not in the file tree (pipes, event counters, epoll).
//!
//! Handlers never block: a file answers `EAGAIN`, and the handler parks the thread on what
//! [`File::watch`](super::file::File::watch) names. Data passes through a bounce buffer of at most
//! [`STEP`] bytes; bytes that cannot be put back are taken from a stream only after the guest's
//! buffer was found writable.

pub mod control;
pub mod copy;
pub mod epoll;
pub mod eventfd;
pub mod fcntl;
pub mod locks;
pub mod memfd;
pub mod pipe;
pub mod poll;
pub mod rw;
pub mod seek;
pub mod select;
pub mod table;
#[cfg(test)]
mod tests;
pub mod transfer;
pub mod vector;

use std::sync::Arc;

use super::call::{Ctx, Entry, Restart, Stop, Wait, WaitKey};
use super::file::{Description, O_NONBLOCK, Ready};
use super::sched::Sched;

/// The tables of this folder, and of time.
pub const FAMILIES: &[&[Entry]] = &[
    control::TABLE,
    copy::TABLE,
    epoll::TABLE,
    eventfd::TABLE,
    fcntl::TABLE,
    memfd::TABLE,
    pipe::TABLE,
    poll::TABLE,
    rw::TABLE,
    seek::TABLE,
    select::TABLE,
    table::TABLE,
    super::time::calls::TABLE,
    super::timers::TABLE,
];

/// Bytes a transfer moves at a time.
pub const STEP: usize = 256 << 10;

/// What the descriptor calls of one machine share.
#[derive(Debug)]
pub struct Io {
    /// Record locks (fcntl(2)).
    pub locks: locks::RecordLocks,
    /// What the machine's pipes use together.
    pub pipes: Arc<pipe::PipeRoom>,
    /// Which socket has which name.
    pub names: Arc<super::net::Names>,
    /// Woken to make the signal thread look at the main program (see [`super::tty::host_signals`]).
    pub main_stops: super::tty::MainStops,
}

impl Io {
    /// For a machine scheduled by `sched`.
    #[must_use]
    pub fn new(sched: &Sched) -> Self {
        Self {
            locks: locks::RecordLocks::new(sched),
            pipes: Arc::default(),
            names: Arc::default(),
            main_stops: super::tty::MainStops::default(),
        }
    }
}

/// The stop that parks the calling thread until `description` may be ready for `interest`; or
/// `EAGAIN` if it does not block.
pub fn would_block(c: &Ctx<'_>, description: &Description, interest: Ready) -> Stop {
    if description.flags() & O_NONBLOCK != 0 {
        return Stop::Errno(super::Errno::AGAIN);
    }
    let mut wait = Wait {
        keys: Vec::<WaitKey>::new(),
        deadline: None,
        restart: Restart::Sys,
    };
    description.file.watch(c.viewer(), interest, &mut wait);
    Stop::Block(wait)
}
