//! The calls on a process's own signals: dispositions, masks, the alternate stack, waiting.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::frame::{SS_AUTODISARM, SS_DISABLE, SS_ONSTACK, StackT};
use super::info::{SIGINFO_SIZE, dequeue};
use super::send::discard;
use super::{Effect, UNBLOCKABLE, bit, effect, set_mask, set_temporary_mask};
use crate::linux::Errno;
use crate::linux::call::{Arg, Args, Ctx, Entry, Restart, Stop, SysResult, Wait, WaitKey};
use crate::linux::proc::timeval::read_timespec;
use crate::linux::process::{SIGNALS, SigAction};
use crate::linux::thread::{AltStack, Thread};

use Arg::{Hex, Int, Sig};

/// The family's calls.
pub const TABLE: &[Entry] = &[
    Entry {
        nr: 13,
        name: "rt_sigaction",
        args: &[Sig, Hex, Hex, Int],
        handler: sys_rt_sigaction,
    },
    Entry {
        nr: 14,
        name: "rt_sigprocmask",
        args: &[Int, Hex, Hex, Int],
        handler: sys_rt_sigprocmask,
    },
    Entry {
        nr: 15,
        name: "rt_sigreturn",
        args: &[],
        handler: super::sigreturn::sys_rt_sigreturn,
    },
    Entry {
        nr: 34,
        name: "pause",
        args: &[],
        handler: sys_pause,
    },
    Entry {
        nr: 127,
        name: "rt_sigpending",
        args: &[Hex, Int],
        handler: sys_rt_sigpending,
    },
    Entry {
        nr: 128,
        name: "rt_sigtimedwait",
        args: &[Hex, Hex, Hex, Int],
        handler: sys_rt_sigtimedwait,
    },
    Entry {
        nr: 130,
        name: "rt_sigsuspend",
        args: &[Hex, Int],
        handler: sys_rt_sigsuspend,
    },
    Entry {
        nr: 131,
        name: "sigaltstack",
        args: &[Hex, Hex],
        handler: sys_sigaltstack,
    },
];

/// `MINSIGSTKSZ`.
const MIN_STACK: u64 = 2048;

/// `struct kernel_sigaction`.
#[repr(C)]
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
struct KernelSigaction {
    handler: u64,
    flags: u64,
    restorer: u64,
    mask: u64,
}

/// `EINVAL` unless a `sigset_t` is given with the only size there is.
fn check_set_size(size: u64) -> Result<(), Errno> {
    if size == 8 { Ok(()) } else { Err(Errno::INVAL) }
}

fn sys_rt_sigaction(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    check_set_size(a.u64(3))?;
    let signo = a.i32(0);
    let new: Option<KernelSigaction> = match a.u64(1) {
        0 => None,
        va => Some(c.mem().read_obj(va)?),
    };
    let slot = usize::try_from(signo - 1)
        .ok()
        .filter(|&n| n < SIGNALS)
        .ok_or(Errno::INVAL)?;
    if new.is_some() && bit(signo) & UNBLOCKABLE != 0 {
        return Err(Errno::INVAL.into());
    }
    let old = c.with_process(|p| {
        let old = p.actions[slot];
        if let Some(new) = new {
            p.actions[slot] = SigAction {
                handler: new.handler,
                flags: new.flags,
                restorer: new.restorer,
                mask: new.mask & !UNBLOCKABLE,
            };
            if effect(p, signo) == Effect::Ignore {
                discard(p, bit(signo));
            }
        }
        old
    });
    if a.u64(2) != 0 {
        let SigAction {
            handler,
            flags,
            restorer,
            mask,
        } = old;
        c.mem().write_obj(
            a.u64(2),
            &KernelSigaction {
                handler,
                flags,
                restorer,
                mask,
            },
        )?;
    }
    Ok(0)
}

