//! Threads through the worker's loop, on real guest memory.

use crate::linux::Errno;
use crate::linux::signal::errno_value;
use crate::linux::testing::{DATA, Machine, STACK, Turn};
use crate::linux::thread::Thread;

/// Makes a thread as pthread_create does; its record.
fn thread(m: &Machine, t: &mut Thread) -> Box<Thread> {
    const PTHREAD: u64 = 0x3d_0f00;
    let tid = m.result(t, 56, &[PTHREAD, STACK - 4096, DATA + 8, DATA + 16, 0]);
    assert!(tid > 0, "{tid}");
    let new = m.runnable();
    assert_eq!((i64::from(new.tid), new.pid), (tid, t.pid));
    assert_eq!(m.mem(t).read_obj::<u32>(DATA + 8), Ok(tid as u32));
    new
}

#[test]
fn threads_share_a_process_and_end_alone() {
    let m = Machine::new();
    let mut t = m.first();
    let mut second = thread(&m, &mut t);
    m.mem(&t).write_obj(DATA + 16, &7_u32).unwrap();
    assert_eq!(m.result(&mut second, 39, &[]), i64::from(t.pid));
    assert_eq!(m.result(&mut second, 186, &[]), i64::from(second.tid));
    // As pthread_join waits.
    assert!(matches!(
        m.call(&mut t, 202, &[DATA + 16, 0, 7, 0]),
        Turn::Parked(_)
    ));
    exit_thread(&m, &mut second, 1);
    assert_eq!(m.mem(&t).read_obj::<u32>(DATA + 16), Ok(0));
    assert!(matches!(m.go_on(&mut t), Turn::Guest));
    assert_eq!(t.regs.rax, 0);
    assert_eq!(m.k.state().main_status, None);
    exit_thread(&m, &mut t, 2);
    assert_eq!(m.k.state().main_status, Some(2 << 8));
}

fn exit_thread(m: &Machine, t: &mut Thread, status: u64) {
    assert!(matches!(m.call(t, 60, &[status]), Turn::Exited));
}

#[test]
fn last_threads_status_is_the_processs_after_its_leader() {
    let m = Machine::new();
    let mut t = m.first();
    let mut second = thread(&m, &mut t);
    exit_thread(&m, &mut t, 3);
    let pid = second.pid;
    assert_eq!(m.k.state().owner_of(pid), Some(pid));
    assert_eq!(m.result(&mut second, 234, &[pid as u64, pid as u64, 10]), 0);
    assert!(m.k.state().process(pid).unwrap().thread_pending.is_empty());
    exit_thread(&m, &mut second, 4);
    assert_eq!(m.k.state().main_status, Some(4 << 8));
}

#[test]
fn threads_beyond_the_limit_are_eagain() {
    let m = Machine::new();
    let mut t = m.first();
    let others: Vec<_> = (0..7).map(|_| thread(&m, &mut t)).collect();
    let more = m.result(&mut t, 56, &[0x3d_0f00, STACK, DATA, DATA, 0]);
    assert_eq!(more as u64, errno_value(Errno::AGAIN));
    let more = m.result(&mut t, 57, &[]);
    assert_eq!(more as u64, errno_value(Errno::AGAIN));
    drop(others);
}

#[test]
fn group_exit_ends_parked_and_running_threads() {
    let m = Machine::new();
    let mut t = m.first();
    let mut parked = thread(&m, &mut t);
    let mut running = thread(&m, &mut t);
    assert!(matches!(m.call(&mut parked, 34, &[]), Turn::Parked(_)));
    assert!(matches!(m.call(&mut running, 231, &[9]), Turn::Exited));
    assert!(matches!(m.go_on(&mut parked), Turn::Exited));
    assert_eq!(m.k.state().main_status, None);
    assert!(matches!(m.go_on(&mut t), Turn::Exited));
    assert_eq!(m.k.state().main_status, Some(9 << 8));
}

