//! Getting a table for oneself that is shared (*unsharing*).
//!
//! A fork that shares tables leaves every table of both spaces named by entries without the writable bit. Before a
//! space changes anything below such an entry it *owns* the path: from the top, each shared table is
//!
//! * **taken over** if nobody else names it and no flush of somebody who did is under way: its entry becomes
//!   writable, and, above the leaves, the entries in it become what the entry was;
//! * **moved** to a new frame if only such a flush stands in the way, or if there are entries of shared views in it, or may be
//!   below it, that must not allow stores any more because their section is kept as it was ([`super::view_kept`]);
//! * **copied** otherwise. Above the leaves the tables below get one parent more. A leaf table's private pages
//!   are *forked*: both entries are copy-on-write, and the frame's share count says what a clone block's would. Those that are
//!   not mapped move to clone blocks that were promised at the fork.
//!
//! A private page that somebody still looks at through a pin, of a space that shared the table once, is forked too when its
//! table is taken over or moved, so that the next store copies it.
//!
//! All of it happens with the space and the PFN database locked, with frames that were taken before, and cannot
//! fail. Of two spaces that copy one table at once, the second finds itself alone with it.
//!
//! What a copy takes from the table that stays is only bits that the path above denies already. But a
//! translation made when the path was another one may still be about, so the flush names the table, keeps it, and
//! while it does nobody takes it over.

use alloc::vec::Vec;

use crate::addr::{EntryIndex, Level, Pfn, Vpn, VpnRange};
use crate::backend::{FrameStore, Platform};
use crate::flush::Flush;
use crate::manager::{Demand, Manager, Reserve};
use crate::pfn::{Owner, PfnDatabase, ZeroedFrame};
use crate::proto::HeaderId;
use crate::pte::{Entry, EntryFlags, UpperEntry, ValidEntry};
use crate::shadow::Cursor;
use crate::space::clone_leaf::{LeafCopy, move_to_block};
use crate::space::rebase::Overlay;
use crate::space::view_kept::is_to_be_closed;
use crate::space::{Space, SpaceState};
use crate::stats::{Counters, add};

/// What unsharing takes its frames from, and says what is stale to.
pub(super) struct Owning<'a> {
    pub(super) tables: &'a mut Vec<ZeroedFrame>,
    pub(super) flush: &'a mut Flush,
}

/// What becomes of a table that nobody else has any more, but somebody who had it may still walk through.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Held {
    /// It is left to him: the entries move to another.
    Moves,
    /// There is no time for that.
    TakenOver,
}

/// Frames that owning tables takes.
#[derive(Clone, Copy, Default)]
pub(super) struct Needs {
    /// For tables that are not there yet.
    missing: usize,
    /// For copies of tables that others have too. They were promised.
    promised: usize,
    /// To move tables to that a flush holds, or in which there are entries to be closed.
    held: usize,
}

impl Needs {
    pub(super) fn tables(self) -> usize {
        self.missing + self.promised + self.held
    }

    /// Counts a table that is named as a shared one; `copied` says whether one above it will be copied.
    fn count<S: FrameStore>(
        &mut self,
        db: &PfnDatabase,
        cursor: &Cursor<'_, S>,
        (table, level): (Pfn, Level),
        copied: bool,
    ) -> bool {
        let copied = copied || db.has_other_parents(table);
        if copied {
            self.promised += 1;
        } else if db.is_held(table) || is_to_be_closed(db, cursor, (table, level)) {
            self.held += 1;
        }
        copied
    }
}

/// How far down a path is owned.
#[derive(Clone, Copy)]
enum Until {
    /// To the leaf table; what is missing is made.
    Leaf,
    /// To the first entry that is empty, or whose pages all lie in the range.
    Inside(VpnRange),
}

/// What became of tables and the pages in them.
#[derive(Clone, Copy, Default)]
pub(super) struct Tally {
    linked: u64,
    taken: u64,
    moved: u64,
    copied: u64,
    /// Private pages that are forked now, or have a clone block.
    parted: u64,
    pub(super) resident: u64,
    private: u64,
    pub(super) entries: u64,
}

/// Unsharing under way.
pub(super) struct Unsharing<'a, S> {
    pub(super) cursor: Cursor<'a, S>,
    pub(super) db: &'a mut PfnDatabase,
    pub(super) tables: &'a mut Vec<ZeroedFrame>,
    pub(super) flush: &'a mut Flush,
    held: Held,
    /// What a copy of a leaf table has instead of twins, if anything.
    overlay: Option<&'a Overlay>,
    pub(super) tally: Tally,
}

