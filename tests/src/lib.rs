//! Whole-system tests: real programs under `vmm run`, compared with what Linux does.
//!
//! A [`case::Case`] says which program runs with which options and what must come of it; mostly
//! that it prints what it prints on the machine that runs the tests, which is the oracle. The same
//! binary runs on `/dev/kvm` and inside the rig (`tests/rig`), where the kernel offers KVM with
//! nested or with shadow paging; [`host`] knows where it is. `docs/testing.md` tells how to run it.
//!
//! What it is not: tests of a module's insides, which stand beside the modules.

pub mod case;
pub mod context;
pub mod elf;
pub mod host;
pub mod process;
pub mod programs;
pub mod report;
pub mod suite;
pub mod terminal;
