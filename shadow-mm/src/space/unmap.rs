//! Taking mappings away (`munmap`).

use crate::addr::VpnRange;
use crate::backend::Platform;
use crate::flush::Flush;
use crate::manager::Manager;
use crate::space::Space;
use crate::stats::add;
use crate::vad::{MAX_MAPPINGS, Vad};

/// Why a range cannot be unmapped. Nothing has changed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum UnmapError {
    /// A hole inside a mapping would make one mapping too many (`ENOMEM`).
    #[error("a hole would make more than {MAX_MAPPINGS} mappings")]
    TooManyMappings,
}

impl<P: Platform> Manager<P> {
    /// Takes every mapping in the range away; holes are fine.
    ///
    /// # Errors
    /// [`UnmapError::TooManyMappings`]; nothing has changed then.
    pub fn unmap(&self, space: &Space<P>, range: VpnRange) -> Result<Flush, UnmapError> {
        let mut flush = space.no_flush();
        let mut state = space.state.lock();
        if state.vads.len_without(range) > MAX_MAPPINGS {
            return Err(UnmapError::TooManyMappings);
        }
        let carved = state.vads.carve(range);
        if !carved.is_empty() {
            self.zap(space, &mut state, range, &mut flush);
        }
        let released = carved.iter().map(Vad::charge).sum();
        self.pfns.lock().commit.release(released);
        drop(state);
        drop(carved);
        // Shared memory nobody has any more.
        self.pfns.lock().reap();
        add(&self.counters.unmaps, 1);
        Ok(flush.finish())
    }
}
