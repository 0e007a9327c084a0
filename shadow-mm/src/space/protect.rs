//! Changing what a guest may do with its pages (`mprotect`).
//!
//! A page of a clone block keeps its block: the entry carries a protection of its own, so no copy is
//! needed to tell two spaces' protections apart. Only when this space holds the last reference does the
//! change make the page private again, and that without making it writable: the new protection alone
//! says whether it is.

use crate::access::Prot;
use crate::addr::{EntryIndex, Pfn, Vpn, VpnRange};
use crate::backend::Platform;
use crate::commit::NoCommit;
use crate::flush::{Flush, TableEdits};
use crate::manager::{Demand, Manager};
use crate::pfn::{Owner, PfnDatabase};
use crate::pte::{Entry, EntryFlags, ValidEntry};
use crate::shadow::LeafRun;
use crate::space::own::Owning;
use crate::space::zap::may_be_stale;
use crate::space::{Space, SpaceState};
use crate::stats::add;
use crate::vad::{MAX_MAPPINGS, VadFlags};

/// What became of a protection change.
#[derive(Debug)]
#[must_use]
pub struct Protected {
    /// The rights that went.
    pub flush: Flush,
    /// Whether all of the range changed.
    pub result: Result<(), ProtectError>,
}

/// Why a protection change did not reach the whole range.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ProtectError {
    /// A page is not mapped (`ENOMEM`); what lies before it has changed, nothing after it.
    #[error("page {vpn} is not mapped")]
    NotMapped {
        /// The first page that is not.
        vpn: Vpn,
    },
    /// Cutting mappings would make one too many (`ENOMEM`); nothing has changed.
    #[error("the address space has its {MAX_MAPPINGS} mappings")]
    TooManyMappings,
    /// Shared tables that would have to be copied cannot be, for now (`ENOMEM`); nothing has changed.
    #[error("no memory for copies of {tables} page tables")]
    NoMemory {
        /// Tables to be copied.
        tables: usize,
    },
    /// Pages that become writable cannot be promised (`ENOMEM`); nothing has changed.
    #[error("{pages} pages of private memory cannot be promised")]
    NoCommit {
        /// Pages that would be charged.
        pages: u64,
    },
}

impl<P: Platform> Manager<P> {
    /// Changes the protection of a range, up to the first hole.
    pub fn protect(&self, space: &Space<P>, range: VpnRange, prot: Prot) -> Protected {
        let mut flush = space.no_flush();
        let mut state = space.state.lock();
        let Some(covered) = state.vads.covered_prefix(range) else {
            let result = Err(ProtectError::NotMapped { vpn: range.start() });
            return Protected { flush, result };
        };
        let pieces = state.vads.overlapping(covered).count();
        if state.vads.len_without(covered) + pieces > MAX_MAPPINGS {
            return Protected {
                flush,
                result: Err(ProtectError::TooManyMappings),
            };
        }
        let needs = self.range_needs(space, covered);
        let tables = needs.tables();
        let Some(mut reserve) = self.reserve_for(needs, Demand::tables(tables)) else {
            let result = Err(ProtectError::NoMemory { tables });
            return Protected { flush, result };
        };
        let pages = state.vads.uncharged_in(covered, prot);
        let within = state.check_quota(0, pages);
        let charged = within.and_then(|()| self.pfns.lock().commit.charge(pages));
        if charged == Err(NoCommit) {
            self.give_back(reserve);
            return Protected {
                flush,
                result: Err(ProtectError::NoCommit { pages }),
            };
        }
        for mut vad in state.vads.carve(covered) {
            vad.prot = prot;
            if vad.needs_charge(prot) {
                vad.flags |= VadFlags::CHARGED;
            }
            state.vads.insert(vad);
        }
        let owning = Owning {
            tables: &mut reserve.tables,
            flush: &mut flush,
        };
        self.own_range((space, &mut *state), covered, owning);
        self.give_back(reserve);
        space.cursor(&self.store).for_each_leaf(covered, |run| {
            self.protect_leaf(space, &mut state, run, prot, &mut flush);
        });
        add(&self.counters.protects, 1);
        let hole = Vpn::new(covered.end()).filter(|vpn| range.contains(*vpn));
        let result = hole.map_or(Ok(()), |vpn| Err(ProtectError::NotMapped { vpn }));
        Protected {
            flush: flush.finish(),
            result,
        }
    }

    fn protect_leaf(
        &self,
        space: &Space<P>,
        state: &mut SpaceState<P::Backing>,
        run: LeafRun,
        prot: Prot,
        flush: &mut Flush,
    ) {
        let cursor = space.cursor(&self.store);
        let mut db = self.pfns.lock();
        let mut edits = TableEdits::new(run.table);
        let mut written = 0;
        for (index, vpn) in run.pages() {
            let found = cursor.leaf(run.table, index);
            let private = match found {
                Entry::Valid(old) => take_over(&mut db, state, old, (run.table, index)),
                Entry::Frozen(_) => false,
                Entry::Empty
                | Entry::Transition(_)
                | Entry::Prototype(_)
                | Entry::PageFile(_)
                | Entry::DemandZero(_)
                | Entry::Decommitted => {
                    // Its next entry will have the new rights; a stale translation has the old ones.
                    if may_be_stale(&db, found) {
                        edits.add(index, vpn);
                    }
                    continue;
                }
            };
            let change = |entry: ValidEntry| {
                let flags = if private {
                    entry.flags.unshared()
                } else {
                    entry.flags
                };
                entry.with_flags(flags.with_prot(prot))
            };
            let Some((old, new)) = cursor.rewrite(run.table, index, change) else {
                continue;
            };
            written += u64::from(old != new);
            if old.flags.loses_rights(new.flags) {
                edits.add(index, vpn);
            }
        }
        flush.absorb(edits);
        add(&self.counters.entries_written, written);
    }
}

/// If the entry at `place` maps a clone block's frame, or a forked page's, and is the last to refer to that, the frame
/// becomes the entry's own. The entry's flags are still to be changed then.
pub(super) fn take_over<B: Clone + Eq>(
    db: &mut PfnDatabase,
    state: &mut SpaceState<B>,
    entry: ValidEntry,
    place: (Pfn, EntryIndex),
) -> bool {
    if !entry.flags.contains(EntryFlags::PROTOTYPE) {
        return false;
    }
    let owner = db.entry(entry.frame).owner;
    if owner == Owner::Entries {
        let taken = db.take_forked(entry.frame, place);
        state.private += u64::from(taken);
        return taken;
    }
    let Owner::Clone(block) = owner else {
        return false;
    };
    if !db.last_reference(entry.frame, block) {
        return false;
    }
    let last = state.descriptors.drop_reference(db, block);
    debug_assert!(last.is_some(), "the last reference was not the last");
    let (table, index) = place;
    db.set_owner(entry.frame, Owner::Entry { table, index });
    state.private += 1;
    true
}
