//! The non-paged pool (system 7): runs of pages for what the VMM and the ring-0 monitor share.
//!
//! The pool knows page numbers of one window, from zero on; which addresses and frames these are is the embedder's
//! business. A free run is found by its length and used from its end, so that what is left keeps its place. Where an
//! allocation starts and ends is marked at its pages, so that whoever frees it needs to know its first page only;
//! neighbours that are free are merged. The pool *grows* as it is used: an allocation says which of its pages were
//! never used before, and must be backed by frames first. What was backed stays so.
//!
//! As a whole it can be a **special pool** (system 10): each allocation lies between two pages that are never
//! backed, and one that is freed is never used again. Once less than half of the window would be left allocations are
//! ordinary ones, and counted.
//!
//! Not here: a lock, and the paged pool.

use alloc::collections::BTreeSet;
use alloc::vec::Vec;
use core::ops::Range;

use bitflags::bitflags;

/// Free runs are kept by length up to this, and the longer ones together.
const BUCKETS: usize = 16;

bitflags! {
    /// What is known of one page of the window.
    #[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
    struct Marks: u8 {
        /// Part of an allocation, or never to be used again.
        const TAKEN = 1;
        /// The first page of an allocation.
        const START = 2;
        /// The last one.
        const END = 4;
        /// It was backed by a frame.
        const BACKED = 8;
        /// On a first page: unbacked pages lie on both sides.
        const GUARDED = 16;
    }
}

/// How allocations are made.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum PoolMode {
    /// Side by side.
    Plain,
    /// Each between two pages that are never backed.
    Special,
}

/// Pages that were allocated.
#[derive(Clone, PartialEq, Eq, Debug)]
#[must_use = "the pages are taken, and some are to be backed"]
pub struct PoolPages {
    /// Page numbers in the window.
    pub pages: Range<u32>,
    /// Those of them that were never used, in runs: to be backed by zeroed frames before they are touched.
    pub unbacked: Vec<Range<u32>>,
}

/// No free run is long enough.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the pool has no {pages} free pages in a row")]
pub struct PoolFull {
    /// How many were asked for.
    pub pages: u32,
}

/// What was to be freed is no allocation.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("no allocation of the pool starts at its page {first}")]
pub struct NotAllocated {
    /// The page number that was given.
    pub first: u32,
}

/// What a pool has.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct PoolUsage {
    /// Pages of the window.
    pub window: u32,
    /// Pages that can be allocated.
    pub free: u32,
    /// Pages that are backed by frames.
    pub backed: u32,
    /// Allocations of a special pool that had to do without guards.
    pub unguarded: u32,
}

/// The pool. Its window's size never changes.
#[derive(Debug)]
pub struct NonPagedPool {
    mode: PoolMode,
    marks: Vec<Marks>,
    /// First pages of free runs, by length; the last bucket has all that are longer.
    runs: [BTreeSet<u32>; BUCKETS],
    usage: PoolUsage,
}

impl NonPagedPool {
    /// A pool of `window` pages, none of them backed.
    #[must_use]
    pub fn new(window: u32, mode: PoolMode) -> Self {
        let mut marks = Vec::new();
        marks.resize(window as usize, Marks::empty());
        let usage = PoolUsage {
            window,
            free: window,
            ..PoolUsage::default()
        };
        let mut pool = Self {
            mode,
            marks,
            runs: Default::default(),
            usage,
        };
        pool.add_run(0..window);
        pool
    }

    /// What it has now.
    #[must_use]
    pub fn usage(&self) -> PoolUsage {
        self.usage
    }

