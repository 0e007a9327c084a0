//! The only writer of table frames.
//!
//! Every change is one atomic exchange or compare-exchange: hardware sets accessed and dirty bits at any
//! moment between a read and a write, and none of them may be lost. The share count of a table
//! frame is kept in step here, under the PFN lock whose guard the changing functions ask for.

use alloc::vec::Vec;
use core::ops::ControlFlow;

use crate::addr::{EntryIndex, Level, Pfn, TABLE_ENTRIES, UsedEntries, Vpn, VpnRange};
use crate::backend::FrameStore;
use crate::pfn::{Owner, PfnDatabase, ZeroedFrame};
use crate::pte::{Entry, EntryFlags, UpperEntry, ValidEntry};

/// Reads and writes the tables below one root.
#[derive(Debug)]
pub(crate) struct Cursor<'a, S> {
    pub(super) store: &'a S,
    pub(super) root: Pfn,
}

/// Neighbouring entries of one leaf table.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LeafRun {
    pub(crate) table: Pfn,
    /// Whether other spaces reach the table too, or may.
    pub(crate) shared: bool,
    range: VpnRange,
}

impl LeafRun {
    /// All entries of a table that nothing names.
    pub(crate) fn whole(table: Pfn, range: VpnRange) -> Self {
        Self {
            table,
            shared: true,
            range,
        }
    }

    /// The entries and the pages they translate.
    pub(crate) fn pages(self) -> impl Iterator<Item = (EntryIndex, Vpn)> {
        self.range.iter().map(|vpn| (vpn.index(Level::Leaf), vpn))
    }

    /// The page that an entry translates, if it is one of them.
    pub(crate) fn page(self, index: EntryIndex) -> Option<Vpn> {
        let first = self.range.start().index(Level::Leaf);
        let ahead = index.get().checked_sub(first.get())?;
        let page = Vpn::new(self.range.start().get() + ahead as u64);
        page.filter(|page| self.range.contains(*page))
    }

    pub(crate) fn range(self) -> VpnRange {
        self.range
    }

    /// Those of the entries that are in use now, and their pages.
    pub(crate) fn used<S: FrameStore>(
        self,
        cursor: &Cursor<'_, S>,
    ) -> impl Iterator<Item = (EntryIndex, Vpn)> + use<S> {
        let first = self.range.start();
        let below = first.index(Level::Leaf).get();
        let pages = cursor.used(self.table).filter_map(move |index| {
            let page = index.get().checked_sub(below)?;
            Some((index, first.checked_add(page as u64)?))
        });
        pages.take_while(move |(_, vpn)| self.range.contains(*vpn))
    }
}

/// The entry that translates a page.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LeafEntry {
    pub(crate) table: Pfn,
    pub(crate) index: EntryIndex,
    pub(crate) entry: Entry,
    /// Whether other spaces reach the table too, or may: then the entry can change at any moment unless
    /// the PFN lock is held.
    pub(crate) shared: bool,
}

/// Counts the tables that pages visited in rising order need below an empty root.
#[derive(Debug, Default)]
pub(crate) struct TableCount {
    last: Option<Vpn>,
    tables: usize,
}

impl TableCount {
    /// The range's pages will be mapped. Its size is bounded by the caller.
    pub(crate) fn add(&mut self, range: VpnRange) {
        for level in [Level::Leaf, Level::Directory, Level::Pointers] {
            let covers = |vpn: Vpn| vpn.get() / (level.pages() * TABLE_ENTRIES as u64);
            let (first, last) = (covers(range.start()), covers(range.last()));
            let known = self.last.map(covers) == Some(first);
            self.tables += (last - first) as usize + usize::from(!known);
        }
        self.last = Some(range.last());
    }

    pub(crate) fn tables(&self) -> usize {
        self.tables
    }
}

impl<'a, S: FrameStore> Cursor<'a, S> {
    pub(crate) fn new(store: &'a S, root: Pfn) -> Self {
        Self { store, root }
    }

    pub(crate) fn root(&self) -> Pfn {
        self.root
    }

    /// The entry of an upper table.
    pub(crate) fn upper(&self, table: Pfn, index: EntryIndex) -> UpperEntry {
        let decoded = UpperEntry::decode(self.store.load(table, index));
        debug_assert!(
            decoded.is_some(),
            "undecodable entry {index:?} of upper table {table:?}"
        );
        decoded.unwrap_or(UpperEntry::Empty)
    }

