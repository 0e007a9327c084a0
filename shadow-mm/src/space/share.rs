//! Fork of an address space by sharing its tables: what it costs does not depend on the size of the space.
//!
//! Parent and child each get a fresh root, with the parent's entries but not their writable bits: all that
//! lies below is shared from then on, and neither side can store to it before it has unshared the path
//! ([`super::own`]). The old root leaves use, and the flush names it and nothing else: one load of CR3 for each
//! virtual CPU that runs the parent. Roots that hardware has never seen are the only way to take rights
//! from everything at once that a host with shadow page tables notices without touching every table.
//!
//! What the two may not share is split off for the child at once, along its path and nowhere else:
//!
//! * ranges the child must not see, or must see empty (`MADV_DONTFORK`, `MADV_WIPEONFORK`): the child gets no
//!   table that lies inside, and a copy of the rest of one that lies across an end;
//! * write-pinned pages: the child gets a copy of the page, in a copy of its table. A leaf table with a
//!   write-pinned private page thus has one parent, always.
//!
//! Private memory is charged for the child as for an eager clone. Tables and clone blocks that unsharing may take are
//! promised by counters ([`crate::pfn`]). All that can fail does so before anything changes.

use alloc::sync::Arc;
use alloc::vec::Vec;

use crate::addr::{EntryIndex, Level, Pfn, Vpn, VpnRange};
use crate::backend::{FrameStore, Platform};
use crate::commit::NoCommit;
use crate::manager::{Demand, Manager, Promise, Reserve};
use crate::pfn::{Owner, PfnDatabase, Want};
use crate::pte::{EntryFlags, UpperEntry, ValidEntry};
use crate::shadow::{Cursor, SUPERVISOR_SLOT};
use crate::space::clone_leaf::{LeafCopy, Pinned, twin_flags};
use crate::space::fork::{ForkError, Forked, inherited_image};
use crate::space::keep::is_kept;
use crate::space::own::{Owning, Unsharing, count_tables, span};
use crate::space::state::{Descriptors, Purpose};
use crate::space::{Space, SpaceState};
use crate::stats::add;
use crate::vad::{VadFlags, VadSet};

/// What a child does not share with its parent.
struct Apart {
    /// Ranges whose pages it does not get, rising.
    hidden: Vec<VpnRange>,
    /// Pages it gets copies of, rising.
    pinned: Vec<Vpn>,
}

/// How the pages of a table are inherited.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fate {
    Shared,
    Hidden,
    /// Not all of them alike.
    Mixed,
}

impl Apart {
    fn fate(&self, span: VpnRange) -> Fate {
        let first = self
            .hidden
            .partition_point(|hidden| hidden.end() <= span.start().get());
        let hidden = self.hidden.get(first).and_then(|h| h.intersect(span));
        if hidden == Some(span) {
            return Fate::Hidden;
        }
        let first = self.pinned.partition_point(|page| *page < span.start());
        let pinned = self
            .pinned
            .get(first)
            .is_some_and(|page| span.contains(*page));
        match hidden.is_some() || pinned {
            true => Fate::Mixed,
            false => Fate::Shared,
        }
    }

    fn hides(&self, page: Vpn) -> bool {
        VpnRange::new(page, 1).is_some_and(|page| self.fate(page) == Fate::Hidden)
    }
}

/// Tables of the parent that the child does not share.
#[derive(Clone, Copy, Default)]
struct Counted {
    /// It gets tables of its own for them.
    split: usize,
    /// It gets none.
    hidden: usize,
}

/// Everything such a fork needs, taken before it changes anything.
struct Plan<B> {
    vads: VadSet<B>,
    apart: Apart,
    reserve: Reserve,
}

/// The child's tables while they are being made.
struct Splitting<'a, S> {
    /// Its cursor is the parent's.
    unsharing: Unsharing<'a, S>,
    apart: &'a Apart,
    /// Pages to be copied once the PFN lock is let go, and the tables they go to.
    pinned: Vec<(Pfn, Pinned)>,
    /// Tables it has of its own, the root not, and those it does not get.
    own: u64,
    hidden: u64,
    visited: u64,
}

