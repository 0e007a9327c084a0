//! A type-2 hypervisor on KVM whose guests fork.
//!
//! `vmm` is a program, and a library: guests run in the process that starts them. This one warms an interpreter once, and
//! forks it for each request:
//!
//! ```no_run
//! # const SERVER: &str = "";
//! # fn serve(requests: Vec<String>) -> Result<(), Box<dyn std::error::Error>> {
//! use vmm::{Guest, Stdio};
//!
//! let warm = Guest::builder("python3").args(["-c", SERVER]).root("/").ready_freeze().spawn()?;
//! let template = warm.freeze()?; // once it has written `freeze` to /dev/vmm
//! for request in requests {
//!     let answer = template.fork().stdin(Stdio::bytes(request.into_bytes())).output()?;
//!     print!("{}", String::from_utf8_lossy(&answer.stdout));
//! }
//! # Ok(())
//! # }
//! ```
//!
//! `examples/per_request.rs` is the whole of it. A [`Guest`] is started as a process is with [`std::process::Command`], and
//! is waited for, sent signals and killed like one; dropping it ends it. [`Guest::freeze`] makes a [`Template`] of it, which
//! never changes; [`Template::fork`] makes guests of that, in machines that [`Template::warm`] has made ahead, and
//! [`Clone::reset`](Guest::reset) takes one back to where it began. Thousands that mostly wait can share a machine
//! ([`Template::shared`]). [`api`] says what a guest has of the process it runs in.
//!
//! # How it works
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

pub mod api;
pub mod cli;
pub mod config;
pub mod control;
mod descriptors;
pub mod devices;
pub mod hv;
pub mod inspect;
pub mod kernel;
pub mod linux;
pub mod locks;
pub mod machine;
pub mod memory;
pub mod snapshot;

#[doc(inline)]
pub use api::{
    Builder, Clone, Fork, Forked, FreezeError, Guest, OutputError, SharedMachine, SignalError,
    SpawnError, Started, Stdio, Template, WaitError,
};
