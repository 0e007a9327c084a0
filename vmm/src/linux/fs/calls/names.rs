//! Making, renaming and removing names: mkdir(2), unlink(2), rename(2), link(2), symlink(2).

use rustix::io::Errno;

use super::super::{Caller, Follow, Node, S_IFIFO, S_IFMT, S_IFREG, S_IFSOCK};
use super::{AT_EMPTY_PATH, AT_FDCWD, AT_REMOVEDIR, AT_SYMLINK_FOLLOW, base};
use crate::linux::call::{Args, Ctx, SysResult};
use crate::linux::file::Location;

/// Reads a path argument, and where it starts.
fn named(c: &Ctx<'_>, dirfd: i32, va: u64) -> Result<(Location, Vec<u8>), Errno> {
    let path = c.path(va)?;
    Ok((base(c, dirfd, &path)?, path))
}

/// A new file's mode without the caller's umask.
fn masked(c: &Ctx<'_>, mode: u32) -> u32 {
    mode & !c.with_process(|p| p.umask)
}

pub(super) fn mkdir(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    make_dir(c, AT_FDCWD, a.u64(0), a.u32(1))
}

pub(super) fn mkdirat(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    make_dir(c, a.i32(0), a.u64(1), a.u32(2))
}

fn make_dir(c: &Ctx<'_>, dirfd: i32, path: u64, mode: u32) -> SysResult {
    let (base, path) = named(c, dirfd, path)?;
    c.k.vfs
        .mkdir(&Caller::of(c), &base, &path, masked(c, mode))?;
    Ok(0)
}

pub(super) fn mknod(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    make_node(c, AT_FDCWD, a.u64(0), a.u32(1))
}

pub(super) fn mknodat(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    make_node(c, a.i32(0), a.u64(1), a.u32(2))
}

fn make_node(c: &Ctx<'_>, dirfd: i32, path: u64, mode: u32) -> SysResult {
    let (base, path) = named(c, dirfd, path)?;
    let node = match mode & S_IFMT {
        0 | S_IFREG => Node::Regular,
        S_IFIFO => Node::Fifo,
        S_IFSOCK => Node::Socket,
        _ => return Err(Errno::PERM.into()),
    };
    c.k.vfs
        .mknod(&Caller::of(c), &base, &path, (node, masked(c, mode)))?;
    Ok(0)
}

pub(super) fn unlink(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    remove(c, AT_FDCWD, a.u64(0), false)
}

pub(super) fn rmdir(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    remove(c, AT_FDCWD, a.u64(0), true)
}

pub(super) fn unlinkat(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    if a.u32(2) & !AT_REMOVEDIR != 0 {
        return Err(Errno::INVAL.into());
    }
    remove(c, a.i32(0), a.u64(1), a.u32(2) & AT_REMOVEDIR != 0)
}

fn remove(c: &Ctx<'_>, dirfd: i32, path: u64, directory: bool) -> SysResult {
    let (base, path) = named(c, dirfd, path)?;
    let caller = Caller::of(c);
    if directory {
        c.k.vfs.rmdir(&caller, &base, &path)?;
    } else {
        c.k.vfs.unlink(&caller, &base, &path)?;
    }
    Ok(0)
}

pub(super) fn rename(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    rename_at(c, (AT_FDCWD, a.u64(0)), (AT_FDCWD, a.u64(1)), 0)
}

pub(super) fn renameat(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    rename_at(c, (a.i32(0), a.u64(1)), (a.i32(2), a.u64(3)), 0)
}

pub(super) fn renameat2(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let flags = a.u32(4);
    // RENAME_WHITEOUT makes a device node.
    if flags & !3 != 0 || flags == 3 {
        return Err(Errno::INVAL.into());
    }
    rename_at(c, (a.i32(0), a.u64(1)), (a.i32(2), a.u64(3)), flags)
}

fn rename_at(c: &Ctx<'_>, from: (i32, u64), to: (i32, u64), flags: u32) -> SysResult {
    let (old_base, old) = named(c, from.0, from.1)?;
    let (new_base, new) = named(c, to.0, to.1)?;
    let (old, new) =
        c.k.vfs
            .rename(&Caller::of(c), (&old_base, &old), (&new_base, &new), flags)?;
    if flags == 0 {
        follow_rename(c, &old, &new);
    }
    Ok(0)
}

/// Working directories and programs below a directory that was renamed go with it.
fn follow_rename(c: &Ctx<'_>, old: &Location, new: &Location) {
    let carry = |at: &mut Location| {
        if at.mount == old.mount
            && let Some(rest) = super::super::below(&at.path, &old.path)
        {
            at.path = super::super::join(&new.path, rest);
        }
    };
    for process in c.k.state().procs.values_mut() {
        carry(&mut process.cwd);
        carry(&mut process.exe);
    }
}

pub(super) fn link(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    link_at(c, (AT_FDCWD, a.u64(0)), (AT_FDCWD, a.u64(1)), 0)
}

pub(super) fn linkat(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    link_at(c, (a.i32(0), a.u64(1)), (a.i32(2), a.u64(3)), a.u32(4))
}

fn link_at(c: &Ctx<'_>, from: (i32, u64), to: (i32, u64), flags: u32) -> SysResult {
    if flags & !(AT_SYMLINK_FOLLOW | AT_EMPTY_PATH) != 0 {
        return Err(Errno::INVAL.into());
    }
    let caller = Caller::of(c);
    let (old_base, old) = named(c, from.0, from.1)?;
    let (new_base, new) = named(c, to.0, to.1)?;
    let at = if old.is_empty() && flags & AT_EMPTY_PATH != 0 {
        c.file(from.0)?.file.location().ok_or(Errno::NOENT)?
    } else {
        let follow = if flags & AT_SYMLINK_FOLLOW != 0 {
            Follow::Last
        } else {
            Follow::Not
        };
        let found = c.k.vfs.walk(&caller, &old_base, &old, follow)?;
        found.existing()?;
        match &found.description {
            Some(description) => description.file.location().ok_or(Errno::XDEV)?,
            None => found.at,
        }
    };
    c.k.vfs.link(&caller, &at, &new_base, &new)?;
    Ok(0)
}

pub(super) fn symlink(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    symlink_at(c, a.u64(0), AT_FDCWD, a.u64(1))
}

pub(super) fn symlinkat(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    symlink_at(c, a.u64(0), a.i32(1), a.u64(2))
}

fn symlink_at(c: &Ctx<'_>, target: u64, dirfd: i32, path: u64) -> SysResult {
    let target = c.path(target)?;
    let (base, path) = named(c, dirfd, path)?;
    c.k.vfs.symlink(&Caller::of(c), &base, &path, &target)?;
    Ok(0)
}
