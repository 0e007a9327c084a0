//! Attributes and length: chmod(2), chown(2), utimensat(2), truncate(2), fallocate(2), fsync(2).

use rustix::fs::FallocateFlags;
use rustix::io::Errno;

use super::super::tree::may_change;
use super::super::{Caller, DirFile, OpenHow, PathFile};
use super::{AT_EMPTY_PATH, AT_FDCWD, AT_SYMLINK_NOFOLLOW, Subject, base, subject};
use crate::linux::call::{Args, Ctx, SysResult};
use crate::linux::fd::transfer::may_grow;
use crate::linux::file::{Change, Description, O_PATH, SetTime};

fn change(c: &Ctx<'_>, subject: &Subject, change: &Change) -> SysResult {
    match subject {
        Subject::Place(found) => c.k.vfs.change_at(&Caller::of(c), &found.at, change)?,
        Subject::Open(description) => change_open(c, description, change)?,
    }
    Ok(0)
}

fn change_open(c: &Ctx<'_>, description: &Description, change: &Change) -> Result<(), Errno> {
    let caller = Caller::of(c);
    let file = &description.file;
    let by_place = file.as_any().is::<DirFile>() || file.as_any().is::<PathFile>();
    if let Some(at) = file.location() {
        if by_place {
            return c.k.vfs.change_at(&caller, &at, change);
        }
        if c.k.vfs.mount(&at)?.read_only {
            return Err(Errno::ROFS);
        }
    }
    may_change(&caller, &file.stat(c.k)?, change)?;
    file.change(c.k, change)
}

/// An open descriptor that is more than a name.
fn used(c: &Ctx<'_>, fd: i32) -> Result<Subject, Errno> {
    let description = c.file(fd)?;
    if description.flags() & O_PATH != 0 {
        return Err(Errno::BADF);
    }
    Ok(Subject::Open(description))
}

fn at_flags(flags: u32) -> Result<u32, Errno> {
    if flags & !(AT_SYMLINK_NOFOLLOW | AT_EMPTY_PATH) == 0 {
        Ok(flags)
    } else {
        Err(Errno::INVAL)
    }
}

pub(super) fn chmod(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    change(
        c,
        &subject(c, AT_FDCWD, a.u64(0), 0)?,
        &Change::Mode(a.u32(1) & 0o7777),
    )
}

pub(super) fn fchmod(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    change(c, &used(c, a.i32(0))?, &Change::Mode(a.u32(1) & 0o7777))
}

pub(super) fn fchmodat(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    change(
        c,
        &subject(c, a.i32(0), a.u64(1), 0)?,
        &Change::Mode(a.u32(2) & 0o7777),
    )
}

pub(super) fn fchmodat2(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let subject = subject(c, a.i32(0), a.u64(1), at_flags(a.u32(3))?)?;
    change(c, &subject, &Change::Mode(a.u32(2) & 0o7777))
}

/// The ids of a chown(2); `(uid_t)-1` leaves one as it is.
fn owner(uid: u32, gid: u32) -> Change {
    let id = |id: u32| (id != u32::MAX).then_some(id);
    Change::Owner(id(uid), id(gid))
}

pub(super) fn chown(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    change(
        c,
        &subject(c, AT_FDCWD, a.u64(0), 0)?,
        &owner(a.u32(1), a.u32(2)),
    )
}

pub(super) fn lchown(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let subject = subject(c, AT_FDCWD, a.u64(0), AT_SYMLINK_NOFOLLOW)?;
    change(c, &subject, &owner(a.u32(1), a.u32(2)))
}

pub(super) fn fchown(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    change(c, &used(c, a.i32(0))?, &owner(a.u32(1), a.u32(2)))
}

pub(super) fn fchownat(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let subject = subject(c, a.i32(0), a.u64(1), at_flags(a.u32(4))?)?;
    change(c, &subject, &owner(a.u32(2), a.u32(3)))
}

/// `UTIME_NOW` and `UTIME_OMIT`.
const UTIME_NOW: i64 = 0x3fff_ffff;
const UTIME_OMIT: i64 = 0x3fff_fffe;

/// Two `struct timespec`.
fn timespecs(c: &Ctx<'_>, va: u64) -> Result<Change, Errno> {
    if va == 0 {
        return Ok(Change::Times(SetTime::Now, SetTime::Now));
    }
    let raw: [[i64; 2]; 2] = c.mem().read_obj(va)?;
    let time = |[seconds, nanos]: [i64; 2]| match nanos {
        UTIME_NOW => Ok(SetTime::Now),
        UTIME_OMIT => Ok(SetTime::Keep),
        0..1_000_000_000 => Ok(SetTime::At(seconds, nanos as u32)),
        _ => Err(Errno::INVAL),
    };
    Ok(Change::Times(time(raw[0])?, time(raw[1])?))
}

