//! Pipes: a ring buffer between a reading and a writing end (pipe(7)).
//!
//! The ends are files of their own. How many there are is counted by making and dropping the end
//! objects: `dup` and `fork` share one description and therefore one end.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::locks::{Mutex, rank};

use super::super::Errno;
use super::super::call::WaitKey;
use super::super::file::{Ready, Stat};
use super::super::sched::Sched;

mod calls;
mod end;
mod room;
mod saved;

pub use calls::TABLE;
pub(in crate::linux) use calls::store_pair;
pub use end::{End, Side};
pub use room::{MAX_PIPES, PipeRoom, SOFT_ROOM};
pub use saved::SavedPipe;

/// Writes of up to this many bytes are atomic (limits.h).
pub const PIPE_BUF: usize = 4096;
/// Bytes a new pipe holds.
pub const DEFAULT_CAPACITY: usize = 64 << 10;
/// Bytes an unprivileged process may make it hold (`/proc/sys/fs/pipe-max-size`).
pub const MAX_CAPACITY: usize = 1 << 20;
/// Major and minor of the anonymous device that pipes are on.
const PIPE_DEV: u64 = 0xe;

/// The next pipe's number, by which stat(2) tells pipes apart.
static NEXT_ID: AtomicU64 = AtomicU64::new(1);

#[derive(Debug)]
struct Ring {
    data: VecDeque<u8>,
    capacity: usize,
    readers: usize,
    writers: usize,
    /// How often each side was opened.
    opened: [u64; 2],
}

/// A pipe, shared by its ends.
#[derive(Debug)]
pub struct Pipe {
    ring: Mutex<rank::PipeRing, Ring>,
    room: Arc<PipeRoom>,
    sched: Arc<Sched>,
    /// Woken when there is more to read.
    filled: WaitKey,
    /// Woken when there is more room.
    drained: WaitKey,
    reads: AtomicU64,
    writes: AtomicU64,
    id: u64,
}

impl Pipe {
    /// A pipe without ends, for a FIFO: see [`Pipe::reader`] and [`Pipe::writer`].
    ///
    /// # Errors
    /// `ENFILE` when the machine has [`MAX_PIPES`].
    pub fn new(sched: &Arc<Sched>, room: &Arc<PipeRoom>) -> Result<Arc<Self>, Errno> {
        let capacity = room.admit()?;
        Ok(Arc::new(Self {
            ring: Mutex::new(Ring {
                data: VecDeque::new(),
                capacity,
                readers: 0,
                writers: 0,
                opened: [0; 2],
            }),
            room: Arc::clone(room),
            filled: sched.new_key(),
            drained: sched.new_key(),
            sched: Arc::clone(sched),
            reads: AtomicU64::new(0),
            writes: AtomicU64::new(0),
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
        }))
    }

    /// A pipe and its two ends.
    ///
    /// # Errors
    /// As [`Pipe::new`].
    pub fn pair(sched: &Arc<Sched>, room: &Arc<PipeRoom>) -> Result<(Arc<End>, Arc<End>), Errno> {
        let pipe = Self::new(sched, room)?;
        Ok((pipe.reader(), pipe.writer()))
    }

    /// A new reading end.
    #[must_use]
    pub fn reader(self: &Arc<Self>) -> Arc<End> {
        End::new(self, Side::Read)
    }

    /// A new writing end.
    #[must_use]
    pub fn writer(self: &Arc<Self>) -> Arc<End> {
        End::new(self, Side::Write)
    }

    /// Takes up to `buf.len()` bytes; 0 when it is empty and nobody can write.
    ///
    /// # Errors
    /// `EAGAIN` when it is empty.
    pub fn read_some(&self, buf: &mut [u8]) -> Result<usize, Errno> {
        if buf.is_empty() {
            return Ok(0);
        }
        let mut ring = self.ring.lock();
        if ring.data.is_empty() {
            return if ring.writers == 0 {
                Ok(0)
            } else {
                Err(Errno::AGAIN)
            };
        }
        let n = buf.len().min(ring.data.len());
        let (front, back) = ring.data.as_slices();
        let first = n.min(front.len());
        buf[..first].copy_from_slice(&front[..first]);
        buf[first..n].copy_from_slice(&back[..n - first]);
        ring.data.drain(..n);
        drop(ring);
        self.reads.fetch_add(1, Ordering::Relaxed);
        self.sched.wake(self.drained);
        Ok(n)
    }

