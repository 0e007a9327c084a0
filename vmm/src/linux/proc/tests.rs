//! Processes through the worker's loop, on real guest memory.

use std::sync::Arc;

use super::image::{Image, commit_exec};
use crate::linux::Errno;
use crate::linux::file::Location;
use crate::linux::process::{INIT, Life};
use crate::linux::signal::errno_value;
use crate::linux::testing::{DATA, Machine, STACK, Turn};
use crate::linux::thread::{Regs, Thread};

const WAIT4: u64 = 61;
const EXIT: u64 = 231;
const ANY: u64 = u64::MAX;

fn wait(m: &Machine, t: &mut Thread) -> (i64, i32) {
    let pid = m.result(t, WAIT4, &[ANY, DATA, 0, 0]);
    (pid, m.mem(t).read_obj(DATA).unwrap())
}

fn exit(m: &Machine, t: &mut Thread, status: u64) {
    assert!(matches!(m.call(t, EXIT, &[status]), Turn::Exited));
}

#[test]
fn child_has_a_copy_and_its_status_reaches_the_parent() {
    let m = Machine::new();
    let mut t = m.first();
    m.mem(&t).write_obj(DATA + 4096, &1_u64).unwrap();
    let mut child = m.fork(&mut t);
    assert_eq!((child.regs.rax, child.pid), (0, 3));
    m.mem(&child).write_obj(DATA + 4096, &2_u64).unwrap();
    assert_eq!(m.mem(&t).read_obj::<u64>(DATA + 4096), Ok(1));
    assert!(matches!(
        m.call(&mut t, WAIT4, &[ANY, DATA, 0, 0]),
        Turn::Parked(_)
    ));
    exit(&m, &mut child, 7);
    assert!(matches!(m.go_on(&mut t), Turn::Guest));
    assert_eq!(t.regs.rax, 3);
    assert_eq!(m.mem(&t).read_obj::<i32>(DATA), Ok(7 << 8));
    let none = m.result(&mut t, WAIT4, &[ANY, 0, 0, 0]);
    assert_eq!(none as u64, errno_value(Errno::CHILD));
}

#[test]
fn memory_is_gone_when_the_child_is() {
    let m = Machine::new();
    let mut t = m.first();
    m.mem(&t).write_obj(DATA, &1_u64).unwrap();
    m.mem(&t).write_obj(STACK - 8, &1_u64).unwrap();
    let before = m.k.memory.manager.stats();
    let mut child = m.fork(&mut t);
    m.mem(&child).write_obj(DATA + 8192, &2_u64).unwrap();
    exit(&m, &mut child, 0);
    for flush in m.k.memory.flushes.drain() {
        m.k.memory.manager.flushed(flush);
    }
    let after = m.k.memory.manager.stats();
    assert_eq!(after.tables.active, before.tables.active);
    assert_eq!(after.data.active, before.data.active);
    drop(child);
    exit(&m, &mut t, 0);
    drop(t);
    // The first program's goes with the guest.
    m.k.take_down();
    for flush in m.k.memory.flushes.drain() {
        m.k.memory.manager.flushed(flush);
    }
    assert_eq!(m.k.memory.manager.stats().data.active, 0);
}

/// `CLONE_CHILD_SETTID`, and the child's signal.
const CHILD_SETTID: u64 = 0x100_0000 | libc::SIGCHLD as u64;

#[test]
fn child_writes_its_number_itself() {
    let m = Machine::new();
    let mut t = m.first();
    m.mem(&t).write_obj(DATA, &1_i32).unwrap();
    let pid = m.result(&mut t, 56, &[CHILD_SETTID, 0, 0, DATA, 0]);
    let mut child = m.runnable();
    assert_eq!(m.mem(&child).read_obj::<i32>(DATA), Ok(1));
    assert!(matches!(m.go_on(&mut child), Turn::Guest));
    assert_eq!(child.regs.rax, 0);
    assert_eq!(m.mem(&child).read_obj::<i32>(DATA).map(i64::from), Ok(pid));
    assert_eq!(m.mem(&t).read_obj::<i32>(DATA), Ok(1));
}

#[test]
fn stack_is_each_ones_own_before_they_go_on() {
    let m = Machine::new();
    let mut t = m.first();
    let top = STACK - 8;
    m.mem(&t).write_obj(top, &1_u64).unwrap();
    let copied = || m.k.memory.manager.stats().pages_copied;
    let before = copied();
    let mut child = m.fork(&mut t);
    assert!(matches!(m.go_on(&mut child), Turn::Guest));
    assert_eq!(copied(), before + 1);
    m.mem(&child).write_obj(top, &2_u64).unwrap();
    m.mem(&t).write_obj(top, &3_u64).unwrap();
    assert_eq!(copied(), before + 1);
    assert_eq!(m.mem(&child).read_obj::<u64>(top), Ok(2));
}

