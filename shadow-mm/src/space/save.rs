//! What of a space must be kept to make it again: its mappings (`query`), the image under it, and the
//! pages that only it has. Nothing changes, and nothing is brought into memory.

use alloc::vec::Vec;

use crate::addr::{EntryIndex, Pfn, Vpn, VpnRange};
use crate::backend::Platform;
use crate::manager::Manager;
use crate::page_file::Slot;
use crate::pfn::{Owner, PfnDatabase, PfnFlags};
use crate::proto::BlockContent;
use crate::pte::Entry;
use crate::space::Space;
use crate::vad::ImageRun;

/// Tells pages of several spaces that are one page from those that only look alike. Means nothing once
/// any of the spaces has changed; of kept spaces ([`Manager::keep`]) it means the same until one of them is deleted, but for
/// sections' pages, whose content is their file's.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct PageKey(u64, u64);

/// In the second half of the keys of sections' pages.
const VIEW: u64 = 1 << 63;

/// Where the content of a page is that a space has for itself, or shares with its forks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SavedPage {
    /// In this frame, as long as the visit lasts.
    Frame(PageKey, Pfn),
    /// In this slot of the page file, as long as the space is locked; if the page still is there
    /// once the slot was read, what was read is its content.
    Slot(PageKey, Slot),
    /// A section's, and in this frame as long as the visit lasts: the space has no page of its own there.
    View(PageKey, Pfn),
    /// Nowhere: zeroes.
    Zero,
    /// On its way into memory: ask again.
    Busy,
}

impl<P: Platform> Manager<P> {
    /// The image under a space, rising. Pages that [`Self::saved_pages`] tells lie above it.
    #[must_use]
    pub fn image_runs(&self, space: &Space<P>) -> Vec<ImageRun<P::Backing>> {
        space.state.lock().images.iter().cloned().collect()
    }

    /// Calls `visit` for pages of the range whose content is neither a layer's nor absent, rising, at most about `most` of
    /// them, sections' pages only if they are mapped; gives back where to go on. The space is locked meanwhile: `visit` must
    /// not call the manager, but for its store.
    pub fn saved_pages(
        &self,
        space: &Space<P>,
        range: VpnRange,
        most: usize,
        mut visit: impl FnMut(Vpn, SavedPage),
    ) -> Option<Vpn> {
        let state = space.state.lock();
        let range = self.user_part(range).filter(|_| state.alive)?;
        let cursor = space.cursor(&self.store);
        cursor.some_leaves(range, most, |run| {
            let mut seen = 0;
            for (index, vpn) in run.pages() {
                // With the lock held: the entry may be of a page in transition, or in a shared table.
                let page = {
                    let mut db = self.pfns.lock();
                    let page = saved(&mut db, (run.table, index), cursor.leaf(run.table, index));
                    hold(&mut db, page);
                    page
                };
                if let Some(page) = page {
                    seen += 1;
                    visit(vpn, page);
                }
                if let Some(SavedPage::Frame(_, frame) | SavedPage::View(_, frame)) = page
                    && cfg!(not(mutant = "unheld_save"))
                {
                    self.pfns.lock().release(frame);
                }
            }
            seen
        })
    }
}

/// Keeps a page's frame while it is looked at: who shares the table may trim the page, which others may take then.
fn hold(db: &mut PfnDatabase, page: Option<SavedPage>) {
    if let Some(SavedPage::Frame(_, frame) | SavedPage::View(_, frame)) = page
        && cfg!(not(mutant = "unheld_save"))
    {
        db.hold(frame);
    }
}

/// What an entry says of its page's content.
fn saved(
    db: &mut PfnDatabase,
    (table, index): (Pfn, EntryIndex),
    entry: Entry,
) -> Option<SavedPage> {
    let private = PageKey(u64::from(table.get()) << 9 | index.get() as u64, 0);
    let (key, content) = match entry {
        // A frozen page is what the image under it says.
        Entry::Empty | Entry::Frozen(_) | Entry::DemandZero(_) | Entry::Decommitted => return None,
        Entry::Valid(valid) => match db.entry(valid.frame).owner {
            Owner::Clone(block) => (block_key(block), BlockContent::Resident(valid.frame)),
            Owner::Entries => {
                // As its key, which stays the same wherever the page goes.
                let block = db.name_forked(valid.frame);
                (block_key(block), BlockContent::Resident(valid.frame))
            }
            Owner::Entry { .. } => (private, BlockContent::Resident(valid.frame)),
            Owner::Section { section, page } => {
                let key = PageKey(section.get().into(), VIEW | page.get());
                return Some(SavedPage::View(key, valid.frame));
            }
            Owner::None | Owner::Tables | Owner::Root | Owner::Supervisor => return None,
        },
        Entry::Transition(frame) => (private, BlockContent::Resident(frame)),
        Entry::PageFile(slot) => (private, BlockContent::PageFile(slot)),
        Entry::Prototype(block) => (block_key(block), db.clones.content(block)),
    };
    Some(match content {
        BlockContent::Zero => SavedPage::Zero,
        BlockContent::PageFile(slot) => SavedPage::Slot(key, slot),
        BlockContent::Resident(frame) if db.entry(frame).flags.contains(PfnFlags::READING) => {
            SavedPage::Busy
        }
        BlockContent::Resident(frame) => SavedPage::Frame(key, frame),
    })
}

fn block_key(block: crate::proto::BlockId) -> PageKey {
    PageKey(u64::from(block.header.get()), 1 + u64::from(block.index))
}
