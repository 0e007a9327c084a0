//! Fork of an address space: the eager clone (system 1), and which kind of fork it is. The other kind, which shares
//! the tables instead, is in [`super::share`].
//!
//! Everything that can be allocated is allocated before the first entry changes, so a fork either
//! happens or leaves no trace. The parent stays locked throughout; the child is not visible to anybody
//! yet and needs no lock.

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::Ordering::Relaxed;

use crate::addr::{Pfn, VpnRange};
use crate::backend::Platform;
use crate::commit::NoCommit;
use crate::flush::Flush;
use crate::manager::{Demand, Manager, Reserve};
use crate::pfn::{PfnDatabase, Want};
use crate::proto::{CloneTableFull, Header, HeaderId};
use crate::shadow::TableCount;
use crate::space::state::{Descriptors, Purpose};
use crate::space::{Space, SpaceState};
use crate::stats::add;
use crate::vad::{ImageSet, Vad, VadFlags, VadSet};

/// How spaces are forked.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum ForkMode {
    /// The child gets tables of its own, and every page is visited.
    #[default]
    Eager,
    /// The child shares the tables, and one is copied when, and only when, one side changes something in it.
    Shared,
}

/// A fork that happened.
#[must_use]
pub struct Forked<P: Platform> {
    /// The new space.
    pub child: Arc<Space<P>>,
    /// What the parent may no longer store to. Neither space may run before it is done.
    pub flush: Flush,
    /// Entries of the parent that were visited.
    pub entries_touched: u64,
}

/// Why a fork did not happen. Nothing has changed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ForkError {
    /// The space is being torn down.
    #[error("the address space is being torn down")]
    SpaceDeleted,
    /// Frames ran out.
    #[error("no memory for {tables} page tables and {pages} copies of pinned pages")]
    NoMemory {
        /// Page tables the child needs.
        tables: usize,
        /// Pages that cannot be shared and would be copied at most.
        pages: usize,
    },
    /// Clone blocks ran out, or the memory for them did.
    #[error("no memory for {blocks} clone blocks")]
    NoCloneBlocks {
        /// Blocks the fork may need.
        blocks: u64,
    },
    /// The child's private memory cannot be promised.
    #[error("{pages} pages of private memory cannot be promised")]
    NoCommit {
        /// Pages the child could write to.
        pages: u64,
    },
    /// Forks do not share tables here ([`ForkMode::Eager`]), and a space that is kept has no others.
    #[error("address spaces do not share page tables")]
    NotShared,
    /// Memory for the copies of the mappings ran out.
    #[error("no memory for {mappings} mappings")]
    NoMappings {
        /// Mappings of the parent.
        mappings: usize,
    },
}

/// Everything a fork needs, taken before it changes anything.
pub(super) struct ForkPlan<B> {
    /// The child's mappings.
    vads: VadSet<B>,
    /// The image under them.
    images: Arc<ImageSet<B>>,
    /// Ranges whose pages the child shares, rising.
    ranges: Vec<VpnRange>,
    /// The child's descriptors, all at zero; their headers count them.
    pub(super) descriptors: Descriptors,
    /// Where new blocks go, if the parent has private pages.
    pub(super) header: Option<HeaderId>,
    /// Tables in the reserve once the root is out of it.
    tables: usize,
    /// The child's tables and the frames for copies of pinned pages.
    pub(super) reserve: Reserve,
}

pub(super) type Inherited<P> = (VadSet<<P as Platform>::Backing>, Vec<VpnRange>);

/// A fork's running state.
pub(super) struct Cloning<'a, B> {
    pub(super) parent: &'a mut SpaceState<B>,
    pub(super) plan: ForkPlan<B>,
    pub(super) child_root: Pfn,
    pub(super) flush: Flush,
    /// Entries visited, blocks made, entries of the child, those of them it owns alone.
    pub(super) touched: u64,
    pub(super) blocks: u64,
    pub(super) resident: u64,
    pub(super) private: u64,
}

