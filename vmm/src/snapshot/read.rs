//! Reading a snapshot.
//!
//! Opening one verifies the header and every part. The pages are verified cluster by cluster as they are read, so a damaged
//! one is an error of the read that wants it, never wrong bytes. Who is about to make a guest of it calls
//! [`Snapshot::check`] before: that looks at all pages of a file that is not as it was finished (`super::seal`).

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};

use super::format::{
    CLUSTER, HEADER, Header, HeaderError, Part, PartKind, SnapshotId, StoredPage, checksum,
    page_offset,
};
use super::seal;
use super::write::Base;
use crate::memory::{FRAME, Layer, PoolError, is_frozen};

/// Longest chain of snapshots that build on each other.
const MAX_DEPTH: usize = 64;

/// Why a snapshot is refused.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The host refused.
    #[error("{path}: cannot be read")]
    Host {
        /// Which file.
        path: String,
        /// The reason.
        #[source]
        source: io::Error,
    },
    /// The header is not one.
    #[error("{path}: {error}")]
    Header {
        /// Which file.
        path: String,
        /// What is wrong with it.
        error: HeaderError,
    },
    /// Bytes are not what was written.
    #[error("{path}: damaged: {what} is not what was written")]
    Damaged {
        /// Which file.
        path: String,
        /// What of it.
        what: String,
    },
    /// It builds on another one, which was not given, or is not this one.
    #[error("{path}: builds on another snapshot; give that one with --base")]
    NeedsBase {
        /// Which file.
        path: String,
    },
    /// The one given is not the one it builds on.
    #[error("{path}: does not build on {base}")]
    WrongBase {
        /// Which file.
        path: String,
        /// What was given.
        base: String,
    },
}

/// Whether the bytes of pages are compared with their checksums.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Trust {
    /// They are: the file comes from a disk.
    Verify,
    /// They are not: it is sealed memory that this VMM or its parent wrote.
    Sealed,
}

/// Which snapshots are looked at as a whole before a guest is made of them.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Check {
    /// Those that somebody may have written to since they were finished, and copies.
    #[default]
    Changed,
    /// All.
    All,
    /// None.
    Nothing,
}

/// An open snapshot.
#[derive(Debug)]
pub struct Snapshot {
    file: File,
    path: String,
    header: Header,
    sums: Vec<u64>,
    trust: Trust,
    /// It was as it was finished when it was opened.
    unchanged: bool,
    /// Bytes read of this file.
    read: AtomicU64,
    base: Option<Arc<Snapshot>>,
    /// Its pages, once somebody wanted them mapped.
    layer: OnceLock<Layer>,
}

fn open_file(path: &Path) -> Result<File, ReadError> {
    // A FIFO is refused, and nobody waits for who writes to it.
    let mut how = File::options();
    let how = how.read(true).custom_flags(libc::O_NONBLOCK);
    let opened = how.open(path).and_then(|file| {
        let found = file.metadata()?;
        match found.is_file() {
            true => Ok(file),
            false => Err(io::Error::other("not a regular file")),
        }
    });
    opened.map_err(|source| ReadError::Host {
        path: path.display().to_string(),
        source,
    })
}

/// Reads the header of a file, and says whether its seal holds.
fn header_of(file: &File, path: &str) -> Result<(Header, bool), ReadError> {
    let mut block = [0; HEADER];
    let found = file.metadata().and_then(|found| {
        let there = found.len().min(HEADER as u64) as usize;
        file.read_exact_at(&mut block[..there], 0)?;
        Ok(found)
    });
    let found = found.map_err(|source| ReadError::Host {
        path: path.to_owned(),
        source,
    })?;
    let header = Header::decode(&block, found.len()).map_err(|error| ReadError::Header {
        path: path.to_owned(),
        error,
    })?;
    let holds = seal::holds(&found, header.seal);
    Ok((header, holds))
}

/// Which snapshot the file `path` is, whatever it builds on.
///
/// # Errors
/// It cannot be read, or its header is not one.
pub fn number_of_file(path: &Path) -> Result<SnapshotId, ReadError> {
    let (header, _) = header_of(&open_file(path)?, &path.display().to_string())?;
    Ok(header.id)
}