#[test]
fn vfork_parent_sleeps_until_the_child_ends() {
    let m = Machine::new();
    let mut t = m.first();
    assert!(matches!(m.call(&mut t, 58, &[]), Turn::Parked(_)));
    let mut child = m.runnable();
    assert!(Arc::ptr_eq(&t.mm, &child.mm));
    m.mem(&child).write_obj(DATA + 16, &5_u64).unwrap();
    assert!(matches!(m.go_on(&mut t), Turn::Parked(_)));
    exit(&m, &mut child, 1);
    assert!(matches!(m.go_on(&mut t), Turn::Guest));
    assert_eq!(t.regs.rax, 3);
    assert_eq!(
        m.mem(&t).read_obj::<u64>(DATA + 16),
        Ok(5),
        "the memory is still there"
    );
}

#[test]
fn vfork_parent_goes_on_when_the_child_executes() {
    let m = Machine::new();
    let mut t = m.first();
    assert!(matches!(m.call(&mut t, 58, &[]), Turn::Parked(_)));
    let mut child = m.runnable();
    let exe = Location {
        mount: 0,
        path: b"bin/true".to_vec(),
    };
    let image = Image {
        mm: m.space(),
        exe,
        comm: b"true".to_vec(),
        regs: Regs::default(),
    };
    m.with(&mut child, |c| commit_exec(c, image));
    assert!(matches!(m.go_on(&mut t), Turn::Guest));
    assert!(!Arc::ptr_eq(&t.mm, &child.mm));
    let setpgid = m.result(&mut t, 109, &[3, 3]);
    assert_eq!(setpgid as u64, errno_value(Errno::ACCESS));
}

#[test]
fn vfork_parent_is_only_killed() {
    let m = Machine::new();
    let mut t = m.first();
    m.handle(&mut t, libc::SIGUSR1, 0x40_2000, 0);
    assert!(matches!(m.call(&mut t, 58, &[]), Turn::Parked(_)));
    let mut child = m.runnable();
    m.send(2, libc::SIGUSR1);
    assert!(matches!(m.go_on(&mut t), Turn::Parked(_)));
    exit(&m, &mut child, 0);
    assert!(matches!(m.go_on(&mut t), Turn::Guest));
    assert_eq!(t.regs.rip, 0x40_2000, "the handler runs afterwards");
    assert!(matches!(m.call(&mut t, 58, &[]), Turn::Parked(_)));
    m.send(2, libc::SIGKILL);
    assert!(matches!(m.go_on(&mut t), Turn::Exited));
}

#[test]
fn process_limit_gives_eagain() {
    let m = Machine::new();
    let mut t = m.first();
    let _children: Vec<_> = (0..3).map(|_| m.fork(&mut t)).collect();
    let fork = m.result(&mut t, 57, &[]);
    assert_eq!(fork as u64, errno_value(Errno::AGAIN));
}

#[test]
fn ignored_sigchld_leaves_no_zombie() {
    let m = Machine::new();
    let mut t = m.first();
    m.handle(&mut t, libc::SIGCHLD, 1, 0);
    let mut child = m.fork(&mut t);
    assert!(matches!(
        m.call(&mut t, WAIT4, &[ANY, 0, 0, 0]),
        Turn::Parked(_)
    ));
    exit(&m, &mut child, 0);
    assert!(matches!(m.go_on(&mut t), Turn::Guest));
    assert_eq!(t.regs.rax, errno_value(Errno::CHILD));
}

#[test]
fn orphan_goes_to_the_reaper_and_leaves_no_zombie() {
    let m = Machine::new();
    let mut t = m.first();
    let mut child = m.fork(&mut t);
    let mut grandchild = m.fork(&mut child);
    exit(&m, &mut child, 0);
    assert_eq!(m.result(&mut grandchild, 110, &[]), i64::from(INIT));
    exit(&m, &mut grandchild, 0);
    assert!(!m.k.state().procs.contains_key(&4));
    assert_eq!(wait(&m, &mut t), (3, 0));
    assert_eq!(m.k.state().procs.len(), 2);
}

#[test]
fn subreaper_gets_orphans() {
    let m = Machine::new();
    let mut t = m.first();
    assert_eq!(
        m.result(&mut t, 157, &[libc::PR_SET_CHILD_SUBREAPER as u64, 1]),
        0
    );
    let mut child = m.fork(&mut t);
    let mut grandchild = m.fork(&mut child);
    exit(&m, &mut child, 0);
    assert_eq!(m.result(&mut grandchild, 110, &[]), 2);
    exit(&m, &mut grandchild, 9);
    let mut seen = [wait(&m, &mut t), wait(&m, &mut t)];
    seen.sort_unstable();
    assert_eq!(seen, [(3, 0), (4, 9 << 8)]);
}

