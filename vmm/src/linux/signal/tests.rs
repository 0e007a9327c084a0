//! Signals through the worker's loop, on real guest memory.

use super::frame::{RtSigframe, UC_OFFSET};
use super::{bit, errno_value, sa};
use crate::linux::Errno;
use crate::linux::process::Life;
use crate::linux::testing::{DATA, Machine, STACK, TEXT, Turn, XSAVE};
use crate::linux::thread::{Fpu, Thread};

const HANDLER: u64 = 0x40_2000;
const USR1: i32 = libc::SIGUSR1;
const USR2: i32 = libc::SIGUSR2;

fn frame(m: &Machine, t: &Thread) -> RtSigframe {
    m.mem(t).read_obj(t.regs.rsp).unwrap()
}

/// What the handler's `ret` and the restorer do.
fn sigreturn(m: &Machine, t: &mut Thread) -> Turn {
    t.regs.rsp += 8;
    m.call(t, 15, &[])
}

fn is_parked(turn: &Turn) -> bool {
    matches!(turn, Turn::Parked(_))
}

#[test]
fn handler_runs_and_sigreturn_brings_everything_back() {
    let m = Machine::new();
    let mut t = m.first();
    m.handle(&mut t, USR1, HANDLER, sa::SIGINFO);
    (t.regs.rcx, t.regs.r11, t.regs.rbx) = (11, 12, 13);
    (t.regs.rax, t.regs.rflags) = (99, 0x246);
    t.last_trap = (14, 6, 0x1234);
    let before = t.regs;
    m.send(2, USR1);
    assert!(matches!(m.go_on(&mut t), Turn::Guest));
    assert_eq!((t.regs.rip, t.regs.rdi), (HANDLER, USR1 as u64));
    assert_eq!(t.regs.rdx, t.regs.rsp + UC_OFFSET);
    assert_eq!(t.mask, bit(USR1));
    let f = frame(&m, &t);
    assert_eq!(
        (f.pretcode, f.uc.mcontext.ip, f.uc.sigmask),
        (0x40_1000, TEXT, 0)
    );
    assert_eq!((f.uc.mcontext.trapno, f.uc.mcontext.cr2), (14, 0x1234));
    assert_eq!(f.info[0], USR1 as u8);
    assert!(matches!(sigreturn(&m, &mut t), Turn::Guest));
    assert_eq!(t.regs, before);
    assert_eq!(t.mask, 0);
}

#[test]
fn two_signals_make_nested_frames() {
    let m = Machine::new();
    let mut t = m.first();
    m.handle(&mut t, USR1, HANDLER, 0);
    m.handle(&mut t, USR2, HANDLER + 16, 0);
    m.send(2, USR1);
    m.send(2, USR2);
    m.go_on(&mut t);
    assert_eq!(t.regs.rip, HANDLER + 16);
    assert_eq!(frame(&m, &t).uc.mcontext.ip, HANDLER);
    sigreturn(&m, &mut t);
    assert_eq!(t.regs.rip, HANDLER);
    sigreturn(&m, &mut t);
    assert_eq!((t.regs.rip, t.regs.rsp, t.mask), (TEXT, STACK, 0));
}

#[test]
fn pause_ends_with_eintr_even_with_restart() {
    let m = Machine::new();
    let mut t = m.first();
    m.handle(&mut t, USR1, HANDLER, sa::RESTART);
    assert!(is_parked(&m.call(&mut t, 34, &[])));
    m.send(2, USR1);
    assert!(matches!(m.go_on(&mut t), Turn::Guest));
    let f = frame(&m, &t);
    assert_eq!(f.uc.mcontext.ax, errno_value(Errno::INTR));
    assert_eq!(f.uc.mcontext.ip, TEXT);
}