impl<P: Platform> Manager<P> {
    /// The leaf table that translates a page, the space's own from now on; tables come out of `owning`, which must have
    /// as many as [`Self::needs`] says.
    pub(super) fn own_leaf(
        &self,
        (space, state): (&Space<P>, &mut SpaceState<P::Backing>),
        db: &mut PfnDatabase,
        vpn: Vpn,
        owning: Owning<'_>,
    ) -> Pfn {
        let mut unsharing = self.unsharing(space, db, owning);
        let table = unsharing.own_path(vpn, Until::Leaf);
        unsharing.tally.settle(state, &self.counters);
        table.expect("the path to a leaf table was made")
    }

    /// As [`Self::own_leaf`], of a table that another space has too; the copy has what `overlay` says instead of twins.
    pub(super) fn own_leaf_over(
        &self,
        (space, state): (&Space<P>, &mut SpaceState<P::Backing>),
        db: &mut PfnDatabase,
        (vpn, overlay): (Vpn, &Overlay),
        owning: Owning<'_>,
    ) {
        let mut unsharing = self.unsharing(space, db, owning);
        unsharing.overlay = Some(overlay);
        unsharing.own_path(vpn, Until::Leaf);
        unsharing.tally.settle(state, &self.counters);
    }

    /// What [`Self::own_leaf`] of a page takes.
    pub(super) fn needs(&self, space: &Space<P>, vpn: Vpn) -> Needs {
        let cursor = space.cursor(&self.store);
        let mut needs = Needs::default();
        let mut shared = false;
        for (level, found) in cursor.path(vpn) {
            shared |= matches!(found, UpperEntry::Shared(_));
            if found.table().is_none() {
                needs.missing = level as usize;
            }
        }
        if shared {
            let db = self.pfns.lock();
            let mut seen = Vec::new();
            count_path(&db, &cursor, (vpn, None), &mut seen, &mut needs);
        }
        needs
    }

    /// Takes what `needs` says, and what else the demand is for.
    pub(super) fn reserve_for(&self, needs: Needs, demand: Demand) -> Option<Reserve> {
        self.reserve_owned(demand, needs.promised)
    }

    /// Frames for [`Self::own_edges`] of the range; `None` if there are none.
    pub(super) fn reserve_edges(&self, space: &Space<P>, range: VpnRange) -> Option<Reserve> {
        let needs = self.edge_needs(space, range);
        match needs.tables() {
            0 => Some(Reserve::default()),
            tables => self.reserve_for(needs, Demand::tables(tables)),
        }
    }

    /// What [`Self::own_edges`] of the range takes.
    pub(super) fn edge_needs(&self, space: &Space<P>, range: VpnRange) -> Needs {
        let cursor = space.cursor(&self.store);
        let (mut needs, mut seen) = (Needs::default(), Vec::new());
        let db = self.pfns.lock();
        for (vpn, range) in ends(self.user_part(range)) {
            count_path(&db, &cursor, (vpn, Some(range)), &mut seen, &mut needs);
        }
        needs
    }

    /// What [`Self::own_range`] takes.
    pub(super) fn range_needs(&self, space: &Space<P>, range: VpnRange) -> Needs {
        let cursor = space.cursor(&self.store);
        let mut needs = Needs::default();
        let all = ((cursor.root(), Level::Root), range, Above::default());
        count_range(&self.pfns.lock(), &cursor, all, &mut needs);
        needs
    }

    /// Owns the tables that translate pages on both sides of an end of the range, so that what is left in
    /// between can be emptied whole tables at a time.
    pub(super) fn own_edges(
        &self,
        whose: (&Space<P>, &mut SpaceState<P::Backing>),
        range: VpnRange,
        owning: Owning<'_>,
    ) {
        self.own_edges_with(whose, (range, Held::Moves), owning);
    }

    fn own_edges_with(
        &self,
        (space, state): (&Space<P>, &mut SpaceState<P::Backing>),
        (range, held): (VpnRange, Held),
        owning: Owning<'_>,
    ) {
        if cfg!(mutant = "unowned_edges") {
            return;
        }
        let mut db = self.pfns.lock();
        let mut unsharing = self.unsharing(space, &mut db, owning);
        unsharing.held = held;
        for (vpn, range) in ends(self.user_part(range)) {
            unsharing.own_path(vpn, Until::Inside(range));
        }
        unsharing.tally.settle(state, &self.counters);
    }

