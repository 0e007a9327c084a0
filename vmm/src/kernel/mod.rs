//! Kernel guests: whole Linux kernels with page tables of their own (`vmm boot`).
//!
//! [`machine`] puts a machine together from a [`BootConfig`]: guest [`memory`], a kernel's [`image`],
//! what it is told ([`params`], [`acpi`]), the processors it sees ([`cpuid`], [`msrs`], [`start`]), and
//! [`crate::devices`]. [`boot`] runs it until its [`End`].
//!
//! Interrupt controllers, the local APICs' timers and HLT are KVM's; the VMM sees only accesses to
//! ports and addresses that are no memory. The guest is hostile: nothing it does can do more than end
//! its own machine.
//!
//! Known holes: no snapshot of a whole machine yet (its parts can be saved), no network, no PCI. Guest memory is not
//! managed by `shadow-mm` yet: it is anonymous, resident as it is touched.

pub mod acpi;
pub mod config;
pub mod console;
pub mod cpuid;
pub mod end;
mod error;
pub mod firmware;
pub mod image;
mod input;
pub mod layout;
pub mod machine;
pub mod memory;
pub mod msrs;
pub mod output;
pub mod params;
pub mod run;
pub mod start;
pub mod stats;
pub mod terminal;
pub mod virtio;

pub use config::BootConfig;
pub use end::End;
pub use error::BootError;
pub use run::{Ended, boot};