#[test]
fn stopped_orphaned_group_is_hung_up() {
    let m = Machine::new();
    let mut t = m.first();
    let mut shell = m.fork(&mut t);
    let mut job = m.fork(&mut shell);
    assert_eq!(m.result(&mut job, 109, &[0, 0]), 0);
    m.send(4, libc::SIGSTOP);
    assert!(matches!(m.go_on(&mut job), Turn::Parked(_)));
    exit(&m, &mut shell, 0);
    assert!(matches!(m.go_on(&mut job), Turn::Exited), "SIGHUP");
    drop(job);
    assert!(!m.k.state().procs.contains_key(&4));
}

#[test]
fn background_job_that_reads_the_terminal_stops() {
    let m = Machine::new();
    let mut t = m.first();
    let mut job = m.fork(&mut t);
    assert_eq!(m.result(&mut job, 109, &[0, 0]), 0);
    let check = |job: &mut Thread, what| m.with(job, |c| super::tty_check(c, what).is_ok());
    assert!(check(&mut t, super::groups::TtyUse::Read));
    assert!(!check(&mut job, super::groups::TtyUse::Read));
    assert!(matches!(m.go_on(&mut job), Turn::Parked(_)));
    assert_eq!(
        m.k.state().process(3).unwrap().life,
        Life::Stopped(libc::SIGTTIN)
    );
    let status = m.result(&mut t, WAIT4, &[ANY, DATA, libc::WUNTRACED as u64, 0]);
    assert_eq!(status, 3);
    super::groups::set_foreground(&mut m.k.state(), 2, 3).unwrap();
    m.send(3, libc::SIGCONT);
    assert!(matches!(m.go_on(&mut job), Turn::Guest));
    assert!(check(&mut job, super::groups::TtyUse::Read));
}

#[test]
fn group_rules_are_posix() {
    let m = Machine::new();
    let mut t = m.first();
    let mut child = m.fork(&mut t);
    let call = |t: &mut Thread, nr, args: &[u64]| m.result(t, nr, args);
    let perm = errno_value(Errno::PERM) as i64;
    assert_eq!(call(&mut t, 109, &[0, 0]), perm, "a session leader");
    assert_eq!(call(&mut t, 112, &[]), perm, "a group leader");
    assert_eq!(call(&mut t, 109, &[3, 77]), perm, "no such group");
    assert_eq!(call(&mut t, 109, &[9, 9]), errno_value(Errno::SRCH) as i64);
    assert_eq!(call(&mut t, 109, &[3, 3]), 0);
    assert_eq!(call(&mut t, 121, &[3]), 3);
    assert_eq!(call(&mut child, 112, &[]), perm);
    assert_eq!(call(&mut child, 109, &[0, 2]), 0);
    assert_eq!(call(&mut child, 112, &[]), 3);
    assert_eq!(call(&mut t, 109, &[3, 3]), perm, "another session");
    assert_eq!(call(&mut t, 124, &[3]), 3);
}

#[test]
fn session_leader_takes_the_terminal_with_it() {
    let m = Machine::new();
    let mut t = m.first();
    let mut child = m.fork(&mut t);
    let mut job = m.fork(&mut child);
    m.k.state().tty = crate::linux::process::TtyState::default();
    assert_eq!(m.result(&mut child, 112, &[]), 3);
    super::groups::take_terminal(&mut m.k.state(), 3).unwrap();
    m.k.state().tty.foreground = 2;
    exit(&m, &mut child, 0);
    assert_eq!(m.k.state().tty.session, None);
    assert!(
        matches!(m.go_on(&mut job), Turn::Exited),
        "SIGHUP to the foreground"
    );
}

#[test]
fn futex_wait_sees_a_changed_word_and_a_timeout() {
    let m = Machine::new();
    let mut t = m.first();
    m.mem(&t).write_obj(DATA, &5_u32).unwrap();
    let changed = m.result(&mut t, 202, &[DATA, 0, 6, 0, 0, 0]);
    assert_eq!(changed as u64, errno_value(Errno::AGAIN));
    m.mem(&t).write_obj(DATA + 16, &[0_u64, 0]).unwrap();
    let timeout = m.result(&mut t, 202, &[DATA, 0, 5, DATA + 16, 0, 0]);
    assert_eq!(timeout as u64, errno_value(Errno::TIMEDOUT));
    assert!(m.k.state().futexes.is_empty());
    let bad = m.result(&mut t, 202, &[DATA + 2, 0, 5, 0, 0, 0]);
    assert_eq!(bad as u64, errno_value(Errno::INVAL));
}

