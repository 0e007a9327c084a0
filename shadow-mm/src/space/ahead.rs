//! Copying ahead of a guest that stores to page after page.
//!
//! An exit costs far more than a copy, and a clone is to have only what it changes. So a store that is the first one
//! somewhere copies one page. One that goes on exactly where the last fault of the mapping ended copies twice as many as
//! that one, up to [`MOST`]: what is copied and never stored to is less than what was stored to before it, and less than
//! 64 KiB.

use crate::addr::{EntryIndex, Level, Vpn, VpnRange};
use crate::space::SpaceState;
use crate::space::fault::window;
use crate::vad::FaultAround;

/// Most pages that one store copies because of the stores before it.
const MOST: usize = 16;

/// The pages a store to `vpn` copies, if they are like it: `vpn` first, and all in one leaf table.
pub(super) fn copied_ahead<B: Clone + Eq>(state: &SpaceState<B>, vpn: Vpn) -> VpnRange {
    let left = EntryIndex::onward(vpn.index(Level::Leaf)).count();
    let pages = window(state, vpn).min(MOST).min(left) as u64;
    let alone = VpnRange::new(vpn, 1).expect("a page is a range");
    VpnRange::new(vpn, pages).unwrap_or(alone)
}

/// Remembers that a fault at `vpn` made so many pages.
pub(super) fn note_made<B: Clone + Eq>(state: &mut SpaceState<B>, vpn: Vpn, made: usize) {
    if let Some(vad) = state.vads.find_mut(vpn) {
        vad.around = FaultAround {
            next: vpn.get() + made as u64,
            window: u8::try_from(made).unwrap_or(u8::MAX),
            ..vad.around
        };
    }
}
