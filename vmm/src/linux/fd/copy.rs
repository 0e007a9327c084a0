//! `sendfile` and `copy_file_range`: from one descriptor to another without the guest's memory.

use std::sync::Arc;

use super::super::Errno;
use super::super::call::{Arg, Args, Ctx, Entry, SysResult};
use super::super::file::{Description, O_APPEND, Ready};
use super::transfer::{signal_self, with_bounce};
use super::vector::MAX_RW_COUNT;
use super::{STEP, would_block};

/// The calls of this file.
pub const TABLE: &[Entry] = &[
    Entry {
        nr: 40,
        name: "sendfile",
        args: &[Arg::Fd, Arg::Fd, Arg::Hex, Arg::Int],
        handler: sys_sendfile,
    },
    Entry {
        nr: 326,
        name: "copy_file_range",
        args: &[Arg::Fd, Arg::Hex, Arg::Fd, Arg::Hex, Arg::Int, Arg::Hex],
        handler: sys_copy_file_range,
    },
];

const S_IFMT: u32 = 0o170_000;
const S_IFREG: u32 = 0o100_000;
const S_IFDIR: u32 = 0o040_000;

/// A description and where in it the copy starts: `at` is where the guest keeps the offset, 0 if
/// the description does.
struct Side {
    d: Arc<Description>,
    at: u64,
    start: u64,
}

impl Side {
    fn new(c: &Ctx<'_>, d: Arc<Description>, at: u64) -> Result<Self, Errno> {
        let start = if at != 0 {
            if !d.file.seekable() {
                return Err(Errno::SPIPE);
            }
            u64::try_from(c.mem().read_obj::<i64>(at)?).map_err(|_| Errno::INVAL)?
        } else if let Some(shared) = d.file.shared_offset() {
            shared.tell()?
        } else {
            *d.offset.lock()
        };
        Ok(Self { d, at, start })
    }

    /// Moves the offset past what was copied.
    fn advance(&self, c: &Ctx<'_>, copied: u64) -> Result<(), Errno> {
        let to = self.start + copied;
        if self.at != 0 {
            c.mem().write_obj(self.at, &to)
        } else if let Some(shared) = self.d.file.shared_offset() {
            shared.seek(to)
        } else {
            *self.d.offset.lock() = to;
            Ok(())
        }
    }
}

/// Copies at most `count` bytes; less when the source ends or the target would block.
fn copy(c: &Ctx<'_>, from: &Side, to: &Side, count: u64) -> Result<u64, Errno> {
    let count = count.min(MAX_RW_COUNT as u64);
    let mut done = 0;
    while done < count {
        let step = (count - done).min(STEP as u64) as usize;
        let moved = with_bounce(step, |bounce| {
            let n = from
                .d
                .file
                .read(c.k, from.start.saturating_add(done), bounce)?;
            if n == 0 {
                return Ok(0);
            }
            to.d.file
                .write(c.k, to.start.saturating_add(done), &bounce[..n])
        });
        match moved {
            Ok(0) => break,
            Ok(n) => done += n as u64,
            Err(errno) if done == 0 => return Err(errno),
            Err(_) => break,
        }
    }
    Ok(done)
}

fn sys_sendfile(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let (out, input) = (c.file(a.i32(0))?, c.file(a.i32(1))?);
    if !out.writable() || !input.readable() {
        return Err(Errno::BADF.into());
    }
    // A stream's bytes could not be put back when the target does not take them.
    let kind = input.file.stat(c.k)?.mode & S_IFMT;
    if !input.file.seekable() || kind == S_IFDIR || out.flags() & O_APPEND != 0 {
        return Err(Errno::INVAL.into());
    }
    out.file.admit(c, true)?;
    let from = Side::new(c, input, a.u64(2))?;
    let to = Side::new(c, out, 0)?;
    match copy(c, &from, &to, a.u64(3)) {
        Ok(n) => {
            from.advance(c, n)?;
            if to.d.file.seekable() {
                to.advance(c, n)?;
            }
            Ok(n)
        }
        Err(Errno::AGAIN) => Err(would_block(c, &to.d, Ready::OUT)),
        Err(errno) => {
            if errno == Errno::PIPE {
                signal_self(c, libc::SIGPIPE);
            }
            Err(errno.into())
        }
    }
}

fn sys_copy_file_range(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let (input, out) = (c.file(a.i32(0))?, c.file(a.i32(2))?);
    let count = a.u64(4);
    if a.u32(5) != 0 {
        return Err(Errno::INVAL.into());
    }
    if !input.readable() || !out.writable() || out.flags() & O_APPEND != 0 {
        return Err(Errno::BADF.into());
    }
    let stats = [input.file.stat(c.k)?, out.file.stat(c.k)?];
    for stat in &stats {
        match stat.mode & S_IFMT {
            S_IFREG => {}
            S_IFDIR => return Err(Errno::ISDIR.into()),
            _ => return Err(Errno::INVAL.into()),
        }
    }
    let from = Side::new(c, input, a.u64(1))?;
    let to = Side::new(c, out, a.u64(3))?;
    let same = stats[0].dev == stats[1].dev && stats[0].ino == stats[1].ino;
    let apart = from.start.abs_diff(to.start) >= count;
    if same && !apart {
        return Err(Errno::INVAL.into());
    }
    let n = copy(c, &from, &to, count)?;
    from.advance(c, n)?;
    to.advance(c, n)?;
    Ok(n)
}
