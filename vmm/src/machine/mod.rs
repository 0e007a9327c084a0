//! A machine: built, run, taken down.

pub mod hardware;
pub mod report;
pub mod stats;
