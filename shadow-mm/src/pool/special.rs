//! What the special pool (system 10) consists of wherever it is used: the pattern in the slack of an
//! allocation, and the quarantine that keeps freed ranges from being used again.

use alloc::collections::VecDeque;

/// The byte slack is filled with.
pub const SLACK_BYTE: u8 = 0xa9;

/// Where slack was stored to: the first byte that is not the pattern's.
#[must_use]
pub fn slack_damage(slack: &[u8]) -> Option<usize> {
    let whole = |byte: &u8| *byte == SLACK_BYTE;
    if cfg!(mutant = "unchecked_slack") {
        return None;
    }
    slack.iter().position(|byte| !whole(byte))
}

/// How much a quarantine holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct QuarantineLimits {
    /// Ranges.
    pub entries: usize,
    /// Pages of all of them together.
    pub pages: u64,
}

/// Freed ranges that nobody may use yet, oldest first.
#[derive(Clone, Debug)]
pub struct Quarantine<T> {
    limits: QuarantineLimits,
    queue: VecDeque<(T, u64)>,
    pages: u64,
}

impl<T> Quarantine<T> {
    /// An empty one.
    #[must_use]
    pub fn new(limits: QuarantineLimits) -> Self {
        Self {
            limits,
            queue: VecDeque::new(),
            pages: 0,
        }
    }

    /// Takes a freed range in. The next calls of [`Self::evict`] say which must leave for it.
    pub fn push(&mut self, range: T, pages: u64) {
        self.pages += pages;
        self.queue.push_back((range, pages));
    }

    /// The oldest range, if the quarantine holds more than it may.
    pub fn evict(&mut self) -> Option<T> {
        let full = self.queue.len() > self.limits.entries || self.pages > self.limits.pages;
        full.then(|| self.pop()).flatten()
    }

    /// The oldest range.
    pub fn pop(&mut self) -> Option<T> {
        let (range, pages) = self.queue.pop_front()?;
        self.pages -= pages;
        Some(range)
    }

    /// What is in it, oldest first.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = &T> {
        self.queue.iter().map(|(range, _)| range)
    }

    /// Pages of all ranges in it.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.pages
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_foreign_byte_is_found() {
        let mut slack = [SLACK_BYTE; 9];
        assert_eq!(slack_damage(&slack), None);
        slack[4] = 0;
        slack[7] = 1;
        assert_eq!(slack_damage(&slack), Some(4));
    }

    #[test]
    fn oldest_leave_when_entries_or_pages_are_too_many() {
        let limits = QuarantineLimits {
            entries: 2,
            pages: 10,
        };
        let mut quarantine = Quarantine::new(limits);
        for (name, pages) in [("a", 1), ("b", 1), ("c", 1)] {
            quarantine.push(name, pages);
        }
        assert_eq!((quarantine.evict(), quarantine.evict()), (Some("a"), None));
        quarantine.push("d", 9);
        assert_eq!(quarantine.evict(), Some("b"));
        assert_eq!(quarantine.evict(), None);
        assert_eq!(quarantine.pages(), 10);
        quarantine.push("larger than all", 11);
        assert_eq!(
            core::iter::from_fn(|| quarantine.evict()).collect::<alloc::vec::Vec<_>>(),
            ["c", "d", "larger than all"]
        );
    }
}
