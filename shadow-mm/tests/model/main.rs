//! The manager against a flat model of bytes: random operations over several spaces that fork, through
//! a simulated MMU with a TLB, with the invariant checker after every step.
//!
//! `SHADOW_MM_CASES` sets the number of cases.

mod bytes;
#[path = "../common/mod.rs"]
mod common;
mod files;
mod image;
mod keep;
mod keep_sections;
mod lay;
mod lockstep;
mod ops;
mod paging;
mod quota;
mod touch;
mod verbs;
mod world;

use ops::Op;
use proptest::prelude::*;
use shadow_mm::{CommitLimit, ForkMode, Sharing};
use world::World;

fn cases() -> u32 {
    std::env::var("SHADOW_MM_CASES")
        .ok()
        .and_then(|n| n.parse().ok())
        .unwrap_or(400)
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: cases(),
        failure_persistence: None,
        max_shrink_iters: 4000,
        ..ProptestConfig::default()
    })]

    #[test]
    fn any_history_matches_the_model(
        shared in any::<bool>(),
        data in prop_oneof![3 => 100u32..400, 1 => 8u32..60],
        tables in prop_oneof![3 => 40u32..80, 1 => 8u32..20],
        laid in prop_oneof![Just(None), ops::below().prop_map(Some)],
        slots in prop_oneof![3 => 100u64..400, 1 => 1u64..40, 1 => Just(0u64)],
        limit in prop_oneof![1 => Just(None), 1 => (1u64..120).prop_map(Some)],
        ops in prop::collection::vec(ops::any_op(), 1..120),
    ) {
        let mode = if shared { ForkMode::Shared } else { ForkMode::Eager };
        let mut world = World::new(mode, (data, tables), slots, limit.map_or(CommitLimit::Unlimited, CommitLimit::Pages));
        if let Some(below) = laid {
            for section in [ops::SHARED, ops::BYTES] {
                world.apply(&Op::Lay(section, below)).map_err(TestCaseError::fail)?;
            }
        }
        for (step, op) in ops.iter().enumerate() {
            world.apply(op).map_err(|e| TestCaseError::fail(format!("step {step}, {op:?}: {e}")))?;
        }
        world.close().map_err(|e| TestCaseError::fail(format!("at the end: {e}")))?;
    }
}

/// The last of those who share a table takes it over while somebody still looks at one of its pages, which belonged to
/// another space, now gone.
#[test]
fn taken_over_table_leaves_its_pinned_pages_alone() {
    let mut world = World::new(ForkMode::Shared, (100, 40), 100, CommitLimit::Unlimited);
    let anon = ops::MapOp {
        page: 4,
        count: 10,
        prot: common::RW,
        view: None,
    };
    for op in [
        Op::Fork(0),
        Op::Exit(0),
        Op::Map(0, anon),
        Op::Fork(0),
        Op::Pin(0, 13, false),
        Op::Fork(2),
        Op::Exit(3),
        Op::Write(1, 13, 0, 1),
    ] {
        world.apply(&op).expect("a step");
    }
    world.close().expect("the pinned page is as it was");
}

/// A store to a private view copies its neighbours, which the next store, to a shared view, changes in the file.
#[test]
fn copies_made_ahead_are_what_the_file_was_before_the_next_store() {
    let mut world = World::new(ForkMode::Shared, (100, 40), 100, CommitLimit::Unlimited);
    let view = |page, count, first, sharing| ops::MapOp {
        page,
        count,
        prot: common::RW,
        view: Some((1, first, sharing)),
    };
    for op in [
        Op::Map(0, view(10, 6, 1, Sharing::Private)),
        Op::Map(0, view(12, 3, 0, Sharing::Shared)),
        Op::WriteApart(0, 5, (2, 5), 0),
    ] {
        world.apply(&op).expect("a step");
    }
    world.close().expect("all is as it was copied");
}

