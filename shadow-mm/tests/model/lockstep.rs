//! The same history with both kinds of fork, in lockstep: a fork by fresh roots must not be told from a full clone by
//! any byte, nor by any count that is not about page tables and clone blocks themselves.
//!
//! Each world is held against the model by itself as well. What makes choices of its own is left out, because it may choose
//! differently: the trimmer, and with it the page file. Frames, page file and commit never run out here.
//!
//! *Which pages were made or copied ahead* is no difference. That goes by where the last fault of a mapping was, and one kind
//! sees faults that the other one has none of: a fork by fresh roots leaves a page writable in a table that its last sharer
//! takes over, where a full clone leaves it copy-on-write. So where counts, or what a space has for itself, differ, each world first
//! makes what the other one made ahead ([`Pair::level`]), and nothing else; then all must be the same.

use std::collections::BTreeMap;

use proptest::prelude::*;
use shadow_mm::{Access, CommitLimit, ForkMode, FrameStore, PAGE_SIZE, Sharing, SpaceUsage};

use super::cases;
use super::common::range;
use super::ops::{self, Op};
use super::world::{Outcome, World};

/// Frames of each kind: more than any history needs.
const PLENTY: u32 = 2000;

proptest! {
    #![proptest_config(ProptestConfig {
        cases: cases() / 4,
        failure_persistence: None,
        max_shrink_iters: 4000,
        ..ProptestConfig::default()
    })]

    #[test]
    fn shared_forks_are_not_told_from_full_clones(
        ops in prop::collection::vec(ops::any_op(), 1..125),
    ) {
        let mut pair = Pair::new();
        for (step, op) in ops.iter().enumerate().filter(|(_, op)| chooses_nothing(op)) {
            pair.apply(*op).map_err(|e| TestCaseError::fail(format!("step {step}, {op:?}: {e}")))?;
        }
        pair.close().map_err(|e| TestCaseError::fail(format!("at the end: {e}")))?;
    }
}

/// The fault of the second store, where a fork left one, says that the third goes on from there.
#[test]
fn page_made_ahead_because_of_a_fault_is_no_difference() {
    let anon = |page, count| ops::MapOp {
        page,
        count,
        prot: super::common::RW,
        view: None,
    };
    let mut pair = Pair::new();
    for op in [
        Op::Map(0, anon(11, 4)),
        Op::Write(0, 12, 0, 1),
        Op::Fork(0),
        Op::Exit(0),
        Op::Map(0, anon(10, 1)),
        Op::Write(0, 12, 0, 2),
        Op::Write(0, 13, 0, 3),
    ] {
        pair.apply(op).expect("a step");
    }
    pair.close().expect("all home");
}

/// The fault of the second store to a page, where a fork left one, says where the guest is, and so how many pages of shared
/// memory are made for the store after it, which then copies them all.
#[test]
fn page_copied_ahead_because_of_a_fault_is_no_difference() {
    let view = ops::MapOp {
        page: 8,
        count: 10,
        prot: super::common::RW,
        view: Some((ops::SHARED, 0, Sharing::Private)),
    };
    let mut pair = Pair::new();
    for op in [
        Op::Map(0, view),
        Op::Write(0, 10, 0, 1),
        Op::Fork(0),
        Op::Exit(0),
        Op::StartRead(0, 11),
        Op::Write(0, 10, 0, 2),
        Op::Fork(0),
        Op::Write(0, 13, 0, 3),
    ] {
        pair.apply(op).expect("a step");
    }
    pair.close().expect("all home");
}

fn chooses_nothing(op: &Op) -> bool {
    !matches!(
        op,
        Op::Trim(..)
            | Op::StartWrite
            | Op::FinishWrite(..)
            | Op::StartPageIn(..)
            | Op::FinishPageIn(..)
            // It keeps what nobody else has, which one kind knows later.
            | Op::Reset(_, (1.., _))
            // Only one kind can.
            | Op::Keep(_)
            | Op::KeepSection(_)
    )
}

/// The same history twice.
struct Pair {
    shared: World,
    eager: World,
}

impl Pair {
    fn new() -> Self {
        let world = |mode| World::new(mode, (PLENTY, PLENTY), 0, CommitLimit::Unlimited);
        Self {
            shared: world(ForkMode::Shared),
            eager: world(ForkMode::Eager),
        }
    }

    fn apply(&mut self, op: Op) -> Outcome {
        let alone = match op {
            // Each store by itself: after one that copied ahead in one world only, the next may change what the other one shows.
            Op::WriteApart(which, first, apart, byte) => ops::pages_apart(first, apart)
                .map(|page| Op::Write(which, page, 0, byte))
                .collect(),
            _ => vec![op],
        };
        for op in alone {
            self.shared.apply(&op)?;
            self.eager.apply(&op)?;
            self.compare()?;
        }
        Ok(())
    }

