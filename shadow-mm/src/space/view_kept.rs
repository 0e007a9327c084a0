//! Shared views of sections that are kept as they were ([`crate::section`]): their entries are *closed*, copy-on-write, until what
//! the page was has been put aside.

use crate::access::Access;
use crate::addr::{EntryIndex, Level, Pfn, Vpn};
use crate::backend::{FrameStore, Platform};
use crate::manager::Manager;
use crate::outcome::{FaultKind, FaultOutcome};
use crate::pfn::{Owner, PfnDatabase};
use crate::pte::{Entry, EntryFlags, ValidEntry};
use crate::section::NoFrame;
use crate::shadow::{Cursor, decode_leaf};
use crate::space::ahead::{copied_ahead, note_made};
use crate::space::fault::{Found, resolution, used};
use crate::space::own::Unsharing;
use crate::space::{Space, SpaceState};
use crate::stats::add;

impl<P: Platform> Manager<P> {
    /// A store to a shared view's entry that is closed: what the page was is put aside if its section is still kept, and the
    /// entry allows stores. So it is for the pages after it if the guest stores to one after the other.
    pub(super) fn open_kept(
        &self,
        space: &Space<P>,
        state: &mut SpaceState<P::Backing>,
        vpn: Vpn,
        (table, index, entry): Found,
    ) -> FaultOutcome<P> {
        debug_assert!(
            entry.flags.contains(EntryFlags::COPY_ON_WRITE),
            "{vpn:?}: {entry:?}"
        );
        let most = match self.pfns.lock().short() {
            true => 1,
            false => copied_ahead(state, vpn).count() as usize,
        };
        let cursor = space.cursor(&self.store);
        let (mut opened, mut now) = (0, used(Access::Write));
        for index in EntryIndex::onward(index).take(most) {
            let Entry::Valid(entry) = cursor.leaf(table, index) else {
                break;
            };
            if !self.is_closed(entry) {
                break;
            }
            match self.put_frame_aside(entry.frame) {
                Ok(()) => {}
                Err(NoFrame) if opened == 0 => return FaultOutcome::NoMemory,
                Err(NoFrame) => break,
            }
            let _db = self.pfns.lock();
            cursor.rewrite(table, index, |e| e.with_flags(opened_flags(e.flags) | now));
            now = EntryFlags::empty();
            opened += 1;
        }
        note_made(state, vpn, opened);
        add(&self.counters.entries_written, opened as u64);
        FaultOutcome::Resolved(resolution(space, FaultKind::MadeWritable, opened as u32))
    }

    /// Whether an entry of a shared view is closed to a store that its mapping allows.
    fn is_closed(&self, entry: ValidEntry) -> bool {
        let closed = EntryFlags::shared(EntryFlags::LOGICAL_WRITE);
        entry.flags.contains(closed) && self.pfns.lock().is_sections(entry)
    }

    fn put_frame_aside(&self, frame: Pfn) -> Result<(), NoFrame> {
        let owner = self.pfns.lock().entry(frame).owner;
        match owner {
            Owner::Section { section, page } => self.put_aside(section, page),
            // Its section has lost it, and the entry is about to go.
            Owner::None
            | Owner::Entry { .. }
            | Owner::Clone(_)
            | Owner::Entries
            | Owner::Tables
            | Owner::Root
            | Owner::Supervisor => Ok(()),
        }
    }
}

/// The flags of a closed entry once stores are allowed as its mapping says.
fn opened_flags(flags: EntryFlags) -> EntryFlags {
    flags.unshared() | EntryFlags::PROTOTYPE
}

/// Whether a table of the given level that is becoming a space's own must not be taken over as it is: there are entries in it
/// to be closed, or may be below it. A host with shadow page tables may remember what it allowed before it was shared.
pub(super) fn is_to_be_closed<S: FrameStore>(
    db: &PfnDatabase,
    cursor: &Cursor<'_, S>,
    (table, level): (Pfn, Level),
) -> bool {
    let closed = |raw: u64| match decode_leaf(raw) {
        Entry::Valid(entry) => db.to_be_kept(entry.frame).is_some(),
        Entry::Empty
        | Entry::Frozen(_)
        | Entry::Transition(_)
        | Entry::PageFile(_)
        | Entry::Prototype(_)
        | Entry::DemandZero(_)
        | Entry::Decommitted => false,
    };
    let inside = || match level {
        Level::Leaf => cursor.words(table).into_iter().any(closed),
        Level::Root | Level::Pointers | Level::Directory => true,
    };
    db.sections.keeping > 0 && inside()
}

impl<S: FrameStore> Unsharing<'_, S> {
    /// Closes an entry of a table that is becoming the space's own, if it shows a page of a section that is kept; true if
    /// it allows less now.
    pub(super) fn close_kept(&mut self, (table, index): (Pfn, EntryIndex)) -> bool {
        if self.db.sections.keeping == 0 || cfg!(mutant = "kept_open") {
            return false;
        }
        let Entry::Valid(entry) = self.cursor.leaf(table, index) else {
            return false;
        };
        if self.db.to_be_kept(entry.frame).is_none() {
            return false;
        }
        let close = |e: ValidEntry| e.with_flags(e.flags.shared());
        let closed = self.cursor.rewrite(table, index, close);
        self.tally.entries += 1;
        closed.is_some_and(|(old, new)| old.flags.loses_rights(new.flags))
    }
}
