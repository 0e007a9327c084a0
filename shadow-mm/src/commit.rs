//! Commit: what was promised to guests, against what there is to keep the promises with.
//!
//! A private mapping that a guest may write to is charged a page for each of its pages when it is made,
//! made writable, enlarged or inherited, and keeps the charge until it is unmapped. Not charged are
//! mappings without access, read-only ones, and those made with `MAP_NORESERVE`. So a guest is told
//! that there is no memory when it asks, not killed when it uses it. Clone headers count as well; page
//! tables have a zone of their own, whose frames are taken before anything changes.
//!
//! A space has a *quota* besides: the most that its own mappings may be charged, checked with the space locked at
//! every place that charges them. A fork's child has its parent's, and what it inherits counts against it. Shared memory and what is kept for
//! forks belong to no space, and to no quota.

/// How much may be promised.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum CommitLimit {
    /// Anything.
    #[default]
    Unlimited,
    /// So many pages.
    Pages(u64),
}

impl CommitLimit {
    /// What is charged once `charged` pages are in the place of `released` ones, of `now`. What only gives back never
    /// fails, even above the limit.
    pub(crate) fn exchange(self, now: u64, released: u64, charged: u64) -> Result<u64, NoCommit> {
        debug_assert!(released <= now, "more released than was charged");
        let new = (now - released).checked_add(charged).ok_or(NoCommit)?;
        match self {
            Self::Pages(limit) if charged > released && new > limit => Err(NoCommit),
            Self::Pages(_) | Self::Unlimited => Ok(new),
        }
    }
}

/// The limit does not allow the charge.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct NoCommit;

/// The account. Protected by the PFN lock.
#[derive(Debug, Default)]
pub(crate) struct Commit {
    limit: CommitLimit,
    charged: u64,
    peak: u64,
}

impl Commit {
    pub(crate) fn set_limit(&mut self, limit: CommitLimit) {
        self.limit = limit;
    }

    pub(crate) fn limit(&self) -> CommitLimit {
        self.limit
    }

    pub(crate) fn charged(&self) -> u64 {
        self.charged
    }

    pub(crate) fn peak(&self) -> u64 {
        self.peak
    }

    /// Charges pages.
    pub(crate) fn charge(&mut self, pages: u64) -> Result<(), NoCommit> {
        self.exchange(0, pages)
    }

    /// Charges pages in the place of others. What only gives back never fails.
    pub(crate) fn exchange(&mut self, released: u64, charged: u64) -> Result<(), NoCommit> {
        self.charged = self.limit.exchange(self.charged, released, charged)?;
        self.peak = self.peak.max(self.charged);
        Ok(())
    }

    /// Gives back what was charged.
    pub(crate) fn release(&mut self, pages: u64) {
        debug_assert!(pages <= self.charged, "more released than was charged");
        self.charged -= pages;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn full_account_still_takes_less_for_more() {
        let mut commit = Commit::default();
        commit.set_limit(CommitLimit::Pages(10));
        assert_eq!(commit.charge(11), Err(NoCommit));
        assert_eq!(commit.charge(10), Ok(()));
        commit.set_limit(CommitLimit::Pages(5));
        assert_eq!(commit.exchange(3, 2), Ok(()));
        assert_eq!(commit.exchange(3, 4), Err(NoCommit));
        assert_eq!(commit.charge(u64::MAX), Err(NoCommit));
        commit.release(9);
        assert_eq!((commit.charged(), commit.peak()), (0, 10));
    }
}
