//! The clock of a guest that was saved goes on where it stood.
//!
//! `CLOCK_MONOTONIC` and `CLOCK_BOOTTIME` do not jump: a guest that was on disk for a year has not noticed, and
//! what was left of a deadline is left. `CLOCK_REALTIME` is the host's: it does. The time stamp counter,
//! which programs can read by themselves, is the host's too.

use serde::{Deserialize, Serialize};
use vm_memory::VolatileSlice;

use super::{Clock, Source};
use crate::linux::saved::error::{Damaged, require};
use crate::linux::vdso::data;

/// Later than any clock, and far from where sums of two times are no number any more.
const LATEST: u64 = 1 << 62;

/// A clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedClock {
    monotonic: u64,
    boot_offset: u64,
    /// How often the vDSO's page had been written.
    seq: u32,
}

impl SavedClock {
    /// `CLOCK_MONOTONIC`, nanoseconds.
    #[must_use]
    pub fn monotonic(&self) -> u64 {
        self.monotonic
    }
}

impl Clock {
    /// It as data; `page` is the vDSO's.
    pub(in crate::linux) fn saved(&self, page: &VolatileSlice<'_>) -> SavedClock {
        SavedClock {
            monotonic: self.monotonic(),
            boot_offset: self.state.read().boot_offset,
            seq: data::seq(page),
        }
    }

    /// Goes on from a saved clock, now. A page is still to be published: a program that was saved while it
    /// read the page must see that it has changed. Without one, programs find no clock there, and ask.
    pub(in crate::linux) fn go_on_from(
        &self,
        saved: &SavedClock,
        page: Option<&VolatileSlice<'_>>,
    ) -> Result<(), Damaged> {
        let small = saved.monotonic < LATEST && saved.boot_offset < LATEST;
        require(small, "the clock")?;
        let mut state = self.state.write();
        let now = state.monotonic(self.guest_tsc());
        let by = saved.monotonic.wrapping_sub(now).cast_signed();
        state.shift = state.shift.wrapping_add(by);
        state.boot_offset = saved.boot_offset;
        match &mut state.source {
            Source::Counter(tracker) => tracker.shift(by),
            Source::Host { floor } => *floor = saved.monotonic,
        }
        if let Some(page) = page {
            data::set_seq(page, saved.seq);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::TscInfo;
    use super::*;

    fn page(bytes: &mut [u64; 512]) -> VolatileSlice<'_> {
        VolatileSlice::from(zerocopy::IntoBytes::as_mut_bytes(bytes))
    }

    #[test]
    fn clock_goes_on_where_it_stood_and_real_time_is_the_hosts() {
        for info in [TscInfo::unusable(), TscInfo::probe(0, None)] {
            for monotonic in [1_000_000_000, 1 << 60] {
                let (mut old, mut new) = ([0; 512], [0; 512]);
                data::publish(&page(&mut old), None, data::CpuSource::Zero);
                let clock = Clock::new(info);
                let mut saved = clock.saved(&page(&mut old));
                saved.monotonic = monotonic;
                let clock = Clock::new(info);
                let real = clock.realtime();
                clock.go_on_from(&saved, Some(&page(&mut new))).unwrap();
                let after = clock.monotonic() - monotonic;
                assert!(after < 1_000_000_000, "{after}");
                assert!(clock.realtime().abs_diff(real) < 1_000_000_000);
                // The next observation does not undo it.
                std::thread::sleep(std::time::Duration::from_millis(120));
                clock.tick(None, data::CpuSource::Zero);
                let later = clock.monotonic() - monotonic;
                assert!(later > after && later < 5_000_000_000, "{later}");
                clock.publish(&page(&mut new), data::CpuSource::Zero);
                assert_ne!(data::seq(&page(&mut new)), saved.seq);
                assert_eq!(clock.saved(&page(&mut new)).boot_offset, saved.boot_offset);
            }
        }
    }

    #[test]
    fn impossible_clock_is_damage() {
        let mut bytes = [0; 512];
        let saved = SavedClock {
            monotonic: u64::MAX,
            boot_offset: 0,
            seq: 0,
        };
        let clock = Clock::default();
        assert!(clock.go_on_from(&saved, Some(&page(&mut bytes))).is_err());
    }
}
