//! Ownership of a frame that is on no list and not mapped: `FreeFrame -> ZeroedFrame -> ReadyFrame`.
//!
//! A token is the only way to hold such a frame, cannot be copied, and says what the frame contains.
//! It ends by being made active ([`super::PfnDatabase::activate`]) or given back.

use alloc::vec::Vec;

use super::entry::PfnState;
use crate::addr::{Pfn, PfnRange};
use crate::backend::FrameStore;

/// A frame whose content is arbitrary, perhaps another guest's past.
#[derive(Debug)]
#[must_use]
pub(crate) struct FreeFrame(Pfn);

/// A frame that reads as zero.
#[derive(Debug)]
#[must_use]
pub(crate) struct ZeroedFrame(Pfn);

/// A frame whose content is meant for whoever maps it.
#[derive(Debug)]
#[must_use]
pub(crate) struct ReadyFrame(Pfn);

/// A frame as it came off a list.
#[derive(Debug)]
#[must_use]
pub(crate) enum Taken {
    Free(FreeFrame),
    Zeroed(ZeroedFrame),
}

impl FreeFrame {
    /// Only the database makes tokens out of numbers.
    pub(super) fn new(pfn: Pfn) -> Self {
        Self(pfn)
    }

    pub(crate) fn pfn(&self) -> Pfn {
        self.0
    }

    /// Fills the frame with zeroes.
    pub(crate) fn zero(self, store: &impl FrameStore) -> ZeroedFrame {
        if cfg!(not(mutant = "unzeroed_page")) {
            store.zero(self.0);
        }
        ZeroedFrame(self.0)
    }

    /// Fills many frames with zeroes that take no memory of the host, runs of them at once.
    pub(crate) fn discard(mut frames: Vec<Self>, store: &impl FrameStore) -> Vec<ZeroedFrame> {
        frames.sort_unstable_by_key(|frame| frame.0);
        for run in frames.chunk_by(|one, next| one.0.get() + 1 == next.0.get()) {
            store.discard(PfnRange {
                start: run[0].0,
                count: run.len() as u32,
            });
        }
        frames
            .into_iter()
            .map(|frame| ZeroedFrame(frame.0))
            .collect()
    }

    /// Fills the frame with a copy of another.
    pub(crate) fn copy_of(self, from: Pfn, store: &impl FrameStore) -> ReadyFrame {
        store.copy(from, self.0);
        ReadyFrame(self.0)
    }

    /// The frame was filled by a read; bytes from `valid` on are zeroed here.
    pub(crate) fn read_in(self, valid: usize, store: &impl FrameStore) -> ReadyFrame {
        static ZEROES: [u8; crate::addr::PAGE_SIZE] = [0; crate::addr::PAGE_SIZE];
        if let Some(tail) = ZEROES.get(valid..).filter(|tail| !tail.is_empty()) {
            store.write(self.0, valid, tail);
        }
        ReadyFrame(self.0)
    }
}

impl ZeroedFrame {
    pub(super) fn new(pfn: Pfn) -> Self {
        Self(pfn)
    }
}

impl From<ZeroedFrame> for ReadyFrame {
    fn from(frame: ZeroedFrame) -> Self {
        Self(frame.0)
    }
}

impl ReadyFrame {
    /// Ends the token; only the database may then say where the frame is.
    pub(super) fn into_pfn(self) -> Pfn {
        self.0
    }
}

impl Taken {
    /// Ends the token, and says which list the frame belongs on.
    pub(super) fn into_parts(self) -> (Pfn, PfnState) {
        match self {
            Self::Free(frame) => (frame.0, PfnState::Free),
            Self::Zeroed(frame) => (frame.0, PfnState::Zeroed),
        }
    }

    /// The frame, without its promise to be zero.
    pub(crate) fn forget_content(self) -> FreeFrame {
        match self {
            Self::Free(frame) => frame,
            Self::Zeroed(frame) => FreeFrame(frame.0),
        }
    }

    /// The frame zeroed, by `store` if it is not yet. True in the second place if it had to be.
    pub(crate) fn zeroed(self, store: &impl FrameStore) -> (ZeroedFrame, bool) {
        match self {
            Self::Free(frame) => (frame.zero(store), true),
            Self::Zeroed(frame) => (frame, false),
        }
    }
}
