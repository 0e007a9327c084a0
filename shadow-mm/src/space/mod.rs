//! Address spaces. One verb a file; each is an `impl` block of [`crate::Manager`].

mod advise;
mod ahead;
mod books;
mod clone_leaf;
mod copy;
mod delete;
mod discard;
mod fault;
mod file_read;
mod fork;
mod frozen;
mod image;
mod keep;
mod leave;
mod map;
mod own;
mod page_in;
mod pin;
mod protect;
mod query;
mod rebase;
mod remap;
mod reset;
mod save;
mod share;
mod state;
mod stride;
mod transition;
mod trim;
mod unmap;
mod unread;
mod view;
mod view_in;
mod view_kept;
mod zap;

use core::fmt;
use core::sync::atomic::{AtomicU32, Ordering};

use crate::addr::{Pfn, SpaceId};
use crate::backend::{FrameStore, Platform, SpaceMutex};
use crate::flush::{Flush, Unannounced};
use crate::shadow::Cursor;

pub use advise::{AdviseError, VadAdvice};
pub use discard::{DiscardError, Discarded};
pub use fork::{ForkError, ForkMode, Forked};
pub(crate) use frozen::frozen_flags;
pub use image::ImageError;
pub use map::{MapError, MapRequest, Mapped, Placement};
pub use protect::{ProtectError, Protected};
pub use query::PageInfo;
pub use rebase::{RebaseError, Rebased};
pub use remap::{RemapError, RemapRequest};
pub use reset::{GoneBack, Keep, ResetError, Shape};
pub use save::{PageKey, SavedPage};
pub(crate) use state::{Purpose, SpaceState};
pub use trim::{TrimMode, Trimmed};
pub use unmap::UnmapError;
pub(crate) use unread::Unread;
pub(crate) use view::{Unmade, view_flags};
pub(crate) use view_in::ViewIn;

/// One guest process's memory: its mappings and its page tables.
///
/// It is made by [`crate::Manager::create_space`] or [`crate::Manager::fork`] and emptied by
/// [`crate::Manager::delete_space`]; dropping it without that keeps its frames for ever.
pub struct Space<P: Platform> {
    id: SpaceId,
    /// Changes when the space is forked, under the space lock.
    root: AtomicU32,
    unannounced: Unannounced,
    /// Forks whose flush is not done.
    forks: Unannounced,
    /// The space lock: taken before the PFN lock, and never two of them at once.
    pub(crate) state: SpaceMutex<P, SpaceState<P::Backing>>,
}

impl<P: Platform> Space<P> {
    pub(crate) fn new(id: SpaceId, root: Pfn, state: SpaceState<P::Backing>) -> Self {
        Self {
            id,
            root: AtomicU32::new(root.get()),
            unannounced: Unannounced::default(),
            forks: Unannounced::default(),
            state: SpaceMutex::<P, _>::new(state),
        }
    }

    /// The space's number.
    #[must_use]
    pub fn id(&self) -> SpaceId {
        self.id
    }

    /// Flushes that were made and neither announced ([`Flush::announced`]) nor done. A vCPU must not enter the
    /// space before it has seen this at zero: what a thread does after an operation of another one may
    /// rely on what that one took away.
    #[must_use]
    pub fn unannounced(&self) -> u64 {
        self.unannounced.count()
    }

    /// The top-level table: what CR3 must hold. A fork that shares tables gives the space another one, and
    /// whoever still runs on the old one must load the new.
    #[must_use]
    pub fn root(&self) -> Pfn {
        Pfn::new(self.root.load(Ordering::SeqCst))
    }

    /// Gives the space, which is locked, another top-level table.
    pub(crate) fn set_root(&self, root: Pfn) {
        self.root.store(root.get(), Ordering::SeqCst);
    }

    /// A flush for a fork of this space, which is locked.
    pub(crate) fn fork_flush(&self) -> Flush {
        let mut flush = self.no_flush();
        flush.of_fork(&self.forks);
        flush
    }

    /// Whether a fork's flush is not done, so that virtual CPUs may still store through what they had before.
    pub(crate) fn is_forking(&self) -> bool {
        self.forks.count() > 0
    }

    pub(crate) fn cursor<'a, S: FrameStore>(&self, store: &'a S) -> Cursor<'a, S> {
        Cursor::new(store, self.root())
    }

    /// A flush of this space with nothing in it yet.
    pub(crate) fn no_flush(&self) -> Flush {
        Flush::none(self.id, &self.unannounced)
    }
}

impl<P: Platform> fmt::Debug for Space<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Space")
            .field("id", &self.id)
            .field("root", &self.root())
            .finish_non_exhaustive()
    }
}
