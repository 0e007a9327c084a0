//! Each kind of record, there and back.

use super::*;

/// A guest with one of everything; its descriptors by what they are.
pub(super) fn busy() -> (Guest, Vec<Thread>) {
    let mut g = Guest::new();
    files(&mut g);
    streams(&mut g);
    sockets(&mut g);
    mappings(&mut g);
    signals(&mut g);
    let others = people(&mut g);
    (g, others)
}

fn files(g: &mut Guest) {
    let path = g.text("/d");
    g.call(libc::SYS_mkdir, &[path, 0o755]);
    let file = g.open("/d/file", libc::O_CREAT | libc::O_RDWR);
    g.write(file, "hello");
    g.keep("file", file);
    g.call(libc::SYS_lseek, &[file, 2, 0]);
    g.call(libc::SYS_dup2, &[file, 40]);
    g.call(libc::SYS_flock, &[file, libc::LOCK_EX as u64]);
    let gone = g.open("/tmp/gone", libc::O_CREAT | libc::O_RDWR);
    g.write(gone, "no name");
    g.keep("gone", gone);
    let path = g.text("/tmp/gone");
    g.call(libc::SYS_unlink, &[path]);
    let host = g.open("/host/log", libc::O_CREAT | libc::O_RDWR | libc::O_APPEND);
    g.write(host, "line");
    g.keep("log", host);
    // struct flock: F_WRLCK, SEEK_SET, 1 to 2.
    let lock: [u64; 4] = [libc::F_WRLCK as u64, 1, 1, 0];
    g.m.mem(&g.t).write_obj(AT, &lock).unwrap();
    g.call(libc::SYS_fcntl, &[host, libc::F_SETLK as u64, AT]);
    let orphan = g.open("/host/orphan", libc::O_CREAT | libc::O_RDWR);
    g.call(libc::SYS_ftruncate, &[orphan, 1 << 40]);
    g.write(orphan, "deleted");
    g.keep("orphan", orphan);
    let path = g.text("/host/orphan");
    g.call(libc::SYS_unlink, &[path]);
    let directory = g.open("/d", libc::O_RDONLY | libc::O_DIRECTORY);
    g.call(libc::SYS_getdents64, &[directory, BUF, 64]);
    g.open("/proc/self/status", libc::O_RDONLY);
    g.open("/dev/null", libc::O_RDWR);
    g.open("/d", libc::O_PATH);
    let path = g.text("/d");
    g.call(libc::SYS_chdir, &[path]);
    g.call(libc::SYS_umask, &[0o27]);
}

fn streams(g: &mut Guest) {
    let [r, w] = g.pipe();
    g.write(w, "in the pipe");
    g.keep("pipe", r);
    let path = g.text("/fifo");
    g.call(
        libc::SYS_mknod,
        &[path, u64::from(libc::S_IFIFO | 0o600), 0],
    );
    let fifo = g.open("/fifo", libc::O_RDWR);
    g.write(fifo, "in the fifo");
    g.keep("fifo", fifo);
    let event = g.call(libc::SYS_eventfd2, &[5, 0]);
    g.keep("event", event);
    let timer = g.call(libc::SYS_timerfd_create, &[1, 0]);
    g.keep("timer", timer);
    let hundred_seconds: [u64; 4] = [1, 0, 100, 0];
    g.m.mem(&g.t).write_obj(AT, &hundred_seconds).unwrap();
    g.call(libc::SYS_timerfd_settime, &[timer, 0, AT, 0]);
    let epoll = g.call(libc::SYS_epoll_create1, &[0]);
    for (fd, events) in [(r, libc::EPOLLIN | libc::EPOLLET), (event, libc::EPOLLIN)] {
        let event: [u32; 3] = [events as u32, fd as u32, 0];
        g.m.mem(&g.t).write_obj(AT, &event).unwrap();
        g.call(libc::SYS_epoll_ctl, &[epoll, 1, fd, AT]);
    }
    assert_eq!(g.call(libc::SYS_epoll_wait, &[epoll, BUF, 8, 0]), 2);
}

