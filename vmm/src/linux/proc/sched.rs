//! The calls on scheduling. There is one policy: the worker threads take turns.

use crate::linux::Errno;
use crate::linux::call::{Arg, Args, Ctx, Entry, SysResult};
use crate::linux::process::{Pid, Process};

use Arg::{Hex, Int};

/// The family's calls.
pub const TABLE: &[Entry] = &[
    Entry {
        nr: 24,
        name: "sched_yield",
        args: &[],
        handler: |c, _| {
            c.t.yields = true;
            Ok(0)
        },
    },
    Entry {
        nr: 140,
        name: "getpriority",
        args: &[Int, Int],
        handler: sys_getpriority,
    },
    Entry {
        nr: 141,
        name: "setpriority",
        args: &[Int, Int, Int],
        handler: sys_setpriority,
    },
    Entry {
        nr: 142,
        name: "sched_setparam",
        args: &[Int, Hex],
        handler: sys_sched_setparam,
    },
    Entry {
        nr: 143,
        name: "sched_getparam",
        args: &[Int, Hex],
        handler: sys_sched_getparam,
    },
    Entry {
        nr: 144,
        name: "sched_setscheduler",
        args: &[Int, Int, Hex],
        handler: sys_sched_setscheduler,
    },
    Entry {
        nr: 145,
        name: "sched_getscheduler",
        args: &[Int],
        handler: |c, a| target(c, a.i32(0)).map(|_| 0),
    },
    Entry {
        nr: 146,
        name: "sched_get_priority_max",
        args: &[Int],
        handler: |_, a| priority(a.i32(0), 99),
    },
    Entry {
        nr: 147,
        name: "sched_get_priority_min",
        args: &[Int],
        handler: |_, a| priority(a.i32(0), 1),
    },
    Entry {
        nr: 203,
        name: "sched_setaffinity",
        args: &[Int, Int, Hex],
        handler: sys_sched_setaffinity,
    },
    Entry {
        nr: 204,
        name: "sched_getaffinity",
        args: &[Int, Int, Hex],
        handler: sys_sched_getaffinity,
    },
    Entry {
        nr: 309,
        name: "getcpu",
        args: &[Hex, Hex, Hex],
        handler: sys_getcpu,
    },
];

/// Bytes of a processor mask that are looked at.
const MASK_MAX: u64 = 1024;

/// The process a call names: itself for 0.
fn target(c: &Ctx<'_>, pid: Pid) -> Result<Pid, crate::linux::call::Stop> {
    match pid {
        0 => Ok(c.t.pid),
        1.. => {
            let state = c.k.state();
            state.owner_of(pid).ok_or_else(|| Errno::SRCH.into())
        }
        _ => Err(Errno::INVAL.into()),
    }
}

/// A limit of the real-time policies' priorities; 0 for the others.
fn priority(policy: i32, real_time: u64) -> SysResult {
    match policy {
        libc::SCHED_FIFO | libc::SCHED_RR => Ok(real_time),
        libc::SCHED_OTHER | libc::SCHED_BATCH | libc::SCHED_IDLE => Ok(0),
        _ => Err(Errno::INVAL.into()),
    }
}

fn sys_sched_getparam(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    target(c, a.i32(0))?;
    c.mem().write_obj(a.u64(1), &0_i32)?;
    Ok(0)
}

fn sys_sched_setparam(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    target(c, a.i32(0))?;
    match c.mem().read_obj::<i32>(a.u64(1))? {
        0 => Ok(0),
        _ => Err(Errno::INVAL.into()),
    }
}

fn sys_sched_setscheduler(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    target(c, a.i32(0))?;
    let priority: i32 = c.mem().read_obj(a.u64(2))?;
    match a.i32(1) {
        libc::SCHED_OTHER | libc::SCHED_BATCH | libc::SCHED_IDLE if priority == 0 => Ok(0),
        libc::SCHED_FIFO | libc::SCHED_RR if (1..=99).contains(&priority) => {
            Err(Errno::PERM.into())
        }
        _ => Err(Errno::INVAL.into()),
    }
}

