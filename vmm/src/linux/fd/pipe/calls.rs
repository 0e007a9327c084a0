//! `pipe` and `pipe2`.

use super::super::table::O_CLOEXEC;
use super::Pipe;
use crate::linux::Errno;
use crate::linux::call::{Arg, Args, Ctx, Entry, Stop, SysResult};
use crate::linux::file::{Description, O_NONBLOCK};

/// `O_DIRECT`: packet mode, which is not offered.
const O_DIRECT: u32 = 0o40_000;

/// The calls of this file.
pub const TABLE: &[Entry] = &[
    Entry {
        nr: 22,
        name: "pipe",
        args: &[Arg::Hex],
        handler: sys_pipe,
    },
    Entry {
        nr: 293,
        name: "pipe2",
        args: &[Arg::Hex, Arg::Hex],
        handler: sys_pipe2,
    },
];

fn sys_pipe(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    make(c, a.u64(0), 0)
}

fn sys_pipe2(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    make(c, a.u64(0), a.u32(1))
}

fn make(c: &Ctx<'_>, at: u64, flags: u32) -> SysResult {
    if flags & !(O_CLOEXEC | O_NONBLOCK | O_DIRECT) != 0 || flags & O_DIRECT != 0 {
        return Err(Errno::INVAL.into());
    }
    let status = flags & O_NONBLOCK;
    let (reader, writer) = Pipe::pair(&c.k.sched, &c.k.io.pipes)?;
    let pair = [
        Description::new(reader, status),
        Description::new(writer, status | 1),
    ];
    let fds = c.add_fd_pair(pair, flags & O_CLOEXEC != 0)?;
    store_pair(c, at, fds)
}

/// Stores two new descriptors in guest memory; on failure they are closed again.
pub(in crate::linux) fn store_pair(c: &Ctx<'_>, at: u64, fds: [i32; 2]) -> SysResult {
    c.mem().write_obj(at, &fds).map_err(|errno| {
        fds.into_iter().for_each(|fd| drop(c.remove_fd(fd)));
        Stop::Errno(errno)
    })?;
    Ok(0)
}
