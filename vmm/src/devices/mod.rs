//! Devices of kernel guests.
//!
//! A device is one file here and one line where the machine is put together
//! ([`crate::kernel::machine`]). Each owns its state alone, behind its own lock, and what of it must
//! outlive the process is a plain struct that `serde` can write.
//!
//! The guest is hostile: any access of any width at any offset has an answer, no amount of memory
//! depends on what it writes, and a device never waits for something only the guest can do, except
//! for room in the console's output, which the end of the machine also gives.

mod bus;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
pub mod keyboard;
pub mod power;
pub mod serial;
pub mod virtio;

pub use bus::{BusError, Devices};
