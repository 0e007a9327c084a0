//! Moving and resizing a mapping (`mremap`). Frames keep their content; entries keep their state.

use alloc::sync::Arc;

use crate::addr::{Level, Vpn, VpnRange};
use crate::backend::{Platform, SpaceGuard};
use crate::commit::NoCommit;
use crate::flush::{Flush, TableEdits};
use crate::manager::{Demand, Manager, Reserve};
use crate::pfn::Owner;
use crate::pte::{Entry, EntryFlags};
use crate::shadow::{LeafRun, TableCount};
use crate::space::own::Owning;
use crate::space::zap::may_be_stale;
use crate::space::{MapError, Mapped, Placement, Space, SpaceState};
use crate::stats::add;
use crate::vad::{MAX_MAPPINGS, VadInfo};

/// A mapping to move or resize.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RemapRequest {
    /// The pages; all of one mapping.
    pub old: VpnRange,
    /// How many there shall be; not zero.
    pub new_count: u64,
    /// Whether they may go elsewhere if they cannot grow in place (`MREMAP_MAYMOVE`).
    pub may_move: bool,
    /// Exactly where they shall go, replacing what is there (`MREMAP_FIXED`).
    pub fixed: Option<Vpn>,
}

/// Why a mapping was not moved. Nothing has changed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum RemapError {
    /// The old range is not one mapping (`EFAULT`).
    #[error("{old} is not part of one mapping")]
    NotOneMapping {
        /// The old range.
        old: VpnRange,
    },
    /// The old and the new range overlap (`EINVAL`).
    #[error("{old} and its new place {new} overlap")]
    Overlap {
        /// The old range.
        old: VpnRange,
        /// The new range.
        new: VpnRange,
    },
    /// There is no room to grow in place, and moving was not allowed (`ENOMEM`).
    #[error("{old} cannot grow to {new_count} pages where it is")]
    CannotGrow {
        /// The old range.
        old: VpnRange,
        /// The pages asked for.
        new_count: u64,
    },
    /// The new range is no place for a mapping, or there are too many.
    #[error("no new place")]
    Place(#[source] MapError),
    /// No table frame is left for the new place (`ENOMEM`).
    #[error("no memory for {tables} page tables")]
    NoMemory {
        /// Page tables the move may need.
        tables: usize,
    },
}

impl<P: Platform> Manager<P> {
    /// Moves or resizes a mapping.
    ///
    /// # Errors
    /// See [`RemapError`]; nothing has changed then.
    pub fn remap(&self, space: &Space<P>, request: RemapRequest) -> Result<Mapped, RemapError> {
        let RemapRequest {
            old,
            new_count,
            may_move,
            fixed,
        } = request;
        let mut state = space.state.lock();
        let vad = state
            .vads
            .find(old.start())
            .filter(|vad| vad.range.end() >= old.end());
        let vad = vad
            .map(|vad| vad.info())
            .ok_or(RemapError::NotOneMapping { old })?;
        if new_count == 0 {
            let bad = MapError::BadRange {
                start: fixed,
                count: 0,
            };
            return Err(RemapError::Place(bad));
        }
        if fixed.is_none() {
            if new_count <= old.count() {
                return self.shrink(space, &mut state, old, new_count);
            }
            let more = match state.vads.charged_in(old) {
                0 => 0,
                charged => new_count - charged,
            };
            self.promise(&state, 0, more)?;
            if let Some(range) = self.grow(&mut state, &vad, old, new_count) {
                return Ok(Mapped {
                    range,
                    flush: space.no_flush(),
                });
            }
            self.pfns.lock().commit.release(more);
            if !may_move {
                return Err(RemapError::CannotGrow { old, new_count });
            }
        }
        self.relocate(space, state, request)
    }

    /// Charges pages in the place of others.
    fn promise(
        &self,
        state: &SpaceState<P::Backing>,
        released: u64,
        charged: u64,
    ) -> Result<(), RemapError> {
        let within = state.check_quota(released, charged);
        let commit = within.and_then(|()| self.pfns.lock().commit.exchange(released, charged));
        let no_commit = MapError::NoCommit { pages: charged };
        commit.map_err(|NoCommit| RemapError::Place(no_commit))
    }

