//! One zone of the pool: its entries and its lists.
//!
//! Entries of frames that were never used do not exist yet: the vector grows as the pool is used for
//! the first time, so a manager of a million frames is made at once. Nor need these frames be reachable for guests: those of a
//! zone that opens as it is used ([`Zone::opening`]) are opened in runs that get longer ([`FrameStore::open`]).

use alloc::vec::Vec;

use super::entry::{NO_LINK, Original, Owner, PfnEntry, PfnFlags, PfnState};
use crate::addr::{Pfn, PfnRange};
use crate::backend::FrameStore;

/// Frames that are opened at first; then as many as there are, so that a zone of any size takes few runs.
const FIRST_RUN: u32 = 2048;
/// Runs end at a multiple of this: a large frame is in one.
const RUN_END: u32 = 512;

/// A doubly linked list through the frames' entries.
#[derive(Clone, Copy, Debug)]
struct List {
    head: u32,
    tail: u32,
    len: u32,
}

impl List {
    const EMPTY: Self = Self {
        head: NO_LINK,
        tail: NO_LINK,
        len: 0,
    };
}

/// A zone of frames.
#[derive(Debug)]
pub(crate) struct Zone {
    range: PfnRange,
    /// Frames of the range, from its start, that guests can reach: not fewer than were used.
    opened: u32,
    /// Entries of the frames used so far; frames past the end are untouched.
    entries: Vec<PfnEntry>,
    /// By `PfnState as usize`; the last two stay empty.
    lists: [List; PfnState::COUNT],
    /// Touched frames in each state, by `PfnState as usize`.
    states: [u32; PfnState::COUNT],
}

impl Zone {
    /// A zone whose frames all read as zero; `None` if its entries do not fit in memory.
    pub(crate) fn new(range: PfnRange) -> Option<Self> {
        let mut entries = Vec::new();
        entries.try_reserve_exact(range.count as usize).ok()?;
        Some(Self {
            range,
            opened: range.count,
            entries,
            lists: [List::EMPTY; PfnState::COUNT],
            states: [0; PfnState::COUNT],
        })
    }

    /// The same, of frames that guests cannot reach before they are opened.
    pub(crate) fn opening(range: PfnRange) -> Option<Self> {
        let zone = Self::new(range)?;
        Some(Self { opened: 0, ..zone })
    }

    /// Opens a run of frames. If that is refused, the zone ends here.
    fn open_more(&mut self, store: &impl FrameStore) -> bool {
        let start = self.range.start.get() + self.opened;
        let wanted = start.saturating_add(self.opened.max(FIRST_RUN));
        let end = (wanted.checked_next_multiple_of(RUN_END).unwrap_or(wanted))
            .min(self.range.start.get() + self.range.count);
        let run = PfnRange {
            start: Pfn::new(start),
            count: end - start,
        };
        let opened = store.open(run);
        if opened {
            self.opened += run.count;
        } else {
            self.range.count = self.opened;
        }
        opened
    }

    #[inline]
    pub(crate) fn range(&self) -> PfnRange {
        self.range
    }

    /// Frames in a state; untouched ones are zeroed.
    pub(crate) fn in_state(&self, state: PfnState) -> u32 {
        let untouched = if state == PfnState::Zeroed {
            self.untouched()
        } else {
            0
        };
        self.states[state as usize] + untouched
    }

    /// Frames that could be taken now.
    pub(crate) fn available(&self) -> u32 {
        self.in_state(PfnState::Zeroed)
            + self.in_state(PfnState::Free)
            + self.in_state(PfnState::Standby)
    }

    /// Frames that were never used.
    pub(crate) fn untouched(&self) -> u32 {
        self.range.count - self.entries.len() as u32
    }

    /// The entry of a frame of this zone; what an untouched frame's entry would be if it has none.
    #[inline]
    pub(crate) fn entry(&self, pfn: Pfn) -> &PfnEntry {
        self.entries
            .get(self.slot(pfn))
            .unwrap_or(&PfnEntry::UNTOUCHED)
    }

    /// The entry of a frame that was used. Fields may be changed, but the state only here.
    #[inline]
    pub(super) fn entry_mut(&mut self, pfn: Pfn) -> &mut PfnEntry {
        let slot = self.slot(pfn);
        &mut self.entries[slot]
    }

