//! Looking, without changing anything.

use crate::addr::{Pfn, Vpn, VpnRange};
use crate::backend::Platform;
use crate::commit::CommitLimit;
use crate::manager::Manager;
use crate::pte::{Entry, EntryFlags};
use crate::space::Space;
use crate::stats::SpaceUsage;
use crate::vad::VadInfo;

/// One resident page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PageInfo {
    /// Its frame.
    pub frame: Pfn,
    /// Hardware has used the entry.
    pub accessed: bool,
    /// Hardware has stored through the entry.
    pub dirty: bool,
    /// How often in a row the trimmer found it not used: 0 to 3.
    pub age: u8,
    /// A prototype owns the frame: a store may have to copy it.
    pub shared: bool,
    /// The frame is a layer's: it is not the pool's, and a store always copies it.
    pub frozen: bool,
}

impl PageInfo {
    /// What a leaf entry says, if it is present.
    pub(crate) fn of(found: Entry) -> Option<Self> {
        let entry = found.present()?;
        Some(Self {
            frame: entry.frame,
            accessed: entry.flags.contains(EntryFlags::ACCESSED),
            dirty: entry.flags.contains(EntryFlags::DIRTY),
            age: entry.flags.age(),
            shared: entry.flags.contains(EntryFlags::PROTOTYPE),
            frozen: matches!(found, Entry::Frozen(_)),
        })
    }
}

impl<P: Platform> Manager<P> {
    /// The mapping that covers a page, or else the next above.
    #[must_use]
    pub fn query(&self, space: &Space<P>, from: Vpn) -> Option<VadInfo<P::Backing>> {
        space
            .state
            .lock()
            .vads
            .at_or_after(from)
            .map(|vad| vad.info())
    }

    /// The mapping that covers a page.
    #[must_use]
    pub fn find_vad(&self, space: &Space<P>, vpn: Vpn) -> Option<VadInfo<P::Backing>> {
        space.state.lock().vads.find(vpn).map(|vad| vad.info())
    }

    /// Calls `visit` for each resident page of the range, rising (`mincore`, `pagemap`). The space is
    /// locked meanwhile: `visit` must not call the manager.
    pub fn resident_pages(
        &self,
        space: &Space<P>,
        range: VpnRange,
        mut visit: impl FnMut(Vpn, PageInfo),
    ) {
        let state = space.state.lock();
        if !state.alive {
            return;
        }
        let cursor = space.cursor(&self.store);
        let Some(range) = self.user_part(range) else {
            return;
        };
        cursor.for_each_leaf(range, |run| {
            for (index, vpn) in run.pages() {
                if let Some(page) = PageInfo::of(cursor.leaf(run.table, index)) {
                    visit(vpn, page);
                }
            }
        });
    }

    /// Sets the most that a space's mappings may be charged. What is charged stays so.
    pub fn set_quota(&self, space: &Space<P>, quota: CommitLimit) {
        space.state.lock().quota = quota;
    }

    /// The memory a space uses.
    #[must_use]
    pub fn usage(&self, space: &Space<P>) -> SpaceUsage {
        let state = space.state.lock();
        SpaceUsage {
            virtual_pages: state.vads.pages(),
            peak_virtual_pages: state.peak_pages,
            mappings: state.vads.len() as u64,
            resident: state.resident,
            peak_resident: state.peak_resident,
            private: state.private,
            tables: state.tables,
            charged: state.vads.charged(),
            quota: state.quota,
            working_set_min: state.working_set.min,
            working_set_max: state.working_set.max,
        }
    }
}
