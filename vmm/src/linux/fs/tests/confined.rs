//! What a guest must not reach.

use std::os::unix::fs::{PermissionsExt as _, symlink};

use super::{A, AT_FDCWD, Machine};
use crate::linux::Errno;

/// A directory with a secret beside it.
fn tree() -> (tempfile::TempDir, std::path::PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("root");
    std::fs::create_dir_all(root.join("a/b")).unwrap();
    std::fs::write(dir.path().join("secret"), "secret").unwrap();
    std::fs::write(root.join("file"), "inside").unwrap();
    (dir, root)
}

#[test]
fn dot_dot_above_the_root_stays_in_the_root() {
    let (_dir, root) = tree();
    let mut m = Machine::over(&root, false);
    assert_eq!(m.cat("/../../file").unwrap(), "inside");
    assert_eq!(m.cat("a/b/../../../../file").unwrap(), "inside");
    assert_eq!(m.cat("/../secret"), Err(Errno::NOENT));
}

#[test]
fn absolute_symlink_leads_from_the_guests_root() {
    let (dir, root) = tree();
    symlink(dir.path().join("secret"), root.join("out")).unwrap();
    symlink("../../../../../../etc/passwd", root.join("up")).unwrap();
    symlink("/file", root.join("a/in")).unwrap();
    symlink("../..", root.join("a/b/parent")).unwrap();
    let mut m = Machine::over(&root, false);
    assert_eq!(m.cat("/out"), Err(Errno::NOENT));
    assert_eq!(m.cat("/up"), Err(Errno::NOENT));
    assert_eq!(m.cat("/a/in").unwrap(), "inside");
    assert_eq!(m.cat("/a/b/parent/../secret"), Err(Errno::NOENT));
}

#[test]
fn directory_descriptor_does_not_lead_out() {
    let (_dir, root) = tree();
    let mut m = Machine::over(&root, false);
    let fd = m.open("/a", 0o200_000).unwrap();
    let open = |m: &mut Machine, path: &str| m.call(257, &[A::N(fd), A::S(path), A::N(0), A::N(0)]);
    assert_eq!(open(&mut m, "../../secret"), Err(Errno::NOENT));
    assert!(open(&mut m, "../file").is_ok());
    m.call(81, &[A::N(fd)]).unwrap();
    assert_eq!(m.cat("../../secret"), Err(Errno::NOENT));
}

#[test]
fn symlink_loop_gives_eloop() {
    let (_dir, root) = tree();
    symlink("two", root.join("one")).unwrap();
    symlink("one", root.join("two")).unwrap();
    let mut m = Machine::over(&root, false);
    assert_eq!(m.open("/one", 0), Err(Errno::LOOP));
    assert_eq!(m.open("/one/x", 0), Err(Errno::LOOP));
    assert_eq!(m.open("/one", 0o400_000), Err(Errno::LOOP));
    assert_eq!(m.mode("/one").unwrap() & 0o170_000, 0o120_000);
}

#[test]
fn symlink_to_the_hosts_proc_gives_the_guests() {
    let (_dir, root) = tree();
    symlink("/proc/self", root.join("self")).unwrap();
    symlink(
        format!("/proc/{}/environ", std::process::id()),
        root.join("env"),
    )
    .unwrap();
    let mut m = Machine::over(&root, false);
    assert_eq!(m.cat("/self/comm").unwrap(), "first\n");
    assert_eq!(m.cat("/env"), Err(Errno::NOENT));
}

#[test]
fn whole_host_as_root_hides_its_proc_and_devices() {
    let mut m = Machine::over(std::path::Path::new("/"), false);
    let host = format!("/proc/{}/status", std::process::id());
    assert_eq!(m.cat(&host), Err(Errno::NOENT));
    assert_eq!(m.open("/dev/mem", 0), Err(Errno::NOENT));
    assert!(!m.list("/dev").unwrap().contains(&"kmsg".to_owned()));
    assert_eq!(
        m.list("/proc")
            .unwrap()
            .iter()
            .filter(|name| name.parse::<i32>().is_ok())
            .count(),
        2
    );
}

#[test]
fn hosts_proc_as_a_mount_is_refused() {
    let mut mounts = vec![super::MountSpec {
        at: b"/".to_vec(),
        kind: super::MountKind::Host {
            root: "/proc".into(),
            writable: true,
        },
    }];
    assert!(super::Vfs::new(mounts.clone(), 1 << 20).is_err());
    mounts[0].kind = super::MountKind::Host {
        root: "/sys".into(),
        writable: false,
    };
    assert!(super::Vfs::new(mounts, 1 << 20).is_err());
}

#[test]
fn fifo_is_seen_and_not_opened() {
    let (_dir, root) = tree();
    let fifo = root.join("fifo");
    rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, rustix::fs::Mode::RWXU).unwrap();
    let mut m = Machine::over(&root, true);
    assert_eq!(m.mode("/fifo").unwrap() & 0o170_000, 0o010_000);
    for flags in [0, 1, 2, 0o4000] {
        assert_eq!(m.open("/fifo", flags), Err(Errno::ACCESS));
    }
    assert_eq!(m.call(87, &[A::S("/fifo")]), Ok(0));
}

