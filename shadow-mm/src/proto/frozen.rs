//! Pages that a section has in a layer, or in an image: a template's or a snapshot's shared memory, and its files in memory.
//!
//! Which pages of the section are which of the layer's is said once, for every section that is made of it ([`Extents`]); a
//! section has a handle of that, and knows which of them it has no more: those that were stored to, or read out of the image,
//! and have a prototype entry since, and those that were cut off or punched out. So such a section costs the same whatever its
//! size.

use alloc::collections::BTreeMap;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::ops::Range;

use super::section::{SectionId, SectionPage};
use crate::addr::{Pfn, PfnRange};

/// Neighbouring pages of a section that are neighbouring pages of a layer, or of an image.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Extent {
    /// The section's first page.
    pub first: u64,
    /// How many.
    pub count: u64,
    /// The layer's or image's page that the first one is.
    pub stored: u64,
}

impl Extent {
    fn end(&self) -> u64 {
        self.first + self.count
    }
}

/// Which pages of a section are pages of a layer or of an image; copies are the same one.
#[derive(Clone, Debug)]
pub struct Extents(Arc<Table>);

#[derive(Debug)]
struct Table {
    /// Rising, with the pages that all before have.
    runs: Vec<(Extent, u64)>,
    pages: u64,
    /// One past the last page of a section, and of the layer.
    ends: (u64, u64),
}

impl Extents {
    /// The runs, which must rise and not overlap; `None` if they do not, if one is empty, or if no section or layer can
    /// have the pages.
    #[must_use]
    pub fn new(runs: impl IntoIterator<Item = Extent>) -> Option<Self> {
        let (mut pages, mut ends) = (0, (0, 0));
        let mut known = Vec::new();
        for run in runs {
            let end = run.first.checked_add(run.count)?;
            let stored = run.stored.checked_add(run.count)?;
            let fits = end <= SectionPage::COUNT && stored <= u64::from(u32::MAX);
            if run.count == 0 || run.first < ends.0 || !fits {
                return None;
            }
            known.push((run, pages));
            pages += run.count;
            ends = (end, stored.max(ends.1));
        }
        let table = Table {
            runs: known,
            pages,
            ends,
        };
        Some(Self(Arc::new(table)))
    }

    /// How many pages there are.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.0.pages
    }

    /// One past the last page of a section.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.0.ends.0
    }

    /// One past the last page of the layer.
    pub(crate) fn stored_end(&self) -> u64 {
        self.0.ends.1
    }

    /// The layer's page that a section's page is.
    fn stored(&self, page: u64) -> Option<u64> {
        let after = self.0.runs.partition_point(|(run, _)| run.first <= page);
        let (run, _) = self.0.runs[..after].last()?;
        (page < run.end()).then(|| run.stored + (page - run.first))
    }

    /// How many pages lie before one.
    fn before(&self, page: u64) -> u64 {
        let after = self.0.runs.partition_point(|(run, _)| run.first < page);
        let last = self.0.runs[..after].last();
        last.map_or(0, |(run, before)| before + run.count.min(page - run.first))
    }

    /// The parts of the runs that lie in a range.
    fn overlapping(&self, range: Range<u64>) -> impl Iterator<Item = Extent> {
        let from = self
            .0
            .runs
            .partition_point(|(run, _)| run.end() <= range.start);
        let runs = self.0.runs[from..].iter().map(|(run, _)| *run);
        let runs = runs.take_while(move |run| run.first < range.end);
        runs.filter_map(move |run| {
            let first = run.first.max(range.start);
            let count = run.end().min(range.end).checked_sub(first)?;
            let stored = run.stored + (first - run.first);
            (count > 0).then_some(Extent {
                first,
                count,
                stored,
            })
        })
    }
}

/// Where pages of a section are that it does not have itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Below {
    /// In these frames, page by page.
    Layer(PfnRange),
    /// In an image: pages of this section over a file, of which a page is copied when it is wanted. A handle of the
    /// section's has a handle of that.
    Image(SectionId),
}

