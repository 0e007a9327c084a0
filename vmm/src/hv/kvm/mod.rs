//! KVM, one file per object.

pub mod area;
pub mod board;
pub mod board_cpu;
pub mod board_state;
mod ioctls;
pub mod msr_filter;
pub mod regs;
mod touches;
pub mod vcpu;
pub mod vm;
mod xsave;
