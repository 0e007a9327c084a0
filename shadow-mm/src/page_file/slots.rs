//! Slots of the page file, one page each, and which of them are taken.
//!
//! Slots are handed out in runs, so that pages that leave together lie together; the search goes on
//! where the last one ended, so that a file fills from front to back before holes are used.

use alloc::vec::Vec;
use core::fmt;

/// One page of the page file.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Slot(u32);

impl Slot {
    /// How many slots there can be: 16 TiB, less what means other things.
    pub const COUNT: u64 = u32::MAX as u64 - 1;

    /// The slot with this number, or `None` if it is not below [`Slot::COUNT`].
    #[must_use]
    pub const fn new(number: u64) -> Option<Self> {
        if number < Self::COUNT {
            Some(Self(number as u32))
        } else {
            None
        }
    }

    /// The number: the offset in the file divided by the page size.
    #[must_use]
    pub const fn get(self) -> u32 {
        self.0
    }

    /// Where in the page file the slot begins, in bytes.
    #[must_use]
    pub const fn offset(self) -> u64 {
        (self.0 as u64) << crate::addr::PAGE_SHIFT
    }

    /// The slot `n` further on.
    #[must_use]
    pub(crate) fn ahead(self, n: u32) -> Option<Self> {
        Self::new(u64::from(self.0) + u64::from(n))
    }
}

impl fmt::Debug for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Slot({})", self.0)
    }
}

impl fmt::Display for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// Consecutive slots that were taken together.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct SlotRun {
    pub(crate) first: Slot,
    pub(crate) count: u32,
}

/// Which slots are taken. Protected by the PFN lock.
#[derive(Debug, Default)]
pub(crate) struct SlotMap {
    /// One bit a slot, set if it is taken.
    words: Vec<u64>,
    count: u32,
    used: u32,
    /// Most slots that were ever taken.
    peak: u32,
    /// Where the next search begins.
    next: u32,
}

const WORD_BITS: u32 = u64::BITS;

impl SlotMap {
    /// A map of `count` free slots; `None` if it does not fit in memory or no file has so many.
    pub(crate) fn new(count: u64) -> Option<Self> {
        let count = u32::try_from(count)
            .ok()
            .filter(|n| u64::from(*n) <= Slot::COUNT)?;
        let mut words = Vec::new();
        let needed = count.div_ceil(WORD_BITS) as usize;
        words.try_reserve_exact(needed).ok()?;
        words.resize(needed, 0);
        Some(Self {
            words,
            count,
            ..Self::default()
        })
    }

    pub(crate) fn count(&self) -> u32 {
        self.count
    }

    pub(crate) fn used(&self) -> u32 {
        self.used
    }

    pub(crate) fn peak(&self) -> u32 {
        self.peak
    }

    pub(crate) fn available(&self) -> u32 {
        self.count - self.used
    }

    /// Whether the slot is taken.
    pub(crate) fn is_taken(&self, slot: Slot) -> bool {
        let word = self.words.get((slot.0 / WORD_BITS) as usize);
        word.is_some_and(|word| word >> (slot.0 % WORD_BITS) & 1 == 1)
    }

    /// Takes the first run of at most `most` free slots; there may be fewer in it.
    pub(crate) fn take_run(&mut self, most: u32) -> Option<SlotRun> {
        let first = self
            .first_free(self.next, self.count)
            .or_else(|| self.first_free(0, self.next))?;
        let mut count = 0;
        while count < most && first + count < self.count && !self.is_taken(Slot(first + count)) {
            let at = first + count;
            self.words[(at / WORD_BITS) as usize] |= 1 << (at % WORD_BITS);
            count += 1;
        }
        self.used += count;
        self.peak = self.peak.max(self.used);
        self.next = first + count;
        Some(SlotRun {
            first: Slot(first),
            count,
        })
    }

    fn first_free(&self, from: u32, end: u32) -> Option<u32> {
        let mut at = from;
        while at < end {
            let word = *self.words.get((at / WORD_BITS) as usize)?;
            let free = !word >> (at % WORD_BITS);
            if free != 0 {
                return Some(at + free.trailing_zeros()).filter(|at| *at < end);
            }
            at = (at / WORD_BITS + 1) * WORD_BITS;
        }
        None
    }

    /// Gives a slot back.
    pub(crate) fn free(&mut self, slot: Slot) {
        debug_assert!(self.is_taken(slot), "{slot:?} was freed twice");
        if let Some(word) = self.words.get_mut((slot.0 / WORD_BITS) as usize) {
            *word &= !(1 << (slot.0 % WORD_BITS));
            self.used -= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn full_file_has_no_run_left() {
        let mut map = SlotMap::new(70).expect("a map");
        let runs = [map.take_run(64), map.take_run(64), map.take_run(1)];
        assert_eq!(
            runs.map(|run| run.map(|r| (r.first.get(), r.count))),
            [Some((0, 64)), Some((64, 6)), None]
        );
        assert_eq!((map.available(), map.peak()), (0, 70));
    }

    #[test]
    fn freed_slots_are_found_after_the_end_is_reached() {
        let mut map = SlotMap::new(130).expect("a map");
        assert!((0..13).all(|_| map.take_run(10).is_some()));
        for n in [5, 6, 100] {
            map.free(Slot(n));
        }
        let run = map.take_run(16).expect("a hole");
        assert_eq!((run.first.get(), run.count), (5, 2));
        let run = map.take_run(16).expect("the other hole");
        assert_eq!((run.first.get(), run.count), (100, 1));
        assert!(map.take_run(16).is_none());
    }

    #[test]
    fn file_of_no_slots_gives_none() {
        assert!(SlotMap::default().take_run(1).is_none());
        assert!(SlotMap::new(u64::MAX).is_none());
    }
}
