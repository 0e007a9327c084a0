//! The image under a space: ranges whose pages, as long as they have no entry, are pages of a section that
//! the guest knows nothing of. That is how a snapshot comes back: no page is read before it is touched,
//! and no entry is made.
//!
//! The image lies under private memory only, independently of where mappings begin and end: it belongs
//! to pages. A page that is taken away, by whatever verb, takes its image along.

use alloc::collections::BTreeMap;
use alloc::vec::Vec;

use super::sub_range;
use crate::addr::{Vpn, VpnRange};
use crate::proto::{Section, SectionPage};

/// Pieces that a guest may cut the image into, beyond those it was made of, by forgetting pages inside.
pub(crate) const MAX_CUTS: usize = 65_530;

/// Neighbouring pages that come from neighbouring pages of a section.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ImageRun<B> {
    /// The pages.
    pub range: VpnRange,
    /// Where they come from.
    pub section: Section<B>,
    /// The section's page that the first of them is.
    pub first: SectionPage,
}

impl<B: Clone> ImageRun<B> {
    /// The section's page that one of the pages is.
    pub(crate) fn page(&self, vpn: Vpn) -> Option<SectionPage> {
        let ahead = vpn.get().checked_sub(self.range.start().get())?;
        SectionPage::new(self.first.get() + ahead)
    }

    /// The part of the run in a range; none if nothing of it is there.
    #[must_use]
    pub fn part(&self, range: VpnRange) -> Option<Self> {
        let range = self.range.intersect(range)?;
        Some(Self {
            range,
            section: self.section.clone(),
            first: self.page(range.start())?,
        })
    }

    fn continues_into(&self, next: &Self) -> bool {
        self.range.end() == next.range.start().get()
            && self.section == next.section
            && self.page(next.range.start()) == Some(next.first)
    }
}

/// The image under one space, by first page; runs never overlap. Protected by the space's lock.
#[derive(Clone, Debug)]
pub(crate) struct ImageSet<B> {
    runs: BTreeMap<Vpn, ImageRun<B>>,
    /// Pages attached and runs cut since, so that the latter cannot become any number.
    cuts: usize,
    /// How often pages were attached or taken away.
    changes: u64,
}

impl<B> Default for ImageSet<B> {
    fn default() -> Self {
        Self {
            runs: BTreeMap::new(),
            cuts: 0,
            changes: 0,
        }
    }
}

