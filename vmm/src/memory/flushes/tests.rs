use std::sync::atomic::AtomicBool;
use std::thread;

use shadow_mm::{
    Access, GuestVa, Limits, Manager, MapKind, MapRequest, PfnRange, Placement, PoolLayout, Prot,
    VadFlags, VadTag, VpnRange,
};

use super::*;
use crate::memory::{Memory, Pool, Space, VmmPlatform};

const DATA: u64 = 0x10_0000;

fn memory(paging: Paging, cpus: usize) -> Memory {
    let range = |start, count| PfnRange {
        start: Pfn::new(start),
        count,
    };
    let layout = PoolLayout {
        tables: range(1, 511),
        data: range(512, 512),
    };
    let limits = Limits {
        user_end: GuestVa::new(0x7f80_0000_0000).unwrap(),
        min_va: GuestVa::new(0x1_0000).unwrap(),
    };
    let manager = Manager::new(Pool::new(1024).unwrap(), layout, limits).unwrap();
    Memory::new(manager, Flushes::new(paging, cpus))
}

fn space(memory: &Memory) -> Arc<Space<VmmPlatform>> {
    memory.manager.create_space().unwrap()
}

/// A page that was touched and is unmapped again: its flush.
fn flush(memory: &Memory, space: &Arc<Space<VmmPlatform>>, page: u64) -> Flush {
    let at = GuestVa::new(DATA + page * 4096).unwrap();
    let request = MapRequest {
        placement: Placement::Fixed(at.vpn()),
        count: 1,
        prot: Prot::READ | Prot::WRITE,
        kind: MapKind::Anonymous,
        flags: VadFlags::empty(),
        tag: VadTag(0),
    };
    memory.submit(memory.manager.map(space, request).unwrap().flush);
    memory
        .with_page(space, at, Access::Write, |_, _| ())
        .unwrap();
    let range = VpnRange::new(at.vpn(), 1).unwrap();
    memory.manager.unmap(space, range).unwrap()
}

fn enter(memory: &Memory, cpu: usize, space: &Space<VmmPlatform>) -> Entry {
    memory.flushes.enter(cpu, space)
}

/// Leaves, and acknowledges; how many flushes that were.
fn leave(memory: &Memory, cpu: usize, entry: &Entry, flushed: bool) -> usize {
    let done = memory.flushes.leave(cpu, entry, flushed);
    let count = done.len();
    memory.acknowledge(done);
    count
}

/// Counts ejections.
#[derive(Default)]
struct Ejected(AtomicU64);