#[test]
fn wait_restarts_or_ends_by_the_handlers_flag() {
    for (flags, ip, ax) in [
        (sa::RESTART, TEXT - 2, 61),
        (0, TEXT, errno_value(Errno::INTR)),
    ] {
        let m = Machine::new();
        let mut t = m.first();
        let _child = m.fork(&mut t);
        m.handle(&mut t, USR1, HANDLER, flags);
        assert!(is_parked(&m.call(&mut t, 61, &[u64::MAX, 0, 0, 0])));
        m.send(2, USR1);
        assert!(matches!(m.go_on(&mut t), Turn::Guest));
        let context = frame(&m, &t).uc.mcontext;
        assert_eq!((context.ip, context.ax), (ip, ax));
    }
}

#[test]
fn ignored_signal_leaves_the_blocked_call_alone() {
    let m = Machine::new();
    let mut t = m.first();
    let _child = m.fork(&mut t);
    assert!(is_parked(&m.call(&mut t, 61, &[u64::MAX, 0, 0, 0])));
    m.send(2, libc::SIGWINCH);
    assert!(is_parked(&m.go_on(&mut t)));
    assert_eq!(t.call.as_ref().map(|c| c.nr), Some(61));
}

#[test]
fn fatal_signal_ends_a_blocked_process() {
    let m = Machine::new();
    let mut t = m.first();
    assert!(is_parked(&m.call(&mut t, 34, &[])));
    m.send(2, libc::SIGTERM);
    assert!(matches!(m.go_on(&mut t), Turn::Exited));
    assert_eq!(m.k.state().main_status, Some(libc::SIGTERM));
    assert!(m.k.sched.has_ended());
}

#[test]
fn sigsuspend_runs_the_handler_and_restores_the_mask() {
    let m = Machine::new();
    let mut t = m.first();
    m.handle(&mut t, USR1, HANDLER, 0);
    m.mem(&t).write_obj(DATA, &bit(USR1)).unwrap();
    assert_eq!(
        m.result(&mut t, 14, &[libc::SIG_BLOCK as u64, DATA, 0, 8]),
        0
    );
    m.send(2, USR1);
    assert!(matches!(m.go_on(&mut t), Turn::Guest));
    assert_eq!(t.regs.rip, TEXT, "blocked");
    m.mem(&t).write_obj(DATA, &0_u64).unwrap();
    assert!(matches!(m.call(&mut t, 130, &[DATA, 8]), Turn::Guest));
    assert_eq!((t.regs.rip, t.saved_mask), (HANDLER, None));
    assert_eq!(frame(&m, &t).uc.mcontext.ax, errno_value(Errno::INTR));
    sigreturn(&m, &mut t);
    assert_eq!(t.mask, bit(USR1));
}

#[test]
fn sigtimedwait_takes_a_blocked_signal() {
    let m = Machine::new();
    let mut t = m.first();
    m.mem(&t).write_obj(DATA, &bit(libc::SIGCHLD)).unwrap();
    assert_eq!(
        m.result(&mut t, 14, &[libc::SIG_BLOCK as u64, DATA, 0, 8]),
        0
    );
    assert!(is_parked(&m.call(&mut t, 128, &[DATA, DATA + 64, 0, 8])));
    m.send(2, libc::SIGCHLD);
    assert!(matches!(m.go_on(&mut t), Turn::Guest));
    assert_eq!(t.regs.rax, libc::SIGCHLD as u64);
    m.mem(&t).write_obj(DATA + 256, &[0_u64, 0]).unwrap();
    let timeout = m.result(&mut t, 128, &[DATA, 0, DATA + 256, 8]);
    assert_eq!(timeout as u64, errno_value(Errno::AGAIN));
}

