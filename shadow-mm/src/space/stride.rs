//! Copying ahead of a guest that stores at even distances: to one field of each of many large records, to a header in
//! each block of a heap.
//!
//! Stores to one page after the other are dealt with by [`crate::space::ahead`]; this is for pages that lie apart, upwards or
//! downwards, in one leaf table or in several. A store that lies as far from the last one as that did from the one before
//! it deals with the next page at that distance too, and the one after it with twice as many, up to [`MOST`]. So
//! what is copied and never stored to is less than what was stored to before, as there.
//!
//! Each page is dealt with as if the guest had stored to it, and only if that can be done at once: it is in memory, and
//! what it takes is a table of the space's own, or a copy.

use alloc::sync::Arc;

use crate::access::Access;
use crate::addr::Vpn;
use crate::backend::Platform;
use crate::manager::Manager;
use crate::outcome::{FaultKind, FaultOutcome, Resolution};
use crate::pte::{Entry, EntryFlags};
use crate::space::{Space, SpaceState};
use crate::vad::{MapKind, Stride};

/// Most pages that one store deals with because of those before it.
const MOST: u8 = 16;
/// The longest distance that is taken for a pattern: 64 MiB. Each page may cost a copy of its table.
const FARTHEST: u64 = 1 << 14;

impl<P: Platform> Manager<P> {
    /// After a store to a page was resolved: does the same for the pages where the guest will store next, if it stores at
    /// even distances.
    pub(super) fn store_ahead(
        &self,
        space: &Arc<Space<P>>,
        state: &mut SpaceState<P::Backing>,
        vpn: Vpn,
        resolution: &mut Resolution,
    ) {
        let copied = match resolution.kind {
            FaultKind::CopyOnWrite | FaultKind::MadeWritable | FaultKind::Unshared => true,
            FaultKind::DemandZero
            | FaultKind::FileRead
            | FaultKind::Mapped
            | FaultKind::Soft
            | FaultKind::PagedIn
            | FaultKind::Spurious => false,
        };
        let Some(vad) = state.vads.find_mut(vpn).filter(|_| copied) else {
            return;
        };
        if vad.kind != MapKind::Anonymous {
            return;
        }
        let range = vad.range;
        // Pages in a row are dealt with already.
        let stride = match resolution.mapped {
            0 | 1 => next_stride(vad.around.stride, vpn),
            _ => Stride::default(),
        };
        vad.around.stride = stride;
        let mut last = vpn;
        for _ in 1..stride.window {
            let next = last.get().checked_add_signed(stride.pages);
            let Some(next) = next.and_then(Vpn::new).filter(|next| range.contains(*next)) else {
                break;
            };
            if !self.prepare_store(space, state, next, resolution) {
                break;
            }
            last = next;
        }
        if let Some(vad) = state.vads.find_mut(vpn) {
            vad.around.stride.last = last.get();
        }
    }

    /// Deals with a page as if it was stored to; false if that is not to be done.
    fn prepare_store(
        &self,
        space: &Arc<Space<P>>,
        state: &mut SpaceState<P::Backing>,
        vpn: Vpn,
        resolution: &mut Resolution,
    ) -> bool {
        if space.is_forking() || self.pfns.lock().short() {
            return false;
        }
        let found = space.cursor(&self.store).lookup(vpn);
        match found.map_or(Entry::Empty, |found| found.entry) {
            Entry::Valid(entry) => {
                let shared = found.is_some_and(|found| found.shared);
                if !shared && entry.flags.contains(EntryFlags::WRITABLE) {
                    return true;
                }
            }
            Entry::Frozen(_) => {}
            Entry::Empty => {
                let run = state.images.find(vpn);
                let frozen = run.and_then(|run| run.section.frozen(run.page(vpn)?));
                if frozen.is_none() {
                    return false;
                }
            }
            Entry::DemandZero(_)
            | Entry::Decommitted
            | Entry::Prototype(_)
            | Entry::Transition(_)
            | Entry::PageFile(_) => return false,
        }
        match self.resolve(space, state, vpn, Access::Write) {
            FaultOutcome::Resolved(done) => {
                resolution.mapped += done.mapped;
                resolution.flush.add(done.flush);
                true
            }
            FaultOutcome::Denied(_)
            | FaultOutcome::NoMemory
            | FaultOutcome::Read(_)
            | FaultOutcome::Wait(_)
            | FaultOutcome::PageIn(_)
            | FaultOutcome::Thaw(_)
            | FaultOutcome::Collided => false,
        }
    }
}

/// What a store to one page more says of the distance.
fn next_stride(known: Stride, vpn: Vpn) -> Stride {
    let apart = vpn.get().abs_diff(known.last);
    let pages = match known.last {
        0 => 0,
        _ if apart > FARTHEST => 0,
        // The next page upwards is not a distance, but a row.
        last if vpn.get() > last + 1 => apart as i64,
        last if vpn.get() < last => -(apart as i64),
        _ => 0,
    };
    let window = match pages != 0 && pages == known.pages {
        true => known.window.saturating_mul(2).min(MOST),
        false => 1,
    };
    Stride {
        last: vpn.get(),
        pages,
        window,
    }
}
