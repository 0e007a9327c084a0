//! Forgetting pages but not their mappings (`MADV_DONTNEED`).

use crate::addr::{Vpn, VpnRange};
use crate::backend::Platform;
use crate::flush::Flush;
use crate::manager::Manager;
use crate::space::Space;
use crate::space::own::Owning;

/// What became of a discard.
#[derive(Debug)]
#[must_use]
pub struct Discarded {
    /// What went.
    pub flush: Flush,
    /// Whether all of the range was mapped; what was mapped is discarded either way.
    pub result: Result<(), DiscardError>,
}

/// Why a discard did not reach the whole range.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum DiscardError {
    /// Part of the range is not mapped (`ENOMEM`); the rest was discarded.
    #[error("page {vpn} is not mapped")]
    NotMapped {
        /// The first page that is not.
        vpn: Vpn,
    },
    /// The image under the space would be in too many pieces (`EAGAIN`); nothing was discarded.
    #[error("the image under {range} would be in too many pieces")]
    TooManyPieces {
        /// The range.
        range: VpnRange,
    },
    /// Shared tables on an edge of the range cannot be copied, for now (`EAGAIN`); nothing has changed.
    #[error("no memory for copies of page tables")]
    NoMemory,
}

impl<P: Platform> Manager<P> {
    /// Forgets the pages of a range: anonymous ones read as zero again, a file's are read again. The
    /// image under them is forgotten too.
    pub fn discard(&self, space: &Space<P>, range: VpnRange) -> Discarded {
        let mut flush = space.no_flush();
        let mut state = space.state.lock();
        if state.images.too_many_cuts(range) {
            let result = Err(DiscardError::TooManyPieces { range });
            return Discarded { flush, result };
        }
        let Some(mut edges) = self.reserve_edges(space, range) else {
            let result = Err(DiscardError::NoMemory);
            return Discarded { flush, result };
        };
        let owning = Owning {
            tables: &mut edges.tables,
            flush: &mut flush,
        };
        self.own_edges((space, &mut *state), range, owning);
        self.give_back(edges);
        self.zap(space, &mut state, range, &mut flush);
        let covered = state
            .vads
            .covered_prefix(range)
            .map_or(range.start().get(), VpnRange::end);
        let hole = Vpn::new(covered).filter(|vpn| range.contains(*vpn));
        let result = hole.map_or(Ok(()), |vpn| Err(DiscardError::NotMapped { vpn }));
        Discarded {
            flush: flush.finish(),
            result,
        }
    }
}
