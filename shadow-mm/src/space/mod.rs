//! Address spaces. One verb a file; each is an `impl` block of [`crate::Manager`].

mod advise;
mod clone_leaf;
mod copy;
mod delete;
mod discard;
mod fault;
mod file_read;
mod fork;
mod image;
mod map;
mod page_in;
mod pin;
mod protect;
mod query;
mod remap;
mod save;
mod state;
mod transition;
mod trim;
mod unmap;
mod view;
mod view_in;
mod zap;

use core::fmt;

use crate::addr::{Pfn, SpaceId};
use crate::backend::{FrameStore, Platform, SpaceMutex};
use crate::flush::{Flush, Unannounced};
use crate::shadow::Cursor;

pub use advise::{AdviseError, VadAdvice};
pub use discard::{DiscardError, Discarded};
pub use fork::{ForkError, Forked};
pub use image::ImageError;
pub use map::{MapError, MapRequest, Mapped, Placement};
pub use protect::{ProtectError, Protected};
pub use query::PageInfo;
pub use remap::{RemapError, RemapRequest};
pub use save::{PageKey, SavedPage};
pub(crate) use state::SpaceState;
pub use trim::{TrimMode, Trimmed};
pub use unmap::UnmapError;
pub(crate) use view::view_flags;

/// One guest process's memory: its mappings and its page tables.
///
/// It is made by [`crate::Manager::create_space`] or [`crate::Manager::fork`] and emptied by
/// [`crate::Manager::delete_space`]; dropping it without that keeps its frames for ever.
pub struct Space<P: Platform> {
    id: SpaceId,
    root: Pfn,
    unannounced: Unannounced,
    /// The space lock: taken before the PFN lock, and never two of them at once.
    pub(crate) state: SpaceMutex<P, SpaceState<P::Backing>>,
}

impl<P: Platform> Space<P> {
    pub(crate) fn new(id: SpaceId, root: Pfn, state: SpaceState<P::Backing>) -> Self {
        Self {
            id,
            root,
            unannounced: Unannounced::default(),
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

    /// The top-level table: what CR3 must hold.
    #[must_use]
    pub fn root(&self) -> Pfn {
        self.root
    }

    pub(crate) fn cursor<'a, S: FrameStore>(&self, store: &'a S) -> Cursor<'a, S> {
        Cursor::new(store, self.root)
    }

    /// A flush of this space with nothing in it yet.
    pub(crate) fn no_flush(&self) -> Flush {
        Flush::none(self.id, self.root, &self.unannounced)
    }
}

impl<P: Platform> fmt::Debug for Space<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { id, root, .. } = self;
        f.debug_struct("Space")
            .field("id", id)
            .field("root", root)
            .finish_non_exhaustive()
    }
}
