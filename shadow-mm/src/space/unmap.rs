//! Taking mappings away (`munmap`).

use crate::addr::VpnRange;
use crate::backend::Platform;
use crate::flush::Flush;
use crate::manager::Manager;
use crate::space::Space;
use crate::space::own::Owning;
use crate::stats::add;
use crate::vad::{MAX_MAPPINGS, Vad};

/// Why a range cannot be unmapped. Nothing has changed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum UnmapError {
    /// A hole inside a mapping would make one mapping too many (`ENOMEM`).
    #[error("a hole would make more than {MAX_MAPPINGS} mappings")]
    TooManyMappings,
    /// Shared tables on an edge of the range cannot be copied, for now (`ENOMEM`).
    #[error("no memory for copies of page tables")]
    NoMemory,
}

impl<P: Platform> Manager<P> {
    /// Takes every mapping in the range away; holes are fine.
    ///
    /// # Errors
    /// See [`UnmapError`]; nothing has changed then.
    pub fn unmap(&self, space: &Space<P>, range: VpnRange) -> Result<Flush, UnmapError> {
        let mut flush = space.no_flush();
        let mut state = space.state.lock();
        if state.vads.len_without(range) > MAX_MAPPINGS {
            return Err(UnmapError::TooManyMappings);
        }
        let edges = self.reserve_edges(space, range);
        let mut edges = edges.ok_or(UnmapError::NoMemory)?;
        let carved = state.vads.carve(range);
        if !carved.is_empty() {
            let owning = Owning {
                tables: &mut edges.tables,
                flush: &mut flush,
            };
            self.own_edges((space, &mut *state), range, owning);
            self.zap(space, &mut state, range, &mut flush);
        }
        self.give_back(edges);
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
