//! Guests from Rust: started, frozen, forked, reset, in the caller's process.
//!
//! The types are at the root of the crate; [there](crate) is how they fit together. They mean what `std::process`
//! means where they have its names. `docs/clones.md` says what a guest that was made of another one keeps, and what it
//! finds changed.
//!
//! # What a guest has of this process
//!
//! * Standard input, output and error, as [`Stdio`] says; a terminal among them is used as it is, and given back with the
//!   settings it had when the guest ends.
//! * The directories of the host it was shown, as this process's user.
//! * Threads: one for each processor, one for each machine that waits for its end, and a few that sleep; none for a guest in a
//!   machine that it shares, which has one for all. They take no
//!   signals of the process, and the guests hear of none. Nothing else of the process is changed: no handlers, no
//!   directory, no limits.
//! * Descriptors: a few for a machine, and those of the files its programs have open.
//!
//! A guest cannot make this process panic or hang; what it does wrong ends itself, or is an errno to it.

mod builder;
mod error;
mod guest;
mod host;
mod ready;
mod reaper;
mod running;
mod shared;
mod stdio;
mod template;

pub use builder::Builder;
pub use error::{FreezeError, OutputError, SignalError, SpawnError, WaitError};
pub use guest::{Clone, Forked, Guest, Started};
pub use shared::SharedMachine;
pub use stdio::Stdio;
pub use template::{Fork, Template};
