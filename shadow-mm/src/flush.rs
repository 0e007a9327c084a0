//! What must be flushed before it is true.

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, Ordering};

use crate::addr::{EntryIndex, Pfn, SpaceId, Vpn};

/// More edits than this in one table are told as the whole table.
pub const MAX_EDITS_PER_TABLE: usize = 16;

/// One table entry that was taken away or made to allow less.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct FlushEntry {
    /// The table it is in.
    pub table: Pfn,
    /// Its slot there.
    pub index: EntryIndex,
    /// The first page it translates.
    pub vpn: Vpn,
}

/// How many flushes of one space the embedder has not announced yet.
///
/// An operation ends, and another one may build on it, before its flush has reached the embedder's virtual
/// CPUs: so whoever enters the space must first see this at zero.
#[derive(Clone, Default, Debug)]
pub(crate) struct Unannounced(Arc<AtomicU64>);

impl Unannounced {
    /// One more, until the value is dropped.
    fn one(&self) -> Announcement {
        self.0.fetch_add(1, Ordering::SeqCst);
        Announcement(Arc::clone(&self.0))
    }

    pub(crate) fn count(&self) -> u64 {
        self.0.load(Ordering::SeqCst)
    }
}

/// Counts as unannounced.
#[derive(Debug)]
struct Announcement(Arc<AtomicU64>);

impl Drop for Announcement {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// A fork whose flush is not done: as long as it lives, a store of the parent's that would copy a page waits,
/// because another virtual CPU may still store to the page through a stale translation, and its store
/// would be lost.
#[derive(Debug)]
pub struct ForkUnderWay {
    _one: Announcement,
}

/// Translations that are stale, and the frames that must not be reused until every vCPU dropped them.
///
/// Only what takes something away is in it: an entry that became present, or the same frame allowing
/// more, needs no flush. Once every vCPU that may have run the space has dropped the translations, hand
/// the flush to [`crate::Manager::flushed`]. A dropped flush keeps its frames in flight for ever, which
/// the frame counters show.
#[derive(Debug)]
#[must_use = "the frames it holds return to the pool only through Manager::flushed"]
pub struct Flush {
    space: SpaceId,
    entries: Vec<FlushEntry>,
    tables: Vec<Pfn>,
    held: Vec<Pfn>,
    /// Leaf tables that were made while it was: hardware has seen little of them, so more than one edit of such a table is
    /// told as the whole table too.
    made: Vec<Pfn>,
    wide: bool,
    announcement: Option<Announcement>,
    fork: Option<ForkUnderWay>,
}

impl Flush {
    /// Nothing to flush. To be made before the first edit is visible: with the space locked, or earlier.
    pub(crate) fn none(space: SpaceId, unannounced: &Unannounced) -> Self {
        Self {
            space,
            entries: Vec::new(),
            tables: Vec::new(),
            held: Vec::new(),
            made: Vec::new(),
            wide: false,
            announcement: Some(unannounced.one()),
            fork: None,
        }
    }

    /// Every virtual CPU that may have the stale translations has been told, and will drop them before it
    /// runs the space again: others may now enter it. See [`crate::Space::unannounced`].
    pub fn announced(&mut self) {
        self.announcement = None;
    }

    /// It is a fork's: until it is done, or what [`Self::take_fork`] gives is dropped, the parent copies
    /// nothing.
    pub(crate) fn of_fork(&mut self, under_way: &Unannounced) {
        if cfg!(not(mutant = "copied_in_fork")) {
            let _one = under_way.one();
            self.fork = Some(ForkUnderWay { _one });
        }
    }

    /// For an embedder that knows earlier than by the flush's end that no virtual CPU has the stale translations
    /// any more. What this gives is to be dropped then.
    pub fn take_fork(&mut self) -> Option<ForkUnderWay> {
        self.fork.take()
    }

    /// Whether no translation is stale.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty() && self.tables.is_empty()
    }

    /// The space whose translations are stale.
    #[must_use]
    pub fn space(&self) -> SpaceId {
        self.space
    }

    /// Single entries that changed. An entry of an upper table unlinked the table below it.
    #[must_use]
    pub fn entries(&self) -> &[FlushEntry] {
        &self.entries
    }

    /// Tables of which many entries changed, so that everything translated through them is stale; and
    /// tables that were freed and will be reused: a host that shadows page tables must drop
    /// what it derived from them.
    #[must_use]
    pub fn tables(&self) -> &[Pfn] {
        &self.tables
    }

    /// Whether other spaces have the stale translations too, because tables that they share changed: then
    /// every virtual CPU must drop them, whatever space it runs.
    #[must_use]
    pub fn is_wide(&self) -> bool {
        self.wide
    }

    /// How many frames wait for this flush.
    #[must_use]
    pub fn frames_held(&self) -> usize {
        self.held.len()
    }

    /// Both flushes as one. They must be of the same space.
    pub fn merge(mut self, other: Self) -> Self {
        self.add(other);
        self
    }

