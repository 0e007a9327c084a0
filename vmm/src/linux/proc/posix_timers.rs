//! POSIX timers (timer_create(2)): of a process, gone with its program.
//!
//! An expiry whose signal is still queued is added to that signal's overrun count, so that each timer has at most one
//! signal queued.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;

use serde::{Deserialize, Serialize};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::limits;
use super::timeval::Pair;
use crate::linux::Errno;
use crate::linux::call::{Arg, Args, Ctx, Entry, SysResult};
use crate::linux::kernel::Kernel;
use crate::linux::process::{Pending, Pid, Process, SIGNALS, SigFields, SigInfo, State};
use crate::linux::signal::{send_to_process, send_to_thread};
use crate::linux::thread::Tid;
use crate::linux::time::calls::ClockKind;

use Arg::{Hex, Int};

/// The family's calls.
pub const TABLE: &[Entry] = &[
    Entry {
        nr: 222,
        name: "timer_create",
        args: &[Int, Hex, Hex],
        handler: sys_timer_create,
    },
    Entry {
        nr: 223,
        name: "timer_settime",
        args: &[Int, Hex, Hex, Hex],
        handler: sys_timer_settime,
    },
    Entry {
        nr: 224,
        name: "timer_gettime",
        args: &[Int, Hex],
        handler: sys_timer_gettime,
    },
    Entry {
        nr: 225,
        name: "timer_getoverrun",
        args: &[Int],
        handler: sys_timer_getoverrun,
    },
    Entry {
        nr: 226,
        name: "timer_delete",
        args: &[Int],
        handler: sys_timer_delete,
    },
];

/// `si_code` of a timer's signal.
const SI_TIMER: i32 = -2;
/// Largest overrun count that is told (`DELAYTIMER_MAX`).
const MOST_OVERRUNS: u64 = i32::MAX as u64;
/// Timers a process may have at most, whatever its limit says.
const MOST_TIMERS: u64 = 65_536;

const TIMER_ABSTIME: u32 = 1;
const SIGEV_SIGNAL: i32 = 0;
const SIGEV_NONE: i32 = 1;
const SIGEV_THREAD: i32 = 2;
const SIGEV_THREAD_ID: i32 = 4;

/// The clock a timer runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Runs {
    /// `CLOCK_MONOTONIC`, or one that is turned into it when the timer is set.
    Monotonic,
    /// CPU time of the process.
    Process,
    /// CPU time of one of its threads.
    Thread(Tid),
}

impl Runs {
    /// What the clock shows; `None` once it has stopped for good.
    fn now(self, p: &Process, monotonic: u64) -> Option<u64> {
        match self {
            Self::Monotonic => Some(monotonic),
            Self::Process => Some(p.cpu_ns()),
            Self::Thread(tid) => {
                let thread = p.threads.get(&tid)?;
                Some(thread.cpu_time.load(Ordering::Relaxed))
            }
        }
    }
}

/// Who hears of an expiry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Tells {
    Nobody,
    Process,
    Thread(Tid),
}

/// A timer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct PosixTimer {
    /// As it was asked for.
    clock: i32,
    runs: Runs,
    tells: Tells,
    signo: i32,
    /// `si_value`.
    value: u64,
    /// Next expiry on its clock, nanoseconds.
    next: Option<u64>,
    /// Time between expiries; 0 for one only.
    interval: u64,
    /// Expiries beyond the one its last signal that was taken stands for.
    overrun: i32,
}

impl PosixTimer {
    /// Takes the expiries up to `now`.
    fn expire(&mut self, now: u64) -> u64 {
        let Some(at) = self.next.filter(|&at| at <= now) else {
            return 0;
        };
        let Some(more) = (now - at).checked_div(self.interval) else {
            self.next = None;
            return 1;
        };
        let after = (more + 1).saturating_mul(self.interval);
        self.next = Some(at.saturating_add(after).max(now + 1));
        more + 1
    }

    /// Nanoseconds to the next expiry; 0 if there is none.
    fn left(&self, now: u64) -> u64 {
        self.next.map_or(0, |at| at.saturating_sub(now).max(1))
    }
}

