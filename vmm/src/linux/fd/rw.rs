//! `read`, `write` and their vectored and positioned relatives.

use super::super::Errno;
use super::super::call::{Arg, Args, Ctx, Entry, SysResult};
use super::transfer::{self, At};
use super::vector::GuestBuf;

const IO: &[Arg] = &[Arg::Fd, Arg::Hex, Arg::Int];
const POSITIONED: &[Arg] = &[Arg::Fd, Arg::Hex, Arg::Int, Arg::Int];

/// The calls of this file.
pub const TABLE: &[Entry] = &[
    Entry {
        nr: 0,
        name: "read",
        args: IO,
        handler: sys_read,
    },
    Entry {
        nr: 1,
        name: "write",
        args: IO,
        handler: sys_write,
    },
    Entry {
        nr: 17,
        name: "pread64",
        args: POSITIONED,
        handler: sys_pread64,
    },
    Entry {
        nr: 18,
        name: "pwrite64",
        args: POSITIONED,
        handler: sys_pwrite64,
    },
    Entry {
        nr: 19,
        name: "readv",
        args: IO,
        handler: sys_readv,
    },
    Entry {
        nr: 20,
        name: "writev",
        args: IO,
        handler: sys_writev,
    },
    Entry {
        nr: 295,
        name: "preadv",
        args: POSITIONED,
        handler: sys_preadv,
    },
    Entry {
        nr: 296,
        name: "pwritev",
        args: POSITIONED,
        handler: sys_pwritev,
    },
    Entry {
        nr: 327,
        name: "preadv2",
        args: POSITIONED,
        handler: sys_preadv2,
    },
    Entry {
        nr: 328,
        name: "pwritev2",
        args: POSITIONED,
        handler: sys_pwritev2,
    },
];

/// `RWF_HIPRI | RWF_DSYNC | RWF_SYNC`: hints to a host file that has no delayed writes of ours.
const RWF_HARMLESS: u32 = 1 | 2 | 4;

fn offset(value: i64) -> Result<At, Errno> {
    u64::try_from(value)
        .map(At::Offset)
        .map_err(|_| Errno::INVAL)
}

fn iovec(c: &Ctx<'_>, a: &Args) -> Result<GuestBuf, Errno> {
    // The count is an `unsigned long`; a negative `int` in it is too large either way.
    GuestBuf::from_iovec(c.mem(), a.u64(1), a.u64(2))
}

fn sys_read(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let d = c.file(a.i32(0))?;
    transfer::read(c, &d, &GuestBuf::new(a.u64(1), a.u64(2)), At::Current)
}

fn sys_write(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let d = c.file(a.i32(0))?;
    transfer::write(c, &d, &GuestBuf::new(a.u64(1), a.u64(2)), At::Current)
}

fn sys_pread64(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let at = offset(a.i64(3))?;
    let d = c.file(a.i32(0))?;
    transfer::read(c, &d, &GuestBuf::new(a.u64(1), a.u64(2)), at)
}

fn sys_pwrite64(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let at = offset(a.i64(3))?;
    let d = c.file(a.i32(0))?;
    transfer::write(c, &d, &GuestBuf::new(a.u64(1), a.u64(2)), at)
}

fn sys_readv(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let d = c.file(a.i32(0))?;
    let buf = iovec(c, a)?;
    transfer::read(c, &d, &buf, At::Current)
}

fn sys_writev(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let d = c.file(a.i32(0))?;
    let buf = iovec(c, a)?;
    transfer::write(c, &d, &buf, At::Current)
}

fn sys_preadv(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let at = offset(a.i64(3))?;
    let d = c.file(a.i32(0))?;
    let buf = iovec(c, a)?;
    transfer::read(c, &d, &buf, at)
}

fn sys_pwritev(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let at = offset(a.i64(3))?;
    let d = c.file(a.i32(0))?;
    let buf = iovec(c, a)?;
    transfer::write(c, &d, &buf, at)
}

/// The position of `preadv2` and `pwritev2`: -1 is the current offset. Checks their flags.
fn position(a: &Args) -> Result<At, Errno> {
    if a.u32(5) & !RWF_HARMLESS != 0 {
        return Err(Errno::OPNOTSUPP);
    }
    if a.i64(3) == -1 {
        Ok(At::Current)
    } else {
        offset(a.i64(3))
    }
}

fn sys_preadv2(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let d = c.file(a.i32(0))?;
    let at = position(a)?;
    let buf = iovec(c, a)?;
    transfer::read(c, &d, &buf, at)
}

fn sys_pwritev2(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let d = c.file(a.i32(0))?;
    let at = position(a)?;
    let buf = iovec(c, a)?;
    transfer::write(c, &d, &buf, at)
}