    fn compare(&mut self) -> Outcome {
        if counts(&self.shared) != counts(&self.eager) || self.unlike().is_some() {
            self.level()?;
        }
        let (shared, eager) = (counts(&self.shared), counts(&self.eager));
        if shared != eager {
            return Err(format!("shared {shared:?}, eager {eager:?}"));
        }
        if let Some((which, page)) = self.unlike() {
            return Err(format!(
                "page {page:#x} of process {which} is its own in one only"
            ));
        }
        for which in 0..self.shared.processes.len() {
            let (shared, eager) = (resident(&self.shared, which), resident(&self.eager, which));
            if let Some(page) = differing(&shared, &eager) {
                return Err(format!("page {page:#x} of process {which} differs"));
            }
        }
        Ok(())
    }

    /// A page that a process has for itself in one world only: a copy of a view's or an image's.
    fn unlike(&self) -> Option<(usize, u64)> {
        let pairs = self.shared.processes.iter().zip(&self.eager.processes);
        let mut found = pairs.enumerate().filter_map(|(which, (shared, eager))| {
            let mut pages = shared.pages.iter().zip(&eager.pages);
            let unlike =
                pages.find(|((_, one), (_, other))| one.own.is_some() != other.own.is_some());
            unlike.map(|((page, _), _)| (which, *page))
        });
        found.next()
    }

    /// Has each world make what only the other one made ahead: copies by a store to each page that only the other one has
    /// copied, which changes nothing there, and pages of zeroes by reading everything.
    fn level(&mut self) -> Outcome {
        let mut left = self.pages();
        while let Some((which, page)) = self.unlike() {
            if left == 0 {
                return Err(format!("page {page:#x} of process {which} is not copied"));
            }
            left -= 1;
            let lacks = |world: &World| world.processes[which].pages[&page].own.is_none();
            let world = match lacks(&self.shared) {
                true => &mut self.shared,
                false => &mut self.eager,
            };
            world.access(which, page, Access::Write, |_| {})?;
            world.note_copies();
        }
        self.read_all()
    }

    /// Pages of all processes.
    fn pages(&self) -> usize {
        let processes = self.shared.processes.iter();
        processes.map(|process| process.pages.len()).sum()
    }

    /// Reads every page there is.
    fn read_all(&mut self) -> Outcome {
        for world in [&mut self.shared, &mut self.eager] {
            for which in 0..world.processes.len() {
                let pages: Vec<u64> = world.processes[which].pages.keys().copied().collect();
                for page in pages.into_iter().filter(|page| *page < 1 << 35) {
                    world.access(which, page, Access::Read, |_| {})?;
                }
            }
        }
        Ok(())
    }

    /// What is in no frame yet is compared too; then everything goes.
    fn close(mut self) -> Outcome {
        self.read_all()?;
        self.compare()?;
        self.shared.close()?;
        self.eager.close()
    }
}

/// What must be the same of all, and of each process. The whole of what is promised has the page tables in it, of which
/// one kind needs others than the other: what each process is charged for its mappings is compared.
fn counts(world: &World) -> ([u64; 8], Vec<SpaceUsage>) {
    let stats = world.mm.stats();
    let all = [
        stats.data.total,
        // Which frames still wait for a flush depends on who made a page again where.
        stats.data.available() + stats.data.in_flight,
        stats.data.active,
        stats.data.modified,
        stats.data.modified_no_write,
        stats.sections,
        stats.section_pages,
        stats.forks,
    ];
    let usage = |which: usize| SpaceUsage {
        // A space counts what is in tables of its own. What it sees through shared ones is compared page by page.
        private: 0,
        tables: 0,
        resident: 0,
        peak_resident: 0,
        ..world.mm.usage(&world.processes[which].cpu.space)
    };
    (all, (0..world.processes.len()).map(usage).collect())
}

/// The resident pages of a process, whole.
fn resident(world: &World, which: usize) -> BTreeMap<u64, Box<[u8]>> {
    let mut frames = Vec::new();
    let space = &world.processes[which].cpu.space;
    world
        .mm
        .resident_pages(space, range(0, 1 << 35), |vpn, page| {
            frames.push((vpn.get(), page.frame));
        });
    let content = |frame| {
        let mut bytes = vec![0; PAGE_SIZE].into_boxed_slice();
        world.mm.store().read(frame, 0, &mut bytes);
        bytes
    };
    frames
        .into_iter()
        .map(|(page, frame)| (page, content(frame)))
        .collect()
}

/// A page that only one of them has, or that differs.
fn differing(one: &BTreeMap<u64, Box<[u8]>>, other: &BTreeMap<u64, Box<[u8]>>) -> Option<u64> {
    let mut pages = one.keys().chain(other.keys());
    pages.find(|page| one.get(page) != other.get(page)).copied()
}
