//! A disk and its file.

use super::super::block::{Access, Block, DiskError};
use super::super::mmio::Transport;
use super::super::rng::Rng;
use super::{Buffer, Driver};

pub(super) fn header(kind: u32, sector: u64) -> [u8; 16] {
    let mut header = [0; 16];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    header[8..].copy_from_slice(&sector.to_le_bytes());
    header
}

pub(super) const READ: u32 = 0;
pub(super) const PUT: u32 = 1;
pub(super) const FLUSH: u32 = 4;
const ID: u32 = 8;
pub(super) const DISCARD: u32 = 11;
pub(super) const ZERO: u32 = 13;

pub(super) struct Disk {
    pub(super) driver: Driver,
    pub(super) file: tempfile::NamedTempFile,
}

impl Disk {
    pub(super) fn new(sectors: u64, access: Access, leave_out: u64) -> Self {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(sectors * 512).unwrap();
        let block = Block::open(file.path(), access, "disk0").unwrap();
        let driver = Driver::new(Box::new(block)).start(leave_out);
        Self { driver, file }
    }

    pub(super) fn put(&mut self, kind: u32, sector: u64, data: &[u8]) -> u8 {
        let header = header(kind, sector);
        let parts = [Buffer::Out(&header), Buffer::Out(data), Buffer::In(1)];
        let parts = if data.is_empty() {
            let [header, _, status] = parts;
            vec![header, status]
        } else {
            parts.into()
        };
        let (status, length) = self.driver.request(&parts);
        assert_eq!(length, 1);
        status[0]
    }

    pub(super) fn get(&mut self, kind: u32, sector: u64, length: usize) -> (Vec<u8>, u8) {
        let header = header(kind, sector);
        let parts = [Buffer::Out(&header), Buffer::In(length), Buffer::In(1)];
        let (mut data, written) = self.driver.request(&parts);
        let status = data.pop().unwrap();
        if status == 0 {
            assert_eq!(written as usize, length + 1);
        }
        (data, status)
    }

    pub(super) fn content(&self) -> Vec<u8> {
        std::fs::read(self.file.path()).unwrap()
    }
}

pub(super) fn range(sector: u64, count: u32, flags: u32) -> Vec<u8> {
    [
        &sector.to_le_bytes()[..],
        &count.to_le_bytes(),
        &flags.to_le_bytes(),
    ]
    .concat()
}

#[test]
fn what_is_written_is_in_the_file_and_read_again() {
    let mut disk = Disk::new(64, Access::ReadWrite, 0);
    let data: Vec<u8> = (0..4096_u32).map(|i| (i * 7) as u8).collect();
    assert_eq!(disk.put(PUT, 3, &data), 0);
    assert_eq!(disk.put(FLUSH, 0, &[]), 0);
    assert_eq!(disk.content()[3 * 512..][..4096], data);
    assert_eq!(disk.get(READ, 3, 4096), (data, 0));
    assert_eq!(disk.get(ID, 0, 20).0[..6], *b"disk0\0");
    assert_eq!(disk.driver.get(0x100), 64);
}

#[test]
fn discarded_and_zeroed_sectors_are_zero() {
    let mut disk = Disk::new(64, Access::ReadWrite, 0);
    assert_eq!(disk.put(PUT, 0, &[7; 8192]), 0);
    assert_eq!(disk.put(ZERO, 0, &range(1, 2, 0)), 0);
    assert_eq!(disk.put(ZERO, 0, &range(4, 1, 1)), 0);
    assert_eq!(disk.put(DISCARD, 0, &range(8, 8, 0)), 0);
    let content = disk.content();
    let zero: Vec<bool> = content
        .chunks(512)
        .map(|s| s.iter().all(|&b| b == 0))
        .collect();
    let expected: Vec<bool> = (0..64).map(|s| matches!(s, 1 | 2 | 4 | 8..)).collect();
    assert_eq!(zero, expected);
    assert_eq!(content.len(), 64 * 512);
    assert_eq!(disk.put(DISCARD, 0, &range(8, 8, 1)), 2);
    assert_eq!(disk.put(ZERO, 0, &range(60, 8, 0)), 1);
    assert_eq!(disk.put(ZERO, 0, &range(u64::MAX, 1, 0)), 1);
    assert_eq!(disk.put(ZERO, 0, &[0; 15]), 1);
}

#[test]
fn requests_outside_the_disk_fail_and_change_nothing() {
    let mut disk = Disk::new(64, Access::ReadWrite, 0);
    for (sector, length) in [
        (64, 512),
        (63, 1024),
        (u64::MAX, 512),
        (0, 100),
        (u64::MAX / 512, 512),
    ] {
        assert_eq!(disk.put(PUT, sector, &vec![1; length]), 1, "{sector}");
        assert_eq!(disk.get(READ, sector, length).1, 1, "{sector}");
    }
    assert_eq!(disk.put(99, 0, &[0; 512]), 2);
    assert!(disk.content().iter().all(|&b| b == 0));
}

#[test]
fn read_only_disk_is_not_written() {
    let mut disk = Disk::new(64, Access::ReadOnly, 0);
    disk.driver.set(0x14, 0);
    assert_eq!(disk.driver.get(0x10) & 1 << 5, 1 << 5);
    assert_eq!(disk.put(PUT, 0, &[1; 512]), 1);
    assert_eq!(disk.put(ZERO, 0, &range(0, 1, 0)), 1);
    assert_eq!(disk.get(READ, 0, 512), (vec![0; 512], 0));
}

#[test]
fn disk_in_use_is_refused() {
    let disk = Disk::new(64, Access::ReadWrite, 0);
    for access in [Access::ReadWrite, Access::ReadOnly] {
        let again = Block::open(disk.file.path(), access, "x");
        assert!(matches!(again, Err(DiskError::Locked { .. })));
    }
    let disk = Disk::new(64, Access::ReadOnly, 0);
    assert!(Block::open(disk.file.path(), Access::ReadOnly, "x").is_ok());
    disk.file.as_file().set_len(100).unwrap();
    let odd = Block::open(disk.file.path(), Access::ReadOnly, "x");
    assert!(matches!(odd, Err(DiskError::Size { .. })));
}

#[test]
fn saved_and_restored_device_goes_on() {
    let mut disk = Disk::new(64, Access::ReadWrite, 0);
    assert_eq!(disk.put(PUT, 0, &[5; 512]), 0);
    let saved = disk.driver.transport.save();
    let text = serde_json::to_string(&saved).unwrap();
    let file = File::reopen(&disk.file);
    let line = disk.driver.interrupt.try_clone().unwrap();
    drop(std::mem::replace(
        &mut disk.driver.transport,
        Transport::new(
            Box::new(Rng),
            &disk.driver.memory,
            line.try_clone().unwrap(),
        ),
    ));
    let block = Block::open(file.path(), Access::ReadWrite, "disk0").unwrap();
    disk.driver.transport = Transport::new(Box::new(block), &disk.driver.memory, line);
    let back = serde_json::from_str(&text).unwrap();
    disk.driver.transport.restore(&back).unwrap();
    assert_eq!(disk.driver.transport.save(), saved);
    assert_eq!(disk.get(READ, 0, 512), (vec![5; 512], 0));
}

/// The same file by its path, for a device that was restored.
struct File(std::path::PathBuf);

impl File {
    fn reopen(file: &tempfile::NamedTempFile) -> Self {
        Self(file.path().to_owned())
    }

    fn path(&self) -> &std::path::Path {
        &self.0
    }
}
