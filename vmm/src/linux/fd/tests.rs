//! The descriptor calls through the worker's loop.

use super::super::process::Life;
use super::super::signal::sa;
use super::super::testing::{DATA, Machine, Turn};
use super::super::thread::Thread;
use crate::linux::Errno;

const READ: u64 = 0;
const WRITE: u64 = 1;
const CLOSE: u64 = 3;
const POLL: u64 = 7;
const LSEEK: u64 = 8;
const WRITEV: u64 = 20;
const SELECT: u64 = 23;
const NANOSLEEP: u64 = 35;
const SENDFILE: u64 = 40;
const FCNTL: u64 = 72;
const PIPE2: u64 = 293;
const MEMFD_CREATE: u64 = 319;

const NONBLOCK: u64 = 0o4000;
/// Not mapped.
const NOWHERE: u64 = 0x7000_0000;
const BUF: u64 = DATA + 0x1000;
const SMALL: u64 = DATA + 0x100;

fn err(errno: Errno) -> i64 {
    -i64::from(errno.raw_os_error())
}

fn pipe(m: &Machine, t: &mut Thread, flags: u64) -> [u64; 2] {
    assert_eq!(m.result(t, PIPE2, &[SMALL, flags]), 0);
    m.mem(t)
        .read_obj::<[i32; 2]>(SMALL)
        .unwrap()
        .map(|fd| fd as u64)
}

fn parked(turn: &Turn) {
    assert!(matches!(turn, Turn::Parked(_)), "{turn:?}");
}

#[test]
fn bytes_go_through_a_pipe() {
    let m = Machine::new();
    let mut t = m.first();
    let [r, w] = pipe(&m, &mut t, 0);
    assert_eq!([r, w], [0, 1]);
    m.mem(&t).write(BUF, b"hello").unwrap();
    assert_eq!(m.result(&mut t, WRITE, &[w, BUF, 5]), 5);
    assert_eq!(m.result(&mut t, READ, &[r, BUF + 0x100, 100]), 5);
    let got: [u8; 5] = m.mem(&t).read_obj(BUF + 0x100).unwrap();
    assert_eq!(&got, b"hello");
    assert_eq!(m.result(&mut t, READ, &[w, BUF, 1]), err(Errno::BADF));
    assert_eq!(m.result(&mut t, WRITE, &[r, BUF, 1]), err(Errno::BADF));
    assert_eq!(m.result(&mut t, LSEEK, &[r, 0, 0]), err(Errno::SPIPE));
}

#[test]
fn reader_of_an_empty_pipe_waits_for_the_writer() {
    let m = Machine::new();
    let mut t = m.first();
    let [r, w] = pipe(&m, &mut t, 0);
    let mut child = m.fork(&mut t);
    parked(&m.call(&mut t, READ, &[r, BUF, 10]));
    assert_eq!(m.result(&mut child, WRITE, &[w, BUF, 3]), 3);
    assert!(matches!(m.go_on(&mut t), Turn::Guest));
    assert_eq!(t.regs.rax, 3);
    assert_eq!(m.result(&mut child, CLOSE, &[w]), 0);
    parked(&m.call(&mut t, READ, &[r, BUF, 10]));
    t.call = None;
    assert_eq!(m.result(&mut t, CLOSE, &[w]), 0);
    assert_eq!(m.result(&mut t, READ, &[r, BUF, 10]), 0);
}

#[test]
fn bad_buffer_takes_nothing_from_the_pipe() {
    let m = Machine::new();
    let mut t = m.first();
    let [r, w] = pipe(&m, &mut t, NONBLOCK);
    assert_eq!(m.result(&mut t, READ, &[r, BUF, 10]), err(Errno::AGAIN));
    assert_eq!(
        m.result(&mut t, WRITE, &[w, NOWHERE, 10]),
        err(Errno::FAULT)
    );
    assert_eq!(m.result(&mut t, WRITE, &[w, BUF, 10]), 10);
    assert_eq!(m.result(&mut t, READ, &[r, NOWHERE, 10]), err(Errno::FAULT));
    assert_eq!(m.result(&mut t, READ, &[r, BUF, 100]), 10);
}