impl<B: Clone> ImageSet<B> {
    pub(crate) fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// How often pages were attached or taken away.
    pub(crate) fn changes(&self) -> u64 {
        self.changes
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &ImageRun<B>> {
        self.runs.values()
    }

    /// The run that has a page.
    pub(crate) fn find(&self, vpn: Vpn) -> Option<&ImageRun<B>> {
        let below = self.runs.range(..=vpn).next_back().map(|(_, run)| run);
        below.filter(|run| run.range.contains(vpn))
    }

    /// Runs with pages in the range, rising.
    pub(crate) fn overlapping(&self, range: VpnRange) -> impl Iterator<Item = &ImageRun<B>> {
        let first = self.find(range.start());
        let first = first.map_or(range.start(), |run| run.range.start());
        self.runs.range(first..=range.last()).map(|(_, run)| run)
    }

    /// The pages around one, no further than `within`, that are under the same run, or under none.
    pub(crate) fn extent(&self, vpn: Vpn, within: VpnRange) -> VpnRange {
        if let Some(run) = self.find(vpn) {
            return run.range.intersect(within).unwrap_or(within);
        }
        let below = self.runs.range(..vpn).next_back();
        let above = self.runs.range(vpn..).next();
        let start = below.map_or(0, |(_, run)| run.range.end());
        let end = above.map_or(u64::MAX, |(start, _)| start.get());
        let start = Vpn::new(start.max(within.start().get())).unwrap_or(within.start());
        VpnRange::between(start, end.min(within.end())).unwrap_or(within)
    }

    /// Whether a hole at `range` would be one cut too many.
    pub(crate) fn too_many_cuts(&self, range: VpnRange) -> bool {
        let inside = self
            .find(range.start())
            .is_some_and(|run| run.range.start() < range.start() && run.range.end() > range.end());
        inside && self.cuts >= MAX_CUTS
    }

    /// Adds a run where none is, and joins it with its neighbours.
    pub(crate) fn insert(&mut self, mut run: ImageRun<B>) {
        debug_assert!(
            self.overlapping(run.range).next().is_none(),
            "runs of an image overlap"
        );
        self.changes += 1;
        let below = self.runs.range(..run.range.start()).next_back();
        if let Some((start, below)) = below.filter(|(_, below)| below.continues_into(&run)) {
            let (start, first) = (*start, below.first);
            self.runs.remove(&start);
            run.range = sub_range(start, run.range.end());
            run.first = first;
        }
        let above = Vpn::new(run.range.end()).and_then(|end| self.runs.get(&end));
        if let Some(above) = above.filter(|above| run.continues_into(above)) {
            let (start, end) = (above.range.start(), above.range.end());
            self.runs.remove(&start);
            run.range = sub_range(run.range.start(), end);
        }
        self.runs.insert(run.range.start(), run);
    }

    /// Makes a hole at `range` and gives back what was there, rising.
    pub(crate) fn carve(&mut self, range: VpnRange) -> Vec<ImageRun<B>> {
        self.changes += 1;
        let starts: Vec<Vpn> = self
            .overlapping(range)
            .map(|run| run.range.start())
            .collect();
        let mut carved = Vec::with_capacity(starts.len());
        for start in starts {
            let Some(run) = self.runs.remove(&start) else {
                continue;
            };
            let below = VpnRange::between(start, range.start().get());
            let above =
                Vpn::new(range.end()).and_then(|end| VpnRange::between(end, run.range.end()));
            let rest = [below, above].map(|side| side.and_then(|side| run.part(side)));
            self.cuts += usize::from(rest.iter().all(Option::is_some));
            for part in rest.into_iter().flatten() {
                self.runs.insert(part.range.start(), part);
            }
            carved.extend(run.part(range));
        }
        carved
    }

    /// What of it lies under the ranges.
    pub(crate) fn clipped(&self, ranges: &[VpnRange]) -> Self {
        let parts = ranges.iter().flat_map(|range| {
            let runs = self.overlapping(*range);
            runs.filter_map(|run| run.part(*range))
        });
        let mut clipped = Self {
            cuts: self.cuts,
            ..Self::default()
        };
        parts.for_each(|run| clipped.insert(run));
        clipped
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::SectionTable;
    use crate::section::Charge;

    fn range(start: u64, count: u64) -> VpnRange {
        VpnRange::new(Vpn::new(start).expect("page"), count).expect("range")
    }

    fn run(section: &Section<u8>, start: u64, count: u64, first: u64) -> ImageRun<u8> {
        ImageRun {
            range: range(start, count),
            section: section.clone(),
            first: SectionPage::new(first).expect("page"),
        }
    }

    fn section() -> Section<u8> {
        let made = SectionTable::default().create(Some(1), (0, None), (Charge::Uncharged, None));
        made.expect("a section")
    }

    #[test]
    fn hole_filled_again_is_one_run() {
        let section = section();
        let mut set = ImageSet::default();
        set.insert(run(&section, 10, 20, 5));
        let carved = set.carve(range(15, 3));
        assert_eq!(carved, [run(&section, 15, 3, 10)]);
        let left: Vec<_> = set.iter().cloned().collect();
        assert_eq!(left, [run(&section, 10, 5, 5), run(&section, 18, 12, 13)]);
        carved.into_iter().for_each(|part| set.insert(part));
        assert_eq!(
            set.iter().cloned().collect::<Vec<_>>(),
            [run(&section, 10, 20, 5)]
        );
    }

    #[test]
    fn unlike_neighbours_stay_apart() {
        let (a, b) = (section(), section());
        let mut set = ImageSet::default();
        set.insert(run(&a, 10, 2, 0));
        set.insert(run(&a, 12, 2, 9));
        set.insert(run(&b, 14, 2, 11));
        assert_eq!(set.iter().count(), 3);
    }

    #[test]
    fn extent_ends_where_the_source_changes() {
        let section = section();
        let mut set = ImageSet::default();
        set.insert(run(&section, 10, 10, 0));
        set.insert(run(&section, 30, 10, 20));
        let all = range(5, 45);
        let of = |vpn| set.extent(Vpn::new(vpn).expect("page"), all);
        assert_eq!(of(7), range(5, 5));
        assert_eq!(of(12), range(10, 10));
        assert_eq!(of(25), range(20, 10));
        assert_eq!(of(45), range(40, 10));
    }

    #[test]
    fn part_under_ranges_keeps_its_pages() {
        let section = section();
        let mut set = ImageSet::default();
        set.insert(run(&section, 10, 10, 0));
        let clipped = set.clipped(&[range(0, 12), range(14, 1), range(19, 9)]);
        let expected = [
            run(&section, 10, 2, 0),
            run(&section, 14, 1, 4),
            run(&section, 19, 1, 9),
        ];
        assert_eq!(clipped.iter().cloned().collect::<Vec<_>>(), expected);
    }
}
