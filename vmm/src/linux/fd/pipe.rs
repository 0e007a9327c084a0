//! Pipes: a ring buffer between a reading and a writing end (pipe(7)).
//!
//! The ends are files of their own. How many there are is counted by making and dropping the end
//! objects: `dup` and `fork` share one description and therefore one end.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::super::Errno;
use super::super::call::{Arg, Args, Ctx, Entry, Stop, SysResult, WaitKey};
use super::super::file::{Description, File, O_NONBLOCK, Ready, Stat};
use super::super::kernel::Kernel;
use super::super::sched::Sched;
use super::table::O_CLOEXEC;
use crate::locks::{Mutex, rank};

/// Writes of up to this many bytes are atomic (limits.h).
pub const PIPE_BUF: usize = 4096;
/// Bytes a new pipe holds.
pub const DEFAULT_CAPACITY: usize = 64 << 10;
/// Bytes an unprivileged process may make it hold (`/proc/sys/fs/pipe-max-size`).
pub const MAX_CAPACITY: usize = 1 << 20;
/// `O_DIRECT`: packet mode, which is not offered.
const O_DIRECT: u32 = 0o40_000;
/// Major and minor of the anonymous device that pipes are on.
const PIPE_DEV: u64 = 0xe;

/// The calls of this file.
pub const TABLE: &[Entry] = &[
    Entry {
        nr: 22,
        name: "pipe",
        args: &[Arg::Hex],
        handler: sys_pipe,
    },
    Entry {
        nr: 293,
        name: "pipe2",
        args: &[Arg::Hex, Arg::Hex],
        handler: sys_pipe2,
    },
];

/// Pipes a machine may have; more gives `ENFILE`.
pub const MAX_PIPES: usize = 16_384;
/// Bytes the pipes of a machine may hold together before new ones hold [`PIPE_BUF`] only and none
/// can be enlarged, as with Linux's `/proc/sys/fs/pipe-user-pages-soft`.
pub const SOFT_ROOM: usize = 64 << 20;

/// What the pipes of a machine use together: a guest cannot make the VMM grow beyond
/// [`SOFT_ROOM`] and [`MAX_PIPES`] times [`PIPE_BUF`] by opening them.
#[derive(Debug, Default)]
pub struct PipeRoom {
    used: Mutex<rank::PipeBudget, Used>,
}

#[derive(Debug, Default)]
struct Used {
    pipes: usize,
    bytes: usize,
}

