//! The manager: what all spaces of one frame pool have in common.

use alloc::collections::BTreeMap;
use alloc::sync::{Arc, Weak};
use alloc::vec::Vec;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use crate::addr::{Pfn, SpaceId, Vpn, VpnRange};
use crate::backend::{FrameStore, PfnMutex, Platform, RegistryMutex, SupervisorMutex};
use crate::commit::CommitLimit;
use crate::flush::Flush;
use crate::limits::{Clusters, LayoutError, Limits, PoolLayout};
use crate::pfn::{
    FreeFrame, Owner, PfnDatabase, PfnState, Taken, Want, ZeroedFrame, Zone, ZoneKind,
};
use crate::proto::CloneTable;
use crate::shadow::{Cursor, SUPERVISOR_SLOT};
use crate::space::{ForkMode, Space, SpaceState};
use crate::stats::{Counters, StatsSnapshot, ZoneStats, add};
use crate::vad::VadSet;

/// The memory manager of one frame pool. Every entry point takes `&self`; see the crate's documentation
/// for the locks.
pub struct Manager<P: Platform> {
    pub(crate) store: P::Store,
    /// The PFN lock: the last lock taken.
    pub(crate) pfns: PfnMutex<P, PfnDatabase>,
    pub(crate) limits: Limits,
    pub(crate) layout: PoolLayout,
    pub(crate) clusters: Clusters,
    /// The table all roots name in their supervisor slot.
    pub(crate) supervisor: Pfn,
    /// Serialises changes of the supervisor's tables; taken before the PFN lock.
    pub(crate) supervisor_lock: SupervisorMutex<P>,
    pub(crate) counters: Counters,
    /// Whether forks share tables.
    shares_tables: AtomicBool,
    /// Pages that the mappings of a new space may be charged; `u64::MAX` for any number.
    first_quota: AtomicU64,
    next_space: AtomicU64,
    /// Spaces that hold frames.
    pub(crate) live_spaces: AtomicU64,
    /// The spaces that were not deleted.
    pub(crate) spaces: RegistryMutex<P, BTreeMap<SpaceId, Weak<Space<P>>>>,
}

/// Why a space cannot be made. Nothing has changed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum CreateError {
    /// No frame is left for its top-level table.
    #[error("no table frame is left")]
    NoMemory,
}

/// Frames taken for an operation, so that it cannot fail half-way.
#[derive(Debug, Default)]
pub(crate) struct Reserve {
    pub(crate) tables: Vec<ZeroedFrame>,
    pub(crate) data: Vec<Taken>,
}

/// Whether dropped sections have pages that are still to be given back.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Leftover {
    None,
    Some,
}

/// How many frames an operation asks for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Demand {
    pub(crate) tables: usize,
    /// Data frames it cannot do without.
    pub(crate) data: usize,
    /// Further data frames it would use if frames are not short.
    pub(crate) extra: usize,
    pub(crate) want: Want,
}

impl Demand {
    /// Table frames only.
    pub(crate) fn tables(tables: usize) -> Self {
        let want = Want::Zeroes;
        Self {
            tables,
            data: 0,
            extra: 0,
            want,
        }
    }

    /// One data frame to be overwritten.
    pub(crate) fn one_page() -> Self {
        let want = Want::Anything;
        Self {
            tables: 0,
            data: 1,
            extra: 0,
            want,
        }
    }
}

/// Table frames that one operation is promised, or promises to others.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Promise {
    /// Of those it takes, so many were promised to it.
    pub(crate) kept: u64,
    /// So many must be left for the spaces that share tables because of it.
    pub(crate) made: u64,
}

impl Promise {
    /// Whether enough table frames are left for those that were promised some, once `tables` are taken.
    fn leaves_enough(self, db: &PfnDatabase, tables: u64) -> bool {
        let new = tables.saturating_sub(self.kept) + self.made;
        let promised = db.promised_tables().saturating_sub(self.kept) + self.made;
        let left = u64::from(db.zone(ZoneKind::Tables).available()).saturating_sub(tables);
        new == 0 || left >= promised
    }
}