impl Eject for Ejected {
    fn eject(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

fn ejects(memory: &Memory, cpu: usize) -> Arc<Ejected> {
    let ejected = Arc::new(Ejected::default());
    memory.flushes.set_eject(cpu, Arc::clone(&ejected) as _);
    ejected
}

#[test]
fn hardware_flush_of_a_space_nobody_runs_is_done_at_once() {
    let m = memory(Paging::Hardware, 2);
    let (a, b) = (space(&m), space(&m));
    assert!(
        m.flushes
            .submit(flush(&m, &a, 0))
            .map(|f| m.manager.flushed(f))
            .is_some()
    );
    // Loaded but not inside: done too, and the next entry flushes.
    let entry = enter(&m, 0, &a);
    assert!(entry.needed);
    let _ = leave(&m, 0, &entry, true);
    let other = enter(&m, 1, &b);
    assert!(
        m.flushes
            .submit(flush(&m, &a, 0))
            .map(|f| m.manager.flushed(f))
            .is_some()
    );
    let entry = enter(&m, 0, &a);
    assert!(entry.needed && entry.touches.is_empty());
    let _ = leave(&m, 0, &entry, true);
    assert!(!enter(&m, 0, &a).needed);
    let _ = leave(&m, 1, &other, true);
    assert!(!m.flushes.pending());
}

#[test]
fn flush_waits_for_every_cpu_inside_and_ejects_only_those() {
    let m = memory(Paging::Hardware, 3);
    let (a, b) = (space(&m), space(&m));
    let ejected: Vec<_> = (0..3).map(|cpu| ejects(&m, cpu)).collect();
    let inside = [enter(&m, 0, &a), enter(&m, 1, &a), enter(&m, 2, &b)];
    m.submit(flush(&m, &a, 0));
    let counts: Vec<_> = ejected.iter().map(|e| e.0.load(Ordering::SeqCst)).collect();
    assert_eq!(counts, [1, 1, 0]);
    let [first, second, third] = inside;
    assert_eq!(leave(&m, 2, &third, true), 0);
    assert_eq!(leave(&m, 0, &first, true), 0);
    assert!(m.flushes.pending());
    assert_eq!(leave(&m, 1, &second, true), 1);
    assert!(!m.flushes.pending());
    let stats = m.flushes.stats();
    assert_eq!((stats.shootdowns, stats.kicks), (1, 2));
}

#[test]
fn entry_that_did_not_flush_is_due_again() {
    let m = memory(Paging::Hardware, 1);
    let a = space(&m);
    let entry = enter(&m, 0, &a);
    assert!(entry.needed);
    let _ = leave(&m, 0, &entry, false);
    let entry = enter(&m, 0, &a);
    assert!(entry.needed);
    let _ = leave(&m, 0, &entry, true);
    assert!(!enter(&m, 0, &a).needed);
}

#[test]
fn shadow_flush_is_touched_by_the_next_entry_and_done_when_it_is_known() {
    let m = memory(Paging::Shadow, 2);
    let a = space(&m);
    m.submit(flush(&m, &a, 0));
    let entry = enter(&m, 0, &a);
    assert!(!entry.touches.is_empty());
    // Not known to have happened yet: whoever enters meanwhile touches as well.
    let other = enter(&m, 1, &a);
    assert_eq!(other.touches, entry.touches);
    assert_eq!(leave(&m, 1, &other, false), 0);
    assert!(m.flushes.pending());
    assert_eq!(leave(&m, 0, &entry, true), 1);
    assert!(!m.flushes.pending() && !m.flushes.errand_waits());
}

#[test]
fn shadow_flush_waits_for_the_touch_and_for_who_is_inside() {
    let m = memory(Paging::Shadow, 2);
    let (a, idle) = (space(&m), space(&m));
    let inside = enter(&m, 0, &a);
    m.submit(flush(&m, &a, 0));
    let errand = m.flushes.errand(1, idle.root()).unwrap();
    assert!(m.flushes.errand_done(&errand, true).is_empty());
    assert!(!m.flushes.errand_waits());
    assert_eq!(leave(&m, 0, &inside, true), 1);
    // It has the root loaded and must load CR3 after the touch, though not touch again.
    let again = enter(&m, 0, &a);
    assert!(again.needed && again.touches.is_empty());
}

#[test]
fn shadow_flush_of_a_space_that_runs_nowhere_is_an_errand_or_rides_along() {
    let m = memory(Paging::Shadow, 1);
    let (a, b, idle) = (space(&m), space(&m), space(&m));
    let woken = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&woken);
    m.flushes
        .set_wake_idle(Box::new(move || !flag.swap(true, Ordering::SeqCst)));
    m.submit(flush(&m, &a, 0));
    assert!(woken.load(Ordering::SeqCst));
    let errand = m.flushes.errand(0, idle.root()).unwrap();
    assert!(m.flushes.errand_done(&errand, false).is_empty());
    let errand = m.flushes.errand(0, idle.root()).unwrap();
    let done = m.flushes.errand_done(&errand, true);
    assert_eq!(done.len(), 1);
    m.acknowledge(done);
    assert!(m.flushes.errand(0, idle.root()).is_none());
    m.submit(flush(&m, &a, 0));
    m.delete_space(&a);
    let entry = enter(&m, 0, &b);
    assert_eq!(leave(&m, 0, &entry, true), 2);
    assert!(!m.flushes.pending());
}

/// A thread that parks.
struct Parked(thread::Thread);

impl Spare for Parked {
    fn call(&self) {
        self.0.unpark();
    }