#[test]
fn write_without_a_reader_is_a_broken_pipe() {
    let m = Machine::new();
    let mut t = m.first();
    let [r, w] = pipe(&m, &mut t, 0);
    assert_eq!(m.result(&mut t, CLOSE, &[r]), 0);
    m.handle(&mut t, libc::SIGPIPE, 0x41_0000, 0);
    let before = t.regs.rsp;
    assert!(matches!(m.call(&mut t, WRITE, &[w, BUF, 1]), Turn::Guest));
    assert_eq!(t.regs.rip, 0x41_0000);
    assert!(t.regs.rsp < before);
}

#[test]
fn large_write_blocks_half_way_and_goes_on() {
    let m = Machine::new();
    let mut t = m.first();
    let [r, w] = pipe(&m, &mut t, 0);
    let mut child = m.fork(&mut t);
    let len = 100_000;
    parked(&m.call(&mut t, WRITE, &[w, DATA, len]));
    assert_eq!(t.call.as_ref().unwrap().progress, 65_536);
    assert_eq!(m.result(&mut child, READ, &[r, DATA, 65_536]), 65_536);
    assert!(matches!(m.go_on(&mut t), Turn::Guest));
    assert_eq!(t.regs.rax, len);
}

#[test]
fn signal_in_a_half_done_write_gives_what_was_written() {
    let m = Machine::new();
    let mut t = m.first();
    let [_r, w] = pipe(&m, &mut t, 0);
    m.handle(&mut t, libc::SIGUSR1, 0x41_0000, sa::RESTART);
    parked(&m.call(&mut t, WRITE, &[w, DATA, 100_000]));
    m.send(2, libc::SIGUSR1);
    assert!(matches!(m.go_on(&mut t), Turn::Guest));
    assert_eq!(t.regs.rip, 0x41_0000);
}

#[test]
fn poll_reports_waits_and_times_out() {
    let m = Machine::new();
    let mut t = m.first();
    let [r, w] = pipe(&m, &mut t, 0);
    let fds = |t: &Thread, fd: u64, events: u16| {
        m.mem(t)
            .write_obj(SMALL, &[fd as u32, u32::from(events)])
            .unwrap();
    };
    let revents = |t: &Thread| m.mem(t).read_obj::<[u16; 4]>(SMALL).unwrap()[3];
    fds(&t, w, 4);
    assert_eq!(m.result(&mut t, POLL, &[SMALL, 1, u64::MAX]), 1);
    assert_eq!(revents(&t), 4);
    fds(&t, r, 1);
    assert_eq!(m.result(&mut t, POLL, &[SMALL, 1, 0]), 0);
    parked(&m.call(&mut t, POLL, &[SMALL, 1, 1]));
    std::thread::sleep(std::time::Duration::from_millis(3));
    assert!(matches!(m.go_on(&mut t), Turn::Guest));
    assert_eq!(t.regs.rax, 0);
    fds(&t, 99, 1);
    assert_eq!(m.result(&mut t, POLL, &[SMALL, 1, u64::MAX]), 1);
    assert_eq!(revents(&t), 0x20);
    assert_eq!(m.result(&mut t, CLOSE, &[w]), 0);
    fds(&t, r, 1);
    assert_eq!(m.result(&mut t, POLL, &[SMALL, 1, u64::MAX]), 1);
    assert_eq!(revents(&t), 0x10);
}

#[test]
fn select_reports_ready_bits_and_closed_descriptors() {
    let m = Machine::new();
    let mut t = m.first();
    let [r, w] = pipe(&m, &mut t, 0);
    let sets = [SMALL, SMALL + 128];
    m.mem(&t).write(SMALL, &[0; 256]).unwrap();
    m.mem(&t).write_obj(sets[0], &(1_u64 << r)).unwrap();
    m.mem(&t).write_obj(sets[1], &(1_u64 << w)).unwrap();
    assert_eq!(m.result(&mut t, SELECT, &[2, sets[0], sets[1], 0, 0]), 1);
    let read = |t: &Thread, at| m.mem(t).read_obj::<u64>(at).unwrap();
    assert_eq!((read(&t, sets[0]), read(&t, sets[1])), (0, 2));
    m.mem(&t).write_obj(sets[0], &(1_u64 << 9)).unwrap();
    assert_eq!(
        m.result(&mut t, SELECT, &[10, sets[0], 0, 0, 0]),
        err(Errno::BADF)
    );
}

