//! Cloning the entries of one leaf table, in whatever state their pages are (systems 1 and 4).
//!
//! The PFN lock is held throughout, so no page can leave transition between a look and a change. Nothing here can fail: all was reserved.
//!
//! An eager fork does it at once, and moves private pages to clone blocks of its own header ([`share_entry`]). One that shares
//! tables does it when a table is copied ([`LeafCopy`]), and its pages get clone blocks when they leave memory.

use alloc::vec::Vec;

use crate::addr::{EntryIndex, Pfn, Vpn};
use crate::backend::{FrameStore, Platform};
use crate::manager::Manager;
use crate::pfn::{Owner, PfnDatabase, Sharing};
use crate::proto::{BlockContent, BlockId, HeaderId};
use crate::pte::{Entry, EntryFlags, MappedWord, ValidEntry};
use crate::shadow::{Cursor, LeafRun, NewLeaf, decode_leaf};
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
    /// The twin's bits.
    pub(super) raw: u64,
    /// The clone block both refer to; a forked page needs none, nor does a section's or a layer's.
    pub(super) block: Option<BlockId>,
    /// Whether the page was the first entry's own before.
    pub(super) parted: bool,
    /// Whether a translation of the first entry may now allow too much.
    pub(super) downgraded: bool,
}

/// A copy of a shared leaf table.
pub(super) struct LeafCopy {
    pub(super) leaf: NewLeaf,
    /// Pages that were the other table's alone before.
    pub(super) parted: u64,
    /// Valid entries in it.
    pub(super) resident: u64,
    /// Whether the other table's entries allow less than before.
    pub(super) downgraded: bool,
}

impl LeafCopy {
    /// Makes a twin of each entry in use of a table that is `seen`; those of pages that are pinned for stores are `pinned`
    /// instead. Private pages are forked, or move to clone blocks if they are not mapped; both entries are copy-on-write.
    ///
    /// A table is full of private pages that are mapped, so what is done with one is done with its bits as they are, and what
    /// can be done for all of them at once is.
    pub(super) fn of<S: FrameStore>(
        db: &mut PfnDatabase,
        cursor: &Cursor<'_, S>,
        table: Pfn,
        mut seen: impl FnMut(EntryIndex) -> bool,
        mut pinned: impl FnMut(EntryIndex, ValidEntry),
    ) -> Self {
        let found = cursor.words(table);
        let mut forked = found;
        let mut leaf = NewLeaf::new();
        let (mut mapped, mut parted, mut rights) = (0, 0, 0);
        let (mut others, mut blocks, mut resident, mut downgraded) = (0, 0, 0, false);
        for (index, raw) in EntryIndex::numbered(&found) {
            if raw == 0 || !seen(index) {
                continue;
            }
            if let Some(word) = MappedWord::new(raw) {
                let private = word.is_private();
                let done = match private {
                    true => db.fork_private(word.frame()),
                    false => db.share_forked(word.frame()),
                };
                if done {
                    let shared = word.shared();
                    forked[index.get()] = shared;
                    leaf.put_mapped(index, twin_raw(shared));
                    mapped += 1;
                    parted += u16::from(private);
                    rights |= raw;
                    continue;
                }
            }
            let header = Some(HeaderId::LAZY);
            match share_other(db, cursor, ((table, index), raw), header) {
                Twin::Nothing => {}
                Twin::Pinned(entry) => pinned(index, entry),
                Twin::Entry(shared) => {
                    leaf.put(index, shared.raw);
                    others += u64::from(shared.parted);
                    blocks += u64::from(shared.parted && shared.block.is_some());
                    resident += u64::from(Entry::is_resident(shared.raw));
                    downgraded |= shared.downgraded;
                }
            }
        }
        cursor.exchange_all(table, &found, &forked);
        leaf.count_mapped(mapped);
        db.count_forked(parted.into());
        db.unpromise_blocks(blocks);
        Self {
            leaf,
            parted: others + u64::from(parted),
            resident: resident + u64::from(mapped),
            downgraded: downgraded || rights & EntryFlags::WRITABLE.bits() != 0,
        }
    }
}

/// Makes a twin of the entry at `place`, which is `raw`: a private page moves to a clone block of `header`, which both
/// entries refer to then, and both become copy-on-write.
#[inline]
pub(super) fn share_entry<S: FrameStore>(
    db: &mut PfnDatabase,
    cursor: &Cursor<'_, S>,
    (place, mut raw): ((Pfn, EntryIndex), u64),
    header: Option<HeaderId>,
) -> Twin {
    while let Some(word) = MappedWord::new(raw).filter(|word| word.is_private()) {
        let header = header.expect("a header for private pages was reserved");
        let shared = word.shared();
        let flags = word.flags();
        let dirty = flags.contains(EntryFlags::DIRTY);
        let exchange = || cursor.exchange(place, raw, shared);
        match db.share_private((word.frame(), dirty), header, exchange) {
            Sharing::Done(block) => {
                return Twin::Entry(Shared {
                    raw: twin_raw(shared),
                    block: Some(block),
                    parted: true,
                    downgraded: flags.contains(EntryFlags::WRITABLE),
                });
            }
            Sharing::Changed(now) => raw = now,
            Sharing::Pinned => break,
        }
    }
    share_other(db, cursor, (place, raw), header)
}

