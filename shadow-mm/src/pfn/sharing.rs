//! Tables that several spaces share, and what was promised for the day they are not shared any more.
//!
//! A fork that shares tables takes two frames. Each of its spaces may later need a copy of every table it
//! shares, and a clone block for every private page in them, and the fault that needs them must not find
//! that there is no memory. So both are *promised* at the fork, by counters alone: table frames
//! against the table zone, the blocks against the commit account.

use super::database::{PfnDatabase, ZoneKind};
use super::entry::{Original, Owner, PfnFlags, PfnState};
use crate::addr::{EntryIndex, Pfn};
use crate::commit::NoCommit;
use crate::proto::{BlockContent, BlockId, HeaderId};

/// What came of giving a private page a clone block.
pub(crate) enum Sharing {
    /// It has this one, and its entry is what it was to be.
    Done(BlockId),
    /// Nothing: its entry is this by now.
    Changed(u64),
    /// Nothing: somebody may store to the frame through a pin.
    Pinned,
}

impl PfnDatabase {
    /// Moves the private page in a frame to a clone block that two entries refer to: the one that maps it, which `exchange`
    /// makes one that refers to a block, and another. `dirty` is what that entry said of it.
    #[inline]
    pub(crate) fn share_private(
        &mut self,
        (pfn, dirty): (Pfn, bool),
        header: HeaderId,
        exchange: impl FnOnce() -> Result<u64, u64>,
    ) -> Sharing {
        let entry = self.data.entry_mut(pfn);
        if entry.write_pins() > 0 && cfg!(not(mutant = "pinned_shared")) {
            return Sharing::Pinned;
        }
        if let Err(now) = exchange() {
            return Sharing::Changed(now);
        }
        *entry.share_mut() += 1;
        if dirty {
            entry.flags |= PfnFlags::MODIFIED;
        }
        let content = BlockContent::Resident(pfn);
        let block = self.clones.make_block(header, content, 2);
        entry.owner = Owner::Clone(block);
        match entry.original() {
            Original::Zero => {}
            // The block has nothing to say which file it is.
            Original::File => self.mark_modified(pfn),
            Original::Slot(_) if dirty => self.mark_modified(pfn),
            Original::Slot(_) => {}
        }
        Sharing::Done(block)
    }

    /// Forks the private page in a frame: one more entry maps it, and the one that did is copy-on-write from now on, which is the
    /// caller's to see to, as it is to count such pages with [`Self::count_forked`]. What that entry says of the page's use
    /// stays there. False, and nothing is changed, if somebody may store to the frame through a pin.
    #[inline]
    pub(crate) fn fork_private(&mut self, pfn: Pfn) -> bool {
        let entry = self.data.entry_mut(pfn);
        let pinned = entry.write_pins() > 0 && cfg!(not(mutant = "pinned_shared"));
        if !pinned {
            *entry.share_mut() += 1;
            if cfg!(not(mutant = "forgotten_fork")) {
                entry.owner = Owner::Entries;
            }
        }
        !pinned
    }

    /// One more entry maps a forked page; false, and nothing is changed, if it is none.
    #[inline]
    pub(crate) fn share_forked(&mut self, pfn: Pfn) -> bool {
        let entry = self.data.entry_mut(pfn);
        let forked = entry.owner == Owner::Entries;
        if forked {
            *entry.share_mut() += 1;
        }
        forked
    }

    /// So many private pages were forked.
    pub(crate) fn count_forked(&mut self, pages: u64) {
        self.clones.lazy.forked += pages;
    }

    /// A private page is forked, with its one entry, which the caller makes copy-on-write.
    pub(crate) fn fork_alone(&mut self, pfn: Pfn) {
        self.set_owner(pfn, Owner::Entries);
        self.count_forked(1);
    }

    /// The clone block of a forked page, which its entries can name when they do not map it any more.
    pub(crate) fn name_forked(&mut self, pfn: Pfn) -> BlockId {
        let references = self.entry(pfn).share();
        let content = BlockContent::Resident(pfn);
        let block = self.clones.make_block(HeaderId::LAZY, content, references);
        self.give_to_block(pfn, block);
        self.forget_forked();
        block
    }

    /// One entry fewer refers to a forked page; true if it was the last. The share is still to be dropped.
    pub(crate) fn leave_forked(&mut self, pfn: Pfn) -> bool {
        let last = self.entry(pfn).share() == 1;
        if last {
            self.forget_forked();
        }
        last
    }

