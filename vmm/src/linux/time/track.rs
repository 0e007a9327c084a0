//! Keeping a line through the time stamp counter on the host's clock. Arithmetic only.

use super::super::vdso::data::ClockParams;
use super::SECOND;

/// The host's clock and the guest's counter at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Sample {
    /// The host's `CLOCK_MONOTONIC`.
    pub(super) ns: u64,
    /// The guest's counter.
    pub(super) tsc: u64,
}

/// Time between observations.
const INTERVAL: u64 = SECOND;
/// The first observation after the start, when the frequency is least certain.
const FIRST: u64 = SECOND / 10;
/// Behind the host by more than this, the clock jumps forward: the host was suspended.
const JUMP: i64 = 50_000_000;
/// Most the line is bent, in parts per million. Ahead of the host it only slows down.
const BEND: i64 = 50_000;
/// A smaller change of the real time's distance is noise of the measurement.
const REAL_NOISE: u64 = 2_000;

/// The line, and what the next observation is compared with.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tracker {
    /// The line as readers use it.
    pub(super) params: ClockParams,
    /// When to observe again (`CLOCK_MONOTONIC`).
    pub(super) due: u64,
    last: Sample,
    /// Slope measured last, without the bend: `ns << shift` for a tick.
    rate: u64,
    next: Option<Bend>,
}

#[derive(Clone, Copy, Debug)]
struct Bend {
    mult: u64,
    jump_to: Option<Sample>,
    real_offset: i64,
}

impl Tracker {
    /// A line that starts at `at` with the slope of `hertz` ticks a second.
    pub(super) fn new(hertz: u64, at: Sample, real_offset: i64) -> Option<Self> {
        let params = ClockParams::new(hertz, at.tsc, at.ns, real_offset)?;
        Some(Self {
            params,
            due: at.ns + FIRST,
            last: at,
            rate: params.mult,
            next: None,
        })
    }

    /// Moves the line, and what it is compared with, by `ns` nanoseconds; the real time stays.
    pub(super) fn shift(&mut self, ns: i64) {
        let by = |time: &mut u64| *time = time.wrapping_add_signed(ns);
        by(&mut self.params.mono_base_ns);
        by(&mut self.last.ns);
        by(&mut self.due);
        self.params.real_offset_ns = self.params.real_offset_ns.wrapping_sub(ns);
        // What was observed on the old line.
        self.next = None;
    }

    /// Takes note of where the host's clock is; false if the counter is not steady.
    pub(super) fn observe(&mut self, now: Sample, real_offset: i64) -> bool {
        let Some(ticks) = now.tsc.checked_sub(self.last.tsc).filter(|&t| t > 0) else {
            return false;
        };
        let elapsed = now.ns.saturating_sub(self.last.ns);
        let measured = (u128::from(elapsed) << self.params.shift) / u128::from(ticks);
        let Ok(measured) = u64::try_from(measured) else {
            return false;
        };
        // A short time says little about the slope.
        let steady = elapsed < FIRST / 2 || measured.abs_diff(self.rate) <= self.rate / 10;
        if elapsed >= FIRST / 2 {
            self.rate = measured;
            self.last = now;
        }
        let behind = now
            .ns
            .wrapping_sub(self.params.monotonic(now.tsc))
            .cast_signed();
        let ppm = (behind / (INTERVAL as i64 / 1_000_000)).clamp(-BEND, BEND);
        let bend = i128::from(self.rate) * i128::from(ppm) / 1_000_000;
        let mult = u64::try_from(i128::from(self.rate) + bend).unwrap_or(self.rate);
        let off = real_offset.abs_diff(self.params.real_offset_ns);
        let real_offset = if off > REAL_NOISE {
            real_offset
        } else {
            self.params.real_offset_ns
        };
        self.next = Some(Bend {
            mult,
            jump_to: (behind > JUMP).then_some(now),
            real_offset,
        });
        self.due = now.ns.saturating_add(INTERVAL);
        steady
    }

    /// Bends the line at counter `tsc`, as observed.
    pub(super) fn bend(&mut self, tsc: u64) {
        let Some(bend) = self.next.take() else { return };
        let tsc = tsc.max(self.params.tsc_base);
        let mut mono_base_ns = self.params.monotonic(tsc);
        if let Some(to) = bend.jump_to {
            let since = ClockParams {
                mult: bend.mult,
                tsc_base: to.tsc,
                mono_base_ns: to.ns,
                ..self.params
            };
            mono_base_ns = mono_base_ns.max(since.monotonic(tsc));
        }
        self.params = ClockParams {
            mult: bend.mult,
            tsc_base: tsc,
            mono_base_ns,
            real_offset_ns: bend.real_offset,
            ..self.params
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HERTZ: u64 = 2_500_000_000;

    fn host(tsc: u64, ppm: i64) -> Sample {
        let ns = i128::from(tsc) * 1_000_000_000 / i128::from(HERTZ);
        let ns = ns + ns * i128::from(ppm) / 1_000_000;
        Sample { ns: ns as u64, tsc }
    }

    #[test]
    fn clock_converges_on_a_host_with_another_frequency() {
        for ppm in [-400, 0, 300] {
            let mut t = Tracker::new(HERTZ, host(0, ppm), 0).unwrap();
            let mut last = 0;
            for step in 1..30 {
                let tsc = step * HERTZ;
                assert!(t.observe(host(tsc, ppm), 0));
                t.bend(tsc + 1000);
                let now = t.params.monotonic(tsc + 1000);
                assert!(now > last);
                last = now;
            }
            let at = 30 * HERTZ;
            assert!(
                t.params.monotonic(at).abs_diff(host(at, ppm).ns) < 1000,
                "{ppm}"
            );
        }
    }

    #[test]
    fn bend_is_continuous() {
        let mut t = Tracker::new(HERTZ, host(0, 0), 0).unwrap();
        assert!(t.observe(host(HERTZ, 200), 0));
        let before = t.params.monotonic(HERTZ + 77);
        t.bend(HERTZ + 77);
        assert_eq!(t.params.monotonic(HERTZ + 77), before);
        assert!(t.params.monotonic(HERTZ + 78) >= before);
    }

    #[test]
    fn host_far_ahead_makes_the_clock_jump_forward() {
        let mut t = Tracker::new(HERTZ, host(0, 0), 0).unwrap();
        let later = Sample {
            ns: SECOND + SECOND / 15,
            tsc: HERTZ,
        };
        assert!(t.observe(later, 0));
        t.bend(HERTZ);
        assert_eq!(t.params.monotonic(HERTZ), later.ns);
    }

    #[test]
    fn counter_that_stops_or_races_is_not_steady() {
        let mut t = Tracker::new(HERTZ, host(HERTZ, 0), 0).unwrap();
        assert!(!t.observe(
            Sample {
                ns: 3 * SECOND,
                tsc: HERTZ
            },
            0
        ));
        assert!(!t.observe(
            Sample {
                ns: 2 * SECOND,
                tsc: 4 * HERTZ
            },
            0
        ));
    }

    #[test]
    fn noise_does_not_move_the_real_time() {
        let mut t = Tracker::new(HERTZ, host(0, 0), 1000).unwrap();
        assert!(t.observe(host(HERTZ, 0), 1900));
        t.bend(HERTZ);
        assert_eq!(t.params.real_offset_ns, 1000);
        assert!(t.observe(host(2 * HERTZ, 0), 900_000));
        t.bend(2 * HERTZ);
        assert_eq!(t.params.real_offset_ns, 900_000);
    }
}