impl<P: Platform> Manager<P> {
    /// Makes a child that shares its parent's tables.
    pub(super) fn fork_shared(
        &self,
        parent: &Arc<Space<P>>,
        state: &mut SpaceState<P::Backing>,
        purpose: Purpose,
    ) -> Result<Forked<P>, ForkError> {
        let mut flush = parent.fork_flush();
        let mut plan = self.plan_shared(parent, state, purpose)?;
        let mut root = || {
            let frame = plan.reserve.tables.pop();
            self.make_root(frame.expect("two roots were reserved"))
        };
        let (old, new, child_root) = (parent.root(), root(), root());
        let mut child = SpaceState::new(plan.vads, Descriptors::default());
        child.inherit_limits(state);
        child.purpose = purpose;
        child.images = match purpose {
            Purpose::Run => inherited_image(state),
            Purpose::Keep => Arc::clone(&state.images),
        };

        let mut db = self.pfns.lock();
        let owning = Owning {
            tables: &mut plan.reserve.tables,
            flush: &mut flush,
        };
        let mut splitting = Splitting {
            unsharing: self.unsharing(parent, &mut db, owning),
            apart: &plan.apart,
            pinned: Vec::new(),
            own: 0,
            hidden: 0,
            visited: 0,
        };
        splitting.share_root((old, new), child_root);
        let Splitting {
            unsharing,
            pinned,
            own,
            hidden,
            visited,
            ..
        } = splitting;
        let tally = unsharing.tally;
        tally.count(&self.counters);
        child.tables = state.tables - hidden;
        db.charge_tables(child.tables - 1);
        db.release_tables(1);
        db.retire_table(old);
        drop(db);
        flush.whole_table(old);
        flush.hold(old);

        parent.set_root(new);
        state.inherited = state.visible();
        (state.resident, state.private) = (0, 0);
        let sharing = child.tables - 1 - own;
        child.inherited = part(state.inherited, sharing, state.tables);
        child.gained_resident(tally.resident);
        self.copy_pinned(&mut child, &mut plan.reserve, &pinned);
        self.give_back(plan.reserve);
        add(&self.counters.tables_shared, sharing);
        Ok(self.publish_fork(state, (child_root, child), flush, visited))
    }

    /// Charges and takes all a fork may need; on failure everything is back where it was.
    fn plan_shared(
        &self,
        parent: &Space<P>,
        state: &SpaceState<P::Backing>,
        purpose: Purpose,
    ) -> Result<Plan<P::Backing>, ForkError> {
        let vads = match purpose {
            Purpose::Run => self.inherited(state)?.0,
            Purpose::Keep => self.kept(state)?,
        };
        let cursor = parent.cursor(&self.store);
        let apart = self.apart(&cursor, state, purpose);
        let pages = vads.charged();
        {
            let mut db = self.pfns.lock();
            self.charge_child(&mut db, state, pages)?;
            if db.injected_failure() || db.promise_blocks(state.private) == Err(NoCommit) {
                db.commit.release(pages);
                let blocks = state.private;
                return Err(ForkError::NoCloneBlocks { blocks });
            }
        }
        let mut counted = Counted::default();
        let zero = Vpn::new(0).expect("page 0 is a page");
        let root = (cursor.root(), Level::Root, zero);
        count_apart(&cursor, root, &apart, &mut counted);
        let tables = counted.split + 2;
        let demand = Demand {
            tables,
            data: apart.pinned.len(),
            extra: 0,
            want: Want::Anything,
        };
        let promise = Promise {
            kept: 0,
            made: state.tables - 1 - (counted.split + counted.hidden) as u64,
        };
        match self.reserve_with(demand, promise) {
            Some(reserve) => Ok(Plan {
                vads,
                apart,
                reserve,
            }),
            None => {
                let mut db = self.pfns.lock();
                db.commit.release(pages);
                db.unpromise_blocks(state.private);
                let pages = demand.data;
                Err(ForkError::NoMemory { tables, pages })
            }
        }
    }

