//! A space that nothing runs in, to reach the pages of a section through a view: wherever they are, the page
//! file included, and with the accounting of any other access.

use std::sync::Arc;

use shadow_mm::{
    Access, CreateError, FrameStore, GuestVa, MapError, MapKind, MapRequest, Placement, Prot,
    Section, Sharing, VadFlags, VadTag, VpnRange,
};

use crate::memory::{AccessError, Backing, FRAME, Memory, Space, VmmPlatform};

/// The space.
pub(super) struct Scratch<'a> {
    memory: &'a Memory,
    space: Arc<Space<VmmPlatform>>,
}

impl<'a> Scratch<'a> {
    pub(super) fn new(memory: &'a Memory) -> Result<Self, CreateError> {
        let space = memory.manager.create_space()?;
        Ok(Self { memory, space })
    }

    /// Shows `count` pages of the section, from page `first` on.
    pub(super) fn view(
        &self,
        section: &Section<Backing>,
        first: u64,
        count: u64,
    ) -> Result<VpnRange, MapError> {
        let request = MapRequest {
            placement: Placement::Anywhere {
                hint: None,
                below: self.memory.manager.limits().user_end.vpn(),
            },
            count,
            prot: Prot::READ | Prot::WRITE,
            kind: MapKind::View {
                section: section.clone(),
                offset: first.saturating_mul(FRAME as u64),
                sharing: Sharing::Shared,
            },
            flags: VadFlags::NO_RESERVE,
            tag: VadTag::default(),
        };
        let mapped = self.memory.manager.map(&self.space, request)?;
        self.memory.submit(mapped.flush);
        Ok(mapped.range)
    }

    pub(super) fn close(&self, range: VpnRange) {
        // A whole mapping can always go.
        if let Ok(flush) = self.memory.manager.unmap(&self.space, range) {
            self.memory.submit(flush);
        }
    }

    pub(super) fn load(&self, at: GuestVa, into: &mut [u8; FRAME]) -> Result<(), AccessError> {
        let copy = |pool: &crate::memory::Pool, frame| pool.read(frame, 0, into);
        self.memory.with_page(&self.space, at, Access::Read, copy)
    }
}

impl Drop for Scratch<'_> {
    fn drop(&mut self) {
        self.memory.delete_space(&self.space);
    }
}