fn sockets(g: &mut Guest) {
    let (unix, stream) = (libc::AF_UNIX as u64, libc::SOCK_STREAM as u64);
    g.call(libc::SYS_socketpair, &[unix, stream, 0, AT]);
    let [a, b] = g.pair();
    g.write(a, "in the socket");
    g.keep("socket", b);
    g.call(libc::SYS_shutdown, &[b, 1]);
    let mut address = [0; 16];
    address[..8].copy_from_slice(b"\x01\0/sock\0");
    let connection = |g: &mut Guest, domain: u64, address: [u8; 16], length| {
        let listener = g.call(libc::SYS_socket, &[domain, stream, 0]);
        g.m.mem(&g.t).write(AT, &address).unwrap();
        g.call(libc::SYS_bind, &[listener, AT, length]);
        g.call(libc::SYS_listen, &[listener, 4]);
        let client = g.call(libc::SYS_socket, &[domain, stream, 0]);
        g.m.mem(&g.t).write(AT, &address).unwrap();
        g.call(libc::SYS_connect, &[client, AT, length]);
        g.write(client, "early");
        listener
    };
    let listener = connection(g, unix, address, 8);
    g.keep("unix", listener);
    let mut address = [0; 16];
    address[..8].copy_from_slice(&[2, 0, 0x1f, 0x90, 127, 0, 0, 1]);
    let listener = connection(g, libc::AF_INET as u64, address, 16);
    g.keep("tcp", listener);
}

/// Where the mappings are.
const SHARED: u64 = 0x3000_0000;
const MEMFD: u64 = 0x3010_0000;
const PRIVATE: u64 = 0x3020_0000;
const WIPED: u64 = 0x3030_0000;

/// Where the random bytes are.
const RANDOM: u64 = DATA + 0xa00;

fn mappings(g: &mut Guest) {
    let auxv = [25, RANDOM, 0, 0].map(u64::to_le_bytes);
    g.t.mm.layout.lock().auxv = auxv.concat();
    g.poke(RANDOM, 1);
    let fixed = libc::MAP_FIXED as u64;
    let rw = 3;
    let map = |g: &mut Guest, at: u64, flags: i32, fd: u64| {
        let flags = flags as u64 | fixed;
        assert_eq!(g.call(libc::SYS_mmap, &[at, 8192, rw, flags, fd, 0]), at);
        g.poke(at, at as u32);
    };
    let none = u64::MAX;
    map(g, SHARED, libc::MAP_SHARED | libc::MAP_ANONYMOUS, none);
    map(g, WIPED, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, none);
    g.call(
        libc::SYS_madvise,
        &[WIPED, 8192, libc::MADV_WIPEONFORK as u64],
    );
    let name = g.text("fd");
    let memfd = g.call(libc::SYS_memfd_create, &[name, 0]);
    g.call(libc::SYS_ftruncate, &[memfd, 8192]);
    map(g, MEMFD, libc::MAP_SHARED, memfd);
    g.call(libc::SYS_close, &[memfd]);
    let file = g.open("/host/data", libc::O_CREAT | libc::O_RDWR);
    g.call(libc::SYS_ftruncate, &[file, 8192]);
    map(g, PRIVATE, libc::MAP_PRIVATE, file);
}