    /// The entries in use of an upper table that translate pages of the range, each with its pages. The range lies below
    /// the one entry of the next level up, so there are at most 512.
    pub(crate) fn children(
        &self,
        (table, level): (Pfn, Level),
        range: VpnRange,
    ) -> impl Iterator<Item = (EntryIndex, VpnRange, UpperEntry)> {
        let ends = [range.start(), range.last()].map(|vpn| vpn.index(level));
        let mut used = UsedEntries::default();
        if ends[0] == ends[1] {
            used.insert(ends[0]);
        } else {
            used = self.store.used(table);
        }
        let found = used
            .iter()
            .filter(move |index| (ends[0]..=ends[1]).contains(index))
            .map(move |index| (index, self.upper(table, index)))
            .filter(|(_, entry)| *entry != UpperEntry::Empty);
        found.filter_map(move |(index, entry)| Some((index, part_of(level, range, index)?, entry)))
    }

    /// The slots of a table that are in use now, rising.
    pub(crate) fn used(&self, table: Pfn) -> impl Iterator<Item = EntryIndex> + use<S> {
        self.store.used(table).iter()
    }

    /// The entries of a table as they are now. The table is looked at once, as a whole: who changes an entry must be ready for
    /// hardware having set a bit since.
    pub(crate) fn words(&self, table: Pfn) -> [u64; TABLE_ENTRIES] {
        self.store.entries(table)
    }

    /// The entry of a leaf table.
    pub(crate) fn leaf(&self, table: Pfn, index: EntryIndex) -> Entry {
        decode_leaf(self.store.load(table, index))
    }

    /// The entries of a leaf table that are in use and not a layer's, of which there are `count`. Hardware's bits, all that may
    /// change meanwhile, do not matter: so the table is looked at as a whole.
    pub(crate) fn unfrozen(&self, table: Pfn, count: u16) -> Vec<EntryIndex> {
        let words = self.words(table);
        let found = EntryIndex::numbered(&words);
        let found = found.filter(|(_, raw)| Entry::is_unfrozen(*raw));
        found.map(|(index, _)| index).take(count.into()).collect()
    }

    /// The leaf table that translates a page, if the path to it exists.
    pub(crate) fn find_leaf(&self, vpn: Vpn) -> Option<Pfn> {
        let mut leaf = None;
        for (level, found) in self.path(vpn) {
            leaf = found.table().filter(|_| level == Level::Directory);
        }
        leaf
    }

    /// The entries on the way to a page's leaf table, with their levels, up to the first that names no table.
    pub(crate) fn path(&self, vpn: Vpn) -> impl Iterator<Item = (Level, UpperEntry)> {
        let mut table = Some(self.root);
        let levels = [Level::Root, Level::Pointers, Level::Directory];
        levels.into_iter().map_while(move |level| {
            let found = self.upper(table?, vpn.index(level));
            table = found.table();
            Some((level, found))
        })
    }

    /// The entry that translates a page and where it is, if its leaf table exists.
    pub(crate) fn lookup(&self, vpn: Vpn) -> Option<LeafEntry> {
        let (mut leaf, mut shared) = (None, false);
        for (level, found) in self.path(vpn) {
            leaf = found.table().filter(|_| level == Level::Directory);
            // What lies below a shared table is shared.
            shared |= matches!(found, UpperEntry::Shared(_));
        }
        let (table, index) = (leaf?, vpn.index(Level::Leaf));
        let entry = self.leaf(table, index);
        Some(LeafEntry {
            table,
            index,
            entry,
            shared,
        })
    }

    /// Calls `visit` for the part of every existing leaf table that translates pages of the range,
    /// rising. What is absent above is skipped in one step.
    pub(crate) fn for_each_leaf(&self, range: VpnRange, mut visit: impl FnMut(LeafRun)) {
        let _ = self.for_each_leaf_until(range, |run| {
            visit(run);
            ControlFlow::Continue(())
        });
    }

    /// As [`Self::for_each_leaf`], until `visit` has seen enough.
    pub(crate) fn for_each_leaf_until(
        &self,
        range: VpnRange,
        mut visit: impl FnMut(LeafRun) -> ControlFlow<()>,
    ) -> ControlFlow<()> {
        let table = self.root;
        let root = LeafRun {
            table,
            shared: false,
            range,
        };
        self.leaves_below(root, Level::Root, &mut visit)
    }

    /// As [`Self::for_each_leaf`], until `visit` has told of `most` pages or more; gives back where to go on.
    pub(crate) fn some_leaves(
        &self,
        range: VpnRange,
        most: usize,
        mut visit: impl FnMut(LeafRun) -> usize,
    ) -> Option<Vpn> {
        let (mut seen, mut next) = (0, None);
        let _ = self.for_each_leaf_until(range, |run| {
            if seen >= most {
                next = Some(run.range().start());
                return ControlFlow::Break(());
            }
            seen += visit(run);
            ControlFlow::Continue(())
        });
        next
    }