/// The timers of a process.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PosixTimers {
    timers: BTreeMap<i32, PosixTimer>,
    /// The number of the next one, as on Linux one above the last: the signal of a timer that is no more may still be queued,
    /// and must not be taken for another timer's.
    next_id: i32,
}

impl PosixTimers {
    /// Whether one of them runs.
    pub(super) fn any_runs(&self) -> bool {
        self.timers.values().any(|timer| timer.next.is_some())
    }

    /// Whether one of them runs on CPU time.
    pub(super) fn any_counts_cpu(&self) -> bool {
        let mut running = self.timers.values().filter(|timer| timer.next.is_some());
        running.any(|timer| timer.runs != Runs::Monotonic)
    }

    /// A signal of one of them was taken.
    pub(in crate::linux) fn taken(&mut self, info: &SigInfo) {
        if let SigFields::Timer { id, overrun, .. } = info.fields
            && let Some(timer) = self.timers.get_mut(&id)
        {
            timer.overrun = overrun;
        }
    }

    /// Its program has ended.
    pub(super) fn clear(&mut self) {
        self.timers.clear();
    }

    /// Whether they are timers that can have been made.
    pub(super) fn are_sound(&self) -> bool {
        let sound =
            |timer: &PosixTimer| (1..=SIGNALS as i32).contains(&timer.signo) && timer.overrun >= 0;
        self.timers.keys().all(|&id| id >= 0)
            && self.next_id >= 0
            && self.timers.values().all(sound)
    }

    fn new_id(&mut self) -> Result<i32, Errno> {
        let ids = (self.next_id..=i32::MAX).chain(0..self.next_id);
        let id = { ids }.find(|id| !self.timers.contains_key(id));
        let id = id.ok_or(Errno::AGAIN)?;
        self.next_id = id.checked_add(1).unwrap_or(0);
        Ok(id)
    }

    fn get(&mut self, id: i32) -> Result<&mut PosixTimer, Errno> {
        self.timers.get_mut(&id).ok_or(Errno::INVAL)
    }
}

/// Expiries that were taken and not yet told.
pub(super) struct Expired {
    pid: Pid,
    id: i32,
    count: u64,
}

/// Takes the expiries of a process's timers at `monotonic`. Returns when to look again, at the latest, with `cpu_look`
/// between looks at clocks that count CPU time.
pub(super) fn take_expired(
    p: &mut Process,
    monotonic: u64,
    cpu_look: u64,
    expired: &mut Vec<Expired>,
) -> Option<u64> {
    let mut timers = std::mem::take(&mut p.posix_timers);
    let mut look: Option<u64> = None;
    for (&id, timer) in &mut timers.timers {
        let Some(now) = timer.runs.now(p, monotonic) else {
            timer.next = None;
            continue;
        };
        let count = timer.expire(now);
        if count > 0 {
            let pid = p.pid;
            expired.push(Expired { pid, id, count });
        }
        let Some(at) = timer.next else { continue };
        let again = match timer.runs {
            Runs::Monotonic => at,
            Runs::Process | Runs::Thread(_) => {
                monotonic.saturating_add(((at - now) / 2).max(cpu_look))
            }
        };
        look = Some(look.map_or(again, |least| least.min(again)));
    }
    p.posix_timers = timers;
    look
}

/// Sends the signal of a timer that has expired.
pub(super) fn tell(k: &Kernel, state: &mut State, expired: &Expired) {
    let Some(p) = state.procs.get_mut(&expired.pid) else {
        return;
    };
    let Some(timer) = p.posix_timers.timers.get(&expired.id) else {
        return;
    };
    let (tells, signo, value) = (timer.tells, timer.signo, timer.value);
    let pending = match tells {
        Tells::Nobody => return,
        Tells::Process => Some(&mut p.pending),
        Tells::Thread(tid) => p.thread_pending.get_mut(&tid),
    };
    if pending.is_some_and(|pending| overruns(pending, expired)) {
        return;
    }
    let info = SigInfo {
        signo,
        code: SI_TIMER,
        errno: 0,
        fields: SigFields::Timer {
            id: expired.id,
            overrun: (expired.count - 1).min(MOST_OVERRUNS) as i32,
            value,
        },
    };
    // A thread may be gone; nobody hears of it then.
    let _ = match tells {
        Tells::Thread(tid) => send_to_thread(k, state, tid, info),
        Tells::Process | Tells::Nobody => send_to_process(k, state, expired.pid, info),
    };
}