#[test]
fn stop_parks_until_continued_and_kill_ends_it() {
    let m = Machine::new();
    let mut parent = m.first();
    let mut t = m.fork(&mut parent);
    m.send(3, libc::SIGSTOP);
    assert!(is_parked(&m.go_on(&mut t)));
    assert_eq!(
        m.k.state().process(3).unwrap().life,
        Life::Stopped(libc::SIGSTOP)
    );
    m.send(3, USR1);
    assert!(is_parked(&m.go_on(&mut t)), "other signals wait");
    m.send(3, libc::SIGCONT);
    assert!(matches!(m.go_on(&mut t), Turn::Exited), "then USR1 kills");
    let mut t = m.fork(&mut parent);
    m.send(4, libc::SIGSTOP);
    assert!(is_parked(&m.go_on(&mut t)));
    m.send(4, libc::SIGKILL);
    assert!(matches!(m.go_on(&mut t), Turn::Exited));
    let life = m.k.state().process(4).unwrap().life;
    assert_eq!(life, Life::Zombie(libc::SIGKILL));
}

#[test]
fn terminal_stop_of_an_orphaned_group_is_dropped() {
    let m = Machine::new();
    let mut t = m.first();
    m.send(2, libc::SIGTSTP);
    assert!(matches!(m.go_on(&mut t), Turn::Guest));
    assert_eq!(m.k.state().process(2).unwrap().life, Life::Running);
}

#[test]
fn handler_for_one_time_is_reset() {
    let m = Machine::new();
    let mut t = m.first();
    m.handle(&mut t, USR1, HANDLER, sa::RESETHAND | sa::NODEFER);
    m.send(2, USR1);
    assert!(matches!(m.go_on(&mut t), Turn::Guest));
    assert_eq!(t.mask, 0);
    m.send(2, USR1);
    assert!(matches!(m.go_on(&mut t), Turn::Exited));
}

#[test]
fn no_stack_for_the_frame_is_fatal() {
    let m = Machine::new();
    let mut t = m.first();
    m.handle(&mut t, USR1, HANDLER, 0);
    m.handle(&mut t, libc::SIGSEGV, HANDLER, 0);
    t.regs.rsp = 0x5000_0000;
    m.send(2, USR1);
    assert!(matches!(m.go_on(&mut t), Turn::Exited));
    assert_eq!(m.k.state().main_status, Some(libc::SIGSEGV));
}

#[test]
fn fault_while_blocked_kills_despite_a_handler() {
    let m = Machine::new();
    let mut t = m.first();
    m.handle(&mut t, libc::SIGSEGV, HANDLER, 0);
    let info = crate::linux::process::SigInfo::fault(libc::SIGSEGV, 1, 0x77);
    m.with(&mut t, |c| super::fault(c, info));
    assert!(matches!(m.go_on(&mut t), Turn::Guest));
    assert_eq!(frame(&m, &t).info[16], 0x77);
    m.with(&mut t, |c| super::fault(c, info));
    assert!(matches!(m.go_on(&mut t), Turn::Exited));
}

#[test]
fn handler_on_an_alternate_stack_and_back() {
    let m = Machine::new();
    let mut t = m.first();
    m.mem(&t)
        .write_obj(DATA + 512, &[DATA + 0x1000, 0, 0x4000])
        .unwrap();
    assert_eq!(m.result(&mut t, 131, &[DATA + 512, 0]), 0);
    m.handle(&mut t, USR1, HANDLER, sa::ONSTACK);
    m.send(2, USR1);
    m.go_on(&mut t);
    assert!((DATA + 0x1000..DATA + 0x5000).contains(&t.regs.rsp));
    let change = m.result(&mut t, 131, &[DATA + 512, 0]);
    assert_eq!(change as u64, errno_value(Errno::PERM));
    sigreturn(&m, &mut t);
    assert_eq!(t.regs.rsp, STACK);
    assert_eq!((t.altstack.base, t.altstack.size), (DATA + 0x1000, 0x4000));
}

/// Runs a handler whose frame `spoil` changes before it returns.
fn hostile(spoil: impl FnOnce(&mut RtSigframe)) -> Turn {
    let m = Machine::new();
    let mut t = m.first();
    m.handle(&mut t, USR1, HANDLER, 0);
    m.send(2, USR1);
    m.go_on(&mut t);
    let mut f = frame(&m, &t);
    spoil(&mut f);
    m.mem(&t).write_obj(t.regs.rsp, &f).unwrap();
    sigreturn(&m, &mut t)
}