    /// Another flush of the same space becomes part of this one.
    pub(crate) fn add(&mut self, other: Self) {
        debug_assert_eq!(self.space, other.space, "flushes of two spaces were merged");
        self.entries.extend(other.entries);
        self.tables.extend(other.tables);
        self.held.extend(other.held);
        self.made.extend(other.made);
        self.wide |= other.wide;
        self.collapse();
        self.tidy();
    }

    /// Adds the edits of one table.
    pub(crate) fn absorb(&mut self, edits: TableEdits) {
        if edits.many {
            self.tables.push(edits.table);
        } else {
            self.entries.extend(edits.entries);
        }
    }

    /// Adds one edit.
    pub(crate) fn edit(&mut self, table: Pfn, index: EntryIndex, vpn: Vpn) {
        self.entries.push(FlushEntry { table, index, vpn });
    }

    /// Other spaces have the translations too.
    pub(crate) fn widen(&mut self) {
        self.wide = true;
    }

    /// Adds a whole table.
    pub(crate) fn whole_table(&mut self, table: Pfn) {
        if self.tables.last() != Some(&table) {
            self.tables.push(table);
        }
    }

    /// A leaf table was made that may have edits soon.
    pub(crate) fn made(&mut self, table: Pfn) {
        self.made.push(table);
    }

    /// A frame waits for this flush; it has one reference for that.
    pub(crate) fn hold(&mut self, frame: Pfn) {
        self.held.push(frame);
    }

    /// The frames that waited.
    pub(crate) fn into_held(self) -> Vec<Pfn> {
        self.held
    }

    /// Says nothing twice: edits of a table that is listed as a whole go.
    pub(crate) fn finish(mut self) -> Self {
        self.tidy();
        self
    }

    fn tidy(&mut self) {
        self.tables.sort_unstable();
        self.tables.dedup();
        let tables = &self.tables;
        self.entries
            .retain(|entry| tables.binary_search(&entry.table).is_err());
    }

    fn collapse(&mut self) {
        if self.entries.len() <= MAX_EDITS_PER_TABLE && self.made.is_empty() {
            return;
        }
        self.entries
            .sort_unstable_by_key(|entry| (entry.table, entry.index));
        self.entries.dedup();
        let runs = self.entries.chunk_by(|a, b| a.table == b.table);
        let many = runs
            .filter(|run| {
                let new = self.made.contains(&run[0].table);
                run.len() > if new { 1 } else { MAX_EDITS_PER_TABLE }
            })
            .map(|run| run[0].table);
        self.tables.extend(many);
    }
}

/// The edits of one table while they are being made.
#[derive(Debug)]
pub(crate) struct TableEdits {
    table: Pfn,
    entries: Vec<FlushEntry>,
    many: bool,
}

impl TableEdits {
    pub(crate) fn new(table: Pfn) -> Self {
        Self {
            table,
            entries: Vec::new(),
            many: false,
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.entries.is_empty() && !self.many
    }

    pub(crate) fn add(&mut self, index: EntryIndex, vpn: Vpn) {
        self.many |= self.entries.len() == MAX_EDITS_PER_TABLE;
        if !self.many {
            self.entries.push(FlushEntry {
                table: self.table,
                index,
                vpn,
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn edits(table: u32, from: u64, count: u64) -> TableEdits {
        let mut edits = TableEdits::new(Pfn::new(table));
        for n in from..from + count {
            let vpn = Vpn::new(n).expect("page");
            edits.add(vpn.index(crate::addr::Level::Leaf), vpn);
        }
        edits
    }

    fn flush(edits: TableEdits) -> Flush {
        let mut flush = Flush::none(SpaceId::new(1), &Unannounced::default());
        flush.absorb(edits);
        flush.finish()
    }

    #[test]
    fn seventeenth_edit_tells_the_whole_table() {
        assert_eq!(flush(edits(5, 0, 16)).entries().len(), 16);
        let many = flush(edits(5, 0, 17));
        assert_eq!(
            (many.entries().len(), many.tables()),
            (0, &[Pfn::new(5)][..])
        );
    }

    #[test]
    fn flush_is_unannounced_until_told_or_done() {
        let count = Unannounced::default();
        let new = || Flush::none(SpaceId::new(1), &count);
        let (mut first, second) = (new(), new());
        assert_eq!(count.count(), 2);
        first.announced();
        assert_eq!(count.count(), 1);
        let merged = first.merge(second);
        drop(merged.into_held());
        assert_eq!(count.count(), 0);
    }

    #[test]
    fn merged_edits_collapse() {
        let merged = flush(edits(5, 0, 16)).merge(flush(edits(5, 16, 1)));
        assert_eq!((merged.entries().len(), merged.tables().len()), (0, 1));
        let apart = flush(edits(5, 0, 16)).merge(flush(edits(6, 0, 16)));
        assert_eq!((apart.entries().len(), apart.tables().len()), (32, 0));
        let mut new = flush(edits(5, 0, 1)).merge(flush(edits(6, 0, 2)));
        new.made(Pfn::new(5));
        new.made(Pfn::new(6));
        let merged = new.merge(flush(edits(7, 0, 2)));
        assert_eq!(
            (merged.entries().len(), merged.tables()),
            (3, &[Pfn::new(6)][..])
        );
    }
}
