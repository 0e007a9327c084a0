//! Cloning the entries of one leaf table. Nothing here can fail: all was reserved.

use alloc::vec::Vec;

use crate::addr::{EntryIndex, Vpn};
use crate::backend::Platform;
use crate::manager::Manager;
use crate::pfn::{Owner, PfnDatabase};
use crate::pte::{Entry, EntryFlags, ValidEntry};
use crate::shadow::{Cursor, LeafRun};
use crate::space::Space;
use crate::space::fork::Cloning;
use crate::stats::add;

/// A page that is stored to while the fork runs: the child gets a copy at once.
struct Pinned {
    index: EntryIndex,
    vpn: Vpn,
    entry: ValidEntry,
}

impl<P: Platform> Manager<P> {
    /// Gives the child an entry for each valid entry of the run. Private frames move to clone blocks,
    /// and both sides' entries become copy-on-write.
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
            let Entry::Valid(entry) = cursor.leaf(run.table, index) else {
                continue;
            };
            clone.touched += 1;
            let shared = entry.flags.contains(EntryFlags::PROTOTYPE);
            let pins = db.entry(entry.frame).write_pins;
            if !shared && pins > 0 && cfg!(not(mutant = "pinned_shared")) {
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
            let flags = if shared && db.block_of(entry.frame).is_none() {
                // A section's page: its views need no clone block.
                db.add_share(entry.frame);
                clone.resident += 1;
                entry.flags
            } else {
                share_frame(&mut db, clone, entry);
                entry.flags.shared()
            };
            let entry = entry.with_flags(child_flags(flags));
            let table = child.ensure_leaf(&mut db, vpn, &mut clone.plan.reserve.tables);
            child.install(&mut db, table, index, entry);
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
    let block = match db.block_of(entry.frame) {
        Some(block) => {
            db.clones.add_reference(block);
            block
        }
        None => {
            let header = clone
                .plan
                .header
                .expect("a header for private pages was reserved");
            let block = db.clones.make_block(header, entry.frame);
            db.set_owner(entry.frame, Owner::Clone(block));
            clone.parent.private -= 1;
            clone.blocks += 1;
            block
        }
    };
    db.add_share(entry.frame);
    clone.plan.descriptors.add(block.header, 1);
    clone.resident += 1;
}

/// The child has not used the page yet.
fn child_flags(parent: EntryFlags) -> EntryFlags {
    parent - (EntryFlags::ACCESSED | EntryFlags::DIRTY)
}
