//! What the pipes of a machine may use together.

use super::{DEFAULT_CAPACITY, PIPE_BUF};
use crate::linux::Errno;
use crate::locks::{Mutex, rank};

/// Pipes a machine may have; more gives `ENFILE`.
pub const MAX_PIPES: usize = 16_384;
/// Bytes the pipes of a machine may hold together before new ones hold [`PIPE_BUF`] only and none
/// can be enlarged, as with Linux's `/proc/sys/fs/pipe-user-pages-soft`.
pub const SOFT_ROOM: usize = 64 << 20;

/// What the pipes of a machine use together: a guest cannot make the VMM grow beyond
/// [`SOFT_ROOM`] and [`MAX_PIPES`] times [`PIPE_BUF`] by opening them.
#[derive(Debug, Default)]
pub struct PipeRoom {
    used: Mutex<rank::PipeRoom, Used>,
}

#[derive(Debug, Default)]
struct Used {
    pipes: usize,
    bytes: usize,
}

impl PipeRoom {
    /// Room for a new pipe: what it may hold.
    pub(super) fn admit(&self) -> Result<usize, Errno> {
        let mut used = self.used.lock();
        if used.pipes >= MAX_PIPES {
            return Err(Errno::NFILE);
        }
        let full = used.bytes + DEFAULT_CAPACITY > SOFT_ROOM;
        let capacity = if full { PIPE_BUF } else { DEFAULT_CAPACITY };
        used.pipes += 1;
        used.bytes += capacity;
        Ok(capacity)
    }

    /// A pipe that could hold `old` bytes holds `new`, if there is room for more.
    pub(super) fn resize(&self, old: usize, new: usize) -> Result<(), Errno> {
        let mut used = self.used.lock();
        let bytes = used.bytes - old + new;
        if new > old && bytes > SOFT_ROOM {
            return Err(Errno::PERM);
        }
        used.bytes = bytes;
        Ok(())
    }

    pub(super) fn release(&self, capacity: usize) {
        let mut used = self.used.lock();
        used.pipes -= 1;
        used.bytes -= capacity;
    }
}

#[cfg(test)]
impl PipeRoom {
    /// Pipes, and the bytes they may hold.
    pub(super) fn used(&self) -> (usize, usize) {
        let used = self.used.lock();
        (used.pipes, used.bytes)
    }
}
