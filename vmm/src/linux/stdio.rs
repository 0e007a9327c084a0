//! Standard input, output and error: the host's descriptors 0 to 2 as files of the guest.
//!
//! The host's descriptions are shared with other processes of the host, so `O_NONBLOCK` is never
//! set on them. A read or write must still not block the worker: pipes and terminals are opened
//! anew for ourselves where the host allows it, else `RWF_NOWAIT` is asked for, else poll(2) is
//! asked first and little is written at a time.
//!
//! Known holes: closing a descriptor in the guest does not close the host's, so a reader at the
//! other end of a pipe sees the end only when the machine ends; where neither way of not blocking
//! works, another writer of the same pipe can make a worker wait.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::{IoSlice, IoSliceMut, ReadWriteFlags};

use super::Errno;
use super::call::{Wait, WaitKey};
use super::events::Events;
use super::file::{Description, File, O_APPEND, Ready, SharedOffset, Stat, Viewer};
use super::kernel::Kernel;
use super::process::{Fd, FdTable};
use super::saved::{Refused, SavedFile, Saver};
use super::sched::Sched;
use super::tty::host_job::in_background_of;
use super::tty::{Terminal, Tty};

/// `PIPE_BUF`: what a pipe that is ready takes without blocking.
const SMALL: usize = 4096;

/// What a guest gets of the host as its descriptors 0 to 2; what is not there, the guest has not open.
#[derive(Debug, Default)]
pub struct Given(pub [Option<OwnedFd>; 3]);

impl Given {
    /// Copies of this process's own.
    ///
    /// # Errors
    /// The host has no descriptor left.
    pub fn inherited() -> std::io::Result<Self> {
        Ok(Self([
            copy(rustix::stdio::stdin())?,
            copy(rustix::stdio::stdout())?,
            copy(rustix::stdio::stderr())?,
        ]))
    }
}