/// What a kept space shows of a file's page follows the file, which may be cut within it.
#[test]
fn page_of_a_file_that_is_cut_is_as_the_file_in_a_kept_space() {
    let mut world = World::new(ForkMode::Shared, (100, 40), 100, CommitLimit::Unlimited);
    let view = ops::MapOp {
        page: 0,
        count: 2,
        prot: common::RW,
        view: Some((0, 0, Sharing::Private)),
    };
    for op in [
        Op::Map(0, view),
        Op::Read(0, 1),
        Op::Keep(0),
        Op::LookAtKept(0),
        Op::Resize(0, 4097),
        Op::LookAtKept(0),
    ] {
        world.apply(&op).expect("a step");
    }
    world.close().expect("the kept space is dropped");
}

/// A section that nothing but a kept space shows has its pages still.
#[test]
fn section_in_a_kept_space_keeps_its_promises() {
    let mut world = World::new(ForkMode::Shared, (100, 40), 100, CommitLimit::Unlimited);
    let view = ops::MapOp {
        page: 5,
        count: 7,
        prot: common::RW,
        view: Some((ops::BYTES, 0, Sharing::Private)),
    };
    let anon = ops::MapOp {
        page: 0,
        count: 12,
        view: None,
        ..view
    };
    for op in [
        Op::Map(0, view),
        Op::Read(0, 10),
        Op::Keep(0),
        Op::Map(0, anon),
        Op::NewSection(ops::BYTES),
        Op::LookAtKept(0),
    ] {
        world.apply(&op).expect("a step");
    }
    world.close().expect("the kept space is dropped");
}

/// What was left alone lies on the layer, what was changed does not, and neither comes back.
#[test]
fn process_goes_on_on_what_it_was_copied_to() {
    let mut world = World::new(ForkMode::Shared, (100, 60), 100, CommitLimit::Unlimited);
    let anon = ops::MapOp {
        page: 0,
        count: u64::from(ops::PAGES),
        prot: common::RW,
        view: None,
    };
    world.apply(&Op::Map(0, anon)).expect("a mapping");
    for page in 0..ops::PAGES {
        world.apply(&Op::Write(0, page, 0, page)).expect("a store");
    }
    for op in [
        Op::Keep(0),
        Op::Discard(0, 3, 2),
        Op::Pin(0, 30, false),
        Op::Rebase(0),
        Op::DropKept(0),
        Op::Write(0, 31, 1, 7),
        Op::Fork(0),
        Op::Keep(0),
        Op::Write(1, 31, 2, 8),
        Op::Rebase(0),
        Op::Exit(0),
    ] {
        world.apply(&op).expect("a step");
    }
    assert!(world.mm.stats().pages_rebased > 0);
    world.close().expect("all is as it was");
}

/// Forks of forks, each writing one page: the shape of a shell pipeline, long.
#[test]
fn long_fork_chain_stays_exact() {
    for mode in [ForkMode::Eager, ForkMode::Shared] {
        long_fork_chain(mode);
    }
}

fn long_fork_chain(mode: ForkMode) {
    let mut world = World::new(mode, (4000, 4000), 0, CommitLimit::Unlimited);
    let anon = ops::MapOp {
        page: 0,
        count: 12,
        prot: common::RW,
        view: None,
    };
    world.apply(&Op::Map(0, anon)).expect("a mapping");
    (0..12).for_each(|page| world.apply(&Op::Write(0, page, 0, 1)).expect("a store"));
    for generation in 0..220u32 {
        world.apply(&Op::Fork(0)).expect("a fork");
        world
            .apply(&Op::Write(1, (generation % 12) as u8, 1, generation as u8))
            .expect("a store");
        // The parent goes, the child is the next parent.
        world.apply(&Op::Exit(0)).expect("an exit");
        world.apply(&Op::Acknowledge).expect("an acknowledgement");
    }
    assert!(
        world.mm.stats().clone_headers <= 13,
        "{:?}",
        world.mm.stats()
    );
    world.close().expect("all home");
}