fn signals(g: &mut Guest) {
    g.m.handle(&mut g.t, libc::SIGUSR1, 0x40_5000, 0);
    let mask = crate::linux::signal::bit(libc::SIGUSR1);
    g.m.mem(&g.t).write_obj(AT, &mask).unwrap();
    g.call(libc::SYS_rt_sigprocmask, &[0, AT, 0, 8]);
    g.call(libc::SYS_kill, &[2, libc::SIGUSR1 as u64]);
    let stack: [u64; 3] = [BUF, 0, 0x2000];
    g.m.mem(&g.t).write_obj(AT, &stack).unwrap();
    g.call(libc::SYS_sigaltstack, &[AT, 0]);
    let timer: [u64; 4] = [0, 0, 50, 0];
    g.m.mem(&g.t).write_obj(AT, &timer).unwrap();
    g.call(libc::SYS_setitimer, &[0, AT, 0]);
    g.call(libc::SYS_timer_create, &[1, 0, AT]);
    g.m.mem(&g.t).write_obj(BUF, &timer).unwrap();
    g.call(libc::SYS_timer_settime, &[0, 0, BUF, 0]);
    g.m.mem(&g.t).write_obj(AT, &mask).unwrap();
    let signals = g.call(libc::SYS_signalfd4, &[u64::MAX, AT, 8, 0]);
    g.fds.insert("signals", signals);
    g.call(libc::SYS_set_tid_address, &[DATA + 0x700]);
    g.call(libc::SYS_set_robust_list, &[DATA + 0x800, 24]);
    let name = g.text("renamed");
    g.call(libc::SYS_prctl, &[libc::PR_SET_NAME as u64, name]);
}

/// A word that a thread waits for.
const WORD: u64 = DATA + 0x900;

/// A zombie, a child that waits for a pipe, and a thread that waits for a word.
fn people(g: &mut Guest) -> Vec<Thread> {
    let mut zombie = g.m.fork(&mut g.t);
    let ends = g.m.call(&mut zombie, libc::SYS_exit_group as u64, &[7]);
    assert!(matches!(ends, Turn::Exited));
    drop(zombie);
    g.call(libc::SYS_pipe2, &[AT, 0]);
    let [r, w] = g.pair();
    g.call(libc::SYS_dup2, &[w, 50]);
    g.call(libc::SYS_close, &[w]);
    let mut child = g.m.fork(&mut g.t);
    parked(&g.m.call(&mut child, libc::SYS_read as u64, &[r, BUF, 16]));
    let flags = libc::CLONE_VM | libc::CLONE_FS | libc::CLONE_FILES | libc::CLONE_SIGHAND;
    let flags = (flags | libc::CLONE_THREAD | libc::CLONE_SYSVSEM) as u64;
    g.call(libc::SYS_clone, &[flags, DATA + 0x7000, 0, 0, 0]);
    let mut thread = g.m.runnable();
    g.poke(WORD, 5);
    parked(&g.m.call(&mut thread, libc::SYS_futex as u64, &[WORD, 0, 5, 0]));
    let mut other = g.m.fork(&mut g.t);
    let word = SHARED + 64;
    parked(&g.m.call(&mut other, libc::SYS_futex as u64, &[word, 0, 0, 0]));
    vec![*child, *thread, *other]
}

#[test]
fn guest_with_everything_is_the_same_when_it_is_made_again() {
    let (g, others) = busy();
    let mut saved = g.save(others);
    let m = again(&saved.records, &mut saved.image).unwrap();
    m.k.sched.stop();
    let mut second = Image::new(&m.k.memory);
    let records = save(&m.k, &mut second).unwrap();
    assert_eq!(saved.records, like(&records, &saved.records));
}