/// A copy of a descriptor; `None` if it is not open.
///
/// # Errors
/// The host has no descriptor left.
pub fn copy(fd: BorrowedFd<'_>) -> std::io::Result<Option<OwnedFd>> {
    match rustix::io::fcntl_dupfd_cloexec(fd, 3) {
        Ok(own) => Ok(Some(own)),
        Err(Errno::BADF) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

/// A guest's standard descriptors.
#[derive(Debug)]
pub struct Stdio {
    /// Descriptors 0 to 2, those that were given.
    pub files: FdTable,
    /// The terminal, if one of them is one.
    pub tty: Option<Arc<Tty>>,
    /// The thread that watches them.
    pub events: Arc<Events>,
}

/// Makes a guest's standard descriptors of what it is given. `events` watches what can block.
///
/// # Errors
/// The host does not say what they are.
pub fn open_all(given: Given, sched: &Arc<Sched>, events: &Arc<Events>) -> std::io::Result<Stdio> {
    let ends = Ends::new(given)?;
    let mut fds = ends.0.iter().flatten();
    let tty = fds.find_map(|end| Tty::of(end.fd.as_fd())).map(Arc::new);
    Ok(open_ends(&ends, (sched, events), tty))
}

/// The same of what other guests have too, without a terminal: one there is a stream. `events` watches what can block.
#[must_use]
pub fn open_shared(ends: &Ends, sched: &Arc<Sched>, events: &Arc<Events>) -> Stdio {
    open_ends(ends, (sched, events), None)
}

fn open_ends(
    ends: &Ends,
    (sched, events): (&Arc<Sched>, &Arc<Events>),
    tty: Option<Arc<Tty>>,
) -> Stdio {
    let mut files = FdTable::default();
    for (n, end) in (0..).zip(&ends.0) {
        let Some(end) = end else { continue };
        let file = open(end, n, (sched, events), tty.as_ref());
        let description = Description::new(file, end.flags);
        files.fds.insert(
            n,
            Fd {
                description,
                close_on_exec: false,
            },
        );
    }
    Stdio {
        files,
        tty,
        events: Arc::clone(events),
    }
}

/// What a guest gets of the host as its descriptors 0 to 2; what is not there, the guest has not open. Several guests may
/// get the same.
#[derive(Clone, Debug, Default)]
pub struct Ends(pub [Option<Arc<HostEnd>>; 3]);

impl Ends {
    /// Takes what is given.
    ///
    /// # Errors
    /// The host does not say what it is.
    pub fn new(given: Given) -> std::io::Result<Self> {
        let mut ends = Self::default();
        for (end, fd) in ends.0.iter_mut().zip(given.0) {
            *end = fd.map(HostEnd::new).transpose()?.map(Arc::new);
        }
        Ok(ends)
    }
}

/// A descriptor of the host that guests are given.
#[derive(Debug)]
pub struct HostEnd {
    fd: Arc<OwnedFd>,
    flags: u32,
    kind: EndKind,
    unblocked: Unblocked,
    /// The host refused `RWF_NOWAIT` on it.
    no_nowait: AtomicBool,
}

/// What a descriptor of the host is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum EndKind {
    /// A file with an offset.
    File,
    Terminal,
    /// A pipe, socket or another device.
    Stream,
}

impl HostEnd {
    /// Takes a descriptor.
    ///
    /// # Errors
    /// The host does not say what it is.
    pub fn new(fd: OwnedFd) -> std::io::Result<Self> {
        let kind = match FileType::from_raw_mode(rustix::fs::fstat(&fd)?.st_mode) {
            FileType::RegularFile | FileType::BlockDevice | FileType::Directory => EndKind::File,
            FileType::CharacterDevice if rustix::termios::isatty(&fd) => EndKind::Terminal,
            _ => EndKind::Stream,
        };
        let flags = rustix::fs::fcntl_getfl(&fd)?.bits() & (3 | O_APPEND | super::file::O_NONBLOCK);
        let own = match kind {
            EndKind::File => None,
            EndKind::Terminal | EndKind::Stream => reopen(&fd, flags),
        };
        let unblocked = match own {
            Some(_) => Unblocked::Own,
            None => Unblocked::Asked,
        };
        Ok(Self {
            fd: Arc::new(own.unwrap_or(fd)),
            flags,
            kind,
            unblocked,
            no_nowait: AtomicBool::new(false),
        })
    }
}

fn open(
    end: &Arc<HostEnd>,
    n: i32,
    (sched, events): (&Arc<Sched>, &Arc<Events>),
    tty: Option<&Arc<Tty>>,
) -> Arc<dyn File> {
    let io = || HostStream {
        end: Arc::clone(end),
        n,
        sched: Arc::clone(sched),
        events: Arc::clone(events),
        edges: AtomicU64::new(0),
    };
    match (end.kind, tty) {
        (EndKind::File, _) => Arc::new(HostFile {
            fd: Arc::clone(&end.fd),
            n,
            append: AtomicBool::new(end.flags & O_APPEND != 0),
        }),
        (EndKind::Terminal, Some(tty)) => Arc::new(Terminal::new(io(), Arc::clone(tty))),
        (EndKind::Terminal | EndKind::Stream, _) => Arc::new(io()),
    }
}

/// What stat(2) tells of a host descriptor.
pub(super) fn host_stat(fd: BorrowedFd<'_>) -> Result<Stat, Errno> {
    let s = rustix::fs::fstat(fd)?;
    let nsec = |n: u64| u32::try_from(n).unwrap_or(0);
    Ok(Stat {
        dev: s.st_dev,
        ino: s.st_ino,
        nlink: s.st_nlink,
        mode: s.st_mode,
        uid: s.st_uid,
        gid: s.st_gid,
        rdev: s.st_rdev,
        size: s.st_size.cast_unsigned(),
        blksize: s.st_blksize.cast_unsigned(),
        blocks: s.st_blocks.cast_unsigned(),
        atime: (s.st_atime, nsec(s.st_atime_nsec)),
        mtime: (s.st_mtime, nsec(s.st_mtime_nsec)),
        ctime: (s.st_ctime, nsec(s.st_ctime_nsec)),
    })
}

/// A regular file (or disk) the host gave us, with the offset it shares with others.
#[derive(Debug)]
pub struct HostFile {
    fd: Arc<OwnedFd>,
    n: i32,
    append: AtomicBool,
}

impl SharedOffset for HostFile {
    fn read_next(&self, buf: &mut [u8]) -> Result<usize, Errno> {
        retry(|| rustix::io::read(&self.fd, &mut *buf))
    }

    fn write_next(&self, buf: &[u8]) -> Result<usize, Errno> {
        if self.append.load(Ordering::Relaxed) {
            rustix::fs::seek(&self.fd, rustix::fs::SeekFrom::End(0))?;
        }
        retry(|| rustix::io::write(&self.fd, buf))
    }

    fn tell(&self) -> Result<u64, Errno> {
        rustix::fs::tell(&self.fd)
    }

    fn seek(&self, to: u64) -> Result<(), Errno> {
        rustix::fs::seek(&self.fd, rustix::fs::SeekFrom::Start(to))?;
        Ok(())
    }
}

impl File for HostFile {
    fn read(&self, _: &Kernel, offset: u64, buf: &mut [u8]) -> Result<usize, Errno> {
        retry(|| rustix::io::pread(&self.fd, &mut *buf, offset))
    }

    fn write(&self, _: &Kernel, offset: u64, buf: &[u8]) -> Result<usize, Errno> {
        retry(|| rustix::io::pwrite(&self.fd, buf, offset))
    }

    fn seekable(&self) -> bool {
        true
    }

    fn stat(&self, _: &Kernel) -> Result<Stat, Errno> {
        host_stat(self.fd.as_fd())
    }

    fn shared_offset(&self) -> Option<&dyn SharedOffset> {
        Some(self)
    }

    fn standard(&self) -> Option<i32> {
        Some(self.n)
    }

    fn truncate(&self, _: &Kernel, length: u64) -> Result<(), Errno> {
        rustix::fs::ftruncate(&self.fd, length)
    }

    fn sync(&self, _: &Kernel, data_only: bool) -> Result<(), Errno> {
        if data_only {
            rustix::fs::fdatasync(&self.fd)
        } else {
            rustix::fs::fsync(&self.fd)
        }
    }

    fn set_status(&self, flags: u32) -> Result<(), Errno> {
        self.append.store(flags & O_APPEND != 0, Ordering::Relaxed);
        Ok(())
    }

    fn name(&self, _: &Kernel) -> Vec<u8> {
        format!("host:[{}]", self.n).into_bytes()
    }

    fn saved(&self, _: &mut Saver<'_>) -> Result<SavedFile, Refused> {
        Ok(SavedFile::Stdio(self.n))
    }

    fn as_any(&self) -> &dyn std::any::Any {
        self
    }
}

/// Calls `f` until it is not interrupted by a signal.
fn retry(mut f: impl FnMut() -> Result<usize, Errno>) -> Result<usize, Errno> {
    loop {
        match f() {
            Err(Errno::INTR) => {}
            other => return other,
        }
    }
}

/// How a stream is kept from blocking.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Unblocked {
    /// The description is our own and has `O_NONBLOCK`.
    Own,
    /// It is the host's: every call says so, or poll(2) is asked first.
    Asked,
}

