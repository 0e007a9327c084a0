//! `/proc`, `/sys` and `/dev`.

use std::sync::Arc;

use super::{A, MEMORY, Machine};
use crate::linux::Errno;

fn machine() -> (tempfile::TempDir, Machine) {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("file"), "inside").unwrap();
    let m = Machine::over(dir.path(), true);
    m.k().state().procs.get_mut(&2).unwrap().exe = m.k().vfs.locate(b"file");
    (dir, m)
}

#[test]
fn every_file_of_proc_can_be_read() {
    let (_dir, mut m) = machine();
    let mut left = vec!["/proc".to_owned(), "/sys".to_owned()];
    let mut read = 0;
    while let Some(dir) = left.pop() {
        for name in m.list(&dir).unwrap() {
            let path = format!("{dir}/{name}");
            match m.mode(&path) {
                _ if name == "." || name == ".." => {}
                Ok(mode) if mode & 0o170_000 == 0o040_000 => left.push(path),
                Ok(mode) if mode & 0o170_000 == 0o100_000 => {
                    m.cat(&path)
                        .unwrap_or_else(|error| panic!("{path}: {error}"));
                    read += 1;
                }
                // The descriptor that lists the directory.
                Ok(_) | Err(Errno::NOENT) => {}
                Err(error) => panic!("{path}: {error}"),
            }
        }
        m.k().state().procs.get_mut(&2).unwrap().files.fds.clear();
    }
    assert!(read > 60, "{read}");
}

#[test]
fn stat_has_its_52_fields() {
    let (_dir, mut m) = machine();
    let stat = m.cat("/proc/self/stat").unwrap();
    assert_eq!(stat.trim_end().split(' ').count(), 52);
    assert!(stat.starts_with("2 (first) R 1 2 2 "));
    assert_eq!(m.cat("/proc/thread-self/comm").unwrap(), "first\n");
}

#[test]
fn boot_is_told_from_that_of_another_guest() {
    let (_dir, mut m) = machine();
    let (_other_dir, mut other) = machine();
    let path = "/proc/sys/kernel/random/boot_id";
    let id = m.cat(path).unwrap();
    assert_eq!(m.cat(path).unwrap(), id);
    assert_ne!(other.cat(path).unwrap(), id);
}

#[test]
fn magic_links_lead_to_the_guests_files() {
    let (_dir, mut m) = machine();
    assert_eq!(m.readlink("/proc/self/exe").unwrap(), "/file");
    assert_eq!(m.cat("/proc/self/exe").unwrap(), "inside");
    assert_eq!(m.cat("/proc/2/root/file").unwrap(), "inside");
    assert_eq!(m.cat("/proc/self/cwd/file").unwrap(), "inside");
    let fd = m.open("/file", 0).unwrap();
    assert_eq!(m.readlink(&format!("/dev/fd/{fd}")).unwrap(), "/file");
    assert_eq!(m.cat(&format!("/dev/fd/{fd}")).unwrap(), "inside");
    assert_eq!(m.open("/dev/fd/77", 0), Err(Errno::NOENT));
    assert_eq!(m.open(&format!("/dev/fd/{fd}/x"), 0), Err(Errno::NOTDIR));
    // Closed: reading it is reading the terminal, or nothing.
    assert!(m.open("/proc/3/exe", 0).is_err());
}

#[test]
fn command_line_and_maps_come_from_the_process() {
    let (_dir, mut m) = machine();
    let strings = MEMORY + 12 * 4096;
    m.mem().write(strings, b"prog\0arg\0HOME=/\0").unwrap();
    m.t.mm.layout.lock().args = (strings, strings + 9);
    m.t.mm.layout.lock().envs = (strings + 9, strings + 16);
    assert_eq!(m.cat("/proc/self/cmdline").unwrap(), "prog\0arg\0");
    assert_eq!(m.cat("/proc/2/environ").unwrap(), "HOME=/\0");
    assert_eq!(
        m.cat("/proc/self/maps").unwrap(),
        "00100000-00140000 rw-p 00000000 00:00 0 \n"
    );
    m.t.mm.layout.lock().args = (0, u64::MAX);
    assert_eq!(m.cat("/proc/self/cmdline").unwrap(), "");
}

#[test]
fn comm_is_written_and_nothing_else() {
    let (_dir, mut m) = machine();
    let fd = m.open("/proc/self/comm", 1).unwrap();
    assert_eq!(m.write(fd, b"a name that is far too long\n"), Ok(28));
    assert_eq!(m.cat("/proc/self/comm").unwrap(), "a name that is \n");
    let fd = m.open("/proc/uptime", 2).unwrap();
    assert_eq!(m.write(fd, b"1"), Err(Errno::ACCESS));
    assert_eq!(
        m.call(83, &[A::S("/proc/x"), A::N(0o755)]),
        Err(Errno::PERM)
    );
}

#[test]
fn devices_behave() {
    let (_dir, mut m) = machine();
    let fd = m.open("/dev/null", 2).unwrap();
    assert_eq!((m.write(fd, b"x"), m.read(fd).unwrap().len()), (Ok(1), 0));
    let fd = m.open("/dev/full", 2).unwrap();
    assert_eq!(m.write(fd, b"x"), Err(Errno::NOSPC));
    let fd = m.open("/dev/zero", 0).unwrap();
    assert!(m.read(fd).unwrap().iter().all(|&b| b == 0));
    let fd = m.open("/dev/urandom", 0).unwrap();
    assert!(m.read(fd).unwrap().iter().any(|&b| b != 0));
    assert_eq!(m.open("/dev/tty", 2), Err(Errno::NXIO));
    assert_eq!(m.open("/dev/ptmx", 2), Err(Errno::NOENT));
    assert_eq!(m.cat("/sys/devices/system/cpu/online").unwrap(), "0-1\n");
    let cpus = m.list("/sys/devices/system/cpu").unwrap();
    assert_eq!(cpus.iter().filter(|n| n.starts_with("cpu")).count(), 2);
    let core = |n: &str| format!("/sys/devices/system/cpu/{n}/topology/core_id");
    assert_eq!(m.cat(&core("cpu1")).unwrap(), "1\n");
    assert_eq!(m.cat(&core("cpu2")), Err(Errno::NOENT));
    assert_eq!(m.cat(&core("cpu01")), Err(Errno::NOENT));
}

#[test]
fn flock_excludes_until_the_last_reference_goes() {
    let (_dir, mut m) = machine();
    let (one, two) = (m.open("/file", 0).unwrap(), m.open("/file", 0).unwrap());
    assert_eq!(m.call(73, &[A::N(one), A::N(2)]), Ok(0));
    assert_eq!(
        m.call(73, &[A::N(two), A::N(2 | 4)]),
        Err(Errno::WOULDBLOCK)
    );
    let gone = m
        .k()
        .state()
        .procs
        .get_mut(&2)
        .unwrap()
        .files
        .fds
        .remove(&(one as i32));
    assert_eq!(
        gone.as_ref().map(|fd| Arc::strong_count(&fd.description)),
        Some(1)
    );
    drop(gone);
    assert_eq!(m.call(73, &[A::N(two), A::N(2 | 4)]), Ok(0));
}