impl<P: Platform> Manager<P> {
    /// A manager of a pool whose frames all read as zero.
    ///
    /// # Errors
    /// [`LayoutError`] if the zones or the user range make no sense.
    pub fn new(store: P::Store, layout: PoolLayout, limits: Limits) -> Result<Self, LayoutError> {
        layout.validate()?;
        limits.validate()?;
        let frames = u64::from(layout.data.count) + u64::from(layout.tables.count);
        let out_of_memory = LayoutError::OutOfMemory { frames };
        let mut db = PfnDatabase::new(layout.data, layout.tables).ok_or(out_of_memory)?;
        let first = db
            .take(ZoneKind::Tables, Want::Zeroes, &store)
            .ok_or(out_of_memory)?;
        let supervisor = db.activate(first.zeroed(&store).0.into(), Owner::Supervisor);
        db.charge_tables(1);
        Ok(Self {
            store,
            pfns: PfnMutex::<P, _>::new(db),
            limits,
            layout,
            clusters: Clusters::default(),
            supervisor,
            supervisor_lock: SupervisorMutex::<P>::new(()),
            counters: Counters::default(),
            shares_tables: AtomicBool::new(false),
            first_quota: AtomicU64::new(u64::MAX),
            next_space: AtomicU64::new(1),
            live_spaces: AtomicU64::new(0),
            spaces: RegistryMutex::<P, _>::new(BTreeMap::new()),
        })
    }

    /// The same, with other sizes of reads. For measurements: sizes that are not valid stay as they are.
    #[must_use]
    pub fn with_clusters(mut self, clusters: Clusters) -> Self {
        if clusters.are_valid() {
            self.clusters = clusters;
        }
        self
    }

    /// Sets how spaces are forked, before the first is.
    pub fn set_fork_mode(&self, mode: ForkMode) {
        debug_assert_eq!(
            self.counters.forks.load(Relaxed),
            0,
            "the kinds of fork do not mix"
        );
        self.shares_tables.store(mode == ForkMode::Shared, Relaxed);
    }

    /// How spaces are forked.
    #[must_use]
    pub fn fork_mode(&self) -> ForkMode {
        match self.shares_tables.load(Relaxed) {
            false => ForkMode::Eager,
            true => ForkMode::Shared,
        }
    }

    /// Guest RAM.
    #[must_use]
    pub fn store(&self) -> &P::Store {
        &self.store
    }

    /// The zones of the pool.
    #[must_use]
    pub fn layout(&self) -> PoolLayout {
        self.layout
    }

    /// The part of the address range guests may map.
    #[must_use]
    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// Makes an empty space: a root with the supervisor slot in it.
    ///
    /// # Errors
    /// [`CreateError::NoMemory`].
    pub fn create_space(&self) -> Result<Arc<Space<P>>, CreateError> {
        let demand = Demand::tables(1);
        let mut reserve = self.reserve(demand).ok_or(CreateError::NoMemory)?;
        let root = reserve.tables.pop().ok_or(CreateError::NoMemory)?;
        let root = self.make_root(root);
        let mut state = SpaceState::new(VadSet::default(), Default::default());
        state.quota = match self.first_quota.load(Relaxed) {
            u64::MAX => CommitLimit::Unlimited,
            pages => CommitLimit::Pages(pages),
        };
        Ok(self.publish(root, state))
    }

    /// Makes a root out of a table frame.
    pub(crate) fn make_root(&self, frame: ZeroedFrame) -> Pfn {
        let mut db = self.pfns.lock();
        let root = db.activate(frame.into(), Owner::Root);
        db.charge_tables(1);
        let cursor = Cursor::new(&self.store, root);
        cursor.link_existing(&mut db, root, SUPERVISOR_SLOT, self.supervisor);
        root
    }

    /// A space with a number of its own.
    pub(crate) fn publish(&self, root: Pfn, state: SpaceState<P::Backing>) -> Arc<Space<P>> {
        self.live_spaces.fetch_add(1, Relaxed);
        let id = SpaceId::new(self.next_space.fetch_add(1, Relaxed));
        let space = Arc::new(Space::new(id, root, state));
        self.spaces.lock().insert(id, Arc::downgrade(&space));
        space
    }

    /// A space that was not deleted.
    pub(crate) fn find_space(&self, id: SpaceId) -> Option<Arc<Space<P>>> {
        self.spaces.lock().get(&id).and_then(Weak::upgrade)
    }

    /// The spaces that are alive, oldest first; some may be gone by the time the caller looks.
    #[must_use]
    pub fn spaces(&self) -> Vec<Arc<Space<P>>> {
        self.spaces
            .lock()
            .values()
            .filter_map(Weak::upgrade)
            .collect()
    }

    /// The flush is done: no vCPU has any of its translations. Its frames return to the pool, unless
    /// something else still holds them.
    pub fn flushed(&self, flush: Flush) {
        let held = flush.into_held();
        if held.is_empty() {
            return;
        }
        let mut db = self.pfns.lock();
        for frame in held {
            db.release(frame);
        }
    }

