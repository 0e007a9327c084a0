//! Keeping a space as it is for a while: a fork in which nothing ever runs, to be looked at while the space goes on.
//!
//! A *kept* space costs what a fork costs that shares tables ([`super::share`]): two frames, and for each table the
//! promise of another. Who saves a guest makes one of each space while the guest stands still, lets it go on, reads the
//! kept spaces' pages ([`Manager::saved_pages`]), and deletes them. It differs from a fork's child:
//!
//! * It has all private mappings, what forks do not inherit included, and no shared ones: what is stored to those is
//!   seen by all who have them. They must be read before anything goes on.
//! * It is charged nothing. So a store to a page that it keeps may find no frame although all was promised: who runs the
//!   space waits then until what is kept is deleted. The promises for tables and clone blocks are made, and if they cannot
//!   be, the space is not kept.
//! * It never changes. It owns no table, and a truncation does not take its private copies; a page that its section has lost
//!   stays mapped in it, without an owner, until it is deleted. So a page of it is the same as long as it is there, and so
//!   is the key that tells of which pages of kept spaces are one ([`super::PageKey`]).

use alloc::sync::Arc;

use crate::backend::Platform;
use crate::manager::Manager;
use crate::space::fork::{ForkError, ForkMode, Forked};
use crate::space::state::Purpose;
use crate::space::{Space, SpaceState};
use crate::vad::{Sharing, Vad, VadFlags, VadSet};

impl<P: Platform> Manager<P> {
    /// Makes a space whose private pages are what the given one's are now. Nothing may run in it, or be mapped or
    /// pinned in it.
    ///
    /// # Errors
    /// See [`ForkError`]; nothing has changed then.
    pub fn keep(&self, space: &Arc<Space<P>>) -> Result<Forked<P>, ForkError> {
        let mut state = space.state.lock();
        if !state.alive {
            return Err(ForkError::SpaceDeleted);
        }
        match self.fork_mode() {
            ForkMode::Eager => Err(ForkError::NotShared),
            ForkMode::Shared => self.fork_shared(space, &mut state, Purpose::Keep),
        }
    }

    /// The mappings of a kept space. They are charged nothing.
    pub(super) fn kept(
        &self,
        state: &SpaceState<P::Backing>,
    ) -> Result<VadSet<P::Backing>, ForkError> {
        if self.pfns.lock().injected_failure() {
            let mappings = state.vads.len();
            return Err(ForkError::NoMappings { mappings });
        }
        let mut vads = VadSet::default();
        for vad in state.vads.iter().filter(|vad| is_kept(vad)) {
            let mut kept = vad.clone();
            kept.flags -= VadFlags::CHARGED;
            vads.insert(kept);
        }
        Ok(vads)
    }
}

/// Whether a mapping's pages are the space's own to keep.
pub(super) fn is_kept<B: Clone + Eq>(vad: &Vad<B>) -> bool {
    vad.view()
        .is_none_or(|(_, _, sharing)| sharing == Sharing::Private)
}
