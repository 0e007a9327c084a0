//! The calls as programs make them.

use super::{A, AT_FDCWD, Machine, MountKind, MountSpec, RESULT};
use crate::linux::Errno;
use crate::linux::fs::ClosureEntry;

fn machine() -> (tempfile::TempDir, Machine) {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("file"), "inside").unwrap();
    std::fs::create_dir(dir.path().join("d")).unwrap();
    let m = Machine::over(dir.path(), true);
    (dir, m)
}

#[test]
fn create_write_read_on_host_and_in_memory() {
    let (dir, mut m) = machine();
    for path in ["/new", "/tmp/new"] {
        let fd = m.open(path, 0o102).unwrap();
        assert_eq!(m.write(fd, b"hello"), Ok(5));
        assert_eq!(m.cat(path).unwrap(), "hello");
        assert_eq!(m.mode(path).unwrap(), 0o100_644);
        assert_eq!(m.open(path, 0o301), Err(Errno::EXIST));
        m.open(path, 0o1001).unwrap();
        assert_eq!(m.cat(path).unwrap(), "");
    }
    assert!(dir.path().join("new").exists());
    assert!(!dir.path().join("tmp").exists());
}

#[test]
fn listing_has_the_mount_points_and_dots() {
    let (_dir, mut m) = machine();
    let names = m.list("/").unwrap();
    assert_eq!(names, [".", "..", "d", "dev", "file", "proc", "sys", "tmp"]);
    assert!(m.list("/dev").unwrap().contains(&"shm".to_owned()));
    assert_eq!(m.call(84, &[A::S("/tmp")]), Err(Errno::BUSY));
    assert_eq!(m.call(82, &[A::S("/dev"), A::S("/d")]), Err(Errno::XDEV));
}

#[test]
fn open_of_the_wrong_kind_fails_as_linux_says() {
    let (_dir, mut m) = machine();
    assert_eq!(m.open("/d", 1), Err(Errno::ISDIR));
    assert_eq!(m.open("/d", 0o100), Err(Errno::ISDIR));
    assert_eq!(m.open("/file", 0o200_000), Err(Errno::NOTDIR));
    assert_eq!(m.open("/file/", 0), Err(Errno::NOTDIR));
    assert_eq!(m.open("/file/x", 0), Err(Errno::NOTDIR));
    assert_eq!(m.open("/none/", 0o101), Err(Errno::ISDIR));
    assert_eq!(m.open("", 0), Err(Errno::NOENT));
    assert_eq!(m.open("/none/x", 0o101), Err(Errno::NOENT));
    assert_eq!(m.open(&"x".repeat(256), 0), Err(Errno::NAMETOOLONG));
    assert_eq!(m.open("/d", 0o20_200_002), Err(Errno::OPNOTSUPP));
}

#[test]
fn rename_rules_hold_on_host_and_in_memory() {
    let (_dir, mut m) = machine();
    for top in ["/d", "/tmp"] {
        let p = |name: &str| format!("{top}/{name}");
        for name in ["x", "x/y", "e"] {
            m.call(83, &[A::S(&p(name)), A::N(0o755)]).unwrap();
        }
        m.open(&p("f"), 0o101).unwrap();
        let rename = |m: &mut Machine, a: &str, b: &str| m.call(82, &[A::S(&p(a)), A::S(&p(b))]);
        assert_eq!(rename(&mut m, "x", "x/y/z"), Err(Errno::INVAL));
        assert_eq!(rename(&mut m, "f", "x"), Err(Errno::ISDIR));
        assert_eq!(rename(&mut m, "x", "f"), Err(Errno::NOTDIR));
        assert_eq!(rename(&mut m, "e", "x"), Err(Errno::NOTEMPTY));
        assert_eq!(rename(&mut m, "x", "e"), Ok(0));
        assert_eq!(rename(&mut m, "f", "g"), Ok(0));
        assert_eq!(m.list(top).unwrap(), [".", "..", "e", "g"]);
        assert_eq!(m.call(84, &[A::S(&p("e"))]), Err(Errno::NOTEMPTY));
        assert_eq!(m.call(87, &[A::S(&p("e"))]), Err(Errno::ISDIR));
        assert_eq!(m.call(84, &[A::S(&p("e/y"))]), Ok(0));
        assert_eq!(m.call(84, &[A::S(&p("e/."))]), Err(Errno::INVAL));
        assert_eq!(m.call(84, &[A::S(&p("e"))]), Ok(0));
    }
    assert_eq!(
        m.call(82, &[A::S("/file"), A::S("/tmp/file")]),
        Err(Errno::XDEV)
    );
    assert_eq!(
        m.call(86, &[A::S("/file"), A::S("/tmp/file")]),
        Err(Errno::XDEV)
    );
}

