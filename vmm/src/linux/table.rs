//! The system call table, put together from the families.

use super::call::Entry;

/// The families' tables.
const FAMILIES: &[&[Entry]] = &[
    super::exec::calls::TABLE,
    super::fs::calls::TABLE,
    super::mm::TABLE,
    super::signal::calls::TABLE,
    super::signal::kill::TABLE,
];

/// All families, those of folders included.
fn families() -> impl Iterator<Item = &'static Entry> {
    FAMILIES
        .iter()
        .chain(super::proc::FAMILIES)
        .copied()
        .flatten()
}

/// Highest system call number the table reaches, plus one.
pub const SIZE: usize = 512;

/// All calls by number.
#[derive(Debug)]
pub struct Table([Option<&'static Entry>; SIZE]);

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
        Self(rows)
    }
}

impl Table {
    /// The row of call `nr`, if it is there.
    #[must_use]
    pub fn get(&self, nr: u64) -> Option<&'static Entry> {
        self.0.get(usize::try_from(nr).ok()?).copied().flatten()
    }
}