    /// Takes frames for an operation: all it cannot do without, or none. Table frames come zeroed.
    pub(crate) fn reserve(&self, demand: Demand) -> Option<Reserve> {
        self.reserve_with(demand, Promise::default())
    }

    /// As [`Self::reserve`]; `copies` of the table frames were promised when tables became shared.
    pub(crate) fn reserve_owned(&self, demand: Demand, copies: usize) -> Option<Reserve> {
        let promise = Promise {
            kept: copies as u64,
            made: 0,
        };
        self.reserve_with(demand, promise)
    }

    /// As [`Self::reserve`], with regard to table frames that others were, or will be, promised.
    pub(crate) fn reserve_with(&self, demand: Demand, promise: Promise) -> Option<Reserve> {
        loop {
            match self.try_reserve(demand, promise) {
                (None, Leftover::Some) => {}
                (taken, _) => return taken,
            }
        }
    }

    /// Takes frames from what there is, and says whether dropped sections still have some.
    fn try_reserve(&self, demand: Demand, promise: Promise) -> (Option<Reserve>, Leftover) {
        let mut reserve = Reserve::default();
        let mut tables = Vec::new();
        let leftover;
        {
            let mut db = self.pfns.lock();
            leftover = match db.reap() {
                true => Leftover::Some,
                false => Leftover::None,
            };
            if !promise.leaves_enough(&db, demand.tables as u64) {
                return (None, leftover);
            }
            let take = |db: &mut PfnDatabase, kind, count, into: &mut Vec<Taken>, want| {
                take_frames(db, &self.store, (kind, want), count, into)
            };
            let (data, want) = (ZoneKind::Data, demand.want);
            let enough = take(
                &mut db,
                ZoneKind::Tables,
                demand.tables,
                &mut tables,
                Want::Zeroes,
            ) && take(&mut db, data, demand.data, &mut reserve.data, want);
            if !enough {
                tables
                    .into_iter()
                    .chain(reserve.data)
                    .for_each(|frame| db.give_back(frame));
                return (None, leftover);
            }
            for _ in 0..demand.extra {
                if db.short() || !take(&mut db, data, 1, &mut reserve.data, want) {
                    break;
                }
            }
        }
        add(&self.counters.tables_made, tables.len() as u64);
        reserve.tables = tables.into_iter().map(|frame| self.zeroed(frame)).collect();
        (Some(reserve), leftover)
    }

    /// Takes so many of the table frames that were promised when tables became shared; fewer if others have
    /// them for the moment.
    pub(crate) fn take_promised(&self, copies: usize) -> Vec<ZeroedFrame> {
        let mut db = self.pfns.lock();
        let taken = (0..copies).map_while(|_| db.take_promised(self.store()));
        let taken: Vec<_> = taken.collect();
        drop(db);
        taken.into_iter().map(|frame| self.zeroed(frame)).collect()
    }

    /// A taken frame, zeroed outside the PFN lock if it is not yet.
    pub(crate) fn zeroed(&self, frame: Taken) -> ZeroedFrame {
        let (frame, by_us) = frame.zeroed(&self.store);
        add(&self.counters.pages_zeroed, u64::from(by_us));
        frame
    }

    /// Gives back what an operation did not use.
    pub(crate) fn give_back(&self, reserve: Reserve) {
        if reserve.tables.is_empty() && reserve.data.is_empty() {
            return;
        }
        let mut db = self.pfns.lock();
        reserve
            .tables
            .into_iter()
            .for_each(|frame| db.give_back(Taken::Zeroed(frame)));
        reserve
            .data
            .into_iter()
            .for_each(|frame| db.give_back(frame));
    }

    /// The part of a range that guests may ever have mapped.
    pub(crate) fn user_part(&self, range: VpnRange) -> Option<VpnRange> {
        let end = self.limits.user_end.vpn().get();
        VpnRange::between(Vpn::new(0)?, end)?.intersect(range)
    }

    /// Sets how much private memory may be promised to guests. What is promised stays so.
    pub fn set_commit_limit(&self, limit: CommitLimit) {
        self.pfns.lock().commit.set_limit(limit);
    }

    /// Sets the quota that spaces are created with; forks have their parent's ([`Self::set_quota`]).
    pub fn set_first_quota(&self, quota: CommitLimit) {
        let pages = match quota {
            CommitLimit::Unlimited => u64::MAX,
            CommitLimit::Pages(pages) => pages,
        };
        self.first_quota.store(pages, Relaxed);
    }