#[test]
fn links_are_made_and_followed() {
    let (_dir, mut m) = machine();
    for top in ["/d", "/tmp"] {
        let p = |name: &str| format!("{top}/{name}");
        m.call(88, &[A::S("target"), A::S(&p("l"))]).unwrap();
        assert_eq!(m.readlink(&p("l")).unwrap(), "target");
        assert_eq!(m.open(&p("l"), 0), Err(Errno::NOENT));
        assert_eq!(m.open(&p("l"), 0o301), Err(Errno::EXIST));
        let fd = m.open(&p("l"), 0o101).unwrap();
        m.write(fd, b"made").unwrap();
        assert_eq!(m.cat(&p("target")).unwrap(), "made");
        m.call(86, &[A::S(&p("target")), A::S(&p("hard"))]).unwrap();
        m.call(87, &[A::S(&p("target"))]).unwrap();
        assert_eq!(m.cat(&p("hard")).unwrap(), "made");
        assert_eq!(m.call(87, &[A::S(&p("l/"))]), Err(Errno::NOTDIR));
    }
}

#[test]
fn working_directory_moves_with_its_directory() {
    let (_dir, mut m) = machine();
    m.call(83, &[A::S("/d/in"), A::N(0o755)]).unwrap();
    m.call(80, &[A::S("/d/in")]).unwrap();
    m.call(82, &[A::S("/d"), A::S("/renamed")]).unwrap();
    let n = m.call(79, &[A::N(RESULT), A::N(100)]).unwrap();
    let mut path = vec![0; n as usize];
    m.mem().read(RESULT, &mut path).unwrap();
    assert_eq!(path, b"/renamed/in\0");
    assert_eq!(m.call(79, &[A::N(RESULT), A::N(3)]), Err(Errno::RANGE));
    assert_eq!(m.call(80, &[A::S("/file")]), Err(Errno::NOTDIR));
}

#[test]
fn unlinked_file_lives_while_it_is_open() {
    let (_dir, mut m) = machine();
    for path in ["/gone", "/tmp/gone"] {
        let fd = m.open(path, 0o102).unwrap();
        m.write(fd, b"still").unwrap();
        m.call(87, &[A::S(path)]).unwrap();
        assert_eq!(m.read(fd).unwrap(), b"still");
        assert_eq!(m.cat(&format!("/proc/self/fd/{fd}")).unwrap(), "still");
    }
}

#[test]
fn memory_limit_gives_enospc() {
    let (_dir, mut m) = machine();
    let fd = m.open("/tmp/big", 0o102).unwrap();
    assert_eq!(
        m.call(285, &[A::N(fd), A::N(0), A::N(0), A::N(1 << 40)]),
        Err(Errno::NOSPC)
    );
    let mut made = 0;
    while m
        .call(83, &[A::S(&format!("/dev/shm/{made}")), A::N(0o700)])
        .is_ok()
    {
        made += 1;
        assert!(made < 10_000);
    }
    assert!(made > 10);
}

#[test]
fn descriptor_numbers_are_the_lowest_free() {
    let (_dir, mut m) = machine();
    assert_eq!(
        (0..3)
            .map(|_| m.open("/file", 0).unwrap())
            .collect::<Vec<_>>(),
        [0, 1, 2]
    );
    m.k()
        .state()
        .procs
        .get_mut(&2)
        .unwrap()
        .files
        .fds
        .remove(&1);
    assert_eq!(m.open("/file", 0), Ok(1));
    m.k().state().procs.get_mut(&2).unwrap().rlimits[7] = (3, 3);
    assert_eq!(m.open("/file", 0), Err(Errno::MFILE));
}

