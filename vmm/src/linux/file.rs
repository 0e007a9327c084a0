//! Open files: the description a descriptor refers to, and the one trait every kind of file
//! implements.

use std::fmt::Debug;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use serde::{Deserialize, Serialize};

use rustix::io::Errno;

use super::call::{Ctx, Stop, SysResult, Wait, WaitKey};
use super::kernel::Kernel;
use super::offset::Offset;
use super::process::Pid;
use super::thread::Tid;
use crate::locks::{Mutex, rank};
use crate::memory::Backing;

bitflags::bitflags! {
    /// Readiness, with the values of `poll(2)`.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Ready: u16 {
        /// There is data to read, or end of file.
        const IN = 0x001;
        /// Urgent data (never reported).
        const PRI = 0x002;
        /// Writing will not block.
        const OUT = 0x004;
        /// Error; for a pipe's write end: no reader left.
        const ERR = 0x008;
        /// The other side hung up.
        const HUP = 0x010;
        /// Not an open descriptor.
        const NVAL = 0x020;
        /// As `IN`.
        const RDNORM = 0x040;
        /// As `OUT`.
        const WRNORM = 0x100;
        /// The peer closed its writing side.
        const RDHUP = 0x2000;
    }
}

/// A place in the guest's file tree: a mount and a path inside it, free of symbolic links, `.` and
/// `..`. Data, not a host descriptor.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Location {
    /// Index into the machine's mounts.
    pub mount: usize,
    /// Path relative to the mount's root, without a leading slash; empty for the root itself.
    pub path: Vec<u8>,
}

/// What stat(2) tells, in the layout of the x86-64 `struct stat`'s fields.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "named as in stat(2)")]
pub struct Stat {
    pub dev: u64,
    pub ino: u64,
    pub nlink: u64,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub rdev: u64,
    pub size: u64,
    pub blksize: u64,
    pub blocks: u64,
    pub atime: (i64, u32),
    pub mtime: (i64, u32),
    pub ctime: (i64, u32),
}

/// An entry getdents64(2) returns.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DirEntry {
    /// Inode number.
    pub ino: u64,
    /// `DT_*`.
    pub kind: u8,
    /// Name.
    pub name: Vec<u8>,
}

/// A time to set (utimensat(2)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SetTime {
    /// `UTIME_OMIT`.
    Keep,
    /// `UTIME_NOW`.
    Now,
    /// Seconds and nanoseconds since the epoch.
    At(i64, u32),
}

/// A change of a file's attributes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// chmod(2): the permission bits.
    Mode(u32),
    /// chown(2): `None` leaves an id as it is.
    Owner(Option<u32>, Option<u32>),
    /// Access and modification time.
    Times(SetTime, SetTime),
}

/// Who looks whether a file is ready: a signalfd(2) shows each process its own signals.
#[derive(Clone, Copy)]
pub struct Viewer<'a> {
    /// The machine-wide state.
    pub k: &'a Kernel,
    /// The process.
    pub pid: Pid,
    /// Its thread.
    pub tid: Tid,
}

/// An open file of some kind. Methods never block: `EAGAIN` says that the caller would have to
/// wait for [`File::wait_key`]. No method touches guest memory except [`File::ioctl`].
pub trait File: Debug + Send + Sync {
    /// Reads at `offset` (ignored by streams) into `buf`; 0 at the end.
    ///
    /// # Errors
    /// `EAGAIN` when it would block, `EBADF`, `EISDIR`, `EINVAL`, or the host's.
    fn read(&self, k: &Kernel, offset: u64, buf: &mut [u8]) -> Result<usize, Errno> {
        let _ = (k, offset, buf);
        Err(Errno::INVAL)
    }

    /// Writes at `offset` (ignored by streams and in append mode).
    ///
    /// # Errors
    /// `EAGAIN` when it would block, `EPIPE`, `EBADF`, `EINVAL`, or the host's.
    fn write(&self, k: &Kernel, offset: u64, buf: &[u8]) -> Result<usize, Errno> {
        let _ = (k, offset, buf);
        Err(Errno::INVAL)
    }

    /// Whether it has an offset (lseek(2), pread(2)); streams have none and give `ESPIPE`.
    fn seekable(&self) -> bool {
        false
    }

    /// Whether lseek(2) moves the offset: devices without content stay at 0 wherever they are sent.
    fn moves(&self) -> bool {
        self.seekable()
    }

    /// What stat(2) tells of it.
    ///
    /// # Errors
    /// The host's.
    fn stat(&self, k: &Kernel) -> Result<Stat, Errno>;

    /// What it is ready for now, for who looks.
    fn ready(&self, by: Viewer<'_>) -> Ready {
        let _ = by;
        Ready::IN | Ready::OUT | Ready::RDNORM | Ready::WRNORM
    }