#[test]
fn signal_of_the_process_goes_to_a_thread_that_takes_it() {
    let m = Machine::new();
    let mut t = m.first();
    let mut second = thread(&m, &mut t);
    m.handle(&mut t, 10, 0x41_0000, 0);
    let block = |m: &Machine, t: &mut Thread, set: u64| {
        m.mem(t).write_obj(DATA + 64, &set).unwrap();
        assert_eq!(m.result(t, 14, &[2, DATA + 64, 0, 8]), 0);
    };
    block(&m, &mut t, 1 << 9);
    // Every new thread looks once.
    assert!(matches!(m.go_on(&mut second), Turn::Guest));
    m.send(t.pid, 10);
    let asked = |t: &Thread| t.shared.attention.load(std::sync::atomic::Ordering::SeqCst);
    assert!(!asked(&t) && asked(&second));
    // It blocks the signal before it has taken it: the other is asked once that one does not.
    block(&m, &mut second, 1 << 9);
    block(&m, &mut t, 0);
    assert!(matches!(m.go_on(&mut t), Turn::Guest));
    assert_eq!(t.regs.rip, 0x41_0000);
}

#[test]
fn pending_signal_finds_another_taker_when_one_ends_or_blocks_it() {
    let m = Machine::new();
    let mut t = m.first();
    let mut second = thread(&m, &mut t);
    m.handle(&mut t, 10, 0x41_0000, 0);
    assert!(matches!(m.go_on(&mut second), Turn::Guest));
    m.send(t.pid, 10);
    let asked = |t: &Thread| t.shared.attention.load(std::sync::atomic::Ordering::SeqCst);
    assert!(asked(&t) && !asked(&second));
    m.with(&mut t, |c| {
        let mut state = c.k.state();
        crate::linux::signal::set_mask(&c.k.sched, &mut state, c.t, 1 << 9);
    });
    assert!(asked(&second));
}

#[test]
fn survivor_of_execve_has_the_leaders_id() {
    let m = Machine::new();
    let mut t = m.first();
    let mut second = thread(&m, &mut t);
    let old = second.tid;
    let blocked = m.with(&mut second, super::threads::be_alone);
    assert!(matches!(blocked, Err(crate::linux::call::Stop::Block(_))));
    assert!(matches!(m.go_on(&mut t), Turn::Exited));
    assert!(m.with(&mut second, super::threads::be_alone).is_ok());
    assert_eq!((second.tid, old), (second.pid, 3));
    assert_eq!(m.result(&mut second, 186, &[]), 2);
    // Once more: it is alone now.
    assert!(m.with(&mut second, super::threads::be_alone).is_ok());
    exit_thread(&m, &mut second, 5);
    assert_eq!(m.k.state().main_status, Some(5 << 8));
}

#[test]
fn robust_lock_of_a_dead_thread_is_marked_and_its_waiter_woken() {
    let m = Machine::new();
    let mut t = m.first();
    let mut second = thread(&m, &mut t);
    let (head, lock) = (DATA + 256, DATA + 512);
    let word = second.tid as u32 | 0x8000_0000;
    m.mem(&t).write_obj(lock + 16, &word).unwrap();
    m.mem(&t).write_obj(head, &[lock, 16, 0]).unwrap();
    m.mem(&t).write_obj(lock, &head).unwrap();
    assert_eq!(m.result(&mut second, 273, &[head, 24]), 0);
    assert!(matches!(
        m.call(&mut t, 202, &[lock + 16, 0, u64::from(word), 0]),
        Turn::Parked(_)
    ));
    exit_thread(&m, &mut second, 0);
    assert_eq!(m.mem(&t).read_obj::<u32>(lock + 16), Ok(0xc000_0000));
    assert!(matches!(m.go_on(&mut t), Turn::Guest));
}

#[test]
fn robust_list_without_end_is_left_after_a_while() {
    let m = Machine::new();
    let mut t = m.first();
    let mut second = thread(&m, &mut t);
    let (head, entry) = (DATA + 256, DATA + 512);
    m.mem(&t).write_obj(head, &[entry, 16, 0]).unwrap();
    m.mem(&t).write_obj(entry, &entry).unwrap();
    assert_eq!(m.result(&mut second, 273, &[head, 24]), 0);
    exit_thread(&m, &mut second, 0);
}