    fn shrink(
        &self,
        space: &Space<P>,
        state: &mut SpaceState<P::Backing>,
        old: VpnRange,
        new_count: u64,
    ) -> Result<Mapped, RemapError> {
        let mut flush = space.no_flush();
        let range = VpnRange::new(old.start(), new_count).unwrap_or(old);
        let tail = Vpn::new(range.end()).and_then(|end| VpnRange::between(end, old.end()));
        if let Some(tail) = tail {
            if state.vads.len_without(tail) > MAX_MAPPINGS {
                return Err(RemapError::Place(MapError::TooManyMappings));
            }
            let edges = self.reserve_edges(space, tail);
            let mut edges = edges.ok_or(RemapError::Place(MapError::NoMemory))?;
            let owning = Owning {
                tables: &mut edges.tables,
                flush: &mut flush,
            };
            self.own_edges((space, &mut *state), tail, owning);
            self.give_back(edges);
            self.pfns.lock().commit.release(state.vads.charged_in(tail));
            state.vads.carve(tail);
            self.zap(space, state, tail, &mut flush);
        }
        Ok(Mapped {
            range,
            flush: flush.finish(),
        })
    }

    /// Makes the mapping longer where it is, if the range ends it and what follows is free.
    fn grow(
        &self,
        state: &mut SpaceState<P::Backing>,
        vad: &VadInfo<P::Backing>,
        old: VpnRange,
        new_count: u64,
    ) -> Option<VpnRange> {
        let range = self.user_range(old.start(), new_count).ok()?;
        let tail = VpnRange::between(Vpn::new(old.end())?, range.end())?;
        if vad.range.end() != old.end() || !state.vads.is_free(tail) {
            return None;
        }
        let longer = VpnRange::between(vad.range.start(), range.end())?;
        for vad in state.vads.carve(vad.range) {
            state.vads.insert(vad.moved_to(longer));
        }
        state.update_peak_pages();
        Some(range)
    }

    fn relocate(
        &self,
        space: &Space<P>,
        mut guard: SpaceGuard<'_, P, SpaceState<P::Backing>>,
        request: RemapRequest,
    ) -> Result<Mapped, RemapError> {
        let state = &mut *guard;
        let (old, new) = (request.old, self.new_place(state, request)?);
        let kept = VpnRange::new(old.start(), new.count().min(old.count())).unwrap_or(old);
        let tables = self.tables_for_move(space, kept, new);
        // Entries are moved one by one, so all their tables must be the space's own.
        let needs = self.range_needs(space, kept);
        let edges = [old, new].map(|range| self.edge_needs(space, range).tables());
        // Some of them are counted twice: only the first time are they promised.
        let tables = tables + needs.tables() + edges.iter().sum::<usize>();
        let reserve = self.reserve_for(needs, Demand::tables(tables));
        let mut reserve = reserve.ok_or(RemapError::NoMemory { tables })?;
        let charged = match state.vads.charged_in(old) {
            0 => 0,
            _ => new.count(),
        };
        let released = state.vads.charged_in(old) + state.vads.charged_in(new);
        if let Err(error) = self.promise(state, released, charged) {
            self.give_back(reserve);
            return Err(error);
        }
        let mut flush = space.no_flush();
        self.own_for_move(
            (space, &mut *state),
            (old, kept, new),
            Owning {
                tables: &mut reserve.tables,
                flush: &mut flush,
            },
        );
        let replaced = state.vads.carve(new);
        self.zap(space, state, new, &mut flush);
        let mut moved = state.vads.carve(old);
        if let Some(vad) = moved.pop() {
            state.vads.insert(vad.moved_to(new));
        }
        self.move_pages(space, state, (kept, new), &mut reserve, &mut flush);
        move_image(state, kept, new.start());
        // What is left lies beyond the new size.
        self.zap(space, state, old, &mut flush);
        self.give_back(reserve);
        state.update_peak_pages();
        drop(guard);
        drop((replaced, moved));
        Ok(Mapped {
            range: new,
            flush: flush.finish(),
        })
    }

    /// Owns what is moved, and the edges of what is emptied.
    fn own_for_move(
        &self,
        (space, state): (&Space<P>, &mut SpaceState<P::Backing>),
        (old, kept, new): (VpnRange, VpnRange, VpnRange),
        owning: Owning<'_>,
    ) {
        let Owning { tables, flush } = owning;
        let mut own = |range, edges| {
            let owning = Owning {
                tables: &mut *tables,
                flush: &mut *flush,
            };
            match edges {
                true => self.own_edges((space, &mut *state), range, owning),
                false => self.own_range((space, &mut *state), range, owning),
            }
        };
        own(kept, false);
        own(old, true);
        own(new, true);
    }

