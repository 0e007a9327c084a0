//! The guest's file tree: mounts, path walking, and the kinds of file system.
//!
//! [`Vfs`] is an immutable table of mounts (guest path -> [`FileSystem`]); a path is walked by us,
//! component by component, so a symbolic link, `..` or a mount point means what it means *in the
//! guest*. A place in the tree is a [`Location`]: data, not a host descriptor.
//!
//! What the guest may see of the host is decided in `host`: only regular files, directories and
//! symbolic links, reached through `openat2(2)` below a directory a person named. Everything else
//! (`/proc`, `/sys`, `/dev`, in-memory trees) is made up here.
//!
//! # Invariants
//! * A `Location`'s path is clean: no empty, `.` or `..` component, no leading or trailing slash.
//! * No file system method is called with [`Kernel::state`] locked.
//!
//! # Known holes
//! * A working directory or directory descriptor is a path: it does not follow the directory when
//!   another name is given to it from outside the guest.
//! * No extended attributes (`EOPNOTSUPP`), no `inotify`, FIFOs and sockets in memory only (`EPERM` elsewhere).

use std::fmt::Debug;
use std::sync::Arc;

use rustix::io::Errno;

use super::call::Ctx;
use super::file::{Change, Description, DirEntry, File, Location, Stat};
use super::kernel::Kernel;
use super::process::{Credentials, Pid};
use super::thread::Tid;

pub mod abi;
mod budget;
pub mod calls;
mod devfs;
mod dir;
mod flock;
pub(in crate::linux) mod host;
pub(in crate::linux) mod memfs;
mod mount;
mod open;
mod procfs;
pub mod saved;
mod synth;
mod sysfs;
#[cfg(test)]
mod tests;
mod tree;
mod vfs;
mod vmm;
mod walk;

pub use budget::Budget;
pub use dir::{DirFile, PathFile};
pub use flock::{FlockGuard, Flocks};
pub use memfs::Seals;
pub use mount::{ClosureEntry, MountKind, MountSpec, VfsError};
pub use open::OpenHow;
pub use vfs::Vfs;
pub use walk::{Follow, Found, Walk};

/// Longest name of a directory entry (`NAME_MAX`, limits.h).
pub const NAME_MAX: usize = 255;

/// The file type bits of a mode (`S_IFMT`, inode(7)).
pub const S_IFMT: u32 = 0o170_000;
/// Directory.
pub const S_IFDIR: u32 = 0o040_000;
/// Regular file.
pub const S_IFREG: u32 = 0o100_000;
/// Socket, in `st_mode`.
pub const S_IFSOCK: u32 = 0o140_000;
/// FIFO, in `st_mode`.
pub const S_IFIFO: u32 = 0o010_000;
/// Symbolic link.
pub const S_IFLNK: u32 = 0o120_000;
/// Character device.
pub const S_IFCHR: u32 = 0o020_000;

/// What mknod(2) can make here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Node {
    /// An empty regular file.
    Regular,
    /// A pipe with a name.
    Fifo,
    /// The name of a socket.
    Socket,
}

/// Who asks: permissions and the per-process parts of `/proc` depend on it.
#[derive(Clone)]
pub struct Caller<'a> {
    /// The machine.
    pub k: &'a Kernel,
    /// The asking process; 0 for the VMM itself.
    pub pid: Pid,
    /// The asking thread.
    pub tid: Tid,
    /// Its identity.
    pub cred: Credentials,
}

impl<'a> Caller<'a> {
    /// The calling thread.
    #[must_use]
    pub fn of(c: &Ctx<'a>) -> Self {
        let cred = c.with_process(|p| p.cred.clone());
        Self {
            k: c.k,
            pid: c.t.pid,
            tid: c.t.tid,
            cred,
        }
    }

    /// The VMM itself, for work that no process asked for.
    #[must_use]
    pub fn machine(k: &'a Kernel) -> Self {
        Self {
            k,
            pid: 0,
            tid: 0,
            cred: Credentials::default(),
        }
    }

    /// Effective user id.
    pub(crate) fn uid(&self) -> u32 {
        self.cred.uid[1]
    }

    /// Effective group id.
    pub(crate) fn gid(&self) -> u32 {
        self.cred.gid[1]
    }

