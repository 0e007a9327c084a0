//! Writing a snapshot: pages first, one after the other, then the parts, then the header.
//!
//! Nothing can be seen of it until it is whole and on the disk: the file has no name until then, where
//! the file system can do that, and else one that says what it is. A crash leaves the old file, and at
//! most one nameless or temporary one, which the next snapshot of the same name replaces.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FlockOperation, MemfdFlags, Mode, OFlags, SealFlags};
use rustix::io::Errno;

use super::format::{
    CLUSTER, HEADER, Header, Part, PartKind, Seal, SnapshotId, StoredPage, checksum, page_offset,
};
use super::seal;
use crate::memory::FRAME;

/// How often somebody else's temporary name is taken away before giving up.
const TRIES: usize = 16;

/// Why a snapshot could not be written. What was there before is as it was.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// The host refused.
    #[error("{path}: cannot be written")]
    Host {
        /// Which file.
        path: String,
        /// The reason.
        #[source]
        source: io::Error,
    },
    /// The path has no file name.
    #[error("{0}: not the name of a file")]
    NoName(PathBuf),
    /// Something else is there: a device, a FIFO, a socket.
    #[error("{0}: is there, and is not a regular file")]
    NotAFile(PathBuf),
    /// Another snapshot is being written there.
    #[error("{0}: another snapshot is being written there")]
    Busy(PathBuf),
    /// More pages than a section can have.
    #[error("{0}: a snapshot has at most 16 TiB")]
    TooLarge(String),
}

/// Where the snapshot goes in the end.
#[derive(Debug)]
enum Target {
    /// There, from a file that has no name yet, or this one.
    File {
        path: PathBuf,
        made: Option<PathBuf>,
    },
    /// Nowhere: it stays in memory.
    Memory,
}

/// What a snapshot builds on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Base {
    /// Which snapshot.
    pub id: SnapshotId,
    /// How many pages it has, with those it builds on.
    pub pages: u64,
}

/// A snapshot being written.
#[derive(Debug)]
pub struct Writer {
    file: File,
    target: Target,
    name: String,
    id: SnapshotId,
    base: Option<Base>,
    /// Pages written or in `cluster`.
    pages: u64,
    cluster: Vec<u8>,
    sums: Vec<u8>,
}

/// A snapshot that was written.
#[derive(Debug)]
pub struct Written {
    /// The file, open for reading and writing; sealed if it is memory.
    pub file: File,
    /// Its bytes.
    pub bytes: u64,
    /// Its own pages.
    pub pages: u64,
    /// Which snapshot it is.
    pub id: SnapshotId,
}

