//! The state of all frames, for people to look at: in pieces, so that no lock is held for long. What
//! changes between two pieces is seen in one of them or in both.

use alloc::vec::Vec;

use crate::addr::{Pfn, Vpn, VpnRange};
use crate::backend::Platform;
use crate::manager::Manager;
use crate::pfn::{Owner, PfnEntry, PfnFlags, PfnState, ZoneKind};
use crate::space::{PageInfo, Space};

/// One of the two zones.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum FrameZone {
    /// Guest pages.
    Data,
    /// Page tables.
    Tables,
}

/// What a frame belongs to.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum FrameOwner {
    /// Nothing.
    Nobody,
    /// One page-table entry: a private page, or a table.
    Entry,
    /// Several page-table entries: a table that spaces share.
    Tables,
    /// A clone block, or the entries that refer to it: shared by forks.
    Clone,
    /// A space: its top-level table.
    Root,
    /// The supervisor.
    Supervisor,
    /// A section: a page of a file or of shared memory.
    Section,
}

/// What is known of one frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FrameInfo {
    /// Where it is.
    pub state: PfnState,
    /// Whose it is.
    pub owner: FrameOwner,
    /// Valid entries that map it; for a table, entries in use plus one.
    pub share: u32,
    /// Something holds it besides: a flush, a read, a pin.
    pub held: bool,
    /// It was stored to through an entry that is gone or was copied.
    pub modified: bool,
}

/// Neighbouring frames of which the same is known.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FrameRun {
    /// The first of them.
    pub first: Pfn,
    /// How many.
    pub count: u32,
    /// What.
    pub info: FrameInfo,
}

impl PfnState {
    /// Its name, in one word or two.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Zeroed => "zeroed",
            Self::Free => "free",
            Self::Standby => "standby",
            Self::Modified => "modified",
            Self::ModifiedNoWrite => "modified, not to be written",
            Self::Active => "active",
            Self::InFlight => "in flight",
        }
    }
}

impl FrameInfo {
    fn of(entry: &PfnEntry) -> Self {
        let owner = match entry.owner {
            Owner::None => FrameOwner::Nobody,
            Owner::Entry { .. } => FrameOwner::Entry,
            Owner::Tables => FrameOwner::Tables,
            Owner::Clone(_) | Owner::Entries => FrameOwner::Clone,
            Owner::Root => FrameOwner::Root,
            Owner::Supervisor => FrameOwner::Supervisor,
            Owner::Section { .. } => FrameOwner::Section,
        };
        Self {
            state: entry.state(),
            owner,
            share: entry.share(),
            held: entry.refs() > 0,
            modified: entry.flags.contains(PfnFlags::MODIFIED),
        }
    }
}

impl<P: Platform> Manager<P> {
    /// The frames of a zone from `from` on, at most `most` of those that were ever used, in runs; and where
    /// to go on. The frames never used are one run.
    #[must_use]
    pub fn frame_runs(
        &self,
        zone: FrameZone,
        from: Pfn,
        most: u32,
    ) -> (Vec<FrameRun>, Option<Pfn>) {
        let kind = match zone {
            FrameZone::Data => ZoneKind::Data,
            FrameZone::Tables => ZoneKind::Tables,
        };
        let mut runs: Vec<FrameRun> = Vec::new();
        let db = self.pfns.lock();
        let zone = db.zone(kind);
        let range = zone.range();
        let used = range.end() - u64::from(zone.untouched());
        let mut at = from.get().max(range.start.get());
        let stop = used.min(u64::from(at) + u64::from(most));
        while u64::from(at) < stop {
            let info = FrameInfo::of(zone.entry(Pfn::new(at)));
            push(&mut runs, Pfn::new(at), 1, info);
            at += 1;
        }
        if u64::from(at) < used {
            return (runs, Some(Pfn::new(at)));
        }
        if u64::from(at) < range.end() {
            let info = FrameInfo::of(&PfnEntry::UNTOUCHED);
            let count = (range.end() - u64::from(at)) as u32;
            push(&mut runs, Pfn::new(at), count, info);
        }
        (runs, None)
    }

    /// Calls `visit` for resident pages of the range, rising, at most about `most` of them; gives back
    /// where to go on. The space is locked meanwhile: `visit` must not call the manager.
    pub fn resident_from(
        &self,
        space: &Space<P>,
        range: VpnRange,
        most: usize,
        mut visit: impl FnMut(Vpn, PageInfo),
    ) -> Option<Vpn> {
        let state = space.state.lock();
        let range = self.user_part(range).filter(|_| state.alive)?;
        let cursor = space.cursor(&self.store);
        cursor.some_leaves(range, most, |run| {
            let mut seen = 0;
            for (index, vpn) in run.pages() {
                if let Some(page) = PageInfo::of(cursor.leaf(run.table, index)) {
                    seen += 1;
                    visit(vpn, page);
                }
            }
            seen
        })
    }
}

fn push(runs: &mut Vec<FrameRun>, first: Pfn, count: u32, info: FrameInfo) {
    match runs.last_mut() {
        Some(last) if last.info == info => last.count += count,
        _ => runs.push(FrameRun { first, count, info }),
    }
}