/// A pipe, socket or character device the host gave us.
#[derive(Debug)]
pub struct HostStream {
    end: Arc<HostEnd>,
    n: i32,
    sched: Arc<Sched>,
    events: Arc<Events>,
    edges: AtomicU64,
}

impl HostStream {
    /// The host's descriptor.
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.end.fd.as_fd()
    }

    fn poll(&self) -> PollFlags {
        let mut fds = [PollFd::new(&*self.end.fd, PollFlags::IN | PollFlags::OUT)];
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        loop {
            match poll(&mut fds, Some(&now)) {
                Ok(_) => return fds[0].revents(),
                Err(Errno::INTR) => {}
                Err(_) => return PollFlags::ERR,
            }
        }
    }

    /// What `transfer` gives, without blocking: with `RWF_NOWAIT` if the host can, else once
    /// poll(2) reports one of `when`.
    fn unblocked(
        &self,
        when: PollFlags,
        transfer: impl Fn(Option<ReadWriteFlags>) -> Result<usize, Errno>,
    ) -> Result<usize, Errno> {
        self.edges.fetch_add(1, Ordering::Relaxed);
        if self.end.unblocked == Unblocked::Own {
            return retry(|| transfer(None));
        }
        if !self.end.no_nowait.load(Ordering::Relaxed) {
            match retry(|| transfer(Some(ReadWriteFlags::NOWAIT))) {
                Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => {
                    self.end.no_nowait.store(true, Ordering::Relaxed);
                }
                other => return other,
            }
        }
        let over = PollFlags::HUP | PollFlags::ERR;
        if !self.poll().intersects(when | over) {
            return Err(Errno::AGAIN);
        }
        retry(|| transfer(None))
    }

    /// Reads what is there. In the background of the host's terminal, where a read would stop a program, nothing is: its reader
    /// waits until it is in the foreground, and can be frozen meanwhile.
    pub(super) fn read_some(&self, buf: &mut [u8]) -> Result<usize, Errno> {
        let read = self.read_once(buf);
        let terminal = self.end.kind == EndKind::Terminal;
        match read {
            Err(Errno::IO) if terminal && in_background_of(self.fd()) => Err(Errno::AGAIN),
            other => other,
        }
    }

    fn read_once(&self, buf: &mut [u8]) -> Result<usize, Errno> {
        let buf = std::cell::RefCell::new(buf);
        self.unblocked(PollFlags::IN, |flags| {
            let mut buf = buf.borrow_mut();
            match flags {
                Some(flags) => {
                    let mut parts = [IoSliceMut::new(&mut buf)];
                    rustix::io::preadv2(&*self.end.fd, &mut parts, u64::MAX, flags)
                }
                None => rustix::io::read(&*self.end.fd, &mut **buf),
            }
        })
    }

    /// Writes what fits.
    pub(super) fn write_some(&self, buf: &[u8]) -> Result<usize, Errno> {
        self.unblocked(PollFlags::OUT, |flags| match flags {
            Some(flags) => {
                rustix::io::pwritev2(&*self.end.fd, &[IoSlice::new(buf)], u64::MAX, flags)
            }
            None if self.end.unblocked == Unblocked::Own => rustix::io::write(&*self.end.fd, buf),
            None => rustix::io::write(&*self.end.fd, &buf[..buf.len().min(SMALL)]),
        })
    }

    /// What it is ready for.
    pub(super) fn ready_now(&self) -> Ready {
        let flags = self.poll();
        let mut ready = Ready::from_bits_truncate(flags.bits());
        ready.set(Ready::RDNORM, flags.contains(PollFlags::IN));
        ready.set(Ready::WRNORM, flags.contains(PollFlags::OUT));
        ready
    }

    /// Its number.
    pub(super) fn number(&self) -> i32 {
        self.n
    }

    /// The key a waiting thread is woken by, armed for `interest`.
    pub(super) fn arm(&self, interest: Ready, wait: &mut Wait) {
        let terminal = self.end.kind == EndKind::Terminal;
        self.events
            .arm(&self.sched, &self.end.fd, (interest, terminal));
        wait.keys.push(self.key());
    }

    /// The key without arming it.
    pub(super) fn key(&self) -> WaitKey {
        WaitKey::HostFd(self.end.fd.as_raw_fd())
    }

    /// Transfers so far: after one, a watcher must look again.
    pub(super) fn transfers(&self) -> u64 {
        self.edges.load(Ordering::Relaxed)
    }

    /// Bytes to read, if the host tells.
    pub(super) fn unread(&self) -> Option<usize> {
        let n = rustix::io::ioctl_fionread(&*self.end.fd).ok()?;
        usize::try_from(n).ok()
    }
}

