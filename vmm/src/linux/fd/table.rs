//! The descriptor table: numbers, and the calls that make, copy and close them.

use std::sync::Arc;

use super::super::Errno;
use super::super::call::{Arg, Args, Ctx, Entry, SysResult};
use super::super::file::Description;
use super::super::process::{Fd, FdTable, Process};

/// `O_CLOEXEC`.
pub const O_CLOEXEC: u32 = 0o2_000_000;
/// Index of `RLIMIT_NOFILE`.
const RLIMIT_NOFILE: usize = 7;
/// Descriptors a process may ever have, whatever its limit says (`/proc/sys/fs/nr_open`).
const NR_OPEN: u64 = 1 << 16;

const CLOSE_RANGE_UNSHARE: u32 = 2;
const CLOSE_RANGE_CLOEXEC: u32 = 4;

/// The calls of this file.
pub const TABLE: &[Entry] = &[
    Entry {
        nr: 3,
        name: "close",
        args: &[Arg::Fd],
        handler: sys_close,
    },
    Entry {
        nr: 32,
        name: "dup",
        args: &[Arg::Fd],
        handler: sys_dup,
    },
    Entry {
        nr: 33,
        name: "dup2",
        args: &[Arg::Fd, Arg::Fd],
        handler: sys_dup2,
    },
    Entry {
        nr: 292,
        name: "dup3",
        args: &[Arg::Fd, Arg::Fd, Arg::Hex],
        handler: sys_dup3,
    },
    Entry {
        nr: 436,
        name: "close_range",
        args: &[Arg::Fd, Arg::Fd, Arg::Hex],
        handler: sys_close_range,
    },
];

impl FdTable {
    /// Adds `fd` at the lowest free number from `least` on and below `limit`.
    ///
    /// # Errors
    /// `EMFILE`: there is none.
    pub fn insert_lowest(&mut self, least: i32, limit: u64, fd: Fd) -> Result<i32, Errno> {
        let mut free = least;
        for &used in self.fds.range(least..).map(|(n, _)| n) {
            if used != free {
                break;
            }
            free = free.checked_add(1).ok_or(Errno::MFILE)?;
        }
        if free as u64 >= limit {
            return Err(Errno::MFILE);
        }
        self.fds.insert(free, fd);
        Ok(free)
    }

    /// Takes out the descriptors `execve` closes, for the caller to drop without the state lock.
    #[must_use]
    pub fn take_close_on_exec(&mut self) -> Vec<Fd> {
        let taken: Vec<i32> = self
            .fds
            .iter()
            .filter(|(_, fd)| fd.close_on_exec)
            .map(|(n, _)| *n)
            .collect();
        taken.iter().filter_map(|n| self.fds.remove(n)).collect()
    }

    /// Takes out all descriptors, for the caller to drop without the state lock.
    #[must_use]
    pub fn take_all(&mut self) -> Vec<Fd> {
        std::mem::take(&mut self.fds).into_values().collect()
    }
}

/// First descriptor number `process` may not use.
#[must_use]
pub fn fd_limit(process: &Process) -> u64 {
    process.rlimits[RLIMIT_NOFILE].0.min(NR_OPEN)
}

impl Ctx<'_> {
    /// Gives the calling process the lowest free descriptor for `description`.
    ///
    /// # Errors
    /// `EMFILE`.
    pub fn add_fd(&self, description: Arc<Description>, close_on_exec: bool) -> Result<i32, Errno> {
        self.add_fd_from(0, description, close_on_exec)
    }

    /// As [`Ctx::add_fd`], the lowest from `least` on.
    ///
    /// # Errors
    /// `EMFILE`.
    pub fn add_fd_from(
        &self,
        least: i32,
        description: Arc<Description>,
        close_on_exec: bool,
    ) -> Result<i32, Errno> {
        self.with_process(|p| {
            let limit = fd_limit(p);
            p.files.insert_lowest(
                least,
                limit,
                Fd {
                    description,
                    close_on_exec,
                },
            )
        })
    }

    /// Gives the calling process two descriptors (pipe(2), socketpair(2)), or none.
    ///
    /// # Errors
    /// `EMFILE`.
    pub fn add_fd_pair(
        &self,
        pair: [Arc<Description>; 2],
        close_on_exec: bool,
    ) -> Result<[i32; 2], Errno> {
        let [first, second] = pair;
        let one = self.add_fd(first, close_on_exec)?;
        match self.add_fd(second, close_on_exec) {
            Ok(two) => Ok([one, two]),
            Err(errno) => {
                self.remove_fd(one);
                Err(errno)
            }
        }
    }

    /// Takes a descriptor out of the calling process's table.
    pub fn remove_fd(&self, fd: i32) -> Option<Fd> {
        self.with_process(|p| p.files.fds.remove(&fd))
    }
}

