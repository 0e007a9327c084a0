//! An open regular file of the host.

use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use rustix::fs::{FallocateFlags, OFlags};
use rustix::io::Errno;

use crate::linux::file::{Change, File, Location, O_APPEND, Stat};
use crate::linux::fs::memfs;
use crate::linux::fs::saved::{SavedHostFile, SavedMemFile};
use crate::linux::kernel::Kernel;
use crate::linux::saved::content::SavedContent;
use crate::linux::saved::error::shown;
use crate::linux::saved::tables::InodeIx;
use crate::linux::saved::{Refused, SavedFile, Saver};
use crate::memory::{Backing, Content, FileId, MappedFile, Version};

/// A host file, open. Its descriptor is ours alone: reads and writes name their offset.
#[derive(Debug)]
pub(in crate::linux::fs) struct HostFile {
    content: Arc<HostContent>,
}

#[derive(Debug)]
struct HostContent {
    fd: Arc<OwnedFd>,
    identity: (u64, u64),
    at: Location,
    path: Vec<u8>,
}

impl Content for HostContent {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> std::io::Result<usize> {
        let mut done = 0;
        while done < buf.len() {
            match rustix::io::pread(&*self.fd, &mut buf[done..], offset + done as u64) {
                Ok(0) => break,
                Ok(n) => done += n,
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(done)
    }

    fn write_at(&self, offset: u64, buf: &[u8]) -> std::io::Result<()> {
        // On Linux a positioned write to a file open for appending goes to its end.
        if rustix::fs::fcntl_getfl(&*self.fd)?.contains(OFlags::APPEND) {
            let own = rustix::io::fcntl_dupfd_cloexec(&*self.fd, 0)?;
            let path = format!("/proc/self/fd/{}", own.as_raw_fd());
            let file = std::fs::OpenOptions::new().write(true).open(path)?;
            return file.write_all_at(buf, offset);
        }
        let mut done = 0;
        while done < buf.len() {
            match rustix::io::pwrite(&*self.fd, &buf[done..], offset + done as u64) {
                Ok(0) => return Err(std::io::ErrorKind::WriteZero.into()),
                Ok(n) => done += n,
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn sync(&self) -> std::io::Result<()> {
        Ok(rustix::fs::fdatasync(&*self.fd)?)
    }

    fn version(&self) -> std::io::Result<Version> {
        let stat = rustix::fs::fstat(&*self.fd)?;
        Ok(Version {
            size: u64::try_from(stat.st_size).unwrap_or(0),
            changed: [
                (stat.st_mtime, stat.st_mtime_nsec as i64),
                (stat.st_ctime, stat.st_ctime_nsec as i64),
            ],
        })
    }

    fn id(&self) -> FileId {
        let (dev, ino) = self.identity;
        FileId::Host { dev, ino }
    }

    fn keeps(&self) -> bool {
        rustix::fs::fstat(&*self.fd).is_ok_and(|stat| stat.st_nlink > 0)
    }

    fn identity(&self) -> (u64, u64) {
        self.identity
    }

    fn path(&self) -> Vec<u8> {
        self.path.clone()
    }

    fn as_any(self: Arc<Self>) -> Arc<dyn std::any::Any + Send + Sync> {
        self
    }
}

/// A mapped file of the host as data; `None` if it is not one.
pub(in crate::linux) fn saved_content(
    content: &Arc<dyn std::any::Any + Send + Sync>,
    s: &mut Saver<'_>,
) -> Option<Result<SavedContent, Refused>> {
    let content = Arc::clone(content).downcast::<HostContent>().ok()?;
    let file = HostFile { content };
    Some(match file.orphan(s) {
        Ok(Some(inode)) => Ok(SavedContent::Memory(inode, file.content.path.clone())),
        Ok(None) => file.save(s.k).map(SavedContent::Host),
        Err(refused) => Err(refused),
    })
}

impl HostFile {
    /// A file at `at`, whose name in the guest is `path`. `fd` has been checked.
    pub(in crate::linux::fs) fn new(
        fd: Arc<OwnedFd>,
        at: Location,
        path: Vec<u8>,
    ) -> Result<Self, Errno> {
        let stat = rustix::fs::fstat(&*fd)?;
        let identity = (stat.st_dev, stat.st_ino);
        Ok(Self {
            content: Arc::new(HostContent {
                fd,
                identity,
                at,
                path,
            }),
        })
    }

    fn refused(&self) -> impl Fn(Errno) -> Refused {
        let path = shown(&self.content.path);
        move |errno| Refused::File {
            path: path.clone(),
            source: errno.into(),
        }
    }

    fn flags(&self) -> Result<u32, Refused> {
        let flags = rustix::fs::fcntl_getfl(self.fd());
        Ok(flags.map_err(self.refused())?.bits())
    }

    /// It as data.
    fn save(&self, k: &Kernel) -> Result<SavedHostFile, Refused> {
        SavedHostFile::of(self, self.flags()?, k)
    }

    /// The file in memory it becomes, if it was deleted and can be read.
    fn orphan(&self, s: &mut Saver<'_>) -> Result<Option<InodeIx>, Refused> {
        let stat = rustix::fs::fstat(self.fd()).map_err(self.refused())?;
        if stat.st_nlink > 0 || self.flags()? & 3 == 1 {
            return Ok(None);
        }
        let copy = |k: &Kernel| {
            let stat = super::guest_stat(&stat);
            let copy = memfs::saved::copy_of(k, &stat, self.fd());
            copy.map_err(self.refused())
        };
        s.orphan(self.content.identity, copy).map(Some)
    }

    fn fd(&self) -> &OwnedFd {
        &self.content.fd
    }

    /// The file's section, if it has one.
    fn mapped(&self, k: &Kernel) -> Option<Arc<MappedFile>> {
        k.memory.sections.find(self.content.id())
    }

    /// Writes, and says where the bytes went: a file open for appending grows.
    fn put(&self, at: u64, buf: &[u8]) -> Result<(u64, usize), Errno> {
        let n = rustix::io::pwrite(self.fd(), buf, at)?;
        if rustix::fs::fcntl_getfl(self.fd())?.contains(OFlags::APPEND) {
            let end = u64::try_from(rustix::fs::fstat(self.fd())?.st_size).unwrap_or(0);
            return Ok((end.saturating_sub(n as u64), n));
        }
        Ok((at, n))
    }
}

/// An offset the host takes.
fn offset(value: u64) -> Result<u64, Errno> {
    i64::try_from(value)
        .map(|_| value)
        .map_err(|_| Errno::INVAL)
}

impl File for HostFile {
    fn read(&self, k: &Kernel, at: u64, buf: &mut [u8]) -> Result<usize, Errno> {
        let at = offset(at)?;
        match self.mapped(k) {
            Some(mapped) => mapped.read(&k.memory, at, buf, |buf| {
                rustix::io::pread(self.fd(), buf, at)
            }),
            None => rustix::io::pread(self.fd(), buf, at),
        }
    }

    fn write(&self, k: &Kernel, at: u64, buf: &[u8]) -> Result<usize, Errno> {
        let at = offset(at)?;
        match self.mapped(k) {
            Some(mapped) => mapped.write(&k.memory, buf, || self.put(at, buf)),
            None => rustix::io::pwrite(self.fd(), buf, at),
        }
    }

    fn seekable(&self) -> bool {
        true
    }

    fn stat(&self, _: &Kernel) -> Result<Stat, Errno> {
        Ok(super::guest_stat(&rustix::fs::fstat(self.fd())?))
    }

    fn truncate(&self, k: &Kernel, length: u64) -> Result<(), Errno> {
        let length = offset(length)?;
        let set = || rustix::fs::ftruncate(self.fd(), length);
        match self.mapped(k) {
            Some(mapped) => mapped.truncate(&k.memory, length, set),
            None => set(),
        }
    }

    fn sync(&self, k: &Kernel, data_only: bool) -> Result<(), Errno> {
        if let Some(mapped) = self.mapped(k) {
            mapped
                .write_back(&k.memory, 0..u64::MAX)
                .map_err(|_| Errno::IO)?;
        }
        if data_only {
            rustix::fs::fdatasync(self.fd())
        } else {
            rustix::fs::fsync(self.fd())
        }
    }

    fn allocate(&self, k: &Kernel, mode: u32, at: u64, length: u64) -> Result<(), Errno> {
        let mode = FallocateFlags::from_bits(mode).ok_or(Errno::OPNOTSUPP)?;
        let (at, length) = (offset(at)?, offset(length)?);
        let change = || rustix::fs::fallocate(self.fd(), mode, at, length);
        match self.mapped(k) {
            Some(mapped) => mapped
                .reshape(&k.memory, at, || change().map_err(std::io::Error::from))
                .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO)),
            None => change(),
        }
    }

    fn change(&self, _: &Kernel, change: &Change) -> Result<(), Errno> {
        super::change_open(self.fd(), change)
    }

    fn set_status(&self, flags: u32) -> Result<(), Errno> {
        let mut now = rustix::fs::fcntl_getfl(self.fd())?;
        now.set(OFlags::APPEND, flags & O_APPEND != 0);
        rustix::fs::fcntl_setfl(self.fd(), now)
    }

    fn mapping(&self, _: &Kernel) -> Result<Backing, Errno> {
        Ok(Backing(self.content.clone()))
    }

    fn location(&self) -> Option<Location> {
        Some(self.content.at.clone())
    }

    fn name(&self, _: &Kernel) -> Vec<u8> {
        self.content.path.clone()
    }

    fn saved(&self, s: &mut Saver<'_>) -> Result<SavedFile, Refused> {
        if let Some(inode) = self.orphan(s)? {
            let path = &self.content.path;
            let flags = self.flags()?;
            let file = SavedMemFile::nameless(inode, path, flags & O_APPEND != 0);
            return Ok(SavedFile::Memory(file));
        }
        Ok(SavedFile::Host(self.save(s.k)?))
    }

    fn as_any(&self) -> &dyn std::any::Any {
        self
    }
}