    /// As [`Self::own_edges`], of what cannot wait and cannot fail: the frames were promised.
    pub(crate) fn own_edges_now(
        &self,
        (space, state): (&Space<P>, &mut SpaceState<P::Backing>),
        range: VpnRange,
        flush: &mut Flush,
    ) {
        let mut tables = loop {
            let needed = self.edge_needs(space, range).promised;
            let tables = self.take_promised(needed);
            if tables.len() == needed {
                break tables;
            }
            // Somebody who is unsharing too has taken them, and is about to use them or give them back.
            self.give_back(Reserve {
                tables,
                data: Vec::new(),
            });
            core::hint::spin_loop();
        };
        let owning = Owning {
            tables: &mut tables,
            flush,
        };
        self.own_edges_with((space, state), (range, Held::TakenOver), owning);
        self.give_back(Reserve {
            tables,
            data: Vec::new(),
        });
    }

    /// Owns every leaf table there is that translates pages of the range.
    pub(super) fn own_range(
        &self,
        (space, state): (&Space<P>, &mut SpaceState<P::Backing>),
        range: VpnRange,
        owning: Owning<'_>,
    ) {
        let cursor = space.cursor(&self.store);
        let mut shared = Vec::new();
        cursor.for_each_leaf(range, |run| {
            if run.shared {
                shared.push(run.range().start());
            }
        });
        let Owning { tables, flush } = owning;
        for vpn in shared {
            let mut db = self.pfns.lock();
            let owning = Owning {
                tables: &mut *tables,
                flush: &mut *flush,
            };
            self.own_leaf((space, &mut *state), &mut db, vpn, owning);
        }
    }

    pub(super) fn unsharing<'a>(
        &'a self,
        space: &Space<P>,
        db: &'a mut PfnDatabase,
        owning: Owning<'a>,
    ) -> Unsharing<'a, P::Store> {
        let Owning { tables, flush } = owning;
        Unsharing {
            cursor: space.cursor(&self.store),
            db,
            tables,
            flush,
            held: Held::Moves,
            overlay: None,
            tally: Tally::default(),
        }
    }
}

/// The first and the last page of a range, each with the range.
fn ends(range: Option<VpnRange>) -> impl Iterator<Item = (Vpn, VpnRange)> {
    let both = |range: VpnRange| [(range.start(), range), (range.last(), range)];
    range.into_iter().flat_map(both)
}

/// The pages an entry translates, of those an entry of the level that covers `vpn` does.
pub(super) fn span(level: Level, vpn: Vpn) -> Option<VpnRange> {
    let start = Vpn::new(vpn.get() - vpn.get() % level.pages())?;
    VpnRange::new(start, level.pages())
}

fn is_inside(level: Level, vpn: Vpn, range: VpnRange) -> bool {
    span(level, vpn).is_some_and(|span| span.intersect(range) == Some(span))
}

/// Counts the tables [`Unsharing::own_path`] deals with on the way to a page, or to an end of the range. Those
/// `seen` are counted already.
fn count_path<S: FrameStore>(
    db: &PfnDatabase,
    cursor: &Cursor<'_, S>,
    (vpn, range): (Vpn, Option<VpnRange>),
    seen: &mut Vec<Pfn>,
    needs: &mut Needs,
) {
    let (mut shared, mut copied) = (false, false);
    for (level, found) in cursor.path(vpn) {
        let inside = range.is_some_and(|range| is_inside(level, vpn, range));
        let Some(table) = found.table().filter(|_| !inside) else {
            return;
        };
        shared |= matches!(found, UpperEntry::Shared(_));
        if seen.contains(&table) {
            copied |= db.has_other_parents(table) && shared;
        } else if shared {
            let below = level.below().unwrap_or(Level::Leaf);
            copied = needs.count(db, cursor, (table, below), copied);
        }
        seen.push(table);
    }
}

/// How the entries below a table are to be seen.
#[derive(Clone, Copy, Default)]
struct Above {
    shared: bool,
    copied: bool,
}

/// Counts the shared tables below one that translate pages of the range.
fn count_range<S: FrameStore>(
    db: &PfnDatabase,
    cursor: &Cursor<'_, S>,
    ((table, level), range, above): ((Pfn, Level), VpnRange, Above),
    needs: &mut Needs,
) {
    let Some(below) = level.below() else { return };
    for (_, part, found) in cursor.children((table, level), range) {
        let Some(child) = found.table() else { continue };
        let mut here = above;
        here.shared |= matches!(found, UpperEntry::Shared(_));
        if here.shared {
            here.copied = needs.count(db, cursor, (child, below), above.copied);
        }
        count_range(db, cursor, ((child, below), part, here), needs);
    }
}

