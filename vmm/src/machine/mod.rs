//! A machine: built, run, taken down.

pub mod fpu;
pub mod hardware;
pub mod kick;
pub mod report;
pub mod stats;
pub mod strace;
pub mod trap;
pub mod worker;