    /// Whether the mode bits of `stat` allow all of `want` (`rwx` as 4, 2, 1).
    pub(crate) fn permitted(&self, stat: &Stat, want: u32) -> bool {
        if self.uid() == 0 {
            return want & 1 == 0 || stat.mode & S_IFMT == S_IFDIR || stat.mode & 0o111 != 0;
        }
        let shift = if self.uid() == stat.uid {
            6
        } else if self.gid() == stat.gid || self.cred.groups.contains(&stat.gid) {
            3
        } else {
            0
        };
        (stat.mode >> shift) & want == want
    }
}

/// Where a symbolic link leads.
#[derive(Debug)]
pub enum Link {
    /// A path, resolved from the link's directory.
    Path(Vec<u8>),
    /// A place, whatever its name (`/proc/PID/exe`, `cwd`, `root`).
    At(Location),
    /// An open description (`/proc/PID/fd/N`).
    Open(Arc<Description>),
}

/// What statfs(2) tells.
#[derive(Clone, Copy, Debug, Default)]
#[expect(missing_docs, reason = "named as in statfs(2)")]
pub struct FsStat {
    pub kind: u64,
    pub block_size: u64,
    pub blocks: u64,
    pub free: u64,
    pub available: u64,
    pub files: u64,
    pub files_free: u64,
}

/// Where a file system hangs in the tree, known to it so that its files can say where they are.
#[derive(Clone, Debug)]
pub struct Home {
    /// Index into the machine's mounts.
    pub mount: usize,
    /// Guest path of the mount point, clean; empty for the root.
    pub at: Vec<u8>,
    /// Device number for what is not on a host's device.
    pub dev: u64,
}

impl Home {
    /// The place of `path` inside this mount.
    #[must_use]
    pub fn location(&self, path: &[u8]) -> Location {
        Location {
            mount: self.mount,
            path: path.to_vec(),
        }
    }

    /// The guest path (with leading slash) of `path` inside this mount.
    #[must_use]
    pub fn guest_path(&self, path: &[u8]) -> Vec<u8> {
        let mut out = vec![b'/'];
        out.extend_from_slice(&join(&self.at, path));
        out
    }
}

