//! `--guard-alloc`: the special pool (system 10) for guests' anonymous mappings.
//!
//! * A mapping that the guest does not place itself gets an inaccessible page right before and right
//!   after it, so that the first access beyond it faults at its instruction.
//! * The bytes from the requested length to the end of the last page hold a pattern. A byte that
//!   changed is reported when the range is unmapped, remapped, or its process ends or executes.
//! * Unmapped, it stays inaccessible and is not given out again until much else has been unmapped
//!   (`LIMITS` below).
//! * The heap (brk) has such pages and such a pattern too, but is given out again: its place is the
//!   guest's own choice.
//!
//! What it finds is told in words on standard error and counted; a fault is then the guest's
//! SIGSEGV as always, a changed byte changes nothing for the guest. It is refused, and that is
//! counted, for mappings made while frames are short.
//!
//! Known holes: it sees mappings, not what a `malloc` in the guest cuts from them. The pattern is not
//! checked where the guest may not read, or forks get zeroes. Guard pages count against `RLIMIT_AS`,
//! and a mapping can no longer grow where it is: `mremap` without leave to move fails.

use std::collections::BTreeMap;

use shadow_mm::{Quarantine, QuarantineLimits, VadTag, VpnRange};

use crate::linux::exec::{PAGE, page_up};
use crate::memory::GuardCounters;

mod calls;
mod slack;

pub(super) use calls::{
    after_brk, before_brk, discarded, kept, map, moved, moving, reserve, unmap,
};
pub use slack::check_all;

/// Tag of a guard page.
pub const TAG_GUARD: VadTag = VadTag(0x1001);
/// Tag of a range in quarantine.
pub const TAG_FREED: VadTag = VadTag(0x1002);

/// What an address space keeps in quarantine: with the guard pages, few enough ranges that the
/// guest has most of those it may have.
const LIMITS: QuarantineLimits = QuarantineLimits {
    entries: 4096,
    pages: 1 << 24,
};

/// A mapping with guard pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Allocation {
    pages: u64,
    /// What was asked for; the rest of the last page is slack.
    bytes: u64,
    /// Whether the pages before and after it are its guards.
    guards: (bool, bool),
    /// Whether the slack has the pattern.
    patterned: bool,
}

/// A part of an allocation that was unmapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Freed {
    /// What was unmapped.
    data: (u64, u64),
    /// The same and its guard pages.
    whole: (u64, u64),
}

/// What an address space's guards know. Protected by a lock of its own.
#[derive(Clone, Debug)]
pub struct GuardHeap {
    /// Who is spoken of; 0 before that is known.
    pid: i32,
    /// By first page.
    live: BTreeMap<u64, Allocation>,
    freed: Quarantine<Freed>,
    /// Whether the heap's slack has the pattern.
    brk_patterned: bool,
}

impl Default for GuardHeap {
    fn default() -> Self {
        Self {
            pid: 0,
            live: BTreeMap::new(),
            freed: Quarantine::new(LIMITS),
            brk_patterned: false,
        }
    }
}

impl GuardHeap {
    /// The address space is this process's.
    pub fn set_pid(&mut self, pid: i32) {
        self.pid = pid;
    }

    /// Says what a fault at an address was about, if guards caused it.
    pub fn fault(&self, counters: &GuardCounters, address: u64) {
        if let Some(text) = self.explain(address)
            && GuardCounters::say(&counters.faults)
        {
            tracing::error!(pid = self.pid, "guard-alloc: {text}");
        }
    }

    /// Takes the parts of allocations that lie in the pages `[start, end)` out, and gives them back; what
    /// is left of the allocations stays.
    fn take(&mut self, start: u64, end: u64) -> Vec<Freed> {
        let mut taken = Vec::new();
        let hit: Vec<_> = self
            .live
            .range(..end)
            .rev()
            .map(|(first, a)| (*first, *a))
            .take_while(|(first, a)| first + a.pages > start)
            .collect();
        for (first, a) in hit.into_iter().rev() {
            self.live.remove(&first);
            let last = first + a.pages;
            let (from, to) = (first.max(start), last.min(end));
            let whole = (
                from - u64::from(from == first && a.guards.0),
                to + u64::from(to == last && a.guards.1),
            );
            taken.push(Freed {
                data: (from, to),
                whole,
            });
            if first < from {
                let front = Allocation {
                    pages: from - first,
                    bytes: (from - first) * PAGE,
                    guards: (a.guards.0, false),
                    patterned: false,
                };
                self.live.insert(first, front);
            }
            if to < last {
                let tail = Allocation {
                    pages: last - to,
                    bytes: a.bytes - (to - first) * PAGE,
                    guards: (false, a.guards.1),
                    ..a
                };
                self.live.insert(to, tail);
            }
        }
        taken
    }

    /// The slack of every allocation that has the pattern and ends in the range: where it starts, and
    /// the allocation's address and length.
    fn slacks(&self, range: Option<VpnRange>) -> Vec<Slack> {
        let inside =
            |last: u64| range.is_none_or(|range| range.start().get() <= last && last < range.end());
        let patterned = self.live.iter().filter(|(_, a)| a.patterned);
        patterned
            .filter(|(first, a)| inside(**first + a.pages - 1))
            .map(|(first, a)| Slack::new(first * PAGE, a.bytes))
            .collect()
    }

    /// What lies at an address that may not be accessed, in words.
    fn explain(&self, address: u64) -> Option<String> {
        let page = address / PAGE;
        if let Some((first, a)) = self.live.range(..=page).next_back()
            && a.guards.1
            && first + a.pages == page
        {
            let (start, bytes) = (first * PAGE, a.bytes);
            let beyond = address - start - bytes;
            return Some(format!(
                "{address:#x} is {beyond} bytes behind the end of the {bytes} bytes mapped at {start:#x}"
            ));
        }
        if let Some((first, a)) = self.live.range(page + 1..).next()
            && a.guards.0
            && *first == page + 1
        {
            let (start, bytes) = (first * PAGE, a.bytes);
            return Some(format!(
                "{address:#x} is {} bytes before the {bytes} bytes mapped at {start:#x}",
                start - address
            ));
        }
        let freed = self.freed.iter().rev();
        freed
            .filter(|f| (f.whole.0..f.whole.1).contains(&page))
            .map(|f| {
                let (start, bytes) = (f.data.0 * PAGE, (f.data.1 - f.data.0) * PAGE);
                format!(
                    "{address:#x} belongs to the {bytes} bytes at {start:#x} that were unmapped"
                )
            })
            .next()
    }
}

/// The bytes between the length asked for and the end of the page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Slack {
    /// The allocation.
    start: u64,
    bytes: u64,
}

impl Slack {
    fn new(start: u64, bytes: u64) -> Self {
        Self { start, bytes }
    }

    fn at(self) -> u64 {
        self.start + self.bytes
    }

    fn length(self) -> usize {
        (page_up(self.at()) - self.at()) as usize
    }
}

#[cfg(test)]
mod tests;
