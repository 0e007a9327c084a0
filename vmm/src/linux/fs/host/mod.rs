//! A directory of the host as a file system of the guest.
//!
//! Every access starts at the root's descriptor and goes through `openat2(2)` with
//! `RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS | RESOLVE_NO_SYMLINKS`: the paths given here are clean
//! and their links resolved, so a link on the way means that somebody changed the tree meanwhile,
//! and the guest gets `ELOOP`. What was opened is judged by [`guard::Guard`] before it is used.
//!
//! Device nodes are not listed and give `EACCES`. FIFOs and sockets are seen by name and by stat(2)
//! and give `EACCES` when opened. Directories on a file system that is refused (`proc`, `sysfs`,
//! ...) give `EACCES`. Calls that name an entry (`mkdirat`, `unlinkat`, ...) get the descriptor of
//! its checked parent and one component, which they do not follow.
//!
//! Files are created with the VMM's identity. Set-user-id and set-group-id bits are dropped: a
//! guest must not leave a privileged program behind.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, RenameFlags, ResolveFlags, Stat as HostStat, Timespec,
    Timestamps, Uid,
};
use rustix::io::Errno;

use super::{Caller, FileSystem, FsStat, Home, Link, split};
use crate::linux::file::{Change, DirEntry, File, SetTime, Stat};
pub(super) use file::HostFile;
pub(in crate::linux) use file::saved_content;
use guard::Guard;

mod file;
mod guard;

const RESOLVE: ResolveFlags = ResolveFlags::IN_ROOT
    .union(ResolveFlags::NO_MAGICLINKS)
    .union(ResolveFlags::NO_SYMLINKS);
const LOOK: OFlags = OFlags::PATH.union(OFlags::NOFOLLOW);
const USE: OFlags = OFlags::NONBLOCK
    .union(OFlags::NOCTTY)
    .union(OFlags::NOFOLLOW);

/// A host directory.
#[derive(Debug)]
pub(super) struct HostFs {
    home: Home,
    root: OwnedFd,
    guard: Guard,
    uid: u32,
}

/// Opens a host file for the closure view: `path` is the person's, not the guest's.
pub(super) fn open_regular(path: &Path) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let fd = rustix::fs::open(path, flags, Mode::empty())?;
    let stat = rustix::fs::fstat(&fd)?;
    Guard::new().check(&fd, &stat)?;
    if FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile {
        Ok(fd)
    } else {
        Err(Errno::ACCESS)
    }
}

impl HostFs {
    /// The directory `root` of the host.
    pub(super) fn new(home: Home, root: &Path) -> Result<Self, Errno> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::open(root, flags, Mode::empty())?;
        let fs = Self {
            home,
            root,
            guard: Guard::new(),
            uid: rustix::process::geteuid().as_raw(),
        };
        fs.node(b"")?;
        Ok(fs)
    }

    fn open_at(&self, path: &[u8], flags: OFlags, mode: Mode) -> Result<OwnedFd, Errno> {
        let path = if path.is_empty() { b"." } else { path };
        let mut tries = 0;
        loop {
            match rustix::fs::openat2(&self.root, path, flags | OFlags::CLOEXEC, mode, RESOLVE) {
                Err(Errno::AGAIN | Errno::INTR) if tries < 8 => tries += 1,
                Err(Errno::MFILE) => {
                    crate::descriptors::tell_of_too_few();
                    return Err(Errno::NFILE);
                }
                result => return result,
            }
        }
    }

    /// A descriptor that only names what is at `path`, checked.
    fn node(&self, path: &[u8]) -> Result<(OwnedFd, HostStat), Errno> {
        let fd = self.open_at(path, LOOK, Mode::empty())?;
        let stat = rustix::fs::fstat(&fd)?;
        self.guard.check(&fd, &stat)?;
        Ok((fd, stat))
    }

    /// The checked parent directory of `path`, and the last component.
    fn parent<'p>(&self, path: &'p [u8]) -> Result<(OwnedFd, &'p [u8]), Errno> {
        if path.is_empty() {
            return Err(Errno::BUSY);
        }
        let (dir, name) = split(path);
        let fd = self.open_at(dir, LOOK | OFlags::DIRECTORY, Mode::empty())?;
        let stat = rustix::fs::fstat(&fd)?;
        self.guard.check_place(&fd, &stat)?;
        Ok((fd, name))
    }

    /// Opens what is at `path` for use, if its kind is `kind`.
    fn open_kind(&self, path: &[u8], flags: OFlags, kind: FileType) -> Result<OwnedFd, Errno> {
        // First a look: opening a FIFO or a device has effects, even if it is closed at once.
        let (_, seen) = self.node(path)?;
        if FileType::from_raw_mode(seen.st_mode) != kind {
            return Err(Errno::ACCESS);
        }
        let fd = self.open_at(path, flags | USE, Mode::empty())?;
        let stat = rustix::fs::fstat(&fd)?;
        self.guard.check(&fd, &stat)?;
        if FileType::from_raw_mode(stat.st_mode) == kind {
            Ok(fd)
        } else {
            Err(Errno::ACCESS)
        }
    }

    fn link_text(&self, path: &[u8]) -> Result<Vec<u8>, Errno> {
        let (fd, stat) = self.node(path)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::Symlink {
            return Err(Errno::INVAL);
        }
        let target = rustix::fs::readlinkat(&fd, "", Vec::with_capacity(256))?;
        Ok(target.into_bytes())
    }

    fn file(&self, fd: OwnedFd, path: &[u8]) -> Result<Arc<dyn File>, Errno> {
        let (at, guest) = (self.home.location(path), self.home.guest_path(path));
        Ok(Arc::new(HostFile::new(Arc::new(fd), at, guest)?))
    }
}