    /// Takes `pages` consecutive pages, at least one.
    ///
    /// # Errors
    /// [`PoolFull`]; nothing has changed then.
    pub fn allocate(&mut self, pages: u32) -> Result<PoolPages, PoolFull> {
        let full = PoolFull { pages };
        if pages == 0 || pages > self.usage.free {
            return Err(full);
        }
        if self.mode == PoolMode::Special {
            let guarded = pages.saturating_add(2);
            let room = self.usage.free.saturating_sub(guarded) >= self.usage.window / 2;
            // After an ordinary one a page of a gap may have been used before.
            if room
                && self.usage.unguarded == 0
                && let Some(run) = self.take(guarded)
            {
                return Ok(self.hand_out(run.start + 1..run.end - 1, Marks::GUARDED));
            }
            self.usage.unguarded += 1;
        }
        let run = self.take(pages).ok_or(full)?;
        Ok(self.hand_out(run, Marks::empty()))
    }

    /// Frees the allocation that starts at page `first`; gives back how many pages it had. Guarded ones are
    /// never used again.
    ///
    /// # Errors
    /// [`NotAllocated`]: it was freed before, or never was one.
    pub fn free(&mut self, first: u32) -> Result<u32, NotAllocated> {
        let start = self.marks.get(first as usize).copied();
        let start = start.filter(|marks| marks.contains(Marks::START));
        let start = start.ok_or(NotAllocated { first })?;
        let length = self.marks[first as usize..]
            .iter()
            .position(|marks| marks.contains(Marks::END));
        debug_assert!(length.is_some(), "an allocation without an end");
        let pages = length.ok_or(NotAllocated { first })? as u32 + 1;
        let end = first + pages;
        let stays = if start.contains(Marks::GUARDED) {
            Marks::TAKEN | Marks::BACKED
        } else {
            Marks::BACKED
        };
        for marks in &mut self.marks[first as usize..end as usize] {
            *marks &= stays;
        }
        if !start.contains(Marks::GUARDED) {
            self.usage.free += pages;
            self.merge(first..end);
        }
        Ok(pages)
    }

    /// Marks an allocation, and says what of it is to be backed.
    fn hand_out(&mut self, pages: Range<u32>, guarded: Marks) -> PoolPages {
        let mut unbacked: Vec<Range<u32>> = Vec::new();
        for page in pages.clone() {
            let marks = &mut self.marks[page as usize];
            if !marks.contains(Marks::BACKED) {
                self.usage.backed += 1;
                match unbacked.last_mut() {
                    Some(run) if run.end == page => run.end += 1,
                    Some(_) | None => unbacked.push(page..page + 1),
                }
            }
            *marks |= Marks::BACKED;
        }
        self.mark(pages.start..pages.start + 1, Marks::START | guarded);
        self.mark(pages.end - 1..pages.end, Marks::END);
        PoolPages { pages, unbacked }
    }

    fn mark(&mut self, pages: Range<u32>, marks: Marks) {
        for page in pages {
            self.marks[page as usize] |= marks;
        }
    }

    /// Takes pages from the end of the shortest free run that has as many.
    fn take(&mut self, pages: u32) -> Option<Range<u32>> {
        let run = (bucket(pages)..BUCKETS).find_map(|n| {
            let mut runs = self.runs[n].iter().map(|first| self.free_run(*first));
            runs.find(|run| run.len() as u32 >= pages)
        })?;
        self.runs[bucket(run.len() as u32)].remove(&run.start);
        let cut = run.end - pages;
        self.mark(cut..run.end, Marks::TAKEN);
        self.add_run(run.start..cut);
        self.usage.free -= pages;
        Some(cut..run.end)
    }

    /// The free run that starts at a page.
    fn free_run(&self, first: u32) -> Range<u32> {
        let taken = |marks: &Marks| marks.contains(Marks::TAKEN);
        let length = self.marks[first as usize..].iter().position(taken);
        first..length.map_or(self.usage.window, |length| first + length as u32)
    }

    fn add_run(&mut self, run: Range<u32>) {
        if !run.is_empty() {
            self.runs[bucket(run.len() as u32)].insert(run.start);
        }
    }

