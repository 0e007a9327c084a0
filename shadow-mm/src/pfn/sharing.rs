//! Tables that several spaces share, and what was promised for the day they are not shared any more.
//!
//! A fork that shares tables takes two frames. Each of its spaces may later need a copy of every table it
//! shares, and a clone block for every private page in them, and the fault that needs them must not find
//! that there is no memory. So both are *promised* at the fork, by counters alone: table frames
//! against the table zone, the blocks against the commit account.

use super::database::{PfnDatabase, ZoneKind};
use super::entry::{Owner, PfnState};
use crate::addr::Pfn;
use crate::commit::NoCommit;
use crate::proto::{BlockContent, BlockId, HeaderId};

impl PfnDatabase {
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