#[test]
fn futex_waiter_is_woken_by_a_sharer_of_its_memory() {
    let m = Machine::new();
    let mut t = m.first();
    assert!(matches!(m.call(&mut t, 58, &[]), Turn::Parked(_)));
    let mut child = m.runnable();
    m.mem(&child).write_obj(DATA, &5_u32).unwrap();
    assert!(matches!(
        m.call(&mut child, 202, &[DATA, 0, 5, 0, 0, 0]),
        Turn::Parked(_)
    ));
    assert_eq!(m.with(&mut t, |c| super::futex::wake_one(c, DATA)), 1);
    assert!(matches!(m.go_on(&mut child), Turn::Guest));
    assert_eq!(child.regs.rax, 0);
}

#[test]
fn futex_of_shared_memory_is_one_for_all_processes() {
    let m = Machine::new();
    let mut t = m.first();
    let (at, rw, shared_anonymous_fixed) = (0x5000_0000, 3, 0x31);
    let mapped = m.result(
        &mut t,
        9,
        &[at, 4096, rw, shared_anonymous_fixed, u64::MAX, 0],
    );
    assert_eq!(mapped as u64, at);
    let mut child = m.fork(&mut t);
    let waits = |t: &mut _, op| assert!(matches!(m.call(t, 202, &[at, op, 0, 0]), Turn::Parked(_)));
    let private = 128;
    waits(&mut child, private);
    assert_eq!(m.result(&mut t, 202, &[at, 1, 1]), 0, "it waits privately");
    assert_eq!(m.result(&mut t, 202, &[at, 1 | private, 1]), 0);
    super::futex::forget(&mut m.k.state(), child.tid);
    child.call = None;
    waits(&mut child, 0);
    assert_eq!(m.result(&mut t, 202, &[at + 4, 1, 1]), 0, "another word");
    assert_eq!(m.result(&mut t, 202, &[at, 1, 1]), 1);
    assert!(matches!(m.go_on(&mut child), Turn::Guest));
    assert_eq!(child.regs.rax, 0);
    assert!(m.k.state().futexes.is_empty());
}

#[test]
fn alarm_sends_when_due() {
    let m = Machine::new();
    let mut t = m.first();
    assert_eq!(m.result(&mut t, 37, &[100]), 0);
    let due = super::timers_due(&m.k).unwrap();
    assert!(due > m.k.clock.monotonic());
    assert_eq!(m.result(&mut t, 37, &[0]), 100);
    assert_eq!(super::timers_due(&m.k), None);
    m.k.state().process_mut(2).unwrap().itimer_real = Some((1, 0));
    assert_eq!(super::timers_due(&m.k), None);
    assert!(matches!(m.go_on(&mut t), Turn::Exited));
    assert_eq!(m.k.state().main_status, Some(libc::SIGALRM));
}

#[test]
fn first_program_ends_the_machine() {
    let m = Machine::new();
    let mut t = m.first();
    exit(&m, &mut t, 42);
    assert_eq!(m.k.state().main_status, Some(42 << 8));
    assert!(m.k.sched.has_ended());
}

#[test]
fn pids_are_not_used_again_while_they_name_a_group() {
    let m = Machine::new();
    let mut t = m.first();
    let mut leader = m.fork(&mut t);
    assert_eq!(m.result(&mut leader, 109, &[0, 0]), 0);
    let _member = m.fork(&mut leader);
    exit(&m, &mut leader, 0);
    assert_eq!(wait(&m, &mut t).0, 3);
    m.k.state().next_pid = 3;
    assert_eq!(m.k.state().allocate_pid(), Ok(5));
}

#[test]
fn information_calls_fill_their_structures() {
    let m = Machine::new();
    let mut t = m.first();
    assert_eq!(m.result(&mut t, 63, &[DATA]), 0);
    assert_eq!(m.mem(&t).read_cstr(DATA, 65), Ok(b"Linux".to_vec()));
    assert_eq!(m.result(&mut t, 99, &[DATA]), 0);
    assert_ne!(m.mem(&t).read_obj::<u64>(DATA + 40), Ok(0));
    assert_eq!(m.result(&mut t, 318, &[DATA, 5000, 0]), 5000);
    assert_eq!(m.result(&mut t, 204, &[0, 128, DATA]), 8);
    assert_eq!(m.mem(&t).read_obj::<u64>(DATA), Ok(3));
    let fault = m.result(&mut t, 63, &[0x1000]);
    assert_eq!(fault as u64, errno_value(Errno::FAULT));
    assert_eq!(
        m.result(&mut t, 158, &[0x1002, 1 << 47]) as u64,
        errno_value(Errno::PERM)
    );
}
