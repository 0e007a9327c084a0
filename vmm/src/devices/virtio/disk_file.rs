//! The file behind a disk: opened and locked once, then read, written and flushed at offsets.

use std::fmt::Debug;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FallocateFlags, FlockOperation, fallocate, flock};
use rustix::io::Errno;

/// Bytes of a sector.
pub(super) const SECTOR: u64 = 512;

/// Where a disk's bytes are. Used by several threads at once.
pub(super) trait Storage: Send + Sync + Debug {
    /// Reads all of `to` from `at` on.
    ///
    /// # Errors
    /// The host's.
    fn read_at(&self, to: &mut [u8], at: u64) -> io::Result<()>;

    /// Writes all of `from` from `at` on. Every other process sees it then.
    ///
    /// # Errors
    /// The host's.
    fn write_at(&self, from: &[u8], at: u64) -> io::Result<()>;

    /// What was written before is on the host's disk when this returns.
    ///
    /// # Errors
    /// The host's.
    fn flush(&self) -> io::Result<()>;

    /// Makes `bytes` from `at` on zero, and gives their room back.
    ///
    /// # Errors
    /// The host's; [`io::ErrorKind::Unsupported`] if it cannot, and nothing has changed.
    fn punch(&self, at: u64, bytes: u64) -> io::Result<()>;
}

impl Storage for File {
    fn read_at(&self, to: &mut [u8], at: u64) -> io::Result<()> {
        self.read_exact_at(to, at)
    }

    fn write_at(&self, from: &[u8], at: u64) -> io::Result<()> {
        self.write_all_at(from, at)
    }

    fn flush(&self) -> io::Result<()> {
        self.sync_data()
    }

    fn punch(&self, at: u64, bytes: u64) -> io::Result<()> {
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match fallocate(self, punch, at, bytes) {
            Err(Errno::OPNOTSUPP) => Err(io::ErrorKind::Unsupported.into()),
            result => Ok(result?),
        }
    }
}

/// Memory. Any access outside it is a bug of the disk's.
#[cfg(any(test, feature = "fuzzing"))]
impl Storage for parking_lot::Mutex<Vec<u8>> {
    fn read_at(&self, to: &mut [u8], at: u64) -> io::Result<()> {
        let at = usize::try_from(at).expect("64-bit host");
        to.copy_from_slice(&self.lock()[at..at + to.len()]);
        Ok(())
    }

    fn write_at(&self, from: &[u8], at: u64) -> io::Result<()> {
        let at = usize::try_from(at).expect("64-bit host");
        self.lock()[at..at + from.len()].copy_from_slice(from);
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn punch(&self, at: u64, bytes: u64) -> io::Result<()> {
        let (at, bytes) = (usize::try_from(at), usize::try_from(bytes));
        let (at, bytes) = (at.expect("64-bit host"), bytes.expect("64-bit host"));
        self.lock()[at..at + bytes].fill(0);
        Ok(())
    }
}

/// Why a disk cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// It cannot be opened or read.
    #[error("disk {}", path.display())]
    File {
        /// Its path.
        path: PathBuf,
        /// The host's reason.
        #[source]
        source: io::Error,
    },
    /// Not a regular file.
    #[error("disk {}: not a regular file", path.display())]
    NotAFile {
        /// Its path.
        path: PathBuf,
    },
    /// Not a whole number of sectors.
    #[error("disk {}: {bytes} bytes are not one or more sectors of 512", path.display())]
    Size {
        /// Its path.
        path: PathBuf,
        /// Its length.
        bytes: u64,
    },
    /// Another process uses it.
    #[error("disk {}: another machine, or another --disk, uses it", path.display())]
    Locked {
        /// Its path.
        path: PathBuf,
    },
}

/// Whether a disk can be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// It cannot; several machines may use it at once.
    ReadOnly,
    /// It can; nobody else may use it.
    ReadWrite,
}

/// Opens and locks the file at `path`; also tells its length.
///
/// # Errors
/// It cannot be opened, is not a regular file of whole sectors, or is in use.
pub(super) fn open(path: &Path, access: Access) -> Result<(File, u64), DiskError> {
    let failed = |source| DiskError::File {
        path: path.to_owned(),
        source,
    };
    let file = File::options()
        .read(true)
        .write(access == Access::ReadWrite)
        // A FIFO must not keep us waiting.
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    if !metadata.is_file() {
        return Err(DiskError::NotAFile {
            path: path.to_owned(),
        });
    }
    let how = match access {
        Access::ReadOnly => FlockOperation::NonBlockingLockShared,
        Access::ReadWrite => FlockOperation::NonBlockingLockExclusive,
    };
    match flock(&file, how) {
        Ok(()) => {}
        Err(Errno::WOULDBLOCK) => {
            return Err(DiskError::Locked {
                path: path.to_owned(),
            });
        }
        Err(error) => return Err(failed(error.into())),
    }
    let bytes = metadata.len();
    if bytes == 0 || !bytes.is_multiple_of(SECTOR) {
        return Err(DiskError::Size {
            path: path.to_owned(),
            bytes,
        });
    }
    Ok((file, bytes))
}
