//! Page faults: what an access that the hardware refused needs.

use alloc::sync::Arc;
use alloc::vec::Vec;

use crate::access::{Access, Denied};
use crate::addr::{EntryIndex, GuestVa, Level, Pfn, Vpn};
use crate::backend::Platform;
use crate::manager::{Demand, Manager};
use crate::outcome::{FaultKind, FaultOutcome, Resolution};
use crate::pfn::{Original, Owner, Want};
use crate::pte::{Entry, EntryFlags, ValidEntry};
use crate::space::ahead::note_made;
use crate::space::own::Owning;
use crate::space::transition::Absent;
use crate::space::{Space, SpaceState};
use crate::stats::add;
use crate::vad::{MapKind, Sharing};

/// Pages a first demand-zero fault maps.
pub(super) const AROUND_FIRST: u8 = 1;
/// Most pages one demand-zero fault maps: 128 KiB.
pub(super) const AROUND_MAX: u8 = 32;

impl<P: Platform> Manager<P> {
    /// Resolves a fault at an address. Only the lower half's user range has mappings, so an address of
    /// the supervisor slot is [`Denied::NotMapped`].
    pub fn fault(&self, space: &Arc<Space<P>>, va: GuestVa, access: Access) -> FaultOutcome<P> {
        let mut state = space.state.lock();
        let mut outcome = self.resolve(space, &mut state, va.vpn(), access);
        if let FaultOutcome::Resolved(resolution) = &mut outcome
            && access == Access::Write
        {
            self.store_ahead(space, &mut state, va.vpn(), resolution);
        }
        drop(state);
        self.count(&outcome);
        outcome
    }

    /// Resolves a fault with the space locked.
    pub(super) fn resolve(
        &self,
        space: &Arc<Space<P>>,
        state: &mut SpaceState<P::Backing>,
        vpn: Vpn,
        access: Access,
    ) -> FaultOutcome<P> {
        let Some(vad) = state.vads.find(vpn) else {
            return FaultOutcome::Denied(Denied::NotMapped);
        };
        if !vad.prot.allows(access) {
            return FaultOutcome::Denied(Denied::Protection);
        }
        let view = vad.kind != MapKind::Anonymous || state.images.find(vpn).is_some();
        let prot = vad.prot;
        let found = space.cursor(&self.store).lookup(vpn);
        let Some(found) = found.filter(|found| found.entry != Entry::Empty) else {
            return match view {
                true => self.view_fault(space, state, vpn, access),
                false => self.demand_zero(space, state, vpn, access),
            };
        };
        let (table, index) = (found.table, found.index);
        match found.entry {
            // Another virtual CPU may still store to the page as it did before the fork (system 3).
            Entry::Valid(entry)
                if access == Access::Write
                    && space.is_forking()
                    && (found.shared || !entry.flags.contains(EntryFlags::WRITABLE)) =>
            {
                FaultOutcome::Collided
            }
            Entry::Frozen(_) if access == Access::Write && space.is_forking() => {
                FaultOutcome::Collided
            }
            Entry::Frozen(_) if access == Access::Write && is_shared_view(state, vpn) => {
                self.to_be_thawed(state, vpn)
            }
            // Others may share the entry, but not the right to store.
            Entry::Valid(_) | Entry::Frozen(_) if found.shared && access == Access::Write => {
                self.own_page(space, state, vpn)
            }
            Entry::Frozen(entry) => match access {
                Access::Read | Access::Execute => {
                    FaultOutcome::Resolved(resolution(space, FaultKind::Spurious, 0))
                }
                Access::Write => self.copy_frozen(space, state, vpn, entry.frame),
            },
            Entry::Valid(entry) => {
                let allowed = access != Access::Write || entry.flags.contains(EntryFlags::WRITABLE);
                if allowed {
                    return FaultOutcome::Resolved(resolution(space, FaultKind::Spurious, 0));
                }
                if self.pfns.lock().is_sections(entry) {
                    if is_shared_view(state, vpn) {
                        return self.open_kept(space, state, vpn, (table, index, entry));
                    }
                    return self.break_view(space, state, vpn, entry);
                }
                self.break_copy(space, state, vpn, (table, index, entry))
            }
            Entry::Empty
            | Entry::Transition(_)
            | Entry::PageFile(_)
            | Entry::Prototype(_)
            | Entry::DemandZero(_)
            | Entry::Decommitted => {
                let absent = Absent {
                    vpn,
                    // A page that is shared comes back for all, and to nobody's use.
                    access: if found.shared || space.is_forking() {
                        Access::Read
                    } else {
                        access
                    },
                    prot,
                    place: (table, index),
                    shared: found.shared,
                };
                self.bring_back(space, state, absent)
            }
        }
    }

