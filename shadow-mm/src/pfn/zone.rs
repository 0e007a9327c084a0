//! One zone of the pool: its entries and its lists.
//!
//! Entries of frames that were never used do not exist yet: the vector grows as the pool is used for
//! the first time, so a manager of a million frames is made at once.

use alloc::vec::Vec;

use super::entry::{NO_LINK, Owner, PfnEntry, PfnFlags, PfnState};
use crate::addr::{Pfn, PfnRange};

/// A singly linked list through [`PfnEntry::next`]; last in, first out, which keeps caches warm.
#[derive(Debug)]
pub(crate) struct List {
    head: u32,
    len: u32,
}

impl List {
    const EMPTY: Self = Self {
        head: NO_LINK,
        len: 0,
    };
}

/// A zone of frames.
#[derive(Debug)]
pub(crate) struct Zone {
    range: PfnRange,
    /// Entries of the frames used so far; frames past the end are untouched.
    entries: Vec<PfnEntry>,
    zeroed: List,
    free: List,
    /// Touched frames in each state, by `PfnState as usize`.
    states: [u32; PfnState::COUNT],
}

impl Zone {
    /// A zone whose frames all read as zero; `None` if its entries do not fit in memory.
    pub(crate) fn new(range: PfnRange) -> Option<Self> {
        let mut entries = Vec::new();
        entries.try_reserve_exact(range.count as usize).ok()?;
        let states = [0; PfnState::COUNT];
        Some(Self {
            range,
            entries,
            zeroed: List::EMPTY,
            free: List::EMPTY,
            states,
        })
    }

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
        self.in_state(PfnState::Zeroed) + self.in_state(PfnState::Free)
    }

    /// Frames that were never used.
    pub(crate) fn untouched(&self) -> u32 {
        self.range.count - self.entries.len() as u32
    }

    /// The entry of a frame of this zone; what an untouched frame's entry would be if it has none.
    pub(crate) fn entry(&self, pfn: Pfn) -> &PfnEntry {
        self.entries
            .get(self.slot(pfn))
            .unwrap_or(&PfnEntry::UNTOUCHED)
    }

    /// The entry of a frame in use. Fields may be changed, but the state only by [`Self::set_state`].
    pub(crate) fn entry_mut(&mut self, pfn: Pfn) -> &mut PfnEntry {
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

    /// The frames of the zeroed or the free list, in order; stops after as many as there are frames.
    pub(crate) fn listed(&self, state: PfnState) -> impl Iterator<Item = Pfn> {
        let mut next = match state {
            PfnState::Zeroed => self.zeroed.head,
            PfnState::Free => self.free.head,
            PfnState::Active | PfnState::InFlight => NO_LINK,
        };
        let step = move || {
            let entry = self.entries.get(next as usize)?;
            let pfn = Pfn::new(self.range.start.get() + next);
            next = entry.next;
            Some(pfn)
        };
        core::iter::from_fn(step).take(self.entries.len() + 1)
    }

    /// The length a list believes it has.
    pub(crate) fn list_len(&self, state: PfnState) -> u32 {
        match state {
            PfnState::Zeroed => self.zeroed.len,
            PfnState::Free => self.free.len,
            PfnState::Active | PfnState::InFlight => 0,
        }
    }

    /// Changes a frame's state; lists are the caller's business.
    pub(crate) fn set_state(&mut self, pfn: Pfn, state: PfnState) {
        let slot = self.slot(pfn);
        let old = core::mem::replace(&mut self.entries[slot].state, state);
        self.states[old as usize] -= 1;
        self.states[state as usize] += 1;
    }

    /// Takes the first frame of the zeroed list.
    pub(super) fn pop_zeroed(&mut self) -> Option<Pfn> {
        let pfn = pop(&mut self.zeroed, &mut self.entries, self.range)?;
        self.hold(pfn);
        Some(pfn)
    }

    /// Takes the first frame of the free list.
    pub(super) fn pop_free(&mut self) -> Option<Pfn> {
        let pfn = pop(&mut self.free, &mut self.entries, self.range)?;
        self.hold(pfn);
        Some(pfn)
    }

    /// Takes the next frame that was never used.
    pub(super) fn take_untouched(&mut self) -> Option<Pfn> {
        if self.untouched() == 0 {
            return None;
        }
        let pfn = Pfn::new(self.range.start.get() + self.entries.len() as u32);
        self.entries.push(PfnEntry::UNTOUCHED);
        self.states[PfnState::Zeroed as usize] += 1;
        self.hold(pfn);
        Some(pfn)
    }

    /// Puts a frame nobody references on the zeroed or the free list.
    pub(super) fn push(&mut self, pfn: Pfn, state: PfnState) {
        let slot = self.slot(pfn);
        let list = if state == PfnState::Zeroed {
            &mut self.zeroed
        } else {
            &mut self.free
        };
        let entry = &mut self.entries[slot];
        debug_assert_eq!(
            (entry.share, entry.refs),
            (0, 0),
            "a frame in use was put on a list"
        );
        entry.owner = Owner::None;
        entry.flags = PfnFlags::empty();
        entry.write_pins = 0;
        entry.next = list.head;
        list.head = slot as u32;
        list.len += 1;
        self.set_state(pfn, state);
    }

    /// A frame just off a list belongs to the operation that took it.
    fn hold(&mut self, pfn: Pfn) {
        let entry = self.entry_mut(pfn);
        entry.next = NO_LINK;
        entry.refs = 1;
        self.set_state(pfn, PfnState::InFlight);
    }

    fn slot(&self, pfn: Pfn) -> usize {
        debug_assert!(
            self.range.contains(pfn),
            "{pfn:?} is not in the zone {:?}",
            self.range
        );
        pfn.get().wrapping_sub(self.range.start.get()) as usize
    }
}

fn pop(list: &mut List, entries: &mut [PfnEntry], range: PfnRange) -> Option<Pfn> {
    let entry = entries.get(list.head as usize)?;
    let pfn = Pfn::new(range.start.get() + list.head);
    list.head = entry.next;
    list.len -= 1;
    Some(pfn)
}
