//! Reading directories, and the working directory.

use rustix::io::Errno;

use super::super::abi::Dirent;
use super::super::{Caller, DirFile, Follow, S_IFDIR, S_IFMT};
use super::{AT_FDCWD, directory, walk};
use crate::linux::call::{Args, Ctx, SysResult};
use crate::linux::file::{Location, Stat};

/// Bytes of entries given at once.
const BATCH_MAX: usize = 256 * 1024;

pub(super) fn getdents(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    entries(c, a, Dirent::Old)
}

pub(super) fn getdents64(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    entries(c, a, Dirent::New)
}

fn entries(c: &Ctx<'_>, a: &Args, layout: Dirent) -> SysResult {
    let description = c.file(a.i32(0))?;
    if !description.readable() {
        return Err(Errno::BADF.into());
    }
    let dir = description
        .file
        .as_any()
        .downcast_ref::<DirFile>()
        .ok_or(Errno::NOTDIR)?;
    let limit = (a.u32(2) as usize).min(BATCH_MAX);
    let mut offset = description.offset.lock();
    let all = dir.snapshot(&Caller::of(c), c.k.vfs.budget(), *offset == 0)?;
    let mut out = Vec::new();
    let mut next = *offset;
    let rest = usize::try_from(next)
        .ok()
        .and_then(|at| all.get(at..))
        .unwrap_or_default();
    for entry in rest {
        if !layout.put(&mut out, limit, entry, next + 1) {
            break;
        }
        next += 1;
    }
    if out.is_empty() && !rest.is_empty() {
        return Err(Errno::INVAL.into());
    }
    c.mem().write(a.u64(1), &out)?;
    *offset = next;
    Ok(out.len() as u64)
}

pub(super) fn getcwd(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let cwd = c.with_process(|p| p.cwd.clone());
    c.k.vfs.look(&Caller::of(c), &cwd)?;
    let mut path = c.k.vfs.path_of(&cwd);
    path.push(0);
    if (path.len() as u64) > a.u64(1) {
        return Err(Errno::RANGE.into());
    }
    c.mem().write(a.u64(0), &path)?;
    Ok(path.len() as u64)
}

pub(super) fn chdir(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let found = walk(c, AT_FDCWD, a.u64(0), Follow::Last)?;
    let stat = *found.existing()?;
    enter(c, found.at, &stat)
}

pub(super) fn fchdir(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let at = directory(&*c.file(a.i32(0))?)?;
    let stat = c.k.vfs.look(&Caller::of(c), &at)?;
    enter(c, at, &stat)
}

fn enter(c: &Ctx<'_>, at: Location, stat: &Stat) -> SysResult {
    if stat.mode & S_IFMT != S_IFDIR {
        return Err(Errno::NOTDIR.into());
    }
    c.k.vfs.check(&Caller::of(c), &at, stat, 1)?;
    c.with_process(|p| p.cwd = at);
    Ok(0)
}

pub(super) fn umask(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let mask = a.u32(0) & 0o777;
    Ok(c.with_process(|p| std::mem::replace(&mut p.umask, mask))
        .into())
}
