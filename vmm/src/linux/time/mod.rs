//! The machine's clock: one arithmetic for the vDSO and for the calls.
//!
//! `CLOCK_MONOTONIC` follows the host's. Where the time stamp counter is steady it is a line
//! through the counter ([`ClockParams`]), bent a little about once a second so that it stays on the
//! host's clock and never goes back; elsewhere every reading asks the host.
//!
//! Known holes: the raw and coarse clocks read as the ordinary ones, `CLOCK_TAI` as
//! `CLOCK_REALTIME`; a step of the host's real time reaches the guest within a second.

pub mod calls;
pub mod saved;
mod track;
mod tsc;

use parking_lot::RwLock;
use vm_memory::VolatileSlice;
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::Errno;
use super::vdso::data::{self, ClockParams, CpuSource};
use track::{Sample, Tracker};
pub use tsc::TscInfo;

/// Nanoseconds in a second.
pub const SECOND: u64 = 1_000_000_000;

/// The clock the guest reads: `CLOCK_MONOTONIC` and `CLOCK_REALTIME` from the time stamp counter,
/// by the same arithmetic in the vDSO and here.
#[derive(Debug)]
pub struct Clock {
    state: RwLock<State>,
    /// The guest's time stamp counter minus the host's.
    tsc_offset: u64,
}

#[derive(Debug)]
struct State {
    source: Source,
    /// The guest's `CLOCK_MONOTONIC` minus the host's.
    shift: i64,
    /// `CLOCK_BOOTTIME - CLOCK_MONOTONIC` when the guest was started.
    boot_offset: u64,
}

impl State {
    /// `CLOCK_MONOTONIC`, when the guest's counter is `tsc`.
    fn monotonic(&self, tsc: u64) -> u64 {
        match &self.source {
            Source::Counter(tracker) => tracker.params.monotonic(tsc),
            Source::Host { floor } => {
                let host = tsc::host_monotonic();
                host.wrapping_add_signed(self.shift).max(*floor)
            }
        }
    }
}

#[derive(Debug)]
enum Source {
    /// The time stamp counter.
    Counter(Tracker),
    /// The host's clock, never below what was read before.
    Host {
        /// Lowest value of `CLOCK_MONOTONIC` that may be given.
        floor: u64,
    },
}

impl Default for Clock {
    /// A clock that asks the host.
    fn default() -> Self {
        Self::new(TscInfo::unusable())
    }
}

impl Clock {
    /// Starts the clock. Takes a few milliseconds if the counter's frequency is not given.
    #[must_use]
    pub fn new(tsc: TscInfo) -> Self {
        let source = if tsc.usable {
            tsc::start(&tsc).map_or(Source::Host { floor: 0 }, Source::Counter)
        } else {
            Source::Host { floor: 0 }
        };
        let boot_offset = tsc::host_boottime().saturating_sub(tsc::host_monotonic());
        Self {
            state: RwLock::new(State {
                source,
                shift: 0,
                boot_offset,
            }),
            tsc_offset: tsc.guest_offset,
        }
    }

    /// `CLOCK_MONOTONIC`, nanoseconds.
    #[must_use]
    pub fn monotonic(&self) -> u64 {
        // The counter is read under the lock: the line is bent at a later value.
        let state = self.state.read();
        state.monotonic(self.guest_tsc())
    }

    /// `CLOCK_REALTIME`, nanoseconds since the epoch.
    #[must_use]
    pub fn realtime(&self) -> u64 {
        match &self.state.read().source {
            Source::Counter(tracker) => tracker.params.realtime(self.guest_tsc()),
            Source::Host { .. } => tsc::host_realtime(),
        }
    }

    /// `CLOCK_BOOTTIME`, nanoseconds.
    #[must_use]
    pub fn boottime(&self) -> u64 {
        let boot_offset = self.state.read().boot_offset;
        self.monotonic().saturating_add(boot_offset)
    }

    /// How the vDSO computes the time now; `None` if it must make the call.
    #[must_use]
    pub fn params(&self) -> Option<ClockParams> {
        match &self.state.read().source {
            Source::Counter(tracker) => Some(tracker.params),
            Source::Host { .. } => None,
        }
    }

    /// Writes the vDSO's page as it must be now: before the first program runs.
    pub fn publish(&self, page: &VolatileSlice<'_>, cpu: CpuSource) {
        let params = self.params();
        data::publish(page, params.as_ref(), cpu);
    }

    /// Runs on the clock thread: keeps the clock on the host's, writes the vDSO's page if anything
    /// changed, and says when (`CLOCK_MONOTONIC`) it wants to run again; `None` for never.
    pub fn tick(&self, page: Option<&VolatileSlice<'_>>, cpu: CpuSource) -> Option<u64> {
        match &self.state.read().source {
            Source::Counter(tracker) if self.monotonic_of(tracker) < tracker.due => {
                return Some(tracker.due);
            }
            Source::Counter(_) => {}
            Source::Host { .. } => return None,
        }
        let now = tsc::sample(self.tsc_offset);
        let real = tsc::real_offset();
        self.retune(now, real, page, cpu)
    }