fn sys_rt_sigprocmask(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    check_set_size(a.u64(3))?;
    let old = c.t.mask;
    if a.u64(1) != 0 {
        let set: u64 = c.mem().read_obj(a.u64(1))?;
        let new = match a.i32(0) {
            libc::SIG_BLOCK => old | set,
            libc::SIG_UNBLOCK => old & !set,
            libc::SIG_SETMASK => set,
            _ => return Err(Errno::INVAL.into()),
        };
        let mut state = c.k.state();
        set_mask(&c.k.sched, &mut state, c.t, new);
    }
    if a.u64(2) != 0 {
        c.mem().write_obj(a.u64(2), &old)?;
    }
    Ok(0)
}

fn sys_rt_sigpending(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    if a.u64(1) > 8 {
        return Err(Errno::INVAL.into());
    }
    let (tid, mask) = (c.t.tid, c.t.mask);
    let set = c
        .with_process(|p| (p.pending.set | p.thread_pending.get(&tid).map_or(0, |q| q.set)) & mask);
    c.mem()
        .write(a.u64(0), &set.to_le_bytes()[..a.u64(1) as usize])?;
    Ok(0)
}

fn sys_rt_sigsuspend(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    check_set_size(a.u64(1))?;
    let set: u64 = c.mem().read_obj(a.u64(0))?;
    set_temporary_mask(c, set);
    sleep_for_signal()
}

fn sys_pause(_c: &mut Ctx<'_>, _a: &Args) -> SysResult {
    sleep_for_signal()
}

fn sleep_for_signal() -> SysResult {
    Err(Stop::Block(Wait {
        keys: Vec::new(),
        deadline: None,
        restart: Restart::Never,
    }))
}

fn sys_rt_sigtimedwait(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    check_set_size(a.u64(3))?;
    let set: u64 = c.mem().read_obj(a.u64(0))?;
    let timeout = read_timespec(c, a.u64(2))?;
    let tid = c.t.tid;
    if let Some(info) = c.with_process(|p| dequeue(p, tid, set & !UNBLOCKABLE)) {
        if a.u64(1) != 0 {
            let bytes: [u8; SIGINFO_SIZE] = info.encode();
            c.mem().write(a.u64(1), &bytes)?;
        }
        return Ok(info.signo as u64);
    }
    let now = c.k.clock.monotonic();
    let deadline = c.deadline(|| timeout.map(|ns| now.saturating_add(ns)));
    if deadline.is_some_and(|at| at <= now) {
        return Err(Errno::AGAIN.into());
    }
    let keys = vec![WaitKey::Signal(c.t.pid)];
    Err(Stop::Block(Wait {
        keys,
        deadline,
        restart: Restart::Never,
    }))
}

fn sys_sigaltstack(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let old = current_altstack(c.t);
    if a.u64(0) != 0 {
        let new: StackT = c.mem().read_obj(a.u64(0))?;
        set_altstack(c.t, &new)?;
    }
    if a.u64(1) != 0 {
        c.mem().write_obj(a.u64(1), &old)?;
    }
    Ok(0)
}

fn current_altstack(t: &Thread) -> StackT {
    let alt = &t.altstack;
    let mode = match alt.size {
        0 => SS_DISABLE,
        _ if alt.contains(t.regs.rsp) => SS_ONSTACK,
        _ => 0,
    };
    StackT {
        sp: alt.base,
        flags: mode | (alt.flags & SS_AUTODISARM),
        pad: 0,
        size: alt.size,
    }
}

/// Sets the alternate stack by the rules of sigaltstack(2).
///
/// # Errors
/// `EPERM` while the thread is on it, `EINVAL` for other flags, `ENOMEM` if it is too small.
pub fn set_altstack(t: &mut Thread, new: &StackT) -> Result<(), Errno> {
    if t.altstack.contains(t.regs.rsp) {
        return Err(Errno::PERM);
    }
    t.altstack = match new.flags & !SS_AUTODISARM {
        SS_DISABLE => AltStack {
            base: 0,
            size: 0,
            flags: new.flags,
        },
        0 | SS_ONSTACK if new.size < MIN_STACK => return Err(Errno::NOMEM),
        0 | SS_ONSTACK => AltStack {
            base: new.sp,
            size: new.size,
            flags: new.flags,
        },
        _ => return Err(Errno::INVAL),
    };
    Ok(())
}
