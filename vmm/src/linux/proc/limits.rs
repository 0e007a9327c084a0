//! Resource limits (getrlimit(2)): kept for every process; `NPROC`, `NOFILE`, `SIGPENDING`, `STACK`
//! and `FSIZE` are what others ask for.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::linux::Errno;
use crate::linux::call::{Arg, Args, Ctx, Entry, SysResult};
use crate::linux::process::{Pid, Process};

use Arg::{Hex, Int};

/// The family's calls.
pub const TABLE: &[Entry] = &[
    Entry {
        nr: 97,
        name: "getrlimit",
        args: &[Int, Hex],
        handler: sys_getrlimit,
    },
    Entry {
        nr: 160,
        name: "setrlimit",
        args: &[Int, Hex],
        handler: sys_setrlimit,
    },
    Entry {
        nr: 302,
        name: "prlimit64",
        args: &[Int, Int, Hex, Hex],
        handler: sys_prlimit64,
    },
];

/// `RLIM_INFINITY`.
pub const INFINITY: u64 = u64::MAX;
/// `RLIMIT_STACK`.
pub const STACK: usize = 3;
/// `RLIMIT_CORE`.
pub const CORE: usize = 4;
/// `RLIMIT_NPROC`.
pub const NPROC: usize = 6;
/// `RLIMIT_NOFILE`.
pub const NOFILE: usize = 7;
/// `RLIMIT_MEMLOCK`.
pub const MEMLOCK: usize = 8;
/// `RLIMIT_SIGPENDING`.
pub const SIGPENDING: usize = 11;
/// `RLIMIT_MSGQUEUE`.
pub const MSGQUEUE: usize = 12;
/// `RLIMIT_NICE`.
pub const NICE: usize = 13;
/// `RLIMIT_RTPRIO`.
pub const RTPRIO: usize = 14;

/// Most descriptors any limit may allow (`/proc/sys/fs/nr_open`).
pub const NOFILE_MAX: u64 = 1 << 16;

/// The limits the first program starts with.
#[must_use]
pub fn defaults() -> [(u64, u64); 16] {
    let mut limits = [(INFINITY, INFINITY); 16];
    limits[STACK] = (8 << 20, INFINITY);
    limits[CORE] = (0, INFINITY);
    limits[NPROC] = (4096, 4096);
    limits[NOFILE] = (1024, NOFILE_MAX);
    limits[MEMLOCK] = (8 << 20, 8 << 20);
    limits[SIGPENDING] = (4096, 4096);
    limits[MSGQUEUE] = (819_200, 819_200);
    limits[NICE] = (0, 0);
    limits[RTPRIO] = (0, 0);
    limits
}

/// `struct rlimit`.
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
struct Rlimit {
    soft: u64,
    hard: u64,
}

fn resource(a: &Args, n: usize) -> Result<usize, Errno> {
    usize::try_from(a.u32(n))
        .ok()
        .filter(|&r| r < defaults().len())
        .ok_or(Errno::INVAL)
}

fn sys_getrlimit(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let resource = resource(a, 0)?;
    let (soft, hard) = c.with_process(|p| p.rlimits[resource]);
    c.mem().write_obj(a.u64(1), &Rlimit { soft, hard })?;
    Ok(0)
}

fn sys_setrlimit(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let resource = resource(a, 0)?;
    let new: Rlimit = c.mem().read_obj(a.u64(1))?;
    change(c, c.t.pid, resource, Some(new))?;
    Ok(0)
}

fn sys_prlimit64(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let resource = resource(a, 1)?;
    let new: Option<Rlimit> = match a.u64(2) {
        0 => None,
        va => Some(c.mem().read_obj(va)?),
    };
    let pid = if a.i32(0) == 0 { c.t.pid } else { a.i32(0) };
    let old = change(c, pid, resource, new)?;
    if a.u64(3) != 0 {
        c.mem().write_obj(a.u64(3), &old)?;
    }
    Ok(0)
}

/// Reads and perhaps sets a limit of process `pid`.
fn change(c: &Ctx<'_>, pid: Pid, resource: usize, new: Option<Rlimit>) -> Result<Rlimit, Errno> {
    let mut state = c.k.state();
    let me = state.process(c.t.pid)?.cred.clone();
    let root = me.uid[1] == 0;
    let p = state.process_mut(pid)?;
    let same_user = |p: &Process| p.cred.uid == [me.uid[0]; 3] && p.cred.gid == [me.gid[0]; 3];
    if pid != c.t.pid && !root && !same_user(p) {
        return Err(Errno::PERM);
    }
    let (soft, hard) = p.rlimits[resource];
    if let Some(new) = new {
        p.rlimits[resource] = checked(resource, hard, &new, root)?;
    }
    Ok(Rlimit { soft, hard })
}

/// The new limits, if they may be set over the old hard one.
fn checked(resource: usize, hard: u64, new: &Rlimit, root: bool) -> Result<(u64, u64), Errno> {
    if new.soft > new.hard {
        return Err(Errno::INVAL);
    }
    if (new.hard > hard && !root) || (resource == NOFILE && new.hard > NOFILE_MAX) {
        return Err(Errno::PERM);
    }
    Ok((new.soft, new.hard))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn raising_the_hard_limit_needs_root() {
        let new = |soft, hard| Rlimit { soft, hard };
        assert_eq!(checked(STACK, 100, &new(50, 200), false), Err(Errno::PERM));
        assert_eq!(checked(STACK, 100, &new(50, 200), true), Ok((50, 200)));
        assert_eq!(checked(STACK, 100, &new(100, 100), false), Ok((100, 100)));
        assert_eq!(checked(STACK, 100, &new(101, 100), true), Err(Errno::INVAL));
    }

    #[test]
    fn descriptors_have_a_ceiling_even_for_root() {
        let new = Rlimit {
            soft: 1,
            hard: NOFILE_MAX + 1,
        };
        assert_eq!(checked(NOFILE, NOFILE_MAX, &new, true), Err(Errno::PERM));
    }
}