/// Opens a pipe or terminal anew, for a description that nobody else has; `None` if the host
/// does not let us.
fn reopen(fd: &OwnedFd, flags: u32) -> Option<OwnedFd> {
    let kind = FileType::from_raw_mode(rustix::fs::fstat(fd).ok()?.st_mode);
    let is_tty = kind == FileType::CharacterDevice && rustix::termios::isatty(fd);
    if kind != FileType::Fifo && !is_tty {
        return None;
    }
    let access = OFlags::from_bits_truncate(flags & 3);
    let flags = access | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    rustix::fs::open(path, flags, Mode::empty()).ok()
}

impl File for HostStream {
    fn read(&self, _: &Kernel, _: u64, buf: &mut [u8]) -> Result<usize, Errno> {
        self.read_some(buf)
    }

    fn write(&self, _: &Kernel, _: u64, buf: &[u8]) -> Result<usize, Errno> {
        self.write_some(buf)
    }

    fn stat(&self, _: &Kernel) -> Result<Stat, Errno> {
        host_stat(self.end.fd.as_fd())
    }

    fn ready(&self, _: Viewer<'_>) -> Ready {
        self.ready_now()
    }

    fn wait_key(&self) -> Option<WaitKey> {
        Some(self.key())
    }

    fn watch(&self, _: Viewer<'_>, interest: Ready, wait: &mut Wait) {
        self.arm(interest, wait);
    }

