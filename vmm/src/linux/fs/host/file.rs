//! An open regular file of the host.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::fs::{FallocateFlags, OFlags};
use rustix::io::Errno;

use crate::linux::file::{Change, File, Location, O_APPEND, Stat};
use crate::linux::kernel::Kernel;
use crate::memory::{Backing, Content};

/// A host file, open. Its descriptor is ours alone: reads and writes name their offset.
#[derive(Debug)]
pub(in crate::linux::fs) struct HostFile {
    content: Arc<HostContent>,
    at: Location,
}

#[derive(Debug)]
struct HostContent {
    fd: Arc<OwnedFd>,
    identity: (u64, u64),
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

    fn identity(&self) -> (u64, u64) {
        self.identity
    }

    fn path(&self) -> Vec<u8> {
        self.path.clone()
    }
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
            content: Arc::new(HostContent { fd, identity, path }),
            at,
        })
    }

    fn fd(&self) -> &OwnedFd {
        &self.content.fd
    }
}

/// An offset the host takes.
fn offset(value: u64) -> Result<u64, Errno> {
    i64::try_from(value)
        .map(|_| value)
        .map_err(|_| Errno::INVAL)
}

impl File for HostFile {
    fn read(&self, _: &Kernel, at: u64, buf: &mut [u8]) -> Result<usize, Errno> {
        rustix::io::pread(self.fd(), buf, offset(at)?)
    }

    fn write(&self, _: &Kernel, at: u64, buf: &[u8]) -> Result<usize, Errno> {
        rustix::io::pwrite(self.fd(), buf, offset(at)?)
    }

    fn seekable(&self) -> bool {
        true
    }

    fn stat(&self, _: &Kernel) -> Result<Stat, Errno> {
        Ok(super::guest_stat(&rustix::fs::fstat(self.fd())?))
    }

    fn truncate(&self, _: &Kernel, length: u64) -> Result<(), Errno> {
        rustix::fs::ftruncate(self.fd(), offset(length)?)
    }

    fn sync(&self, data_only: bool) -> Result<(), Errno> {
        if data_only {
            rustix::fs::fdatasync(self.fd())
        } else {
            rustix::fs::fsync(self.fd())
        }
    }

    fn allocate(&self, mode: u32, at: u64, length: u64) -> Result<(), Errno> {
        let mode = FallocateFlags::from_bits(mode).ok_or(Errno::OPNOTSUPP)?;
        rustix::fs::fallocate(self.fd(), mode, offset(at)?, offset(length)?)
    }

    fn change(&self, _: &Kernel, change: &Change) -> Result<(), Errno> {
        super::change_open(self.fd(), change)
    }

    fn set_status(&self, flags: u32) -> Result<(), Errno> {
        let mut now = rustix::fs::fcntl_getfl(self.fd())?;
        now.set(OFlags::APPEND, flags & O_APPEND != 0);
        rustix::fs::fcntl_setfl(self.fd(), now)
    }

    fn mapping(&self, _: &Kernel) -> Result<(Backing, u64), Errno> {
        let stat = rustix::fs::fstat(self.fd())?;
        let content: Arc<dyn Content> = self.content.clone();
        Ok((Backing(content), u64::try_from(stat.st_size).unwrap_or(0)))
    }

    fn location(&self) -> Option<Location> {
        Some(self.at.clone())
    }

    fn name(&self, _: &Kernel) -> Vec<u8> {
        self.content.path.clone()
    }

    fn as_any(&self) -> &dyn std::any::Any {
        self
    }
}