    /// `above` is the part of a table of the given level that the range covers.
    fn leaves_below(
        &self,
        above: LeafRun,
        level: Level,
        visit: &mut impl FnMut(LeafRun) -> ControlFlow<()>,
    ) -> ControlFlow<()> {
        let Some(below) = level.below() else {
            return visit(above);
        };
        for (_, range, entry) in self.children((above.table, level), above.range) {
            let (table, shared) = match entry {
                UpperEntry::Table(table) => (table, above.shared),
                UpperEntry::Shared(table) => (table, true),
                UpperEntry::Empty | UpperEntry::Large(_) => continue,
            };
            let run = LeafRun {
                table,
                shared,
                range,
            };
            self.leaves_below(run, below, visit)?;
        }
        ControlFlow::Continue(())
    }

    /// The leaf table that translates a page; tables missing on the path come out of `supply`, which
    /// must have as many as are missing. No table on the path is shared.
    ///
    /// # Panics
    /// If the supply is too small: the caller counted wrong.
    pub(crate) fn ensure_leaf(
        &self,
        db: &mut PfnDatabase,
        vpn: Vpn,
        supply: &mut Vec<ZeroedFrame>,
    ) -> Pfn {
        self.ensure_from(db, (vpn, Level::Root), Level::Leaf, supply)
    }

    /// The `wanted` table on the path to a page, as [`Self::ensure_leaf`]; the cursor's root is a table
    /// of level `top`.
    pub(crate) fn ensure_from(
        &self,
        db: &mut PfnDatabase,
        (vpn, top): (Vpn, Level),
        wanted: Level,
        supply: &mut Vec<ZeroedFrame>,
    ) -> Pfn {
        let mut table = self.root;
        let mut level = top;
        while level != wanted {
            let index = vpn.index(level);
            let found = self.upper(table, index);
            debug_assert!(
                !matches!(found, UpperEntry::Shared(_)),
                "{vpn:?} lies in a shared table"
            );
            table = match found {
                UpperEntry::Table(below) | UpperEntry::Shared(below) => below,
                UpperEntry::Empty | UpperEntry::Large(_) => {
                    let frame = supply.pop().expect("table frames were reserved");
                    self.link(db, table, index, frame)
                }
            };
            level = level.below().expect("the wanted level is below");
        }
        table
    }

    /// Makes a new, empty table and names it in an empty entry of an upper table.
    pub(crate) fn link(
        &self,
        db: &mut PfnDatabase,
        table: Pfn,
        index: EntryIndex,
        frame: ZeroedFrame,
    ) -> Pfn {
        let below = db.activate(frame.into(), Owner::Entry { table, index });
        db.charge_tables(1);
        self.link_existing(db, table, index, below);
        below
    }

    /// Names a table in an empty entry of an upper table.
    pub(crate) fn link_existing(
        &self,
        db: &mut PfnDatabase,
        table: Pfn,
        index: EntryIndex,
        below: Pfn,
    ) {
        let old = self
            .store
            .swap(table, index, UpperEntry::Table(below).encode());
        debug_assert_eq!(old, 0, "a table was linked over something");
        db.add_share(table);
    }

    /// Takes the name of a table out of an upper table; the table itself stays as it is.
    pub(crate) fn unlink(&self, db: &mut PfnDatabase, table: Pfn, index: EntryIndex) {
        self.store.swap(table, index, 0);
        db.drop_table_entry(table);
    }

    /// Makes an empty entry of a page directory map 2 MiB.
    pub(crate) fn install_large(
        &self,
        db: &mut PfnDatabase,
        table: Pfn,
        index: EntryIndex,
        entry: ValidEntry,
    ) {
        let old = self
            .store
            .swap(table, index, UpperEntry::Large(entry).encode());
        debug_assert_eq!(old, 0, "a large leaf was installed over something");
        db.add_share(table);
    }

    /// Makes an empty leaf entry valid.
    pub(crate) fn install(
        &self,
        db: &mut PfnDatabase,
        table: Pfn,
        index: EntryIndex,
        entry: ValidEntry,
    ) {
        self.put(db, (table, index), Entry::Valid(entry));
    }

    /// Fills an empty leaf entry.
    pub(crate) fn put(&self, db: &mut PfnDatabase, place: (Pfn, EntryIndex), entry: Entry) {
        self.put_raw(db, place, entry.encode());
    }

    /// The same with a raw entry.
    #[inline]
    pub(crate) fn put_raw(&self, db: &mut PfnDatabase, place: (Pfn, EntryIndex), raw: u64) {
        debug_assert_ne!(raw, 0);
        let old = self.store.swap(place.0, place.1, raw);
        debug_assert_eq!(old, 0, "an entry was installed over something");
        db.add_share(place.0);
        if Entry::is_unfrozen(raw) && cfg!(not(mutant = "uncounted_entry")) {
            db.count_unfrozen(place.0);
        }
    }