#[test]
fn hostile_frames_end_with_a_fault() {
    assert!(matches!(hostile(|_| ()), Turn::Guest));
    assert!(matches!(
        hostile(|f| f.uc.mcontext.ip = 1 << 63),
        Turn::Exited
    ));
    assert!(matches!(
        hostile(|f| f.uc.mcontext.sp = 0x7fff_ffff_f000),
        Turn::Exited
    ));
    assert!(matches!(
        hostile(|f| f.uc.mcontext.fpstate += 8),
        Turn::Exited
    ));
    assert!(matches!(
        hostile(|f| f.uc.mcontext.fpstate = u64::MAX - 63),
        Turn::Exited
    ));
    assert!(matches!(
        hostile(|f| f.uc.mcontext.fpstate = 0),
        Turn::Guest
    ));
    assert!(matches!(hostile(|f| f.uc.stack.flags = 77), Turn::Guest));
}

#[test]
fn sigreturn_without_a_frame_is_a_fault() {
    for rsp in [0, 7, u64::MAX, 1 << 62, 0x5000_0000] {
        let m = Machine::new();
        let mut t = m.first();
        t.regs.rsp = rsp;
        assert!(matches!(m.call(&mut t, 15, &[]), Turn::Exited), "{rsp:x}");
    }
}

#[test]
fn unblockable_signals_stay_unblocked() {
    let m = Machine::new();
    let mut t = m.first();
    m.mem(&t).write_obj(DATA, &u64::MAX).unwrap();
    assert_eq!(
        m.result(&mut t, 14, &[libc::SIG_SETMASK as u64, DATA, DATA + 8, 8]),
        0
    );
    assert_eq!(t.mask, !super::UNBLOCKABLE);
    m.mem(&t)
        .write_obj(DATA, &[HANDLER, sa::RESTORER, 0, 0])
        .unwrap();
    let kill = m.result(&mut t, 13, &[libc::SIGKILL as u64, DATA, 0, 8]);
    assert_eq!(kill as u64, errno_value(Errno::INVAL));
}

/// Deterministic noise (xorshift64).
fn noise(seed: &mut u64) -> u64 {
    *seed ^= *seed << 13;
    *seed ^= *seed >> 7;
    *seed ^= *seed << 17;
    *seed
}

#[test]
fn random_damage_to_a_frame_never_gets_bad_state_through() {
    let mut seed = 0x9e37_79b9_7f4a_7c15;
    let mut survived = 0;
    for _ in 0..300 {
        let m = Machine::new();
        let mut t = m.first();
        m.handle(&mut t, USR1, HANDLER, 0);
        m.send(2, USR1);
        m.go_on(&mut t);
        // From the return address up to the interrupted stack: frame, gap and XSAVE area.
        let (start, room) = (t.regs.rsp, STACK - t.regs.rsp);
        for _ in 0..=noise(&mut seed) % 4 {
            let at = start + noise(&mut seed) % room;
            let byte = noise(&mut seed) as u8;
            m.mem(&t).write_obj(at, &byte).unwrap();
        }
        if !matches!(sigreturn(&m, &mut t), Turn::Guest) {
            continue;
        }
        survived += 1;
        assert!(t.regs.rip < super::frame::USER_END && t.regs.rsp < super::frame::USER_END);
        assert_eq!(t.regs.rflags & !0x24_0cd5, 0x202);
        assert_eq!(t.mask & super::UNBLOCKABLE, 0);
        let Fpu::Saved(area) = &t.fpu else { continue };
        assert_eq!(area.0.len(), XSAVE);
        assert_eq!(area.0[512] & !7, 0, "only components there are");
        assert!(area.0[513..576].iter().all(|&b| b == 0));
        assert!(area.0[26..28].iter().all(|&b| b == 0), "MXCSR");
    }
    assert!(survived > 50, "{survived} of 300");
}