/// The host's flags for the guest's (which have the same values): access mode and append only.
/// Truncation is done later, on the checked descriptor, and needs it writable.
fn use_flags(flags: u32) -> OFlags {
    let truncates = flags & OFlags::TRUNC.bits() != 0;
    let access = match flags & 3 {
        0 if truncates => OFlags::RDWR,
        0 => OFlags::RDONLY,
        1 => OFlags::WRONLY,
        _ => OFlags::RDWR,
    };
    access | (OFlags::from_bits_retain(flags) & OFlags::APPEND)
}

impl FileSystem for HostFs {
    fn look(&self, _: &Caller<'_>, path: &[u8]) -> Result<Stat, Errno> {
        self.node(path).map(|(_, stat)| guest_stat(&stat))
    }

    fn read_link(&self, _: &Caller<'_>, path: &[u8]) -> Result<Link, Errno> {
        self.link_text(path).map(Link::Path)
    }

    fn list(&self, _: &Caller<'_>, path: &[u8]) -> Result<Vec<DirEntry>, Errno> {
        let fd = self.open_kind(
            path,
            OFlags::RDONLY | OFlags::DIRECTORY,
            FileType::Directory,
        )?;
        let mut out = Vec::new();
        for entry in rustix::fs::Dir::new(fd)? {
            let entry = entry?;
            let name = entry.file_name().to_bytes();
            let kind = entry.file_type();
            let device = matches!(kind, FileType::CharacterDevice | FileType::BlockDevice);
            if device || name == b"." || name == b".." {
                continue;
            }
            let kind = if kind == FileType::Unknown {
                0
            } else {
                super::entry_kind(kind.as_raw_mode())
            };
            out.push(DirEntry {
                ino: entry.ino(),
                kind,
                name: name.to_vec(),
            });
        }
        Ok(out)
    }

    fn open_dir(&self, _: &Caller<'_>, path: &[u8]) -> Result<(), Errno> {
        self.open_kind(
            path,
            OFlags::RDONLY | OFlags::DIRECTORY,
            FileType::Directory,
        )
        .map(drop)
    }

    fn open(&self, _: &Caller<'_>, path: &[u8], flags: u32) -> Result<Arc<dyn File>, Errno> {
        let fd = self.open_kind(path, use_flags(flags), FileType::RegularFile)?;
        self.file(fd, path)
    }

    fn create(
        &self,
        _: &Caller<'_>,
        path: &[u8],
        flags: u32,
        mode: u32,
    ) -> Result<Arc<dyn File>, Errno> {
        let (parent, _) = self.parent(path)?;
        drop(parent);
        let how = use_flags(flags) | OFlags::CREATE | OFlags::EXCL | USE;
        let wanted = safe_mode(mode);
        let fd = self.open_at(path, how, wanted)?;
        let stat = rustix::fs::fstat(&fd)?;
        self.guard.check(&fd, &stat)?;
        if Mode::from_raw_mode(stat.st_mode & 0o7777) != wanted {
            // The VMM's own umask took bits off. Not every file system has them to put on.
            let _ = rustix::fs::fchmod(&fd, wanted);
        }
        self.file(fd, path)
    }

    fn mkdir(&self, _: &Caller<'_>, path: &[u8], mode: u32) -> Result<(), Errno> {
        let (parent, name) = self.parent(path)?;
        let wanted = safe_mode(mode);
        rustix::fs::mkdirat(&parent, name, wanted)?;
        let (fd, stat) = self.node(path)?;
        if Mode::from_raw_mode(stat.st_mode & 0o1777) != wanted {
            let _ = change_node(&fd, &Change::Mode(mode));
        }
        Ok(())
    }

    fn remove(&self, _: &Caller<'_>, path: &[u8], directory: bool) -> Result<(), Errno> {
        self.node(path)?;
        let (parent, name) = self.parent(path)?;
        let flags = if directory {
            AtFlags::REMOVEDIR
        } else {
            AtFlags::empty()
        };
        rustix::fs::unlinkat(&parent, name, flags)
    }

    fn symlink(&self, _: &Caller<'_>, path: &[u8], target: &[u8]) -> Result<(), Errno> {
        let (parent, name) = self.parent(path)?;
        rustix::fs::symlinkat(target, &parent, name)
    }