impl<P: Platform> Manager<P> {
    /// Makes a copy-on-write clone of a space.
    ///
    /// # Errors
    /// See [`ForkError`]; the parent is exactly as before then.
    pub fn fork(&self, parent: &Arc<Space<P>>) -> Result<Forked<P>, ForkError> {
        let mut state = parent.state.lock();
        if !state.alive {
            return Err(ForkError::SpaceDeleted);
        }
        match self.fork_mode() {
            ForkMode::Eager => self.fork_eagerly(parent, &mut state),
            ForkMode::Shared => self.fork_shared(parent, &mut state, Purpose::Run),
        }
        .inspect(|forked| self.count_fork(forked))
    }

    fn count_fork(&self, forked: &Forked<P>) {
        let touched = forked.entries_touched;
        add(&self.counters.forks, 1);
        add(&self.counters.fork_entries, touched);
        self.counters.fork_entries_last.store(touched, Relaxed);
    }

    fn fork_eagerly(
        &self,
        parent: &Arc<Space<P>>,
        state: &mut SpaceState<P::Backing>,
    ) -> Result<Forked<P>, ForkError> {
        let mut plan = self.plan_fork(parent, state)?;
        let root = plan.reserve.tables.pop().expect("a root was reserved");
        let child_root = self.make_root(root);
        plan.tables = plan.reserve.tables.len();
        let ranges = core::mem::take(&mut plan.ranges);
        let mut clone = Cloning {
            parent: &mut *state,
            plan,
            child_root,
            flush: parent.fork_flush(),
            touched: 0,
            blocks: 0,
            resident: 0,
            private: 0,
        };
        let cursor = parent.cursor(&self.store);
        for range in ranges {
            cursor.for_each_leaf(range, |run| self.clone_leaf(parent, &mut clone, run));
        }
        let (child, flush, touched) = self.finish_fork(clone);
        Ok(self.publish_fork(state, (child_root, child), flush, touched))
    }

    /// The child is there. The parent is still locked: who truncates a section sees the child as soon as the
    /// parent.
    pub(super) fn publish_fork(
        &self,
        parent: &SpaceState<P::Backing>,
        (child_root, child): (Pfn, SpaceState<P::Backing>),
        flush: Flush,
        touched: u64,
    ) -> Forked<P> {
        let child = self.publish(child_root, child);
        self.add_viewers(child.id(), &parent.vads);
        Forked {
            child,
            flush: flush.finish(),
            entries_touched: touched,
        }
    }

    /// The child's state, the parent's flush, and the entries visited; what was not needed goes back.
    fn finish_fork(&self, clone: Cloning<'_, P::Backing>) -> (SpaceState<P::Backing>, Flush, u64) {
        let Cloning {
            parent,
            mut plan,
            flush,
            touched,
            blocks,
            resident,
            private,
            ..
        } = clone;
        self.settle_header(parent, &mut plan, blocks);
        let unused = core::mem::take(&mut plan.reserve);
        let mut child = SpaceState::new(plan.vads, plan.descriptors);
        child.images = plan.images;
        child.inherit_limits(parent);
        child.tables += (plan.tables - unused.tables.len()) as u64;
        child.gained_resident(resident);
        child.private = private;
        self.give_back(unused);
        (child, flush, touched)
    }

    /// Allocates all a fork may need; on failure everything is back where it was.
    fn plan_fork(
        &self,
        parent: &Space<P>,
        state: &SpaceState<P::Backing>,
    ) -> Result<ForkPlan<P::Backing>, ForkError> {
        let (vads, ranges) = self.inherited(state)?;
        let images = inherited_image(state);
        let pages = vads.charged();
        self.charge_child(&mut self.pfns.lock(), state, pages)?;
        let uncharge = |error| {
            self.pfns.lock().commit.release(pages);
            error
        };
        let cursor = parent.cursor(&self.store);
        let mut count = TableCount::default();
        for range in &ranges {
            cursor.for_each_leaf(*range, |run| count.add(run.range()));
        }
        let pinned = (self.pfns.lock().write_pinned().len() as u64).min(state.private) as usize;
        let tables = count.tables() + 1;
        let demand = Demand {
            tables,
            data: pinned,
            extra: 0,
            want: Want::Anything,
        };
        let no_memory = ForkError::NoMemory {
            tables,
            pages: pinned,
        };
        let reserve = self.reserve(demand).ok_or_else(|| uncharge(no_memory))?;
        let header = match self.reserve_header(state.private) {
            Ok(header) => header,
            Err(CloneTableFull) => {
                self.give_back(reserve);
                return Err(uncharge(ForkError::NoCloneBlocks {
                    blocks: state.private,
                }));
            }
        };
        let mut descriptors = state.descriptors.emptied();
        let mut db = self.pfns.lock();
        descriptors
            .headers()
            .for_each(|header| db.clones.describe(header));
        if let Some(header) = header {
            descriptors.insert(header);
        }
        Ok(ForkPlan {
            vads,
            images,
            ranges,
            descriptors,
            header,
            tables,
            reserve,
        })
    }