    fn rest(&self) {}
}

/// Both workers are in system calls that wait for frames, which the flush holds.
#[test]
fn spare_cpu_touches_when_nobody_else_can() {
    let m = memory(Paging::Shadow, 2);
    let a = space(&m);
    assert!(m.flushes.submit(flush(&m, &a, 0)).is_none());
    let looked = AtomicBool::new(false);
    thread::scope(|scope| {
        let spare = scope.spawn(|| {
            m.flushes.set_spare(Arc::new(Parked(thread::current())));
            looked.store(true, Ordering::SeqCst);
            while !m.flushes.take_call() {
                thread::park();
            }
            let root = m.manager.create_space().unwrap().root();
            let entry = m.flushes.errand(1, root).unwrap();
            let done = m.flushes.errand_done(&entry, true);
            done.len()
        });
        while !looked.load(Ordering::SeqCst) {
            thread::yield_now();
        }
        assert!(m.finish_flushes());
        assert_eq!(spare.join().unwrap(), 1);
    });
    assert!(!m.finish_flushes(), "nothing waits any more");
}

#[test]
fn machine_that_rests_has_nothing_to_touch_before_it_wakes() {
    let m = memory(Paging::Shadow, 1);
    let a = space(&m);
    m.submit(flush(&m, &a, 0));
    assert!(m.flushes.errand_waits());
    m.flushes.turn(Turn::Rests);
    assert!(!m.flushes.errand_waits());
    let done = m.flushes.rested();
    assert_eq!(done.len(), 1);
    m.acknowledge(done);
    m.submit(flush(&m, &a, 1));
    assert!(!m.flushes.pending(), "nobody knows what it takes away");
    m.flushes.turn(Turn::Wakes);
    m.submit(flush(&m, &a, 2));
    assert!(m.flushes.errand_waits());
    let entry = enter(&m, 0, &a);
    assert_eq!(leave(&m, 0, &entry, true), 1);
}

#[test]
fn entry_with_nothing_to_flush_leaves_few_touches_to_others() {
    let m = memory(Paging::Shadow, 1);
    let (a, b) = (space(&m), space(&m));
    let entry = enter(&m, 0, &b);
    let _ = leave(&m, 0, &entry, true);
    m.submit(flush(&m, &a, 0));
    assert!(!enter(&m, 0, &b).needed);
    for page in 0..MANY_TOUCHES as u64 {
        m.submit(flush(&m, &a, page));
    }
    assert!(enter(&m, 0, &b).needed);
}

/// A virtual CPU that spins in the guest until it is ejected, with a TLB of one word.
struct FakeCpu {
    ejected: AtomicBool,
    /// What its TLB holds while it is in the guest; `u64::MAX` outside.
    sees: AtomicU64,
}

impl Eject for FakeCpu {
    fn eject(&self) {
        self.ejected.store(true, Ordering::SeqCst);
    }
}

/// Ends the virtual CPUs, also when the test fails.
struct EndOnDrop<'a>(&'a AtomicBool);

impl Drop for EndOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// Enters over and over; `table` is the page table.
fn spin(
    m: &Memory,
    index: usize,
    cpu: &FakeCpu,
    table: &AtomicU64,
    (space, end): (&Space<VmmPlatform>, &AtomicBool),
) {
    let mut tlb = 0;
    while !end.load(Ordering::SeqCst) {
        let entry = enter(m, index, space);
        if entry.needed {
            tlb = table.load(Ordering::SeqCst);
        }
        cpu.sees.store(tlb, Ordering::SeqCst);
        while !cpu.ejected.swap(false, Ordering::SeqCst) && !end.load(Ordering::SeqCst) {
            thread::yield_now();
        }
        cpu.sees.store(u64::MAX, Ordering::SeqCst);
        let _ = leave(m, index, &entry, true);
    }
}

