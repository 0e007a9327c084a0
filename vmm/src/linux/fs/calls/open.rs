//! open(2), openat(2), openat2(2), creat(2).

use std::sync::Arc;

use rustix::io::Errno;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::super::open::{O_CLOEXEC, O_CREAT, O_TRUNC};
use super::super::walk::Resolve;
use super::super::{Caller, OpenHow};
use super::{AT_FDCWD, base};
use crate::linux::call::{Args, Ctx, Stop, SysResult, Wait};
use crate::linux::file::Description;

/// Every flag that openat2(2) knows.
const KNOWN: u64 = 0o37_777_703;

pub(super) fn open(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    open_at(c, AT_FDCWD, a.u64(0), OpenHow::new(a.u32(1), a.u32(2)))
}

pub(super) fn creat(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    open_at(
        c,
        AT_FDCWD,
        a.u64(0),
        OpenHow::new(O_CREAT | O_TRUNC | 1, a.u32(1)),
    )
}

pub(super) fn openat(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    open_at(c, a.i32(0), a.u64(1), OpenHow::new(a.u32(2), a.u32(3)))
}

/// `struct open_how` (openat2(2)).
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct RawHow {
    flags: u64,
    mode: u64,
    resolve: u64,
}

pub(super) fn openat2(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let size = a.u64(3);
    if size < 24 {
        return Err(Errno::INVAL.into());
    }
    if size > 4096 {
        return Err(Errno::TOOBIG.into());
    }
    let how: RawHow = c.mem().read_obj(a.u64(2))?;
    let mut rest = vec![0; size as usize - 24];
    c.mem().read(a.u64(2).wrapping_add(24), &mut rest)?;
    if rest.iter().any(|&b| b != 0) {
        return Err(Errno::TOOBIG.into());
    }
    let resolve = Resolve::from_bits(how.resolve).ok_or(Errno::INVAL)?;
    let creates = how.flags & u64::from(O_CREAT) != 0;
    let bad_mode = if creates {
        how.mode & !0o7777 != 0
    } else {
        how.mode != 0
    };
    let both = resolve.contains(Resolve::BENEATH | Resolve::IN_ROOT);
    if how.flags & !KNOWN != 0 || bad_mode || both {
        return Err(Errno::INVAL.into());
    }
    let how = OpenHow {
        flags: how.flags as u32,
        mode: how.mode as u32,
        resolve,
    };
    open_at(c, a.i32(0), a.u64(1), how)
}

fn open_at(c: &mut Ctx<'_>, dirfd: i32, path: u64, mut how: OpenHow) -> SysResult {
    if let Some(description) = c.call.opened.take() {
        return complete(c, description, &how);
    }
    let path = c.path(path)?;
    let scoped = how.resolve.intersects(Resolve::IN_ROOT | Resolve::BENEATH);
    let base = base(c, dirfd, if scoped { b"" } else { &path })?;
    how.mode &= 0o7777 & !c.with_process(|p| p.umask);
    let description = c.k.vfs.open(&Caller::of(c), &base, &path, &how)?;
    complete(c, description, &how)
}

/// Gives what was opened a descriptor, once nothing is to be waited for.
fn complete(c: &mut Ctx<'_>, description: Arc<Description>, how: &OpenHow) -> SysResult {
    if let Some(key) = description.file.unopened() {
        c.call.opened = Some(description);
        return Err(Stop::Block(Wait::on(key)));
    }
    let fd = c.add_fd(description, how.flags & O_CLOEXEC != 0)?;
    Ok(fd as u64)
}
