//! What is mounted where, and building the tree from it.

use std::collections::BTreeMap;
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
use super::{FileSystem, Home, NAME_MAX, Vfs, join, split};

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
    pub(super) fs: Arc<dyn FileSystem>,
    pub(super) read_only: bool,
    pub(super) dev: u64,
    /// As it was asked for.
    pub(super) spec: Arc<MountSpec>,
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
            let spec = MountSpec {
                at: [b"/", &at[..]].concat(),
                kind,
            };
            let at = vfs.resolve(&at);
            if vfs.mounts.iter().any(|mount| mount.at == at) {
                return Err(VfsError::Twice(text(&at)));
            }
            let home = Home {
                mount: index,
                at,
                dev: FIRST_DEV + 1 + index as u64,
            };
            let mount = vfs.build(home, spec)?;
            vfs.mounts.push(mount);
        }
        Ok(vfs)
    }

    /// A mount point's path without the symbolic links that the trees mounted so far have in it: a
    /// place has one path only.
    fn resolve(&self, at: &[u8]) -> Vec<u8> {
        let names = |path: &[u8]| -> Vec<Vec<u8>> {
            let names = path.split(|&b| b == b'/').filter(|name| !name.is_empty());
            names.rev().map(<[u8]>::to_vec).collect()
        };
        let (mut here, mut pending, mut links) = (Vec::new(), names(at), 0);
        while let Some(name) = pending.pop() {
            match &name[..] {
                b"." => continue,
                b".." => {
                    here = split(&here).0.to_vec();
                    continue;
                }
                _ => {}
            }
            let next = join(&here, &name);
            let place = self.locate(&next);
            let target = self
                .mounts
                .get(place.mount)
                .and_then(|m| m.fs.target(&place.path));
            match target.filter(|_| links < 40) {
                Some(target) => {
                    links += 1;
                    if target.first() == Some(&b'/') {
                        here.clear();
                    }
                    pending.extend(names(&target));
                }
                None => here = next,
            }
        }
        here
    }

    fn build(&self, home: Home, spec: MountSpec) -> Result<Mount, VfsError> {
        let kind = spec.kind.clone();
        let (at, dev) = (home.at.clone(), home.dev);
        let read_only = match &kind {
            MountKind::Host { writable, .. } => !writable,
            MountKind::Closure(_) | MountKind::Sys | MountKind::Dev => true,
            MountKind::Mem { .. } | MountKind::Proc => false,
        };
        let fs: Arc<dyn FileSystem> = match kind {
            MountKind::Host { root, .. } => {
                let host = HostFs::new(home, &root);
                Arc::new(host.map_err(|source| VfsError::Host {
                    path: root,
                    source: source.into(),
                })?)
            }
            MountKind::Mem { size, mode } => self.memory(home, size, mode)?,
            MountKind::Closure(entries) => Arc::new(self.closure(home, entries)?),
            MountKind::Proc => Arc::new(SynthFs::new(home, ProcFs)),
            MountKind::Sys => Arc::new(SynthFs::new(home, SysFs)),
            MountKind::Dev => Arc::new(SynthFs::new(home, DevFs)),
        };
        Ok(Mount {
            at,
            fs,
            read_only,
            dev,
            spec: Arc::new(spec),
        })
    }

    /// The tree of another guest that is to see the same: trees in memory are its own, and empty. What the host has is
    /// opened once for both.
    ///
    /// # Errors
    /// [`VfsError`].
    pub fn another(&self) -> Result<Self, VfsError> {
        let mut vfs = Self {
            mounts: Vec::with_capacity(self.mounts.len()),
            budget: Budget::new(self.budget.usage().0, None),
            flocks: Arc::default(),
            owner: self.owner,
        };
        for (index, mount) in self.mounts.iter().enumerate() {
            let fs = match &mount.spec.kind {
                MountKind::Mem { size, mode } => {
                    let home = Home {
                        mount: index,
                        at: mount.at.clone(),
                        dev: mount.dev,
                    };
                    vfs.memory(home, *size, *mode)?
                }
                MountKind::Host { .. }
                | MountKind::Closure(_)
                | MountKind::Proc
                | MountKind::Sys
                | MountKind::Dev => Arc::clone(&mount.fs),
            };
            vfs.mounts.push(Mount {
                at: mount.at.clone(),
                fs,
                read_only: mount.read_only,
                dev: mount.dev,
                spec: Arc::clone(&mount.spec),
            });
        }
        Ok(vfs)
    }

    /// An empty tree in memory.
    fn memory(&self, home: Home, size: u64, mode: u32) -> Result<Arc<dyn FileSystem>, VfsError> {
        let at = text(&home.at);
        let budget = Budget::new(size, Some(Arc::clone(&self.budget)));
        let made = MemFs::new(home, budget, mode, self.owner);
        Ok(Arc::new(made.map_err(|source| VfsError::Build {
            at,
            source: source.into(),
        })?))
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
}

pub(super) fn text(path: &[u8]) -> String {
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
