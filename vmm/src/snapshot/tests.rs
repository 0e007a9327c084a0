//! Files written and read back, whole and damaged.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::format::{PartKind, StoredPage};
use super::read::{ReadError, Snapshot, Trust};
use super::write::{WriteError, Writer};
use crate::memory::FRAME;

fn page(n: u64) -> [u8; FRAME] {
    let mut page = [0; FRAME];
    for (at, word) in page.chunks_mut(8).enumerate() {
        let value = n.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ at as u64;
        word.copy_from_slice(&value.to_le_bytes());
    }
    page
}

fn write(path: &Path, pages: std::ops::Range<u64>, base: Option<&Snapshot>) {
    let mut writer = Writer::create(path, base.map(Snapshot::as_base)).unwrap();
    for n in pages {
        assert_eq!(writer.add_page(&page(n)).unwrap(), StoredPage::new(n));
    }
    let parts = [
        (PartKind::Machine, &b"a machine"[..]),
        (PartKind::Records, b"records"),
    ];
    writer.finish(&parts).unwrap();
}

fn check(snapshot: &Snapshot, pages: u64) {
    assert_eq!(snapshot.pages(), pages);
    for first in 0..pages {
        let mut bytes = vec![0; 20 * FRAME];
        let read = snapshot
            .read_pages(StoredPage::new(first), &mut bytes)
            .unwrap();
        let there = (pages - first).min(20) as usize;
        assert_eq!(read, there * FRAME);
        for (ahead, found) in bytes[..read].chunks(FRAME).enumerate() {
            assert!(
                *found == page(first + ahead as u64),
                "page {first} + {ahead}"
            );
        }
    }
}

fn names(dir: &Path) -> Vec<PathBuf> {
    let mut names: Vec<_> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    names.sort();
    names
}

#[test]
fn what_was_written_is_read() {
    let dir = tempfile::tempdir().unwrap();
    for pages in [0, 1, 15, 16, 17, 53] {
        let path = dir.path().join("a.snap");
        write(&path, 0..pages, None);
        let snapshot = Snapshot::open(&path, None).unwrap();
        check(&snapshot, pages);
        assert_eq!(snapshot.part(PartKind::Records).unwrap(), b"records");
        assert!(snapshot.part(PartKind::Spaces).is_err());
        assert_eq!(names(dir.path()), [path]);
    }
}

#[test]
fn snapshot_in_memory_is_sealed() {
    use std::os::unix::fs::FileExt;
    let mut writer = Writer::in_memory("warm").unwrap();
    for n in 0..20 {
        writer.add_page(&page(n)).unwrap();
    }
    let written = writer.finish(&[]).unwrap();
    assert!(written.file.write_all_at(b"x", 0).is_err());
    let snapshot = Snapshot::from_file(written.file, "warm".into(), Trust::Sealed, None).unwrap();
    check(&snapshot, 20);
}

#[test]
fn pages_of_the_base_come_first() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b, c) = (
        dir.path().join("a"),
        dir.path().join("b"),
        dir.path().join("c"),
    );
    write(&a, 0..21, None);
    let first = Arc::new(Snapshot::open(&a, None).unwrap());
    write(&b, 21..40, Some(&first));
    let second = Arc::new(Snapshot::open(&b, Some(Arc::clone(&first))).unwrap());
    check(&second, 40);
    write(&c, 40..41, Some(&second));
    check(&Snapshot::open(&c, Some(Arc::clone(&second))).unwrap(), 41);
    assert!(matches!(
        Snapshot::open(&b, None),
        Err(ReadError::NeedsBase { .. })
    ));
    // Written again it is another snapshot, whatever is in it.
    write(&a, 0..21, None);
    let other = Arc::new(Snapshot::open(&a, None).unwrap());
    assert!(matches!(
        Snapshot::open(&b, Some(other)),
        Err(ReadError::WrongBase { .. })
    ));
    assert!(matches!(
        Snapshot::open(&a, Some(second)),
        Err(ReadError::WrongBase { .. })
    ));
}

#[test]
fn truncated_file_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a");
    write(&path, 0..5, None);
    let whole = fs::read(&path).unwrap();
    for length in (0..whole.len()).step_by(61).chain([whole.len() - 1]) {
        fs::write(&path, &whole[..length]).unwrap();
        assert!(Snapshot::open(&path, None).is_err(), "{length} bytes");
    }
    fs::write(&path, [&whole[..], b"x"].concat()).unwrap();
    assert!(Snapshot::open(&path, None).is_err());
}

#[test]
fn flipped_bit_is_refused_or_an_error_of_the_read() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a");
    write(&path, 0..18, None);
    let whole = fs::read(&path).unwrap();
    let pages = 4096..4096 + 18 * FRAME;
    for at in (0..whole.len()).step_by(97).chain([whole.len() - 1]) {
        let mut bad = whole.clone();
        bad[at] ^= 1 << (at % 8);
        fs::write(&path, &bad).unwrap();
        let opened = Snapshot::open(&path, None);
        if !pages.contains(&at) {
            assert!(opened.is_err(), "byte {at}");
            continue;
        }
        let snapshot = opened.unwrap();
        let of = StoredPage::new(((at - pages.start) / FRAME) as u64);
        let read = snapshot.read_pages(of, &mut [0; FRAME]);
        assert_eq!(read.unwrap_err().kind(), io::ErrorKind::InvalidData);
        assert!(matches!(
            snapshot.verify(&mut |_| {}),
            Err(ReadError::Damaged { .. })
        ));
    }
}

#[test]
fn unfinished_snapshot_leaves_the_old_one() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a");
    write(&path, 0..3, None);
    let mut writer = Writer::create(&path, None).unwrap();
    for n in 0..40 {
        writer.add_page(&page(n + 7)).unwrap();
    }
    drop(writer);
    check(&Snapshot::open(&path, None).unwrap(), 3);
    assert_eq!(names(dir.path()), vec![path.clone()]);
    // What a crash between link and rename leaves is in nobody's way.
    fs::write(dir.path().join(".a.vmm-new"), b"left over").unwrap();
    write(&path, 0..4, None);
    check(&Snapshot::open(&path, None).unwrap(), 4);
    assert_eq!(names(dir.path()), [path]);
}

#[test]
fn what_is_no_snapshot_or_no_place_for_one_is_said() {
    let dir = tempfile::tempdir().unwrap();
    let refused = |path: &Path| Snapshot::open(path, None).unwrap_err().to_string();
    fs::write(dir.path().join("text"), [b'x'; 9000]).unwrap();
    assert!(refused(&dir.path().join("text")).ends_with("text: not a snapshot"));
    assert!(refused(dir.path()).contains("cannot be read"));
    assert!(refused(&dir.path().join("none")).contains("cannot be read"));
    let create = |path: &Path| Writer::create(path, None).unwrap_err();
    assert!(matches!(create(dir.path()), WriteError::Host { .. }));
    assert!(matches!(
        create(&dir.path().join("no/where")),
        WriteError::Host { .. }
    ));
    assert!(matches!(create(Path::new("/")), WriteError::NoName(_)));
}
