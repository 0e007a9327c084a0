//! The mount table.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::path::PathBuf;
use std::sync::Arc;

use rustix::io::Errno;

use super::budget::Budget;
use super::devfs::DevFs;
use super::host::HostFs;
use super::memfs::MemFs;
use super::procfs::ProcFs;
use super::synth::SynthFs;
use super::sysfs::SysFs;
use super::{
    Caller, FileSystem, Flocks, FsStat, Home, Link, NAME_MAX, S_IFDIR, S_IFMT, below, join,
    path_ino, split,
};
use crate::linux::file::{DirEntry, File, Location, Stat};

/// Device numbers of mounts: major 0, as Linux gives to what is on no device, and minors from
/// 0xff000, which a host does not come to.
const FIRST_DEV: u64 = 0xff00_0000;
/// Device number of files without a place in the tree.
pub(super) const ANONYMOUS_DEV: u64 = FIRST_DEV;

/// A file of the closure view: what is visible without a root directory.
#[derive(Clone, Debug)]
pub enum ClosureEntry {
    /// A regular file of the host, at this guest path.
    File {
        /// Guest path.
        guest: Vec<u8>,
        /// The host's file.
        host: PathBuf,
    },
    /// A symbolic link.
    Symlink {
        /// Guest path.
        guest: Vec<u8>,
        /// What it says.
        target: Vec<u8>,
    },
}

/// What is mounted.
#[derive(Clone, Debug)]
pub enum MountKind {
    /// A directory of the host.
    Host {
        /// The directory.
        root: PathBuf,
        /// Whether the guest may write to it.
        writable: bool,
    },
    /// An empty tree in memory.
    Mem {
        /// Bytes it may hold; also counted against the machine's limit.
        size: u64,
        /// Permission bits of its root.
        mode: u32,
    },
    /// A read-only tree that holds these files only.
    Closure(Vec<ClosureEntry>),
    /// `/proc`.
    Proc,
    /// `/sys`.
    Sys,
    /// `/dev`.
    Dev,
}

/// A mount a person or the builder asks for.
#[derive(Clone, Debug)]
pub struct MountSpec {
    /// Absolute guest path.
    pub at: Vec<u8>,
    /// What is there.
    pub kind: MountKind,
}

/// Why the file tree could not be built.
#[derive(Debug, thiserror::Error)]
pub enum VfsError {
    /// Not an absolute path of names.
    #[error("mount point {0:?} is not an absolute path without '.' and '..'")]
    BadMountPoint(String),
    /// Two mounts at one place.
    #[error("two file systems at {0:?}")]
    Twice(String),
    /// No root.
    #[error("nothing is mounted at '/'")]
    NoRoot,
    /// A host directory or file cannot be used.
    #[error("cannot use {path:?} of the host")]
    Host {
        /// The host's path.
        path: PathBuf,
        /// The reason.
        #[source]
        source: std::io::Error,
    },
    /// The limit on memory is too small for the tree itself.
    #[error("cannot build the file system at {at:?}")]
    Build {
        /// Guest path.
        at: String,
        /// The reason.
        #[source]
        source: std::io::Error,
    },
}

#[derive(Debug)]
pub(super) struct Mount {
    /// Clean guest path; empty for the root.
    pub(super) at: Vec<u8>,
    pub(super) fs: Box<dyn FileSystem>,
    pub(super) read_only: bool,
    pub(super) dev: u64,
}

/// Mounts and path walking. The mounts never change.
#[derive(Debug)]
pub struct Vfs {
    pub(super) mounts: Vec<Mount>,
    budget: Arc<Budget>,
    flocks: Arc<Flocks>,
    owner: (u32, u32),
}

impl Vfs {
    /// Builds the tree. `memory` is the limit on all bytes that the guest's files may take of the
    /// VMM's memory.
    ///
    /// # Errors
    /// [`VfsError`].
    pub fn new(mounts: Vec<MountSpec>, memory: u64) -> Result<Self, VfsError> {
        let mut places = BTreeMap::new();
        for spec in mounts {
            let at = clean_mount_point(&spec.at)?;
            if places.insert((at.len(), at), spec.kind).is_some() {
                return Err(VfsError::Twice(text(&spec.at)));
            }
        }
        if places.keys().next().is_none_or(|(len, _)| *len != 0) {
            return Err(VfsError::NoRoot);
        }
        let owner = (
            rustix::process::geteuid().as_raw(),
            rustix::process::getegid().as_raw(),
        );
        let mut vfs = Self {
            mounts: Vec::new(),
            budget: Budget::new(memory, None),
            flocks: Arc::default(),
            owner,
        };
        for (index, ((_, at), kind)) in places.into_iter().enumerate() {
            let home = Home {
                mount: index,
                at,
                dev: FIRST_DEV + 1 + index as u64,
            };
            let mount = vfs.build(home, kind)?;
            vfs.mounts.push(mount);
        }
        Ok(vfs)
    }

