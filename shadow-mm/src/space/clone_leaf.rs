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
use crate::pfn::{Owner, PfnDatabase, Sharing};
use crate::proto::{BlockContent, BlockId, HeaderId};
use crate::pte::{Entry, EntryFlags, PrivateWord, ValidEntry};
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
    /// The clone block both refer to; a section's page needs none, nor does a layer's.
    pub(super) block: Option<BlockId>,
    /// Whether the block was made for it.
    pub(super) made: bool,
    /// Whether a translation of the first entry may now allow too much.
    pub(super) downgraded: bool,
}

/// A copy of a shared leaf table while it is made.
pub(super) struct LeafCopy {
    pub(super) leaf: NewLeaf,
    /// Blocks made for it, and valid entries in it.
    pub(super) made: u64,
    pub(super) resident: u64,
    /// Whether the other table's entries allow less than before.
    pub(super) downgraded: bool,
}

impl LeafCopy {
    pub(super) fn new() -> Self {
        Self {
            leaf: NewLeaf::new(),
            made: 0,
            resident: 0,
            downgraded: false,
        }
    }

    /// Adds an entry's twin.
    #[inline]
    pub(super) fn add(&mut self, index: EntryIndex, shared: &Shared) {
        self.leaf.put(index, shared.raw);
        self.made += u64::from(shared.made);
        self.resident += u64::from(Entry::is_resident(shared.raw));
        self.downgraded |= shared.downgraded;
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
    while let Some(word) = PrivateWord::new(raw) {
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
                    made: true,
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
                made: false,
                downgraded: false,
            })
        }
        // The layer does not know how many entries map its pages.
        Entry::Frozen(_) => Twin::Entry(Shared {
            raw: twin_raw(raw),
            block: None,
            made: false,
            downgraded: false,
        }),
        Entry::Prototype(block) => {
            db.clones.add_reference(block);
            Twin::Entry(Shared {
                raw,
                block: Some(block),
                made: false,
                // A stale translation may still allow stores.
                downgraded: may_be_stale(db, found),
            })
        }
        Entry::Transition(_) | Entry::PageFile(_) => {
            let Some(moved) = move_to_block(db, cursor, place, found, header) else {
                return Twin::Nothing;
            };
            Twin::Entry(Shared {
                raw: Entry::Prototype(moved.block).encode(),
                block: Some(moved.block),
                made: true,
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

/// Moves the private page that was `found` in the entry at `place` to a clone block of `header`, which counts two references
/// then: the entry's, and the one it is made for. The entry is copy-on-write from now on. `None` if there is no private page.
pub(super) fn move_to_block<S: FrameStore>(
    db: &mut PfnDatabase,
    cursor: &Cursor<'_, S>,
    place: (Pfn, EntryIndex),
    found: Entry,
    header: Option<HeaderId>,
) -> Option<Moved> {
    let header = header.expect("a header for private pages was reserved");
    let (content, downgraded) = match found {
        Entry::Valid(_) => return move_mapped(db, cursor, (place, found.encode()), Some(header)),
        // A stale translation may still allow stores.
        Entry::Transition(frame) => (BlockContent::Resident(frame), may_be_stale(db, found)),
        Entry::PageFile(slot) => (BlockContent::PageFile(slot), may_be_stale(db, found)),
        Entry::Empty
        | Entry::Frozen(_)
        | Entry::DemandZero(_)
        | Entry::Decommitted
        | Entry::Prototype(_) => {
            return None;
        }
    };
    let block = new_block(db, header, content);
    cursor.replace(place, Entry::Prototype(block));
    Some(Moved { block, downgraded })
}

/// As [`move_to_block`], of a page that is mapped: its entry is `raw`, but for bits that hardware sets.
#[inline]
fn move_mapped<S: FrameStore>(
    db: &mut PfnDatabase,
    cursor: &Cursor<'_, S>,
    (place, raw): ((Pfn, EntryIndex), u64),
    header: Option<HeaderId>,
) -> Option<Moved> {
    let header = header.expect("a header for private pages was reserved");
    let share = |e: ValidEntry| e.with_flags(e.flags.shared());
    let (old, _) = cursor.rewrite_from(place, raw, share)?;
    if old.flags.contains(EntryFlags::DIRTY) {
        db.mark_modified(old.frame);
    }
    Some(Moved {
        block: new_block(db, header, BlockContent::Resident(old.frame)),
        downgraded: old.flags.contains(EntryFlags::WRITABLE),
    })
}

/// Moves a private page to a clone block that two entries refer to.
#[inline]
fn new_block(db: &mut PfnDatabase, header: HeaderId, content: BlockContent) -> BlockId {
    let block = db.clones.make_block(header, content);
    let forgotten = cfg!(mutant = "forgotten_block") && header == HeaderId::LAZY;
    if let BlockContent::Resident(frame) = content
        && !forgotten
    {
        db.give_to_block(frame, block);
    }
    block
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
        for (index, raw) in cursor.words(run.table) {
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
        if shared.made {
            self.parent.private -= 1;
            self.blocks += 1;
        }
    }
}
