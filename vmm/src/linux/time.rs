//! The machine's clock.

/// The clock the guest reads: `CLOCK_MONOTONIC` and `CLOCK_REALTIME` from the time stamp counter,
/// by the same arithmetic in the vDSO and here.
#[derive(Debug, Default)]
pub struct Clock;

impl Clock {
    /// `CLOCK_MONOTONIC`, nanoseconds.
    #[must_use]
    pub fn monotonic(&self) -> u64 {
        let t = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
        t.tv_sec as u64 * 1_000_000_000 + t.tv_nsec as u64
    }

    /// `CLOCK_REALTIME`, nanoseconds since the epoch.
    #[must_use]
    pub fn realtime(&self) -> u64 {
        let t = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
        t.tv_sec as u64 * 1_000_000_000 + t.tv_nsec as u64
    }
}