#[test]
fn interrupted_sleep_tells_what_is_left() {
    let m = Machine::new();
    let mut t = m.first();
    m.mem(&t).write_obj(BUF, &[10_u64, 0]).unwrap();
    m.handle(&mut t, libc::SIGUSR1, 0x41_0000, sa::RESTART);
    parked(&m.call(&mut t, NANOSLEEP, &[BUF, BUF + 16]));
    m.send(2, libc::SIGUSR1);
    assert!(matches!(m.go_on(&mut t), Turn::Guest));
    let [sec, _]: [u64; 2] = m.mem(&t).read_obj(BUF + 16).unwrap();
    assert!(sec == 9, "{sec}");
}

#[test]
fn record_lock_is_waited_for_and_goes_with_its_process() {
    const SETLK: u64 = 6;
    const SETLKW: u64 = 7;
    let m = Machine::new();
    let mut t = m.first();
    m.mem(&t).write(SMALL, b"f\0").unwrap();
    let fd = m.result(&mut t, MEMFD_CREATE, &[SMALL, 0]) as u64;
    let mut flock = [0_u8; 32];
    flock[0] = 1;
    m.mem(&t).write(BUF, &flock).unwrap();
    let mut child = m.fork(&mut t);
    assert_eq!(m.result(&mut t, FCNTL, &[fd, SETLK, BUF]), 0);
    assert_eq!(
        m.result(&mut child, FCNTL, &[fd, SETLK, BUF]),
        err(Errno::AGAIN)
    );
    parked(&m.call(&mut child, FCNTL, &[fd, SETLKW, BUF]));
    assert_eq!(m.result(&mut t, CLOSE, &[fd]), 0);
    assert!(matches!(m.go_on(&mut child), Turn::Guest));
    assert_eq!(child.regs.rax, 0);
    let mut other = m.fork(&mut t);
    assert!(matches!(m.call(&mut child, 231, &[0]), Turn::Exited));
    assert!(matches!(
        m.k.state().process(child.pid).unwrap().life,
        Life::Zombie(0)
    ));
    m.mem(&other).write(SMALL, b"g\0").unwrap();
    assert!(m.result(&mut other, MEMFD_CREATE, &[SMALL, 0]) >= 0);
}

#[test]
fn file_in_memory_keeps_an_offset_and_is_sent_to_a_pipe() {
    let m = Machine::new();
    let mut t = m.first();
    m.mem(&t).write(SMALL, b"f\0").unwrap();
    let fd = m.result(&mut t, MEMFD_CREATE, &[SMALL, 0]) as u64;
    m.mem(&t).write(BUF, b"abcdefgh").unwrap();
    let iov = [BUF, 3, BUF + 3, 5];
    m.mem(&t).write_obj(SMALL, &iov).unwrap();
    assert_eq!(m.result(&mut t, WRITEV, &[fd, SMALL, 2]), 8);
    assert_eq!(m.result(&mut t, READ, &[fd, BUF, 8]), 0);
    assert_eq!(m.result(&mut t, LSEEK, &[fd, 2, 0]), 2);
    assert_eq!(m.result(&mut t, READ, &[fd, NOWHERE, 8]), err(Errno::FAULT));
    let [r, w] = pipe(&m, &mut t, 0);
    assert_eq!(m.result(&mut t, SENDFILE, &[w, fd, 0, 100]), 6);
    assert_eq!(m.result(&mut t, LSEEK, &[fd, 0, 1]), 8);
    assert_eq!(m.result(&mut t, READ, &[r, BUF, 100]), 6);
    let got: [u8; 6] = m.mem(&t).read_obj(BUF).unwrap();
    assert_eq!(&got, b"cdefgh");
}
