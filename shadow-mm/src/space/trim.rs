//! Taking pages from a space (system 12): ages, and the trimmer's hand.
//!
//! A space's working set is its valid entries. The trimmer goes round them like the hand of a clock. A
//! page that was used since the last look gets young, another gets older; which ages go is the caller's
//! choice. A page that goes leaves its entry in transition (or naming its clone block), and its frame with the flush: only when no vCPU
//! can still store to it does it come to the modified or the standby list. Pages that
//! are nowhere but in no need to be anywhere, zeroes and the unchanged pages of files, are simply dropped.
//!
//! In a table that spaces share, what one of them trims goes from all of them at once, and the flush is *wide*.
//! The table stays, even if it is empty then.
//!
//! Where there is no page file, or it is full, only those are taken.

use core::ops::ControlFlow;

use crate::addr::{EntryIndex, Pfn, Vpn, VpnRange};
use crate::backend::Platform;
use crate::flush::{Flush, TableEdits};
use crate::manager::Manager;
use crate::pfn::{Original, Owner, PfnDatabase, PfnFlags};
use crate::pte::{Entry, EntryFlags, ValidEntry};
use crate::shadow::{Cursor, LeafRun};
use crate::space::books::Books;
use crate::space::zap::drop_page;
use crate::space::{Space, SpaceState};
use crate::stats::add;

/// Which pages a trim takes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum TrimMode {
    /// None: the pages only age.
    AgeOnly,
    /// Those not used for three looks in a row.
    Old,
    /// Those not used since the last look.
    Unused,
    /// Any, used or not, also below the working set's minimum.
    Any,
}

/// What a trim did.
#[derive(Debug)]
#[must_use]
pub struct Trimmed {
    /// What became stale: the frames reach a list only when it is acknowledged.
    pub flush: Flush,
    /// Pages that were taken.
    pub pages: u64,
    /// Pages that were looked at.
    pub looked_at: u64,
}

/// A trim under way.
struct Trimming {
    mode: TrimMode,
    goal: u64,
    /// Whether pages can be written somewhere.
    page_file: bool,
    flush: Flush,
    pages: u64,
    looked_at: u64,
    dropped: bool,
}

/// What becomes of a page.
enum Fate {
    Stays,
    /// The entry becomes empty: the page can be made again.
    Dropped,
    /// The entry becomes empty: a section has the page, and takes over the dirty bit.
    Unmapped,
    /// The entry becomes this.
    Leaves(Entry),
    /// It is forked: the same, with a clone block that is to be made for it.
    LeavesForked,
}

impl<P: Platform> Manager<P> {
    /// Looks at a space's pages from where the last trim ended, once round at most, until `goal` pages
    /// are taken or the working set is at its minimum.
    pub fn trim(&self, space: &Space<P>, goal: u64, mode: TrimMode) -> Trimmed {
        let mut state = space.state.lock();
        let spare = match mode {
            TrimMode::Any => state.visible(),
            TrimMode::AgeOnly => 0,
            TrimMode::Old | TrimMode::Unused => {
                state.visible().saturating_sub(state.working_set.min)
            }
        };
        let mut trimming = Trimming {
            mode,
            goal: goal.min(spare),
            page_file: self.pfns.lock().slots.available() > 0,
            flush: space.no_flush(),
            pages: 0,
            looked_at: 0,
            dropped: false,
        };
        if state.alive && (trimming.goal > 0 || mode == TrimMode::AgeOnly) {
            self.go_round(space, &mut state, &mut trimming);
        }
        add(&self.counters.pages_trimmed, trimming.pages);
        Trimmed {
            flush: trimming.flush.finish(),
            pages: trimming.pages,
            looked_at: trimming.looked_at,
        }
    }

    /// Sets the least pages a space keeps unless nothing else is left, and the most it has before it is
    /// trimmed without being asked.
    pub fn set_working_set(&self, space: &Space<P>, min: u64, max: u64) {
        let mut state = space.state.lock();
        state.working_set.min = min;
        state.working_set.max = max.max(min);
    }

    /// Looks at all of a space's pages once; none is taken.
    pub fn age(&self, space: &Space<P>) -> Flush {
        self.trim(space, 0, TrimMode::AgeOnly).flush
    }

    /// Moves the hand on, once round at most.
    fn go_round(
        &self,
        space: &Space<P>,
        state: &mut SpaceState<P::Backing>,
        trimming: &mut Trimming,
    ) {
        let end = self.limits.user_end.vpn().get();
        let (zero, hand) = (Vpn::new(0), state.working_set.hand);
        let above = VpnRange::between(hand, end);
        let below = zero.and_then(|zero| VpnRange::between(zero, hand.get()));
        for part in [above, below].into_iter().flatten() {
            let cursor = space.cursor(&self.store);
            let stop = cursor.for_each_leaf_until(part, |run| {
                self.trim_leaf(&cursor, state, run, trimming);
                match Vpn::new(run.range().end()) {
                    Some(next) if trimming.is_done() => {
                        state.working_set.hand = next;
                        ControlFlow::Break(())
                    }
                    Some(_) | None => ControlFlow::Continue(()),
                }
            });
            if trimming.dropped {
                let freed = cursor.prune(&mut self.pfns.lock(), part, &mut trimming.flush);
                state.tables -= freed;
                trimming.dropped = false;
            }
            if stop.is_break() {
                break;
            }
        }
    }