/// What a section still has in a layer, or in an image.
#[derive(Debug)]
pub(crate) struct FrozenPages {
    below: Below,
    extents: Extents,
    /// Ranges that are there no more, by their start: apart from each other, none empty.
    cut: BTreeMap<u64, u64>,
    /// Pages of the extents that are in none of them.
    left: u64,
}

impl FrozenPages {
    /// All of the extents; `None` if there are not so many pages below: `has` says how many.
    pub(crate) fn new((below, has): (Below, u64), extents: Extents) -> Option<Self> {
        (extents.stored_end() <= has).then(|| Self {
            below,
            left: extents.pages(),
            extents,
            cut: BTreeMap::new(),
        })
    }

    /// How many pages there are.
    pub(crate) fn count(&self) -> u64 {
        self.left
    }

    /// All of the extents are there again.
    pub(crate) fn restore(&mut self) {
        self.cut.clear();
        self.left = self.extents.pages();
    }

    /// One past the last page of the section that may be there.
    pub(crate) fn end(&self) -> u64 {
        self.extents.end()
    }

    /// The image that they are in.
    pub(crate) fn image(&self) -> Option<SectionId> {
        match self.below {
            Below::Layer(_) => None,
            Below::Image(image) => Some(image),
        }
    }

    /// One past the last page that is named of the layer or image.
    pub(crate) fn stored_end(&self) -> u64 {
        self.extents.stored_end()
    }

    /// The layer's or image's page that a page is.
    pub(crate) fn stored(&self, page: SectionPage) -> Option<u64> {
        let page = page.get();
        let below = self.cut.range(..=page).next_back();
        if below.is_some_and(|(_, end)| page < *end) {
            return None;
        }
        self.extents.stored(page)
    }

    /// The layer's frame that a page is.
    pub(crate) fn frame(&self, page: SectionPage) -> Option<Pfn> {
        match self.below {
            Below::Layer(layer) => {
                let stored = self.stored(page)?;
                Some(Pfn::new(layer.start.get() + stored as u32))
            }
            Below::Image(_) => None,
        }
    }

    /// The parts of a range that are the layer's or image's, rising.
    pub(crate) fn runs(&self, range: Range<u64>) -> Vec<Extent> {
        let gaps = self.gaps(range);
        gaps.into_iter()
            .flat_map(|gap| self.extents.overlapping(gap))
            .collect()
    }

    /// The same, as first pages and frames; none of an image.
    pub(crate) fn frames(&self, range: Range<u64>) -> Vec<(u64, PfnRange)> {
        let Below::Layer(layer) = self.below else {
            return Vec::new();
        };
        let frames = |run: Extent| PfnRange {
            start: Pfn::new(layer.start.get() + run.stored as u32),
            count: run.count as u32,
        };
        let runs = self.runs(range);
        runs.into_iter()
            .map(|run| (run.first, frames(run)))
            .collect()
    }

    /// What of a range is not cut.
    fn gaps(&self, range: Range<u64>) -> Vec<Range<u64>> {
        let mut gaps = Vec::new();
        let mut at = range.start;
        let below = self.cut.range(..=at).next_back();
        if let Some((_, end)) = below {
            at = at.max(*end);
        }
        for (start, end) in self.cut.range(at..range.end.max(at)) {
            if *start > at {
                gaps.push(at..*start);
            }
            at = *end;
        }
        if at < range.end {
            gaps.push(at..range.end);
        }
        gaps
    }