    /// What is woken when [`File::ready`] may have changed. `None`: it is always ready.
    fn wait_key(&self) -> Option<WaitKey> {
        None
    }

    /// Adds to `wait` what must be watched for [`File::ready`] to gain any of `interest`: keys, and
    /// an earlier deadline if time alone makes it ready. Called just before the thread parks.
    fn watch(&self, by: Viewer<'_>, interest: Ready, wait: &mut Wait) {
        let _ = (by, interest);
        wait.keys.extend(self.wait_key());
    }

    /// What open(2) must still wait for before it is complete: the other side of a FIFO.
    fn unopened(&self) -> Option<WaitKey> {
        None
    }

    /// The pipe behind it, if it is an end of one (`F_SETPIPE_SZ`).
    fn pipe(&self) -> Option<&Arc<super::fd::pipe::Pipe>> {
        None
    }

    /// What it is if it gives the reader's own signals (signalfd(2)): these are not a stream of bytes.
    fn signals(&self) -> Option<&super::signal::descriptor::SignalFd> {
        None
    }

    /// Counts what an edge-triggered watcher must look at again (epoll(7)): it reports a file that
    /// stays ready once for each value.
    fn edges(&self) -> u64 {
        0
    }

    /// Bytes that can be read without blocking (`FIONREAD`), for streams that know.
    fn readable_bytes(&self) -> Option<usize> {
        None
    }

    /// Nanoseconds a read waits before it gives 0 bytes (a terminal with `VMIN` 0); `None`: it
    /// waits for data.
    fn read_timeout(&self) -> Option<u64> {
        None
    }

    /// Whether the calling process may read or write now: the job control rules of a terminal.
    ///
    /// # Errors
    /// `EIO`, or a stop while the caller's group has been sent `SIGTTIN` or `SIGTTOU`.
    fn admit(&self, c: &mut Ctx<'_>, writing: bool) -> Result<(), Stop> {
        let _ = (c, writing);
        Ok(())
    }

    /// The offset, where the host keeps it: an inherited regular file shares it with the host's
    /// processes, and [`Description::offset`] is not used.
    fn shared_offset(&self) -> Option<&dyn SharedOffset> {
        None
    }

    /// The host's descriptor that the VMM was started with, if it is one: 0 to 2.
    fn standard(&self) -> Option<i32> {
        None
    }

    /// A device's own calls.
    ///
    /// # Errors
    /// `ENOTTY` unless the kind knows the request.
    fn ioctl(&self, c: &mut Ctx<'_>, request: u32, arg: u64) -> SysResult {
        let _ = (c, request, arg);
        Err(Stop::Errno(Errno::NOTTY))
    }

    /// All entries of a directory, `.` and `..` included, in a stable order: the description's
    /// offset is an index into it.
    ///
    /// # Errors
    /// `ENOTDIR`, or the host's.
    fn entries(&self, k: &Kernel) -> Result<Vec<DirEntry>, Errno> {
        let _ = k;
        Err(Errno::NOTDIR)
    }

    /// Sets the length.
    ///
    /// # Errors
    /// `EINVAL` unless it is a file open for writing, or the host's.
    fn truncate(&self, k: &Kernel, length: u64) -> Result<(), Errno> {
        let _ = (k, length);
        Err(Errno::INVAL)
    }

    /// fsync(2), fdatasync(2).
    ///
    /// # Errors
    /// `EINVAL` for what cannot be synchronised, or the host's.
    fn sync(&self, k: &Kernel, data_only: bool) -> Result<(), Errno> {
        let _ = (k, data_only);
        Err(Errno::INVAL)
    }

    /// fallocate(2), with its mode bits.
    ///
    /// # Errors
    /// `ENODEV`, `EOPNOTSUPP`, or the host's.
    fn allocate(&self, k: &Kernel, mode: u32, offset: u64, length: u64) -> Result<(), Errno> {
        let _ = (k, mode, offset, length);
        Err(Errno::NODEV)
    }

    /// Changes attributes (fchmod(2), fchown(2), futimens(3)).
    ///
    /// # Errors
    /// `EPERM` for what has none that can be changed, or the host's.
    fn change(&self, k: &Kernel, change: &Change) -> Result<(), Errno> {
        let _ = (k, change);
        Err(Errno::PERM)
    }

    /// The status flags changed (`O_APPEND`, `O_NONBLOCK`).
    ///
    /// # Errors
    /// The host's.
    fn set_status(&self, flags: u32) -> Result<(), Errno> {
        let _ = flags;
        Ok(())
    }