    fn trim_leaf(
        &self,
        cursor: &Cursor<'_, P::Store>,
        state: &mut SpaceState<P::Backing>,
        run: LeafRun,
        trimming: &mut Trimming,
    ) {
        let mut edits = TableEdits::new(run.table);
        let (mut written, before) = (0, trimming.pages);
        let mut books = if run.shared {
            Books::Shared
        } else {
            Books::Own(&mut *state)
        };
        let mut db = self.pfns.lock();
        for (index, vpn) in run.pages() {
            let place = (run.table, index);
            let Entry::Valid(entry) = cursor.leaf(run.table, index) else {
                continue;
            };
            trimming.looked_at += 1;
            let aged = cursor.rewrite(run.table, index, |e| e.with_flags(e.flags.aged()));
            let entry = aged.map_or(entry, |(_, new)| new);
            // Where page tables are shadowed, hardware does not set the bit again without a flush.
            let mut stale = aged.is_some_and(|(old, _)| old.flags.contains(EntryFlags::ACCESSED));
            if !trimming.is_done() && trimming.takes(entry) {
                stale |= take_page(&mut db, cursor, &mut books, trimming, (place, entry));
            }
            if stale {
                edits.add(index, vpn);
                written += 1;
            }
        }
        drop(db);
        if run.shared {
            state.inherited = state.inherited.saturating_sub(trimming.pages - before);
            if written > 0 && cfg!(not(mutant = "narrow_trim")) {
                trimming.flush.widen();
            }
        }
        if cfg!(not(mutant = "unflushed_trim")) {
            trimming.flush.absorb(edits);
        }
        add(&self.counters.entries_written, written);
    }
}

impl Trimming {
    fn is_done(&self) -> bool {
        self.mode != TrimMode::AgeOnly && self.pages >= self.goal
    }

    /// Whether the page is old enough.
    fn takes(&self, entry: ValidEntry) -> bool {
        let age = entry.flags.age();
        match self.mode {
            TrimMode::AgeOnly => false,
            TrimMode::Old => age >= 3,
            TrimMode::Unused => age >= 1,
            TrimMode::Any => true,
        }
    }
}

/// Takes a page from its space, if nothing keeps it; true if that was done.
fn take_page<B: Clone + Eq, S: crate::backend::FrameStore>(
    db: &mut PfnDatabase,
    cursor: &Cursor<'_, S>,
    books: &mut Books<'_, B>,
    trimming: &mut Trimming,
    ((table, index), entry): ((Pfn, EntryIndex), ValidEntry),
) -> bool {
    let fate = fate(db, (table, index), entry, trimming.page_file);
    match fate {
        Fate::Stays => return false,
        Fate::Dropped => match cursor.remove(db, table, index) {
            // It may have become dirty since: then its page is lost if it is not kept.
            Entry::Valid(old) if old.flags.contains(EntryFlags::DIRTY) => {
                cursor.install(db, table, index, old);
                return false;
            }
            Entry::Valid(old) => {
                drop_page(db, books, old);
                trimming.dropped = true;
            }
            other => debug_assert!(false, "a valid entry became {other:?}"),
        },
        Fate::Unmapped => {
            if let Entry::Valid(old) = cursor.remove(db, table, index) {
                drop_page(db, books, old);
                trimming.dropped = true;
            }
        }
        Fate::Leaves(_) | Fate::LeavesForked => {
            let left = match fate {
                Fate::Leaves(left) => left,
                _ => Entry::Prototype(db.name_forked(entry.frame)),
            };
            let old = cursor.replace((table, index), left);
            let dirty = matches!(old, Entry::Valid(old) if old.flags.contains(EntryFlags::DIRTY));
            if dirty && cfg!(not(mutant = "lost_dirty_at_trim")) {
                db.mark_modified(entry.frame);
            }
            db.drop_share_held(entry.frame);
            books.lose_resident();
        }
    }
    trimming.flush.hold(entry.frame);
    trimming.pages += 1;
    true
}

/// What a page that is old enough comes to.
fn fate(
    db: &PfnDatabase,
    (table, index): (Pfn, EntryIndex),
    entry: ValidEntry,
    page_file: bool,
) -> Fate {
    let page = db.entry(entry.frame);
    let dirty = entry.flags.contains(EntryFlags::DIRTY) || page.flags.contains(PfnFlags::MODIFIED);
    // A page that was stored to gives its old slot back when it goes: somebody will have that.
    let page_file = page_file || matches!(page.original(), Original::Slot(_));
    match (page.owner, page.original()) {
        // A pin keeps it, or a flush or a write that has not ended yet.
        (Owner::Entry { .. }, _) if page.refs() > 0 => Fate::Stays,
        (_, _) if page.write_pins() > 0 => Fate::Stays,
        (Owner::Entry { .. }, Original::Zero | Original::File) if !dirty => Fate::Dropped,
        (Owner::Entry { table: t, index: i }, _) if page_file || !dirty => {
            debug_assert_eq!((t, i), (table, index));
            Fate::Leaves(Entry::Transition(entry.frame))
        }
        (Owner::Clone(block), _) if page_file || !dirty => Fate::Leaves(Entry::Prototype(block)),
        (Owner::Entries, _) if page_file || !dirty => Fate::LeavesForked,
        (Owner::Entry { .. } | Owner::Clone(_) | Owner::Entries, _) => Fate::Stays,
        // Shared memory that could go nowhere from the modified list.
        (Owner::Section { section, .. }, _)
            if dirty && !page_file && !db.sections.is_of_file(section) =>
        {
            Fate::Stays
        }
        // The section has it, or a truncation that is under way will take the entry.
        (Owner::Section { .. } | Owner::None, _) => Fate::Unmapped,
        (Owner::Root | Owner::Supervisor | Owner::Tables, _) => {
            debug_assert!(false, "{:?} is a table and mapped", entry.frame);
            Fate::Stays
        }
    }
}
