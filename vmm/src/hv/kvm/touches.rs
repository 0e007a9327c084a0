//! What the monitor is to touch, in portions of one run.

use guest::abi;
use guest::monitor::{self, Ending};

/// Words that are still to be touched, each once: an entry of a table that is touched as a whole needs nothing more.
#[derive(Debug)]
pub(super) struct Touches {
    entries: Vec<u64>,
    tables: Vec<u64>,
}

/// What one run touches.
#[derive(Debug)]
pub(super) struct List {
    entries: Vec<u64>,
    tables: Vec<u64>,
}

const PAGE: u64 = 4096;

impl Touches {
    /// The words of a list: addresses of entries, and of tables with [`abi::TOUCH_TABLE`] added.
    pub(super) fn new(words: &[u64]) -> Self {
        let is_table = |word: &u64| word & abi::TOUCH_TABLE != 0;
        let (tables, entries) = words.iter().copied().partition::<Vec<_>, _>(is_table);
        let mut tables: Vec<_> = tables.iter().map(|word| word - abi::TOUCH_TABLE).collect();
        let mut entries = entries;
        for words in [&mut entries, &mut tables] {
            words.sort_unstable();
            words.dedup();
        }
        let whole = |entry: &u64| tables.binary_search(&(entry & !(PAGE - 1))).is_ok();
        entries.retain(|entry| !whole(entry));
        Self { entries, tables }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.entries.is_empty() && self.tables.is_empty()
    }

    /// Takes as much as one run can touch.
    pub(super) fn take(&mut self) -> List {
        let take =
            |words: &mut Vec<u64>, most: usize| words.drain(..words.len().min(most)).collect();
        List {
            entries: take(&mut self.entries, monitor::MAX_ENTRIES),
            tables: take(&mut self.tables, monitor::MAX_TABLES),
        }
    }
}

impl List {
    /// Where the run begins, and its stack.
    pub(super) fn run(&self, ending: Ending) -> (u64, Vec<u64>) {
        monitor::run_of(ending, &self.entries, &self.tables)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: u64 = abi::TABLES_VA + 0x5000;

    #[test]
    fn nothing_is_touched_twice() {
        let whole = TABLE + abi::TOUCH_TABLE;
        let other = TABLE + PAGE + 8;
        let mut touches = Touches::new(&[TABLE + 16, other, whole, other, whole]);
        let list = touches.take();
        assert_eq!((list.entries, list.tables), (vec![other], vec![TABLE]));
        assert!(touches.is_empty());
    }

    #[test]
    fn long_list_takes_several_runs() {
        let entry = |n: usize| TABLE + n as u64 * 8;
        let words: Vec<_> = (0..=monitor::MAX_ENTRIES).map(entry).collect();
        let mut touches = Touches::new(&words);
        assert_eq!(touches.take().entries.len(), monitor::MAX_ENTRIES);
        assert_eq!(touches.take().entries, [entry(monitor::MAX_ENTRIES)]);
        assert!(touches.is_empty() && touches.take().tables.is_empty());
    }
}
