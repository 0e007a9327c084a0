//! The system calls about paths, directories and attributes.

use std::sync::Arc;

use rustix::io::Errno;

use super::{Caller, DirFile, Follow, Found, PathFile};
use crate::linux::call::{Arg, Args, Ctx, Entry, SysResult};
use crate::linux::file::{Description, Location};

mod attr;
mod dirs;
mod lock;
mod names;
mod open;
mod stat;

const AT_FDCWD: i32 = -100;
const AT_SYMLINK_NOFOLLOW: u32 = 0x100;
const AT_REMOVEDIR: u32 = 0x200;
const AT_EACCESS: u32 = 0x200;
const AT_SYMLINK_FOLLOW: u32 = 0x400;
const AT_NO_AUTOMOUNT: u32 = 0x800;
const AT_EMPTY_PATH: u32 = 0x1000;

/// The calls.
pub const TABLE: &[Entry] = {
    use Arg::{Fd, Hex, Int, Oct, Str};
    &[
        Entry::new(2, "open", &[Str, Hex, Oct], open::open),
        Entry::new(4, "stat", &[Str, Hex], stat::stat),
        Entry::new(5, "fstat", &[Fd, Hex], stat::fstat),
        Entry::new(6, "lstat", &[Str, Hex], stat::lstat),
        Entry::new(21, "access", &[Str, Oct], stat::access),
        Entry::new(73, "flock", &[Fd, Int], lock::flock),
        Entry::new(74, "fsync", &[Fd], attr::fsync),
        Entry::new(75, "fdatasync", &[Fd], attr::fdatasync),
        Entry::new(76, "truncate", &[Str, Int], attr::truncate),
        Entry::new(77, "ftruncate", &[Fd, Int], attr::ftruncate),
        Entry::new(78, "getdents", &[Fd, Hex, Int], dirs::getdents),
        Entry::new(79, "getcwd", &[Hex, Int], dirs::getcwd),
        Entry::new(80, "chdir", &[Str], dirs::chdir),
        Entry::new(81, "fchdir", &[Fd], dirs::fchdir),
        Entry::new(82, "rename", &[Str, Str], names::rename),
        Entry::new(83, "mkdir", &[Str, Oct], names::mkdir),
        Entry::new(84, "rmdir", &[Str], names::rmdir),
        Entry::new(85, "creat", &[Str, Oct], open::creat),
        Entry::new(86, "link", &[Str, Str], names::link),
        Entry::new(87, "unlink", &[Str], names::unlink),
        Entry::new(88, "symlink", &[Str, Str], names::symlink),
        Entry::new(89, "readlink", &[Str, Hex, Int], stat::readlink),
        Entry::new(90, "chmod", &[Str, Oct], attr::chmod),
        Entry::new(91, "fchmod", &[Fd, Oct], attr::fchmod),
        Entry::new(92, "chown", &[Str, Int, Int], attr::chown),
        Entry::new(93, "fchown", &[Fd, Int, Int], attr::fchown),
        Entry::new(94, "lchown", &[Str, Int, Int], attr::lchown),
        Entry::new(95, "umask", &[Oct], dirs::umask),
        Entry::new(132, "utime", &[Str, Hex], attr::utime),
        Entry::new(133, "mknod", &[Str, Oct, Hex], names::mknod),
        Entry::new(137, "statfs", &[Str, Hex], stat::statfs),
        Entry::new(138, "fstatfs", &[Fd, Hex], stat::fstatfs),
        Entry::new(162, "sync", &[], attr::sync),
        Entry::new(165, "mount", &[Str, Str, Str, Hex, Hex], refused),
        Entry::new(166, "umount2", &[Str, Hex], refused),
        Entry::new(161, "chroot", &[Str], refused),
        Entry::new(188, "setxattr", &[Str, Str, Hex, Int, Hex], no_attributes),
        Entry::new(189, "lsetxattr", &[Str, Str, Hex, Int, Hex], no_attributes),
        Entry::new(190, "fsetxattr", &[Fd, Str, Hex, Int, Hex], no_attributes),
        Entry::new(191, "getxattr", &[Str, Str, Hex, Int], no_attributes),
        Entry::new(192, "lgetxattr", &[Str, Str, Hex, Int], no_attributes),
        Entry::new(193, "fgetxattr", &[Fd, Str, Hex, Int], no_attributes),
        Entry::new(194, "listxattr", &[Str, Hex, Int], no_attributes),
        Entry::new(195, "llistxattr", &[Str, Hex, Int], no_attributes),
        Entry::new(196, "flistxattr", &[Fd, Hex, Int], no_attributes),
        Entry::new(197, "removexattr", &[Str, Str], no_attributes),
        Entry::new(198, "lremovexattr", &[Str, Str], no_attributes),
        Entry::new(199, "fremovexattr", &[Fd, Str], no_attributes),
        Entry::new(217, "getdents64", &[Fd, Hex, Int], dirs::getdents64),
        Entry::new(221, "fadvise64", &[Fd, Int, Int, Int], attr::fadvise),
        Entry::new(235, "utimes", &[Str, Hex], attr::utimes),
        Entry::new(257, "openat", &[Fd, Str, Hex, Oct], open::openat),
        Entry::new(258, "mkdirat", &[Fd, Str, Oct], names::mkdirat),
        Entry::new(259, "mknodat", &[Fd, Str, Oct, Hex], names::mknodat),
        Entry::new(260, "fchownat", &[Fd, Str, Int, Int, Hex], attr::fchownat),
        Entry::new(261, "futimesat", &[Fd, Str, Hex], attr::futimesat),
        Entry::new(262, "newfstatat", &[Fd, Str, Hex, Hex], stat::newfstatat),
        Entry::new(263, "unlinkat", &[Fd, Str, Hex], names::unlinkat),
        Entry::new(264, "renameat", &[Fd, Str, Fd, Str], names::renameat),
        Entry::new(265, "linkat", &[Fd, Str, Fd, Str, Hex], names::linkat),
        Entry::new(266, "symlinkat", &[Str, Fd, Str], names::symlinkat),
        Entry::new(267, "readlinkat", &[Fd, Str, Hex, Int], stat::readlinkat),
        Entry::new(268, "fchmodat", &[Fd, Str, Oct], attr::fchmodat),
        Entry::new(269, "faccessat", &[Fd, Str, Oct], stat::faccessat),
        Entry::new(
            277,
            "sync_file_range",
            &[Fd, Int, Int, Hex],
            attr::fdatasync,
        ),
        Entry::new(280, "utimensat", &[Fd, Str, Hex, Hex], attr::utimensat),
        Entry::new(285, "fallocate", &[Fd, Hex, Int, Int], attr::fallocate),
        Entry::new(306, "syncfs", &[Fd], attr::syncfs),
        Entry::new(316, "renameat2", &[Fd, Str, Fd, Str, Hex], names::renameat2),
        Entry::new(332, "statx", &[Fd, Str, Hex, Hex, Hex], stat::statx),
        Entry::new(437, "openat2", &[Fd, Str, Hex, Int], open::openat2),
        Entry::new(439, "faccessat2", &[Fd, Str, Oct, Hex], stat::faccessat2),
        Entry::new(452, "fchmodat2", &[Fd, Str, Oct, Hex], attr::fchmodat2),
    ]
};