/// Adds expiries to the timer's signal if it is still queued.
fn overruns(pending: &mut Pending, expired: &Expired) -> bool {
    let mut queued = pending.queue.iter_mut();
    let found = queued.find_map(|info| match &mut info.fields {
        SigFields::Timer { id, overrun, .. } if *id == expired.id => Some(overrun),
        _ => None,
    });
    let Some(overrun) = found else { return false };
    let sum = (*overrun as u64).saturating_add(expired.count);
    *overrun = sum.min(MOST_OVERRUNS) as i32;
    true
}

/// The start of a `struct sigevent`.
#[repr(C)]
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable)]
struct Sigevent {
    value: u64,
    signo: i32,
    notify: i32,
    tid: i32,
    rest: [i32; 11],
}

/// `struct itimerspec`.
#[repr(C)]
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
struct Itimerspec {
    interval: Pair,
    value: Pair,
}

fn sys_timer_create(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let clock = a.i32(0);
    let runs = match clock {
        // Alarm clocks would need a privilege.
        8 | 9 => return Err(Errno::PERM.into()),
        id => match ClockKind::new(id)? {
            ClockKind::Real | ClockKind::Monotonic | ClockKind::Boot => Runs::Monotonic,
            ClockKind::ProcessCpu(pid) if pid == 0 || pid == c.t.pid => Runs::Process,
            ClockKind::ThreadCpu(0) => Runs::Thread(c.t.tid),
            ClockKind::ThreadCpu(tid) => Runs::Thread(tid),
            ClockKind::ProcessCpu(_) | ClockKind::RealCoarse | ClockKind::MonotonicCoarse => {
                return Err(Errno::INVAL.into());
            }
        },
    };
    let event: Option<Sigevent> = match a.u64(1) {
        0 => None,
        va => Some(c.mem().read_obj(va)?),
    };
    let id = c.with_process(|p| {
        let made = p.posix_timers.timers.len() as u64;
        if made >= p.rlimits[limits::SIGPENDING].0.min(MOST_TIMERS) {
            return Err(Errno::AGAIN);
        }
        if let Runs::Thread(tid) = runs
            && !p.threads.contains_key(&tid)
        {
            return Err(Errno::INVAL);
        }
        let id = p.posix_timers.new_id()?;
        let (tells, signo, value) = told(p, id, event)?;
        let timer = PosixTimer {
            clock,
            runs,
            tells,
            signo,
            value,
            next: None,
            interval: 0,
            overrun: 0,
        };
        p.posix_timers.timers.insert(id, timer);
        Ok(id)
    })?;
    if let Err(errno) = c.mem().write_obj(a.u64(2), &id) {
        c.with_process(|p| p.posix_timers.timers.remove(&id));
        return Err(errno.into());
    }
    Ok(0)
}

/// Who hears of it, by which signal and with which value.
fn told(p: &Process, id: i32, event: Option<Sigevent>) -> Result<(Tells, i32, u64), Errno> {
    let Some(event) = event else {
        return Ok((Tells::Process, libc::SIGALRM, id as u64));
    };
    let tells = match event.notify {
        SIGEV_NONE => return Ok((Tells::Nobody, libc::SIGALRM, event.value)),
        // What SIGEV_THREAD means is the C library's business.
        SIGEV_SIGNAL | SIGEV_THREAD => Tells::Process,
        SIGEV_THREAD_ID if p.threads.contains_key(&event.tid) => Tells::Thread(event.tid),
        _ => return Err(Errno::INVAL),
    };
    if (1..=SIGNALS as i32).contains(&event.signo) {
        Ok((tells, event.signo, event.value))
    } else {
        Err(Errno::INVAL)
    }
}