#[test]
fn streams_and_files_have_what_was_in_them() {
    let (g, others) = busy();
    let (mut g, _others) = g.save(others).restore();
    for (name, text) in [
        ("pipe", "in the pipe"),
        ("fifo", "in the fifo"),
        ("socket", "in the socket"),
    ] {
        let fd = g.fds[name];
        assert_eq!(g.read(fd), text);
    }
    for name in ["unix", "tcp"] {
        let listener = g.fds[name];
        let accepted = g.call(libc::SYS_accept, &[listener, 0, 0]);
        assert_eq!(g.read(accepted), "early");
    }
    let (event, timer, file) = (g.fds["event"], g.fds["timer"], g.fds["file"]);
    assert_eq!(g.read(event), "\u{5}\0\0\0\0\0\0\0");
    g.call(libc::SYS_timerfd_gettime, &[timer, BUF]);
    let [interval, _, left, _]: [u64; 4] = g.m.mem(&g.t).read_obj(BUF).unwrap();
    assert!(interval == 1 && (90..100).contains(&left), "{left}");
    assert_eq!(g.call(libc::SYS_lseek, &[40, 0, 1]), 2);
    assert_eq!(g.read(file), "llo");
    let orphan = g.fds["orphan"];
    assert_eq!(g.call(libc::SYS_lseek, &[orphan, 0, 2]), 1 << 40);
    g.call(libc::SYS_lseek, &[orphan, 0, 0]);
    g.call(libc::SYS_ftruncate, &[orphan, 7]);
    assert_eq!(g.read(orphan), "deleted");
    let (gone, log) = (g.fds["gone"], g.fds["log"]);
    g.call(libc::SYS_lseek, &[gone, 0, 0]);
    assert_eq!(g.read(gone), "no name");
    g.write(log, "!");
    assert_eq!(std::fs::read(g.host.path().join("log")).unwrap(), b"line!");
    g.call(libc::SYS_getcwd, &[BUF, 100]);
    assert_eq!(g.peek(BUF) & 0xff_ffff, u32::from_ne_bytes(*b"/d\0\0"));
    let other = g.open("/d/file", libc::O_RDWR);
    let taken = g.m.result(&mut g.t, libc::SYS_flock as u64, &[other, 6]);
    assert_eq!(taken, -i64::from(libc::EAGAIN), "the flock is held");
}

#[test]
fn mappings_are_shared_as_they_were_and_wiped_where_asked() {
    let (g, others) = busy();
    let (g, others) = g.save(others).restore();
    for at in [SHARED, MEMFD, PRIVATE] {
        assert_eq!(g.peek(at), at as u32, "{at:#x}");
    }
    assert_eq!(g.peek(WIPED), 0);
    assert_ne!(g.peek(RANDOM), 1);
    g.poke(SHARED, 1234);
    g.poke(MEMFD, 5678);
    g.poke(PRIVATE, 9);
    let child = g.m.mem(&others[0]);
    let seen = [SHARED, MEMFD, PRIVATE].map(|at| child.read_obj::<u32>(at).unwrap());
    assert_eq!(seen, [1234, 5678, PRIVATE as u32]);
    assert_eq!(g.m.k.identity.get(), Some(&identity()));
}

