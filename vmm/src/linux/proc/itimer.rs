//! alarm(2), getitimer(2), setitimer(2).

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::posix_timers;
use super::timeval::{Pair, SECOND};
use crate::linux::Errno;
use crate::linux::call::{Arg, Args, Ctx, Entry, SysResult};
use crate::linux::kernel::Kernel;
use crate::linux::process::{Pid, Process, SigInfo};
use crate::linux::signal::send_to_process;

use Arg::{Hex, Int};

/// The family's calls.
pub const TABLE: &[Entry] = &[
    Entry {
        nr: 36,
        name: "getitimer",
        args: &[Int, Hex],
        handler: sys_getitimer,
    },
    Entry {
        nr: 37,
        name: "alarm",
        args: &[Int],
        handler: sys_alarm,
    },
    Entry {
        nr: 38,
        name: "setitimer",
        args: &[Int, Hex, Hex],
        handler: sys_setitimer,
    },
];

/// Shortest time between two looks at timers that count CPU time, nanoseconds.
const CPU_LOOK: u64 = 1_000_000;

/// `struct itimerval`.
#[repr(C)]
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
struct Itimerval {
    interval: Pair,
    value: Pair,
}

/// The three timers of a process.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Which {
    Real,
    /// Index into `itimer_cpu`. User time is all CPU time.
    Cpu(usize),
}

fn which(n: i32) -> Result<Which, Errno> {
    match n {
        libc::ITIMER_REAL => Ok(Which::Real),
        libc::ITIMER_VIRTUAL => Ok(Which::Cpu(0)),
        libc::ITIMER_PROF => Ok(Which::Cpu(1)),
        _ => Err(Errno::INVAL),
    }
}

fn slot(p: &mut Process, which: Which) -> &mut Option<(u64, u64)> {
    match which {
        Which::Real => &mut p.itimer_real,
        Which::Cpu(n) => &mut p.itimer_cpu[n],
    }
}

/// Remaining time and interval of a timer, and its replacement, if there is one.
fn exchange(c: &Ctx<'_>, which: Which, new: Option<(u64, u64)>) -> (u64, u64) {
    let monotonic = c.k.clock.monotonic();
    let old = c.with_process(|p| {
        let now = if which == Which::Real {
            monotonic
        } else {
            p.cpu_ns()
        };
        let timer = slot(p, which);
        let old = timer.map_or((0, 0), |(at, interval)| {
            (at.saturating_sub(now).max(1), interval)
        });
        if let Some((value, interval)) = new {
            *timer = (value != 0).then(|| (now.saturating_add(value), interval));
        }
        old
    });
    if new.is_some() {
        c.k.sched.clock_changed();
    }
    old
}

fn sys_alarm(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let (left, _) = exchange(c, Which::Real, Some((u64::from(a.u32(0)) * SECOND, 0)));
    let rounded = left.saturating_add(SECOND / 2) / SECOND;
    Ok(if left != 0 { rounded.max(1) } else { 0 })
}

fn sys_getitimer(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let which = which(a.i32(0))?;
    let old = exchange(c, which, None);
    write_itimer(c, a.u64(1), old)
}

fn sys_setitimer(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let which = which(a.i32(0))?;
    let new = match a.u64(1) {
        // As Linux: no new value disarms.
        0 => (0, 0),
        va => {
            let new: Itimerval = c.mem().read_obj(va)?;
            (new.value.timeval_ns()?, new.interval.timeval_ns()?)
        }
    };
    let old = exchange(c, which, Some(new));
    if a.u64(2) == 0 {
        Ok(0)
    } else {
        write_itimer(c, a.u64(2), old)
    }
}

fn write_itimer(c: &Ctx<'_>, va: u64, (value, interval): (u64, u64)) -> SysResult {
    let timer = Itimerval {
        interval: Pair::timeval(interval),
        value: Pair::timeval(value),
    };
    c.mem().write_obj(va, &timer)?;
    Ok(0)
}

/// Sends the signals of timers that are due. Returns when to ask again, in nanoseconds of
/// `CLOCK_MONOTONIC`. For the clock thread's tick.
pub fn timers_due(k: &Kernel) -> Option<u64> {
    let now = k.clock.monotonic();
    let mut state = k.state();
    let mut due: Vec<(Pid, i32)> = Vec::new();
    let mut expired = Vec::new();
    let mut next: Option<u64> = None;
    for p in state.procs.values_mut() {
        let armed = p.itimer_real.is_some()
            || p.itimer_cpu.iter().any(Option::is_some)
            || p.posix_timers.any_runs();
        if !armed || p.is_zombie() {
            continue;
        }
        let cpu = p.cpu_ns();
        let timers = [
            (Which::Real, now, libc::SIGALRM),
            (Which::Cpu(0), cpu, libc::SIGVTALRM),
            (Which::Cpu(1), cpu, libc::SIGPROF),
        ];
        for (which, clock, signo) in timers {
            let timer = slot(p, which);
            if expire(timer, clock) {
                due.push((p.pid, signo));
            }
            let look = match (*slot(p, which), which) {
                (None, _) => continue,
                (Some((at, _)), Which::Real) => at,
                // Running threads' time is known when they leave the guest: half-way, then again.
                (Some((at, _)), Which::Cpu(_)) => {
                    p.threads.keys().for_each(|&tid| k.sched.kick_running(tid));
                    now.saturating_add(((at - cpu) / 2).max(CPU_LOOK))
                }
            };
            next = Some(next.map_or(look, |n| n.min(look)));
        }
        if p.posix_timers.any_counts_cpu() {
            p.threads.keys().for_each(|&tid| k.sched.kick_running(tid));
        }
        let look = posix_timers::take_expired(p, now, CPU_LOOK, &mut expired);
        next = [next, look].into_iter().flatten().min();
    }
    for (pid, signo) in due {
        // The process was there a moment ago, under the same lock.
        let _ = send_to_process(k, &mut state, pid, SigInfo::kernel(signo));
    }
    for expired in &expired {
        posix_timers::tell(k, &mut state, expired);
    }
    next
}

/// Whether a timer has run out at `clock`; sets it anew, however many intervals were missed.
fn expire(timer: &mut Option<(u64, u64)>, clock: u64) -> bool {
    let Some((at, interval)) = *timer else {
        return false;
    };
    if at > clock {
        return false;
    }
    *timer = (interval != 0).then(|| {
        let missed = (clock - at) / interval + 1;
        (
            at.saturating_add(missed.saturating_mul(interval))
                .max(clock + 1),
            interval,
        )
    });
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_shot_timer_expires_once() {
        let mut timer = Some((10, 0));
        assert!(!expire(&mut timer, 9));
        assert!(expire(&mut timer, 10));
        assert!(!expire(&mut timer, 1000));
    }

    #[test]
    fn missed_intervals_give_one_signal_and_the_next_in_step() {
        let mut timer = Some((10, 7));
        assert!(expire(&mut timer, 30));
        assert_eq!(timer, Some((31, 7)));
        assert!(!expire(&mut timer, 30));
    }
}