impl PipeRoom {
    /// Room for a new pipe: what it may hold.
    fn admit(&self) -> Result<usize, Errno> {
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
    fn resize(&self, old: usize, new: usize) -> Result<(), Errno> {
        let mut used = self.used.lock();
        let bytes = used.bytes - old + new;
        if new > old && bytes > SOFT_ROOM {
            return Err(Errno::PERM);
        }
        used.bytes = bytes;
        Ok(())
    }

    fn release(&self, capacity: usize) {
        let mut used = self.used.lock();
        used.pipes -= 1;
        used.bytes -= capacity;
    }
}

#[derive(Debug)]
struct Ring {
    data: VecDeque<u8>,
    capacity: usize,
    readers: usize,
    writers: usize,
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

/// The reading end.
#[derive(Debug)]
pub struct ReadEnd(Arc<Pipe>);

/// The writing end.
#[derive(Debug)]
pub struct WriteEnd(Arc<Pipe>);

impl Pipe {
    /// A pipe without ends, for a FIFO: see [`Pipe::reader`] and [`Pipe::writer`].
    ///
    /// # Errors
    /// `ENFILE` when the machine has [`MAX_PIPES`].
    pub fn new(sched: &Arc<Sched>, room: &Arc<PipeRoom>) -> Result<Arc<Self>, Errno> {
        static NEXT_ID: AtomicU64 = AtomicU64::new(1);
        let capacity = room.admit()?;
        Ok(Arc::new(Self {
            ring: Mutex::new(Ring {
                data: VecDeque::new(),
                capacity,
                readers: 0,
                writers: 0,
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
    pub fn pair(
        sched: &Arc<Sched>,
        room: &Arc<PipeRoom>,
    ) -> Result<(Arc<ReadEnd>, Arc<WriteEnd>), Errno> {
        let pipe = Self::new(sched, room)?;
        Ok((pipe.reader(), pipe.writer()))
    }

    /// A new reading end.
    #[must_use]
    pub fn reader(self: &Arc<Self>) -> Arc<ReadEnd> {
        self.ring.lock().readers += 1;
        self.sched.wake(self.drained);
        Arc::new(ReadEnd(Arc::clone(self)))
    }

    /// A new writing end.
    #[must_use]
    pub fn writer(self: &Arc<Self>) -> Arc<WriteEnd> {
        self.ring.lock().writers += 1;
        self.sched.wake(self.filled);
        Arc::new(WriteEnd(Arc::clone(self)))
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

    /// Its number, shown by `/proc/PID/fd`.
    pub(super) fn id(&self) -> u64 {
        self.id
    }

    /// What is woken when there is more to read.
    pub(super) fn filled(&self) -> WaitKey {
        self.filled
    }

    /// What is woken when there is more room.
    pub(super) fn drained(&self) -> WaitKey {
        self.drained
    }

    /// What the reading side is ready for.
    pub(super) fn read_ready(&self) -> Ready {
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
    pub(super) fn write_ready(&self) -> Ready {
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

impl ReadEnd {
    /// The pipe.
    #[must_use]
    pub fn pipe(&self) -> &Arc<Pipe> {
        &self.0
    }
}

impl WriteEnd {
    /// The pipe.
    #[must_use]
    pub fn pipe(&self) -> &Arc<Pipe> {
        &self.0
    }
}

impl Drop for Pipe {
    fn drop(&mut self) {
        self.room.release(self.ring.get_mut().capacity);
    }
}

impl Drop for ReadEnd {
    fn drop(&mut self) {
        let mut ring = self.0.ring.lock();
        ring.readers -= 1;
        let last = ring.readers == 0;
        drop(ring);
        if last {
            self.0.reads.fetch_add(1, Ordering::Relaxed);
            self.0.sched.wake(self.0.drained);
        }
    }
}

impl Drop for WriteEnd {
    fn drop(&mut self) {
        let mut ring = self.0.ring.lock();
        ring.writers -= 1;
        let last = ring.writers == 0;
        drop(ring);
        if last {
            self.0.writes.fetch_add(1, Ordering::Relaxed);
            self.0.sched.wake(self.0.filled);
        }
    }
}

impl File for ReadEnd {
    fn read(&self, _: &Kernel, _: u64, buf: &mut [u8]) -> Result<usize, Errno> {
        self.0.read_some(buf)
    }

    fn write(&self, _: &Kernel, _: u64, _: &[u8]) -> Result<usize, Errno> {
        Err(Errno::BADF)
    }

    fn stat(&self, _: &Kernel) -> Result<Stat, Errno> {
        Ok(self.0.stat())
    }

    fn ready(&self, _: &Kernel) -> Ready {
        self.0.read_ready()
    }

    fn wait_key(&self) -> Option<WaitKey> {
        Some(self.0.filled)
    }

    fn edges(&self) -> u64 {
        self.0.writes.load(Ordering::Relaxed)
    }

    fn readable_bytes(&self) -> Option<usize> {
        Some(self.0.len())
    }

    fn name(&self, _: &Kernel) -> Vec<u8> {
        format!("pipe:[{}]", self.0.id).into_bytes()
    }

    fn as_any(&self) -> &dyn std::any::Any {
        self
    }
}

impl File for WriteEnd {
    fn read(&self, _: &Kernel, _: u64, _: &mut [u8]) -> Result<usize, Errno> {
        Err(Errno::BADF)
    }

    fn write(&self, _: &Kernel, _: u64, buf: &[u8]) -> Result<usize, Errno> {
        self.0.write_some(buf)
    }

    fn stat(&self, _: &Kernel) -> Result<Stat, Errno> {
        Ok(self.0.stat())
    }

    fn ready(&self, _: &Kernel) -> Ready {
        self.0.write_ready()
    }

    fn wait_key(&self) -> Option<WaitKey> {
        Some(self.0.drained)
    }

    fn edges(&self) -> u64 {
        self.0.reads.load(Ordering::Relaxed)
    }

    fn readable_bytes(&self) -> Option<usize> {
        Some(self.0.len())
    }

    fn name(&self, _: &Kernel) -> Vec<u8> {
        format!("pipe:[{}]", self.0.id).into_bytes()
    }

    fn as_any(&self) -> &dyn std::any::Any {
        self
    }
}

/// The pipe behind a file that is an end of one.
#[must_use]
pub fn of(file: &dyn File) -> Option<&Arc<Pipe>> {
    let any = file.as_any();
    any.downcast_ref::<ReadEnd>()
        .map(|end| &end.0)
        .or_else(|| any.downcast_ref::<WriteEnd>().map(|end| &end.0))
}

fn sys_pipe(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    make(c, a.u64(0), 0)
}

fn sys_pipe2(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    make(c, a.u64(0), a.u32(1))
}

fn make(c: &Ctx<'_>, at: u64, flags: u32) -> SysResult {
    if flags & !(O_CLOEXEC | O_NONBLOCK | O_DIRECT) != 0 || flags & O_DIRECT != 0 {
        return Err(Errno::INVAL.into());
    }
    let status = flags & O_NONBLOCK;
    let (reader, writer) = Pipe::pair(&c.k.sched, &c.k.io.pipes)?;
    let pair = [
        Description::new(reader, status),
        Description::new(writer, status | 1),
    ];
    let fds = c.add_fd_pair(pair, flags & O_CLOEXEC != 0)?;
    store_pair(c, at, fds)
}

/// Stores two new descriptors in guest memory; on failure they are closed again.
pub(super) fn store_pair(c: &Ctx<'_>, at: u64, fds: [i32; 2]) -> SysResult {
    c.mem().write_obj(at, &fds).map_err(|errno| {
        fds.into_iter().for_each(|fd| drop(c.remove_fd(fd)));
        Stop::Errno(errno)
    })?;
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> (Arc<ReadEnd>, Arc<WriteEnd>) {
        Pipe::pair(&Arc::new(Sched::default()), &Arc::default()).unwrap()
    }

    #[test]
    fn written_bytes_come_out_in_order() {
        let (r, w) = pair();
        assert_eq!(w.0.write_some(b"hello "), Ok(6));
        assert_eq!(w.0.write_some(b"world"), Ok(5));
        let mut buf = [0; 8];
        assert_eq!(r.0.read_some(&mut buf), Ok(8));
        assert_eq!(&buf, b"hello wo");
        assert_eq!(r.0.read_some(&mut buf), Ok(3));
        assert_eq!(r.0.read_some(&mut buf), Err(Errno::AGAIN));
    }

    #[test]
    fn last_writer_gone_gives_rest_then_end_of_file() {
        let (r, w) = pair();
        assert_eq!(w.0.write_some(b"x"), Ok(1));
        drop(w);
        assert_eq!(r.0.read_ready(), Ready::IN | Ready::RDNORM | Ready::HUP);
        let mut buf = [0; 8];
        assert_eq!(r.0.read_some(&mut buf), Ok(1));
        assert_eq!(r.0.read_some(&mut buf), Ok(0));
        assert_eq!(r.0.read_ready(), Ready::HUP);
    }

    #[test]
    fn last_reader_gone_gives_epipe_and_pollerr() {
        let (r, w) = pair();
        drop(r);
        assert_eq!(w.0.write_some(b"x"), Err(Errno::PIPE));
        assert_eq!(w.0.write_ready(), Ready::OUT | Ready::WRNORM | Ready::ERR);
    }

    #[test]
    fn small_write_is_all_or_nothing_and_large_is_partial() {
        let (r, w) = pair();
        assert_eq!(
            w.0.write_some(&vec![1; DEFAULT_CAPACITY - 10]),
            Ok(DEFAULT_CAPACITY - 10)
        );
        assert_eq!(w.0.write_some(&[2; 11]), Err(Errno::AGAIN));
        assert_eq!(w.0.write_ready(), Ready::empty());
        assert_eq!(w.0.write_some(&[2; PIPE_BUF + 1]), Ok(10));
        assert_eq!(w.0.write_some(&[2; 1]), Err(Errno::AGAIN));
        let mut buf = [0; PIPE_BUF];
        assert_eq!(r.0.read_some(&mut buf), Ok(PIPE_BUF));
        assert_eq!(w.0.write_ready(), Ready::OUT | Ready::WRNORM);
    }

    #[test]
    fn pipes_of_a_machine_share_a_bounded_room() {
        let (sched, room) = (Arc::new(Sched::default()), Arc::default());
        let mut pipes = Vec::new();
        while let Ok(pair) = Pipe::pair(&sched, &room) {
            pipes.push(pair);
        }
        assert_eq!(pipes.len(), MAX_PIPES);
        assert_eq!(pipes[0].0.0.capacity(), DEFAULT_CAPACITY);
        assert_eq!(pipes[MAX_PIPES - 1].0.0.capacity(), PIPE_BUF);
        assert_eq!(pipes[0].0.0.set_capacity(MAX_CAPACITY), Err(Errno::PERM));
        assert!(room.used.lock().bytes <= SOFT_ROOM + MAX_PIPES * PIPE_BUF);
        pipes.clear();
        let used = room.used.lock();
        assert_eq!((used.pipes, used.bytes), (0, 0));
    }

    #[test]
    fn capacity_is_rounded_and_bounded() {
        let (_r, w) = pair();
        assert_eq!(w.0.set_capacity(1), Ok(4096));
        assert_eq!(w.0.set_capacity(5000), Ok(8192));
        assert_eq!(w.0.write_some(&[0; 8192]), Ok(8192));
        assert_eq!(w.0.set_capacity(4096), Err(Errno::BUSY));
        assert_eq!(w.0.set_capacity(MAX_CAPACITY + 1), Err(Errno::PERM));
    }

    #[test]
    fn writing_moves_the_readers_edge() {
        let (r, w) = pair();
        let before = r.edges();
        assert_eq!(w.0.write_some(b"a"), Ok(1));
        assert_ne!(r.edges(), before);
    }
}
