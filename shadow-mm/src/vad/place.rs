//! Where a new mapping goes: the highest hole that fits.
//!
//! A search walks the mappings downwards from the limit. To keep that short when many small mappings
//! lie packed below the limit, the set remembers where the last search ended and the largest hole it
//! passed over: a request larger than that hole need not look above that place again.

use super::{Vad, VadSet};
use crate::addr::Vpn;

/// The memory of the last search.
#[derive(Clone, Debug, Default)]
pub(crate) struct Placer {
    /// The limit the memory is about; zero: none.
    below: u64,
    /// No hole larger than `passed` lies between here and the limit.
    cursor: u64,
    passed: u64,
}

impl Placer {
    /// A hole was made whose upper end is `above`, or the end of everything.
    pub(super) fn freed(&mut self, above: Option<u64>) {
        match above {
            Some(above) if above < self.below => self.cursor = self.cursor.max(above),
            Some(_) | None => self.below = 0,
        }
    }
}

impl<B: Clone + Eq> VadSet<B> {
    /// The highest place for `count` pages whose end is at most page number `below`, at or above `min`.
    pub(crate) fn place(&mut self, count: u64, below: u64, min: Vpn) -> Option<Vpn> {
        let remembered = self.placer.below == below && count > self.placer.passed;
        let start = if remembered {
            self.placer.cursor
        } else {
            below
        };
        let passed = if remembered { self.placer.passed } else { 0 };
        self.search(count, (start, passed), below, min)
    }

    fn search(&mut self, count: u64, from: (u64, u64), below: u64, min: Vpn) -> Option<Vpn> {
        let (mut end, mut passed) = from;
        loop {
            let next = self.last_below(end);
            let floor = next.map_or(min.get(), |vad: &Vad<B>| vad.range.end().max(min.get()));
            let hole = end.saturating_sub(floor);
            if hole >= count {
                let start = end - count;
                self.placer = Placer {
                    below,
                    cursor: end,
                    passed,
                };
                return Vpn::new(start);
            }
            passed = passed.max(hole);
            match next {
                Some(vad) if vad.range.start() > min => end = vad.range.start().get(),
                Some(_) | None => return None,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{FaultAround, MapKind, VadFlags, VadTag};
    use super::*;
    use crate::access::Prot;
    use crate::addr::VpnRange;
    use proptest::prelude::*;

    fn vad(start: u64, count: u64, tag: u32) -> Vad<u8> {
        let range = VpnRange::new(Vpn::new(start).expect("page"), count).expect("range");
        let (flags, around) = (VadFlags::empty(), FaultAround::default());
        Vad {
            range,
            prot: Prot::READ,
            kind: MapKind::Anonymous,
            flags,
            tag: VadTag(tag),
            around,
        }
    }

    fn place(set: &mut VadSet<u8>, count: u64, below: u64) -> Option<u64> {
        set.place(count, below, Vpn::new(16).expect("page"))
            .map(Vpn::get)
    }

    #[test]
    fn full_space_has_no_place() {
        let mut set = VadSet::default();
        set.insert(vad(16, 84, 0));
        assert_eq!(place(&mut set, 1, 100), None);
        assert_eq!(place(&mut set, u64::MAX, 100), None);
    }

    proptest! {
        /// The remembered search finds the same place as a search that forgets.
        #[test]
        fn memory_never_changes_the_answer(
            ops in prop::collection::vec((0u8..3, 16u64..200, 1u64..12), 1..120)
        ) {
            let mut set: VadSet<u8> = VadSet::default();
            for (n, (op, at, count)) in ops.into_iter().enumerate() {
                if op == 0 {
                    set.carve(vad(at, count, 0).range);
                    continue;
                }
                let below = if op == 1 { 200 } else { 150 };
                let mut forgetful = set.clone();
                forgetful.placer = Placer::default();
                let found = place(&mut set, count, below);
                prop_assert_eq!(found, place(&mut forgetful, count, below));
                if let Some(start) = found {
                    set.insert(vad(start, count, n as u32));
                }
            }
        }
    }
}
