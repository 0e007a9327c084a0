//! The host's side of the clock: its time stamp counter and its clocks.

use std::sync::OnceLock;
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

pub(super) use crate::hv::host_tsc as now;

use super::SECOND;
use super::track::{Sample, Tracker};

/// What is known about the time stamp counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TscInfo {
    /// It runs steadily, on all processors alike.
    pub usable: bool,
    /// Ticks a second, if the host's KVM tells; else it is measured.
    pub hertz: Option<u64>,
    /// The guest's counter minus the host's, the same on all virtual processors (wraps).
    pub guest_offset: u64,
}

impl TscInfo {
    /// Asks the host whether its counter can be used.
    #[must_use]
    pub fn probe(guest_offset: u64, hertz: Option<u64>) -> Self {
        Self {
            usable: host_trusts_it(),
            hertz,
            guest_offset,
        }
    }

    /// A counter that must not be used.
    #[must_use]
    pub fn unusable() -> Self {
        Self {
            usable: false,
            hertz: None,
            guest_offset: 0,
        }
    }
}

/// Whether the host itself keeps time with the counter, and the processor promises that it neither
/// stops nor changes its rate.
fn host_trusts_it() -> bool {
    let source = "/sys/devices/system/clocksource/clocksource0/current_clocksource";
    let source = std::fs::read_to_string(source).unwrap_or_default();
    let cpus = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    trusted(source.trim(), &cpus)
}

fn trusted(clocksource: &str, cpuinfo: &str) -> bool {
    let flags = cpuinfo
        .lines()
        .find(|line| line.starts_with("flags"))
        .unwrap_or_default();
    let has = |flag| flags.split_whitespace().any(|f| f == flag);
    matches!(clocksource, "tsc" | "kvm-clock") && has("constant_tsc") && has("nonstop_tsc")
}

fn host(clock: ClockId) -> u64 {
    let t = clock_gettime(clock);
    (t.tv_sec.cast_unsigned())
        .saturating_mul(SECOND)
        .saturating_add(t.tv_nsec.cast_unsigned())
}

/// The host's `CLOCK_MONOTONIC`.
pub(super) fn host_monotonic() -> u64 {
    host(ClockId::Monotonic)
}

/// The host's `CLOCK_REALTIME`.
pub(super) fn host_realtime() -> u64 {
    host(ClockId::Realtime)
}

/// The host's `CLOCK_BOOTTIME`.
pub(super) fn host_boottime() -> u64 {
    host(ClockId::Boottime)
}

/// How often something is measured to find a time when nothing came between.
const TRIES: usize = 5;

/// The host's clock and the guest's counter at one moment.
pub(super) fn sample(offset: u64) -> Sample {
    let tries = (0..TRIES).map(|_| {
        let before = now();
        let ns = host_monotonic();
        let took = now().saturating_sub(before);
        (
            took,
            Sample {
                ns,
                tsc: before.wrapping_add(took / 2).wrapping_add(offset),
            },
        )
    });
    tries
        .min_by_key(|(took, _)| *took)
        .map_or(Sample { ns: 0, tsc: 0 }, |(_, sample)| sample)
}

/// The host's `CLOCK_REALTIME - CLOCK_MONOTONIC`.
pub(super) fn real_offset() -> i64 {
    let tries = (0..TRIES).map(|_| {
        let before = host_monotonic();
        let real = host_realtime();
        let took = host_monotonic().saturating_sub(before);
        (took, real.wrapping_sub(before + took / 2).cast_signed())
    });
    tries
        .min_by_key(|(took, _)| *took)
        .map_or(0, |(_, offset)| offset)
}

/// The counter's ticks a second. It is the host's, the same for every guest, so it is measured once in a process: that takes
/// 10 ms, and what is wrong with it a guest's line is bent for later ([`Tracker`]).
fn measured() -> Option<u64> {
    static HERTZ: OnceLock<Option<u64>> = OnceLock::new();
    *HERTZ.get_or_init(|| {
        let first = sample(0);
        std::thread::sleep(Duration::from_millis(10));
        let second = sample(0);
        let ticks = u128::from(second.tsc.checked_sub(first.tsc)?);
        let ns = u128::from(second.ns.checked_sub(first.ns).filter(|&ns| ns > 0)?);
        u64::try_from(ticks * u128::from(SECOND) / ns).ok()
    })
}

/// A line through the counter from now on; `None` if the counter does not count.
pub(super) fn start(info: &TscInfo) -> Option<Tracker> {
    let first = sample(info.guest_offset);
    let hertz = match info.hertz {
        Some(hertz) => hertz,
        None => measured()?,
    };
    // A counter this slow cannot tell nanoseconds apart.
    if hertz < 1_000_000 {
        return None;
    }
    Tracker::new(hertz, first, real_offset())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counter_is_trusted_only_if_host_and_processor_agree() {
        let good = "processor : 0\nflags\t\t: fpu constant_tsc nonstop_tsc\n";
        assert!(trusted("tsc", good));
        assert!(trusted("kvm-clock", good));
        assert!(!trusted("hpet", good));
        assert!(!trusted("tsc", "flags : fpu constant_tsc\n"));
        assert!(!trusted("tsc", ""));
    }
}
