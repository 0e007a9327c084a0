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
//! a description's offset, what an open directory or /proc file shows
//! └─ an address space's layout
//!    └─ linux state (Kernel::state)
//!       └─ object locks (a pipe, an epoll, an in-memory directory > inode > content, the timers)
//!          └─ an address space (shadow-mm)
//!             └─ a section (shadow-mm)
//!                └─ the PFN database (shadow-mm)
//!                   └─ scheduler queues, pending flushes (leaves)
//! ```
//! [`locks::rank`] has them all, one by one; debug builds check the order at every lock ([`locks`]).
//! Only the clock's read-write lock, which is a leaf, has no rank.
//! No lock is held across `KVM_RUN` or file I/O, except a description's offset, which POSIX wants
//! held for the read or write that uses it.

pub mod cli;
pub mod config;
pub mod control;
pub mod devices;
pub mod hv;
pub mod inspect;
pub mod kernel;
pub mod linux;
pub mod locks;
pub mod machine;
pub mod memory;
pub mod snapshot;