impl Writer {
    /// Begins a snapshot that replaces the file `path` in the end.
    ///
    /// # Errors
    /// The directory is not there or not writable, or the host has no random bytes.
    pub fn create(path: &Path, base: Option<Base>) -> Result<Self, WriteError> {
        let name = path.display().to_string();
        let host = |source: io::Error| WriteError::Host {
            path: name.clone(),
            source,
        };
        if path.file_name().is_none() {
            return Err(WriteError::NoName(path.to_owned()));
        }
        match std::fs::metadata(path) {
            Ok(found) if found.is_dir() => return Err(host(io::ErrorKind::IsADirectory.into())),
            // The file would take the place of a device.
            Ok(found) if !found.is_file() => return Err(WriteError::NotAFile(path.to_owned())),
            Ok(_) | Err(_) => {}
        }
        let (file, made) = match unnamed(directory(path)) {
            Ok(file) => (file, None),
            Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL) => {
                let temporary = temporary(path);
                let file = named(&temporary).map_err(|errno| match errno {
                    Errno::WOULDBLOCK => WriteError::Busy(path.to_owned()),
                    errno => host(errno.into()),
                })?;
                (file, Some(temporary))
            }
            Err(errno) => return Err(host(errno.into())),
        };
        let path = path.to_owned();
        Self::new(file, Target::File { path, made }, name, base)
    }

    /// Begins a snapshot in memory, which other processes can be given.
    ///
    /// # Errors
    /// The host has no memory file for it.
    pub fn in_memory(name: &str) -> Result<Self, WriteError> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let made = rustix::fs::memfd_create("vmm-template", flags);
        let file = made.map_err(|errno| WriteError::Host {
            path: name.to_owned(),
            source: errno.into(),
        })?;
        Self::new(file.into(), Target::Memory, name.to_owned(), None)
    }

    /// Whether it is [`Self::in_memory`].
    #[must_use]
    pub fn is_in_memory(&self) -> bool {
        matches!(self.target, Target::Memory)
    }

    fn new(
        file: File,
        target: Target,
        name: String,
        base: Option<Base>,
    ) -> Result<Self, WriteError> {
        let mut id = SnapshotId::default();
        let random = rustix::rand::getrandom(&mut id.0, rustix::rand::GetRandomFlags::empty());
        random.map_err(|errno| WriteError::Host {
            path: name.clone(),
            source: errno.into(),
        })?;
        // All zero means none.
        id.0[0] |= 1;
        Ok(Self {
            file,
            target,
            name,
            id,
            base,
            pages: 0,
            cluster: Vec::with_capacity(CLUSTER * FRAME),
            sums: Vec::new(),
        })
    }

    fn host(&self, source: io::Error) -> WriteError {
        WriteError::Host {
            path: self.name.clone(),
            source,
        }
    }

    /// Pages added so far.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Adds a page, and says which it is.
    ///
    /// # Errors
    /// The host's: no room left on the disk, for one.
    pub fn add_page(&mut self, bytes: &[u8; FRAME]) -> Result<StoredPage, WriteError> {
        let number = self.base.map_or(0, |base| base.pages) + self.pages;
        if number >= u64::from(u32::MAX) {
            return Err(WriteError::TooLarge(self.name.clone()));
        }
        self.cluster.extend_from_slice(bytes);
        self.pages += 1;
        if self.cluster.len() == CLUSTER * FRAME {
            self.write_cluster()?;
        }
        Ok(StoredPage::new(number))
    }

    fn write_cluster(&mut self) -> Result<(), WriteError> {
        let first = self.pages - (self.cluster.len() / FRAME) as u64;
        let written = self.file.write_all_at(&self.cluster, page_offset(first));
        written.map_err(|error| self.host(error))?;
        self.sums
            .extend_from_slice(&checksum(&self.cluster).to_le_bytes());
        self.cluster.clear();
        Ok(())
    }

    /// Adds the parts and makes the snapshot what its name leads to.
    ///
    /// # Errors
    /// The host's. The old file is still there then.
    pub fn finish(mut self, parts: &[(PartKind, &[u8])]) -> Result<Written, WriteError> {
        if !self.cluster.is_empty() {
            self.write_cluster()?;
        }
        let sums = std::mem::take(&mut self.sums);
        let mut lines = Vec::new();
        let mut offset = page_offset(self.pages);
        let sums = (PartKind::Sums, sums.as_slice());
        for (kind, bytes) in std::iter::once(&sums).chain(parts) {
            let written = self.file.write_all_at(bytes, offset);
            written.map_err(|error| self.host(error))?;
            lines.push(Part {
                kind: *kind as u32,
                offset,
                length: bytes.len() as u64,
                sum: checksum(bytes),
            });
            offset += bytes.len() as u64;
        }
        let seal = self.seal()?;
        let header = Header {
            length: offset,
            pages: self.pages,
            base_pages: self.base.map_or(0, |base| base.pages),
            id: self.id,
            base: self.base.map(|base| base.id),
            seal,
            parts: lines,
        };
        // Over what a snapshot that was never finished may have left behind.
        let written = self
            .file
            .write_all_at(&header.encode(), 0)
            .and_then(|()| self.file.set_len(offset));
        written.map_err(|error| self.host(error))?;
        debug_assert!(offset >= HEADER as u64);
        self.publish(seal)?;
        Ok(Written {
            file: self.file.try_clone().map_err(|e| self.host(e))?,
            bytes: offset,
            pages: self.pages,
            id: self.id,
        })
    }

    /// The seal it will have. What is only in memory needs none: nobody can write to it.
    fn seal(&self) -> Result<Option<Seal>, WriteError> {
        match self.target {
            Target::File { .. } => {
                let seal = seal::now(&self.file).map_err(|error| self.host(error))?;
                Ok(Some(seal))
            }
            Target::Memory => Ok(None),
        }
    }

    /// Makes it durable, then gives it its name, then makes that durable. The time of its seal is set once everything is
    /// written: a server that has the file may else set another one later.
    fn publish(&mut self, seal: Option<Seal>) -> Result<(), WriteError> {
        let Target::File { path, made } = &mut self.target else {
            return seal_memory(&self.file).map_err(|errno| self.host(errno.into()));
        };
        let done = self.file.sync_all().and_then(|()| {
            if let Some(seal) = seal {
                seal::set(&self.file, seal)?;
                self.file.sync_all()?;
            }
            match made.take() {
                Some(temporary) => std::fs::rename(temporary, &*path)?,
                None => name_it(&self.file, path)?,
            }
            File::open(directory(path))?.sync_all()
        });
        done.map_err(|error| self.host(error))
    }
}