fn sys_timer_settime(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let (id, flags) = (a.i32(0), a.u32(1));
    let new: Itimerspec = c.mem().read_obj(a.u64(2))?;
    let (value, interval) = (new.value.timespec_ns()?, new.interval.timespec_ns()?);
    let clock = &c.k.clock;
    let monotonic = clock.monotonic();
    let old = c.with_process(|p| {
        let timer = p.posix_timers.get(id)?.clone();
        let now = timer.runs.now(p, monotonic).ok_or(Errno::INVAL)?;
        let next = match (value, timer.runs) {
            (0, _) => None,
            (at, Runs::Monotonic) if flags & TIMER_ABSTIME != 0 => {
                ClockKind::new(timer.clock)?.to_monotonic(clock, at)
            }
            (at, Runs::Process | Runs::Thread(_)) if flags & TIMER_ABSTIME != 0 => Some(at),
            (ns, _) => Some(now.saturating_add(ns)),
        };
        let old = (timer.left(now), timer.interval);
        let set = p.posix_timers.get(id)?;
        (set.next, set.interval) = (next, interval);
        Ok::<_, Errno>(old)
    })?;
    c.k.sched.clock_changed();
    match a.u64(3) {
        0 => Ok(0),
        va => write_spec(c, va, old),
    }
}

fn sys_timer_gettime(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let monotonic = c.k.clock.monotonic();
    let left = c.with_process(|p| {
        let timer = p.posix_timers.get(a.i32(0))?.clone();
        let now = timer.runs.now(p, monotonic).unwrap_or(u64::MAX);
        Ok::<_, Errno>((timer.left(now), timer.interval))
    })?;
    write_spec(c, a.u64(1), left)
}

fn write_spec(c: &Ctx<'_>, va: u64, (value, interval): (u64, u64)) -> SysResult {
    let spec = Itimerspec {
        interval: Pair::timespec(interval),
        value: Pair::timespec(value),
    };
    c.mem().write_obj(va, &spec)?;
    Ok(0)
}

fn sys_timer_getoverrun(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let overrun = c.with_process(|p| p.posix_timers.get(a.i32(0)).map(|timer| timer.overrun))?;
    Ok(overrun as u64)
}

fn sys_timer_delete(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let deleted = c.with_process(|p| p.posix_timers.timers.remove(&a.i32(0)));
    deleted.map(|_| 0).ok_or(Errno::INVAL.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn timer(next: Option<u64>, interval: u64) -> PosixTimer {
        PosixTimer {
            clock: 1,
            runs: Runs::Monotonic,
            tells: Tells::Process,
            signo: 40,
            value: 0,
            next,
            interval,
            overrun: 0,
        }
    }

    #[test]
    fn missed_expiries_are_counted_and_the_next_is_in_step() {
        let mut t = timer(Some(100), 10);
        assert_eq!((t.expire(99), t.left(99)), (0, 1));
        assert_eq!(t.expire(135), 4);
        assert_eq!((t.next, t.left(135)), (Some(140), 5));
        let mut once = timer(Some(100), 0);
        assert_eq!(
            (once.expire(500), once.expire(600), once.left(600)),
            (1, 0, 0)
        );
    }

    #[test]
    fn number_of_a_timer_that_is_no_more_is_not_given_again_at_once() {
        let mut timers = PosixTimers::default();
        assert_eq!([(); 2].map(|()| timers.new_id().unwrap()), [0, 1]);
        timers.next_id = i32::MAX;
        timers.timers.insert(0, timer(None, 0));
        assert_eq!([(); 2].map(|()| timers.new_id().unwrap()), [i32::MAX, 1]);
    }

    #[test]
    fn expiry_that_finds_its_signal_queued_only_counts() {
        let mut pending = Pending::default();
        let fields = |overrun| SigFields::Timer {
            id: 3,
            overrun,
            value: 9,
        };
        let info = SigInfo {
            fields: fields(0),
            ..SigInfo::kernel(libc::SIGALRM)
        };
        pending.push(SigInfo::kernel(libc::SIGALRM));
        pending.push(info);
        let (pid, count) = (2, 5);
        assert!(overruns(&mut pending, &Expired { pid, id: 3, count }));
        assert!(!overruns(&mut pending, &Expired { pid, id: 4, count }));
        let kinds: Vec<_> = pending.queue.iter().map(|info| info.fields).collect();
        assert_eq!(kinds, [SigFields::None, fields(5)]);
    }
}