    /// Every touched frame.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (Pfn, &PfnEntry)> {
        let first = self.range.start.get();
        self.entries
            .iter()
            .enumerate()
            .map(move |(n, e)| (Pfn::new(first + n as u32), e))
    }

    /// The frames of a list, from its head; stops after as many as there are frames.
    pub(crate) fn listed(&self, state: PfnState) -> impl Iterator<Item = Pfn> {
        let mut next = self.lists[state as usize].head;
        let step = move || {
            let entry = self.entries.get(next as usize)?;
            let pfn = self.pfn(next);
            next = entry.links().0;
            Some(pfn)
        };
        core::iter::from_fn(step).take(self.entries.len() + 1)
    }

    /// The length a list believes it has.
    pub(crate) fn list_len(&self, state: PfnState) -> u32 {
        self.lists[state as usize].len
    }

    /// Whether a list's links agree in both directions.
    pub(crate) fn is_linked_both_ways(&self, state: PfnState) -> bool {
        let mut before = NO_LINK;
        let list = &self.lists[state as usize];
        for pfn in self.listed(state) {
            if self.entry(pfn).links().1 != before {
                return false;
            }
            before = self.slot(pfn) as u32;
        }
        list.tail == before
    }

    /// Changes the state of a frame that is on no list and goes to none.
    pub(super) fn set_state(&mut self, pfn: Pfn, state: PfnState) {
        debug_assert!(!state.is_listed() && !self.entry(pfn).state().is_listed());
        self.count_state(pfn, state);
    }

    fn count_state(&mut self, pfn: Pfn, state: PfnState) {
        let entry = self.entry_mut(pfn);
        let old = entry.state();
        entry.set_state(state);
        self.states[old as usize] -= 1;
        self.states[state as usize] += 1;
    }

    /// Takes the first frame of a list: in flight, with one reference of the taker's.
    pub(super) fn pop(&mut self, state: PfnState) -> Option<Pfn> {
        let head = self.lists[state as usize].head;
        if head == NO_LINK {
            return None;
        }
        let pfn = self.pfn(head);
        self.unlink(pfn);
        *self.entry_mut(pfn).refs_mut() = 1;
        Some(pfn)
    }

    /// Takes a frame off its list: in flight, with no count at all yet.
    pub(super) fn unlink(&mut self, pfn: Pfn) {
        let entry = *self.entry(pfn);
        debug_assert!(entry.state().is_listed(), "{pfn:?} is on no list");
        let (next, prev) = entry.links();
        match self.entries.get_mut(prev as usize) {
            Some(before) => before.set_next(next),
            None => self.lists[entry.state() as usize].head = next,
        }
        match self.entries.get_mut(next as usize) {
            Some(after) => after.set_prev(prev),
            None => self.lists[entry.state() as usize].tail = prev,
        }
        self.lists[entry.state() as usize].len -= 1;
        self.count_state(pfn, PfnState::InFlight);
        self.entry_mut(pfn).set_counts(0, 0);
    }

    /// Takes the next frame that was never used.
    pub(super) fn take_untouched(&mut self, store: &impl FrameStore) -> Option<Pfn> {
        if self.untouched() == 0 {
            return None;
        }
        if self.entries.len() as u32 == self.opened
            && !cfg!(mutant = "never_opened")
            && !self.open_more(store)
        {
            return None;
        }
        let pfn = self.pfn(self.entries.len() as u32);
        let mut entry = PfnEntry::UNTOUCHED;
        entry.set_state(PfnState::InFlight);
        entry.set_counts(0, 1);
        self.entries.push(entry);
        self.states[PfnState::InFlight as usize] += 1;
        Some(pfn)
    }

    /// Puts a frame nobody owns or references on the zeroed or the free list: at its head, because what
    /// was used last is still in the caches.
    pub(super) fn push_unowned(&mut self, pfn: Pfn, state: PfnState) {
        debug_assert!(matches!(state, PfnState::Zeroed | PfnState::Free));
        let entry = self.entry_mut(pfn);
        debug_assert!(
            !matches!(entry.original(), Original::Slot(_)),
            "a freed frame keeps a slot of the page file"
        );
        entry.owner = Owner::None;
        entry.flags = PfnFlags::empty();
        *entry.write_pins_mut() = 0;
        entry.set_original(Original::Zero);
        self.link(pfn, state, NO_LINK);
    }

    /// Puts an owned frame nobody references at the end of the standby list or of one of the modified lists: they
    /// are taken from the front, the oldest first.
    pub(super) fn push_owned(&mut self, pfn: Pfn, state: PfnState) {
        debug_assert!(matches!(
            state,
            PfnState::Standby | PfnState::Modified | PfnState::ModifiedNoWrite
        ));
        let tail = self.lists[state as usize].tail;
        self.link(pfn, state, tail);
    }

    /// Links a frame in behind `prev`: the tail of the list, or nothing for its head.
    fn link(&mut self, pfn: Pfn, state: PfnState, prev: u32) {
        let entry = self.entry(pfn);
        debug_assert_eq!(
            (entry.share(), entry.refs()),
            (0, 0),
            "a frame in use was put on a list"
        );
        let slot = self.slot(pfn) as u32;
        let list = &mut self.lists[state as usize];
        let next = if prev == NO_LINK { list.head } else { NO_LINK };
        if prev == NO_LINK {
            list.head = slot;
        }
        if next == NO_LINK {
            list.tail = slot;
        }
        list.len += 1;
        if let Some(before) = self.entries.get_mut(prev as usize) {
            before.set_next(slot);
        }
        if let Some(after) = self.entries.get_mut(next as usize) {
            after.set_prev(slot);
        }
        self.count_state(pfn, state);
        self.entry_mut(pfn).set_counts(next, prev);
    }

    #[inline]
    fn pfn(&self, slot: u32) -> Pfn {
        Pfn::new(self.range.start.get() + slot)
    }

    #[inline]
    fn slot(&self, pfn: Pfn) -> usize {
        debug_assert!(
            self.range.contains(pfn),
            "{pfn:?} is not in the zone {:?}",
            self.range
        );
        pfn.get().wrapping_sub(self.range.start.get()) as usize
    }
}

