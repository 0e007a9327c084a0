//! The embedder's own access to a guest page: resolve like a fault, mark used, keep the frame.

use alloc::sync::Arc;

use crate::access::{Access, Denied};
use crate::addr::Vpn;
use crate::backend::Platform;
use crate::manager::Manager;
use crate::outcome::{FaultKind, FaultOutcome, Pin, PinOutcome};
use crate::pte::Entry;
use crate::space::Space;
use crate::space::fault::used;

impl<P: Platform> Manager<P> {
    /// Pins the frame behind a page for an access of the embedder's.
    ///
    /// The page is made and made private as a fault would, and marked accessed, and dirty for
    /// [`Access::Write`]. While a write pin lasts, forks copy the page for the child at once, so what the
    /// holder stores is seen by this space alone.
    pub fn pin(&self, space: &Arc<Space<P>>, vpn: Vpn, access: Access) -> PinOutcome<P> {
        let mut state = space.state.lock();
        let outcome = self.resolve(space, &mut state, vpn, access);
        let resolution = match outcome {
            FaultOutcome::Resolved(resolution) => resolution,
            other => {
                self.count(&other);
                return match other {
                    FaultOutcome::Read(ticket) => PinOutcome::Read(ticket),
                    FaultOutcome::Wait(pending) => PinOutcome::Wait(pending),
                    FaultOutcome::PageIn(ticket) => PinOutcome::PageIn(ticket),
                    FaultOutcome::Collided => PinOutcome::Collided,
                    FaultOutcome::Denied(denied) => PinOutcome::Denied(denied),
                    FaultOutcome::NoMemory | FaultOutcome::Resolved(_) => PinOutcome::NoMemory,
                };
            }
        };
        if resolution.kind != FaultKind::Spurious {
            self.counters.resolved(resolution.kind);
        }
        let cursor = space.cursor(&self.store);
        let Some((table, index, Entry::Valid(entry))) = cursor.lookup(vpn) else {
            debug_assert!(false, "{vpn:?} was resolved but is not valid");
            return PinOutcome::Denied(Denied::NotMapped);
        };
        let write = access == Access::Write;
        self.pfns.lock().pin(entry.frame, write);
        cursor.mark_used(table, index, used(access));
        PinOutcome::Pinned(
            Pin {
                pfn: entry.frame,
                write,
            },
            resolution.flush,
        )
    }

    /// Gives a pin back.
    pub fn unpin(&self, pin: Pin) {
        let (pfn, write) = pin.into_parts();
        self.pfns.lock().unpin(pfn, write);
    }
}
