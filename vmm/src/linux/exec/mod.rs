//! Starting programs: `execve`, the ELF loader, the initial stack, and which host files a program
//! needs.
//!
//! A program is loaded into a *new* address space; the old one is left only when nothing can fail
//! any more. Its file is never read whole: segments are private mappings, and the loader reads
//! headers and the page that holds the end of the initialised data.
//!
//! Differences from Linux, all on the side of refusing earlier: a segment that cannot be mapped, a
//! truncated file or an entry point outside the segments makes `execve` fail instead of killing the
//! caller after the point of no return. Set-user-id bits and file capabilities have no effect, as
//! with `nosuid`. A file open for writing may be executed (no `ETXTBSY`).

use serde::{Deserialize, Serialize};

use rustix::io::Errno;
use shadow_mm::{MapError, RemapError};

pub mod calls;
pub mod closure;
pub mod elf;
pub mod error;
mod image;
pub mod load;
mod map;
pub mod open;
pub mod script;
pub mod stack;

pub use error::{ElfError, ExecError};
pub use guest::abi::USER_END;
pub use load::{Loaded, Request, load};
pub use open::Program;

/// Bytes of a page.
pub const PAGE: u64 = 4096;

/// Lowest address a program may map (`vm.mmap_min_addr`).
pub const MIN_VA: u64 = 0x1_0000;

/// What only the machine knows and a program is told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineInfo {
    /// `AT_HWCAP`: EDX of CPUID leaf 1.
    pub hwcap: u64,
    /// `AT_HWCAP2`: bit 1 if ring 3 may use FSGSBASE.
    pub hwcap2: u64,
    /// `AT_MINSIGSTKSZ`: bytes of a signal frame with this machine's extended state.
    pub minsigstksz: u64,
    /// `AT_SYSINFO_EHDR`: where the vDSO is mapped.
    pub vdso: Option<u64>,
    /// What CPUID says the processor can do: words of bits, each of which promises something.
    pub features: [u32; 9],
}

impl MachineInfo {
    /// Whether a program that was told `other` is right on this machine.
    #[must_use]
    pub fn can_run(&self, other: &Self) -> bool {
        let promised = self.features.iter().zip(&other.features);
        let kept = |(have, told): (&u32, &u32)| told & !have == 0;
        promised.into_iter().all(kept)
            && self.hwcap2 & other.hwcap2 == other.hwcap2
            && self.vdso == other.vdso
    }
}

/// `value` rounded down to a page.
#[must_use]
pub const fn page_down(value: u64) -> u64 {
    value & !(PAGE - 1)
}

/// `value`, at most [`USER_END`], rounded up to a page.
#[must_use]
pub const fn page_up(value: u64) -> u64 {
    (value + PAGE - 1) & !(PAGE - 1)
}

/// What a mapping's failure is to the guest.
#[must_use]
pub fn map_errno(error: MapError) -> Errno {
    match error {
        MapError::Overlap { .. } => Errno::EXIST,
        MapError::BadOffset { .. } => Errno::OVERFLOW,
        // No file of the guest's is one.
        MapError::Frozen => Errno::NODEV,
        MapError::SpaceDeleted
        | MapError::BadRange { .. }
        | MapError::NoSpace { .. }
        | MapError::NoCommit { .. }
        | MapError::NoMemory
        | MapError::TooManyMappings => Errno::NOMEM,
    }
}

/// What a failed move of a mapping is to the guest.
#[must_use]
pub fn remap_errno(error: RemapError) -> Errno {
    match error {
        RemapError::NotOneMapping { .. } => Errno::FAULT,
        RemapError::Overlap { .. } => Errno::INVAL,
        RemapError::CannotGrow { .. } | RemapError::NoMemory { .. } => Errno::NOMEM,
        RemapError::Place(error) => map_errno(error),
    }
}

#[cfg(test)]
mod tests;