    /// Makes pages that are free now one run with their free neighbours.
    fn merge(&mut self, pages: Range<u32>) {
        let free = |marks: &Marks| !marks.contains(Marks::TAKEN);
        let before = self.marks[..pages.start as usize]
            .iter()
            .rev()
            .take_while(|marks| free(marks))
            .count() as u32;
        let after = self.marks[pages.end as usize..]
            .iter()
            .take_while(|marks| free(marks))
            .count() as u32;
        if before > 0 {
            self.runs[bucket(before)].remove(&(pages.start - before));
        }
        if after > 0 {
            self.runs[bucket(after)].remove(&pages.end);
        }
        self.add_run(pages.start - before..pages.end + after);
    }
}

/// Where runs of a length are kept.
fn bucket(pages: u32) -> usize {
    (pages as usize - 1).min(BUCKETS - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pages(pool: &mut NonPagedPool, count: u32) -> Range<u32> {
        pool.allocate(count).expect("room").pages
    }

    fn unbacked(got: &PoolPages) -> Vec<(u32, u32)> {
        let runs = got.unbacked.iter();
        runs.map(|run| (run.start, run.end)).collect()
    }

    #[test]
    fn shortest_run_is_used_from_its_end_and_neighbours_merge() {
        let mut pool = NonPagedPool::new(20, PoolMode::Plain);
        let taken = [3, 4, 5, 8].map(|count| pages(&mut pool, count));
        assert_eq!(taken, [17..20, 13..17, 8..13, 0..8]);
        assert_eq!(pool.allocate(1), Err(PoolFull { pages: 1 }));
        assert_eq!((pool.free(13), pool.free(0)), (Ok(4), Ok(8)));
        assert_eq!(pages(&mut pool, 3), 14..17, "of the shorter run");
        assert_eq!(pool.free(8), Ok(5));
        // What was free on both sides is one run again.
        assert_eq!(pages(&mut pool, 14), 0..14);
        assert_eq!(pool.usage().free, 0);
    }

    #[test]
    fn only_what_was_never_used_is_to_be_backed() {
        let mut pool = NonPagedPool::new(10, PoolMode::Plain);
        let first = pool.allocate(3).expect("room");
        assert_eq!(unbacked(&first), [(7, 10)]);
        let second = pool.allocate(2).expect("room");
        assert_eq!((pool.free(7), pool.free(5)), (Ok(3), Ok(2)));
        assert_eq!(unbacked(&second), [(5, 7)]);
        let all = pool.allocate(7).expect("room");
        assert_eq!((unbacked(&all), all.pages), (Vec::from([(3, 5)]), 3..10));
        assert_eq!(pool.usage().backed, 7);
    }

    #[test]
    fn what_is_no_allocation_is_not_freed() {
        let mut pool = NonPagedPool::new(8, PoolMode::Plain);
        let taken = pages(&mut pool, 3);
        for first in [0, taken.start + 1, 8, u32::MAX] {
            assert_eq!(pool.free(first), Err(NotAllocated { first }));
        }
        let first = taken.start;
        assert_eq!(pool.free(first), Ok(3));
        assert_eq!(pool.free(first), Err(NotAllocated { first }));
        for absurd in [0, 9, u32::MAX] {
            assert_eq!(pool.allocate(absurd), Err(PoolFull { pages: absurd }));
        }
    }

    #[test]
    fn special_pool_leaves_gaps_until_it_is_half_full_and_reuses_nothing() {
        let mut pool = NonPagedPool::new(20, PoolMode::Special);
        assert_eq!(pages(&mut pool, 3), 16..19);
        assert_eq!(pool.free(16), Ok(3));
        assert_eq!(pages(&mut pool, 3), 11..14);
        assert_eq!(pool.usage().unguarded, 0);
        assert_eq!(pages(&mut pool, 3), 7..10, "no room for gaps");
        assert_eq!(pool.free(7), Ok(3));
        assert_eq!(pages(&mut pool, 3), 7..10);
        let usage = pool.usage();
        assert_eq!((usage.unguarded, usage.free, usage.backed), (2, 7, 9));
    }
}
