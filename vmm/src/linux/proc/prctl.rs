//! prctl(2), arch_prctl(2), personality(2), and what is refused outright: ptrace(2), seccomp(2).

use crate::linux::Errno;
use crate::linux::call::{Arg, Args, Ctx, Entry, SysResult};
use crate::linux::process::{Prctl, Process, SIGNALS};
use crate::linux::signal::frame::USER_END;

use Arg::{Hex, Int};

/// The family's calls.
pub const TABLE: &[Entry] = &[
    Entry {
        nr: 101,
        name: "ptrace",
        args: &[Int, Int, Hex, Hex],
        handler: |_, _| Err(Errno::PERM.into()),
    },
    Entry {
        nr: 135,
        name: "personality",
        args: &[Hex],
        handler: sys_personality,
    },
    Entry {
        nr: 157,
        name: "prctl",
        args: &[Int, Hex, Hex, Hex, Hex],
        handler: sys_prctl,
    },
    Entry {
        nr: 158,
        name: "arch_prctl",
        args: &[Hex, Hex],
        handler: sys_arch_prctl,
    },
    Entry {
        nr: 317,
        name: "seccomp",
        args: &[Int, Hex, Hex],
        handler: |_, _| Err(Errno::INVAL.into()),
    },
];

const ARCH_SET_GS: i32 = 0x1001;
const ARCH_SET_FS: i32 = 0x1002;
const ARCH_GET_FS: i32 = 0x1003;
const ARCH_GET_GS: i32 = 0x1004;

/// Highest capability there is.
const CAP_LAST: u64 = 40;

fn sys_arch_prctl(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let addr = a.u64(1);
    match a.i32(0) {
        ARCH_SET_FS | ARCH_SET_GS if addr >= USER_END => return Err(Errno::PERM.into()),
        ARCH_SET_FS => c.t.regs.fs_base = addr,
        ARCH_SET_GS => c.t.regs.gs_base = addr,
        ARCH_GET_FS => c.mem().write_obj(addr, &c.t.regs.fs_base)?,
        ARCH_GET_GS => c.mem().write_obj(addr, &c.t.regs.gs_base)?,
        _ => return Err(Errno::INVAL.into()),
    }
    Ok(0)
}

/// `personality(0xffffffff)` only asks.
fn sys_personality(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let old = c.t.personality;
    if a.u32(0) != u32::MAX {
        c.t.personality = a.u32(0);
    }
    Ok(u64::from(old))
}

fn sys_prctl(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let va = a.u64(1);
    match a.i32(0) {
        libc::PR_SET_NAME => {
            let mut name = [0; 16];
            read_name(c, va, &mut name)?;
            c.with_process(|p| p.set_name(c.t.tid, super::comm(&name)));
        }
        libc::PR_GET_NAME => {
            let mut name = [0; 16];
            let comm = c.with_process(|p| p.name_of(c.t.tid).to_vec());
            for (to, from) in name.iter_mut().zip(comm) {
                *to = from;
            }
            c.mem().write(va, &name)?;
        }
        libc::PR_GET_PDEATHSIG => {
            let signo = c.with_process(|p| p.prctl.death_signal);
            c.mem().write_obj(va, &signo)?;
        }
        libc::PR_GET_CHILD_SUBREAPER => {
            let is = c.with_process(|p| i32::from(p.prctl.subreaper));
            c.mem().write_obj(va, &is)?;
        }
        libc::PR_GET_TID_ADDRESS => c.mem().write_obj(va, &c.t.clear_child_tid)?,
        _ => return value(c, a),
    }
    Ok(0)
}

/// The 15 bytes before the NUL or the limit: the page behind them need not be there.
fn read_name(c: &Ctx<'_>, va: u64, name: &mut [u8; 16]) -> Result<(), Errno> {
    for (n, byte) in name.iter_mut().take(15).enumerate() {
        *byte = c
            .mem()
            .read_obj(va.checked_add(n as u64).ok_or(Errno::FAULT)?)?;
        if *byte == 0 {
            break;
        }
    }
    Ok(())
}

/// The operations that need no memory.
fn value(c: &Ctx<'_>, a: &Args) -> SysResult {
    c.with_process(|p| {
        let root = p.cred.uid[1] == 0;
        option(p, root, a.i32(0), [a.u64(1), a.u64(2), a.u64(3), a.u64(4)]).map_err(Into::into)
    })
}

fn option(p: &mut Process, root: bool, option: i32, a: [u64; 4]) -> Result<u64, Errno> {
    let flag = |n: u64| {
        if n <= 1 {
            Ok(n == 1)
        } else {
            Err(Errno::INVAL)
        }
    };
    let prctl: &mut Prctl = &mut p.prctl;
    match option {
        libc::PR_SET_PDEATHSIG if a[0] <= SIGNALS as u64 => prctl.death_signal = a[0] as i32,
        libc::PR_GET_DUMPABLE => return Ok(prctl.dumpable),
        libc::PR_SET_DUMPABLE => prctl.dumpable = u64::from(flag(a[0])?),
        libc::PR_GET_KEEPCAPS => return Ok(u64::from(prctl.keep_caps)),
        libc::PR_SET_KEEPCAPS => prctl.keep_caps = flag(a[0])?,
        libc::PR_SET_CHILD_SUBREAPER => prctl.subreaper = a[0] != 0,
        libc::PR_SET_NO_NEW_PRIVS if a == [1, 0, 0, 0] => prctl.no_new_privs = true,
        libc::PR_GET_NO_NEW_PRIVS if a == [0; 4] => return Ok(u64::from(prctl.no_new_privs)),
        libc::PR_SET_TIMERSLACK if a[0] == 0 => prctl.timer_slack = Prctl::default().timer_slack,
        libc::PR_SET_TIMERSLACK => prctl.timer_slack = a[0],
        libc::PR_GET_TIMERSLACK => return Ok(prctl.timer_slack),
        libc::PR_CAPBSET_READ if a[0] <= CAP_LAST => return Ok(1),
        libc::PR_CAPBSET_DROP if a[0] <= CAP_LAST => {
            return if root { Ok(0) } else { Err(Errno::PERM) };
        }
        libc::PR_GET_SECCOMP | libc::PR_GET_SECUREBITS => return Ok(0),
        libc::PR_GET_THP_DISABLE => return Ok(0),
        _ => return Err(Errno::INVAL),
    }
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linux::file::Location;

    #[test]
    fn options_are_kept_and_unknown_ones_refused() {
        let mut p = Process::new(
            5,
            Location {
                mount: 0,
                path: Vec::new(),
            },
        );
        let mut call = |n, v| option(&mut p, false, n, [v, 0, 0, 0]);
        assert_eq!(call(libc::PR_GET_DUMPABLE, 0), Ok(1));
        assert_eq!(call(libc::PR_SET_DUMPABLE, 2), Err(Errno::INVAL));
        assert_eq!(call(libc::PR_SET_NO_NEW_PRIVS, 1), Ok(0));
        assert_eq!(call(libc::PR_GET_NO_NEW_PRIVS, 0), Ok(1));
        assert_eq!(call(libc::PR_SET_PDEATHSIG, 65), Err(Errno::INVAL));
        assert_eq!(call(libc::PR_CAPBSET_DROP, 1), Err(Errno::PERM));
        assert_eq!(call(-7, 0), Err(Errno::INVAL));
    }
}