#[cfg(test)]
mod tests {
    use parking_lot::Mutex;

    use super::*;
    use crate::addr::EntryIndex;

    /// Remembers what was opened, and refuses what ends beyond a frame. It has no content.
    struct Opening {
        runs: Mutex<Vec<(u32, u32)>>,
        end: u32,
    }

    impl Opening {
        fn until(end: u32) -> Self {
            Self {
                runs: Mutex::default(),
                end,
            }
        }
    }

    impl FrameStore for Opening {
        fn open(&self, frames: PfnRange) -> bool {
            let end = frames.start.get() + frames.count;
            self.runs.lock().push((frames.start.get(), end));
            end <= self.end
        }
        fn load(&self, _: Pfn, _: EntryIndex) -> u64 {
            unreachable!("no content")
        }
        fn swap(&self, _: Pfn, _: EntryIndex, _: u64) -> u64 {
            unreachable!("no content")
        }
        fn compare_exchange(&self, _: Pfn, _: EntryIndex, _: u64, _: u64) -> Result<u64, u64> {
            unreachable!("no content")
        }
        fn zero(&self, _: Pfn) {}
        fn copy(&self, _: Pfn, _: Pfn) {}
        fn read(&self, _: Pfn, _: usize, _: &mut [u8]) {}
        fn write(&self, _: Pfn, _: usize, _: &[u8]) {}
    }

    fn zone(frames: u32) -> Zone {
        let start = Pfn::new(100);
        let mut zone = Zone::new(PfnRange {
            start,
            count: frames,
        })
        .expect("entries");
        for _ in 0..frames {
            let pfn = zone.take_untouched(&Opening::until(0)).expect("untouched");
            *zone.entry_mut(pfn).refs_mut() = 0;
        }
        zone
    }

    fn standby(zone: &Zone) -> Vec<u32> {
        assert!(zone.is_linked_both_ways(PfnState::Standby));
        zone.listed(PfnState::Standby).map(Pfn::get).collect()
    }

    #[test]
    fn owned_frames_leave_oldest_first_and_from_the_middle() {
        let mut zone = zone(5);
        (100..105).for_each(|n| zone.push_owned(Pfn::new(n), PfnState::Standby));
        zone.unlink(Pfn::new(102));
        assert_eq!(standby(&zone), [100, 101, 103, 104]);
        assert_eq!(zone.pop(PfnState::Standby), Some(Pfn::new(100)));
        zone.unlink(Pfn::new(104));
        assert_eq!(standby(&zone), [101, 103]);
        zone.push_owned(Pfn::new(102), PfnState::Standby);
        assert_eq!(standby(&zone), [101, 103, 102]);
        assert_eq!(zone.in_state(PfnState::InFlight), 2);
    }

    #[test]
    fn frames_are_opened_in_longer_and_longer_runs_before_they_are_used() {
        let range = PfnRange {
            start: Pfn::new(700),
            count: 20_000,
        };
        let mut zone = Zone::opening(range).expect("entries");
        assert_eq!((zone.opened, zone.available()), (0, 20_000));
        let store = Opening::until(u32::MAX);
        for n in 0..range.count {
            let pfn = zone.take_untouched(&store).expect("untouched");
            let opened = store.runs.lock().last().copied().expect("a run");
            assert_eq!(pfn.get(), 700 + n);
            assert!(pfn.get() < opened.1, "{pfn:?} is beyond {opened:?}");
        }
        let runs = [(700, 3072), (3072, 5632), (5632, 10_752), (10_752, 20_700)];
        assert_eq!(*store.runs.lock(), runs);
        assert_eq!((zone.take_untouched(&store), zone.opened), (None, 20_000));
    }

    #[test]
    fn zone_ends_where_no_more_can_be_opened() {
        let range = PfnRange {
            start: Pfn::new(0),
            count: 20_000,
        };
        let mut zone = Zone::opening(range).expect("entries");
        let store = Opening::until(5000);
        for _ in 0..4096 {
            assert!(zone.take_untouched(&store).is_some());
        }
        assert_eq!(zone.available(), 20_000 - 4096);
        assert_eq!(zone.take_untouched(&store), None);
        assert_eq!((zone.available(), zone.range().count), (0, 4096));
        assert_eq!(zone.take_untouched(&store), None);
        assert_eq!(store.runs.lock().len(), 3, "it is not asked again");
    }

    #[test]
    fn unowned_frames_leave_newest_first() {
        let mut zone = zone(3);
        (100..103).for_each(|n| zone.push_unowned(Pfn::new(n), PfnState::Free));
        assert!(zone.is_linked_both_ways(PfnState::Free));
        assert_eq!(zone.pop(PfnState::Free), Some(Pfn::new(102)));
        assert_eq!(
            (zone.list_len(PfnState::Free), zone.available()),
            (2, 2),
            "the taken frame is counted"
        );
    }
}
