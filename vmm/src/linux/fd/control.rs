//! `ioctl`: what holds for every file; the rest is the file's own.

use super::super::Errno;
use super::super::call::{Arg, Args, Ctx, Entry, SysResult};
use super::super::file::{Description, O_NONBLOCK, O_PATH};

/// The calls of this file.
pub const TABLE: &[Entry] = &[Entry {
    nr: 16,
    name: "ioctl",
    args: &[Arg::Fd, Arg::Hex, Arg::Hex],
    handler: sys_ioctl,
}];

const FIONCLEX: u32 = 0x5450;
const FIOCLEX: u32 = 0x5451;
const FIONBIO: u32 = 0x5421;
const FIOASYNC: u32 = 0x5452;
const FIONREAD: u32 = 0x541b;
const FIOQSIZE: u32 = 0x5460;
const FIGETBSZ: u32 = 2;

const S_IFMT: u32 = 0o170_000;
const S_IFREG: u32 = 0o100_000;

fn sys_ioctl(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let (fd, request, arg) = (a.i32(0), a.u32(1), a.u64(2));
    let d = c.file(fd)?;
    if d.flags() & O_PATH != 0 {
        return Err(Errno::BADF.into());
    }
    match request {
        FIOCLEX | FIONCLEX => {
            let close_on_exec = request == FIOCLEX;
            c.with_process(|p| {
                p.files
                    .fds
                    .get_mut(&fd)
                    .map(|f| f.close_on_exec = close_on_exec)
            });
            Ok(0)
        }
        FIONBIO => {
            let on: i32 = c.mem().read_obj(arg)?;
            let flags = if on != 0 {
                d.flags() | O_NONBLOCK
            } else {
                d.flags() & !O_NONBLOCK
            };
            d.file.set_status(flags)?;
            d.set_flags(flags);
            Ok(0)
        }
        FIOASYNC => {
            let _: i32 = c.mem().read_obj(arg)?;
            Ok(0)
        }
        FIONREAD => match unread(c, &d)? {
            Some(n) => {
                c.mem()
                    .write_obj(arg, &i32::try_from(n).unwrap_or(i32::MAX))?;
                Ok(0)
            }
            None => d.file.ioctl(c, request, arg),
        },
        FIOQSIZE | FIGETBSZ => {
            let stat = d.file.stat(c.k)?;
            if stat.mode & S_IFMT != S_IFREG {
                return d.file.ioctl(c, request, arg);
            }
            if request == FIOQSIZE {
                c.mem().write_obj(arg, &stat.size)?;
            } else {
                c.mem().write_obj(arg, &(stat.blksize as u32))?;
            }
            Ok(0)
        }
        _ => d.file.ioctl(c, request, arg),
    }
}

/// Bytes to read before the end or before blocking, of regular files and streams that know.
fn unread(c: &Ctx<'_>, d: &Description) -> Result<Option<u64>, Errno> {
    if let Some(n) = d.file.readable_bytes() {
        return Ok(Some(n as u64));
    }
    let stat = d.file.stat(c.k)?;
    if stat.mode & S_IFMT != S_IFREG {
        return Ok(None);
    }
    let offset = match d.file.shared_offset() {
        Some(shared) => shared.tell()?,
        None => *d.offset.lock(),
    };
    Ok(Some(stat.size.saturating_sub(offset)))
}