    /// A page is not forked any more: the clone block that was promised for it will not be needed, or is there.
    fn forget_forked(&mut self) {
        self.clones.lazy.forked -= 1;
        if cfg!(not(mutant = "promises_kept")) {
            self.unpromise_blocks(1);
        }
    }

    /// The only entry left of a forked page, the one at `place`, takes the page over, which is private again then. False, and
    /// nothing is changed, if anybody else refers to it, or a pin or an unacknowledged flush lets somebody still look at the
    /// frame.
    pub(crate) fn take_forked(&mut self, pfn: Pfn, place: (Pfn, EntryIndex)) -> bool {
        let held = self.is_held(pfn) && cfg!(not(mutant = "held_taken"));
        let alone = !held && self.entry(pfn).share() == 1;
        if alone {
            self.forget_forked();
            let (table, index) = place;
            self.set_owner(pfn, Owner::Entry { table, index });
        }
        alone
    }

    /// One more entry of an upper table names a table.
    pub(crate) fn add_parent(&mut self, table: Pfn) {
        if cfg!(not(mutant = "lost_parent")) {
            *self.entry_mut(table).write_pins_mut() += 1;
        }
        self.set_owner(table, Owner::Tables);
    }

    /// One entry fewer names a table; false, and nothing is changed, if it was the only one.
    pub(crate) fn drop_parent(&mut self, table: Pfn) -> bool {
        let others = self.has_other_parents(table);
        if others {
            *self.entry_mut(table).write_pins_mut() -= 1;
        }
        others
    }

    /// Whether more than one entry names a table.
    pub(crate) fn has_other_parents(&self, table: Pfn) -> bool {
        self.entry(table).parents() > 1
    }

    /// A table that nothing names any more, whatever is in it, waits for a flush.
    pub(crate) fn retire_table(&mut self, table: Pfn) {
        *self.entry_mut(table).share_mut() = 1;
        self.drop_table_held(table);
    }

    /// Spaces have so many tables more, shared or not.
    pub(crate) fn charge_tables(&mut self, tables: u64) {
        self.table_charge += tables;
    }

    /// Spaces have so many tables fewer.
    pub(crate) fn release_tables(&mut self, tables: u64) {
        debug_assert!(
            tables <= self.table_charge,
            "more tables went than there were"
        );
        self.table_charge -= tables;
    }

    /// Tables that the spaces have between them, each space's counted by itself, and the supervisor's.
    pub(crate) fn charged_tables(&self) -> u64 {
        self.table_charge
    }

    /// Table frames that unsharing everything would take.
    pub(crate) fn promised_tables(&self) -> u64 {
        let active = self.zone(ZoneKind::Tables).in_state(PfnState::Active);
        self.table_charge.saturating_sub(u64::from(active))
    }

    /// Promises clone blocks for private pages whose tables become shared.
    pub(crate) fn promise_blocks(&mut self, blocks: u64) -> Result<(), NoCommit> {
        self.clones.lazy.promise(blocks);
        let wanted = self.clones.lazy.pages();
        let more = wanted.saturating_sub(self.lazy_charged);
        if self.commit.charge(more) == Err(NoCommit) {
            self.clones.lazy.unpromise(blocks);
            return Err(NoCommit);
        }
        self.lazy_charged += more;
        Ok(())
    }

    /// Pages of the commit account charged for clone blocks that there are or may be, made one by one.
    pub(crate) fn charged_for_blocks(&self) -> u64 {
        self.lazy_charged
    }

    /// So many promised blocks will not be needed, or exist now.
    pub(crate) fn unpromise_blocks(&mut self, blocks: u64) {
        self.clones.lazy.unpromise(blocks);
        self.settle_lazy();
    }

    /// One entry fewer refers to a clone block. If it was the last, gives back what the block held.
    pub(crate) fn drop_block_reference(&mut self, block: BlockId) -> Option<BlockContent> {
        let last = self.clones.drop_reference(block);
        if last.is_some() && block.header == HeaderId::LAZY {
            self.settle_lazy();
        }
        last
    }

    /// Gives back what the blocks there are and may be are charged too much.
    fn settle_lazy(&mut self) {
        let spare = self.lazy_charged.saturating_sub(self.clones.lazy.pages());
        self.commit.release(spare);
        self.lazy_charged -= spare;
    }
}