    /// The child's mappings, and the ranges whose pages it shares, rising.
    pub(super) fn inherited(
        &self,
        state: &SpaceState<P::Backing>,
    ) -> Result<Inherited<P>, ForkError> {
        let mappings = state.vads.len();
        let mut ranges = Vec::new();
        let failed = self.pfns.lock().injected_failure();
        if failed || ranges.try_reserve(mappings).is_err() {
            return Err(ForkError::NoMappings { mappings });
        }
        let mut vads = VadSet::default();
        let inherits = |vad: &&Vad<P::Backing>| !vad.flags.contains(VadFlags::DONT_FORK);
        for vad in state.vads.iter().filter(inherits) {
            vads.insert(vad.clone());
            if !vad.flags.contains(VadFlags::WIPE_ON_FORK) {
                ranges.push(vad.range);
            }
        }
        Ok((vads, ranges))
    }

    /// Charges what a child inherits, against the quota it inherits too.
    pub(super) fn charge_child(
        &self,
        db: &mut PfnDatabase,
        parent: &SpaceState<P::Backing>,
        pages: u64,
    ) -> Result<(), ForkError> {
        let within = parent.quota.exchange(0, 0, pages);
        let charged = within.and_then(|_| db.commit.charge(pages));
        charged.map_err(|NoCommit| ForkError::NoCommit { pages })
    }

    fn reserve_header(&self, blocks: u64) -> Result<Option<HeaderId>, CloneTableFull> {
        if blocks == 0 {
            return Ok(None);
        }
        let mut db = self.pfns.lock();
        if db.injected_failure() {
            return Err(CloneTableFull);
        }
        let header = db.clones.reserve(blocks)?;
        let pages = db.clones.header(header).map_or(0, Header::pages);
        if db.commit.charge(pages) == Err(NoCommit) {
            db.clones.undescribe(header);
            return Err(CloneTableFull);
        }
        Ok(Some(header))
    }

    /// Gives the new header's descriptors their true counts, and frees what no entry refers to.
    fn settle_header(
        &self,
        parent: &mut SpaceState<P::Backing>,
        plan: &mut ForkPlan<P::Backing>,
        blocks: u64,
    ) {
        let mut db = self.pfns.lock();
        if let Some(header) = plan.header.filter(|_| blocks > 0) {
            db.trim_header(header);
            if cfg!(not(mutant = "lost_descriptor")) {
                db.clones.describe(header);
            }
            parent.descriptors.insert(header);
            parent.descriptors.add(header, blocks);
        }
        plan.descriptors.drop_unused(&mut db);
    }
}

/// The image under the child: the parent's, but where the child gets no mapping, or an empty one.
pub(super) fn inherited_image<B: Clone + Eq>(state: &SpaceState<B>) -> Arc<ImageSet<B>> {
    let lost = VadFlags::DONT_FORK | VadFlags::WIPE_ON_FORK;
    let loses = |vad: &Vad<B>| vad.flags.intersects(lost);
    if state.images.is_empty() || !state.vads.iter().any(loses) {
        return Arc::clone(&state.images);
    }
    let kept = state.vads.iter().filter(|vad| !loses(vad));
    let ranges: Vec<_> = kept.map(|vad| vad.range).collect();
    Arc::new(state.images.clipped(&ranges))
}
