//! What a section's pages come from and go to: a file of the host, or one in memory.

use shadow_mm::Section;
use std::fmt::Debug;
use std::io;
use std::sync::Arc;

/// Names a file for as long as somebody holds its content.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum FileId {
    /// A file of the host.
    Host {
        /// Its device.
        dev: u64,
        /// Its inode.
        ino: u64,
    },
    /// A file in memory, by the address of its inode.
    Memory(usize),
}

/// What tells that a file was changed by somebody else.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Version {
    /// Length in bytes.
    pub size: u64,
    /// Time of the last change of its bytes and of its inode, seconds and nanoseconds.
    pub changed: [(i64, i64); 2],
}

/// Content behind a section.
pub trait Content: Debug + Send + Sync {
    /// Reads at `offset`; fewer bytes than asked only at the end of the file.
    ///
    /// # Errors
    /// The host's.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize>;

    /// Writes all of `buf` at `offset`.
    ///
    /// # Errors
    /// The host's; `EBADF` if the file was not opened for writing.
    fn write_at(&self, offset: u64, buf: &[u8]) -> io::Result<()>;

    /// Makes what was written durable.
    ///
    /// # Errors
    /// The host's.
    fn sync(&self) -> io::Result<()>;

    /// The file's version now.
    ///
    /// # Errors
    /// The host's.
    fn version(&self) -> io::Result<Version>;

    /// Which file it is.
    fn id(&self) -> FileId;

    /// Whether its pages are worth keeping when nobody maps it any more.
    fn keeps(&self) -> bool;

    /// The section that has its bytes, if the file has no other place for them: it is mapped itself.
    fn storage(&self) -> Option<Section<Backing>> {
        None
    }

    /// Makes a hole, for `madvise(2)`.
    ///
    /// # Errors
    /// `EOPNOTSUPP`, `EPERM`, or the host's.
    fn punch(&self, offset: u64, length: u64) -> io::Result<()> {
        let _ = (offset, length);
        Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP))
    }

    /// Device and inode, as `/proc/PID/maps` shows them.
    fn identity(&self) -> (u64, u64);

    /// Guest path, for `/proc/PID/maps`.
    fn path(&self) -> Vec<u8>;

    /// The kind as the one it is.
    fn as_any(self: Arc<Self>) -> Arc<dyn std::any::Any + Send + Sync>;
}

/// Handle of a file's content. Two are equal if they are the same open file.
#[derive(Clone, Debug)]
pub struct Backing(pub Arc<dyn Content>);

impl PartialEq for Backing {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for Backing {}
