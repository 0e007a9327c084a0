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
