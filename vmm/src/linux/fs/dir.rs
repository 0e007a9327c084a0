//! Open directories, and descriptors that only name a place (`O_PATH`).

use std::sync::Arc;

use rustix::io::Errno;

use super::budget::{Budget, Charge};
use super::{Caller, S_IFDIR, S_IFMT};
use crate::linux::file::{Change, DirEntry, File, Location, Stat};
use crate::linux::kernel::Kernel;
use crate::linux::saved::{Refused, SavedFile, Saver};
use crate::locks::{Mutex, rank};

/// An open directory: its place, and the entries as they were when its reading began.
#[derive(Debug)]
pub struct DirFile {
    pub(super) at: Location,
    pub(super) snapshot: Mutex<rank::DirSnapshot, Option<Snapshot>>,
}

#[derive(Debug)]
pub(super) struct Snapshot {
    pub(super) entries: Arc<[DirEntry]>,
    _charge: Charge,
}

impl Snapshot {
    pub(super) fn new(entries: Arc<[DirEntry]>, charge: Charge) -> Self {
        Self {
            entries,
            _charge: charge,
        }
    }
}

/// What the entries of an open directory cost, in bytes.
pub(super) fn cost(entries: &[DirEntry]) -> u64 {
    entries.iter().map(|e| 48 + e.name.len() as u64).sum()
}

impl DirFile {
    /// The directory at `at`.
    #[must_use]
    pub fn new(at: Location) -> Self {
        Self {
            at,
            snapshot: Mutex::new(None),
        }
    }

    /// The entries, `.` and `..` included; read anew if `again` or never read before.
    ///
    /// # Errors
    /// `ENOENT` if it is gone, `ENOMEM`, or the host's.
    pub fn snapshot(
        &self,
        c: &Caller<'_>,
        budget: &Arc<Budget>,
        again: bool,
    ) -> Result<Arc<[DirEntry]>, Errno> {
        if !again && let Some(snapshot) = &*self.snapshot.lock() {
            return Ok(Arc::clone(&snapshot.entries));
        }
        let entries: Arc<[DirEntry]> = c.k.vfs.list(c, &self.at)?.into();
        let charge = Charge::new(budget, cost(&entries)).map_err(|_| Errno::NOMEM)?;
        *self.snapshot.lock() = Some(Snapshot::new(Arc::clone(&entries), charge));
        Ok(entries)
    }
}

impl File for DirFile {
    fn read(&self, _: &Kernel, _: u64, _: &mut [u8]) -> Result<usize, Errno> {
        Err(Errno::ISDIR)
    }

    fn seekable(&self) -> bool {
        true
    }

    fn stat(&self, k: &Kernel) -> Result<Stat, Errno> {
        k.vfs.look(&Caller::machine(k), &self.at)
    }

    fn entries(&self, k: &Kernel) -> Result<Vec<DirEntry>, Errno> {
        k.vfs.list(&Caller::machine(k), &self.at)
    }

    fn sync(&self, _: &Kernel, _: bool) -> Result<(), Errno> {
        Ok(())
    }

    fn change(&self, k: &Kernel, change: &Change) -> Result<(), Errno> {
        k.vfs.change_at(&Caller::machine(k), &self.at, change)
    }

    fn location(&self) -> Option<Location> {
        Some(self.at.clone())
    }

    fn name(&self, k: &Kernel) -> Vec<u8> {
        k.vfs.path_of(&self.at)
    }

    fn saved(&self, _: &mut Saver<'_>) -> Result<SavedFile, Refused> {
        Ok(SavedFile::Directory(super::saved::SavedDirectory::of(self)))
    }

    fn as_any(&self) -> &dyn std::any::Any {
        self
    }
}

/// A place, opened with `O_PATH`: nothing can be read from it.
#[derive(Debug)]
pub struct PathFile {
    at: Location,
    mode: u32,
}

impl PathFile {
    /// What was at `at` when it was opened had this mode.
    #[must_use]
    pub fn new(at: Location, mode: u32) -> Self {
        Self { at, mode }
    }

    /// Whether it was a directory.
    #[must_use]
    pub fn is_directory(&self) -> bool {
        self.mode & S_IFMT == S_IFDIR
    }
}

impl File for PathFile {
    fn stat(&self, k: &Kernel) -> Result<Stat, Errno> {
        k.vfs.look(&Caller::machine(k), &self.at)
    }

    fn location(&self) -> Option<Location> {
        Some(self.at.clone())
    }

    fn change(&self, _: &Kernel, _: &Change) -> Result<(), Errno> {
        Err(Errno::BADF)
    }

    fn name(&self, k: &Kernel) -> Vec<u8> {
        k.vfs.path_of(&self.at)
    }

    fn saved(&self, _: &mut Saver<'_>) -> Result<SavedFile, Refused> {
        Ok(SavedFile::Place(self.at.clone(), self.mode))
    }

    fn as_any(&self) -> &dyn std::any::Any {
        self
    }
}
