use std::sync::atomic::Ordering::Relaxed;

use shadow_mm::Access;

use super::*;
use crate::linux::process::MmLayout;
use crate::linux::testing::Machine;
use crate::linux::thread::Thread;
use crate::linux::user_mem::UserMem;

const MMAP: u64 = 9;
const MUNMAP: u64 = 11;
const BRK: u64 = 12;
const MREMAP: u64 = 25;
const MADVISE: u64 = 28;
const RW: u64 = 3;
const ANON: u64 = 0x22;
const HEAP: u64 = 0x5000_0000;

struct Guest {
    m: Machine,
    t: Box<Thread>,
}

impl Guest {
    fn new() -> Self {
        let m = Machine::new();
        m.k.memory.guard.get_or_init(Default::default);
        let t = m.first();
        *t.mm.layout.lock() = MmLayout {
            brk_start: HEAP,
            brk: HEAP,
            mmap_top: 0x7000_0000_0000,
            ..MmLayout::default()
        };
        Self { m, t }
    }

    fn call(&mut self, nr: u64, args: &[u64]) -> u64 {
        let value = self.m.result(&mut self.t, nr, args);
        assert!(!(-4095..0).contains(&value), "call {nr} failed: {value}");
        value as u64
    }

    fn mapped(&mut self, bytes: u64) -> u64 {
        self.call(MMAP, &[0, bytes, RW, ANON, u64::MAX, 0])
    }

    fn mem(&self) -> UserMem<'_> {
        UserMem::new(&self.m.k.memory, &self.t.mm)
    }

    fn usable(&self, at: u64) -> bool {
        self.mem().accessible(at, 1, Access::Write) == 1
    }

    fn counted(&self) -> GuardReportPart {
        let counters = self.m.k.memory.guard.get().unwrap();
        GuardReportPart {
            damaged: counters.damaged.load(Relaxed),
            quarantined: counters.quarantined.load(Relaxed),
        }
    }

    fn explain(&self, at: u64) -> String {
        let guards = self.t.mm.guards.as_ref().unwrap().lock();
        guards.explain(at).unwrap_or_default()
    }
}

#[derive(Debug, PartialEq, Eq)]
struct GuardReportPart {
    damaged: u64,
    quarantined: u64,
}

fn part(damaged: u64, quarantined: u64) -> GuardReportPart {
    GuardReportPart {
        damaged,
        quarantined,
    }
}

#[test]
fn both_neighbours_of_a_mapping_are_inaccessible() {
    let mut g = Guest::new();
    let (a, b) = (g.mapped(2 * PAGE), g.mapped(PAGE));
    for (at, bytes) in [(a, 2 * PAGE), (b, PAGE)] {
        assert!(g.usable(at) && g.usable(at + bytes - 1));
        assert!(!g.usable(at - 1) && !g.usable(at + bytes));
        assert!(
            g.explain(at + bytes + 7)
                .contains(&format!("7 bytes behind the end of the {bytes} bytes"))
        );
        assert!(g.explain(at - 3).contains("3 bytes before"));
    }
    assert_eq!(g.explain(a), "");
}

#[test]
fn unmapped_memory_is_not_used_again_soon() {
    let mut g = Guest::new();
    let first = g.mapped(PAGE);
    g.call(MUNMAP, &[first, PAGE]);
    assert!(!g.usable(first));
    assert!(g.explain(first + 5).contains("that were unmapped"));
    let mut others = Vec::new();
    for _ in 0..LIMITS.entries {
        let at = g.mapped(PAGE);
        assert_ne!(at, first);
        g.call(MUNMAP, &[at, PAGE]);
        others.push(at);
    }
    // The oldest has left by now; its place is the highest free one again.
    assert_eq!(g.explain(first + 5), "");
    assert_eq!(g.mapped(PAGE), first);
}

#[test]
fn byte_behind_the_length_is_found_when_it_goes() {
    let mut g = Guest::new();
    let (good, bad) = (g.mapped(100), g.mapped(100));
    g.mem().write(good, &[1; 100]).unwrap();
    g.mem().write(bad, &[1; 101]).unwrap();
    g.call(MUNMAP, &[good, 100]);
    assert_eq!(g.counted(), part(0, 1));
    g.call(MUNMAP, &[bad, 100]);
    assert_eq!(g.counted(), part(1, 2));
}

