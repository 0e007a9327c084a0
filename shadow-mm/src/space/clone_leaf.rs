//! Cloning the entries of one leaf table, in whatever state their pages are (systems 1 and 4).
//!
//! The PFN lock is held throughout, so no page can leave transition between a look and a change. Nothing here can fail: all was reserved.
//!
//! [`share_entry`] is what both kinds of fork do with one entry: the eager one with all of them at once, into blocks
//! of its own header; the one that shares tables when a table is copied, into blocks made one by one.

use alloc::vec::Vec;

use crate::addr::{EntryIndex, Pfn, Vpn};
use crate::backend::{FrameStore, Platform};
use crate::manager::Manager;
use crate::pfn::{Owner, PfnDatabase};
use crate::proto::{BlockContent, BlockId, HeaderId};
use crate::pte::{Entry, EntryFlags, ValidEntry};
use crate::shadow::{Cursor, LeafRun};
use crate::space::Space;
use crate::space::fork::Cloning;
use crate::space::zap::may_be_stale;
use crate::stats::add;

/// A page that is stored to while the fork runs: the child gets a copy at once.
pub(super) struct Pinned {
    pub(super) index: EntryIndex,
    pub(super) vpn: Vpn,
    pub(super) entry: ValidEntry,
}

/// What an entry's twin in a copy of its table is.
pub(super) enum Twin {
    /// Empty.
    Nothing,
    /// To be copied for: the page is write-pinned.
    Pinned(ValidEntry),
    Entry(Shared),
}

/// A page that two tables' entries refer to from now on.
pub(super) struct Shared {
    pub(super) entry: Entry,
    /// The clone block both refer to; a section's page needs none.
    pub(super) block: Option<BlockId>,
    /// Whether the block was made for it.
    pub(super) made: bool,
    /// Whether a translation of the first entry may now allow too much.
    pub(super) downgraded: bool,
}

/// Makes a twin of the entry at `place`: a private page moves to a clone block of `header`, which both
/// entries refer to then, and both become copy-on-write.
pub(super) fn share_entry<S: FrameStore>(
    db: &mut PfnDatabase,
    cursor: &Cursor<'_, S>,
    place: (Pfn, EntryIndex),
    header: Option<HeaderId>,
) -> Twin {
    let found = cursor.leaf(place.0, place.1);
    let new_block = |db: &mut PfnDatabase, content| {
        let header = header.expect("a header for private pages was reserved");
        new_block(db, header, content)
    };
    match found {
        Entry::Empty | Entry::DemandZero(_) | Entry::Decommitted => Twin::Nothing,
        Entry::Valid(entry) => {
            let private = !entry.flags.contains(EntryFlags::PROTOTYPE);
            let pins = db.entry(entry.frame).write_pins();
            if private && pins > 0 && cfg!(not(mutant = "pinned_shared")) {
                return Twin::Pinned(entry);
            }
            let mut downgraded = false;
            if private {
                let share = |e: ValidEntry| e.with_flags(e.flags.shared());
                let Some((old, _)) = cursor.rewrite(place.0, place.1, share) else {
                    return Twin::Nothing;
                };
                downgraded = old.flags.contains(EntryFlags::WRITABLE);
                if old.flags.contains(EntryFlags::DIRTY) {
                    db.mark_modified(entry.frame);
                }
            }
            let block = if private {
                Some(new_block(db, BlockContent::Resident(entry.frame)))
            } else {
                let block = db.block_of(entry.frame);
                block.inspect(|block| db.clones.add_reference(*block))
            };
            db.add_share(entry.frame);
            // A section's views need no clone block, and keep their rights.
            let flags = match block {
                Some(_) => entry.flags.shared(),
                None => entry.flags,
            };
            Twin::Entry(Shared {
                entry: Entry::Valid(entry.with_flags(twin_flags(flags))),
                block,
                made: private,
                downgraded,
            })
        }
        Entry::Transition(_) | Entry::PageFile(_) | Entry::Prototype(_) => {
            // A stale translation may still allow stores.
            let downgraded = may_be_stale(db, found);
            let (block, made) = match found {
                Entry::Prototype(block) => {
                    db.clones.add_reference(block);
                    (block, false)
                }
                Entry::PageFile(slot) => (new_block(db, BlockContent::PageFile(slot)), true),
                Entry::Transition(frame) => (new_block(db, BlockContent::Resident(frame)), true),
                Entry::Empty | Entry::Valid(_) | Entry::DemandZero(_) | Entry::Decommitted => {
                    unreachable!("{found:?} was dealt with")
                }
            };
            let entry = Entry::Prototype(block);
            if made {
                cursor.replace(place, entry);
            }
            Twin::Entry(Shared {
                entry,
                block: Some(block),
                made,
                downgraded,
            })
        }
    }
}

