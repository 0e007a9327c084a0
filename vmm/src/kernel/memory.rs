//! A kernel guest's memory: anonymous, in huge pages where the host has them, mapped around the hole below 4 GiB and
//! given to KVM as slots.
//!
//! Each page that KVM maps for the guest is an exit: mapped by 2 MiB, a boot has a hundredth of them. KVM does so
//! where host and guest addresses are equal below 2 MiB, which [`Region`] sees to.
//!
//! The guest can write all of it at any time: it is reached through `vm-memory`'s volatile accesses
//! only, which also refuse every address that is not in it.

use std::ffi::c_void;
use std::sync::Arc;

use rustix::mm::{Advice, madvise};
use vm_memory::bitmap::BS;
use vm_memory::guest_memory::Result as AccessResult;
use vm_memory::region::GuestMemoryRegionBytes;
use vm_memory::{
    Address, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion,
    GuestRegionCollection, MemoryRegionAddress, MmapRegion, VolatileMemory, VolatileSlice,
};

use super::layout;
use crate::hv::kvm::vm::{Slot, Vm, VmError};

/// All of a guest's memory.
pub type Regions = GuestRegionCollection<Region>;
/// Guest memory, shared by whoever works on it.
pub type Memory = Arc<Regions>;

/// Least memory of a machine.
pub const MIN: u64 = 8 << 20;
/// Most memory of a machine: what the narrowest guest-physical address leaves room for.
pub const MAX: u64 = 512 << 30;
/// Bytes of a huge page.
const HUGE: usize = 2 << 20;

/// Why there is no memory for the guest.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// It cannot be mapped.
    #[error("cannot map {bytes} bytes of guest memory")]
    Map {
        /// Size asked for.
        bytes: u64,
        /// The mapping library's reason.
        #[source]
        source: vm_memory::mmap::MmapRegionError,
    },
    /// Its parts do not fit together: our bug.
    #[error("guest memory of {bytes} bytes")]
    Parts {
        /// Size asked for.
        bytes: u64,
        /// The library's reason.
        #[source]
        source: vm_memory::GuestRegionCollectionError,
    },
}

/// A part of guest memory: the middle of a mapping that is larger by a huge page, so that host and guest addresses
/// are equal below 2 MiB. What is left over is never touched.
#[derive(Debug)]
pub struct Region {
    mapping: Arc<MmapRegion>,
    start: GuestAddress,
    /// Bytes of the mapping before it.
    skip: usize,
    bytes: usize,
}

impl Region {
    fn new(start: u64, bytes: usize) -> Result<Self, vm_memory::mmap::MmapRegionError> {
        let room = if bytes < HUGE { 0 } else { HUGE };
        let mapping = MmapRegion::new(bytes + room)?;
        let skip = match room {
            0 => 0,
            room => (start as usize).wrapping_sub(mapping.as_ptr().addr()) % room,
        };
        let region = Self {
            mapping: Arc::new(mapping),
            start: GuestAddress(start),
            skip,
            bytes,
        };
        if room > 0 {
            region.advise();
        }
        Ok(region)
    }

    /// Where it is in this process.
    fn host(&self) -> *mut u8 {
        self.mapping.as_ptr().wrapping_add(self.skip)
    }

    /// Asks for huge pages.
    #[expect(unsafe_code, reason = "madvise takes an address")]
    fn advise(&self) {
        let start: *mut c_void = self.host().cast();
        // SAFETY: the range is in this region's own mapping, and the advice changes no byte of it.
        let advised = unsafe { madvise(start, self.bytes, Advice::LinuxHugepage) };
        if let Err(error) = advised {
            // A host without them.
            tracing::debug!(%error, "no huge pages for the guest");
        }
    }
}

impl GuestMemoryRegion for Region {
    type B = ();

    fn len(&self) -> u64 {
        self.bytes as u64
    }

    fn start_addr(&self) -> GuestAddress {
        self.start
    }

    fn bitmap(&self) -> BS<'_, ()> {}

    fn get_host_address(&self, at: MemoryRegionAddress) -> AccessResult<*mut u8> {
        let at = self.check_address(at);
        let at = at.ok_or(GuestMemoryError::InvalidBackendAddress)?;
        Ok(self.host().wrapping_add(at.raw_value() as usize))
    }

    fn get_slice(
        &self,
        at: MemoryRegionAddress,
        count: usize,
    ) -> AccessResult<VolatileSlice<'_, BS<'_, ()>>> {
        let whole = self.mapping.get_slice(self.skip, self.bytes)?;
        Ok(whole.subslice(at.raw_value() as usize, count)?)
    }
}

impl GuestMemoryRegionBytes for Region {}

/// `bytes` of memory, all zero; a multiple of the page.
///
/// # Errors
/// The host has none.
pub fn create(bytes: u64) -> Result<Memory, MemoryError> {
    let mut regions = Vec::new();
    for (start, length) in layout::ram(bytes) {
        let size = usize::try_from(length).expect("64-bit host");
        regions
            .push(Region::new(start, size).map_err(|source| MemoryError::Map { bytes, source })?);
    }
    let regions = GuestRegionCollection::from_regions(regions);
    let regions = regions.map_err(|source| MemoryError::Parts { bytes, source })?;
    Ok(Arc::new(regions))
}

/// Shows it to the guest.
///
/// # Errors
/// KVM refused.
pub fn add_slots(vm: &Vm, memory: &Memory) -> Result<(), VmError> {
    for region in memory.iter() {
        vm.add_slot(Slot {
            gpa: region.start.0,
            host: region.host().addr() as u64,
            bytes: region.len(),
            owner: region.mapping.clone(),
        })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::*;

    #[test]
    fn all_of_it_and_nothing_else_can_be_reached() {
        for bytes in [1 << 20, 16 << 20, (3 << 30) + (5 << 20)] {
            let memory = create(bytes).unwrap();
            for (start, length) in layout::ram(bytes) {
                let last = GuestAddress(start + length - 8);
                for at in [GuestAddress(start), last] {
                    assert_eq!(memory.read_obj::<u64>(at).unwrap(), 0);
                    memory.write_obj(!at.0, at).unwrap();
                    assert_eq!(memory.read_obj::<u64>(at).unwrap(), !at.0);
                }
                assert!(memory.write_obj(0_u64, GuestAddress(last.0 + 1)).is_err());
                assert!(memory.get_host_address(GuestAddress(last.0 + 8)).is_err());
            }
        }
    }

    #[test]
    fn host_and_guest_addresses_are_equal_within_a_huge_page() {
        let memory = create((3 << 30) + (5 << 20)).unwrap();
        for region in memory.iter() {
            let host = region.host().addr();
            assert_eq!(host % HUGE, region.start.0 as usize % HUGE);
            let spare = region.mapping.size() - region.bytes;
            assert!(region.skip <= spare);
        }
    }
}