    /// Pages of a range are there no more; gives back how many were.
    pub(crate) fn cut(&mut self, range: Range<u64>) -> u64 {
        if range.is_empty() {
            return 0;
        }
        let gaps = self.gaps(range.clone());
        let count =
            |gap: &Range<u64>| self.extents.before(gap.end) - self.extents.before(gap.start);
        let gone = gaps.iter().map(count).sum();
        if gone == 0 {
            return 0;
        }
        // Joined with what it touches, so that who cuts page after page has one range.
        let below = self.cut.range(..=range.start).next_back();
        let below = below.filter(|(_, end)| **end >= range.start);
        let start = below.map_or(range.start, |(start, _)| *start);
        let touched: Vec<_> = self
            .cut
            .range(start..=range.end)
            .map(|(s, e)| (*s, *e))
            .collect();
        let mut end = range.end;
        for (at, until) in touched {
            self.cut.remove(&at);
            end = end.max(until);
        }
        self.cut.insert(start, end);
        self.left -= gone;
        gone
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;
    use proptest::prelude::*;

    const LAYER: Below = Below::Layer(PfnRange {
        start: Pfn::new(100),
        count: 50,
    });

    fn run(first: u64, count: u64, stored: u64) -> Extent {
        Extent {
            first,
            count,
            stored,
        }
    }

    #[test]
    fn runs_that_cannot_be_are_refused() {
        let refused = [
            vec![run(3, 0, 0)],
            vec![run(3, 2, 0), run(4, 1, 9)],
            vec![run(5, 1, 0), run(3, 1, 1)],
            vec![run(SectionPage::COUNT, 1, 0)],
            vec![run(u64::MAX, 2, 0)],
            vec![run(0, 2, u64::MAX)],
            vec![run(0, 2, u64::from(u32::MAX) - 1)],
        ];
        for runs in refused {
            assert!(Extents::new(runs.clone()).is_none(), "{runs:?}");
        }
        let beyond = Extents::new([run(0, 2, 49)]).expect("runs");
        assert!(FrozenPages::new((LAYER, 50), beyond).is_none());
    }

    #[test]
    fn cuts_of_neighbours_are_one() {
        let extents = Extents::new([run(0, 50, 0)]).expect("runs");
        let mut frozen = FrozenPages::new((LAYER, 50), extents).expect("frozen");
        for page in (0..20).chain((20..40).rev()) {
            assert_eq!(frozen.cut(page..page + 1), 1);
        }
        assert_eq!(frozen.cut.iter().collect::<Vec<_>>(), [(&0, &40)]);
        assert_eq!(frozen.count(), 10);
    }

    proptest! {
        #[test]
        fn any_cuts_match_a_list_of_pages(
            gaps in prop::collection::vec((0u64..4, 1u64..6), 0..8),
            cuts in prop::collection::vec((0u64..60, 0u64..12), 0..20),
        ) {
            let (mut first, mut stored) = (0, 0);
            let runs: Vec<_> = gaps.into_iter().map(|(gap, count)| {
                let made = run(first + gap, count, stored);
                (first, stored) = (made.end(), stored + count);
                made
            }).collect();
            let mut pages: BTreeMap<u64, u64> = runs.iter()
                .flat_map(|r| (0..r.count).map(move |n| (r.first + n, r.stored + n)))
                .collect();
            let extents = Extents::new(runs).expect("runs");
            prop_assert_eq!(extents.pages(), pages.len() as u64);
            let mut frozen = FrozenPages::new((LAYER, 50), extents).expect("frozen");
            for (from, count) in cuts {
                let before = pages.len();
                pages.retain(|page, _| !(from..from + count).contains(page));
                prop_assert_eq!(frozen.cut(from..from + count), (before - pages.len()) as u64);
                prop_assert_eq!(frozen.count(), pages.len() as u64);
                for page in 0..70 {
                    let expected = pages.get(&page).map(|stored| Pfn::new(100 + *stored as u32));
                    prop_assert_eq!(frozen.frame(SectionPage::new(page).expect("page")), expected);
                }
                let listed: BTreeMap<u64, u64> = frozen.runs(0..70).into_iter()
                    .flat_map(|r| (0..r.count).map(move |n| (r.first + n, r.stored + n)))
                    .collect();
                prop_assert_eq!(&listed, &pages);
            }
        }
    }
}
