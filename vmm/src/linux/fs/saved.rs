//! Mounts and what is open of the file tree, as data.
//!
//! What is in memory is saved whole (`memfs::saved`). What is the host's is saved as a place, and opened
//! again there; it must be the file it was. For a descriptor that is: the same inode, or the same length
//! and time of modification (a copy of the tree). For a mapping, whose pages are read again, the
//! length and the time must be what they were.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;
use std::sync::Arc;

use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::budget::Charge;
use super::dir::{DirFile, Snapshot};
use super::host::HostFile;
use super::memfs::MemFs;
use super::{Caller, ClosureEntry, MountKind, MountSpec, Vfs};
use crate::linux::file::{DirEntry, File, Location, O_APPEND, Stat};
use crate::linux::kernel::Kernel;
use crate::linux::process::Pid;
use crate::linux::saved::error::{Damaged, Refused, RestoreError, require, shown};
use crate::linux::saved::tables::InodeIx;
use crate::linux::saved::{Loader, Saver};
use crate::linux::thread::Tid;
use crate::memory::Backing;

pub use super::memfs::saved::{SavedFifo, SavedInode, SavedMemFile};
pub use super::vmm::SavedVmm;

/// The file tree.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SavedTree {
    mounts: Vec<SavedMount>,
    /// Bytes of the VMM's memory that its files may take.
    memory: u64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct SavedMount {
    at: Vec<u8>,
    kind: SavedKind,
}

/// As [`MountKind`], with paths as bytes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
enum SavedKind {
    Host { root: Vec<u8>, writable: bool },
    Mem { size: u64, mode: u32, root: InodeIx },
    Closure(Vec<SavedEntry>),
    Proc,
    Sys,
    Dev,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
enum SavedEntry {
    File { guest: Vec<u8>, host: Vec<u8> },
    Symlink { guest: Vec<u8>, target: Vec<u8> },
}

/// A directory of the host that a guest sees.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostDirectory {
    /// The host's path.
    pub path: PathBuf,
    /// Whether the guest may write there.
    pub writable: bool,
}

fn bytes(path: &std::path::Path) -> Vec<u8> {
    path.as_os_str().as_bytes().to_vec()
}

fn path(bytes: &[u8]) -> PathBuf {
    OsString::from_vec(bytes.to_vec()).into()
}

impl Vfs {
    pub(in crate::linux) fn saved(&self, s: &mut Saver<'_>) -> SavedTree {
        let mount = |mount: &super::mount::Mount| SavedMount {
            at: mount.spec.at.clone(),
            kind: saved_kind(mount, s),
        };
        SavedTree {
            mounts: self.mounts.iter().map(mount).collect(),
            memory: self.budget.usage().0,
        }
    }
}

fn saved_kind(mount: &super::mount::Mount, s: &mut Saver<'_>) -> SavedKind {
    match &mount.spec.kind {
        MountKind::Host { root, writable } => SavedKind::Host {
            root: bytes(root),
            writable: *writable,
        },
        MountKind::Mem { size, mode } => {
            let fs = mount.fs.as_any().downcast_ref::<MemFs>();
            let root = fs.expect("it was made of this kind").root();
            SavedKind::Mem {
                size: *size,
                mode: *mode,
                root: s.inode(root),
            }
        }
        MountKind::Closure(entries) => {
            let entry = |entry: &ClosureEntry| match entry {
                ClosureEntry::File { guest, host } => SavedEntry::File {
                    guest: guest.clone(),
                    host: bytes(host),
                },
                ClosureEntry::Symlink { guest, target } => SavedEntry::Symlink {
                    guest: guest.clone(),
                    target: target.clone(),
                },
            };
            SavedKind::Closure(entries.iter().map(entry).collect())
        }
        MountKind::Proc => SavedKind::Proc,
        MountKind::Sys => SavedKind::Sys,
        MountKind::Dev => SavedKind::Dev,
    }
}

impl SavedTree {
    /// The tree, its parts in memory still empty.
    pub(in crate::linux) fn build(&self) -> Result<Vfs, RestoreError> {
        let spec = |mount: &SavedMount| MountSpec {
            at: mount.at.clone(),
            kind: mount.kind.spec(),
        };
        let vfs = Vfs::new(self.mounts.iter().map(spec).collect(), self.memory)?;
        let same = |(made, saved): (&super::mount::Mount, &SavedMount)| made.spec.at == saved.at;
        let ordered = vfs.mounts.iter().zip(&self.mounts).all(same);
        require(ordered, "the order of mounts")?;
        Ok(vfs)
    }

