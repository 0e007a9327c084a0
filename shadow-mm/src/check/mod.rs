//! The invariant checker. It walks every table of every space once and compares what it finds with what
//! the database, the clone headers and the spaces' counts say.
//!
//! For tests and debugging: it takes every lock, and its cost is that of the whole pool.

mod frames;
mod promises;
mod sections;
mod walk;

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::Ordering::Relaxed;

use crate::addr::{EntryIndex, Pfn, SpaceId, Vpn};
use crate::backend::Platform;
use crate::manager::Manager;
use crate::page_file::Slot;
use crate::pfn::PfnState;
use crate::proto::{BlockId, HeaderId, SectionId, SectionPage};
use crate::space::Space;

use walk::Seen;

/// Which count of a space or a frame disagrees.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Count {
    /// Valid entries of a space.
    Resident,
    /// Valid entries whose frame the space owns.
    Private,
    /// Page tables of a space.
    Tables,
    /// Pages mapped by a space.
    VirtualPages,
    /// Pages charged for a space.
    Charged,
}

/// What unsharing may take.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Promised {
    /// Clone blocks, one for each private page in a shared table and for each forked page.
    Blocks,
    /// Forked pages among them.
    Forked,
    /// Tables, each space's counted by itself.
    Tables,
    /// Frames for copies of tables.
    Frames,
    /// Pages of the commit account.
    Pages,
}

