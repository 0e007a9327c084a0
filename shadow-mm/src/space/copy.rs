//! The copy-on-write fault (system 11).

use alloc::sync::Arc;
use alloc::vec::Vec;

use crate::access::Access;
use crate::addr::{EntryIndex, Pfn, Vpn};
use crate::backend::Platform;
use crate::flush::TableEdits;
use crate::manager::{Demand, Manager};
use crate::outcome::{FaultKind, FaultOutcome};
use crate::pfn::{Owner, ReadyFrame, Taken};
use crate::pte::{Entry, EntryFlags, ValidEntry};
use crate::shadow::Cursor;
use crate::space::ahead::{copied_ahead, note_made};
use crate::space::books::Books;
use crate::space::fault::{Found, resolution, used};
use crate::space::protect::take_over;
use crate::space::zap::drop_page;
use crate::space::{Space, SpaceState};
use crate::stats::add;

impl<P: Platform> Manager<P> {
    /// A store to a valid entry that is not writable, in a mapping that is: copies the page, or makes it
    /// writable in place if nobody else has it. The pages after it are dealt with in the same way if the guest stores to one
    /// after the other ([`crate::space::ahead`]).
    pub(super) fn break_copy(
        &self,
        space: &Arc<Space<P>>,
        state: &mut SpaceState<P::Backing>,
        vpn: Vpn,
        first: Found,
    ) -> FaultOutcome<P> {
        debug_assert!(
            first.2.flags.contains(EntryFlags::COPY_ON_WRITE),
            "{vpn:?}: {:?}",
            first.2
        );
        let cursor = space.cursor(&self.store);
        let pages = copied_ahead(state, vpn);
        let run = self.shared_run(&cursor, first, pages.count() as usize);
        let taken = self.take_over_run(state, &cursor, &run);
        if taken > 0 {
            note_made(state, vpn, taken);
            return FaultOutcome::Resolved(resolution(
                space,
                FaultKind::MadeWritable,
                taken as u32,
            ));
        }
        let demand = Demand {
            extra: run.len() - 1,
            ..Demand::one_page()
        };
        let Some(reserve) = self.reserve(demand) else {
            return FaultOutcome::NoMemory;
        };
        // Outside the PFN lock: these entries' references keep everybody else from storing into the pages.
        let copies = reserve.data.into_iter().zip(&run);
        let copies = copies.map(|(frame, (.., entry))| self.copied(frame, *entry));
        let copies: Vec<_> = copies.collect();
        let made = copies.len();
        let mut outcome = resolution(space, FaultKind::CopyOnWrite, made as u32);
        let mut edits = TableEdits::new(first.0);
        let mut now = used(Access::Write);
        for ((copy, found), page) in copies.into_iter().zip(&run).zip(pages.iter()) {
            let old = self.replace_page(state, &cursor, (*found, now), copy);
            edits.add(found.1, page);
            outcome.flush.hold(old);
            now = EntryFlags::DIRTY;
        }
        note_made(state, vpn, made);
        if cfg!(not(mutant = "skipped_flush")) {
            outcome.flush.absorb(edits);
        }
        FaultOutcome::Resolved(outcome)
    }

    /// The entries from the first on, at most so many, that a store would have to deal with as with it.
    fn shared_run(&self, cursor: &Cursor<'_, P::Store>, first: Found, most: usize) -> Vec<Found> {
        let (table, index, _) = first;
        let wanted = EntryFlags::shared(EntryFlags::LOGICAL_WRITE);
        let db = self.pfns.lock();
        let ahead = EntryIndex::onward(index).take(most).skip(1);
        let ahead = ahead.map_while(|index| match cursor.leaf(table, index) {
            Entry::Valid(entry) if entry.flags.contains(wanted) && !db.is_sections(entry) => {
                Some((table, index, entry))
            }
            Entry::Valid(_)
            | Entry::Frozen(_)
            | Entry::Transition(_)
            | Entry::PageFile(_)
            | Entry::Prototype(_)
            | Entry::DemandZero(_)
            | Entry::Decommitted
            | Entry::Empty => None,
        });
        core::iter::once(first).chain(ahead).collect()
    }

    /// Makes the pages of a run writable in place, up to the first that somebody else has too; gives back how many.
    fn take_over_run(
        &self,
        state: &mut SpaceState<P::Backing>,
        cursor: &Cursor<'_, P::Store>,
        run: &[Found],
    ) -> usize {
        let mut db = self.pfns.lock();
        let mut now = used(Access::Write);
        let mut taken = 0;
        for (table, index, entry) in run {
            if !take_over(&mut db, state, *entry, (*table, *index)) {
                break;
            }
            cursor.rewrite(*table, *index, |e| e.with_flags(e.flags.unshared() | now));
            now = EntryFlags::empty();
            taken += 1;
        }
        add(&self.counters.entries_written, taken as u64);
        taken
    }

    /// Puts a private copy where a shared page was; gives back the frame that waits for the flush.
    fn replace_page(
        &self,
        state: &mut SpaceState<P::Backing>,
        cursor: &Cursor<'_, P::Store>,
        ((table, index, entry), now): (Found, EntryFlags),
        copy: ReadyFrame,
    ) -> Pfn {
        let mut db = self.pfns.lock();
        let frame = db.activate(copy, Owner::Entry { table, index });
        let flags = entry.flags.unshared() | now;
        let replaced = cursor.rewrite(table, index, |_| ValidEntry { frame, flags });
        let old = replaced.map_or(entry, |(old, _)| old);
        drop_page(&mut db, &mut Books::Own(state), old);
        drop(db);
        state.gained_private(1);
        add(&self.counters.entries_written, 1);
        old.frame
    }

    /// A taken frame with a copy of an entry's page.
    pub(super) fn copied(&self, frame: Taken, from: ValidEntry) -> ReadyFrame {
        add(&self.counters.pages_copied, 1);
        if cfg!(mutant = "skipped_copy") {
            return self.zeroed(frame).into();
        }
        frame.forget_content().copy_of(from.frame, &self.store)
    }
}