/// The frame of a private page that is in memory: the entry is its owner.
fn own_frame(entry: Entry) -> Option<Pfn> {
    match entry {
        Entry::Valid(page) if !page.flags.contains(EntryFlags::PROTOTYPE) => Some(page.frame),
        Entry::Transition(frame) => Some(frame),
        Entry::Valid(_)
        | Entry::Frozen(_)
        | Entry::Prototype(_)
        | Entry::PageFile(_)
        | Entry::Empty
        | Entry::DemandZero(_)
        | Entry::Decommitted => None,
    }
}

/// How many tables below one of the given level translate pages of the range, all of which it covers.
pub(super) fn count_tables<S: FrameStore>(
    cursor: &Cursor<'_, S>,
    (table, level): (Pfn, Level),
    range: VpnRange,
) -> usize {
    let Some(below) = level.below() else { return 0 };
    let counted = cursor
        .children((table, level), range)
        .map(|(_, part, found)| {
            let child = found.table();
            child.map_or(0, |child| 1 + count_tables(cursor, (child, below), part))
        });
    counted.sum()
}

impl Tally {
    /// Adds the tables and pages to the space's own.
    fn settle<B: Clone + Eq>(self, state: &mut SpaceState<B>, counters: &Counters) {
        state.tables += self.linked;
        state.owns_table(self.resident, self.private);
        self.count(counters);
    }

    /// Counts what was done.
    pub(super) fn count(self, counters: &Counters) {
        add(&counters.tables_taken_over, self.taken);
        add(&counters.tables_moved, self.moved);
        add(&counters.tables_copied, self.copied);
        add(&counters.pages_parted, self.parted);
        add(&counters.entries_written, self.entries);
    }
}