    /// How much private memory may be promised to guests.
    #[must_use]
    pub fn commit_limit(&self) -> CommitLimit {
        self.pfns.lock().commit.limit()
    }

    /// Data frames that can be taken now.
    #[must_use]
    pub fn available(&self) -> u64 {
        self.pfns.lock().zone(ZoneKind::Data).available().into()
    }

    /// Table frames that can be taken now. Those that were promised for copies of shared tables are not among them.
    #[must_use]
    pub fn available_tables(&self) -> u64 {
        let db = self.pfns.lock();
        let there = u64::from(db.zone(ZoneKind::Tables).available());
        there.saturating_sub(db.promised_tables())
    }

    /// Zeroes at most `most` free frames, each without a lock, and puts them on the zeroed list (system
    /// 8). Gives back how many.
    pub fn zero_ahead(&self, most: usize) -> usize {
        for done in 0..most {
            let Some(frame) = self.pfns.lock().take_to_zero() else {
                return done;
            };
            let frame = frame.zero(&self.store);
            self.pfns.lock().give_back(Taken::Zeroed(frame));
            add(&self.counters.pages_zeroed_ahead, 1);
        }
        most
    }

    /// Has at most `most` free frames discarded ([`FrameStore::discard`]): the host has their memory back, and they are zeroed. Meanwhile nobody
    /// can have them. Gives back how many.
    pub fn discard_free(&self, most: usize) -> usize {
        let frames: Vec<_> = {
            let mut db = self.pfns.lock();
            core::iter::from_fn(|| db.take_to_zero())
                .take(most)
                .collect()
        };
        let frames = FreeFrame::discard(frames, &self.store);
        let count = frames.len();
        let mut db = self.pfns.lock();
        for frame in frames {
            db.give_back(Taken::Zeroed(frame));
        }
        add(&self.counters.pages_discarded, count as u64);
        count
    }

    /// Whether so few data frames are left that nothing optional should use any.
    #[must_use]
    pub fn frames_short(&self) -> bool {
        self.pfns.lock().short()
    }

    /// The counters, and the frames by state.
    #[must_use]
    pub fn stats(&self) -> StatsSnapshot {
        let db = loop {
            let mut db = self.pfns.lock();
            if !db.reap() {
                break db;
            }
        };
        StatsSnapshot {
            clone_blocks: db.clones.live_blocks(),
            forked_pages: db.clones.lazy.forked,
            commit_charged: db.commit.charged(),
            commit_peak: db.commit.peak(),
            page_file_slots: db.slots.count().into(),
            page_file_used: db.slots.used().into(),
            page_file_peak: db.slots.peak().into(),
            clone_headers: CloneTable::iter(&db.clones).count() as u64,
            sections: db.sections.iter().count() as u64,
            section_pages: db.sections.resident,
            section_pages_evicted: db.sections.taken,
            data: zone_stats(db.zone(ZoneKind::Data)),
            tables: zone_stats(db.zone(ZoneKind::Tables)),
            ..self.counters.snapshot()
        }
    }

    /// Lets internal allocations fail, for tests.
    #[cfg(feature = "fault-injection")]
    pub fn fail_allocations(&self, plan: crate::limits::FailPlan) {
        self.pfns.lock().faults = plan;
    }

    /// What is left of the plan given to [`Self::fail_allocations`].
    #[cfg(feature = "fault-injection")]
    #[must_use]
    pub fn fail_plan(&self) -> crate::limits::FailPlan {
        self.pfns.lock().faults
    }
}

/// Takes `count` frames; false if they ran out, with those taken in `into`.
fn take_frames(
    db: &mut PfnDatabase,
    store: &impl FrameStore,
    (kind, want): (ZoneKind, Want),
    count: usize,
    into: &mut Vec<Taken>,
) -> bool {
    // A hostile count fails before it makes the vector large.
    if count > db.zone(kind).available() as usize {
        return false;
    }
    into.reserve(count);
    (0..count).all(|_| {
        db.take(kind, want, store)
            .map(|frame| into.push(frame))
            .is_some()
    })
}

fn zone_stats(zone: &Zone) -> ZoneStats {
    let state = |state| u64::from(zone.in_state(state));
    ZoneStats {
        total: u64::from(zone.range().count),
        zeroed: state(PfnState::Zeroed),
        untouched: u64::from(zone.untouched()),
        free: state(PfnState::Free),
        standby: state(PfnState::Standby),
        modified: state(PfnState::Modified),
        modified_no_write: state(PfnState::ModifiedNoWrite),
        active: state(PfnState::Active),
        in_flight: state(PfnState::InFlight),
    }
}