    fn build(&self, home: Home, kind: MountKind) -> Result<Mount, VfsError> {
        let (at, dev) = (home.at.clone(), home.dev);
        let failed = |source: Errno| VfsError::Build {
            at: text(&at),
            source: source.into(),
        };
        let read_only = match &kind {
            MountKind::Host { writable, .. } => !writable,
            MountKind::Closure(_) | MountKind::Sys | MountKind::Dev => true,
            MountKind::Mem { .. } | MountKind::Proc => false,
        };
        let fs: Box<dyn FileSystem> = match kind {
            MountKind::Host { root, .. } => {
                let host = HostFs::new(home, &root);
                Box::new(host.map_err(|source| VfsError::Host {
                    path: root,
                    source: source.into(),
                })?)
            }
            MountKind::Mem { size, mode } => {
                let budget = Budget::new(size, Some(Arc::clone(&self.budget)));
                Box::new(MemFs::new(home, budget, mode, self.owner).map_err(failed)?)
            }
            MountKind::Closure(entries) => Box::new(self.closure(home, entries)?),
            MountKind::Proc => Box::new(SynthFs::new(home, ProcFs)),
            MountKind::Sys => Box::new(SynthFs::new(home, SysFs)),
            MountKind::Dev => Box::new(SynthFs::new(home, DevFs)),
        };
        Ok(Mount {
            at,
            fs,
            read_only,
            dev,
        })
    }

    fn closure(&self, home: Home, entries: Vec<ClosureEntry>) -> Result<MemFs, VfsError> {
        let at = text(&home.at);
        let failed = |source: Errno| VfsError::Build {
            at: at.clone(),
            source: source.into(),
        };
        let fs = MemFs::new(home, Arc::clone(&self.budget), 0o755, (0, 0)).map_err(failed)?;
        for entry in entries {
            match entry {
                ClosureEntry::File { guest, host } => {
                    let opened = super::host::open_regular(&host);
                    let fd = opened.map_err(|source| VfsError::Host {
                        path: host,
                        source: source.into(),
                    })?;
                    fs.add_host(&clean_mount_point(&guest)?, fd)
                        .map_err(failed)?;
                }
                ClosureEntry::Symlink { guest, target } => {
                    fs.add_link(&clean_mount_point(&guest)?, &target)
                        .map_err(failed)?;
                }
            }
        }
        Ok(fs)
    }

    /// The root directory.
    #[must_use]
    pub fn root(&self) -> Location {
        Location {
            mount: 0,
            path: Vec::new(),
        }
    }

    /// The guest path of a place, with its leading slash.
    #[must_use]
    pub fn path_of(&self, at: &Location) -> Vec<u8> {
        let mut out = vec![b'/'];
        out.extend_from_slice(&self.clean_path(at));
        out
    }

    /// The memory its files may take.
    #[must_use]
    pub fn budget(&self) -> &Arc<Budget> {
        &self.budget
    }

    /// The machine's flock(2) locks.
    #[must_use]
    pub fn flocks(&self) -> &Arc<Flocks> {
        &self.flocks
    }

    /// A file in memory without a name in the tree (memfd_create(2)).
    ///
    /// # Errors
    /// `ENOSPC`.
    pub fn memory_file(&self, c: &Caller<'_>, name: &[u8]) -> Result<Arc<dyn File>, Errno> {
        super::memfs::anonymous(&self.budget, name, (c.uid(), c.gid()))
    }

    /// The guest path of a place, clean.
    pub(super) fn clean_path(&self, at: &Location) -> Vec<u8> {
        self.mounts
            .get(at.mount)
            .map(|mount| join(&mount.at, &at.path))
            .unwrap_or_default()
    }

    /// The place of a clean guest path: the mount with the longest prefix.
    pub(super) fn locate(&self, path: &[u8]) -> Location {
        // Sorted by length: the last that fits is the longest.
        let fits =
            |(index, mount): (usize, &Mount)| below(path, &mount.at).map(|rest| (index, rest));
        let found = self.mounts.iter().enumerate().rev().find_map(fits);
        let (mount, rest) = found.unwrap_or((0, path));
        Location {
            mount,
            path: rest.to_vec(),
        }
    }

    pub(super) fn mount(&self, at: &Location) -> Result<&Mount, Errno> {
        self.mounts.get(at.mount).ok_or(Errno::NOENT)
    }

    /// Whether a mount point is below this place: then it is a directory that cannot go.
    pub(super) fn leads_to_mount(&self, at: &Location) -> bool {
        let path = self.clean_path(at);
        self.mounts
            .iter()
            .any(|m| m.at.len() > path.len() && below(&m.at, &path).is_some())
    }

    /// What is at a place, not following a symbolic link.
    ///
    /// # Errors
    /// `ENOENT`, `ENOTDIR`, `EACCES`, or the host's.
    pub fn look(&self, c: &Caller<'_>, at: &Location) -> Result<Stat, Errno> {
        let mount = self.mount(at)?;
        let seen = mount.fs.look(c, &at.path);
        let is_directory = seen
            .as_ref()
            .is_ok_and(|stat| stat.mode & S_IFMT == S_IFDIR);
        if !is_directory && self.leads_to_mount(at) {
            return Ok(self.made_up_directory(mount, &at.path));
        }
        seen
    }

