//! The embedder's own access to a guest page: resolve like a fault, mark used, keep the frame.

use alloc::sync::Arc;

use crate::access::Access;
use crate::addr::Vpn;
use crate::backend::Platform;
use crate::manager::Manager;
use crate::outcome::{FaultKind, FaultOutcome, Pin, PinKind, PinOutcome};
use crate::pte::{Entry, EntryFlags};
use crate::space::Space;
use crate::space::fault::used;

/// How often a page that somebody takes again before it can be pinned is resolved.
const TRIES: usize = 8;

impl<P: Platform> Manager<P> {
    /// Pins the frame behind a page for an access of the embedder's.
    ///
    /// The page is made and made private as a fault would, and marked accessed, and dirty for
    /// [`Access::Write`]. While a write pin lasts, forks copy the page for the child at once, so what the
    /// holder stores is seen by this space alone.
    pub fn pin(&self, space: &Arc<Space<P>>, vpn: Vpn, access: Access) -> PinOutcome<P> {
        let mut state = space.state.lock();
        for _ in 0..TRIES {
            let resolution = match self.resolve(space, &mut state, vpn, access) {
                FaultOutcome::Resolved(resolution) => resolution,
                other => {
                    self.count(&other);
                    return not_pinned(other);
                }
            };
            if resolution.kind != FaultKind::Spurious {
                self.counters.resolved(resolution.kind);
            }
            if let Some(pin) = self.pin_found(space, vpn, access) {
                return PinOutcome::Pinned(pin, resolution.flush);
            }
            if !resolution.flush.is_empty() {
                return PinOutcome::Again(resolution.flush);
            }
        }
        PinOutcome::Again(space.no_flush())
    }

    /// Pins the frame of a page that was resolved, unless somebody who shares its table has taken it again, or the
    /// access needs more.
    fn pin_found(&self, space: &Space<P>, vpn: Vpn, access: Access) -> Option<Pin> {
        let cursor = space.cursor(&self.store);
        let write = access == Access::Write;
        let mut db = self.pfns.lock();
        let found = cursor.lookup(vpn)?;
        let entry = found.entry.present()?;
        if write && (found.shared || !entry.flags.contains(EntryFlags::WRITABLE)) {
            return None;
        }
        let kind = match found.entry {
            Entry::Frozen(_) => PinKind::Frozen,
            _ if write => PinKind::Write,
            _ => PinKind::Read,
        };
        if kind != PinKind::Frozen {
            db.pin(entry.frame, write);
        }
        cursor.mark_used(found.table, found.index, used(access));
        let pfn = entry.frame;
        Some(Pin { pfn, kind })
    }

    /// Gives a pin back.
    pub fn unpin(&self, pin: Pin) {
        match pin.into_parts() {
            (_, PinKind::Frozen) => {}
            (pfn, kind) => self.pfns.lock().unpin(pfn, kind == PinKind::Write),
        }
    }
}

/// What an outcome without a page means for a pin.
fn not_pinned<P: Platform>(outcome: FaultOutcome<P>) -> PinOutcome<P> {
    match outcome {
        FaultOutcome::Read(ticket) => PinOutcome::Read(ticket),
        FaultOutcome::Wait(pending) => PinOutcome::Wait(pending),
        FaultOutcome::PageIn(ticket) => PinOutcome::PageIn(ticket),
        FaultOutcome::Thaw(thaw) => PinOutcome::Thaw(thaw),
        FaultOutcome::Collided => PinOutcome::Collided,
        FaultOutcome::Denied(denied) => PinOutcome::Denied(denied),
        FaultOutcome::NoMemory | FaultOutcome::Resolved(_) => PinOutcome::NoMemory,
    }
}