/// Something that must never be. Each variant names what disagreed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Violation {
    /// Not all live spaces were given, or a dead one was.
    #[error("{given} live spaces were given, the manager has {live}")]
    SpacesMissing {
        /// Live spaces given.
        given: u64,
        /// Live spaces the manager knows of.
        live: u64,
    },
    /// An entry's bits mean nothing, or an upper entry takes rights away.
    #[error("entry {index} of table {table} is {raw:#x}, which means nothing")]
    BadEntry {
        /// The table.
        table: Pfn,
        /// The slot.
        index: EntryIndex,
        /// The bits.
        raw: u64,
    },
    /// An image lies under a page that is not private memory.
    #[error("space {space:?}: an image under {vpn}, which is not private memory")]
    StrayImage {
        /// The space.
        space: SpaceId,
        /// The page.
        vpn: Vpn,
    },
    /// An entry is in use where nothing is mapped.
    #[error("page {vpn} of space {space} has an entry but no mapping")]
    NoMapping {
        /// The space.
        space: SpaceId,
        /// The page.
        vpn: Vpn,
    },
    /// An entry's rights are not those of its mapping, or writable disagrees with copy-on-write.
    #[error("page {vpn} of space {space} has rights {flags:#x}, its mapping says {expected:#x}")]
    WrongRights {
        /// The space.
        space: SpaceId,
        /// The page.
        vpn: Vpn,
        /// The entry's flags.
        flags: u64,
        /// What they should be, accessed and dirty aside.
        expected: u64,
    },
    /// A frame's owner is not the entry that maps it, or the entry is wrong about a clone block.
    #[error("page {vpn} of space {space} maps frame {frame}, which says another owns it")]
    WrongOwner {
        /// The space.
        space: SpaceId,
        /// The page.
        vpn: Vpn,
        /// The frame.
        frame: Pfn,
    },
    /// A page is mapped to a layer's frame that is not what its image says.
    #[error("page {vpn} of space {space} maps frame {frame} of a layer, which its image does not")]
    WrongFrozen {
        /// The space.
        space: SpaceId,
        /// The page.
        vpn: Vpn,
        /// The frame.
        frame: Pfn,
    },
    /// A space can write a frame that another entry maps too.
    #[error("frame {frame} is writable in space {space} and mapped elsewhere")]
    SharedWritable {
        /// The frame.
        frame: Pfn,
        /// The space.
        space: SpaceId,
    },
    /// A guest's entry maps a frame outside the data zone, or a table lies outside the table zone.
    #[error("entry {index} of table {table} names frame {frame} of the wrong zone")]
    WrongZone {
        /// The table.
        table: Pfn,
        /// The slot.
        index: EntryIndex,
        /// The frame.
        frame: Pfn,
    },
    /// A table is reached twice, or has no entry in use and was not freed.
    #[error("table {table} is shared, or empty")]
    BadTable {
        /// The table.
        table: Pfn,
    },
    /// A table is not named by as many entries as it has parents.
    #[error("table {table} has {parents} parents, the walk counted {counted}")]
    WrongParents {
        /// The table.
        table: Pfn,
        /// What the database says.
        parents: u32,
        /// What the walk says.
        counted: u32,
    },
    /// A leaf table has more or fewer entries besides a layer's pages than it believes.
    #[error(
        "table {table} has {unfrozen} entries that are not a layer's, the walk counted {counted}"
    )]
    WrongUnfrozen {
        /// The table.
        table: Pfn,
        /// What the database says.
        unfrozen: u32,
        /// What the walk says.
        counted: u32,
    },
    /// A table that spaces share has a page in it that one of them stores to behind its back.
    #[error("frame {frame} is write-pinned in table {table}, which is shared")]
    SharedPin {
        /// The table.
        table: Pfn,
        /// The frame.
        frame: Pfn,
    },
    /// What was promised for the unsharing of tables is not what it may take.
    #[error(
        "{promised} are promised or charged for unsharing, the walk counted {counted}: {what:?}"
    )]
    WrongPromise {
        /// Of what.
        what: Promised,
        /// What the database says.
        promised: u64,
        /// What the walk says.
        counted: u64,
    },
    /// A share count is not what the walk counted.
    #[error("frame {frame} has share count {share}, the walk counted {counted}")]
    WrongShare {
        /// The frame.
        frame: Pfn,
        /// What the database says.
        share: u32,
        /// What the walk says.
        counted: u32,
    },
    /// A frame's state does not fit its counts, or it is on no list or the wrong one.
    #[error("frame {frame} is {state:?} with share count {share} and {refs} references")]
    WrongState {
        /// The frame.
        frame: Pfn,
        /// Its state.
        state: PfnState,
        /// Its share count.
        share: u32,
        /// Its reference count.
        refs: u32,
    },
    /// A list is not as long as it believes, or has a frame that does not belong on it.
    #[error("the {state:?} list has {found} frames and believes it has {believed}")]
    WrongList {
        /// Which list.
        state: PfnState,
        /// Frames found on it that belong there.
        found: u32,
        /// Its length.
        believed: u32,
    },
    /// A slot of the page file belongs to two pages, or to a page and to nobody.
    #[error("slot {slot} of the page file belongs to two pages, or is free and in use")]
    SharedSlot {
        /// The slot.
        slot: Slot,
    },
    /// The page file has more or fewer slots taken than there are pages in it.
    #[error("{taken} slots of the page file are taken, {counted} have an owner")]
    WrongSlots {
        /// What the page file says.
        taken: u64,
        /// What was counted.
        counted: u64,
    },
    /// What was promised is not what spaces and clone headers were charged.
    #[error("{charged} pages are charged, {counted} were counted")]
    WrongCommit {
        /// What the account says.
        charged: u64,
        /// What was counted.
        counted: u64,
    },
    /// A frame has an owner that does not know it.
    #[error("frame {frame} is {state:?} and its owner does not name it")]
    LostOwner {
        /// The frame.
        frame: Pfn,
        /// Its state.
        state: PfnState,
    },
    /// A clone block's count is not the number of entries that refer to it.
    #[error("clone block {block:?} has count {count}, the walk counted {counted}")]
    WrongBlock {
        /// The block.
        block: BlockId,
        /// What the block says.
        count: u32,
        /// What the walk says.
        counted: u32,
    },
    /// A clone header's live blocks or describing spaces disagree, or it should have been freed.
    #[error("clone header {header:?} does not add up")]
    WrongHeader {
        /// The header.
        header: HeaderId,
    },
    /// A space has a view of a section that does not know it.
    #[error("section {section:?} does not know its viewer {space}")]
    UnknownViewer {
        /// The space.
        space: SpaceId,
        /// The section.
        section: SectionId,
    },
    /// A section's page and its frame disagree, or its transfers are not what its pages say.
    #[error("page {page:?} of section {section:?} does not add up")]
    WrongPrototype {
        /// The section.
        section: SectionId,
        /// The page.
        page: SectionPage,
    },
    /// The sections have another number of frames than they believe.
    #[error("sections have {counted} frames and believe they have {believed}")]
    WrongSections {
        /// Frames found.
        counted: u64,
        /// What the table believes.
        believed: u64,
    },
    /// A space's descriptor of a header disagrees with its entries.
    #[error(
        "space {space} describes {header:?} with {described} entries, the walk counted {counted}"
    )]
    WrongDescriptor {
        /// The space.
        space: SpaceId,
        /// The header.
        header: HeaderId,
        /// What the descriptor says.
        described: u64,
        /// What the walk says.
        counted: u64,
    },
    /// A space's counter disagrees.
    #[error("space {space} counts {has} for {count:?}, the walk counted {counted}")]
    WrongCount {
        /// The space.
        space: SpaceId,
        /// Which counter.
        count: Count,
        /// What it says.
        has: u64,
        /// What the walk says.
        counted: u64,
    },
}