    /// The root of each tree in memory, by the number of its mount.
    pub(in crate::linux) fn roots(&self) -> impl Iterator<Item = (usize, InodeIx)> {
        let root = |(n, mount): (usize, &SavedMount)| match mount.kind {
            SavedKind::Mem { root, .. } => Some((n, root)),
            SavedKind::Host { .. }
            | SavedKind::Closure(_)
            | SavedKind::Proc
            | SavedKind::Sys
            | SavedKind::Dev => None,
        };
        self.mounts.iter().enumerate().filter_map(root)
    }

    /// The directories of the host that the guest sees.
    pub(in crate::linux) fn host_directories(&self) -> Vec<HostDirectory> {
        let directory = |mount: &SavedMount| match &mount.kind {
            SavedKind::Host { root, writable } => Some(HostDirectory {
                path: path(root),
                writable: *writable,
            }),
            SavedKind::Mem { .. }
            | SavedKind::Closure(_)
            | SavedKind::Proc
            | SavedKind::Sys
            | SavedKind::Dev => None,
        };
        self.mounts.iter().filter_map(directory).collect()
    }

    /// The single files of the host that the guest sees.
    pub(in crate::linux) fn host_files(&self) -> Vec<PathBuf> {
        let mut files = Vec::new();
        for mount in &self.mounts {
            if let SavedKind::Closure(entries) = &mount.kind {
                files.extend(entries.iter().filter_map(|entry| match entry {
                    SavedEntry::File { host, .. } => Some(path(host)),
                    SavedEntry::Symlink { .. } => None,
                }));
            }
        }
        files
    }
}

impl SavedKind {
    fn spec(&self) -> MountKind {
        match self {
            Self::Host { root, writable } => MountKind::Host {
                root: path(root),
                writable: *writable,
            },
            Self::Mem { size, mode, .. } => MountKind::Mem {
                size: *size,
                mode: *mode,
            },
            Self::Closure(entries) => {
                let entry = |entry: &SavedEntry| match entry {
                    SavedEntry::File { guest, host } => ClosureEntry::File {
                        guest: guest.clone(),
                        host: path(host),
                    },
                    SavedEntry::Symlink { guest, target } => ClosureEntry::Symlink {
                        guest: guest.clone(),
                        target: target.clone(),
                    },
                };
                MountKind::Closure(entries.iter().map(entry).collect())
            }
            Self::Proc => MountKind::Proc,
            Self::Sys => MountKind::Sys,
            Self::Dev => MountKind::Dev,
        }
    }
}

/// A regular file of the host.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SavedHostFile {
    at: Location,
    /// Access mode, and `O_APPEND`.
    flags: u32,
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, u32),
}

/// How much of a file must be what it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Same {
    File,
    Content,
}

impl SavedHostFile {
    /// `file`, open with `flags`, checked to be what is at its place.
    pub(super) fn of(file: &HostFile, flags: u32, k: &Kernel) -> Result<Self, Refused> {
        let at = file.location().unwrap_or_else(|| k.vfs.root());
        let name = || shown(&file.name(k));
        let failed = |errno: Errno| Refused::File {
            path: name(),
            source: errno.into(),
        };
        let stat = file.stat(k).map_err(failed)?;
        let saved = Self {
            at,
            flags: flags & (3 | O_APPEND),
            device: stat.dev,
            inode: stat.ino,
            size: stat.size,
            modified: stat.mtime,
        };
        let there = match saved.open(k) {
            Ok(there) => there.stat(k).map_err(failed)?,
            Err(Errno::NOENT | Errno::NOTDIR | Errno::ISDIR | Errno::LOOP) => {
                return Err(Refused::Nameless { path: name() });
            }
            Err(errno) => return Err(failed(errno)),
        };
        if (there.dev, there.ino) == (stat.dev, stat.ino) {
            Ok(saved)
        } else {
            Err(Refused::Nameless { path: name() })
        }
    }

    fn open(&self, k: &Kernel) -> Result<Arc<dyn File>, Errno> {
        let mount = k.vfs.mount(&self.at)?;
        if mount.read_only && self.flags & 3 != 0 {
            return Err(Errno::ROFS);
        }
        mount
            .fs
            .open(&Caller::machine(k), &self.at.path, self.flags)
    }

    /// Opens it again.
    pub(in crate::linux) fn load(&self, k: &Kernel) -> Result<Arc<dyn File>, RestoreError> {
        self.open_same(k, Same::File)
    }

