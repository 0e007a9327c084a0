//! A kernel guest's memory: one memfd, mapped around the hole below 4 GiB and given to KVM as slots.
//!
//! The guest can write all of it at any time: it is reached through `vm-memory`'s volatile accesses
//! only, which also refuse every address that is not in it.

use std::fs::File;
use std::sync::Arc;

use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use super::layout;
use crate::hv::kvm::vm::{Slot, Vm, VmError};

/// Guest memory, shared by whoever works on it.
pub type Memory = Arc<GuestMemoryMmap>;

/// Least memory of a machine.
pub const MIN: u64 = 8 << 20;
/// Most memory of a machine: what the narrowest guest-physical address leaves room for.
pub const MAX: u64 = 512 << 30;

/// Why there is no memory for the guest.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// No memfd of that size.
    #[error("cannot create {bytes} bytes of anonymous memory")]
    Create {
        /// Size asked for.
        bytes: u64,
        /// The host's reason.
        #[source]
        source: std::io::Error,
    },
    /// It cannot be mapped.
    #[error("cannot map {bytes} bytes of guest memory: {reason}")]
    Map {
        /// Size asked for.
        bytes: u64,
        /// The mapping library's reason.
        reason: String,
    },
}

/// `bytes` of memory, all zero; a multiple of the page.
///
/// # Errors
/// The host has none.
pub fn create(bytes: u64) -> Result<Memory, MemoryError> {
    let create = |source| MemoryError::Create { bytes, source };
    let fd = rustix::fs::memfd_create("vmm-guest", rustix::fs::MemfdFlags::CLOEXEC)
        .map_err(|e| create(e.into()))?;
    let file = File::from(fd);
    file.set_len(bytes).map_err(create)?;
    let file = Arc::new(file);
    let mut offset = 0;
    let mut parts = Vec::new();
    for (start, length) in layout::ram(bytes) {
        let at = FileOffset::from_arc(Arc::clone(&file), offset);
        let size = usize::try_from(length).expect("64-bit host");
        parts.push((GuestAddress(start), size, Some(at)));
        offset += length;
    }
    let memory = GuestMemoryMmap::from_ranges_with_files(parts).map_err(|e| MemoryError::Map {
        bytes,
        reason: e.to_string(),
    })?;
    Ok(Arc::new(memory))
}

/// Shows it to the guest.
///
/// # Errors
/// KVM refused.
pub fn add_slots(vm: &Vm, memory: &Memory) -> Result<(), VmError> {
    for region in memory.iter() {
        vm.add_slot(Slot {
            gpa: region.start_addr().0,
            host: region.get_mmap().as_ptr().addr() as u64,
            bytes: region.len(),
            owner: region.get_mmap(),
        })?;
    }
    Ok(())
}
