//! The system call table, put together from the families.

use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};

use super::call::Entry;

/// The families' tables.
const FAMILIES: &[&[Entry]] = &[
    super::exec::calls::TABLE,
    super::fs::calls::TABLE,
    super::mm::TABLE,
    super::net::TABLE,
    super::signal::calls::TABLE,
    super::signal::descriptor::TABLE,
    super::signal::kill::TABLE,
];

/// All families, those of folders included.
fn families() -> impl Iterator<Item = &'static Entry> {
    FAMILIES
        .iter()
        .chain(super::fd::FAMILIES)
        .chain(super::proc::FAMILIES)
        .copied()
        .flatten()
}

/// Highest system call number the table reaches, plus one.
pub const SIZE: usize = 512;

/// All calls by number.
#[derive(Debug)]
pub struct Table {
    rows: [Option<&'static Entry>; SIZE],
    /// Calls that are not there and were made: bit N for call N.
    missed: [AtomicU64; SIZE / 64],
}

impl Default for Table {
    fn default() -> Self {
        let mut rows = [None; SIZE];
        for entry in families() {
            debug_assert!(
                rows[entry.nr as usize].is_none(),
                "two handlers for {}",
                entry.name
            );
            rows[entry.nr as usize] = Some(entry);
        }
        Self {
            rows,
            missed: [const { AtomicU64::new(0) }; SIZE / 64],
        }
    }
}

impl Table {
    /// The table of this process: guests have the same calls.
    #[must_use]
    pub fn shared() -> &'static Self {
        static TABLE: LazyLock<Table> = LazyLock::new(Table::default);
        &TABLE
    }

    /// The row of call `nr`, if it is there.
    #[must_use]
    pub fn get(&self, nr: u64) -> Option<&'static Entry> {
        self.rows.get(usize::try_from(nr).ok()?).copied().flatten()
    }

    /// Whether call `nr`, which is not there, is made for the first time. Numbers beyond the table
    /// are all one.
    pub fn first_time(&self, nr: u64) -> bool {
        let nr = nr.min(SIZE as u64 - 1) as usize;
        let bit = 1 << (nr % 64);
        self.missed[nr / 64].fetch_or(bit, Ordering::Relaxed) & bit == 0
    }
}
