//! Single verbs, one expectation each.

use super::common::{BASE, Cpu, RW, manager, map_anon, range, vpn};
use shadow_mm::{Access, FaultKind, FaultOutcome, Prot};

#[test]
fn touched_page_reads_as_zero_then_as_written() {
    let mm = manager(64, 16);
    let space = mm.create_space().expect("a space");
    let mut cpu = Cpu::new(&space);
    map_anon(&mm, &space, BASE, 4, RW);
    assert_eq!(cpu.load(&mm, BASE), Ok(0));
    cpu.store(&mm, BASE, 7).expect("a store");
    assert_eq!(cpu.load(&mm, BASE), Ok(7));
}

#[test]
fn forked_page_is_private_to_each_side() {
    let mm = manager(64, 32);
    let space = mm.create_space().expect("a space");
    let mut parent = Cpu::new(&space);
    map_anon(&mm, &space, BASE, 4, RW);
    parent.store(&mm, BASE, 1).expect("a store");
    let forked = mm.fork(&space).expect("a fork");
    parent.flush(&mm, forked.flush);
    let mut child = Cpu::new(&forked.child);
    parent.store(&mm, BASE, 2).expect("a store");
    assert_eq!(child.load(&mm, BASE), Ok(1));
    child.store(&mm, BASE, 3).expect("a store");
    assert_eq!(
        (parent.load(&mm, BASE), child.load(&mm, BASE)),
        (Ok(2), Ok(3))
    );
    assert_eq!(mm.stats().pages_copied, 1);
    assert_eq!((mm.stats().clone_blocks, mm.stats().clone_headers), (0, 0));
}

#[test]
fn sequential_touches_map_ever_more_ahead() {
    let mm = manager(4096, 32);
    let space = mm.create_space().expect("a space");
    map_anon(&mm, &space, BASE, 1000, RW);
    let mut page = BASE;
    for expected in [1, 2, 4, 8, 16, 32, 32] {
        match mm.fault(&space, vpn(page).va(), Access::Write) {
            FaultOutcome::Resolved(done) => {
                assert_eq!((done.kind, done.mapped), (FaultKind::DemandZero, expected));
                page += u64::from(done.mapped);
                mm.flushed(done.flush);
            }
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn unmapped_and_deleted_space_gives_every_frame_back() {
    let mm = manager(256, 32);
    let before = mm.stats().tables.active;
    let space = mm.create_space().expect("a space");
    let mut cpu = Cpu::new(&space);
    map_anon(&mm, &space, BASE, 100, RW);
    (0..100).for_each(|n| cpu.store(&mm, BASE + n, 1).expect("a store"));
    let protected = mm.protect(&space, range(BASE, 50), Prot::empty());
    assert_eq!(protected.result, Ok(()));
    cpu.flush(&mm, protected.flush);
    assert!(cpu.load(&mm, BASE).is_err());
    let flush = mm.unmap(&space, range(BASE, 60)).expect("unmapped");
    cpu.flush(&mm, flush);
    let flush = mm.delete_space(&space);
    mm.flushed(flush);
    let stats = mm.stats();
    assert_eq!((stats.data.available(), stats.data.in_flight), (256, 0));
    assert_eq!(stats.tables.active, before);
    assert_eq!(stats.tables.in_flight, 0);
}