#[test]
fn device_node_is_not_seen() {
    let (_dir, root) = tree();
    let made = rustix::fs::mknodat(
        rustix::fs::CWD,
        root.join("null"),
        rustix::fs::FileType::CharacterDevice,
        rustix::fs::Mode::RWXU,
        rustix::fs::makedev(1, 3),
    );
    if made.is_err() {
        eprintln!("skipped: this user cannot make device nodes");
        return;
    }
    let mut m = Machine::over(&root, true);
    assert_eq!(m.open("/null", 0), Err(Errno::ACCESS));
    assert_eq!(m.mode("/null"), Err(Errno::ACCESS));
    assert!(!m.list("/").unwrap().contains(&"null".to_owned()));
    assert_eq!(
        m.call(83, &[A::S("/null"), A::N(0o755)]),
        Err(Errno::ACCESS)
    );
}

#[test]
fn read_only_root_refuses_every_change() {
    let (_dir, root) = tree();
    let mut m = Machine::over(&root, false);
    assert_eq!(m.open("/file", 1), Err(Errno::ROFS));
    assert_eq!(m.open("/file", 0o1000), Err(Errno::ROFS));
    assert_eq!(m.open("/new", 0o101), Err(Errno::ROFS));
    assert_eq!(m.call(83, &[A::S("/d"), A::N(0o755)]), Err(Errno::ROFS));
    assert_eq!(m.call(87, &[A::S("/file")]), Err(Errno::ROFS));
    assert_eq!(m.call(84, &[A::S("/a/b")]), Err(Errno::ROFS));
    assert_eq!(m.call(82, &[A::S("/file"), A::S("/g")]), Err(Errno::ROFS));
    assert_eq!(m.call(90, &[A::S("/file"), A::N(0o777)]), Err(Errno::ROFS));
    assert_eq!(m.call(76, &[A::S("/file"), A::N(0)]), Err(Errno::ROFS));
    let fd = m.open("/file", 0).unwrap();
    assert_eq!(m.call(91, &[A::N(fd), A::N(0o777)]), Err(Errno::ROFS));
    assert_eq!(m.call(77, &[A::N(fd), A::N(0)]), Err(Errno::INVAL));
    assert_eq!(m.call(21, &[A::S("/file"), A::N(2)]), Err(Errno::ROFS));
    assert_eq!(std::fs::read(root.join("file")).unwrap(), b"inside");
}

#[test]
fn set_user_id_bit_is_not_put_on_a_host_file() {
    let (_dir, root) = tree();
    let mut m = Machine::over(&root, true);
    m.call(90, &[A::S("/file"), A::N(0o6755)]).unwrap();
    let fd = m
        .call(
            257,
            &[A::N(AT_FDCWD), A::S("/made"), A::N(0o101), A::N(0o6777)],
        )
        .unwrap();
    m.call(91, &[A::N(fd), A::N(0o4755)]).unwrap();
    for name in ["file", "made"] {
        let mode = std::fs::metadata(root.join(name))
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o7777, 0o755, "{name}");
    }
}

#[test]
fn link_put_in_after_the_walk_is_not_followed() {
    let (dir, root) = tree();
    symlink(dir.path().join("secret"), root.join("a/trap")).unwrap();
    let m = Machine::over(&root, true);
    let c = super::super::Caller::machine(m.k());
    let trap = m.k().vfs.locate(b"a/trap");
    // As if the walk had seen a file where the link is now.
    let mount = m.k().vfs.mount(&trap).unwrap();
    assert!(mount.fs.open(&c, &trap.path, 0).is_err());
    assert!(mount.fs.create(&c, b"a/trap", 1, 0o644).is_err());
    assert!(
        mount
            .fs
            .change(&c, b"a/trap", &crate::linux::file::Change::Mode(0o777))
            .is_err()
    );
    assert!(mount.fs.mkdir(&c, b"a/trap/x", 0o755).is_err());
    assert_eq!(std::fs::read(dir.path().join("secret")).unwrap(), b"secret");
}

#[test]
fn mount_point_behind_a_link_is_where_the_link_leads() {
    let (_dir, root) = tree();
    symlink("/a/b", root.join("link")).unwrap();
    let at = |at: &str, kind| super::MountSpec {
        at: at.as_bytes().to_vec(),
        kind,
    };
    let host = super::MountKind::Host {
        root: root.clone(),
        writable: false,
    };
    let mem = super::MountKind::Mem {
        size: 1 << 16,
        mode: 0o755,
    };
    let mut m = Machine::new(vec![at("/", host), at("/link/in", mem)]);
    m.open("/link/in/new", 0o101).unwrap();
    assert_eq!(m.list("/a/b/in").unwrap(), [".", "..", "new"]);
    assert_eq!(m.list("/link").unwrap(), [".", "..", "in"]);
    assert_eq!(m.readlink("/link").unwrap(), "/a/b");
}