    /// Copies up to `buf.len()` bytes and leaves them there; 0 when it is empty and nobody can write.
    ///
    /// # Errors
    /// `EAGAIN` when it is empty.
    pub fn peek(&self, buf: &mut [u8]) -> Result<usize, Errno> {
        let ring = self.ring.lock();
        if ring.data.is_empty() && ring.writers > 0 && !buf.is_empty() {
            return Err(Errno::AGAIN);
        }
        let n = buf.len().min(ring.data.len());
        buf.iter_mut()
            .zip(&ring.data)
            .for_each(|(to, from)| *to = *from);
        Ok(n)
    }

    /// Adds bytes: all of them if they are at most [`PIPE_BUF`], else as many as fit.
    ///
    /// # Errors
    /// `EAGAIN` when there is no room, `EPIPE` when nobody can read.
    pub fn write_some(&self, buf: &[u8]) -> Result<usize, Errno> {
        let mut ring = self.ring.lock();
        if ring.readers == 0 {
            return Err(Errno::PIPE);
        }
        if buf.is_empty() {
            return Ok(0);
        }
        let room = ring.capacity.saturating_sub(ring.data.len());
        if room == 0 || (buf.len() <= PIPE_BUF && room < buf.len()) {
            return Err(Errno::AGAIN);
        }
        let n = buf.len().min(room);
        ring.data.extend(&buf[..n]);
        drop(ring);
        self.writes.fetch_add(1, Ordering::Relaxed);
        self.sched.wake(self.filled);
        Ok(n)
    }

    /// How many ends of a side there are.
    #[must_use]
    pub fn ends(&self, side: Side) -> usize {
        let ring = self.ring.lock();
        match side {
            Side::Read => ring.readers,
            Side::Write => ring.writers,
        }
    }

    /// How often a side was opened.
    #[must_use]
    pub fn opened(&self, side: Side) -> u64 {
        self.ring.lock().opened[side as usize]
    }

    /// Bytes in it.
    #[must_use]
    pub fn len(&self) -> usize {
        self.ring.lock().data.len()
    }

    /// Whether there is nothing to read.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes it can hold (`F_GETPIPE_SZ`).
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.ring.lock().capacity
    }

    /// Changes what it can hold (`F_SETPIPE_SZ`): at least `bytes`, rounded up to a power of two
    /// of pages. Gives the new capacity.
    ///
    /// # Errors
    /// `EPERM` above [`MAX_CAPACITY`] or when the machine's pipes have no room left, `EBUSY` if more
    /// is in it.
    pub fn set_capacity(&self, bytes: usize) -> Result<usize, Errno> {
        if bytes > MAX_CAPACITY {
            return Err(Errno::PERM);
        }
        let capacity = bytes.max(PIPE_BUF).next_power_of_two();
        let mut ring = self.ring.lock();
        if ring.data.len() > capacity {
            return Err(Errno::BUSY);
        }
        self.room.resize(ring.capacity, capacity)?;
        ring.capacity = capacity;
        drop(ring);
        self.sched.wake(self.drained);
        Ok(capacity)
    }

    /// What is woken when there is more to read.
    pub(in crate::linux) fn filled(&self) -> WaitKey {
        self.filled
    }

    /// What is woken when there is more room.
    pub(in crate::linux) fn drained(&self) -> WaitKey {
        self.drained
    }

    /// What the reading side is ready for.
    pub(in crate::linux) fn read_ready(&self) -> Ready {
        let ring = self.ring.lock();
        let mut ready = Ready::empty();
        if !ring.data.is_empty() {
            ready |= Ready::IN | Ready::RDNORM;
        }
        if ring.writers == 0 {
            ready |= Ready::HUP;
        }
        ready
    }

    /// What the writing side is ready for.
    pub(in crate::linux) fn write_ready(&self) -> Ready {
        let ring = self.ring.lock();
        let mut ready = Ready::empty();
        if ring.capacity.saturating_sub(ring.data.len()) >= PIPE_BUF {
            ready |= Ready::OUT | Ready::WRNORM;
        }
        if ring.readers == 0 {
            ready |= Ready::ERR;
        }
        ready
    }

    fn stat(&self) -> Stat {
        Stat {
            dev: PIPE_DEV,
            ino: self.id,
            nlink: 1,
            mode: 0o010_600,
            blksize: 4096,
            ..Stat::default()
        }
    }
}

impl Drop for Pipe {
    fn drop(&mut self) {
        self.room.release(self.ring.get_mut().capacity);
    }
}

#[cfg(test)]
mod tests;