    /// What the child will not share.
    fn apart(
        &self,
        cursor: &Cursor<'_, P::Store>,
        state: &SpaceState<P::Backing>,
        purpose: Purpose,
    ) -> Apart {
        let apart = VadFlags::DONT_FORK | VadFlags::WIPE_ON_FORK;
        let hidden = state.vads.iter().filter(|vad| match purpose {
            Purpose::Run => vad.flags.intersects(apart),
            Purpose::Keep if cfg!(mutant = "kept_as_child") => vad.flags.intersects(apart),
            Purpose::Keep => !is_kept(vad),
        });
        let db = self.pfns.lock();
        let pinned = db.write_pinned().iter();
        let mut apart = Apart {
            hidden: hidden.map(|vad| vad.range).collect(),
            pinned: pinned
                .filter_map(|frame| page_of(&db, cursor.root(), *frame))
                .collect(),
        };
        apart.pinned.sort_unstable();
        let pinned = core::mem::take(&mut apart.pinned);
        apart.pinned = pinned.into_iter().filter(|p| !apart.hides(*p)).collect();
        apart
    }

    /// Gives the child copies of its own of pages that are being stored to.
    fn copy_pinned(
        &self,
        child: &mut SpaceState<P::Backing>,
        reserve: &mut Reserve,
        pinned: &[(Pfn, Pinned)],
    ) {
        for (table, page) in pinned {
            let frame = reserve.data.pop().expect("a frame per pinned page");
            let copy = self.copied(frame, page.entry);
            let (table, index) = (*table, page.index);
            let mut db = self.pfns.lock();
            let frame = db.activate(copy, Owner::Entry { table, index });
            let flags = twin_flags(page.entry.flags) | EntryFlags::DIRTY;
            let cursor = Cursor::new(&self.store, table);
            cursor.install(&mut db, table, index, ValidEntry { frame, flags });
            child.gained_private(1);
        }
    }
}

/// The page that a private frame is, if it is one of the space with this root.
fn page_of(db: &PfnDatabase, root: Pfn, frame: Pfn) -> Option<Vpn> {
    let (mut at, mut page) = (frame, 0);
    for level in [Level::Leaf, Level::Directory, Level::Pointers, Level::Root] {
        let Owner::Entry { table, index } = db.entry(at).owner else {
            return None;
        };
        page += index.get() as u64 * level.pages();
        at = table;
    }
    Vpn::new(page).filter(|_| at == root)
}

/// A part of a number of pages, for so many of the tables they are in.
fn part(pages: u64, tables: u64, of: u64) -> u64 {
    (u128::from(pages) * u128::from(tables) / u128::from(of.max(1))) as u64
}

/// Counts the tables below one, which translates pages from `start` on, that the child does not share. Only
/// those that lie across an edge are looked into.
fn count_apart<S: FrameStore>(
    cursor: &Cursor<'_, S>,
    (table, level, start): (Pfn, Level, Vpn),
    apart: &Apart,
    counted: &mut Counted,
) {
    let Some(below) = level.below() else { return };
    for (_, child, span) in children(cursor, (table, level, start)) {
        match apart.fate(span) {
            Fate::Shared => {}
            Fate::Hidden => {
                counted.hidden += 1 + count_tables(cursor, (child, below), span);
            }
            Fate::Mixed => {
                counted.split += 1;
                count_apart(cursor, (child, below, span.start()), apart, counted);
            }
        }
    }
}

/// The tables that one of the given level names, the supervisor's not: each with its slot and its pages.
fn children<S: FrameStore>(
    cursor: &Cursor<'_, S>,
    (table, level, start): (Pfn, Level, Vpn),
) -> impl Iterator<Item = (EntryIndex, Pfn, VpnRange)> {
    let guests = move |index: &EntryIndex| level != Level::Root || *index != SUPERVISOR_SLOT;
    cursor.used(table).filter(guests).filter_map(move |index| {
        let child = cursor.upper(table, index).table()?;
        let first = start.checked_add(index.get() as u64 * level.pages())?;
        Some((index, child, span(level, first)?))
    })
}