    /// A directory on the way to a mount point that the lower file system does not have.
    fn made_up_directory(&self, mount: &Mount, path: &[u8]) -> Stat {
        Stat {
            dev: mount.dev,
            ino: path_ino(path),
            nlink: 2,
            mode: S_IFDIR | 0o755,
            uid: self.owner.0,
            gid: self.owner.1,
            blksize: 4096,
            ..Stat::default()
        }
    }

    /// Where the link at a place leads.
    ///
    /// # Errors
    /// `EINVAL` if it is none.
    pub fn read_link(&self, c: &Caller<'_>, at: &Location) -> Result<Link, Errno> {
        self.mount(at)?.fs.read_link(c, &at.path)
    }

    /// A directory's entries: `.` and `..`, then its own with the mount points among them.
    ///
    /// # Errors
    /// `ENOTDIR`, or the host's.
    pub fn list(&self, c: &Caller<'_>, at: &Location) -> Result<Vec<DirEntry>, Errno> {
        let mut own = match self.mount(at)?.fs.list(c, &at.path) {
            Err(Errno::NOENT | Errno::NOTDIR) if self.leads_to_mount(at) => Vec::new(),
            result => result?,
        };
        let path = self.clean_path(at);
        let below_here = |mount: &Mount| {
            let rest = below(&mount.at, &path)?;
            let name = rest.split(|&b| b == b'/').next()?;
            (!name.is_empty()).then(|| name.to_vec())
        };
        for name in self.mounts.iter().filter_map(below_here) {
            own.retain(|entry| entry.name != name);
            let ino = self
                .look(c, &self.locate(&join(&path, &name)))
                .map_or(1, |stat| stat.ino);
            own.push(DirEntry { ino, kind: 4, name });
        }
        let parent = if path.is_empty() {
            &path[..]
        } else {
            split(&path).0
        };
        let ino_of = |at: &Location| self.look(c, at).map_or(1, |stat| stat.ino);
        let dots = [
            (&b"."[..], ino_of(at)),
            (b"..", ino_of(&self.locate(parent))),
        ];
        let mut out: Vec<_> = dots
            .into_iter()
            .map(|(name, ino)| DirEntry {
                ino,
                kind: 4,
                name: name.to_vec(),
            })
            .collect();
        out.append(&mut own);
        Ok(out)
    }

    /// What statfs(2) tells, and whether the mount is read-only.
    ///
    /// # Errors
    /// The host's.
    pub fn statfs(&self, at: &Location) -> Result<(FsStat, bool), Errno> {
        let mount = self.mount(at)?;
        Ok((mount.fs.statfs(&at.path)?, mount.read_only))
    }

    /// Whether the caller may do all of `want` (`rwx` as 4, 2, 1) with what is at a place.
    pub(super) fn check(
        &self,
        c: &Caller<'_>,
        at: &Location,
        stat: &Stat,
        want: u32,
    ) -> Result<(), Errno> {
        let by_host = self.mount(at)?.fs.host_checks() == Some(c.uid());
        if by_host || c.permitted(stat, want) {
            Ok(())
        } else {
            Err(Errno::ACCESS)
        }
    }

    /// The lines of `/proc/mounts`: source, mount point, type, options.
    #[must_use]
    pub fn mount_lines(&self) -> String {
        let line = |m: &Mount| {
            let options = if m.read_only { "ro" } else { "rw" };
            format!(
                "{0} /{1} {0} {options},nosuid,nodev 0 0\n",
                m.fs.kind(),
                text(&m.at).replace(' ', "\\040")
            )
        };
        self.mounts.iter().map(line).collect()
    }
}

impl Vfs {
    /// The lines of `/proc/PID/mountinfo`.
    #[must_use]
    pub fn mountinfo_lines(&self) -> String {
        let line = |(index, m): (usize, &Mount)| {
            let options = if m.read_only { "ro" } else { "rw" };
            let (id, parent) = (index + 21, if index == 0 { 1 } else { 21 });
            let (minor, at, kind) = (
                0xff001 + index,
                text(&m.at).replace(' ', "\\040"),
                m.fs.kind(),
            );
            format!(
                "{id} {parent} 0:{minor} / /{at} {options},nosuid,nodev - {kind} {kind} {options}\n"
            )
        };
        self.mounts.iter().enumerate().map(line).collect()
    }
}

fn text(path: &[u8]) -> String {
    String::from_utf8_lossy(path).into_owned()
}

/// A path a person gave, as a clean guest path.
fn clean_mount_point(path: &[u8]) -> Result<Vec<u8>, VfsError> {
    let bad = || VfsError::BadMountPoint(text(path));
    let rest = path.strip_prefix(b"/").ok_or_else(bad)?;
    let names: Vec<&[u8]> = rest
        .split(|&b| b == b'/')
        .filter(|name| !name.is_empty() && *name != b".")
        .collect();
    if names
        .iter()
        .any(|name| *name == b".." || name.len() > NAME_MAX || name.contains(&0))
    {
        return Err(bad());
    }
    Ok(names.join(&b'/'))
}
