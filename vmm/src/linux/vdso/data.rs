//! The page the vDSO reads: how a time stamp becomes a time. Written by the VMM under a sequence
//! lock, read by the guest at any moment.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

use vm_memory::{VolatileMemory, VolatileSlice};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The page's layout. The assembly in `code.rs` uses these offsets.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct VdsoData {
    /// Odd while the rest is being changed; different afterwards.
    pub seq: u32,
    /// 0: use the time stamp counter; anything else: make the system call.
    pub mode: u32,
    /// See [`ClockParams::mult`].
    pub mult: u64,
    /// See [`ClockParams::shift`].
    pub shift: u32,
    /// Zero.
    pub reserved: u32,
    /// See [`ClockParams::tsc_base`].
    pub tsc_base: u64,
    /// See [`ClockParams::mono_base_ns`].
    pub mono_base_ns: u64,
    /// See [`ClockParams::real_offset_ns`].
    pub real_offset_ns: i64,
    /// See [`CpuSource`].
    pub getcpu_mode: u32,
    /// Zero.
    pub reserved2: u32,
}

/// How `getcpu` finds the processor's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum CpuSource {
    /// There is only processor 0.
    Zero = 0,
    /// `TSC_AUX`, read by `RDTSCP`: processor in bits 0 to 11, node above.
    TscAux = 1,
    /// By system call.
    Call = 2,
}

/// `CLOCK_MONOTONIC` as a function of the time stamp counter, and `CLOCK_REALTIME`'s distance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClockParams {
    /// Nanoseconds a tick, times `1 << shift`.
    pub mult: u64,
    /// Below 64.
    pub shift: u32,
    /// The guest's time stamp counter at `mono_base_ns`.
    pub tsc_base: u64,
    /// `CLOCK_MONOTONIC` at `tsc_base`.
    pub mono_base_ns: u64,
    /// `CLOCK_REALTIME - CLOCK_MONOTONIC`.
    pub real_offset_ns: i64,
}

impl ClockParams {
    /// Bits of fraction [`ClockParams::new`] uses.
    const SHIFT: u32 = 32;

    /// For a counter of `hertz` ticks a second; `None` for zero.
    #[must_use]
    pub fn new(hertz: u64, tsc_base: u64, mono_base_ns: u64, real_offset_ns: i64) -> Option<Self> {
        let mult = (1_000_000_000_u128 << Self::SHIFT).checked_div(u128::from(hertz))?;
        let mult = u64::try_from(mult).ok()?;
        Some(Self {
            mult,
            shift: Self::SHIFT,
            tsc_base,
            mono_base_ns,
            real_offset_ns,
        })
    }

    /// `CLOCK_MONOTONIC` at `tsc`, by the arithmetic of the vDSO: a counter before `tsc_base` counts
    /// as `tsc_base`.
    #[must_use]
    pub fn monotonic(&self, tsc: u64) -> u64 {
        let ticks = u128::from(tsc.saturating_sub(self.tsc_base));
        let ns = (ticks * u128::from(self.mult)) >> self.shift;
        self.mono_base_ns.wrapping_add(ns as u64)
    }

    /// `CLOCK_REALTIME` at `tsc`.
    #[must_use]
    pub fn realtime(&self, tsc: u64) -> u64 {
        self.monotonic(tsc).wrapping_add_signed(self.real_offset_ns)
    }
}

fn seq_of<'a>(page: &'a VolatileSlice<'_>) -> &'a AtomicU32 {
    page.get_atomic_ref::<AtomicU32>(std::mem::offset_of!(VdsoData, seq))
        .expect("the vDSO's data page")
}

/// How often the page was written, twice each time.
pub(in crate::linux) fn seq(page: &VolatileSlice<'_>) -> u32 {
    seq_of(page).load(Ordering::Relaxed)
}

/// Counts on from what [`seq`] was in another machine, before programs run.
pub(in crate::linux) fn set_seq(page: &VolatileSlice<'_>, seq: u32) {
    seq_of(page).store(seq & !1, Ordering::Relaxed);
}

/// Writes the page. `clock` is `None` if the counter must not be used; every reading is a system
/// call then. There is one writer at a time: the caller's lock.
///
/// # Panics
/// If `page` is shorter than [`VdsoData`] or not aligned: our bug.
pub fn publish(page: &VolatileSlice<'_>, clock: Option<&ClockParams>, cpu: CpuSource) {
    publish_with(page, cpu, || clock.copied());
}

/// As [`publish`], with parameters that are found while no reader can use the old ones: a line that
/// is bent at the counter read in `clock` is continuous for every reader.
///
/// # Panics
/// As [`publish`].
pub fn publish_with(
    page: &VolatileSlice<'_>,
    cpu: CpuSource,
    clock: impl FnOnce() -> Option<ClockParams>,
) {
    let word = |at: usize| {
        page.get_atomic_ref::<AtomicU64>(at)
            .expect("the vDSO's data page")
    };
    let half = |at: usize| {
        page.get_atomic_ref::<AtomicU32>(at)
            .expect("the vDSO's data page")
    };
    let seq = seq_of(page);
    seq.fetch_add(1, Ordering::Relaxed);
    fence(Ordering::SeqCst);
    let clock = clock();
    if let Some(clock) = &clock {
        word(std::mem::offset_of!(VdsoData, mult)).store(clock.mult, Ordering::Relaxed);
        half(std::mem::offset_of!(VdsoData, shift)).store(clock.shift, Ordering::Relaxed);
        word(std::mem::offset_of!(VdsoData, tsc_base)).store(clock.tsc_base, Ordering::Relaxed);
        word(std::mem::offset_of!(VdsoData, mono_base_ns))
            .store(clock.mono_base_ns, Ordering::Relaxed);
        let real = clock.real_offset_ns.cast_unsigned();
        word(std::mem::offset_of!(VdsoData, real_offset_ns)).store(real, Ordering::Relaxed);
    }
    half(std::mem::offset_of!(VdsoData, mode)).store(u32::from(clock.is_none()), Ordering::Relaxed);
    half(std::mem::offset_of!(VdsoData, getcpu_mode)).store(cpu as u32, Ordering::Relaxed);
    seq.fetch_add(1, Ordering::Release);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_second_of_ticks_is_one_second() {
        for hertz in [1_000_000, 2_399_999_873, 5_000_000_000] {
            let clock = ClockParams::new(hertz, 1000, 50, 7).unwrap();
            let ns = clock.monotonic(1000 + hertz) - 50;
            assert!(
                (999_999_990..=1_000_000_000).contains(&ns),
                "{ns} at {hertz} Hz"
            );
            assert_eq!(clock.realtime(1000 + hertz), ns + 57);
        }
    }

    #[test]
    fn counter_before_base_is_base() {
        let clock = ClockParams::new(1_000_000_000, 1000, 50, 0).unwrap();
        assert_eq!(clock.monotonic(3), 50);
    }

    #[test]
    fn no_frequency_is_refused() {
        assert_eq!(ClockParams::new(0, 0, 0, 0), None);
    }
}
