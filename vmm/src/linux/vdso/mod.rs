//! The vDSO: a shared object in every address space whose functions read the clock without a
//! system call (vdso(7)).
//!
//! [`image`] is the ELF file, to be mapped at [`guest::abi::VDSO_CODE_VA`]; [`data`] is the page
//! behind it at [`guest::abi::VDSO_DATA_VA`], which the machine's clock writes. The code finds the
//! page by its distance, so both may move, but only together.
//!
//! Known holes: no unwind tables (a debugger has to guess the caller from the stack);
//! `CLOCK_BOOTTIME`, `CLOCK_MONOTONIC_RAW`, `CLOCK_TAI` and the CPU clocks are always system calls.

mod code;
pub mod data;
mod image;

pub use data::{ClockParams, CpuSource, VdsoData};
pub use image::image;

#[cfg(test)]
#[path = "tests.rs"]
mod tests;

/// The page the vDSO reads.
#[must_use]
pub fn page(memory: &crate::memory::Memory) -> vm_memory::VolatileSlice<'_> {
    let frame = crate::memory::FRAME;
    let at = guest::abi::frame::VDSO_DATA * frame as u64;
    memory.manager.store().bytes(at, frame)
}