    fn link(&self, _: &Caller<'_>, from: &[u8], to: &[u8]) -> Result<(), Errno> {
        self.node(from)?;
        let ((old, old_name), (new, new_name)) = (self.parent(from)?, self.parent(to)?);
        rustix::fs::linkat(&old, old_name, &new, new_name, AtFlags::empty())
    }

    fn rename(&self, _: &Caller<'_>, from: &[u8], to: &[u8], flags: u32) -> Result<(), Errno> {
        self.node(from)?;
        let flags = RenameFlags::from_bits(flags).ok_or(Errno::INVAL)?;
        let ((old, old_name), (new, new_name)) = (self.parent(from)?, self.parent(to)?);
        rustix::fs::renameat_with(&old, old_name, &new, new_name, flags)
    }

    fn change(&self, _: &Caller<'_>, path: &[u8], change: &Change) -> Result<(), Errno> {
        let (fd, stat) = self.node(path)?;
        if matches!(change, Change::Mode(_))
            && FileType::from_raw_mode(stat.st_mode) == FileType::Symlink
        {
            return Err(Errno::OPNOTSUPP);
        }
        change_node(&fd, change)
    }

    fn statfs(&self, path: &[u8]) -> Result<FsStat, Errno> {
        let (fd, _) = self.node(path)?;
        let s = rustix::fs::fstatfs(&fd)?;
        Ok(FsStat {
            kind: s.f_type as u64,
            block_size: s.f_bsize as u64,
            blocks: s.f_blocks,
            free: s.f_bfree,
            available: s.f_bavail,
            files: s.f_files,
            files_free: s.f_ffree,
        })
    }

    fn target(&self, path: &[u8]) -> Option<Vec<u8>> {
        self.link_text(path).ok()
    }

    fn host_checks(&self) -> Option<u32> {
        Some(self.uid)
    }

    fn as_any(&self) -> &dyn std::any::Any {
        self
    }

    fn kind(&self) -> &'static str {
        "hostfs"
    }
}

/// A host's `struct stat` as the guest sees it.
pub(super) fn guest_stat(s: &HostStat) -> Stat {
    let time = |seconds: i64, nanos: u64| (seconds, nanos as u32);
    Stat {
        dev: s.st_dev,
        ino: s.st_ino,
        nlink: s.st_nlink,
        mode: s.st_mode,
        uid: s.st_uid,
        gid: s.st_gid,
        rdev: 0,
        size: u64::try_from(s.st_size).unwrap_or(0),
        blksize: u64::try_from(s.st_blksize).unwrap_or(4096),
        blocks: u64::try_from(s.st_blocks).unwrap_or(0),
        atime: time(s.st_atime, s.st_atime_nsec),
        mtime: time(s.st_mtime, s.st_mtime_nsec),
        ctime: time(s.st_ctime, s.st_ctime_nsec),
    }
}

/// The permission bits a guest may set on a host file.
fn safe_mode(mode: u32) -> Mode {
    Mode::from_raw_mode(mode & 0o1777)
}

fn timestamps(atime: SetTime, mtime: SetTime) -> Timestamps {
    let spec = |time: SetTime| match time {
        SetTime::Keep => Timespec {
            tv_sec: 0,
            tv_nsec: rustix::fs::UTIME_OMIT,
        },
        SetTime::Now => Timespec {
            tv_sec: 0,
            tv_nsec: rustix::fs::UTIME_NOW,
        },
        SetTime::At(seconds, nanos) => Timespec {
            tv_sec: seconds,
            tv_nsec: nanos.into(),
        },
    };
    Timestamps {
        last_access: spec(atime),
        last_modification: spec(mtime),
    }
}

/// Changes attributes of an open regular file.
fn change_open(fd: &OwnedFd, change: &Change) -> Result<(), Errno> {
    match *change {
        Change::Mode(mode) => rustix::fs::fchmod(fd, safe_mode(mode)),
        Change::Owner(uid, gid) => {
            rustix::fs::fchown(fd, uid.map(Uid::from_raw), gid.map(Gid::from_raw))
        }
        Change::Times(atime, mtime) => rustix::fs::futimens(fd, &timestamps(atime, mtime)),
    }
}

/// Changes attributes of what an `O_PATH` descriptor names.
fn change_node(fd: &OwnedFd, change: &Change) -> Result<(), Errno> {
    match *change {
        Change::Mode(mode) => {
            // fchmod(2) refuses such a descriptor; the host's own magic link names the same file.
            let link = format!("/proc/self/fd/{}", fd.as_raw_fd());
            rustix::fs::chmod(link, safe_mode(mode))
        }
        Change::Owner(uid, gid) => {
            let (uid, gid) = (uid.map(Uid::from_raw), gid.map(Gid::from_raw));
            rustix::fs::chownat(fd.as_fd(), "", uid, gid, AtFlags::EMPTY_PATH)
        }
        Change::Times(atime, mtime) => rustix::fs::utimensat(
            fd.as_fd(),
            "",
            &timestamps(atime, mtime),
            AtFlags::EMPTY_PATH,
        ),
    }
}
