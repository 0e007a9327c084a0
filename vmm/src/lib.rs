//! A type-2 hypervisor on KVM whose guests fork.
//!
//! The flow, one direction:
//!
//! ```text
//! guest exit -> hv::Exit -> dispatch -> { shadow_mm::fault | linux syscall } -> outcome -> resume
//! ```
//!
//! # Lock order
//! ```text
//! linux state (Kernel::state)
//! └─ object locks (a pipe, a description's offset, an in-memory inode)
//!    └─ an address space (shadow-mm)
//!       └─ the PFN database (shadow-mm)
//!          └─ scheduler queues, pending flushes (leaves)
//! ```
//! No lock is held across `KVM_RUN` or file I/O, except a description's offset, which POSIX wants
//! held for the read or write that uses it.

pub mod cli;
pub mod config;
pub mod devices;
pub mod hv;
pub mod kernel;
pub mod linux;
pub mod machine;
pub mod memory;