    /// Opens it again for a mapping.
    pub(in crate::linux) fn load_content(&self, k: &Kernel) -> Result<Backing, RestoreError> {
        let file = self.open_same(k, Same::Content)?;
        let mapping = file.mapping(k);
        mapping.map_err(|_| Damaged("a mapping of what is no file").into())
    }

    /// Whether an open file has the content this one had.
    pub(in crate::linux) fn is_still(&self, opened: &Backing) -> bool {
        let (seconds, nanoseconds) = self.modified;
        opened.0.version().is_ok_and(|version| {
            let [modified, _] = version.changed;
            (version.size, modified) == (self.size, (seconds, i64::from(nanoseconds)))
        })
    }

    fn open_same(&self, k: &Kernel, same: Same) -> Result<Arc<dyn File>, RestoreError> {
        require(is_clean(&self.at.path), "a file's place")?;
        require(self.flags & !(3 | O_APPEND) == 0, "a file's flags")?;
        let path = || shown(&k.vfs.path_of(&self.at));
        let opened = self.open(k).and_then(|file| Ok((file.stat(k)?, file)));
        let (stat, file) = opened.map_err(|errno| RestoreError::File {
            path: path(),
            source: errno.into(),
        })?;
        require(
            file.as_any().is::<HostFile>(),
            "a file of the host that is none",
        )?;
        if self.is(&stat, same) {
            Ok(file)
        } else {
            Err(RestoreError::Changed { path: path() })
        }
    }

    fn is(&self, stat: &Stat, same: Same) -> bool {
        let content = (self.size, self.modified) == (stat.size, stat.mtime);
        match same {
            Same::File => content || (self.device, self.inode) == (stat.dev, stat.ino),
            Same::Content => content,
        }
    }
}

/// Whether a path is as [`Location`] wants it.
fn is_clean(path: &[u8]) -> bool {
    let good =
        |name: &[u8]| !name.is_empty() && name != b"." && name != b".." && !name.contains(&0);
    path.is_empty() || path.split(|&b| b == b'/').all(good)
}

/// Whether a place can be one of this tree.
pub(in crate::linux) fn check_place(vfs: &Vfs, at: &Location) -> Result<(), Damaged> {
    require(at.mount < vfs.mounts.len(), "a place's mount")?;
    require(is_clean(&at.path), "a place's path")
}

/// An open directory.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SavedDirectory {
    at: Location,
    /// What its reading goes on with.
    entries: Option<Vec<DirEntry>>,
}

impl SavedDirectory {
    pub(super) fn of(directory: &DirFile) -> Self {
        let snapshot = directory.snapshot.lock();
        Self {
            at: directory.at.clone(),
            entries: snapshot.as_ref().map(|shown| shown.entries.to_vec()),
        }
    }

    pub(in crate::linux) fn load(self, l: &Loader<'_>) -> Result<Arc<dyn File>, RestoreError> {
        l.place(&self.at)?;
        let directory = DirFile::new(self.at);
        if let Some(entries) = self.entries {
            let bytes = super::dir::cost(&entries);
            let charge = Charge::new(l.k.vfs.budget(), bytes);
            let charge = charge.map_err(|source| RestoreError::Room {
                what: "open directories",
                source,
            })?;
            *directory.snapshot.lock() = Some(Snapshot::new(entries.into(), charge));
        }
        Ok(Arc::new(directory))
    }
}

/// An open file of a made-up tree.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SavedMade {
    pub(super) at: Location,
    pub(super) stat: Stat,
    pub(super) who: (Pid, Tid),
    /// What its reading goes on with.
    pub(super) content: Option<Vec<u8>>,
}

impl SavedMade {
    pub(in crate::linux) fn load(self, l: &Loader<'_>) -> Result<Arc<dyn File>, RestoreError> {
        l.place(&self.at)?;
        let mount = l.k.vfs.mount(&self.at);
        let made = mount.and_then(|mount| mount.fs.open_again(&self));
        made.map_err(|_| Damaged("a made-up file").into())
    }
}

/// Opens a device again.
pub(in crate::linux) fn load_device(
    k: &Kernel,
    at: &Location,
) -> Result<Arc<dyn File>, RestoreError> {
    let is_device = k
        .vfs
        .mount(at)
        .is_ok_and(|mount| matches!(mount.spec.kind, MountKind::Dev) && at.path != b"tty");
    require(is_device, "a device that is none")?;
    let caller = Caller::machine(k);
    let opened = k
        .vfs
        .mount(at)
        .and_then(|m| m.fs.open(&caller, &at.path, 2));
    opened.map_err(|_| Damaged("a device that is none").into())
}