#[test]
fn openat2_restrictions_hold() {
    let (_dir, mut m) = machine();
    m.call(88, &[A::S("/file"), A::S("/d/abs")]).unwrap();
    let dir = m.open("/d", 0o200_000).unwrap();
    let mut open = |path: &str, resolve: u64| {
        m.mem().write_obj(RESULT, &[0_u64, 0, resolve]).unwrap();
        m.call(437, &[A::N(dir), A::S(path), A::N(RESULT), A::N(24)])
    };
    assert_eq!(open("../file", 8), Err(Errno::XDEV));
    assert_eq!(open("/file", 8), Err(Errno::XDEV));
    assert_eq!(open("abs", 8), Err(Errno::XDEV));
    assert_eq!(open("abs", 16), Err(Errno::NOENT));
    assert_eq!(open("abs", 4), Err(Errno::LOOP));
    assert!(open("../file", 0).is_ok());
    assert!(open("../tmp", 0).is_ok());
    assert_eq!(open("../tmp", 1), Err(Errno::XDEV));
    assert_eq!(open("x", 8 | 16), Err(Errno::INVAL));
}

#[test]
fn other_user_is_held_to_the_mode_bits() {
    let (_dir, mut m) = machine();
    m.call(83, &[A::S("/tmp/private"), A::N(0o700)]).unwrap();
    m.open("/tmp/private/x", 0o101).unwrap();
    m.open("/tmp/mine", 0o101).unwrap();
    let user = |m: &Machine, id| m.k().state().procs.get_mut(&2).unwrap().cred.uid = [id; 3];
    user(&m, 1000);
    assert_eq!(m.open("/tmp/private/x", 0), Err(Errno::ACCESS));
    assert_eq!(m.open("/tmp/mine", 1), Err(Errno::ACCESS));
    assert_eq!(m.call(87, &[A::S("/tmp/mine")]), Err(Errno::PERM));
    assert_eq!(
        m.call(90, &[A::S("/tmp/mine"), A::N(0o777)]),
        Err(Errno::PERM)
    );
    assert!(m.open("/tmp/mine", 0).is_ok());
}

#[test]
fn closure_view_has_its_files_only() {
    let dir = tempfile::tempdir().unwrap();
    let host = dir.path().join("program");
    std::fs::write(&host, "elf").unwrap();
    let entries = vec![
        ClosureEntry::File {
            guest: b"/usr/lib/x/program".to_vec(),
            host,
        },
        ClosureEntry::Symlink {
            guest: b"/lib".to_vec(),
            target: b"usr/lib".to_vec(),
        },
    ];
    let mut m = Machine::new(vec![MountSpec {
        at: b"/".to_vec(),
        kind: MountKind::Closure(entries),
    }]);
    assert_eq!(m.cat("/lib/x/program").unwrap(), "elf");
    assert_eq!(m.list("/").unwrap(), [".", "..", "lib", "usr"]);
    assert_eq!(m.open("/usr/lib/x/program", 2), Err(Errno::ROFS));
    assert_eq!(m.call(87, &[A::S("/lib")]), Err(Errno::ROFS));
    assert_eq!(m.open("/etc/passwd", 0), Err(Errno::NOENT));
}

#[test]
fn times_and_owner_are_set_and_told() {
    let (_dir, mut m) = machine();
    for path in ["/file", "/tmp/file"] {
        m.open(path, 0o101).unwrap();
        m.mem()
            .write_obj(RESULT, &[[11_i64, 5], [22, 0x3fff_fffe]])
            .unwrap();
        let before = m.mode(path).unwrap();
        m.mem().write_obj(RESULT, &[[11_i64, 5], [22, 7]]).unwrap();
        m.call(280, &[A::N(AT_FDCWD), A::S(path), A::N(RESULT), A::N(0)])
            .unwrap();
        assert_eq!(m.mode(path).unwrap(), before);
        let stat: super::super::abi::RawStat = m.mem().read_obj(RESULT).unwrap();
        assert_eq!((stat.times[0], stat.times[1]), ([11, 5], [22, 7]));
    }
}

#[test]
fn path_descriptor_names_and_does_not_read() {
    let (_dir, mut m) = machine();
    let fd = m.open("/file", 0o10_000_000).unwrap();
    assert_eq!(
        m.call(217, &[A::N(fd), A::N(RESULT), A::N(100)]),
        Err(Errno::BADF)
    );
    assert_eq!(m.call(91, &[A::N(fd), A::N(0o600)]), Err(Errno::BADF));
    assert_eq!(m.call(5, &[A::N(fd), A::N(RESULT)]), Ok(0));
    assert_eq!(m.cat(&format!("/proc/self/fd/{fd}")).unwrap(), "inside");
}
