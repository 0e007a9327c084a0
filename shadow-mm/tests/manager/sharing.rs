//! Forks: who shares what, when a copy is made, and when it is not.

use super::common::page_file::{File, evict_all, trim};
use super::common::{BASE, Cpu, Guest, Mm, RW, manager, map_anon, range, vpn};
use shadow_mm::{
    Access, FaultKind, FaultOutcome, ForkMode, FrameStore, PAGE_SIZE, PinOutcome, Prot, TrimMode,
    VadAdvice,
};

/// A parent with `count` written pages, and its child.
fn forked(mm: &Mm, count: u64) -> (Cpu, Cpu) {
    let space = mm.create_space().expect("a space");
    let mut parent = Cpu::new(&space);
    map_anon(mm, &space, BASE, count, RW);
    (BASE..BASE + count).for_each(|page| parent.store(mm, page, 1).expect("a store"));
    let child = fork(mm, &mut parent);
    (parent, child)
}

fn fork(mm: &Mm, parent: &mut Cpu) -> Cpu {
    let forked = mm.fork(&parent.space).expect("a fork");
    parent.flush(mm, forked.flush);
    Cpu::new(&forked.child)
}

fn exit(mm: &Mm, space: &Guest) {
    let flush = mm.delete_space(space);
    mm.flushed(flush);
}

