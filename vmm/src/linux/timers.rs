//! Timers behind a descriptor (timerfd_create(2)).

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::Errno;
use super::call::{Arg, Args, Ctx, Entry, SysResult, Wait, WaitKey};
use super::fd::eventfd::anonymous_stat;
use super::fd::table::O_CLOEXEC;
use super::file::{Description, File, O_NONBLOCK, Ready, Stat, Viewer};
use super::kernel::Kernel;
use super::saved::error::Damaged;
use super::saved::{Refused, SavedFile, Saver};
use super::sched::Sched;
use super::time::Timespec;
use super::time::calls::ClockKind;
use crate::locks::{Mutex, rank};

/// The calls of this file.
pub const TABLE: &[Entry] = &[
    Entry {
        nr: 283,
        name: "timerfd_create",
        args: &[Arg::Int, Arg::Hex],
        handler: sys_timerfd_create,
    },
    Entry {
        nr: 286,
        name: "timerfd_settime",
        args: &[Arg::Fd, Arg::Hex, Arg::Hex, Arg::Hex],
        handler: sys_timerfd_settime,
    },
    Entry {
        nr: 287,
        name: "timerfd_gettime",
        args: &[Arg::Fd, Arg::Hex],
        handler: sys_timerfd_gettime,
    },
];

const TFD_TIMER_ABSTIME: u32 = 1;
const TFD_TIMER_CANCEL_ON_SET: u32 = 2;

/// When a timer expires, in nanoseconds of `CLOCK_MONOTONIC`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Schedule {
    /// First expiry not yet read; `None` if it is disarmed.
    next: Option<u64>,
    /// Time between expiries; 0 for one only.
    interval: u64,
}

impl Schedule {
    /// Expiries up to `now` that were not read.
    fn expired(self, now: u64) -> u64 {
        match self.next {
            Some(next) if now >= next => {
                (now - next).checked_div(self.interval).map_or(1, |n| n + 1)
            }
            Some(_) | None => 0,
        }
    }

    /// Takes the expiries up to `now`.
    fn take(&mut self, now: u64) -> u64 {
        let expired = self.expired(now);
        if expired > 0 {
            let after = expired.saturating_mul(self.interval);
            self.next = self
                .next
                .filter(|_| self.interval > 0)
                .map(|next| next.saturating_add(after));
        }
        expired
    }

    /// Nanoseconds to the next expiry; 0 if there is none.
    fn left(mut self, now: u64) -> u64 {
        self.take(now);
        self.next.map_or(0, |next| next.saturating_sub(now))
    }
}

/// A timer.
#[derive(Debug)]
pub struct TimerFd {
    clock: ClockKind,
    schedule: Mutex<rank::TimerSchedule, Schedule>,
    sched: Arc<Sched>,
    key: WaitKey,
    edges: AtomicU64,
}

/// A timer as data. `CLOCK_MONOTONIC` goes on where it was, so what is left stays left.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SavedTimer {
    clock: i32,
    schedule: Schedule,
    edges: u64,
}

impl SavedTimer {
    pub(in crate::linux) fn load(self, sched: &Arc<Sched>) -> Result<Arc<TimerFd>, Damaged> {
        let clock = ClockKind::new(self.clock).ok().filter(|c| c.is_timers());
        Ok(Arc::new(TimerFd {
            clock: clock.ok_or(Damaged("a timer's clock"))?,
            schedule: Mutex::new(self.schedule),
            sched: Arc::clone(sched),
            key: sched.new_key(),
            edges: AtomicU64::new(self.edges),
        }))
    }
}

impl File for TimerFd {
    fn read(&self, k: &Kernel, _: u64, buf: &mut [u8]) -> Result<usize, Errno> {
        let into = buf.get_mut(..8).ok_or(Errno::INVAL)?;
        let expired = self.schedule.lock().take(k.clock.monotonic());
        if expired == 0 {
            return Err(Errno::AGAIN);
        }
        self.edges.fetch_add(1, Ordering::Relaxed);
        into.copy_from_slice(&expired.to_ne_bytes());
        Ok(8)
    }

    fn stat(&self, _: &Kernel) -> Result<Stat, Errno> {
        Ok(anonymous_stat())
    }

    fn ready(&self, by: Viewer<'_>) -> Ready {
        if self.schedule.lock().expired(by.k.clock.monotonic()) > 0 {
            Ready::IN | Ready::RDNORM
        } else {
            Ready::empty()
        }
    }

    fn wait_key(&self) -> Option<WaitKey> {
        Some(self.key)
    }