/// How often a memory file is tried to be sealed. Each try takes the host 150 ms if it cannot be.
const SEAL_TRIES: u32 = 20;

/// Nobody can change a memory file's bytes any more. The host refuses that as long as something holds one of its pages, and it
/// holds pages for a moment by itself, to look at how they are used.
fn seal_memory(file: &File) -> Result<(), Errno> {
    let seals = SealFlags::SEAL | SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE;
    let mut tries = 1;
    loop {
        match rustix::fs::fcntl_add_seals(file, seals) {
            Err(Errno::BUSY) if tries < SEAL_TRIES => tries += 1,
            done => return done,
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        if let Target::File {
            made: Some(temporary),
            ..
        } = &self.target
        {
            let _ = std::fs::remove_file(temporary);
        }
    }
}

/// The directory a file is in.
fn directory(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        Some(_) | None => Path::new("."),
    }
}

/// The name a snapshot has for a moment before it replaces `path`.
fn temporary(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_else(|| OsStr::new("snapshot"));
    let mut hidden = OsString::from(".");
    hidden.push(name);
    hidden.push(".vmm-new");
    path.with_file_name(hidden)
}

/// A file in `dir` that no name leads to. For the owner only: a guest's memory is in it.
fn unnamed(dir: &Path) -> rustix::io::Result<File> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::TMPFILE;
    Ok(rustix::fs::open(dir, flags, Mode::RUSR | Mode::WUSR)?.into())
}

/// A file under a temporary name. What is there already was left by a crash, unless it is locked.
fn named(path: &Path) -> rustix::io::Result<File> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::CREATE | OFlags::NOFOLLOW;
    let fd = rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR)?;
    rustix::fs::flock(&fd, FlockOperation::NonBlockingLockExclusive)?;
    rustix::fs::ftruncate(&fd, 0)?;
    Ok(fd.into())
}

/// Gives a nameless file a name that may be taken: by way of a temporary one, because a link replaces
/// nothing.
fn name_it(file: &File, path: &Path) -> io::Result<()> {
    use std::os::fd::AsRawFd;
    let temporary = temporary(path);
    let here = format!("/proc/self/fd/{}", file.as_fd().as_raw_fd());
    for _ in 0..TRIES {
        match rustix::fs::linkat(CWD, &here, CWD, &temporary, AtFlags::SYMLINK_FOLLOW) {
            Ok(()) => {}
            Err(Errno::EXIST) => {
                // A crash left it, or another snapshot of this name is about to rename it, and will
                // link again.
                match std::fs::remove_file(&temporary) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                    Ok(()) | Err(_) => continue,
                }
            }
            Err(errno) => return Err(errno.into()),
        }
        match std::fs::rename(&temporary, path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            done => return done,
        }
    }
    Err(io::ErrorKind::ResourceBusy.into())
}
