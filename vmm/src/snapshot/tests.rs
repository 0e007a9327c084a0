//! Files written and read back, whole and damaged.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::format::{PartKind, StoredPage};
use super::read::{Check, ReadError, Snapshot, Trust};
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

/// Opens it, as who is about to make a guest of it does.
fn open(path: &Path, base: Option<&Arc<Snapshot>>) -> Result<Snapshot, ReadError> {
    let snapshot = Snapshot::open(path, base.cloned())?;
    snapshot.check(Check::Changed, &mut |_| ())?;
    Ok(snapshot)
}

fn modified(path: &Path) -> std::time::SystemTime {
    fs::metadata(path).unwrap().modified().unwrap()
}

fn set_modified(path: &Path, time: std::time::SystemTime) {
    let file = fs::File::options().write(true).open(path).unwrap();
    file.set_modified(time).unwrap();
}

#[test]
fn any_flipped_bit_is_refused_before_a_guest_is_made() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a");
    write(&path, 0..18, None);
    let whole = fs::read(&path).unwrap();
    for at in (0..whole.len()).step_by(97).chain([whole.len() - 1]) {
        let mut bad = whole.clone();
        bad[at] ^= 1 << (at % 8);
        fs::write(&path, &bad).unwrap();
        assert!(open(&path, None).is_err(), "byte {at}");
    }
    fs::write(&path, &whole).unwrap();
    check(&open(&path, None).unwrap(), 18);
}

/// What a disk does that loses bits: nobody wrote to the file.
#[test]
fn bit_lost_under_a_seal_is_an_error_of_the_read() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a");
    write(&path, 0..18, None);
    let (whole, time) = (fs::read(&path).unwrap(), modified(&path));
    for at in (4096..4096 + 18 * FRAME).step_by(1931) {
        let mut bad = whole.clone();
        bad[at] ^= 1 << (at % 8);
        fs::write(&path, &bad).unwrap();
        set_modified(&path, time);
        let snapshot = open(&path, None).unwrap();
        let of = StoredPage::new(((at - 4096) / FRAME) as u64);
        let read = snapshot.read_pages(of, &mut [0; FRAME]);
        assert_eq!(read.unwrap_err().kind(), io::ErrorKind::InvalidData);
        let checked = snapshot.check(Check::All, &mut |_| {});
        assert!(matches!(checked, Err(ReadError::Damaged { .. })));
    }
}

#[test]
fn only_what_is_as_it_was_finished_is_not_read_first() {
    let dir = tempfile::tempdir().unwrap();
    let (path, copy) = (dir.path().join("a"), dir.path().join("copy"));
    let pages = 3000 * FRAME as u64;
    write(&path, 0..3000, None);
    let read = |path: &Path| open(path, None).unwrap().bytes_read();
    // The header, the checksums, the two short parts.
    assert!(read(&path) < 40 * FRAME as u64);
    let snapshot = open(&path, None).unwrap();
    let (before, mut one) = (snapshot.bytes_read(), [0; FRAME]);
    snapshot.read_pages(StoredPage::new(77), &mut one).unwrap();
    assert_eq!(snapshot.bytes_read() - before, 16 * FRAME as u64);
    // A copy, and one that kept the time.
    fs::copy(&path, &copy).unwrap();
    assert!(read(&copy) > pages);
    set_modified(&copy, modified(&path));
    assert!(read(&copy) > pages);
    // Another name of the same file is the same file.
    let moved = dir.path().join("moved");
    fs::rename(&path, &moved).unwrap();
    assert!(read(&moved) < pages);
    // Written to, with what was there.
    let first = fs::read(&moved).unwrap()[0];
    let file = fs::File::options().write(true).open(&moved).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[first], 0).unwrap();
    assert!(read(&moved) > pages);
}

#[test]
fn changed_base_is_looked_at_too() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (dir.path().join("a"), dir.path().join("b"));
    write(&a, 0..21, None);
    let first = Arc::new(Snapshot::open(&a, None).unwrap());
    write(&b, 21..40, Some(&first));
    let second = open(&b, Some(&first)).unwrap();
    assert_eq!(second.bytes_to_check(Check::Changed), 0);
    assert_eq!(second.bytes_to_check(Check::All), 40 * FRAME as u64);
    let mut bytes = fs::read(&a).unwrap();
    bytes[4096 + 5 * FRAME] ^= 1;
    fs::write(&a, &bytes).unwrap();
    let first = Arc::new(Snapshot::open(&a, None).unwrap());
    assert!(matches!(
        open(&b, Some(&first)),
        Err(ReadError::Damaged { path, .. }) if path.ends_with("/a")
    ));
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
    // Neither waited for nor replaced.
    let fifo = dir.path().join("fifo");
    rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, rustix::fs::Mode::RWXU).unwrap();
    assert!(refused(&fifo).contains("cannot be read"));
    for path in [&fifo, Path::new("/dev/null")] {
        assert!(matches!(create(path), WriteError::NotAFile(_)), "{path:?}");
    }
}
