//! All mappings of a space, by their first page. They never overlap, and neighbours that could be one
//! are one.

use alloc::collections::BTreeMap;
use alloc::vec::Vec;

use super::place::Placer;
use super::{Vad, sub_range};
use crate::access::Prot;
use crate::addr::{Vpn, VpnRange};

/// The mappings of a space. Protected by the space's lock.
#[derive(Clone, Debug)]
pub(crate) struct VadSet<B> {
    map: BTreeMap<Vpn, Vad<B>>,
    pages: u64,
    charged: u64,
    /// How often mappings were made, taken away or cut.
    changes: u64,
    pub(super) placer: Placer,
}

impl<B> Default for VadSet<B> {
    fn default() -> Self {
        Self {
            map: BTreeMap::new(),
            pages: 0,
            charged: 0,
            changes: 0,
            placer: Placer::default(),
        }
    }
}

impl<B: Clone + Eq> VadSet<B> {
    /// How many mappings.
    pub(crate) fn len(&self) -> usize {
        self.map.len()
    }

    /// How often mappings were made, taken away or cut.
    pub(crate) fn changes(&self) -> u64 {
        self.changes
    }

    /// How many pages are mapped.
    pub(crate) fn pages(&self) -> u64 {
        self.pages
    }

    /// How many pages are charged.
    pub(crate) fn charged(&self) -> u64 {
        self.charged
    }

    /// How many pages of a range are charged.
    pub(crate) fn charged_in(&self, range: VpnRange) -> u64 {
        self.overlapping(range)
            .filter(|vad| vad.charge() > 0)
            .filter_map(|vad| vad.range.intersect(range))
            .map(VpnRange::count)
            .sum()
    }

    /// How many pages of a range must be charged, and are not, once its protection is `prot`.
    pub(crate) fn uncharged_in(&self, range: VpnRange, prot: Prot) -> u64 {
        self.overlapping(range)
            .filter(|vad| vad.charge() == 0 && vad.needs_charge(prot))
            .filter_map(|vad| vad.range.intersect(range))
            .map(VpnRange::count)
            .sum()
    }

    /// All mappings, rising.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Vad<B>> {
        self.map.values()
    }

    /// The mapping that covers a page.
    pub(crate) fn find(&self, vpn: Vpn) -> Option<&Vad<B>> {
        self.map
            .range(..=vpn)
            .next_back()
            .map(|(_, vad)| vad)
            .filter(|vad| vad.range.contains(vpn))
    }

    /// The mapping that covers a page, to change it; its range must stay.
    pub(crate) fn find_mut(&mut self, vpn: Vpn) -> Option<&mut Vad<B>> {
        let vad = self.map.range_mut(..=vpn).next_back().map(|(_, vad)| vad);
        vad.filter(|vad| vad.range.contains(vpn))
    }

    /// The mapping that covers a page, or else the next above.
    pub(crate) fn at_or_after(&self, vpn: Vpn) -> Option<&Vad<B>> {
        self.find(vpn)
            .or_else(|| self.map.range(vpn..).next().map(|(_, vad)| vad))
    }

    /// The mapping nearest below page number `end` that begins below it.
    pub(super) fn last_below(&self, end: u64) -> Option<&Vad<B>> {
        match Vpn::new(end) {
            Some(end) => self.map.range(..end).next_back().map(|(_, vad)| vad),
            None => self.map.values().next_back(),
        }
    }

    /// Whether nothing is mapped in the range.
    pub(crate) fn is_free(&self, range: VpnRange) -> bool {
        self.last_below(range.end())
            .is_none_or(|vad| vad.range.end() <= range.start().get())
    }

    /// Mappings that have pages in the range, rising.
    pub(crate) fn overlapping(&self, range: VpnRange) -> impl Iterator<Item = &Vad<B>> {
        let first = self
            .find(range.start())
            .map_or(range.start(), |vad| vad.range.start());
        self.map.range(first..=range.last()).map(|(_, vad)| vad)
    }

    /// The pages from the range's start up to the first that is not mapped.
    pub(crate) fn covered_prefix(&self, range: VpnRange) -> Option<VpnRange> {
        let mut end = range.start().get();
        for vad in self.overlapping(range) {
            if vad.range.start().get() > end {
                break;
            }
            end = vad.range.end();
        }
        VpnRange::between(range.start(), end.min(range.end()))
    }

    /// How many mappings there would be with a hole at `range`.
    pub(crate) fn len_without(&self, range: VpnRange) -> usize {
        let mut len = self.len();
        for vad in self.overlapping(range) {
            len -= 1;
            len += usize::from(vad.range.start() < range.start());
            len += usize::from(vad.range.end() > range.end());
        }
        len
    }

    /// Makes a hole at `range` and gives back what was there, rising; mappings that reach across an
    /// edge are cut.
    pub(crate) fn carve(&mut self, range: VpnRange) -> Vec<Vad<B>> {
        self.changes += 1;
        self.cut(range.start().get());
        self.cut(range.end());
        let keys: Vec<Vpn> = self
            .map
            .range(range.start()..=range.last())
            .map(|(k, _)| *k)
            .collect();
        let carved: Vec<_> = keys.iter().filter_map(|key| self.map.remove(key)).collect();
        self.pages -= carved.iter().map(|vad| vad.range.count()).sum::<u64>();
        self.charged -= carved.iter().map(Vad::charge).sum::<u64>();
        if !carved.is_empty() {
            let above = self
                .map
                .range(range.start()..)
                .next()
                .map(|(key, _)| key.get());
            self.placer.freed(above);
        }
        carved
    }

    /// Adds a mapping where nothing is mapped, and joins it with its neighbours if they are alike.
    pub(crate) fn insert(&mut self, mut vad: Vad<B>) {
        debug_assert!(self.is_free(vad.range), "mappings overlap");
        self.changes += 1;
        self.pages += vad.range.count();
        self.charged += vad.charge();
        let below = self.last_below(vad.range.start().get());
        if let Some(below) = below.filter(|below| below.continues_into(&vad)) {
            let (start, around) = (below.range.start(), below.around);
            let kind = below.kind.clone();
            self.map.remove(&start);
            vad = Vad {
                range: sub_range(start, vad.range.end()),
                kind,
                around,
                ..vad
            };
        }
        let above = Vpn::new(vad.range.end()).and_then(|end| self.map.get(&end));
        if let Some(above) = above.filter(|above| vad.continues_into(above)) {
            let (start, end) = (above.range.start(), above.range.end());
            self.map.remove(&start);
            vad.range = sub_range(vad.range.start(), end);
        }
        self.map.insert(vad.range.start(), vad);
    }

    /// Makes page number `at` the first of its mapping, if it is inside one.
    fn cut(&mut self, at: u64) {
        let Some(at) = Vpn::new(at) else { return };
        let Some(vad) = self.find_mut(at).filter(|vad| vad.range.start() != at) else {
            return;
        };
        let upper = vad.split_off(at);
        self.map.insert(at, upper);
    }
}