    /// A store to a page in a shared table: makes the path to it the space's own, and looks again.
    fn own_page(
        &self,
        space: &Arc<Space<P>>,
        state: &mut SpaceState<P::Backing>,
        vpn: Vpn,
    ) -> FaultOutcome<P> {
        let cursor = space.cursor(&self.store);
        let needs = self.needs(space, vpn);
        let demand = Demand::tables(needs.tables());
        let Some(mut reserve) = self.reserve_for(needs, demand) else {
            return FaultOutcome::NoMemory;
        };
        let mut owned = resolution(space, FaultKind::Unshared, 0);
        let owning = Owning {
            tables: &mut reserve.tables,
            flush: &mut owned.flush,
        };
        let table = self.own_leaf((space, &mut *state), &mut self.pfns.lock(), vpn, owning);
        self.give_back(reserve);
        // What was trimmed meanwhile is for the next fault: it may have to be read.
        let found = cursor.leaf(table, vpn.index(Level::Leaf));
        if found.present().is_none() {
            return FaultOutcome::Resolved(owned);
        }
        match self.resolve(space, state, vpn, Access::Write) {
            FaultOutcome::Resolved(mut resolution) => {
                if resolution.kind == FaultKind::Spurious {
                    resolution.kind = FaultKind::Unshared;
                }
                resolution.flush = owned.flush.merge(resolution.flush);
                FaultOutcome::Resolved(resolution)
            }
            // The path is owned, and the flush must not be lost: the next fault will say what is wrong.
            FaultOutcome::Denied(_)
            | FaultOutcome::NoMemory
            | FaultOutcome::Read(_)
            | FaultOutcome::Wait(_)
            | FaultOutcome::PageIn(_)
            | FaultOutcome::Thaw(_)
            | FaultOutcome::Collided => FaultOutcome::Resolved(owned),
        }
    }

    /// Makes a page of zeroes, and the pages after it if the guest walks upwards.
    fn demand_zero(
        &self,
        space: &Arc<Space<P>>,
        state: &mut SpaceState<P::Backing>,
        vpn: Vpn,
        access: Access,
    ) -> FaultOutcome<P> {
        let cursor = space.cursor(&self.store);
        let (needs, index) = (self.needs(space, vpn), vpn.index(Level::Leaf));
        let extra = self.empty_run(space, vpn, window(state, vpn)) - 1;
        let demand = Demand {
            tables: needs.tables(),
            data: 1,
            extra,
            want: Want::Zeroes,
        };
        let Some(mut reserve) = self.reserve_for(needs, demand) else {
            return FaultOutcome::NoMemory;
        };
        let frames: Vec<_> = reserve
            .data
            .drain(..)
            .map(|frame| self.zeroed(frame))
            .collect();
        let mapped = frames.len();
        let Some(vad) = state.vads.find(vpn) else {
            return FaultOutcome::Denied(Denied::NotMapped);
        };
        let flags = EntryFlags::private(vad.prot);
        note_made(state, vpn, mapped);
        let mut outcome = resolution(space, FaultKind::DemandZero, mapped as u32);
        let mut db = self.pfns.lock();
        let owning = Owning {
            tables: &mut reserve.tables,
            flush: &mut outcome.flush,
        };
        let table = self.own_leaf((space, &mut *state), &mut db, vpn, owning);
        for (index, frame) in EntryIndex::onward(index).zip(frames) {
            let owner = Owner::Entry { table, index };
            let frame = db.activate_clean(frame.into(), owner, Original::Zero);
            cursor.install(&mut db, table, index, ValidEntry { frame, flags });
        }
        drop(db);
        cursor.mark_used(table, index, used(access));
        self.give_back(reserve);
        state.gained_private(mapped as u64);
        add(&self.counters.entries_written, mapped as u64);
        FaultOutcome::Resolved(outcome)
    }

