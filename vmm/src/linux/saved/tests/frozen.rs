//! A guest that asks to be frozen, and the guests made of it (`/dev/vmm`).

use super::*;
use crate::linux::call::WaitKey;

const FREEZE: &str = "freeze\n";

/// A guest whose freezes somebody else sees to.
fn named() -> Guest {
    let g = Guest::new();
    g.m.k.freezes.allow("warm", Box::new(|| ()));
    g
}

/// Asks for a freeze; the call has not ended.
fn ask(g: &mut Guest, fd: u64) {
    let at = g.text(FREEZE);
    let turn = g.m.call(&mut g.t, libc::SYS_write as u64, &[fd, at, 7]);
    assert!(matches!(turn, Turn::Parked(ref wait) if wait.keys == [g.m.k.freezes.key()]));
    let key = g.m.k.freezes.key();
    assert!(matches!(key, WaitKey::Object(_)));
}

#[test]
fn write_returns_when_the_template_is_there_and_says_who_it_is() {
    let mut g = named();
    let fd = g.open("/dev/vmm", libc::O_RDWR);
    assert_eq!(g.read(fd), "original 0 0 warm\n");
    assert_eq!(g.read(fd), "");
    ask(&mut g, fd);
    // Woken by something else: it is not asked again.
    parked(&g.m.go_on(&mut g.t));
    g.m.k.freezes.cover();
    g.m.k.freezes.settle(&g.m.k.sched, Ok(()));
    assert!(matches!(g.m.go_on(&mut g.t), Turn::Guest));
    assert_eq!(g.t.regs.rax, 7);
    assert_eq!(g.read(fd), "original 0 0 warm\n");
    assert!(!g.m.k.freezes.is_wanted());
}

#[test]
fn failed_freeze_is_an_error_and_can_be_asked_for_again() {
    let mut g = named();
    let fd = g.open("/dev/vmm", libc::O_WRONLY);
    ask(&mut g, fd);
    g.m.k.freezes.fail(&g.m.k.sched, rustix::io::Errno::IO);
    assert!(matches!(g.m.go_on(&mut g.t), Turn::Guest));
    assert_eq!(g.t.regs.rax as i64, -i64::from(libc::EIO));
    ask(&mut g, fd);
}

#[test]
fn signal_does_not_end_the_wait_and_nonblocking_does_not_wait() {
    let mut g = named();
    g.m.handle(&mut g.t, libc::SIGUSR1, 0x40_5000, 0);
    let fd = g.open("/dev/vmm", libc::O_RDWR | libc::O_NONBLOCK);
    let at = g.text(FREEZE);
    for _ in 0..3 {
        let asked = g.m.result(&mut g.t, libc::SYS_write as u64, &[fd, at, 7]);
        assert_eq!(asked, -i64::from(libc::EAGAIN));
    }
    g.m.k.freezes.cover();
    g.m.k.freezes.settle(&g.m.k.sched, Ok(()));
    g.write(fd, FREEZE);
    let fd = g.open("/dev/vmm", libc::O_RDWR);
    ask(&mut g, fd);
    g.m.send(g.t.pid, libc::SIGUSR1);
    parked(&g.m.go_on(&mut g.t));
}

#[test]
fn unnamed_guest_goes_on_and_nonsense_is_refused() {
    let mut g = Guest::new();
    let fd = g.open("/dev/vmm", libc::O_RDWR);
    for text in [FREEZE, "freeze"] {
        g.write(fd, text);
    }
    assert_eq!(g.read(fd), "original 0 0 -\n");
    let text = g.text("freeze freeze");
    for length in [1, 5, 8, 13] {
        let wrong =
            g.m.result(&mut g.t, libc::SYS_write as u64, &[fd, text, length]);
        assert_eq!(wrong, -i64::from(libc::EINVAL), "{length}");
    }
    assert_eq!(g.call(libc::SYS_write, &[fd, text, 0]), 0);
    let moved = g.m.result(&mut g.t, libc::SYS_lseek as u64, &[fd, 0, 0]);
    assert_eq!(moved, -i64::from(libc::ESPIPE));
}

#[test]
fn guest_made_of_it_returns_from_the_write_and_reads_which_one_it_is() {
    let mut g = named();
    let other = g.open("/dev/vmm", libc::O_RDONLY);
    let fd = g.open("/dev/vmm", libc::O_RDWR);
    // Half-way in reading what is not so any more.
    g.call(libc::SYS_read, &[other, BUF, 4]);
    ask(&mut g, fd);
    let (mut g, _) = g.save(Vec::new()).restore();
    assert!(matches!(g.m.go_on(&mut g.t), Turn::Guest));
    assert_eq!(g.t.regs.rax, 7);
    for fd in [fd, other] {
        assert_eq!(g.read(fd), "clone 3 5 warm\nLANG=C\n");
    }
    // Nobody freezes this one.
    g.write(fd, FREEZE);
}