    fn retune(
        &self,
        now: Sample,
        real_offset: i64,
        page: Option<&VolatileSlice<'_>>,
        cpu: CpuSource,
    ) -> Option<u64> {
        let mut state = self.state.write();
        let shift = state.shift;
        let Source::Counter(tracker) = &mut state.source else {
            return None;
        };
        let now = Sample {
            ns: now.ns.wrapping_add_signed(shift),
            ..now
        };
        let steady = tracker.observe(now, real_offset.wrapping_sub(shift));
        // The line is bent at the counter's value now, while no reader can use the old line.
        let mut bend = || {
            tracker.bend(self.guest_tsc());
            steady.then_some(tracker.params)
        };
        match page {
            Some(page) => data::publish_with(page, cpu, bend),
            None => _ = bend(),
        }
        if steady {
            return Some(tracker.due);
        }
        tracing::warn!("the time stamp counter is not steady: the guest's clock asks the host");
        let floor = tracker.params.monotonic(self.guest_tsc());
        state.source = Source::Host { floor };
        None
    }

    fn monotonic_of(&self, tracker: &Tracker) -> u64 {
        tracker.params.monotonic(self.guest_tsc())
    }

    fn guest_tsc(&self) -> u64 {
        tsc::now().wrapping_add(self.tsc_offset)
    }
}

/// `struct timespec`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub struct Timespec {
    /// Seconds.
    pub sec: i64,
    /// Nanoseconds, below 1,000,000,000.
    pub nsec: i64,
}

impl Timespec {
    /// From nanoseconds.
    #[must_use]
    pub fn from_ns(ns: u64) -> Self {
        Self {
            sec: (ns / SECOND) as i64,
            nsec: (ns % SECOND) as i64,
        }
    }

    /// In nanoseconds; what is more than 500 years is cut.
    ///
    /// # Errors
    /// `EINVAL`: negative, or the nanoseconds are out of range.
    pub fn to_ns(self) -> Result<u64, Errno> {
        let sec = u64::try_from(self.sec).map_err(|_| Errno::INVAL)?;
        let nsec = u64::try_from(self.nsec).map_err(|_| Errno::INVAL)?;
        if nsec >= SECOND {
            return Err(Errno::INVAL);
        }
        Ok(sec.saturating_mul(SECOND).saturating_add(nsec))
    }
}

/// `struct timeval`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub struct Timeval {
    /// Seconds.
    pub sec: i64,
    /// Microseconds.
    pub usec: i64,
}

impl Timeval {
    /// From nanoseconds.
    #[must_use]
    pub fn from_ns(ns: u64) -> Self {
        Self {
            sec: (ns / SECOND) as i64,
            usec: (ns % SECOND / 1000) as i64,
        }
    }

    /// In nanoseconds; a second's worth of microseconds or more is carried, as `select` does.
    ///
    /// # Errors
    /// `EINVAL`: negative.
    pub fn to_ns(self) -> Result<u64, Errno> {
        let sec = u64::try_from(self.sec).map_err(|_| Errno::INVAL)?;
        let usec = u64::try_from(self.usec).map_err(|_| Errno::INVAL)?;
        Ok(sec
            .saturating_mul(SECOND)
            .saturating_add(usec.saturating_mul(1000)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bad_times_give_einval() {
        assert_eq!(Timespec { sec: -1, nsec: 0 }.to_ns(), Err(Errno::INVAL));
        assert_eq!(
            Timespec {
                sec: 0,
                nsec: 1_000_000_000
            }
            .to_ns(),
            Err(Errno::INVAL)
        );
        assert_eq!(Timeval { sec: 0, usec: -1 }.to_ns(), Err(Errno::INVAL));
        assert_eq!(
            Timeval {
                sec: 1,
                usec: 1_500_000
            }
            .to_ns(),
            Ok(2_500_000_000)
        );
        assert_eq!(
            Timespec {
                sec: i64::MAX,
                nsec: 0
            }
            .to_ns(),
            Ok(u64::MAX)
        );
    }

    #[test]
    fn times_survive_the_round_trip() {
        let ns = 12_345_678_901_u64;
        assert_eq!(Timespec::from_ns(ns).to_ns(), Ok(ns));
        assert_eq!(Timeval::from_ns(ns).to_ns(), Ok(ns / 1000 * 1000));
    }

    #[test]
    fn clock_follows_the_host_and_never_goes_back() {
        for info in [TscInfo::unusable(), TscInfo::probe(1 << 40, None)] {
            let clock = Clock::new(info);
            let mut last = clock.monotonic();
            for _ in 0..20 {
                std::thread::sleep(std::time::Duration::from_millis(1));
                let _ = clock.retune(
                    tsc::sample(clock.tsc_offset),
                    tsc::real_offset(),
                    None,
                    CpuSource::Zero,
                );
                let now = clock.monotonic();
                assert!(now >= last);
                last = now;
            }
            assert!(last.abs_diff(tsc::host_monotonic()) < 50_000_000);
            assert!(clock.realtime().abs_diff(tsc::host_realtime()) < 50_000_000);
        }
    }
}