/// Drops descriptors that were taken out of a table, with what closing means for record locks.
/// Must be called without the state lock.
fn finish_close(c: &Ctx<'_>, closed: Vec<Fd>) {
    for fd in &closed {
        c.k.io.locks.closed(c.k, c.t.pid, &fd.description);
    }
    drop(closed);
    c.k.io.locks.sweep(c.k);
}

fn sys_close(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let fd = c.remove_fd(a.i32(0)).ok_or(Errno::BADF)?;
    finish_close(c, vec![fd]);
    Ok(0)
}

fn sys_dup(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let description = c.file(a.i32(0))?;
    Ok(c.add_fd(description, false)? as u64)
}

fn sys_dup2(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let (old, new) = (a.i32(0), a.i32(1));
    if old == new {
        c.file(old)?;
        return Ok(new as u64);
    }
    dup_to(c, old, new, false)
}

fn sys_dup3(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let (old, new, flags) = (a.i32(0), a.i32(1), a.u32(2));
    if flags & !O_CLOEXEC != 0 || old == new {
        return Err(Errno::INVAL.into());
    }
    dup_to(c, old, new, flags & O_CLOEXEC != 0)
}

fn dup_to(c: &Ctx<'_>, old: i32, new: i32, close_on_exec: bool) -> SysResult {
    let replaced = c.with_process(|p| {
        let description = Arc::clone(&p.files.fds.get(&old).ok_or(Errno::BADF)?.description);
        if new < 0 || new as u64 >= fd_limit(p) {
            return Err(Errno::BADF);
        }
        Ok(p.files.fds.insert(
            new,
            Fd {
                description,
                close_on_exec,
            },
        ))
    })?;
    finish_close(c, replaced.into_iter().collect());
    Ok(new as u64)
}

fn sys_close_range(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let (first, last, flags) = (a.u32(0), a.u32(1), a.u32(2));
    if flags & !(CLOSE_RANGE_UNSHARE | CLOSE_RANGE_CLOEXEC) != 0 || first > last {
        return Err(Errno::INVAL.into());
    }
    let Ok(first) = i32::try_from(first) else {
        return Ok(0);
    };
    let last = i32::try_from(last).unwrap_or(i32::MAX);
    let closed = c.with_process(|p| {
        let fds = &mut p.files.fds;
        if flags & CLOSE_RANGE_CLOEXEC != 0 {
            fds.range_mut(first..=last)
                .for_each(|(_, fd)| fd.close_on_exec = true);
            return Vec::new();
        }
        let numbers: Vec<i32> = fds.range(first..=last).map(|(n, _)| *n).collect();
        numbers.iter().filter_map(|n| fds.remove(n)).collect()
    });
    finish_close(c, closed);
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::super::pipe::Pipe;
    use super::*;
    use crate::linux::sched::Sched;

    fn fd() -> Fd {
        let (reader, _writer) = Pipe::pair(&Arc::new(Sched::default()), &Arc::default()).unwrap();
        Fd {
            description: Description::new(reader, 0),
            close_on_exec: false,
        }
    }

    #[test]
    fn hole_in_the_table_is_filled_first() {
        let mut table = FdTable::default();
        for expected in 0..4 {
            assert_eq!(table.insert_lowest(0, 8, fd()), Ok(expected));
        }
        table.fds.remove(&1);
        table.fds.remove(&2);
        assert_eq!(table.insert_lowest(0, 8, fd()), Ok(1));
        assert_eq!(table.insert_lowest(3, 8, fd()), Ok(4));
        assert_eq!(table.insert_lowest(0, 8, fd()), Ok(2));
    }

    #[test]
    fn limit_reached_gives_emfile() {
        let mut table = FdTable::default();
        assert_eq!(table.insert_lowest(0, 1, fd()), Ok(0));
        assert_eq!(table.insert_lowest(0, 1, fd()), Err(Errno::MFILE));
        assert_eq!(table.insert_lowest(5, 5, fd()), Err(Errno::MFILE));
    }

    #[test]
    fn close_on_exec_takes_only_the_marked() {
        let mut table = FdTable::default();
        let _ = table.insert_lowest(0, 9, fd());
        let _ = table.insert_lowest(
            0,
            9,
            Fd {
                close_on_exec: true,
                ..fd()
            },
        );
        assert_eq!(table.take_close_on_exec().len(), 1);
        assert_eq!(table.fds.keys().copied().collect::<Vec<_>>(), vec![0]);
    }
}
