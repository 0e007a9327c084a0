//! KVM, one file per object.

pub mod area;
mod ioctls;
pub mod regs;
pub mod vcpu;
pub mod vm;
mod xsave;
