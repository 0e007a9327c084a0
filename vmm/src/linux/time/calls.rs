//! Reading clocks and sleeping.

use super::super::Errno;
use super::super::call::{Arg, Args, Ctx, Entry, Restart, Stop, SysResult, Wait};
use super::super::process::Pid;
use super::{Clock, SECOND, Timespec, Timeval};
use std::sync::atomic::Ordering;

/// The calls of this file.
pub const TABLE: &[Entry] = &[
    Entry {
        nr: 35,
        name: "nanosleep",
        args: &[Arg::Hex, Arg::Hex],
        handler: sys_nanosleep,
    },
    Entry {
        nr: 96,
        name: "gettimeofday",
        args: &[Arg::Hex, Arg::Hex],
        handler: sys_gettimeofday,
    },
    Entry {
        nr: 164,
        name: "settimeofday",
        args: &[Arg::Hex, Arg::Hex],
        handler: sys_set,
    },
    Entry {
        nr: 201,
        name: "time",
        args: &[Arg::Hex],
        handler: sys_time,
    },
    Entry {
        nr: 227,
        name: "clock_settime",
        args: &[Arg::Int, Arg::Hex],
        handler: sys_set,
    },
    Entry {
        nr: 228,
        name: "clock_gettime",
        args: &[Arg::Int, Arg::Hex],
        handler: sys_clock_gettime,
    },
    Entry {
        nr: 229,
        name: "clock_getres",
        args: &[Arg::Int, Arg::Hex],
        handler: sys_clock_getres,
    },
    Entry {
        nr: 230,
        name: "clock_nanosleep",
        args: &[Arg::Int, Arg::Hex, Arg::Hex, Arg::Hex],
        handler: sys_clock_nanosleep,
    },
];

const TIMER_ABSTIME: u64 = 1;
/// Resolution of the coarse clocks on Linux with 250 ticks a second. Ours are finer.
const COARSE: u64 = 4_000_000;

/// A clock's id, understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClockKind {
    /// Real time.
    Real,
    /// Real time that Linux reads only once a tick.
    RealCoarse,
    /// Monotonic time, raw too.
    Monotonic,
    /// Monotonic time that Linux reads only once a tick.
    MonotonicCoarse,
    /// Monotonic time that counts the host's sleep until the machine was started.
    Boot,
    /// CPU time of a process; 0 for the caller's.
    ProcessCpu(Pid),
    /// CPU time of a thread; 0 for the caller.
    ThreadCpu(Pid),
}

impl ClockKind {
    /// From a `clockid_t`: the fixed ones, and what clock_getcpuclockid(3) makes.
    ///
    /// # Errors
    /// `EINVAL`.
    pub fn new(id: i32) -> Result<Self, Errno> {
        Ok(match id {
            0 | 8 | 11 => Self::Real,
            1 | 4 => Self::Monotonic,
            2 => Self::ProcessCpu(0),
            3 => Self::ThreadCpu(0),
            5 => Self::RealCoarse,
            6 => Self::MonotonicCoarse,
            7 | 9 => Self::Boot,
            id if id < 0 && id & 3 < 3 && id & 4 == 0 => Self::ProcessCpu(!(id >> 3)),
            id if id < 0 && id & 3 < 3 => Self::ThreadCpu(!(id >> 3)),
            _ => return Err(Errno::INVAL),
        })
    }

    /// Its `clockid_t`.
    #[must_use]
    pub fn id(self) -> i32 {
        match self {
            Self::Real => 0,
            Self::Monotonic => 1,
            Self::ProcessCpu(0) => 2,
            Self::ThreadCpu(0) => 3,
            Self::RealCoarse => 5,
            Self::MonotonicCoarse => 6,
            Self::Boot => 7,
            Self::ProcessCpu(pid) => (!pid << 3) | 2,
            Self::ThreadCpu(tid) => (!tid << 3) | 6,
        }
    }

    /// Whether a timer can run on it.
    #[must_use]
    pub fn is_timers(self) -> bool {
        matches!(self, Self::Real | Self::Monotonic | Self::Boot)
    }

    /// Now, for clocks that do not belong to a process.
    #[must_use]
    pub fn read(self, clock: &Clock) -> Option<u64> {
        match self {
            Self::Real | Self::RealCoarse => Some(clock.realtime()),
            Self::Monotonic | Self::MonotonicCoarse => Some(clock.monotonic()),
            Self::Boot => Some(clock.boottime()),
            Self::ProcessCpu(_) | Self::ThreadCpu(_) => None,
        }
    }

    /// When, on `CLOCK_MONOTONIC`, this clock will show `at`; at once if it has passed.
    #[must_use]
    pub fn to_monotonic(self, clock: &Clock, at: u64) -> Option<u64> {
        let now = self.read(clock)?;
        Some(clock.monotonic().saturating_add(at.saturating_sub(now)))
    }
}