/// A mask with the machine's processors, in whole 64-bit words.
fn mask(cpus: usize) -> Vec<u8> {
    let mut bytes = vec![0; cpus.max(1).div_ceil(64) * 8];
    for cpu in 0..cpus.max(1) {
        bytes[cpu / 8] |= 1 << (cpu % 8);
    }
    bytes
}

fn sys_sched_getaffinity(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let mask = mask(c.k.limits.cpus);
    let room = u64::from(a.u32(1));
    if room < mask.len() as u64 || room % 8 != 0 {
        return Err(Errno::INVAL.into());
    }
    target(c, a.i32(0))?;
    c.mem().write(a.u64(2), &mask)?;
    Ok(mask.len() as u64)
}

/// Accepted if it leaves any processor: which worker runs a thread is not the guest's business.
fn sys_sched_setaffinity(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    target(c, a.i32(0))?;
    let mut wanted = vec![0; u64::from(a.u32(1)).min(MASK_MAX) as usize];
    c.mem().read(a.u64(2), &mut wanted)?;
    let any = mask(c.k.limits.cpus)
        .iter()
        .zip(&wanted)
        .any(|(have, want)| have & want != 0);
    if any { Ok(0) } else { Err(Errno::INVAL.into()) }
}

fn sys_getcpu(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let cpu = c.t.last_cpu.unwrap_or(0) % c.k.limits.cpus.max(1);
    for (va, value) in [(a.u64(0), cpu as u32), (a.u64(1), 0)] {
        if va != 0 {
            c.mem().write_obj(va, &value)?;
        }
    }
    Ok(0)
}

/// Whether getpriority(2)'s `which` and `who` mean process `p`; `None` for no such `which`.
fn names(which: i32, who: i32, me: &Process, p: &Process) -> Option<bool> {
    let or_mine = |mine: i32| if who == 0 { mine } else { who };
    Some(match which {
        0 => p.pid == or_mine(me.pid),
        1 => p.pgid == or_mine(me.pgid),
        2 => p.cred.uid[0] == or_mine(me.cred.uid[0] as i32) as u32,
        _ => return None,
    })
}

fn named(c: &Ctx<'_>, a: &Args) -> Result<Vec<Pid>, Errno> {
    let state = c.k.state();
    let me = state.process(c.t.pid)?;
    let mut pids = Vec::new();
    for p in state.procs.values().filter(|p| p.ppid != 0) {
        if names(a.i32(0), a.i32(1), me, p).ok_or(Errno::INVAL)? {
            pids.push(p.pid);
        }
    }
    if pids.is_empty() {
        Err(Errno::SRCH)
    } else {
        Ok(pids)
    }
}

/// Returns 20 - nice, as the call itself does.
fn sys_getpriority(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let pids = named(c, a)?;
    let state = c.k.state();
    let best = pids
        .iter()
        .filter_map(|pid| state.procs.get(pid))
        .map(|p| 20 - p.nice)
        .max();
    Ok(best.ok_or(Errno::SRCH)? as u64)
}

fn sys_setpriority(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let nice = a.i32(2).clamp(-20, 19);
    let pids = named(c, a)?;
    let mut state = c.k.state();
    let cred = state.process(c.t.pid)?.cred.clone();
    for pid in pids {
        let p = state.process_mut(pid)?;
        let root = cred.uid[1] == 0;
        if !root && !p.cred.uid[..2].contains(&cred.uid[1]) {
            return Err(Errno::PERM.into());
        }
        if !root && nice < p.nice {
            return Err(Errno::ACCESS.into());
        }
        p.nice = nice;
    }
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mask_has_a_bit_for_every_processor() {
        assert_eq!(mask(2), [3, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(mask(65).len(), 16);
        assert_eq!(mask(0)[0], 1);
    }
}