#[test]
fn nobody_sees_the_old_table_after_the_wait() {
    const CPUS: usize = 3;
    for paging in [Paging::Hardware, Paging::Shadow] {
        let m = memory(paging, CPUS + 1);
        let (a, idle) = (space(&m), space(&m));
        let cpus: Vec<_> = std::iter::repeat_with(|| {
            Arc::new(FakeCpu {
                ejected: AtomicBool::new(false),
                sees: AtomicU64::new(u64::MAX),
            })
        })
        .take(CPUS)
        .collect();
        for (index, cpu) in cpus.iter().enumerate() {
            m.flushes.set_eject(index, Arc::clone(cpu) as _);
        }
        let (table, end) = (AtomicU64::new(0), AtomicBool::new(false));
        thread::scope(|scope| {
            for (index, cpu) in cpus.iter().enumerate() {
                let (m, table, a, end) = (&m, &table, &a, &end);
                scope.spawn(move || spin(m, index, cpu, table, (a, end)));
            }
            let _end = EndOnDrop(&end);
            for version in 1..500 {
                let flush = flush(&m, &a, version % 8);
                table.store(version, Ordering::SeqCst);
                m.submit(flush);
                m.quiesce(&a);
                for cpu in &cpus {
                    let sees = cpu.sees.load(Ordering::SeqCst);
                    assert!(sees >= version, "{sees} after {version}");
                }
                // A touch on the way into the guest is known to have been made only when it is left.
                while let Some(entry) = m.flushes.errand(CPUS, idle.root()) {
                    m.acknowledge(m.flushes.errand_done(&entry, true));
                }
                m.flushes.settle();
                assert!(!m.flushes.pending());
            }
        });
        m.acknowledge(m.flushes.drain());
        m.delete_space(&a);
        m.acknowledge(m.flushes.drain());
        assert_eq!(m.manager.stats().data.in_flight, 0);
    }
}

/// A space with one page that was stored to and that virtual CPU 0 ran when it was forked, and its child.
fn family(m: &Memory) -> [Arc<Space<VmmPlatform>>; 2] {
    m.manager.set_fork_mode(shadow_mm::ForkMode::Shared);
    let parent = space(m);
    let at = GuestVa::new(DATA).unwrap();
    let request = MapRequest {
        placement: Placement::Fixed(at.vpn()),
        count: 1,
        prot: Prot::READ | Prot::WRITE,
        kind: MapKind::Anonymous,
        flags: VadFlags::empty(),
        tag: VadTag(0),
    };
    m.submit(m.manager.map(&parent, request).unwrap().flush);
    m.with_page(&parent, at, Access::Write, |_, _| ()).unwrap();
    let entry = enter(m, 0, &parent);
    assert_eq!(entry.root, parent.root().gpa());
    let forked = m.manager.fork(&parent).unwrap();
    assert_ne!(entry.root, parent.root().gpa());
    // Whoever is inside is on the old root until the flush ejects it.
    let ejected = ejects(m, 0);
    let (child, mut flush) = (forked.child, forked.flush);
    drop(flush.take_fork());
    m.submit(flush);
    assert_eq!(ejected.0.load(Ordering::SeqCst), 1);
    assert_eq!(
        leave(m, 0, &entry, true),
        usize::from(m.flushes.paging == Paging::Hardware)
    );
    [parent, child]
}

#[test]
fn fork_moves_its_parent_to_another_root() {
    for paging in [Paging::Hardware, Paging::Shadow] {
        let m = memory(paging, 2);
        let [parent, child] = family(&m);
        let entry = enter(&m, 0, &parent);
        assert!(entry.needed);
        assert_eq!(entry.root, parent.root().gpa());
        let other = enter(&m, 1, &child);
        assert_eq!(other.root, child.root().gpa());
        let _ = (leave(&m, 0, &entry, true), leave(&m, 1, &other, true));
        assert!(!m.flushes.pending());
    }
}

#[test]
fn wide_flush_concerns_every_space() {
    let m = memory(Paging::Hardware, 2);
    let [parent, child] = family(&m);
    let ejected = ejects(&m, 1);
    let inside = [enter(&m, 0, &parent), enter(&m, 1, &child)];
    let flush = m.manager.age(&child);
    assert!(flush.is_wide(), "the page was accessed");
    m.submit(flush);
    assert_eq!(ejected.0.load(Ordering::SeqCst), 1);
    assert_eq!(leave(&m, 0, &inside[0], true), 0, "the other is inside");
    assert_eq!(leave(&m, 1, &inside[1], true), 1);
    assert!(enter(&m, 0, &parent).needed, "it is stale too");
}
