//! The table of whole-system cases; see `docs/testing.md`.

use std::process::ExitCode;

mod api;
mod attacks;
mod bad_input;
mod boot;
mod boot_input;
mod boot_linux;
mod carried;
mod clones;
mod clones_pool;
mod clones_reset;
mod clones_shared;
mod clones_together;
mod clones_workers;
mod confinement;
mod examples;
mod freeze;
mod guard;
mod inspect;
mod isolation;
mod killed;
mod no_kvm;
mod options;
mod programs;
mod real;
mod rests;
mod shared;
mod shell;
mod snapshot;
mod snapshot_shared;
mod stress;
mod terminal;

fn main() -> ExitCode {
    if let Some(ended) = api::embedder().or_else(tests::process::become_small) {
        return ended;
    }
    let groups = [
        programs::cases(),
        shell::cases(),
        shared::cases(),
        real::cases(),
        stress::cases(),
        terminal::cases(),
        options::cases(),
        confinement::cases(),
        guard::cases(),
        inspect::cases(),
        snapshot::cases(),
        snapshot_shared::cases(),
        carried::cases(),
        clones::cases(),
        clones_reset::cases(),
        clones_shared::cases(),
        freeze::cases(),
        clones_workers::cases(),
        clones_pool::cases(),
        clones_together::cases(),
        rests::cases(),
        isolation::cases(),
        killed::cases(),
        examples::cases(),
        api::cases(),
        bad_input::cases(),
        attacks::cases(),
        no_kvm::cases(),
        boot::cases(),
        boot_input::cases(),
        boot_linux::cases(),
    ];
    tests::suite::main(groups.into_iter().flatten().collect())
}