/// What a clock shows the calling thread.
fn read(c: &Ctx<'_>, kind: ClockKind) -> Result<u64, Errno> {
    match kind {
        ClockKind::ThreadCpu(0) => Ok(c.t.shared.cpu_time.load(Ordering::Relaxed)),
        ClockKind::ProcessCpu(0) => Ok(c.with_process(|p| p.cpu_ns())),
        ClockKind::ProcessCpu(pid) => {
            c.k.state()
                .procs
                .get(&pid)
                .map(|p| p.cpu_ns())
                .ok_or(Errno::INVAL)
        }
        ClockKind::ThreadCpu(tid) => c
            .with_process(|p| {
                p.threads
                    .get(&tid)
                    .map(|t| t.cpu_time.load(Ordering::Relaxed))
            })
            .ok_or(Errno::INVAL),
        ClockKind::Real
        | ClockKind::RealCoarse
        | ClockKind::Monotonic
        | ClockKind::MonotonicCoarse
        | ClockKind::Boot => kind.read(&c.k.clock).ok_or(Errno::INVAL),
    }
}

fn sys_clock_gettime(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let ns = read(c, ClockKind::new(a.i32(0))?)?;
    c.mem().write_obj(a.u64(1), &Timespec::from_ns(ns))?;
    Ok(0)
}

fn sys_clock_getres(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let kind = ClockKind::new(a.i32(0))?;
    read(c, kind)?;
    let ns = match kind {
        ClockKind::RealCoarse | ClockKind::MonotonicCoarse => COARSE,
        _ => 1,
    };
    if a.u64(1) != 0 {
        c.mem().write_obj(a.u64(1), &Timespec::from_ns(ns))?;
    }
    Ok(0)
}

fn sys_gettimeofday(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    if a.u64(0) != 0 {
        c.mem()
            .write_obj(a.u64(0), &Timeval::from_ns(c.k.clock.realtime()))?;
    }
    if a.u64(1) != 0 {
        // struct timezone: Greenwich, no daylight saving.
        c.mem().write_obj(a.u64(1), &[0_i32; 2])?;
    }
    Ok(0)
}

fn sys_time(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let now = c.k.clock.realtime() / SECOND;
    if a.u64(0) != 0 {
        c.mem().write_obj(a.u64(0), &now)?;
    }
    Ok(now)
}

fn sys_set(_: &mut Ctx<'_>, _: &Args) -> SysResult {
    Err(Errno::PERM.into())
}

fn sys_nanosleep(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let ns = c.mem().read_obj::<Timespec>(a.u64(0))?.to_ns()?;
    let until = c.k.clock.monotonic().saturating_add(ns);
    sleep(c, until, a.u64(1))
}

fn sys_clock_nanosleep(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let kind = ClockKind::new(a.i32(0))?;
    match kind {
        ClockKind::ThreadCpu(_) => return Err(Errno::INVAL.into()),
        ClockKind::ProcessCpu(_) | ClockKind::RealCoarse | ClockKind::MonotonicCoarse => {
            return Err(Errno::OPNOTSUPP.into());
        }
        ClockKind::Real | ClockKind::Monotonic | ClockKind::Boot => {}
    }
    let ns = c.mem().read_obj::<Timespec>(a.u64(2))?.to_ns()?;
    if a.u64(1) & TIMER_ABSTIME == 0 {
        let until = c.k.clock.monotonic().saturating_add(ns);
        return sleep(c, until, a.u64(3));
    }
    let until = kind.to_monotonic(&c.k.clock, ns).ok_or(Errno::INVAL)?;
    sleep(c, until, 0)
}

/// Sleeps until `until`, or what it was when the call was first made. Interrupted, it stores what
/// is left at `rest` unless that is 0.
fn sleep(c: &mut Ctx<'_>, until: u64, rest: u64) -> SysResult {
    let deadline = c.deadline(|| Some(until)).unwrap_or(until);
    let left = deadline.saturating_sub(c.k.clock.monotonic());
    if left == 0 {
        return Ok(0);
    }
    if c.interrupted {
        if rest != 0 {
            c.mem().write_obj(rest, &Timespec::from_ns(left))?;
        }
        return Err(Errno::INTR.into());
    }
    Err(Stop::Block(Wait {
        keys: Vec::new(),
        deadline: Some(deadline),
        restart: Restart::Never,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dynamic_ids_name_processes_and_threads() {
        let process = |pid: i32| (!pid << 3) | 2;
        assert_eq!(ClockKind::new(process(42)), Ok(ClockKind::ProcessCpu(42)));
        assert_eq!(
            ClockKind::new(process(42) | 4),
            Ok(ClockKind::ThreadCpu(42))
        );
        assert_eq!(ClockKind::new((!42 << 3) | 3), Err(Errno::INVAL));
        assert_eq!(ClockKind::new(99), Err(Errno::INVAL));
        assert_eq!(ClockKind::new(1), Ok(ClockKind::Monotonic));
    }

    #[test]
    fn passed_absolute_time_is_at_once() {
        let clock = Clock::new(super::super::TscInfo::unusable());
        let at = ClockKind::Real.to_monotonic(&clock, 5).unwrap();
        assert!(at <= clock.monotonic());
    }
}
