//! `fcntl`.

use std::sync::Arc;

use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::super::Errno;
use super::super::call::{Arg, Args, Ctx, Entry, Stop, SysResult, Wait};
use super::super::file::{Description, O_APPEND, O_NONBLOCK, O_PATH};
use super::super::fs::Seals;
use super::locks::{FileId, Kind, Lock, Owner, owner_of};
use super::table::fd_limit;

/// The calls of this file.
pub const TABLE: &[Entry] = &[Entry {
    nr: 72,
    name: "fcntl",
    args: &[Arg::Fd, Arg::Int, Arg::Hex],
    handler: sys_fcntl,
}];

const F_DUPFD: i32 = 0;
const F_GETFD: i32 = 1;
const F_SETFD: i32 = 2;
const F_GETFL: i32 = 3;
const F_SETFL: i32 = 4;
const F_GETLK: i32 = 5;
const F_SETLK: i32 = 6;
const F_SETLKW: i32 = 7;
const F_SETOWN: i32 = 8;
const F_GETOWN: i32 = 9;
const F_OFD_GETLK: i32 = 36;
const F_OFD_SETLK: i32 = 37;
const F_OFD_SETLKW: i32 = 38;
const F_DUPFD_CLOEXEC: i32 = 1030;
const F_SETPIPE_SZ: i32 = 1031;
const F_GETPIPE_SZ: i32 = 1032;
const F_ADD_SEALS: i32 = 1033;
const F_GET_SEALS: i32 = 1034;

const FD_CLOEXEC: u64 = 1;
/// `O_CREAT | O_EXCL | O_NOCTTY | O_TRUNC | O_CLOEXEC`: not status flags.
const CREATION: u32 = 0o100 | 0o200 | 0o400 | 0o1000 | 0o2_000_000;
const O_NOATIME: u32 = 0o1_000_000;
/// What `F_SETFL` changes (`O_ASYNC` and `O_DIRECT` are not offered and are ignored).
const SETTABLE: u32 = O_APPEND | O_NONBLOCK | O_NOATIME;

fn sys_fcntl(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let (fd, command, arg) = (a.i32(0), a.i32(1), a.u64(2));
    let d = c.file(fd)?;
    if d.flags() & O_PATH != 0 && !matches!(command, F_DUPFD..=F_GETFL | F_DUPFD_CLOEXEC) {
        return Err(Errno::BADF.into());
    }
    match command {
        F_DUPFD => duplicate(c, d, a.i32(2), false),
        F_DUPFD_CLOEXEC => duplicate(c, d, a.i32(2), true),
        F_GETFD => Ok(u64::from(c.with_process(|p| {
            p.files.fds.get(&fd).is_some_and(|f| f.close_on_exec)
        }))),
        F_SETFD => {
            let close_on_exec = arg & FD_CLOEXEC != 0;
            c.with_process(|p| {
                p.files
                    .fds
                    .get_mut(&fd)
                    .map(|f| f.close_on_exec = close_on_exec)
            })
            .ok_or(Errno::BADF)?;
            Ok(0)
        }
        F_GETFL => Ok(u64::from(d.flags() & !CREATION)),
        F_SETFL => {
            let flags = d.flags() & !SETTABLE | a.u32(2) & SETTABLE;
            d.file.set_status(flags)?;
            d.set_flags(flags);
            Ok(0)
        }
        F_GETLK => get_lock(c, &d, arg, OwnedBy::Process),
        F_OFD_GETLK => get_lock(c, &d, arg, OwnedBy::Description),
        F_SETLK => set_lock(c, &d, arg, OwnedBy::Process, OnConflict::Fail),
        F_SETLKW => set_lock(c, &d, arg, OwnedBy::Process, OnConflict::Wait),
        F_OFD_SETLK => set_lock(c, &d, arg, OwnedBy::Description, OnConflict::Fail),
        F_OFD_SETLKW => set_lock(c, &d, arg, OwnedBy::Description, OnConflict::Wait),
        F_SETPIPE_SZ => {
            let pipe = d.file.pipe().ok_or(Errno::BADF)?;
            Ok(pipe.set_capacity(a.u32(2) as usize)? as u64)
        }
        F_GETPIPE_SZ => Ok(d.file.pipe().ok_or(Errno::BADF)?.capacity() as u64),
        F_ADD_SEALS => add_seals(&d, a.u32(2)),
        F_GET_SEALS => Ok(d.file.seals()?.bits().into()),
        // Signal-driven I/O is not offered: nobody owns a file.
        F_SETOWN | F_GETOWN => Ok(0),
        _ => Err(Errno::INVAL.into()),
    }
}

fn add_seals(d: &Description, seals: u32) -> SysResult {
    // What has none says so first.
    d.file.seals()?;
    if !d.writable() {
        return Err(Errno::PERM.into());
    }
    let seals = Seals::from_bits(seals).ok_or(Errno::INVAL)?;
    d.file.seal(seals)?;
    Ok(0)
}