    /// Replaces a leaf entry that is in use by another, and gives back what it was, with the bits
    /// hardware set last.
    pub(crate) fn replace(&self, place: (Pfn, EntryIndex), entry: Entry) -> Entry {
        debug_assert_ne!(entry, Entry::Empty);
        let old = decode_leaf(self.store.swap(place.0, place.1, entry.encode()));
        debug_assert_ne!(old, Entry::Empty, "an empty entry was replaced");
        old
    }

    /// Makes a leaf entry empty and gives back what it was, with the bits hardware set last. The table
    /// stays, even if it is empty now: [`Self::prune`] frees it.
    pub(crate) fn remove(&self, db: &mut PfnDatabase, table: Pfn, index: EntryIndex) -> Entry {
        let old = decode_leaf(self.store.swap(table, index, 0));
        if old != Entry::Empty {
            db.drop_table_entry(table);
            if !matches!(old, Entry::Frozen(_)) {
                db.uncount_unfrozen(table);
            }
        }
        old
    }

    /// Replaces a present entry by what `change` makes of it, as often as hardware sets a bit in between.
    /// Gives back the entry before and after; `None` if it is not present.
    pub(crate) fn rewrite(
        &self,
        table: Pfn,
        index: EntryIndex,
        change: impl Fn(ValidEntry) -> ValidEntry,
    ) -> Option<(ValidEntry, ValidEntry)> {
        let raw = self.store.load(table, index);
        self.rewrite_from((table, index), raw, change)
    }

    /// Makes the raw entry `new` if it is still `raw`; otherwise says what it is.
    #[inline]
    pub(crate) fn exchange(
        &self,
        (table, index): (Pfn, EntryIndex),
        raw: u64,
        new: u64,
    ) -> Result<u64, u64> {
        if cfg!(mutant = "lost_dirty") {
            return Ok(self.store.swap(table, index, new));
        }
        self.store.compare_exchange(table, index, raw, new)
    }

    /// Makes entries of a leaf table that were `old` what `new` says, those where it is something else. What hardware has set
    /// meanwhile stays set.
    pub(crate) fn exchange_all(
        &self,
        table: Pfn,
        old: &[u64; TABLE_ENTRIES],
        new: &[u64; TABLE_ENTRIES],
    ) {
        if cfg!(mutant = "lost_dirty") {
            let changed = EntryIndex::numbered(new).filter(|(index, new)| old[index.get()] != *new);
            changed.for_each(|(index, new)| _ = self.store.swap(table, index, new));
            return;
        }
        self.store.exchange(table, old, new);
    }

    /// As [`Self::rewrite`], of an entry that has just been looked at: it was `raw`.
    #[inline]
    pub(crate) fn rewrite_from(
        &self,
        (table, index): (Pfn, EntryIndex),
        mut raw: u64,
        change: impl Fn(ValidEntry) -> ValidEntry,
    ) -> Option<(ValidEntry, ValidEntry)> {
        loop {
            let found = decode_leaf(raw);
            let old = found.present()?;
            let new = change(old);
            if new == old {
                return Some((old, new));
            }
            let changed = found.map_present(|_| new).encode();
            if cfg!(mutant = "lost_dirty") {
                self.store.swap(table, index, changed);
                return Some((old, new));
            }
            match self.store.compare_exchange(table, index, raw, changed) {
                Ok(_) => return Some((old, new)),
                Err(now) => raw = now,
            }
        }
    }

    /// Sets accessed, and dirty too for a store, as hardware would.
    pub(crate) fn mark_used(&self, table: Pfn, index: EntryIndex, used: EntryFlags) {
        self.rewrite(table, index, |entry| entry.with_flags(entry.flags | used));
    }
}

/// The pages of the range that an entry of a table translates. The range lies below the one entry of the next level up.
fn part_of(level: Level, range: VpnRange, index: EntryIndex) -> Option<VpnRange> {
    let first = range.start().index(level);
    let base = (range.start().get() >> level.shift()) - first.get() as u64 + index.get() as u64;
    let start = Vpn::new(base << level.shift())?;
    VpnRange::new(start, level.pages())?.intersect(range)
}

/// Rewrites the entry of a page in transition, in whatever space it is. The PFN lock alone protects it
/// there: whoever acts upon such an entry looks at it with that lock held.
pub(crate) fn retarget(
    store: &impl FrameStore,
    (table, index): (Pfn, EntryIndex),
    from: Entry,
    to: Entry,
) {
    let done = store.compare_exchange(table, index, from.encode(), to.encode());
    debug_assert!(
        done.is_ok(),
        "entry {index} of {table} is {done:x?}, not {from:?}"
    );
}

#[inline]
pub(crate) fn decode_leaf(raw: u64) -> Entry {
    let decoded = Entry::decode(raw);
    debug_assert!(decoded.is_some(), "undecodable leaf entry {raw:#x}");
    decoded.unwrap_or(Entry::Empty)
}