impl<S: FrameStore> Splitting<'_, S> {
    /// Gives the parent its new root, and the child what it inherits.
    fn share_root(&mut self, (old, new): (Pfn, Pfn), child_root: Pfn) {
        let zero = Vpn::new(0).expect("page 0 is a page");
        let tables: Vec<_> = children(&self.unsharing.cursor, (old, Level::Root, zero)).collect();
        for (index, table, span) in tables {
            let Unsharing { cursor, db, .. } = &mut self.unsharing;
            cursor.link_shared(db, (new, index), table);
            if !db.has_other_parents(table) {
                db.set_owner(table, Owner::Entry { table: new, index });
            }
            self.inherit((child_root, index), (table, Level::Pointers), span);
        }
    }

    /// Gives an entry of the child's what a table of the parent's means for it.
    fn inherit(&mut self, place: (Pfn, EntryIndex), (table, level): (Pfn, Level), span: VpnRange) {
        self.visited += 1;
        match self.apart.fate(span) {
            Fate::Shared => {
                let Unsharing { cursor, db, .. } = &mut self.unsharing;
                cursor.link_shared(db, place, table);
                db.add_parent(table);
            }
            Fate::Hidden => {
                let cursor = &self.unsharing.cursor;
                let below = count_tables(cursor, (table, level), span);
                self.hidden += 1 + below as u64;
            }
            Fate::Mixed => self.split(place, (table, level), span.start()),
        }
    }

    /// Gives the child a table of its own in the place of one that it cannot share as a whole.
    fn split(&mut self, place: (Pfn, EntryIndex), (table, level): (Pfn, Level), start: Vpn) {
        let frame = self.unsharing.tables.pop().expect("tables were reserved");
        let (above, index) = place;
        let owner = Owner::Entry {
            table: above,
            index,
        };
        let copy = self.unsharing.db.activate(frame.into(), owner);
        let pinned = self.pinned.len();
        let downgraded = match level.below() {
            None => self.copy_visible(table, copy, start),
            Some(below) => self.split_entries((table, level, start), copy, below),
        };
        if downgraded {
            self.unsharing.flush.whole_table(table);
        }
        let Unsharing { cursor, db, .. } = &mut self.unsharing;
        if db.entry(copy).share() == 1 && pinned == self.pinned.len() {
            // Nothing in it is for the child. Nobody has seen it.
            db.drop_table_held(copy);
            db.release(copy);
            self.hidden += 1;
        } else {
            cursor.link_existing(db, above, index, copy);
            self.own += 1;
        }
    }

    /// Gives an upper table of the child's what the entries of the parent's mean for it; true if some of
    /// those allow less now.
    fn split_entries(&mut self, from: (Pfn, Level, Vpn), copy: Pfn, below: Level) -> bool {
        let mut downgraded = false;
        let tables: Vec<_> = children(&self.unsharing.cursor, from).collect();
        for (index, child, span) in tables {
            let place = (from.0, index);
            let cursor = &self.unsharing.cursor;
            let own = cursor.upper(from.0, index) == UpperEntry::Table(child);
            if own && self.apart.fate(span) == Fate::Shared {
                cursor.relink(place, UpperEntry::Shared(child));
                downgraded = true;
            }
            self.inherit((copy, index), (child, below), span);
        }
        downgraded
    }

    /// Gives a leaf table of the child's a twin of every entry that it may see; true if the parent's allow
    /// less now.
    fn copy_visible(&mut self, from: Pfn, to: Pfn, start: Vpn) -> bool {
        let Self {
            unsharing,
            apart,
            visited,
            pinned,
            ..
        } = self;
        let Unsharing { cursor, db, .. } = unsharing;
        let page = |index: EntryIndex| start.checked_add(index.get() as u64);
        let is_seen = |index| {
            let seen = page(index).is_some_and(|vpn| !apart.hides(vpn));
            *visited += u64::from(seen);
            seen
        };
        let copy = LeafCopy::of(db, cursor, from, is_seen, |index, entry| {
            if let Some(vpn) = page(index) {
                pinned.push((to, Pinned { index, vpn, entry }));
            }
        });
        self.unsharing.finish_copy(to, &copy)
    }
}
