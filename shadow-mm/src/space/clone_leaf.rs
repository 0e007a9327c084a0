//! Cloning the entries of one leaf table, in whatever state their pages are (systems 1 and 4).
//!
//! The PFN lock is held throughout, so no page can leave transition between a look and a change. Nothing here can fail: all was reserved.

use alloc::vec::Vec;

use crate::addr::{EntryIndex, Vpn};
use crate::backend::Platform;
use crate::manager::Manager;
use crate::pfn::{Owner, PfnDatabase};
use crate::proto::{BlockContent, BlockId};
use crate::pte::{Entry, EntryFlags, ValidEntry};
use crate::shadow::{Cursor, LeafRun};
use crate::space::Space;
use crate::space::fork::Cloning;
use crate::space::zap::may_be_stale;
use crate::stats::add;

/// A page that is stored to while the fork runs: the child gets a copy at once.
struct Pinned {
    index: EntryIndex,
    vpn: Vpn,
    entry: ValidEntry,
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
            let found = cursor.leaf(run.table, index);
            let copy = match found {
                Entry::Empty | Entry::DemandZero(_) | Entry::Decommitted => continue,
                Entry::Valid(entry) => {
                    let shared = entry.flags.contains(EntryFlags::PROTOTYPE);
                    let pins = db.entry(entry.frame).write_pins;
                    if !shared && pins > 0 && cfg!(not(mutant = "pinned_shared")) {
                        clone.touched += 1;
                        pinned.push(Pinned { index, vpn, entry });
                        continue;
                    }
                    if !shared {
                        let share = |e: ValidEntry| e.with_flags(e.flags.shared());
                        let Some((old, _)) = cursor.rewrite(run.table, index, share) else {
                            continue;
                        };
                        downgraded |= old.flags.contains(EntryFlags::WRITABLE);
                        if old.flags.contains(EntryFlags::DIRTY) {
                            db.mark_modified(entry.frame);
                        }
                    }
                    let flags = if db.is_sections(entry) {
                        // Its views need no clone block.
                        db.add_share(entry.frame);
                        clone.resident += 1;
                        entry.flags
                    } else {
                        share_frame(&mut db, clone, entry);
                        entry.flags.shared()
                    };
                    Entry::Valid(entry.with_flags(child_flags(flags)))
                }
                Entry::Transition(_) | Entry::PageFile(_) | Entry::Prototype(_) => {
                    // A stale translation may still allow stores.
                    downgraded |= may_be_stale(&db, found);
                    let block = share_absent(&mut db, clone, found);
                    if found != Entry::Prototype(block) {
                        cursor.replace((run.table, index), Entry::Prototype(block));
                    }
                    Entry::Prototype(block)
                }
            };
            clone.touched += 1;
            let table = child.ensure_leaf(&mut db, vpn, &mut clone.plan.reserve.tables);
            child.put(&mut db, (table, index), copy);
        }
        drop(db);
        if downgraded {
            clone.flush.whole_table(run.table);
        }
        add(&self.counters.entries_written, 2 * (clone.touched - before));
        for page in &pinned {
            self.clone_pinned(clone, &child, page);
        }
    }

    /// Gives the child a copy of its own of a page that is being stored to.
    fn clone_pinned(
        &self,
        clone: &mut Cloning<'_, P::Backing>,
        child: &Cursor<'_, P::Store>,
        page: &Pinned,
    ) {
        let frame = clone
            .plan
            .reserve
            .data
            .pop()
            .expect("a frame per pinned page was reserved");
        let frame = self.copied(frame, page.entry);
        let mut db = self.pfns.lock();
        let table = child.ensure_leaf(&mut db, page.vpn, &mut clone.plan.reserve.tables);
        let frame = db.activate(
            frame,
            Owner::Entry {
                table,
                index: page.index,
            },
        );
        let flags = child_flags(page.entry.flags) | EntryFlags::DIRTY;
        child.install(&mut db, table, page.index, ValidEntry { frame, flags });
        clone.resident += 1;
        clone.private += 1;
    }
}

/// One more entry, the child's, maps the frame; its clone block is made if it has none.
fn share_frame<B: Clone + Eq>(db: &mut PfnDatabase, clone: &mut Cloning<'_, B>, entry: ValidEntry) {
    match db.block_of(entry.frame) {
        Some(block) => refer_again(db, clone, block),
        None => {
            new_block(db, clone, BlockContent::Resident(entry.frame));
        }
    }
    db.add_share(entry.frame);
    clone.resident += 1;
}

/// One more entry, the child's, refers to a page that is not mapped here. Gives back the page's clone
/// block, which is made if it has none; the parent's entry is still to refer to it then.
fn share_absent<B: Clone + Eq>(
    db: &mut PfnDatabase,
    clone: &mut Cloning<'_, B>,
    found: Entry,
) -> BlockId {
    match found {
        Entry::Prototype(block) => {
            refer_again(db, clone, block);
            block
        }
        Entry::PageFile(slot) => new_block(db, clone, BlockContent::PageFile(slot)),
        Entry::Transition(frame) => new_block(db, clone, BlockContent::Resident(frame)),
        Entry::Empty | Entry::Valid(_) | Entry::DemandZero(_) | Entry::Decommitted => {
            unreachable!("the caller has dealt with {found:?}")
        }
    }
}

fn refer_again<B: Clone + Eq>(db: &mut PfnDatabase, clone: &mut Cloning<'_, B>, block: BlockId) {
    db.clones.add_reference(block);
    clone.plan.descriptors.add(block.header, 1);
}

/// Moves a private page of the parent to a clone block, which the child refers to as well.
fn new_block<B: Clone + Eq>(
    db: &mut PfnDatabase,
    clone: &mut Cloning<'_, B>,
    content: BlockContent,
) -> BlockId {
    let header = clone
        .plan
        .header
        .expect("a header for private pages was reserved");
    let block = db.clones.make_block(header, content);
    if let BlockContent::Resident(frame) = content {
        db.give_to_block(frame, block);
    }
    clone.parent.private -= 1;
    clone.blocks += 1;
    clone.plan.descriptors.add(header, 1);
    block
}

/// The child has not used the page yet.
fn child_flags(parent: EntryFlags) -> EntryFlags {
    parent - (EntryFlags::ACCESSED | EntryFlags::DIRTY)
}
