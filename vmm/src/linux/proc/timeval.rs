//! `struct timespec` and `struct timeval` as nanoseconds.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::linux::Errno;
use crate::linux::call::Ctx;

/// Nanoseconds of a second.
pub const SECOND: u64 = 1_000_000_000;

/// Both structures: seconds, and a fraction in nanoseconds or microseconds.
#[repr(C)]
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
pub struct Pair {
    /// Whole seconds.
    pub seconds: i64,
    /// The rest.
    pub fraction: i64,
}

impl Pair {
    /// A duration as a `timeval`.
    #[must_use]
    pub fn timeval(ns: u64) -> Self {
        Self {
            seconds: (ns / SECOND) as i64,
            fraction: (ns % SECOND / 1000) as i64,
        }
    }

    /// A duration as a `timespec`.
    #[must_use]
    pub fn timespec(ns: u64) -> Self {
        Self {
            seconds: (ns / SECOND) as i64,
            fraction: (ns % SECOND) as i64,
        }
    }

    /// A `timespec`'s nanoseconds; what does not fit is as good as for ever.
    ///
    /// # Errors
    /// `EINVAL` if it is negative or its fraction is no fraction.
    pub fn timespec_ns(self) -> Result<u64, Errno> {
        self.ns(1)
    }

    /// A `timeval`'s nanoseconds.
    ///
    /// # Errors
    /// `EINVAL` if it is negative or its fraction is no fraction.
    pub fn timeval_ns(self) -> Result<u64, Errno> {
        self.ns(1000)
    }

    fn ns(self, unit: u64) -> Result<u64, Errno> {
        let seconds = u64::try_from(self.seconds).map_err(|_| Errno::INVAL)?;
        let fraction = u64::try_from(self.fraction).map_err(|_| Errno::INVAL)?;
        if fraction >= SECOND / unit {
            return Err(Errno::INVAL);
        }
        Ok(seconds
            .saturating_mul(SECOND)
            .saturating_add(fraction * unit))
    }
}

/// An optional `timespec` argument, in nanoseconds.
///
/// # Errors
/// `EFAULT`, `EINVAL`.
pub fn read_timespec(c: &Ctx<'_>, va: u64) -> Result<Option<u64>, Errno> {
    if va == 0 {
        return Ok(None);
    }
    c.mem().read_obj::<Pair>(va)?.timespec_ns().map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn negative_or_overflowing_times_are_judged() {
        let ns = |seconds, fraction| Pair { seconds, fraction }.timespec_ns();
        assert_eq!(ns(1, 5), Ok(SECOND + 5));
        assert_eq!(ns(-1, 0), Err(Errno::INVAL));
        assert_eq!(ns(0, 1_000_000_000), Err(Errno::INVAL));
        assert_eq!(ns(i64::MAX, 0), Ok(u64::MAX));
        assert_eq!(
            Pair {
                seconds: 0,
                fraction: 1_000_000
            }
            .timeval_ns(),
            Err(Errno::INVAL)
        );
    }
}
