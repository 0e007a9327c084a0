//! Many threads, one manager: the locks hold, and everything adds up afterwards.

use std::sync::Barrier;

use super::common::{BASE, Cpu, RW, manager, map_anon, range, vpn};
use shadow_mm::{Access, PinOutcome, Prot};

#[test]
fn threads_that_fork_and_store_lose_nothing() {
    let mm = manager(2000, 500);
    let family = mm.create_space().expect("a space");
    map_anon(&mm, &family, BASE, 32, RW);
    let mut cpu = Cpu::new(&family);
    (BASE..BASE + 32).for_each(|page| cpu.store(&mm, page, 1).expect("a store"));
    let start = Barrier::new(4);
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let (mm, family, start) = (&mm, &family, &start);
            scope.spawn(move || {
                start.wait();
                for round in 0..150u64 {
                    let forked = mm.fork(family).expect("a fork");
                    mm.flushed(forked.flush);
                    let mut child = Cpu::new(&forked.child);
                    let page = BASE + (round * 7 + thread) % 32;
                    child.store(mm, page, thread as u8).expect("a store");
                    assert_eq!(child.load(mm, page), Ok(thread as u8));
                    if let PinOutcome::Pinned(pin, flush) = mm.pin(family, vpn(page), Access::Write)
                    {
                        mm.flushed(flush);
                        mm.unpin(pin);
                    }
                    let done = mm.protect(&forked.child, range(BASE, 32), Prot::READ);
                    mm.flushed(done.flush);
                    let flush = mm.delete_space(&forked.child);
                    mm.flushed(flush);
                }
            });
        }
    });
    assert_eq!(mm.check(std::slice::from_ref(&family)), Ok(()));
    let flush = mm.delete_space(&family);
    mm.flushed(flush);
    assert_eq!(mm.check(&[]), Ok(()));
    assert_eq!(mm.stats().data.available(), 2000);
}