fn duplicate(c: &Ctx<'_>, d: Arc<Description>, least: i32, close_on_exec: bool) -> SysResult {
    if least < 0 || least as u64 >= c.with_process(|p| fd_limit(p)) {
        return Err(Errno::INVAL.into());
    }
    Ok(c.add_fd_from(least, d, close_on_exec)? as u64)
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum OwnedBy {
    Process,
    Description,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum OnConflict {
    Fail,
    Wait,
}

/// `struct flock` (fcntl(2)).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct Flock {
    kind: i16,
    whence: i16,
    pad: i32,
    start: i64,
    len: i64,
    pid: i32,
    pad2: i32,
}

const F_RDLCK: i16 = 0;
const F_WRLCK: i16 = 1;
const F_UNLCK: i16 = 2;

impl Flock {
    fn kind(&self) -> Result<Option<Kind>, Errno> {
        match self.kind {
            F_RDLCK => Ok(Some(Kind::Read)),
            F_WRLCK => Ok(Some(Kind::Write)),
            F_UNLCK => Ok(None),
            _ => Err(Errno::INVAL),
        }
    }

    /// The bytes it is about: a negative length is before the start, 0 is to the end.
    fn range(&self, offset: u64, size: u64) -> Result<(u64, u64), Errno> {
        let base = match self.whence {
            0 => 0,
            1 => offset,
            2 => size,
            _ => return Err(Errno::INVAL),
        };
        let base = i64::try_from(base).map_err(|_| Errno::OVERFLOW)?;
        let at = base.checked_add(self.start).ok_or(Errno::OVERFLOW)?;
        let (start, end) = match self.len {
            0 => (at, None),
            n if n > 0 => (at, Some(at.checked_add(n).ok_or(Errno::OVERFLOW)?)),
            n => (at.checked_add(n).ok_or(Errno::INVAL)?, Some(at)),
        };
        let start = u64::try_from(start).map_err(|_| Errno::INVAL)?;
        Ok((start, end.map_or(u64::MAX, |e| e as u64)))
    }
}

/// What the call is about: the file, who asks, which bytes.
struct Asked {
    flock: Flock,
    file: FileId,
    owner: Owner,
    range: (u64, u64),
}

impl Asked {
    fn new(c: &Ctx<'_>, d: &Arc<Description>, at: u64, by: OwnedBy) -> Result<Self, Errno> {
        let flock: Flock = c.mem().read_obj(at)?;
        let stat = d.file.stat(c.k)?;
        let offset = match d.file.shared_offset() {
            Some(shared) => shared.tell()?,
            None => *d.offset.lock(),
        };
        let owner = match by {
            OwnedBy::Process => Owner::Process(c.t.pid),
            OwnedBy::Description if flock.pid != 0 => return Err(Errno::INVAL),
            OwnedBy::Description => owner_of(d),
        };
        let range = flock.range(offset, stat.size)?;
        Ok(Self {
            flock,
            file: (stat.dev, stat.ino),
            owner,
            range,
        })
    }

    fn lock(&self, kind: Kind) -> Lock {
        Lock {
            owner: self.owner.clone(),
            kind,
            start: self.range.0,
            end: self.range.1,
        }
    }
}

fn get_lock(c: &Ctx<'_>, d: &Arc<Description>, at: u64, by: OwnedBy) -> SysResult {
    let asked = Asked::new(c, d, at, by)?;
    let kind = asked.flock.kind()?.ok_or(Errno::INVAL)?;
    let reply = match c.k.io.locks.conflict(asked.file, &asked.lock(kind)) {
        None => Flock {
            kind: F_UNLCK,
            ..asked.flock
        },
        Some(lock) => Flock {
            kind: if lock.kind == Kind::Read {
                F_RDLCK
            } else {
                F_WRLCK
            },
            whence: 0,
            start: lock.start as i64,
            len: if lock.end == u64::MAX {
                0
            } else {
                (lock.end - lock.start) as i64
            },
            pid: match lock.owner {
                Owner::Process(pid) => pid,
                Owner::Description(_) => -1,
            },
            ..asked.flock
        },
    };
    c.mem().write_obj(at, &reply)?;
    Ok(0)
}

fn set_lock(
    c: &mut Ctx<'_>,
    d: &Arc<Description>,
    at: u64,
    by: OwnedBy,
    on_conflict: OnConflict,
) -> SysResult {
    let locks = &c.k.io.locks;
    let asked = Asked::new(c, d, at, by)?;
    let Some(kind) = asked.flock.kind()? else {
        locks.release(c.k, asked.file, &asked.owner, asked.range)?;
        return Ok(0);
    };
    let allowed = match kind {
        Kind::Read => d.readable(),
        Kind::Write => d.writable(),
    };
    if !allowed {
        return Err(Errno::BADF.into());
    }
    if by == OwnedBy::Process {
        locks.stop_waiting(c.t.pid);
    }
    let wanted = asked.lock(kind);
    loop {
        match locks.acquire(c.k, asked.file, wanted.clone()) {
            Ok(()) => return Ok(0),
            Err(Errno::AGAIN) if on_conflict == OnConflict::Wait => {}
            Err(errno) => return Err(errno.into()),
        }
        let Some(blocker) = locks.conflict(asked.file, &wanted) else {
            continue;
        };
        if by == OwnedBy::Process && !c.interrupted {
            locks.wait_for(c.t.pid, &blocker)?;
        }
        return Err(Stop::Block(Wait::on(locks.key())));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flock(whence: i16, start: i64, len: i64) -> Flock {
        Flock {
            kind: F_WRLCK,
            whence,
            pad: 0,
            start,
            len,
            pid: 0,
            pad2: 0,
        }
    }

    #[test]
    fn ranges_follow_whence_and_sign() {
        assert_eq!(flock(0, 10, 5).range(0, 0), Ok((10, 15)));
        assert_eq!(flock(1, -2, 0).range(7, 0), Ok((5, u64::MAX)));
        assert_eq!(flock(2, 0, -4).range(0, 100), Ok((96, 100)));
        assert_eq!(flock(0, 2, -4).range(0, 0), Err(Errno::INVAL));
        assert_eq!(flock(0, i64::MAX, 2).range(0, 0), Err(Errno::OVERFLOW));
        assert_eq!(flock(9, 0, 0).range(0, 0), Err(Errno::INVAL));
    }
}