impl<P: Platform> Manager<P> {
    /// Verifies the invariants; `spaces` must be all that are alive.
    ///
    /// # Errors
    /// The first [`Violation`] found.
    pub fn check(&self, spaces: &[Arc<Space<P>>]) -> Result<(), Violation> {
        let mut sorted: Vec<_> = spaces.iter().collect();
        sorted.sort_by_key(|space| space.id());
        sorted.dedup_by_key(|space| space.id());
        let locked: Vec<_> = sorted
            .into_iter()
            .map(|space| (space, wait_for(|| space.state.try_lock())))
            .collect();
        let given = locked.iter().filter(|(_, state)| state.alive).count() as u64;
        let live = self.live_spaces.load(Relaxed);
        if given != live {
            return Err(Violation::SpacesMissing { given, live });
        }
        let _serialised = wait_for(|| self.supervisor_lock.try_lock());
        let mut db = self.pfns.lock();
        while db.reap() {}
        let mut seen = Seen::default();
        self.walk_supervisor(&mut seen)?;
        for (space, state) in locked.iter().filter(|(_, state)| state.alive) {
            self.walk_space(space, state, &db, &mut seen)?;
        }
        frames::check_clones(&db, &mut seen)?;
        frames::check_frames(&db, &mut seen)?;
        sections::check_sections(&db, &mut seen)?;
        frames::check_slots(&db, &seen)?;
        promises::check_promises(&db, &seen)?;
        let spaces = locked.iter().filter(|(_, state)| state.alive);
        let spaces: u64 = spaces.map(|(_, state)| state.vads.charged()).sum();
        let shared: u64 = db.sections.iter().map(|(_, s)| s.charged()).sum();
        let counted = spaces + shared + db.clones.iter().map(|(_, h)| h.pages()).sum::<u64>();
        let counted = counted + db.clones.lazy.pages();
        let charged = db.commit.charged();
        if charged == counted {
            Ok(())
        } else {
            Err(Violation::WrongCommit { charged, counted })
        }
    }
}

/// Waits for a lock by trying. The checker holds the locks of all spaces, taken in the order of their
/// numbers, which no other verb does: an embedder that checks the order of locks has no place for it.
fn wait_for<G>(lock: impl Fn() -> Option<G>) -> G {
    loop {
        if let Some(guard) = lock() {
            return guard;
        }
        core::hint::spin_loop();
    }
}