/// Moves a private page to a clone block that two entries refer to.
fn new_block(db: &mut PfnDatabase, header: HeaderId, content: BlockContent) -> BlockId {
    let block = db.clones.make_block(header, content);
    if let BlockContent::Resident(frame) = content {
        db.give_to_block(frame, block);
    }
    block
}

/// The twin has not been used yet.
pub(super) fn twin_flags(flags: EntryFlags) -> EntryFlags {
    flags - (EntryFlags::ACCESSED | EntryFlags::DIRTY)
}

impl<P: Platform> Manager<P> {
    /// Gives the child an entry for each entry of the run that is in use. Private pages move to clone
    /// blocks, and both sides' entries become copy-on-write.
    pub(super) fn clone_leaf(
        &self,
        parent: &Space<P>,
        clone: &mut Cloning<'_, P::Backing>,
        run: LeafRun,
    ) {
        let cursor = parent.cursor(&self.store);
        let child = Cursor::new(&self.store, clone.child_root);
        let mut pinned = Vec::new();
        let mut downgraded = false;
        let before = clone.touched;
        let mut db = self.pfns.lock();
        for (index, vpn) in run.pages() {
            let shared = match share_entry(&mut db, &cursor, (run.table, index), clone.plan.header)
            {
                Twin::Nothing => continue,
                Twin::Pinned(entry) => {
                    clone.touched += 1;
                    pinned.push(Pinned { index, vpn, entry });
                    continue;
                }
                Twin::Entry(shared) => shared,
            };
            clone.note(&shared);
            downgraded |= shared.downgraded;
            let table = child.ensure_leaf(&mut db, vpn, &mut clone.plan.reserve.tables);
            child.put(&mut db, (table, index), shared.entry);
        }
        drop(db);
        if downgraded {
            clone.flush.whole_table(run.table);
        }
        add(&self.counters.entries_written, 2 * (clone.touched - before));
        for page in &pinned {
            let frame = clone.plan.reserve.data.pop();
            let copy = self.copied(frame.expect("a frame per pinned page"), page.entry);
            let mut db = self.pfns.lock();
            let table = child.ensure_leaf(&mut db, page.vpn, &mut clone.plan.reserve.tables);
            let owner = Owner::Entry {
                table,
                index: page.index,
            };
            let frame = db.activate(copy, owner);
            let flags = twin_flags(page.entry.flags) | EntryFlags::DIRTY;
            child.install(&mut db, table, page.index, ValidEntry { frame, flags });
            clone.resident += 1;
            clone.private += 1;
        }
    }
}

impl<B: Clone + Eq> Cloning<'_, B> {
    /// Counts an entry that the child got.
    fn note(&mut self, shared: &Shared) {
        self.touched += 1;
        self.resident += u64::from(matches!(shared.entry, Entry::Valid(_)));
        if let Some(block) = shared.block {
            self.plan.descriptors.add(block.header, 1);
        }
        if shared.made {
            self.parent.private -= 1;
            self.blocks += 1;
        }
    }
}