#[test]
fn those_who_wait_go_on_waiting_and_are_woken() {
    let (g, others) = busy();
    let (mut g, mut others) = g.save(others).restore();
    for t in &mut others {
        parked(&g.m.go_on(t));
    }
    g.write(50, "x");
    for word in [WORD, SHARED + 64] {
        assert_eq!(
            g.call(libc::SYS_futex, &[word, libc::FUTEX_WAKE as u64, 9]),
            1
        );
    }
    let results: Vec<_> = others
        .iter_mut()
        .map(|t| match g.m.go_on(t) {
            Turn::Guest => t.regs.rax,
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(results, [1, 0, 0]);
}

#[test]
fn family_signals_and_timers_are_as_they_were() {
    let (g, others) = busy();
    let (mut g, mut others) = g.save(others).restore();
    assert_eq!(g.call(libc::SYS_wait4, &[u64::MAX, AT, 1, 0]), 3);
    assert_eq!(g.peek(AT), 7 << 8);
    g.call(libc::SYS_getitimer, &[0, AT]);
    let [.., left, _]: [u64; 4] = g.m.mem(&g.t).read_obj(AT).unwrap();
    assert!((40..50).contains(&left), "{left}");
    g.call(libc::SYS_timer_gettime, &[0, AT]);
    let [.., left, _]: [u64; 4] = g.m.mem(&g.t).read_obj(AT).unwrap();
    assert!((40..50).contains(&left), "{left}");
    let signals = g.fds["signals"];
    assert_eq!(g.call(libc::SYS_read, &[signals, AT, 128]), 128);
    assert_eq!(g.peek(AT), libc::SIGUSR1 as u32);
    g.call(libc::SYS_kill, &[2, libc::SIGUSR1 as u64]);
    let lock: [u64; 4] = [libc::F_WRLCK as u64, 0, 0, 0];
    let child = &mut others[0];
    g.m.mem(child).write_obj(AT, &lock).unwrap();
    child.call = None;
    let log = g.fds["log"];
    let held = g.m.result(
        child,
        libc::SYS_fcntl as u64,
        &[log, libc::F_SETLK as u64, AT],
    );
    assert_eq!(held, -i64::from(libc::EAGAIN), "the record lock is held");
    g.poke(AT, 0);
    g.poke(AT + 4, 0);
    // SIG_SETMASK: what is pending runs its handler.
    g.call(libc::SYS_rt_sigprocmask, &[2, AT, 0, 8]);
    assert!(matches!(g.m.go_on(&mut g.t), Turn::Guest));
    assert_eq!(g.t.regs.rip, 0x40_5000);
}

#[test]
fn file_that_changed_or_went_is_refused() {
    let change = |host: &std::path::Path| std::fs::write(host.join("data"), b"another").unwrap();
    let remove = |host: &std::path::Path| std::fs::remove_file(host.join("log")).unwrap();
    for spoil in [&change as &dyn Fn(&std::path::Path), &remove] {
        let (g, others) = busy();
        let mut saved = g.save(others);
        spoil(saved.host.path());
        let refused = again(&saved.records, &mut saved.image)
            .map(drop)
            .unwrap_err();
        let text = refused.to_string();
        assert!(text.contains("/host/"), "{text}");
    }
    let (g, others) = busy();
    std::fs::rename(g.host.path().join("log"), g.host.path().join("other")).unwrap();
    let sched = Arc::clone(&g.m.k.sched);
    sched.enqueue(g.t);
    others.into_iter().for_each(|t| sched.enqueue(Box::new(t)));
    sched.stop();
    let refused = save(&g.m.k, &mut Image::new(&g.m.k.memory)).map(drop);
    assert!(
        matches!(refused, Err(Refused::Nameless { .. })),
        "{refused:?}"
    );
}

#[test]
fn thread_stopped_before_its_call_makes_it_again() {
    let mut g = Guest::new();
    g.t.regs.rip = guest::abi::SYSCALL_STUB_VA;
    (g.t.regs.rcx, g.t.regs.r11) = (0x40_1002, 0x246);
    let (g, _) = g.save(Vec::new()).restore();
    assert_eq!((g.t.regs.rip, g.t.regs.rflags), (0x40_1000, 0x246));
}

#[test]
fn child_that_has_not_begun_begins_where_it_is_made_again() {
    let mut g = Guest::new();
    g.poke(WORD, 5);
    let flags = (libc::CLONE_CHILD_SETTID | libc::SIGCHLD) as u64;
    let pid = g.call(libc::SYS_clone, &[flags, 0, 0, WORD, 0]);
    let child = g.m.runnable();
    let (g, mut others) = g.save(vec![*child]).restore();
    let child = others.first_mut().unwrap();
    assert!(matches!(g.m.go_on(child), Turn::Guest));
    assert_eq!(child.regs.rax, 0);
    assert_eq!(g.m.mem(child).read_obj::<u32>(WORD), Ok(pid as u32));
    assert_eq!(g.peek(WORD), 5);
}

#[test]
fn guest_that_runs_is_refused() {
    let g = Guest::new();
    let refused = save(&g.m.k, &mut Image::new(&g.m.k.memory)).map(drop);
    assert!(matches!(refused, Err(Refused::Running)));
}

#[test]
fn processor_without_what_was_promised_is_refused() {
    let (g, others) = busy();
    let mut saved = g.save(others);
    saved.records.machine.info.features[1] = 4;
    let refused = again(&saved.records, &mut saved.image).map(drop);
    assert!(matches!(refused, Err(RestoreError::Processor)));
}