impl Snapshot {
    /// Opens the snapshot `path`, which builds on `base` if it builds on any.
    ///
    /// # Errors
    /// It cannot be read, is no snapshot, or is damaged anywhere but in its pages.
    pub fn open(path: &Path, base: Option<Arc<Snapshot>>) -> Result<Self, ReadError> {
        let name = path.display().to_string();
        Self::from_file(open_file(path)?, name, Trust::Verify, base)
    }

    /// Reads a snapshot from an open file.
    ///
    /// # Errors
    /// See [`Self::open`].
    pub fn from_file(
        file: File,
        path: String,
        trust: Trust,
        base: Option<Arc<Snapshot>>,
    ) -> Result<Self, ReadError> {
        let (header, sealed) = header_of(&file, &path)?;
        let mut snapshot = Self {
            file,
            path,
            header,
            sums: Vec::new(),
            trust,
            unchanged: sealed || trust == Trust::Sealed,
            read: AtomicU64::new(HEADER as u64),
            base,
            layer: OnceLock::new(),
        };
        snapshot.check_base()?;
        snapshot.read_sums()?;
        Ok(snapshot)
    }

    fn check_base(&self) -> Result<(), ReadError> {
        let path = self.path.clone();
        let (id, pages) = (self.header.base, self.header.base_pages);
        match (&self.base, id) {
            (None, None) => Ok(()),
            (None, Some(_)) => Err(ReadError::NeedsBase { path }),
            (Some(base), Some(id))
                if base.id() == id && base.pages() == pages && base.depth() < MAX_DEPTH =>
            {
                Ok(())
            }
            (Some(base), _) => Err(ReadError::WrongBase {
                path,
                base: base.path.clone(),
            }),
        }
    }

    fn depth(&self) -> usize {
        self.base.as_ref().map_or(1, |base| base.depth() + 1)
    }

    fn read_sums(&mut self) -> Result<(), ReadError> {
        for part in self.header.parts.clone() {
            // Those this version does not know are part of what was written too.
            let bytes = self.read_part(part)?;
            if part.kind == PartKind::Sums as u32 {
                let (sums, _) = bytes.as_chunks::<8>();
                self.sums = sums.iter().map(|sum| u64::from_le_bytes(*sum)).collect();
            }
        }
        if self.sums.len() as u64 == self.header.clusters() {
            Ok(())
        } else {
            Err(self.damaged("the table of checksums".to_owned()))
        }
    }

    fn damaged(&self, what: String) -> ReadError {
        let path = self.path.clone();
        ReadError::Damaged { path, what }
    }

    fn read_part(&self, part: Part) -> Result<Vec<u8>, ReadError> {
        // The header was checked: it is not longer than the file.
        let mut bytes = vec![0; part.length as usize];
        let read = self.file.read_exact_at(&mut bytes, part.offset);
        read.map_err(|source| ReadError::Host {
            path: self.path.clone(),
            source,
        })?;
        self.read.fetch_add(part.length, Relaxed);
        if checksum(&bytes) == part.sum {
            Ok(bytes)
        } else {
            Err(self.damaged(format!("part {}", part.kind)))
        }
    }

    /// The bytes of a part.
    ///
    /// # Errors
    /// It is not there or damaged.
    pub fn part(&self, kind: PartKind) -> Result<Vec<u8>, ReadError> {
        match self.header.part(kind) {
            Some(part) => self.read_part(part),
            None => Err(self.damaged(format!("part {}", kind as u32))),
        }
    }

    /// Its pages, mapped, if nobody can change them: those of a template in memory. A template is whole by itself.
    ///
    /// # Errors
    /// The host has no address space for them.
    pub fn layer(&self) -> Result<Option<&Layer>, PoolError> {
        let frozen = self.trust == Trust::Sealed && is_frozen(&self.file);
        if !frozen || self.base.is_some() || self.header.pages == 0 {
            return Ok(None);
        }
        if self.layer.get().is_none() {
            let mapped = Layer::map(&self.file, page_offset(0), self.header.pages)?;
            // Two at once: one of the mappings goes.
            let _first = self.layer.set(mapped);
        }
        Ok(self.layer.get())
    }

    /// The file's name, for messages.
    #[must_use]
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The file.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Which snapshot it is.
    #[must_use]
    pub fn id(&self) -> SnapshotId {
        self.header.id
    }