    /// What a mapping of it shows.
    ///
    /// # Errors
    /// `ENODEV` if it cannot be mapped, `EACCES`.
    fn mapping(&self, k: &Kernel) -> Result<Backing, Errno> {
        let _ = k;
        Err(Errno::NODEV)
    }

    /// What may not be done to it any more (`F_GET_SEALS`).
    ///
    /// # Errors
    /// `EINVAL` for what cannot have seals.
    fn seals(&self) -> Result<super::fs::Seals, Errno> {
        Err(Errno::INVAL)
    }

    /// Adds seals; the description may write.
    ///
    /// # Errors
    /// `EINVAL`, `EPERM`, or `EBUSY` while a mapping may be stored to.
    fn seal(&self, more: super::fs::Seals) -> Result<(), Errno> {
        let _ = more;
        Err(Errno::INVAL)
    }

    /// Where it is in the file tree; `None` for what has no name.
    fn location(&self) -> Option<Location> {
        None
    }

    /// What `/proc/PID/fd/N` shows, e.g. `pipe:[12]` or a path.
    fn name(&self, k: &Kernel) -> Vec<u8>;

    /// It as data, from which it can be made again. The guest is stopped.
    ///
    /// # Errors
    /// It could not be opened again.
    fn saved(
        &self,
        s: &mut super::saved::Saver<'_>,
    ) -> Result<super::saved::SavedFile, super::saved::Refused>;

    /// The kind as the one it is, for calls that work on one kind only.
    fn as_any(&self) -> &dyn std::any::Any;
}

/// Reading, writing and seeking at an offset that the host keeps.
pub trait SharedOffset {
    /// Reads at the offset and advances it.
    ///
    /// # Errors
    /// The host's.
    fn read_next(&self, buf: &mut [u8]) -> Result<usize, Errno>;

    /// Writes at the offset (or the end, in append mode) and advances it.
    ///
    /// # Errors
    /// The host's.
    fn write_next(&self, buf: &[u8]) -> Result<usize, Errno>;

    /// The offset.
    ///
    /// # Errors
    /// The host's.
    fn tell(&self) -> Result<u64, Errno>;

    /// Moves it.
    ///
    /// # Errors
    /// The host's.
    fn seek(&self, to: u64) -> Result<(), Errno>;
}

/// An open file description (open(2)): shared by `dup` and `fork`, with *our* offset.
#[derive(Debug)]
pub struct Description {
    /// The file.
    pub file: Arc<dyn File>,
    /// Access mode and status flags (`O_ACCMODE | O_APPEND | O_NONBLOCK | ...`).
    flags: AtomicU32,
    /// The offset. Locked while a read or write that uses it is under way (POSIX: atomic).
    pub offset: Offset,
    /// The flock(2) lock it holds; given up when the last reference goes.
    pub flock: Mutex<rank::FlockHeld, Option<super::fs::FlockGuard>>,
}

/// `O_NONBLOCK`.
pub const O_NONBLOCK: u32 = 0o4000;
/// `O_APPEND`.
pub const O_APPEND: u32 = 0o2000;
/// `O_PATH`.
pub const O_PATH: u32 = 0o10_000_000;

impl Description {
    /// A new description at offset 0.
    #[must_use]
    pub fn new(file: Arc<dyn File>, flags: u32) -> Arc<Self> {
        Arc::new(Self {
            file,
            flags: AtomicU32::new(flags),
            offset: Offset::default(),
            flock: Mutex::new(None),
        })
    }

    /// Access mode and status flags.
    #[must_use]
    pub fn flags(&self) -> u32 {
        self.flags.load(Ordering::Relaxed)
    }

    /// Replaces them (fcntl(2) `F_SETFL`; the caller has kept what may not change).
    pub fn set_flags(&self, flags: u32) {
        self.flags.store(flags, Ordering::Relaxed);
    }

    /// Whether it may be read.
    #[must_use]
    pub fn readable(&self) -> bool {
        let flags = self.flags();
        flags & O_PATH == 0 && flags & 3 != 1
    }

    /// Whether it may be written.
    #[must_use]
    pub fn writable(&self) -> bool {
        let flags = self.flags();
        flags & O_PATH == 0 && flags & 3 != 0
    }
}

impl Ctx<'_> {
    /// The calling thread, as one who looks at files.
    #[must_use]
    pub fn viewer(&self) -> Viewer<'_> {
        Viewer {
            k: self.k,
            pid: self.t.pid,
            tid: self.t.tid,
        }
    }

    /// The description behind descriptor `fd` of the calling process.
    ///
    /// # Errors
    /// `EBADF`.
    pub fn file(&self, fd: i32) -> Result<Arc<Description>, Errno> {
        self.with_process(|p| p.files.fds.get(&fd).map(|f| Arc::clone(&f.description)))
            .ok_or(Errno::BADF)
    }
}