    /// Where the pages go, if they may.
    fn new_place(
        &self,
        state: &mut SpaceState<P::Backing>,
        request: RemapRequest,
    ) -> Result<VpnRange, RemapError> {
        let old = request.old;
        let placement = match request.fixed {
            Some(at) => Placement::Fixed(at),
            None => Placement::Anywhere {
                hint: None,
                below: self.limits.user_end.vpn(),
            },
        };
        let new = self
            .place(state, placement, request.new_count)
            .map_err(RemapError::Place)?;
        if old.intersect(new).is_some() {
            return Err(RemapError::Overlap { old, new });
        }
        // The old range leaves at most two pieces, what lies at the new place two, and the mapping is one.
        if state.vads.len_without(old).max(state.vads.len_without(new)) + 3 > MAX_MAPPINGS {
            return Err(RemapError::Place(MapError::TooManyMappings));
        }
        Ok(new)
    }

    /// How many tables the new place may need for the pages the old one has.
    fn tables_for_move(&self, space: &Space<P>, old: VpnRange, new: VpnRange) -> usize {
        let mut count = TableCount::default();
        space.cursor(&self.store).for_each_leaf(old, |run| {
            let ahead = run.range().start().get() - old.start().get();
            let start = new.start().checked_add(ahead);
            if let Some(range) = start.and_then(|s| VpnRange::new(s, run.range().count())) {
                count.add(range);
            }
        });
        count.tables()
    }

    fn move_pages(
        &self,
        space: &Space<P>,
        state: &mut SpaceState<P::Backing>,
        (old, new): (VpnRange, VpnRange),
        reserve: &mut Reserve,
        flush: &mut Flush,
    ) {
        let before = reserve.tables.len();
        space.cursor(&self.store).for_each_leaf(old, |run| {
            self.move_leaf(space, run, (old, new), reserve, flush);
        });
        state.tables += (before - reserve.tables.len()) as u64;
    }

    fn move_leaf(
        &self,
        space: &Space<P>,
        run: LeafRun,
        (old, new): (VpnRange, VpnRange),
        reserve: &mut Reserve,
        flush: &mut Flush,
    ) {
        let cursor = space.cursor(&self.store);
        let mut edits = TableEdits::new(run.table);
        let mut db = self.pfns.lock();
        for (index, vpn) in run.pages() {
            if cursor.leaf(run.table, index) == Entry::Empty {
                continue;
            }
            let Some(to) = new.start().checked_add(vpn.get() - old.start().get()) else {
                break;
            };
            let entry = cursor.remove(&mut db, run.table, index);
            if may_be_stale(&db, entry) {
                edits.add(index, vpn);
            }
            let table = cursor.ensure_leaf(&mut db, to, &mut reserve.tables);
            let index = to.index(Level::Leaf);
            cursor.put(&mut db, (table, index), entry);
            match entry {
                Entry::Valid(page) if !page.flags.contains(EntryFlags::PROTOTYPE) => {
                    db.set_owner(page.frame, Owner::Entry { table, index });
                }
                Entry::Transition(frame) => db.set_owner(frame, Owner::Entry { table, index }),
                Entry::Valid(_)
                | Entry::Frozen(_)
                | Entry::Prototype(_)
                | Entry::PageFile(_)
                | Entry::Empty
                | Entry::DemandZero(_)
                | Entry::Decommitted => {}
            }
            add(&self.counters.entries_written, 2);
        }
        drop(db);
        flush.absorb(edits);
    }
}

/// Moves the image under a range along with its pages.
fn move_image<B: Clone + Eq>(state: &mut SpaceState<B>, old: VpnRange, to: Vpn) {
    for mut run in state.carve_image(old) {
        let ahead = run.range.start().get() - old.start().get();
        let start = to.checked_add(ahead);
        if let Some(range) = start.and_then(|start| VpnRange::new(start, run.range.count())) {
            run.range = range;
            Arc::make_mut(&mut state.images).insert(run);
        }
    }
}