    fn watch(&self, _: Viewer<'_>, interest: Ready, wait: &mut Wait) {
        wait.keys.push(self.key);
        if interest.intersects(Ready::IN | Ready::RDNORM)
            && let Some(next) = self.schedule.lock().next
        {
            wait.deadline = Some(wait.deadline.map_or(next, |at| at.min(next)));
        }
    }

    fn edges(&self) -> u64 {
        self.edges.load(Ordering::Relaxed)
    }

    fn name(&self, _: &Kernel) -> Vec<u8> {
        b"anon_inode:[timerfd]".to_vec()
    }

    fn saved(&self, _: &mut Saver<'_>) -> Result<SavedFile, Refused> {
        Ok(SavedFile::Timer(SavedTimer {
            clock: self.clock.id(),
            schedule: *self.schedule.lock(),
            edges: self.edges.load(Ordering::Relaxed),
        }))
    }

    fn as_any(&self) -> &dyn std::any::Any {
        self
    }
}

/// `struct itimerspec`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct Itimerspec {
    interval: Timespec,
    value: Timespec,
}

impl Itimerspec {
    fn of(schedule: Schedule, now: u64) -> Self {
        Self {
            interval: Timespec::from_ns(schedule.interval),
            value: Timespec::from_ns(schedule.left(now)),
        }
    }
}

fn sys_timerfd_create(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let flags = a.u32(1);
    if flags & !(O_NONBLOCK | O_CLOEXEC) != 0 {
        return Err(Errno::INVAL.into());
    }
    let clock = match a.i32(0) {
        // Alarm clocks (8, 9) would need a privilege.
        8 | 9 => return Err(Errno::PERM.into()),
        id @ (0 | 1 | 7) => ClockKind::new(id)?,
        _ => return Err(Errno::INVAL.into()),
    };
    let file = TimerFd {
        clock,
        schedule: Mutex::default(),
        sched: Arc::clone(&c.k.sched),
        key: c.k.sched.new_key(),
        edges: AtomicU64::new(0),
    };
    let description = Description::new(Arc::new(file), 2 | flags & O_NONBLOCK);
    Ok(c.add_fd(description, flags & O_CLOEXEC != 0)? as u64)
}

fn sys_timerfd_settime(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let (flags, new_at, old_at) = (a.u32(1), a.u64(2), a.u64(3));
    if flags & !(TFD_TIMER_ABSTIME | TFD_TIMER_CANCEL_ON_SET) != 0 {
        return Err(Errno::INVAL.into());
    }
    let new: Itimerspec = c.mem().read_obj(new_at)?;
    let (value, interval) = (new.value.to_ns()?, new.interval.to_ns()?);
    let d = c.file(a.i32(0))?;
    let timer = d
        .file
        .as_any()
        .downcast_ref::<TimerFd>()
        .ok_or(Errno::INVAL)?;
    let now = c.k.clock.monotonic();
    let next = match value {
        0 => None,
        at if flags & TFD_TIMER_ABSTIME != 0 => timer.clock.to_monotonic(&c.k.clock, at),
        ns => Some(now.saturating_add(ns)),
    };
    let old = std::mem::replace(&mut *timer.schedule.lock(), Schedule { next, interval });
    timer.edges.fetch_add(1, Ordering::Relaxed);
    timer.sched.wake(timer.key);
    if old_at != 0 {
        c.mem().write_obj(old_at, &Itimerspec::of(old, now))?;
    }
    Ok(0)
}

fn sys_timerfd_gettime(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let d = c.file(a.i32(0))?;
    let timer = d
        .file
        .as_any()
        .downcast_ref::<TimerFd>()
        .ok_or(Errno::INVAL)?;
    let schedule = *timer.schedule.lock();
    c.mem()
        .write_obj(a.u64(1), &Itimerspec::of(schedule, c.k.clock.monotonic()))?;
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_shot_expires_once() {
        let mut s = Schedule {
            next: Some(100),
            interval: 0,
        };
        assert_eq!((s.expired(99), s.left(40)), (0, 60));
        assert_eq!(s.take(500), 1);
        assert_eq!((s.take(600), s.left(600), s.next), (0, 0, None));
    }

    #[test]
    fn interval_counts_what_was_missed() {
        let mut s = Schedule {
            next: Some(100),
            interval: 10,
        };
        assert_eq!(s.take(135), 4);
        assert_eq!(s.next, Some(140));
        assert_eq!((s.left(145), s.take(139)), (5, 0));
    }
}
