//! The copy-on-write fault (system 11).

use alloc::sync::Arc;

use crate::access::Access;
use crate::addr::{Pfn, Vpn};
use crate::backend::Platform;
use crate::flush::TableEdits;
use crate::manager::{Demand, Manager};
use crate::outcome::{FaultKind, FaultOutcome};
use crate::pfn::{Owner, ReadyFrame, Taken};
use crate::pte::{EntryFlags, ValidEntry};
use crate::shadow::Cursor;
use crate::space::books::Books;
use crate::space::fault::{Found, resolution, used};
use crate::space::protect::take_over;
use crate::space::zap::drop_page;
use crate::space::{Space, SpaceState};
use crate::stats::add;

impl<P: Platform> Manager<P> {
    /// A store to a valid entry that is not writable, in a mapping that is: copies the page, or makes it
    /// writable in place if nobody else has it.
    pub(super) fn break_copy(
        &self,
        space: &Arc<Space<P>>,
        state: &mut SpaceState<P::Backing>,
        vpn: Vpn,
        (table, index, entry): Found,
    ) -> FaultOutcome<P> {
        debug_assert!(
            entry.flags.contains(EntryFlags::COPY_ON_WRITE),
            "{vpn:?}: {entry:?}"
        );
        let cursor = space.cursor(&self.store);
        if take_over(&mut self.pfns.lock(), state, entry, (table, index)) {
            let now = used(Access::Write);
            cursor.rewrite(table, index, |e| e.with_flags(e.flags.unshared() | now));
            add(&self.counters.entries_written, 1);
            return FaultOutcome::Resolved(resolution(space, FaultKind::MadeWritable, 1));
        }
        let reserve = self.reserve(Demand::one_page());
        let Some(frame) = reserve.and_then(|mut reserve| reserve.data.pop()) else {
            return FaultOutcome::NoMemory;
        };
        // Outside the PFN lock: this entry's reference keeps everybody else from storing into the page.
        let frame = self.copied(frame, entry);
        let old = self.replace_page(state, &cursor, (table, index, entry), frame);
        let mut outcome = resolution(space, FaultKind::CopyOnWrite, 1);
        let mut edits = TableEdits::new(table);
        edits.add(index, vpn);
        if cfg!(not(mutant = "skipped_flush")) {
            outcome.flush.absorb(edits);
        }
        outcome.flush.hold(old);
        FaultOutcome::Resolved(outcome)
    }

    /// Puts a private copy where a shared page was; gives back the frame that waits for the flush.
    fn replace_page(
        &self,
        state: &mut SpaceState<P::Backing>,
        cursor: &Cursor<'_, P::Store>,
        (table, index, entry): Found,
        copy: ReadyFrame,
    ) -> Pfn {
        let mut db = self.pfns.lock();
        let frame = db.activate(copy, Owner::Entry { table, index });
        let flags = entry.flags.unshared() | used(Access::Write);
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