/// The same of an entry that maps no private page, or one that cannot be shared.
fn share_other<S: FrameStore>(
    db: &mut PfnDatabase,
    cursor: &Cursor<'_, S>,
    (place, raw): ((Pfn, EntryIndex), u64),
    header: Option<HeaderId>,
) -> Twin {
    let found = decode_leaf(raw);
    match found {
        Entry::Empty | Entry::DemandZero(_) | Entry::Decommitted => Twin::Nothing,
        Entry::Valid(entry) if !entry.flags.contains(EntryFlags::PROTOTYPE) => Twin::Pinned(entry),
        Entry::Valid(entry) => {
            let block = db.block_of(entry.frame);
            let block = block.inspect(|block| db.clones.add_reference(*block));
            db.add_share(entry.frame);
            // A section's views need no clone block, and keep their rights unless the section is kept as it was.
            let flags = match block {
                Some(_) => entry.flags.shared(),
                None if db.to_be_kept(entry.frame).is_some() && cfg!(not(mutant = "kept_twin")) => {
                    entry.flags.shared()
                }
                None => entry.flags,
            };
            Twin::Entry(Shared {
                raw: twin_raw(Entry::Valid(entry.with_flags(flags)).encode()),
                block,
                parted: false,
                downgraded: false,
            })
        }
        // The layer does not know how many entries map its pages.
        Entry::Frozen(_) => Twin::Entry(Shared {
            raw: twin_raw(raw),
            block: None,
            parted: false,
            downgraded: false,
        }),
        Entry::Prototype(block) => {
            db.clones.add_reference(block);
            Twin::Entry(Shared {
                raw,
                block: Some(block),
                parted: false,
                // A stale translation may still allow stores.
                downgraded: may_be_stale(db, found),
            })
        }
        Entry::Transition(_) | Entry::PageFile(_) => {
            let Some(moved) = move_to_block(db, cursor, place, found, (header, 2)) else {
                return Twin::Nothing;
            };
            Twin::Entry(Shared {
                raw: Entry::Prototype(moved.block).encode(),
                block: Some(moved.block),
                parted: true,
                downgraded: moved.downgraded,
            })
        }
    }
}

/// A private page that has a clone block now.
pub(super) struct Moved {
    pub(super) block: BlockId,
    /// Whether a translation of its entry may now allow too much.
    pub(super) downgraded: bool,
}

/// Moves the private page that was `found` in the entry at `place`, which does not map it, to a clone block of `header` that so
/// many entries refer to: this one is one of them. `None` if there is no such page.
pub(super) fn move_to_block<S: FrameStore>(
    db: &mut PfnDatabase,
    cursor: &Cursor<'_, S>,
    place: (Pfn, EntryIndex),
    found: Entry,
    (header, references): (Option<HeaderId>, u32),
) -> Option<Moved> {
    let content = match found {
        Entry::Transition(frame) => BlockContent::Resident(frame),
        Entry::PageFile(slot) => BlockContent::PageFile(slot),
        Entry::Empty
        | Entry::Valid(_)
        | Entry::Frozen(_)
        | Entry::DemandZero(_)
        | Entry::Decommitted
        | Entry::Prototype(_) => {
            return None;
        }
    };
    let header = header.expect("a header for private pages was reserved");
    let block = db.clones.make_block(header, content, references);
    if let BlockContent::Resident(frame) = content {
        db.give_to_block(frame, block);
    }
    cursor.replace(place, Entry::Prototype(block));
    // A stale translation may still allow stores.
    let downgraded = may_be_stale(db, found);
    Some(Moved { block, downgraded })
}

/// What the processor notes in an entry that it used. A twin has not been used yet.
const USED: EntryFlags = EntryFlags::ACCESSED.union(EntryFlags::DIRTY);

#[inline]
pub(super) fn twin_flags(flags: EntryFlags) -> EntryFlags {
    flags - USED
}

/// The same of a raw entry that is present.
#[inline]
fn twin_raw(raw: u64) -> u64 {
    raw & !USED.bits()
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
        for (index, raw) in EntryIndex::numbered(&cursor.words(run.table)) {
            let Some(vpn) = run.page(index) else { continue };
            let place = (run.table, index);
            let shared = match share_entry(&mut db, &cursor, (place, raw), clone.plan.header) {
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
            child.put_raw(&mut db, (table, index), shared.raw);
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
        self.resident += u64::from(Entry::is_resident(shared.raw));
        if let Some(block) = shared.block {
            self.plan.descriptors.add(block.header, 1);
        }
        if shared.parted {
            self.parent.private -= 1;
            self.blocks += 1;
        }
    }
}
