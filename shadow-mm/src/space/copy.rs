//! The copy-on-write fault (system 11).

use alloc::sync::Arc;

use crate::access::Access;
use crate::addr::Vpn;
use crate::backend::Platform;
use crate::flush::TableEdits;
use crate::manager::{Demand, Manager};
use crate::outcome::{FaultKind, FaultOutcome};
use crate::pfn::{Owner, Want};
use crate::pte::{EntryFlags, ValidEntry};
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
        let demand = Demand {
            tables: 0,
            data: 1,
            extra: 0,
            want: Want::Anything,
        };
        let Some(frame) = self
            .reserve(demand)
            .and_then(|mut reserve| reserve.data.pop())
        else {
            return FaultOutcome::NoMemory;
        };
        // Outside the PFN lock: this entry's reference keeps everybody else from storing into the page.
        let frame = self.copied(frame, entry);
        let mut db = self.pfns.lock();
        let frame = db.activate(frame, Owner::Entry { table, index });
        let flags = entry.flags.unshared() | used(Access::Write);
        let new = ValidEntry { frame, flags };
        let old = cursor
            .rewrite(table, index, |_| new)
            .map_or(entry, |(old, _)| old);
        drop_page(&mut db, state, old);
        drop(db);
        state.gained_private(1);
        let mut outcome = resolution(space, FaultKind::CopyOnWrite, 1);
        let mut edits = TableEdits::new(table);
        edits.add(index, vpn);
        if cfg!(not(mutant = "skipped_flush")) {
            outcome.flush.absorb(edits);
        }
        outcome.flush.hold(old.frame);
        add(&self.counters.entries_written, 1);
        FaultOutcome::Resolved(outcome)
    }

    /// A taken frame with a copy of an entry's page.
    pub(super) fn copied(
        &self,
        frame: crate::pfn::Taken,
        from: ValidEntry,
    ) -> crate::pfn::ReadyFrame {
        add(&self.counters.pages_copied, 1);
        if cfg!(mutant = "skipped_copy") {
            return self.zeroed(frame).into();
        }
        frame.forget_content().copy_of(from.frame, &self.store)
    }
}