#[cfg(test)]
mod tests {
    use super::super::{FaultAround, MapKind, Sharing, VadFlags, VadTag};
    use super::*;
    use crate::proto::{Section, SectionTable};
    use crate::section::Charge;

    fn range(start: u64, count: u64) -> VpnRange {
        VpnRange::new(Vpn::new(start).expect("page"), count).expect("range")
    }

    fn anon(start: u64, count: u64) -> Vad<u8> {
        let (flags, tag, around) = (VadFlags::empty(), VadTag(0), FaultAround::default());
        let (range, prot, kind) = (range(start, count), Prot::READ, MapKind::Anonymous);
        Vad {
            range,
            prot,
            kind,
            flags,
            tag,
            around,
        }
    }

    fn view(section: &Section<u8>, start: u64, count: u64, offset: u64) -> Vad<u8> {
        Vad {
            kind: MapKind::View {
                section: section.clone(),
                offset,
                sharing: Sharing::Private,
            },
            ..anon(start, count)
        }
    }

    fn section() -> Section<u8> {
        let made = SectionTable::default().create(Some(1), (0, None), (Charge::Uncharged, None));
        made.expect("a section")
    }

    #[test]
    fn hole_filled_again_is_one_mapping() {
        for whole in [anon(10, 20), view(&section(), 10, 20, 4096)] {
            let mut set = VadSet::default();
            set.insert(whole);
            let carved = set.carve(range(15, 3));
            assert_eq!((set.len(), set.pages(), carved.len()), (2, 17, 1));
            carved.into_iter().for_each(|vad| set.insert(vad));
            assert_eq!((set.len(), set.pages()), (1, 20));
        }
    }

    #[test]
    fn unlike_neighbours_stay_apart() {
        let mut set = VadSet::default();
        let file = section();
        set.insert(view(&file, 10, 2, 0));
        set.insert(view(&file, 12, 2, 4096));
        set.insert(anon(14, 2));
        set.insert(Vad {
            prot: Prot::WRITE,
            ..anon(16, 2)
        });
        assert_eq!(set.len(), 4);
    }

    #[test]
    fn predicted_length_is_the_length_after_carving() {
        let mut set = VadSet::default();
        set.insert(anon(10, 10));
        set.insert(view(&section(), 20, 10, 0));
        for (hole, expected) in [(range(12, 2), 3), (range(10, 10), 1), (range(15, 10), 2)] {
            assert_eq!(set.len_without(hole), expected);
            let mut carved = set.clone();
            carved.carve(hole);
            assert_eq!(carved.len(), expected);
        }
    }

    #[test]
    fn prefix_stops_at_the_first_hole() {
        let mut set = VadSet::default();
        set.insert(anon(10, 2));
        set.insert(view(&section(), 12, 2, 0));
        set.insert(anon(16, 2));
        assert_eq!(set.covered_prefix(range(11, 9)), Some(range(11, 3)));
        assert_eq!(set.covered_prefix(range(14, 9)), None);
    }
}
