//! stat(2) and its family, access(2), readlink(2), statfs(2).

use rustix::io::Errno;
use zerocopy::{Immutable, IntoBytes};

use super::super::abi::{RawStat, RawStatfs, RawStatx};
use super::super::{Caller, Follow, Link, S_IFDIR, S_IFLNK, S_IFMT, S_IFREG};
use super::{
    AT_EACCESS, AT_EMPTY_PATH, AT_FDCWD, AT_NO_AUTOMOUNT, AT_SYMLINK_NOFOLLOW, Subject, base,
    subject, walk,
};
use crate::linux::call::{Args, Ctx, SysResult};
use crate::linux::file::{Location, Stat};

/// `AT_STATX_FORCE_SYNC | AT_STATX_DONT_SYNC`.
const AT_STATX_SYNC: u32 = 0x6000;

fn give<T: IntoBytes + Immutable>(c: &Ctx<'_>, va: u64, value: &T) -> SysResult {
    c.mem().write_obj(va, value)?;
    Ok(0)
}

fn seen(c: &Ctx<'_>, dirfd: i32, path: u64, flags: u32) -> Result<Stat, Errno> {
    match subject(c, dirfd, path, flags)? {
        Subject::Open(description) => description.file.stat(c.k),
        Subject::Place(found) => found.existing().copied(),
    }
}

pub(super) fn stat(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let stat = seen(c, AT_FDCWD, a.u64(0), 0)?;
    give(c, a.u64(1), &RawStat::from(&stat))
}

pub(super) fn lstat(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let stat = seen(c, AT_FDCWD, a.u64(0), AT_SYMLINK_NOFOLLOW)?;
    give(c, a.u64(1), &RawStat::from(&stat))
}

pub(super) fn fstat(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let stat = c.file(a.i32(0))?.file.stat(c.k)?;
    give(c, a.u64(1), &RawStat::from(&stat))
}

pub(super) fn newfstatat(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let flags = a.u32(3);
    if flags & !(AT_SYMLINK_NOFOLLOW | AT_NO_AUTOMOUNT | AT_EMPTY_PATH) != 0 {
        return Err(Errno::INVAL.into());
    }
    let stat = seen(c, a.i32(0), a.u64(1), flags)?;
    give(c, a.u64(2), &RawStat::from(&stat))
}

pub(super) fn statx(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let flags = a.u32(2);
    let known = AT_SYMLINK_NOFOLLOW | AT_NO_AUTOMOUNT | AT_EMPTY_PATH | AT_STATX_SYNC;
    if flags & !known != 0 || flags & AT_STATX_SYNC == AT_STATX_SYNC || a.u32(3) >> 31 != 0 {
        return Err(Errno::INVAL.into());
    }
    let stat = seen(c, a.i32(0), a.u64(1), flags)?;
    give(c, a.u64(4), &RawStatx::from(&stat))
}

pub(super) fn access(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    access_at(c, AT_FDCWD, a.u64(0), a.u32(1), 0)
}

pub(super) fn faccessat(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    access_at(c, a.i32(0), a.u64(1), a.u32(2), 0)
}

pub(super) fn faccessat2(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    if a.u32(3) & !(AT_EACCESS | AT_SYMLINK_NOFOLLOW | AT_EMPTY_PATH) != 0 {
        return Err(Errno::INVAL.into());
    }
    access_at(c, a.i32(0), a.u64(1), a.u32(2), a.u32(3))
}

fn access_at(c: &Ctx<'_>, dirfd: i32, path: u64, want: u32, flags: u32) -> SysResult {
    if want & !7 != 0 {
        return Err(Errno::INVAL.into());
    }
    let mut caller = Caller::of(c);
    if flags & AT_EACCESS == 0 {
        caller.cred.uid[1] = caller.cred.uid[0];
        caller.cred.gid[1] = caller.cred.gid[0];
    }
    let (stat, read_only) = match subject(c, dirfd, path, flags & !AT_EACCESS)? {
        Subject::Open(description) => (description.file.stat(c.k)?, false),
        Subject::Place(found) => (*found.existing()?, c.k.vfs.mount(&found.at)?.read_only),
    };
    let on_disk = matches!(stat.mode & S_IFMT, S_IFREG | S_IFDIR | S_IFLNK);
    if want & 2 != 0 && read_only && on_disk {
        return Err(Errno::ROFS.into());
    }
    if want == 0 || caller.permitted(&stat, want) {
        Ok(0)
    } else {
        Err(Errno::ACCESS.into())
    }
}

pub(super) fn readlink(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    read_link(c, AT_FDCWD, a.u64(0), a.u64(1), a.i32(2))
}

pub(super) fn readlinkat(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    read_link(c, a.i32(0), a.u64(1), a.u64(2), a.i32(3))
}

fn read_link(c: &Ctx<'_>, dirfd: i32, path: u64, into: u64, size: i32) -> SysResult {
    let size = usize::try_from(size)
        .ok()
        .filter(|&size| size > 0)
        .ok_or(Errno::INVAL)?;
    let path = c.path(path)?;
    let caller = Caller::of(c);
    let at = if path.is_empty() && dirfd != AT_FDCWD {
        c.file(dirfd)?.file.location().ok_or(Errno::NOENT)?
    } else {
        let found =
            c.k.vfs
                .walk(&caller, &base(c, dirfd, &path)?, &path, Follow::Not)?;
        if found.existing()?.mode & S_IFMT != S_IFLNK {
            return Err(Errno::INVAL.into());
        }
        found.at
    };
    let target = match c.k.vfs.read_link(&caller, &at)? {
        Link::Path(target) => target,
        Link::At(place) => c.k.vfs.path_of(&place),
        Link::Open(description) => description.file.name(c.k),
    };
    let n = target.len().min(size);
    c.mem().write(into, &target[..n])?;
    Ok(n as u64)
}

fn file_system(c: &Ctx<'_>, at: &Location) -> Result<RawStatfs, Errno> {
    let (stat, read_only) = c.k.vfs.statfs(at)?;
    Ok(RawStatfs::new(&stat, read_only, at.mount))
}

pub(super) fn statfs(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let found = walk(c, AT_FDCWD, a.u64(0), Follow::Last)?;
    found.existing()?;
    give(c, a.u64(1), &file_system(c, &found.at)?)
}

pub(super) fn fstatfs(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    // What has no place is on a file system of its own kind: as pipes, like Linux's pipefs.
    let stat = match c.file(a.i32(0))?.file.location() {
        Some(at) => file_system(c, &at)?,
        None => RawStatfs {
            f_type: 0x5049_5045,
            f_bsize: 4096,
            f_namelen: 255,
            ..RawStatfs::default()
        },
    };
    give(c, a.u64(1), &stat)
}
