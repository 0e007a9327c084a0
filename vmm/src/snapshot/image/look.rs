//! One page of a stopped guest, wherever it is.
//!
//! The guest does not run, the pager does: a page may leave its frame for the page file, and come back,
//! between two looks. What is in a frame is copied while the space is locked. What is in the page file is
//! read without the lock, and believed if the page is still there afterwards.

use std::time::Duration;

use shadow_mm::{FrameStore, PageKey, SavedPage, Slot, Vpn, VpnRange};

use super::SaveError;
use crate::memory::{FRAME, Memory, Space, VmmPlatform};

/// How long a page that is being read in is waited for, and how often.
pub(super) const PATIENCE: (Duration, usize) = (Duration::from_millis(5), 2000);

/// The bytes of a page.
pub(super) type Bytes = Box<[u8; FRAME]>;

/// What one look at a page came to.
pub(super) enum Look {
    Bytes(PageKey, Bytes),
    Slot(PageKey, Slot),
    Zero,
    Busy,
}

/// What to do about a page that a section has.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Views {
    /// It is the section's to keep.
    Left,
    Taken,
}

impl Look {
    /// With the space locked: copies what is in a frame. `None` for what is not taken.
    pub(super) fn new(memory: &Memory, page: SavedPage, views: Views) -> Option<Self> {
        Some(match page {
            SavedPage::View(..) if views == Views::Left => return None,
            SavedPage::Frame(key, frame) | SavedPage::View(key, frame) => {
                let mut bytes = Box::new([0; FRAME]);
                memory.manager.store().read(frame, 0, &mut bytes[..]);
                Self::Bytes(key, bytes)
            }
            SavedPage::Slot(key, slot) => Self::Slot(key, slot),
            SavedPage::Zero => Self::Zero,
            SavedPage::Busy => Self::Busy,
        })
    }

    fn again(memory: &Memory, space: &Space<VmmPlatform>, vpn: Vpn) -> Self {
        let mut look = Self::Zero;
        if let Some(one) = VpnRange::new(vpn, 1) {
            let visit = |_, page| look = Self::new(memory, page, Views::Left).unwrap_or(Self::Zero);
            let _next = memory.manager.saved_pages(space, one, 1, visit);
        }
        look
    }

    /// The content of the page, `None` if that is zeroes.
    pub(super) fn settle(
        mut self,
        memory: &Memory,
        space: &Space<VmmPlatform>,
        vpn: Vpn,
    ) -> Result<Option<(PageKey, Bytes)>, SaveError> {
        let mut read = None;
        for _ in 0..PATIENCE.1 {
            match self {
                Self::Bytes(key, bytes) => return Ok(Some((key, bytes))),
                Self::Zero => return Ok(None),
                Self::Slot(key, slot) => match read.take() {
                    Some((known, bytes)) if known == slot => return Ok(Some((key, bytes))),
                    Some(_) | None => {
                        let mut bytes = Box::new([0; FRAME]);
                        let done = memory.read_slot(slot, &mut bytes);
                        done.map_err(SaveError::Read)?;
                        read = Some((slot, bytes));
                    }
                },
                Self::Busy => std::thread::sleep(PATIENCE.0),
            }
            self = Self::again(memory, space, vpn);
        }
        Err(SaveError::Stuck(vpn))
    }
}

pub(super) fn is_zero(bytes: &[u8; FRAME]) -> bool {
    let (words, _) = bytes.as_chunks::<16>();
    words.iter().all(|word| u128::from_ne_bytes(*word) == 0)
}