fn write_fault(mm: &Mm, cpu: &mut Cpu, page: u64) -> (FaultKind, usize) {
    match mm.fault(&cpu.space, vpn(page).va(), Access::Write) {
        FaultOutcome::Resolved(done) => {
            let told = (done.kind, done.flush.entries().len());
            cpu.flush(mm, done.flush);
            told
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn last_reference_becomes_writable_without_a_copy() {
    let mm = manager(64, 32);
    let (mut parent, mut child) = forked(&mm, 2);
    assert_eq!(
        write_fault(&mm, &mut parent, BASE),
        (FaultKind::CopyOnWrite, 1)
    );
    assert_eq!(
        write_fault(&mm, &mut child, BASE),
        (FaultKind::MadeWritable, 0)
    );
    exit(&mm, &parent.space);
    assert_eq!(
        write_fault(&mm, &mut child, BASE + 1),
        (FaultKind::MadeWritable, 0)
    );
    assert_eq!(mm.stats().clone_headers, 0);
    assert_eq!(mm.check(&[child.space]), Ok(()));
}

#[test]
fn frame_under_an_unacknowledged_flush_is_not_taken_over() {
    let mm = manager(64, 32);
    let (parent, mut child) = forked(&mm, 1);
    // The parent is gone, but its vCPUs may still read the page.
    let flush = mm.delete_space(&parent.space);
    assert_eq!(write_fault(&mm, &mut child, BASE).0, FaultKind::CopyOnWrite);
    mm.flushed(flush);
    assert_eq!(mm.check(&[child.space]), Ok(()));
}

#[test]
fn page_pinned_for_reading_is_not_taken_over() {
    let mm = manager(64, 32);
    let (parent, mut child) = forked(&mm, 1);
    let PinOutcome::Pinned(pin, flush) = mm.pin(&parent.space, vpn(BASE), Access::Read) else {
        panic!("the page is resident");
    };
    mm.flushed(flush);
    exit(&mm, &parent.space);
    child.store(&mm, BASE, 9).expect("a store");
    let mut byte = [0];
    mm.store().read(pin.pfn(), 0, &mut byte);
    assert_eq!(byte, [1], "the pin shows another process's store");
    mm.unpin(pin);
    assert_eq!(mm.check(&[child.space]), Ok(()));
}

#[test]
fn page_pinned_for_writing_is_copied_by_the_fork() {
    let mm = manager(64, 32);
    let (mut parent, child) = forked(&mm, 1);
    exit(&mm, &child.space);
    let PinOutcome::Pinned(pin, flush) = mm.pin(&parent.space, vpn(BASE), Access::Write) else {
        panic!("the page is resident");
    };
    parent.flush(&mm, flush);
    let mut child = fork(&mm, &mut parent);
    mm.store().write(pin.pfn(), 0, &[5]);
    assert_eq!(
        (parent.load(&mm, BASE), child.load(&mm, BASE)),
        (Ok(5), Ok(1))
    );
    mm.unpin(pin);
    assert_eq!(mm.check(&[parent.space, child.space]), Ok(()));
}

#[test]
fn protection_there_and_back_copies_nothing_and_stays_copy_on_write() {
    let mm = manager(64, 32);
    let (mut parent, mut child) = forked(&mm, 4);
    for prot in [Prot::READ, Prot::empty(), RW] {
        let done = mm.protect(&parent.space, range(BASE, 4), prot);
        assert_eq!(done.result, Ok(()));
        parent.flush(&mm, done.flush);
        assert_eq!(
            mm.check(&[parent.space.clone(), child.space.clone()]),
            Ok(())
        );
    }
    assert_eq!((mm.stats().pages_copied, mm.stats().clone_blocks), (0, 4));
    assert_eq!(
        write_fault(&mm, &mut parent, BASE).0,
        FaultKind::CopyOnWrite
    );
    assert_eq!(child.load(&mm, BASE), Ok(1));
}

#[test]
fn protection_of_a_last_reference_makes_it_private_but_not_writable() {
    let mm = manager(64, 32);
    let (mut parent, child) = forked(&mm, 4);
    exit(&mm, &child.space);
    assert_eq!(mm.usage(&parent.space).private, 0);
    let done = mm.protect(&parent.space, range(BASE, 4), Prot::READ);
    parent.flush(&mm, done.flush);
    assert_eq!(mm.usage(&parent.space).private, 4);
    assert_eq!((mm.stats().clone_blocks, mm.stats().pages_copied), (0, 0));
    assert_eq!(parent.store(&mm, BASE, 2), Err("Protection".into()));
}

#[test]
fn fork_of_clone_pages_makes_no_new_blocks() {
    let mm = manager(64, 64);
    let (mut parent, child) = forked(&mm, 8);
    let before = (mm.stats().clone_blocks, mm.stats().clone_headers);
    let second = fork(&mm, &mut parent);
    assert_eq!((mm.stats().clone_blocks, mm.stats().clone_headers), before);
    assert_eq!(mm.check(&[parent.space, child.space, second.space]), Ok(()));
}

#[test]
fn fork_flush_names_the_leaf_tables_once() {
    let mm = manager(256, 64);
    let (mut parent, _child) = forked(&mm, 40);
    (0..40).for_each(|n| parent.store(&mm, BASE + n, 2).expect("a store"));
    map_anon(&mm, &parent.space, BASE + 512 * 9, 4, RW);
    parent.store(&mm, BASE + 512 * 9, 1).expect("a store");
    let forked = mm.fork(&parent.space).expect("a fork");
    assert_eq!(
        (forked.flush.tables().len(), forked.flush.entries().len()),
        (2, 0)
    );
    assert_eq!(
        (forked.flush.frames_held(), forked.entries_touched),
        (0, 41)
    );
    parent.flush(&mm, forked.flush);
    // Nothing is writable any more, so a second fork takes nothing away.
    let again = mm.fork(&parent.space).expect("a fork");
    assert!(again.flush.is_empty());
    mm.flushed(again.flush);
}

#[test]
fn advice_decides_what_the_child_gets() {
    let mm = manager(64, 32);
    let space = mm.create_space().expect("a space");
    let mut parent = Cpu::new(&space);
    map_anon(&mm, &space, BASE, 3, RW);
    (BASE..BASE + 3).for_each(|page| parent.store(&mm, page, 7).expect("a store"));
    mm.advise(&space, range(BASE, 1), VadAdvice::DontFork)
        .expect("advice");
    mm.advise(&space, range(BASE + 1, 1), VadAdvice::WipeOnFork)
        .expect("advice");
    let mut child = fork(&mm, &mut parent);
    assert_eq!(child.load(&mm, BASE), Err("NotMapped".into()));
    assert_eq!(child.load(&mm, BASE + 1), Ok(0));
    assert_eq!(child.load(&mm, BASE + 2), Ok(7));
    assert_eq!(parent.load(&mm, BASE + 1), Ok(7));
    assert_eq!(mm.check(&[space, child.space]), Ok(()));
}

#[test]
fn deep_chain_of_living_processes_stays_exact() {
    let mm = manager(4096, 4096);
    let (first, mut last) = forked(&mm, 8);
    let mut all = vec![first.space.clone(), last.space.clone()];
    for generation in 0..200u64 {
        last.store(&mm, BASE + generation % 8, generation as u8)
            .expect("a store");
        last = fork(&mm, &mut last);
        all.push(last.space.clone());
    }
    assert_eq!(mm.check(&all), Ok(()));
    // From the middle outwards, so that headers lose their spaces in no order at all.
    while !all.is_empty() {
        exit(&mm, &all.remove(all.len() / 2));
    }
    assert_eq!(mm.check(&[]), Ok(()));
    assert_eq!(mm.stats().data.available(), 4096);
}

/// A virtual CPU of the child's walks on through a table that another of them has left, until it is told: the
/// parent may not make pages in that table before.
#[test]
fn table_that_a_flush_holds_is_not_taken_over() {
    let mm = manager(64, 32);
    mm.set_fork_mode(ForkMode::Shared);
    let space = mm.create_space().expect("a space");
    let mut parent = Cpu::new(&space);
    map_anon(&mm, &space, BASE, 8, RW);
    for page in [BASE + 1, BASE] {
        parent.store(&mm, page, 1).expect("a store");
    }
    let mut child = fork(&mm, &mut parent);
    assert_eq!(child.load(&mm, BASE + 1), Ok(1));
    // Another virtual CPU of the child's stores, and so leaves the shared tables; the first is not told yet.
    let at = vpn(BASE).va();
    let FaultOutcome::Resolved(left) = mm.fault(&child.space, at, Access::Write) else {
        panic!("no memory");
    };
    assert_eq!(left.kind, FaultKind::CopyOnWrite);
    for page in [BASE, BASE + 5] {
        parent.store(&mm, page, 7).expect("a store");
    }
    assert_eq!(child.load(&mm, BASE + 5), Ok(0), "the parent's new page");
    child.flush(&mm, left.flush);
    assert_eq!(child.load(&mm, BASE), Ok(1));
    assert_eq!(parent.load(&mm, BASE + 5), Ok(7));
    assert_eq!(mm.check(&[space, child.space]), Ok(()));
}

/// What one space trims from a table that others share goes from their virtual CPUs too.
#[test]
fn trim_of_a_shared_table_is_told_to_all_who_share_it() {
    let mm = manager(64, 32);
    mm.set_fork_mode(ForkMode::Shared);
    mm.add_page_file(64).expect("a page file");
    let (mut parent, mut child) = forked(&mm, 4);
    assert_eq!(child.load(&mm, BASE), Ok(1));
    let trimmed = mm.trim(&parent.space, 4, TrimMode::Any);
    if trimmed.flush.is_wide() {
        child.drop_stale(&trimmed.flush);
    }
    parent.flush(&mm, trimmed.flush);
    File::default().write_all(&mm);
    evict_all(&mm);
    let stale = child
        .mmu
        .translate(mm.store(), vpn(BASE).va(), Access::Read);
    assert!(stale.is_err(), "{stale:?}, a frame that others have");
    assert_eq!(mm.check(&[parent.space, child.space]), Ok(()));
}

/// A page that forks share is in memory: its share count says all that a clone block would. When it leaves memory its entries
/// need something to refer to.
#[test]
fn forked_page_has_a_clone_block_once_it_leaves_memory() {
    let mm = manager(64, 40);
    mm.set_fork_mode(ForkMode::Shared);
    mm.add_page_file(64).expect("a page file");
    let (mut parent, mut child) = forked(&mm, 4);
    child.store(&mm, BASE, 2).expect("a store");
    let shared = |mm: &Mm| (mm.stats().forked_pages, mm.stats().clone_blocks);
    assert_eq!(shared(&mm), (4, 0), "the first is the parent's alone");
    // The table that was copied is copied again, and its forked pages are one more entry's.
    let mut second = fork(&mm, &mut child);
    second.store(&mm, BASE + 3, 3).expect("a store");
    assert_eq!(shared(&mm), (5, 0));
    let all = |parent: &Cpu, child: &Cpu, second: &Cpu| {
        let spaces = [&parent.space, &child.space, &second.space];
        mm.check(&spaces.map(Clone::clone))
    };
    assert_eq!(all(&parent, &child, &second), Ok(()));
    trim(&mm, &mut second, 64);
    assert_eq!(all(&parent, &child, &second), Ok(()));
    assert_eq!(shared(&mm), (2, 3), "the second one's three");
    let mut file = File::default();
    trim(&mm, &mut parent, 64);
    trim(&mm, &mut child, 64);
    file.write_all(&mm);
    evict_all(&mm);
    assert_eq!(shared(&mm).0, 0, "nothing is in memory");
    assert_eq!(all(&parent, &child, &second), Ok(()));
    for (cpu, values) in [
        (&mut parent, [1, 1, 1, 1]),
        (&mut child, [2, 1, 1, 1]),
        (&mut second, [2, 1, 1, 3]),
    ] {
        for (page, value) in (BASE..).zip(values) {
            if let FaultOutcome::PageIn(ticket) = mm.fault(&cpu.space, vpn(page).va(), Access::Read)
            {
                file.read(&mm, &ticket);
                let bytes = ticket.frames().len() * PAGE_SIZE;
                let outcome = mm.complete_page_in(ticket, Ok(bytes));
                assert!(matches!(outcome, FaultOutcome::Resolved(_)), "{outcome:?}");
            }
            assert_eq!(cpu.load(&mm, page), Ok(value));
        }
    }
    assert_eq!(all(&parent, &child, &second), Ok(()));
    for cpu in [&second, &parent, &child] {
        exit(&mm, &cpu.space);
    }
    assert_eq!(mm.check(&[]), Ok(()));
    assert_eq!(shared(&mm), (0, 0));
    assert_eq!(mm.stats().data.available(), 64);
}

/// Whoever is left of those that mapped a forked page has it for himself, without a copy; and what the page was stored through
/// before says that it is modified.
#[test]
fn last_entry_of_a_forked_page_takes_it_over() {
    let mm = manager(64, 40);
    mm.set_fork_mode(ForkMode::Shared);
    let (mut parent, mut child) = forked(&mm, 4);
    child.store(&mm, BASE + 3, 2).expect("a store");
    let copied = mm.stats().pages_copied;
    exit(&mm, &parent.space);
    for page in (BASE..BASE + 4).rev() {
        child.store(&mm, page, 5).expect("a store");
    }
    assert_eq!(mm.stats().pages_copied, copied);
    assert_eq!(mm.stats().forked_pages, 0);
    assert_eq!(mm.usage(&child.space).private, 4);
    assert_eq!(mm.check(&[child.space.clone()]), Ok(()));
    // The same from the side of the one whose table was left behind.
    let mut second = fork(&mm, &mut child);
    second.store(&mm, BASE, 6).expect("a store");
    parent = second;
    exit(&mm, &parent.space);
    for page in BASE..BASE + 4 {
        child.store(&mm, page, 7).expect("a store");
    }
    assert_eq!(mm.stats().pages_copied, copied + 1);
    assert_eq!(mm.stats().forked_pages, 0);
    assert_eq!(mm.check(&[child.space]), Ok(()));
}

/// While one virtual CPU of a parent's can still store as it did before the fork, what another stores is not copied:
/// the first one's store would be in the child, and lost.
#[test]
fn store_waits_until_all_know_of_the_fork() {
    for mode in [ForkMode::Eager, ForkMode::Shared] {
        let mm = manager(64, 32);
        mm.set_fork_mode(mode);
        let space = mm.create_space().expect("a space");
        let mut cpus = [Cpu::new(&space), Cpu::new(&space)];
        map_anon(&mm, &space, BASE, 1, RW);
        for cpu in &mut cpus {
            cpu.store(&mm, BASE, 1).expect("a store");
        }
        let forked = mm.fork(&space).expect("a fork");
        let [told, other] = &mut cpus;
        told.drop_stale(&forked.flush);
        let waits = mm.fault(&space, vpn(BASE).va(), Access::Write);
        assert!(matches!(waits, FaultOutcome::Collided), "{waits:?}");
        other.store(&mm, BASE, 2).expect("as before the fork");
        other.flush(&mm, forked.flush);
        assert_eq!(told.load(&mm, BASE), Ok(2));
        told.store(&mm, BASE, 3).expect("a store");
        let mut child = Cpu::new(&forked.child);
        assert_eq!(child.load(&mm, BASE), Ok(2));
        assert_eq!(mm.check(&[space, forked.child]), Ok(()));
    }
}

/// Faults that stores to these pages take, and pages they copied.
fn faults_of_stores(mm: &Mm, cpu: &mut Cpu, pages: impl Iterator<Item = u64>) -> (u64, u64) {
    let faults = |mm: &Mm| mm.stats().faults_copy_on_write + mm.stats().faults_made_writable;
    let before = (faults(mm), mm.stats().pages_copied);
    pages.for_each(|page| cpu.store(mm, page, 2).expect("a store"));
    (faults(mm) - before.0, mm.stats().pages_copied - before.1)
}

#[test]
fn stores_in_order_copy_ahead_and_others_copy_what_they_store_to() {
    let mm = manager(1000, 64);
    mm.set_fork_mode(ForkMode::Eager);
    let (mut parent, mut child) = forked(&mm, 200);
    // 1, 2, 4, 8, 16 and then 16 at a time.
    assert_eq!(
        faults_of_stores(&mm, &mut parent, BASE..BASE + 111),
        (4 + 6, 111)
    );
    // What nobody else has any more needs no copy, and no more faults either.
    assert_eq!(
        faults_of_stores(&mm, &mut child, BASE..BASE + 111),
        (4 + 6, 0)
    );
    // No two of them as far apart as the two before.
    let scattered = (1..12).map(|n| BASE + 120 + n * (n + 1) / 2);
    assert_eq!(faults_of_stores(&mm, &mut child, scattered), (11, 11));
    for page in BASE..BASE + 200 {
        let stored = page < BASE + 111;
        assert_eq!(parent.load(&mm, page), Ok(if stored { 2 } else { 1 }));
    }
    assert_eq!(mm.check(&[parent.space, child.space]), Ok(()));
}

#[test]
fn stores_at_even_distances_copy_ahead_in_either_direction() {
    for mode in [ForkMode::Eager, ForkMode::Shared] {
        let mm = manager(8_000, 256);
        mm.set_fork_mode(mode);
        let (mut parent, mut child) = forked(&mm, 3_000);
        // 1, 1, 2, 4, 8, and what is left, in six leaf tables.
        let apart = (0..30).map(|n| BASE + n * 100);
        assert_eq!(faults_of_stores(&mm, &mut parent, apart.clone()), (6, 30));
        // 1, 1, 2, 4, 8 and 14, from the end.
        assert_eq!(
            faults_of_stores(&mm, &mut child, apart.clone().map(|page| page + 7).rev()),
            (6, 30)
        );
        // Downwards, page for page: 1, 1, 2, 4 and 8, of which the guest stores to two, and had one already.
        let row = (BASE + 10..BASE + 20).rev();
        assert_eq!(faults_of_stores(&mm, &mut child, row), (5, 15));
        for page in BASE..BASE + 3_000 {
            let stored = (page - BASE).is_multiple_of(100);
            assert_eq!(parent.load(&mm, page), Ok(if stored { 2 } else { 1 }));
        }
        assert_eq!(mm.check(&[parent.space, child.space]), Ok(()));
    }
}

#[test]
fn one_store_out_of_step_copies_one_page() {
    let mm = manager(1_000, 64);
    let (mut parent, child) = forked(&mm, 400);
    let apart = (0..7).map(|n| BASE + n * 10);
    assert_eq!(faults_of_stores(&mm, &mut parent, apart).1, 8);
    assert_eq!(
        faults_of_stores(&mm, &mut parent, [BASE + 333, BASE + 352].into_iter()),
        (2, 2)
    );
    assert_eq!(mm.check(&[parent.space, child.space]), Ok(()));
}

#[test]
fn nothing_is_copied_ahead_where_a_store_would_not_copy() {
    let mm = manager(64, 32);
    let (mut parent, child) = forked(&mm, 12);
    // The third page is somebody's own already; from the seventh on nothing may be stored.
    parent.store(&mm, BASE + 2, 9).expect("a store");
    let read_only = mm.protect(&parent.space, range(BASE + 6, 6), Prot::READ);
    parent.flush(&mm, read_only.flush);
    read_only.result.expect("a change of rights");
    let (_, copied) = faults_of_stores(&mm, &mut parent, BASE..BASE + 6);
    assert_eq!(copied, 5);
    assert_eq!(mm.check(&[parent.space, child.space]), Ok(()));
}
