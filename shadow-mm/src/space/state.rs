//! What the space lock protects.

use alloc::collections::BTreeMap;
use alloc::sync::Arc;

use crate::addr::Vpn;
use crate::commit::{CommitLimit, NoCommit};
use crate::pfn::PfnDatabase;
use crate::proto::{BlockContent, BlockId, HeaderId};
use crate::vad::{ImageSet, VadSet};

/// The mutable part of a space. Protected by the space's lock.
#[derive(Debug)]
pub(crate) struct SpaceState<B> {
    /// False once the space is being torn down.
    pub(crate) alive: bool,
    pub(crate) vads: VadSet<B>,
    /// What lies under it. Forks share it until one of them takes pages away.
    pub(crate) images: Arc<ImageSet<B>>,
    pub(crate) descriptors: Descriptors,
    /// Valid entries of tables that only this space reaches, the supervisor's not.
    pub(crate) resident: u64,
    /// Pages this space owns alone, in tables that only it reaches: valid, in transition, or in the page
    /// file.
    pub(crate) private: u64,
    /// Valid entries of the tables it shares, when they were last counted: others trim them too.
    pub(crate) inherited: u64,
    /// Page tables it reaches, shared ones and the root included.
    pub(crate) tables: u64,
    pub(crate) peak_resident: u64,
    pub(crate) peak_pages: u64,
    pub(crate) working_set: WorkingSet,
    /// The most its mappings may be charged.
    pub(crate) quota: CommitLimit,
    /// What the space is there for.
    pub(crate) purpose: Purpose,
}

/// What a space is there for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Purpose {
    /// Something runs in it.
    Run,
    /// Its pages are looked at, and nothing changes in it (`super::keep`).
    Keep,
}

/// What is known of a space's working set besides its entries.
#[derive(Clone, Copy, Debug)]
pub(crate) struct WorkingSet {
    /// Pages the trimmer leaves unless nothing else is left.
    pub(crate) min: u64,
    /// Pages above which the trimmer comes without being called.
    pub(crate) max: u64,
    /// Where the next look begins.
    pub(crate) hand: Vpn,
}

impl WorkingSet {
    /// Takes over the limits of a parent.
    fn inherit(&mut self, parent: &Self) {
        (self.min, self.max) = (parent.min, parent.max);
    }

    /// Pages that a process needs to get on: a few of text, data and stack.
    const DEFAULT_MIN: u64 = 16;
    const START: Vpn = match Vpn::new(0) {
        Some(page) => page,
        None => unreachable!(),
    };
    const DEFAULT: Self = Self {
        min: Self::DEFAULT_MIN,
        max: u64::MAX,
        hand: Self::START,
    };
}

impl<B: Clone + Eq> SpaceState<B> {
    /// A space with a root and nothing mapped.
    pub(crate) fn new(vads: VadSet<B>, descriptors: Descriptors) -> Self {
        Self {
            alive: true,
            peak_pages: vads.pages(),
            vads,
            images: Arc::default(),
            descriptors,
            resident: 0,
            private: 0,
            inherited: 0,
            tables: 1,
            peak_resident: 0,
            working_set: WorkingSet::DEFAULT,
            quota: CommitLimit::Unlimited,
            purpose: Purpose::Run,
        }
    }

    /// Takes over the limits of a parent.
    pub(crate) fn inherit_limits(&mut self, parent: &Self) {
        self.working_set.inherit(&parent.working_set);
        if cfg!(not(mutant = "quota_lost")) {
            self.quota = parent.quota;
        }
    }

    /// Whether its mappings may be charged `charged` pages in the place of `released` ones.
    pub(crate) fn check_quota(&self, released: u64, charged: u64) -> Result<(), NoCommit> {
        if cfg!(mutant = "quota_unchecked") {
            return Ok(());
        }
        let now = self.vads.charged();
        self.quota.exchange(now, released, charged).map(drop)
    }

    /// `pages` more entries became valid, pages that this space owns alone and did not have before.
    pub(crate) fn gained_private(&mut self, pages: u64) {
        self.private += pages;
        self.gained_resident(pages);
    }

    /// `pages` more entries became valid.
    pub(crate) fn gained_resident(&mut self, pages: u64) {
        self.resident += pages;
        self.peak_resident = self.peak_resident.max(self.visible());
    }

    /// Valid entries it reaches, as far as is known.
    pub(crate) fn visible(&self) -> u64 {
        self.resident + self.inherited
    }

    /// So many shared tables are gone, with their part of what the space inherited.
    pub(crate) fn lose_tables(&mut self, tables: u64) {
        let share = u128::from(self.inherited) * u128::from(tables) / u128::from(self.tables);
        self.inherited -= share as u64;
        self.tables -= tables;
    }

    /// A shared table with so many valid entries is this space's own now, or its copy is.
    pub(crate) fn owns_table(&mut self, resident: u64, private: u64) {
        self.inherited = self.inherited.saturating_sub(resident);
        self.private += private;
        self.gained_resident(resident);
    }

    /// The most it has been is what it is now.
    pub(crate) fn forget_peaks(&mut self) {
        (self.peak_resident, self.peak_pages) = (self.visible(), self.vads.pages());
    }

    /// Mappings were added.
    pub(crate) fn update_peak_pages(&mut self) {
        self.peak_pages = self.peak_pages.max(self.vads.pages());
    }
}

/// The clone descriptors of a space: for each clone header, how many of the space's entries refer to its
/// blocks.
#[derive(Clone, Debug, Default)]
pub(crate) struct Descriptors {
    counts: BTreeMap<HeaderId, u64>,
}

impl Descriptors {
    /// The same headers, nothing referring to them yet. The headers do not know of it yet either.
    pub(crate) fn emptied(&self) -> Self {
        Self {
            counts: self.counts.keys().map(|header| (*header, 0)).collect(),
        }
    }

    /// Adds a descriptor of a header that already counts it.
    pub(crate) fn insert(&mut self, header: HeaderId) {
        self.counts.insert(header, 0);
    }

    /// `entries` more entries refer to the header's blocks; the descriptor exists.
    pub(crate) fn add(&mut self, header: HeaderId, entries: u64) {
        debug_assert!(
            self.counts.contains_key(&header),
            "no descriptor for {header:?}"
        );
        *self.counts.entry(header).or_insert(0) += entries;
    }

    /// One of this space's entries refers to the block no more. If no entry of any space does, gives
    /// back what the block held.
    pub(crate) fn drop_reference(
        &mut self,
        db: &mut PfnDatabase,
        block: BlockId,
    ) -> Option<BlockContent> {
        let last = db.drop_block_reference(block);
        if block.header == HeaderId::LAZY {
            return last;
        }
        if let Some(count) = self.counts.get_mut(&block.header) {
            *count -= 1;
            if *count == 0 {
                self.counts.remove(&block.header);
                db.undescribe(block.header);
            }
        } else {
            debug_assert!(false, "no descriptor for {block:?}");
        }
        last
    }

    /// Drops the descriptors nothing refers through.
    pub(crate) fn drop_unused(&mut self, db: &mut PfnDatabase) {
        self.counts.retain(|header, count| {
            if *count == 0 {
                db.undescribe(*header);
            }
            *count > 0
        });
    }

    pub(crate) fn headers(&self) -> impl Iterator<Item = HeaderId> {
        self.counts.keys().copied()
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (HeaderId, u64)> {
        self.counts.iter().map(|(header, count)| (*header, *count))
    }
}