/// Mounting and changing the root are the machine's owner's, not the guest's.
fn refused(_: &mut Ctx<'_>, _: &Args) -> SysResult {
    Err(Errno::PERM.into())
}

/// No file of the guest's has extended attributes.
fn no_attributes(_: &mut Ctx<'_>, _: &Args) -> SysResult {
    Err(Errno::OPNOTSUPP.into())
}

/// Where a relative path given with `dirfd` starts.
fn base(c: &Ctx<'_>, dirfd: i32, path: &[u8]) -> Result<Location, Errno> {
    if path.first() == Some(&b'/') {
        return Ok(c.k.vfs.root());
    }
    if dirfd == AT_FDCWD {
        return Ok(c.with_process(|p| p.cwd.clone()));
    }
    directory(&*c.file(dirfd)?)
}

/// The place of an open directory.
fn directory(description: &Description) -> Result<Location, Errno> {
    let file = description.file.as_any();
    let named = file
        .downcast_ref::<PathFile>()
        .is_some_and(PathFile::is_directory);
    if !named && !file.is::<DirFile>() {
        return Err(Errno::NOTDIR);
    }
    description.file.location().ok_or(Errno::NOTDIR)
}

/// Reads a path argument and walks it.
fn walk(c: &Ctx<'_>, dirfd: i32, va: u64, follow: Follow) -> Result<Found, Errno> {
    let path = c.path(va)?;
    let base = base(c, dirfd, &path)?;
    c.k.vfs.walk(&Caller::of(c), &base, &path, follow)
}

/// What a call with `AT_EMPTY_PATH` and `AT_SYMLINK_NOFOLLOW` is about.
enum Subject {
    /// The descriptor itself.
    Open(Arc<Description>),
    /// A place with something there, or behind a magic link.
    Place(Found),
}

/// Finds it. The working directory counts as a place.
fn subject(c: &Ctx<'_>, dirfd: i32, va: u64, flags: u32) -> Result<Subject, Errno> {
    let path = if va == 0 && flags & AT_EMPTY_PATH != 0 {
        Vec::new()
    } else {
        c.path(va)?
    };
    if path.is_empty() && flags & AT_EMPTY_PATH != 0 {
        if dirfd != AT_FDCWD {
            return Ok(Subject::Open(c.file(dirfd)?));
        }
        let at = c.with_process(|p| p.cwd.clone());
        let stat = Some(c.k.vfs.look(&Caller::of(c), &at)?);
        return Ok(Subject::Place(Found {
            at,
            stat,
            description: None,
            slash: false,
        }));
    }
    let follow = if flags & AT_SYMLINK_NOFOLLOW != 0 {
        Follow::Not
    } else {
        Follow::Last
    };
    let base = base(c, dirfd, &path)?;
    let mut found = c.k.vfs.walk(&Caller::of(c), &base, &path, follow)?;
    found.existing()?;
    Ok(match found.description.take() {
        Some(description) => Subject::Open(description),
        None => Subject::Place(found),
    })
}
