//! KVM, one file per object.

pub mod area;
pub mod board;
pub mod board_cpu;
mod ioctls;
pub mod regs;
pub mod vcpu;
pub mod vm;
mod xsave;