impl<S: FrameStore> Unsharing<'_, S> {
    /// Owns the path to a page; gives back the leaf table if it got there.
    fn own_path(&mut self, vpn: Vpn, until: Until) -> Option<Pfn> {
        let mut table = self.cursor.root();
        let mut said = false;
        for level in [Level::Root, Level::Pointers, Level::Directory] {
            if matches!(until, Until::Inside(range) if is_inside(level, vpn, range)) {
                return None;
            }
            let index = vpn.index(level);
            let place = (table, index);
            table = match (self.cursor.upper(table, index), until) {
                (UpperEntry::Table(below), _) => below,
                (UpperEntry::Shared(below), _) => {
                    let own = self.own_table(place, below, level);
                    // Of the tables that were replaced on one path, the topmost says it all.
                    if own != below && !said {
                        let first = span(level, vpn).map_or(vpn, VpnRange::start);
                        self.flush.edit(place.0, index, first);
                        said = true;
                    }
                    own
                }
                (UpperEntry::Empty | UpperEntry::Large(_), Until::Inside(_)) => return None,
                (UpperEntry::Empty | UpperEntry::Large(_), Until::Leaf) => {
                    let frame = self.tables.pop().expect("table frames were reserved");
                    self.tally.linked += 1;
                    self.cursor.link(self.db, table, index, frame)
                }
            };
        }
        Some(table)
    }

    /// Makes the table that an entry of the level names its space's own; gives back which it is then.
    fn own_table(&mut self, place: (Pfn, EntryIndex), below: Pfn, level: Level) -> Pfn {
        let (table, index) = place;
        let owner = Owner::Entry { table, index };
        let leaf = level == Level::Directory;
        let alone = !self.db.has_other_parents(below);
        let held = self.db.is_held(below) && cfg!(not(mutant = "held_table_taken"));
        let named = (below, level.below().unwrap_or(Level::Leaf));
        let closed = alone && is_to_be_closed(self.db, &self.cursor, named);
        if alone && (!(held || closed) || self.held == Held::TakenOver) {
            self.tally.taken += 1;
            // Before the path allows stores.
            let downgraded = match leaf {
                true => self.take_leaf(below),
                false => self.cursor.share_entries(below) && closed,
            };
            self.cursor.relink(place, UpperEntry::Table(below));
            self.db.set_owner(below, owner);
            if downgraded {
                self.flush.whole_table(below);
            }
            return below;
        }
        let frame = self.tables.pop().expect("table frames were promised");
        let copy = self.db.activate(frame.into(), owner);
        let downgraded = match (leaf, alone) {
            (true, true) => self.move_leaf(below, copy),
            (true, false) => self.copy_leaf(below, copy),
            (false, _) => self.copy_upper(below, copy, alone),
        };
        self.cursor.relink(place, UpperEntry::Table(copy));
        if alone {
            self.tally.moved += 1;
            self.db.retire_table(below);
        } else {
            self.tally.copied += 1;
            self.db.drop_parent(below);
            self.db.hold(below);
        }
        self.flush.hold(below);
        if alone || downgraded {
            self.flush.whole_table(below);
        }
        if leaf {
            self.flush.made(copy);
        }
        copy
    }

    /// Counts the pages of a leaf table that is its space's own now; true if some entries allow less.
    fn take_leaf(&mut self, table: Pfn) -> bool {
        let mut downgraded = false;
        for index in self.cursor.used(table) {
            downgraded |= self.leave_to_pins((table, index));
            downgraded |= self.close_kept((table, index));
            self.count_page(self.cursor.leaf(table, index));
        }
        downgraded
    }

    /// Forks a private page whose frame others hold, or gives it a clone block, with this entry alone: the next store copies it,
    /// and leaves the frame to them. True if the entry allows less now.
    fn leave_to_pins(&mut self, place: (Pfn, EntryIndex)) -> bool {
        let found = self.cursor.leaf(place.0, place.1);
        let Some(frame) = own_frame(found) else {
            return false;
        };
        // A page that is pinned for stores is in a table that was never shared, and its holder is this space.
        let looked_at = self.db.entry(frame).refs() > 0 && self.db.entry(frame).write_pins() == 0;
        if !looked_at || cfg!(mutant = "pins_forgotten") {
            return false;
        }
        self.tally.parted += 1;
        self.tally.entries += 1;
        let share = |e: ValidEntry| e.with_flags(e.flags.shared());
        if let Some((old, _)) = self.cursor.rewrite(place.0, place.1, share) {
            self.db.fork_alone(frame);
            return old.flags.contains(EntryFlags::WRITABLE);
        }
        let alone = (Some(HeaderId::LAZY), 1);
        let Some(moved) = move_to_block(self.db, &self.cursor, place, found, alone) else {
            return false;
        };
        self.db.unpromise_blocks(1);
        moved.downgraded
    }

    /// Counts a page that was counted in a shared table.
    fn count_page(&mut self, entry: Entry) {
        let private = match entry {
            Entry::Valid(entry) => !entry.flags.contains(EntryFlags::PROTOTYPE),
            Entry::Transition(_) | Entry::PageFile(_) => true,
            Entry::Empty
            | Entry::Frozen(_)
            | Entry::Prototype(_)
            | Entry::DemandZero(_)
            | Entry::Decommitted => false,
        };
        self.tally.resident += u64::from(matches!(entry, Entry::Valid(_)));
        if private {
            self.tally.private += 1;
            self.db.unpromise_blocks(1);
        }
    }

    /// Moves every entry of a leaf table. What is left behind is for stale translations to look at.
    fn move_leaf(&mut self, from: Pfn, to: Pfn) -> bool {
        for index in self.cursor.used(from) {
            self.leave_to_pins((from, index));
            self.close_kept((from, index));
            let entry = self.cursor.leaf(from, index);
            self.cursor.put(self.db, (to, index), entry);
            self.count_page(entry);
            self.tally.entries += 1;
            if let Some(frame) = own_frame(entry) {
                self.db.set_owner(frame, Owner::Entry { table: to, index });
            }
        }
        true
    }

    /// Gives a new leaf table a twin of every entry; true if the old one's allow less now.
    fn copy_leaf(&mut self, from: Pfn, to: Pfn) -> bool {
        let overlay = self.overlay;
        let mut copy = LeafCopy::of(
            self.db,
            &self.cursor,
            from,
            |index| overlay.is_none_or(|overlay| !overlay.covers(index)),
            |_, entry| debug_assert!(false, "{entry:?} is write-pinned in a shared table"),
        );
        if let Some(overlay) = overlay {
            overlay.fill(&mut copy.leaf);
        }
        self.finish_copy(to, &copy)
    }

    /// Fills a copy of a shared leaf table; true if the other one's entries allow less now.
    pub(super) fn finish_copy(&mut self, to: Pfn, copy: &LeafCopy) -> bool {
        self.cursor.fill(self.db, to, &copy.leaf);
        self.tally.entries += u64::from(copy.leaf.used()) + copy.parted;
        self.tally.resident += copy.resident;
        self.tally.parted += copy.parted;
        copy.downgraded
    }

    /// Gives a new upper table the entries of another, all shared; true if the old one's allow less now.
    fn copy_upper(&mut self, from: Pfn, to: Pfn, alone: bool) -> bool {
        for index in self.cursor.used(from) {
            let Some(child) = self.cursor.upper(from, index).table() else {
                continue;
            };
            self.cursor.link_shared(self.db, (to, index), child);
            if !alone {
                self.db.add_parent(child);
            } else if !self.db.has_other_parents(child) {
                self.db.set_owner(child, Owner::Entry { table: to, index });
            }
        }
        if alone {
            return true;
        }
        self.cursor.share_entries(from)
    }
}
