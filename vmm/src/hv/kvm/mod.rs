//! KVM, one file per object.

mod ioctls;
pub mod regs;
pub mod vcpu;
pub mod vm;
mod xsave;