    /// Its pages, those of what it builds on included.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.header.base_pages + self.header.pages
    }

    /// Bytes of the file.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.header.length
    }

    /// What a snapshot must say that builds on this one.
    #[must_use]
    pub fn as_base(&self) -> Base {
        Base {
            id: self.id(),
            pages: self.pages(),
        }
    }

    /// Reads whole pages from page `first` on; how many fit into `into`, or are left. Gives back the
    /// bytes read.
    ///
    /// # Errors
    /// The host's, or [`io::ErrorKind::InvalidData`]: the bytes are not what was written.
    pub fn read_pages(&self, first: StoredPage, into: &mut [u8]) -> io::Result<usize> {
        let wanted = (into.len() / FRAME) as u64;
        let end = first.get().saturating_add(wanted).min(self.pages());
        let mut at = first.get();
        let mut done = 0;
        let mut buffer = Vec::new();
        while at < end {
            let Some(own) = at.checked_sub(self.header.base_pages) else {
                let stop = end.min(self.header.base_pages);
                let bytes = (stop - at) as usize * FRAME;
                let base = self.base.as_ref().ok_or(io::ErrorKind::NotFound)?;
                done += base.read_pages(StoredPage::new(at), &mut into[done..done + bytes])?;
                at = stop;
                continue;
            };
            let cluster = own / CLUSTER as u64;
            self.read_cluster(cluster, &mut buffer)?;
            let skip = (own % CLUSTER as u64) as usize * FRAME;
            let bytes = (buffer.len() - skip).min((end - at) as usize * FRAME);
            into[done..done + bytes].copy_from_slice(&buffer[skip..skip + bytes]);
            done += bytes;
            at += (bytes / FRAME) as u64;
        }
        Ok(done)
    }

    /// Reads one cluster, and compares it with its checksum.
    fn read_cluster(&self, cluster: u64, buffer: &mut Vec<u8>) -> io::Result<()> {
        let first = cluster * CLUSTER as u64;
        let pages = (self.header.pages - first).min(CLUSTER as u64);
        buffer.resize(pages as usize * FRAME, 0);
        self.file.read_exact_at(buffer, page_offset(first))?;
        self.read.fetch_add(buffer.len() as u64, Relaxed);
        let right = || self.sums.get(cluster as usize) == Some(&checksum(buffer));
        if self.trust == Trust::Sealed || right() {
            return Ok(());
        }
        let what = format!(
            "{}: damaged: pages {first} to {} are not what was written",
            self.path,
            first + pages - 1
        );
        Err(io::Error::new(io::ErrorKind::InvalidData, what))
    }

    /// Bytes read of this file since it was opened, again and again included.
    #[must_use]
    pub fn bytes_read(&self) -> u64 {
        self.read.load(Relaxed)
    }

    /// Bytes that [`Self::check`] will read of this and of what it builds on.
    #[must_use]
    pub fn bytes_to_check(&self, which: Check) -> u64 {
        let below = self.base.as_ref();
        let below = below.map_or(0, |base| base.bytes_to_check(which));
        match self.is_to_be_checked(which) {
            true => below + self.header.pages * FRAME as u64,
            false => below,
        }
    }

    fn is_to_be_checked(&self, which: Check) -> bool {
        match which {
            Check::Changed => !self.unchanged,
            Check::All => true,
            Check::Nothing => false,
        }
    }

    /// Compares every page with its checksum, if this snapshot is one of those, and the pages of what it builds on.
    /// `progress` is told the bytes done.
    ///
    /// # Errors
    /// A page is damaged or cannot be read.
    pub fn check(&self, which: Check, progress: &mut dyn FnMut(u64)) -> Result<(), ReadError> {
        if let Some(base) = &self.base {
            base.check(which, progress)?;
        }
        match self.is_to_be_checked(which) {
            true => self.check_pages(progress),
            false => Ok(()),
        }
    }

    fn check_pages(&self, progress: &mut dyn FnMut(u64)) -> Result<(), ReadError> {
        let mut buffer = Vec::new();
        for cluster in 0..self.header.clusters() {
            let read = self.read_cluster(cluster, &mut buffer);
            read.map_err(|error| match error.kind() {
                io::ErrorKind::InvalidData => {
                    self.damaged(format!("cluster {cluster} of its pages"))
                }
                _ => ReadError::Host {
                    path: self.path.clone(),
                    source: error,
                },
            })?;
            progress(buffer.len() as u64);
        }
        Ok(())
    }
}