/// A kind of file system. Paths are clean and relative to the mount's root; permission bits,
/// read-only mounts and mount points have been looked at by [`Vfs`] before.
pub trait FileSystem: Debug + Send + Sync {
    /// What is at `path`, not following a symbolic link.
    ///
    /// # Errors
    /// `ENOENT`, `ENOTDIR`, `EACCES`, or the host's.
    fn look(&self, c: &Caller<'_>, path: &[u8]) -> Result<Stat, Errno>;

    /// Where the symbolic link at `path` leads.
    ///
    /// # Errors
    /// `EINVAL` if it is none.
    fn read_link(&self, c: &Caller<'_>, path: &[u8]) -> Result<Link, Errno>;

    /// The directory's entries without `.` and `..`.
    ///
    /// # Errors
    /// `ENOTDIR`, or the host's.
    fn list(&self, c: &Caller<'_>, path: &[u8]) -> Result<Vec<DirEntry>, Errno>;

    /// Opens what is no directory and no link.
    ///
    /// # Errors
    /// `EACCES` for kinds that are not opened, or the host's.
    fn open(&self, c: &Caller<'_>, path: &[u8], flags: u32) -> Result<Arc<dyn File>, Errno>;

    /// Whether the directory at `path` may be opened for listing.
    ///
    /// # Errors
    /// The host's.
    fn open_dir(&self, c: &Caller<'_>, path: &[u8]) -> Result<(), Errno> {
        let _ = (c, path);
        Ok(())
    }

    /// Creates a regular file that is not there and opens it.
    ///
    /// # Errors
    /// `EEXIST`, `EPERM`, or the host's.
    fn create(
        &self,
        c: &Caller<'_>,
        path: &[u8],
        flags: u32,
        mode: u32,
    ) -> Result<Arc<dyn File>, Errno> {
        let _ = (c, path, flags, mode);
        Err(Errno::PERM)
    }

    /// mknod(2) for a FIFO or a socket.
    ///
    /// # Errors
    /// `EEXIST`, `ENOSPC`; `EPERM` where there are none.
    fn mknod(&self, c: &Caller<'_>, path: &[u8], node: Node, mode: u32) -> Result<(), Errno> {
        let _ = (c, path, node, mode);
        Err(Errno::PERM)
    }

    /// mkdir(2).
    ///
    /// # Errors
    /// `EEXIST`, `EPERM`, or the host's.
    fn mkdir(&self, c: &Caller<'_>, path: &[u8], mode: u32) -> Result<(), Errno> {
        let _ = (c, path, mode);
        Err(Errno::PERM)
    }

    /// unlink(2), or rmdir(2) for directories.
    ///
    /// # Errors
    /// `ENOTEMPTY`, `EISDIR`, `ENOTDIR`, `EPERM`, or the host's.
    fn remove(&self, c: &Caller<'_>, path: &[u8], directory: bool) -> Result<(), Errno> {
        let _ = (c, path, directory);
        Err(Errno::PERM)
    }

    /// symlink(2).
    ///
    /// # Errors
    /// `EEXIST`, `EPERM`, or the host's.
    fn symlink(&self, c: &Caller<'_>, path: &[u8], target: &[u8]) -> Result<(), Errno> {
        let _ = (c, path, target);
        Err(Errno::PERM)
    }

    /// link(2), both inside this file system; a symbolic link is linked itself.
    ///
    /// # Errors
    /// `EEXIST`, `EPERM`, or the host's.
    fn link(&self, c: &Caller<'_>, from: &[u8], to: &[u8]) -> Result<(), Errno> {
        let _ = (c, from, to);
        Err(Errno::PERM)
    }

    /// renameat2(2), both inside this file system.
    ///
    /// # Errors
    /// `EEXIST`, `ENOTEMPTY`, `EPERM`, or the host's.
    fn rename(&self, c: &Caller<'_>, from: &[u8], to: &[u8], flags: u32) -> Result<(), Errno> {
        let _ = (c, from, to, flags);
        Err(Errno::PERM)
    }

    /// Changes attributes of what is at `path` (a symbolic link itself).
    ///
    /// # Errors
    /// `EPERM`, or the host's.
    fn change(&self, c: &Caller<'_>, path: &[u8], change: &Change) -> Result<(), Errno> {
        let _ = (c, path, change);
        Err(Errno::PERM)
    }

    /// What statfs(2) tells of the file system that `path` is on.
    ///
    /// # Errors
    /// The host's.
    fn statfs(&self, path: &[u8]) -> Result<FsStat, Errno>;

    /// The user id whose access the host itself checks: for that user our look at the mode bits is
    /// left out (the host knows access control lists too).
    fn host_checks(&self) -> Option<u32> {
        None
    }

    /// What the symbolic link at `path` says, for a tree that says the same to every caller: asked
    /// while the tree is built.
    fn target(&self, path: &[u8]) -> Option<Vec<u8>> {
        let _ = path;
        None
    }

    /// Opens a file that is made up once more, as it was when it was saved.
    ///
    /// # Errors
    /// `ENXIO` where there are none.
    fn open_again(&self, saved: &saved::SavedMade) -> Result<Arc<dyn File>, Errno> {
        let _ = saved;
        Err(Errno::NXIO)
    }

    /// The kind as the one it is.
    fn as_any(&self) -> &dyn std::any::Any;

    /// The type `/proc/mounts` shows.
    fn kind(&self) -> &'static str;
}

/// `a/b`, where either may be empty.
#[must_use]
pub(crate) fn join(a: &[u8], b: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(a.len() + b.len() + 1);
    out.extend_from_slice(a);
    if !a.is_empty() && !b.is_empty() {
        out.push(b'/');
    }
    out.extend_from_slice(b);
    out
}

/// The directory and the last component of a clean path that is not empty.
#[must_use]
pub(crate) fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|&b| b == b'/') {
        Some(at) => (&path[..at], &path[at + 1..]),
        None => (&[], path),
    }
}

/// What is left of `path` below `base`: empty if they are equal, `None` if it is not below.
#[must_use]
pub(crate) fn below<'p>(path: &'p [u8], base: &[u8]) -> Option<&'p [u8]> {
    if base.is_empty() {
        return Some(path);
    }
    let rest = path.strip_prefix(base)?;
    match rest.first() {
        None => Some(rest),
        Some(b'/') => Some(&rest[1..]),
        Some(_) => None,
    }
}

/// An inode number for what has none of its own (FNV-1a of its path).
#[must_use]
pub(crate) fn path_ino(path: &[u8]) -> u64 {
    let hash = path.iter().fold(0xcbf2_9ce4_8422_2325_u64, |h, &b| {
        (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3)
    });
    (hash >> 1) | 1
}

/// `DT_*` of a mode.
#[must_use]
pub(crate) fn entry_kind(mode: u32) -> u8 {
    ((mode & S_IFMT) >> 12) as u8
}
