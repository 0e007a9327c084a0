//! Layers: the pages of a template, mapped into this process and shown to its guest where they are.
//!
//! A layer is part of a file in memory whose bytes cannot change any more. It is mapped without the right to store, as
//! a private mapping (a shared one of a file that is sealed against stores is refused by kernels before 6.7): the pages are the
//! file's own, for everybody who maps them. Its frames have numbers of their own in the pool's range of guest-physical addresses,
//! beyond the pool's own frames, for as long as the machine lives.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use rustix::fs::SealFlags;
use shadow_mm::{Pfn, PfnRange};
use vm_memory::{FileOffset, MmapRegion};

use super::pool::{FRAME, PoolError};

/// Frame numbers of layers are multiples of this: a large page.
const ALIGNMENT: u64 = 512;

/// Pages of a file in memory that nobody can store to.
#[derive(Clone, Debug)]
pub struct Layer {
    region: Arc<MmapRegion>,
    /// The file, by device and inode, and where in it: the same as long as it is mapped.
    place: (u64, u64, u64),
}

impl PartialEq for Layer {
    fn eq(&self, other: &Self) -> bool {
        self.place == other.place && self.pages() == other.pages()
    }
}

impl Layer {
    /// Maps `pages` pages of a file from byte `offset` on.
    ///
    /// # Errors
    /// The file can still be changed, has not so many bytes, or the host has no address space for it.
    pub fn map(file: &File, offset: u64, pages: u64) -> Result<Self, PoolError> {
        let bytes = pages * FRAME as u64;
        let create = |source| PoolError::Layer { bytes, source };
        if !is_frozen(file) {
            return Err(create(std::io::ErrorKind::PermissionDenied.into()));
        }
        let found = file.metadata().map_err(create)?;
        let inside = |end| end <= found.len();
        if pages == 0 || !offset.checked_add(bytes).is_some_and(inside) {
            return Err(create(std::io::ErrorKind::UnexpectedEof.into()));
        }
        let from = FileOffset::new(file.try_clone().map_err(create)?, offset);
        let size = usize::try_from(bytes).expect("64-bit host");
        let flags = libc::MAP_PRIVATE | libc::MAP_NORESERVE;
        let region = MmapRegion::build(Some(from), size, libc::PROT_READ, flags)
            .map_err(|source| PoolError::Map { bytes, source })?;
        Ok(Self {
            region: Arc::new(region),
            place: (found.dev(), found.ino(), offset),
        })
    }

    /// The mapping.
    #[must_use]
    pub fn region(&self) -> &Arc<MmapRegion> {
        &self.region
    }

    /// Pages it has.
    #[must_use]
    pub fn pages(&self) -> u64 {
        (self.region.size() / FRAME) as u64
    }

    /// The frames it is from the first number on that is free.
    pub(super) fn placed(&self, free: u64) -> Option<PfnRange> {
        let start = u32::try_from(free.checked_next_multiple_of(ALIGNMENT)?).ok()?;
        let count = u32::try_from(self.pages()).ok()?;
        start.checked_add(count)?;
        Some(PfnRange {
            start: Pfn::new(start),
            count,
        })
    }
}

/// Whether a file's bytes are what they are for good.
#[must_use]
pub fn is_frozen(file: &File) -> bool {
    let seals = SealFlags::SEAL | SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE;
    rustix::fs::fcntl_get_seals(file.as_fd()).is_ok_and(|has| has.contains(seals))
}