    /// How many of `most` pages from an empty one on have empty entries in one leaf table; at least one.
    fn empty_run(&self, space: &Space<P>, vpn: Vpn, most: usize) -> usize {
        let cursor = space.cursor(&self.store);
        let slots = EntryIndex::onward(vpn.index(Level::Leaf)).take(most);
        let run = match cursor.find_leaf(vpn) {
            None => slots.count(),
            Some(table) => slots
                .take_while(|n| cursor.leaf(table, *n) == Entry::Empty)
                .count(),
        };
        run.max(1)
    }

    /// Counts an outcome.
    pub(super) fn count(&self, outcome: &FaultOutcome<P>) {
        match outcome {
            FaultOutcome::Resolved(resolution) => self.counters.resolved(resolution.kind),
            FaultOutcome::Denied(_) => add(&self.counters.faults_denied, 1),
            FaultOutcome::NoMemory => add(&self.counters.faults_no_memory, 1),
            FaultOutcome::Wait(_) => add(&self.counters.faults_collided, 1),
            FaultOutcome::Collided => add(&self.counters.faults_collided, 1),
            FaultOutcome::Thaw(_) => add(&self.counters.faults_thaw, 1),
            FaultOutcome::PageIn(ticket) => {
                add(&self.counters.page_ins, 1);
                add(&self.counters.pages_paged_in, ticket.frames.len() as u64);
            }
            FaultOutcome::Read(ticket) => {
                add(&self.counters.reads_issued, 1);
                add(&self.counters.pages_read, ticket.frames.len() as u64);
            }
        }
    }
}

/// How many pages a fault at `vpn` should map: twice the last time if the guest touches pages in order,
/// never beyond the mapping.
pub(super) fn window<B: Clone + Eq>(state: &SpaceState<B>, vpn: Vpn) -> usize {
    let Some(vad) = state.vads.find(vpn) else {
        return 1;
    };
    let sequential = vad.around.next == vpn.get();
    let window = if sequential {
        vad.around.window.saturating_mul(2)
    } else {
        AROUND_FIRST
    };
    let end = if cfg!(mutant = "zeroes_over_image") {
        vad.range.end()
    } else {
        state.images.extent(vpn, vad.range).end()
    };
    let left = end - vpn.get();
    u64::from(window.clamp(AROUND_FIRST, AROUND_MAX)).min(left) as usize
}

/// Whether a store to the page is seen by others who map it.
fn is_shared_view<B: Clone + Eq>(state: &SpaceState<B>, vpn: Vpn) -> bool {
    let source = state.source(vpn);
    source.is_some_and(|source| source.sharing == Sharing::Shared)
}

/// What hardware would set for the access that is about to be tried again.
pub(super) fn used(access: Access) -> EntryFlags {
    match access {
        Access::Read | Access::Execute => EntryFlags::ACCESSED,
        Access::Write => EntryFlags::ACCESSED | EntryFlags::DIRTY,
    }
}

pub(super) fn resolution<P: Platform>(
    space: &Space<P>,
    kind: FaultKind,
    mapped: u32,
) -> Resolution {
    Resolution {
        kind,
        mapped,
        flush: space.no_flush(),
    }
}

/// A leaf entry and where it is.
pub(super) type Found = (Pfn, EntryIndex, ValidEntry);