#[test]
fn dropped_content_is_no_damage() {
    let mut g = Guest::new();
    let at = g.mapped(100);
    g.call(MADVISE, &[at, PAGE, 4]);
    g.call(MUNMAP, &[at, PAGE]);
    assert_eq!(g.counted(), part(0, 1));
}

#[test]
fn part_of_a_mapping_goes_alone() {
    let mut g = Guest::new();
    let at = g.mapped(4 * PAGE - 8);
    g.call(MUNMAP, &[at + PAGE, PAGE]);
    assert!(g.usable(at) && !g.usable(at + PAGE) && g.usable(at + 2 * PAGE));
    g.mem().write(at + 4 * PAGE - 8, &[0]).unwrap();
    g.call(MUNMAP, &[at, 4 * PAGE]);
    assert_eq!(g.counted(), part(1, 3));
    assert!(!g.usable(at) && !g.usable(at + 3 * PAGE));
}

#[test]
fn remapped_mapping_shows_zeroes_and_has_new_guards() {
    let mut g = Guest::new();
    let old = g.mapped(100);
    g.mem().write(old, &[7; 100]).unwrap();
    let new = g.call(MREMAP, &[old, 100, PAGE + 50, 1]);
    assert_ne!(new, old);
    let mut bytes = vec![1; PAGE as usize + 50];
    g.mem().read(new, &mut bytes).unwrap();
    assert!(bytes[..100].iter().all(|b| *b == 7) && bytes[100..].iter().all(|b| *b == 0));
    assert!(!g.usable(old) && !g.usable(new - 1) && !g.usable(new + 2 * PAGE));
    assert_eq!(g.counted(), part(0, 1));
    g.mem().write(new + PAGE + 50, &[0]).unwrap();
    g.call(MUNMAP, &[new, 2 * PAGE]);
    assert_eq!(g.counted(), part(1, 2));
}

#[test]
fn mapping_over_a_part_takes_it_out() {
    let mut g = Guest::new();
    let at = g.mapped(2 * PAGE);
    g.call(MMAP, &[at + PAGE, PAGE, RW, ANON | 0x10, u64::MAX, 0]);
    g.call(MUNMAP, &[at, 2 * PAGE]);
    assert_eq!(g.counted(), part(0, 1));
    assert!(!g.usable(at) && !g.usable(at + PAGE));
}

#[test]
fn heap_has_a_guard_and_a_pattern_that_moves_with_it() {
    let mut g = Guest::new();
    assert_eq!(g.call(BRK, &[HEAP + 100]), HEAP + 100);
    assert!(g.usable(HEAP + 99) && !g.usable(HEAP + PAGE) && !g.usable(HEAP - 1));
    assert_eq!(g.call(BRK, &[HEAP + 2 * PAGE]), HEAP + 2 * PAGE);
    let mut bytes = vec![1; 2 * PAGE as usize];
    g.mem().read(HEAP, &mut bytes).unwrap();
    assert!(bytes.iter().all(|b| *b == 0), "the pattern shows");
    assert!(!g.usable(HEAP + 2 * PAGE));
    assert_eq!(g.call(BRK, &[HEAP + 10]), HEAP + 10);
    g.mem().write(HEAP + 10, &[1]).unwrap();
    assert_eq!(g.call(BRK, &[HEAP]), HEAP);
    assert_eq!(g.counted(), part(1, 0));
}

#[test]
fn damage_is_found_at_the_end_and_guards_are_a_childs_too() {
    let mut g = Guest::new();
    let at = g.mapped(100);
    g.mem().write(at + 100, &[1]).unwrap();
    let manager = &g.m.k.memory.manager;
    let forked = manager.fork(&g.t.mm.space).unwrap();
    g.m.k.memory.submit(forked.flush);
    let layout = g.t.mm.layout.lock().clone();
    let child = crate::linux::process::AddressSpace::new(&g.m.k.memory, forked.child, layout);
    child.inherit_guards(&g.t.mm, 7);
    drop(child);
    assert_eq!(g.counted(), part(1, 0));
}

#[test]
fn short_of_frames_mappings_are_not_guarded() {
    let mut g = Guest::new();
    let most = g.mapped(1500 * PAGE);
    assert_eq!(
        g.mem()
            .accessible(most, 1500 * PAGE as usize, Access::Write),
        1500 * PAGE as usize
    );
    g.mapped(PAGE);
    let counters = g.m.k.memory.guard.get().unwrap().snapshot();
    assert_eq!((counters.guarded, counters.refused), (1, 1));
}