    fn edges(&self) -> u64 {
        self.transfers()
    }

    fn readable_bytes(&self) -> Option<usize> {
        self.unread()
    }

    fn standard(&self) -> Option<i32> {
        Some(self.n)
    }

    fn name(&self, _: &Kernel) -> Vec<u8> {
        format!("pipe:[{}]", self.n).into_bytes()
    }

    fn saved(&self, _: &mut Saver<'_>) -> Result<SavedFile, Refused> {
        Ok(SavedFile::Stdio(self.n))
    }

    fn as_any(&self) -> &dyn std::any::Any {
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn streams(unblocked: Unblocked) -> (HostStream, HostStream) {
        let (r, w) = rustix::pipe::pipe().unwrap();
        let mut ends = [r, w].map(|fd| HostEnd::new(fd).unwrap());
        assert!(ends.iter().all(|end| end.unblocked == Unblocked::Own));
        if unblocked == Unblocked::Asked {
            let (reader, writer) = rustix::pipe::pipe().unwrap();
            for (end, fd) in ends.iter_mut().zip([reader, writer]) {
                (end.fd, end.unblocked) = (Arc::new(fd), unblocked);
            }
        }
        let [r, w] = ends.map(|end| HostStream {
            end: Arc::new(end),
            n: 0,
            sched: Arc::default(),
            events: Arc::new(Events::new().expect("a descriptor")),
            edges: AtomicU64::new(0),
        });
        (r, w)
    }

    #[test]
    fn empty_and_full_pipes_give_eagain() {
        for unblocked in [Unblocked::Own, Unblocked::Asked] {
            let (r, w) = streams(unblocked);
            let mut buf = [0; 100];
            assert_eq!(r.read_some(&mut buf), Err(Errno::AGAIN));
            while w.write_some(&[1; 10_000]).is_ok() {}
            assert_eq!(w.write_some(&[1; 10_000]), Err(Errno::AGAIN));
            assert_eq!(r.read_some(&mut buf), Ok(100));
        }
    }

    #[test]
    fn pipe_without_nowait_is_asked_by_poll() {
        let (r, w) = streams(Unblocked::Asked);
        r.end.no_nowait.store(true, Ordering::Relaxed);
        w.end.no_nowait.store(true, Ordering::Relaxed);
        let mut buf = [0; 8];
        assert_eq!(r.read_some(&mut buf), Err(Errno::AGAIN));
        assert_eq!(w.write_some(&[1; 10_000]), Ok(SMALL));
        assert_eq!(r.read_some(&mut buf), Ok(8));
        while w.write_some(&[1; 10_000]).is_ok() {}
        assert_eq!(w.write_some(&[1; 1]), Err(Errno::AGAIN));
    }

    #[test]
    fn closed_ends_give_end_of_file_and_epipe() {
        let (r, w) = streams(Unblocked::Asked);
        drop(w);
        assert_eq!(r.read_some(&mut [0; 8]), Ok(0));
        assert!(r.ready_now().contains(Ready::HUP));
        let (r, w) = streams(Unblocked::Asked);
        drop(r);
        assert_eq!(w.write_some(b"x"), Err(Errno::PIPE));
    }

    #[test]
    fn inherited_file_advances_the_shared_offset() {
        let file = tempfile::tempfile().unwrap();
        let other = file.try_clone().unwrap();
        let ours = HostFile {
            fd: Arc::new(file.into()),
            n: 1,
            append: AtomicBool::new(false),
        };
        assert_eq!(ours.write_next(b"first"), Ok(5));
        assert_eq!(rustix::fs::tell(&other), Ok(5));
        assert_eq!(rustix::io::write(&other, b"+"), Ok(1));
        assert_eq!(ours.write_next(b"second"), Ok(6));
        assert_eq!(ours.tell(), Ok(12));
    }
}