/// Two `struct timeval`.
fn timevals(c: &Ctx<'_>, va: u64) -> Result<Change, Errno> {
    if va == 0 {
        return Ok(Change::Times(SetTime::Now, SetTime::Now));
    }
    let raw: [[i64; 2]; 2] = c.mem().read_obj(va)?;
    let time = |[seconds, micros]: [i64; 2]| match micros {
        0..1_000_000 => Ok(SetTime::At(seconds, micros as u32 * 1000)),
        _ => Err(Errno::INVAL),
    };
    Ok(Change::Times(time(raw[0])?, time(raw[1])?))
}

pub(super) fn utime(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let times = match a.u64(1) {
        0 => Change::Times(SetTime::Now, SetTime::Now),
        va => {
            let [atime, mtime]: [i64; 2] = c.mem().read_obj(va)?;
            Change::Times(SetTime::At(atime, 0), SetTime::At(mtime, 0))
        }
    };
    change(c, &subject(c, AT_FDCWD, a.u64(0), 0)?, &times)
}

pub(super) fn utimes(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let times = timevals(c, a.u64(1))?;
    change(c, &subject(c, AT_FDCWD, a.u64(0), 0)?, &times)
}

pub(super) fn futimesat(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let times = timevals(c, a.u64(2))?;
    change(c, &subject(c, a.i32(0), a.u64(1), 0)?, &times)
}

pub(super) fn utimensat(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let times = timespecs(c, a.u64(2))?;
    if times == Change::Times(SetTime::Keep, SetTime::Keep) {
        return Ok(0);
    }
    let subject = match a.u64(1) {
        0 => Subject::Open(c.file(a.i32(0))?),
        path => subject(c, a.i32(0), path, at_flags(a.u32(3))?)?,
    };
    change(c, &subject, &times)
}

/// A length or offset, which is not negative.
fn length(value: i64) -> Result<u64, Errno> {
    u64::try_from(value).map_err(|_| Errno::INVAL)
}

pub(super) fn truncate(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let length = length(a.i64(1))?;
    let path = c.path(a.u64(0))?;
    let base = base(c, AT_FDCWD, &path)?;
    let description =
        c.k.vfs
            .open(&Caller::of(c), &base, &path, &OpenHow::new(1, 0))?;
    may_grow(c, &*description.file, length)?;
    description.file.truncate(c.k, length)?;
    Ok(0)
}

pub(super) fn ftruncate(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let length = length(a.i64(1))?;
    let description = c.file(a.i32(0))?;
    if !description.writable() {
        return Err(Errno::INVAL.into());
    }
    may_grow(c, &*description.file, length)?;
    description.file.truncate(c.k, length)?;
    Ok(0)
}

pub(super) fn fallocate(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let (offset, length) = (length(a.i64(2))?, length(a.i64(3))?);
    if length == 0 {
        return Err(Errno::INVAL.into());
    }
    let description = c.file(a.i32(0))?;
    if !description.writable() {
        return Err(Errno::BADF.into());
    }
    let mode = a.u32(1);
    if !FallocateFlags::from_bits_retain(mode).contains(FallocateFlags::KEEP_SIZE) {
        let end = offset.checked_add(length).ok_or(Errno::FBIG)?;
        may_grow(c, &*description.file, end)?;
    }
    description.file.allocate(c.k, mode, offset, length)?;
    Ok(0)
}

pub(super) fn fsync(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    c.file(a.i32(0))?.file.sync(c.k, false)?;
    Ok(0)
}

pub(super) fn fdatasync(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    c.file(a.i32(0))?.file.sync(c.k, true)?;
    Ok(0)
}

/// Writes what the guest wrote: the host does that in its own time, as after sync(2) on Linux.
pub(super) fn sync(_: &mut Ctx<'_>, _: &Args) -> SysResult {
    Ok(0)
}

pub(super) fn syncfs(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    c.file(a.i32(0))?;
    Ok(0)
}

/// Advice on how a file is read changes nothing here.
pub(super) fn fadvise(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let description = c.file(a.i32(0))?;
    if !description.file.seekable() {
        return Err(Errno::SPIPE.into());
    }
    if a.u32(3) > 5 {
        Err(Errno::INVAL.into())
    } else {
        Ok(0)
    }
}
