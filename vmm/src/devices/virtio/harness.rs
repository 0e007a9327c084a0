//! A driver for tests: sets a device up through its registers, and puts requests into its queue. And
//! drivers that mean harm: whatever they write, the device answers or asks for a reset, and ends.

use std::sync::Arc;

use proptest::prelude::*;
use vm_device::DeviceMmio;
use vm_device::bus::MmioAddress;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::VirtioDevice;
use super::block::{Access, Block, DiskError};
use super::mmio::{Left, QUEUE_SIZE, Transport};
use super::rng::Rng;
use crate::hv::kvm::board;
use crate::kernel::memory::{self, Memory};

const DESCRIPTORS: u64 = 0x1000;
const AVAILABLE: u64 = 0x3000;
const USED: u64 = 0x4000;
const DATA: u64 = 0x1_0000;
const SIZE: u16 = 16;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const NEEDS_RESET: u32 = 64;

struct Driver {
    transport: Arc<Transport>,
    memory: Memory,
    interrupt: EventFd,
    available: u16,
}

/// A buffer: its bytes, or how many are to be written.
enum Buffer<'a> {
    Out(&'a [u8]),
    In(usize),
}

impl Driver {
    fn new(device: Box<dyn VirtioDevice>) -> Self {
        let memory = memory::create(1 << 20).unwrap();
        let interrupt = board::event().unwrap();
        let line = interrupt.try_clone().unwrap();
        let transport = Transport::new(device, &memory, line);
        Self {
            transport,
            memory,
            interrupt,
            available: 0,
        }
    }

    fn set(&self, register: u64, value: u32) {
        self.transport
            .mmio_write(MmioAddress(0), register, &value.to_le_bytes());
    }

    fn get(&self, register: u64) -> u32 {
        let mut data = [0; 4];
        self.transport
            .mmio_read(MmioAddress(0), register, &mut data);
        u32::from_le_bytes(data)
    }

    /// What Linux does, with the features in `leave_out` not taken.
    fn start(self, leave_out: u64) -> Self {
        assert_eq!(self.get(0), 0x7472_6976);
        assert_eq!(self.get(4), 2);
        self.set(0x70, 0);
        self.set(0x70, 3);
        for page in 0..2 {
            self.set(0x14, page);
            let offered = self.get(0x10);
            self.set(0x24, page);
            self.set(0x20, offered & !((leave_out >> (page * 32)) as u32));
        }
        self.set(0x70, 11);
        assert_eq!(self.get(0x70), 11);
        self.set(0x30, 0);
        assert_eq!(self.get(0x34), u32::from(QUEUE_SIZE));
        self.set(0x38, u32::from(SIZE));
        for (register, address) in [(0x80, DESCRIPTORS), (0x90, AVAILABLE), (0xa0, USED)] {
            self.set(register, address as u32);
            self.set(register + 4, 0);
        }
        self.set(0x44, 1);
        self.set(0x70, 15);
        assert_eq!(self.get(0x70), 15);
        self
    }

    fn descriptor(&self, index: u16, address: u64, length: u32, flags: u16, next: u16) {
        let mut raw = [0; 16];
        raw[..8].copy_from_slice(&address.to_le_bytes());
        raw[8..12].copy_from_slice(&length.to_le_bytes());
        raw[12..14].copy_from_slice(&flags.to_le_bytes());
        raw[14..].copy_from_slice(&next.to_le_bytes());
        let at = GuestAddress(DESCRIPTORS + u64::from(index) * 16);
        self.memory.write_slice(&raw, at).unwrap();
    }

    fn announce(&mut self, head: u16) -> Left {
        let at = AVAILABLE + 4 + u64::from(self.available % SIZE) * 2;
        self.memory.write_obj(head, GuestAddress(at)).unwrap();
        self.available = self.available.wrapping_add(1);
        let index = GuestAddress(AVAILABLE + 2);
        self.memory.write_obj(self.available, index).unwrap();
        self.transport.serve(0)
    }

    /// One request; what was written into its buffers, and the length the device tells.
    fn request(&mut self, buffers: &[Buffer<'_>]) -> (Vec<u8>, u32) {
        let mut at = DATA;
        let mut to = Vec::new();
        for (index, buffer) in (0..).zip(buffers) {
            let more = if usize::from(index) + 1 < buffers.len() {
                NEXT
            } else {
                0
            };
            let (length, flags) = match buffer {
                Buffer::Out(bytes) => {
                    self.memory.write_slice(bytes, GuestAddress(at)).unwrap();
                    (bytes.len(), more)
                }
                Buffer::In(length) => {
                    to.push((at, *length));
                    (*length, more | WRITE)
                }
            };
            self.descriptor(index, at, length as u32, flags, index + 1);
            at += length as u64;
        }
        let used_before: u16 = self.memory.read_obj(GuestAddress(USED + 2)).unwrap();
        // An interrupt is wanted for the next answer.
        let event = GuestAddress(AVAILABLE + 4 + u64::from(SIZE) * 2);
        self.memory.write_obj(used_before, event).unwrap();
        assert_eq!(self.announce(0), Left::Nothing);
        let used: u16 = self.memory.read_obj(GuestAddress(USED + 2)).unwrap();
        assert_eq!(used, used_before.wrapping_add(1));
        let entry = USED + 4 + u64::from(used_before % SIZE) * 8;
        let length = self.memory.read_obj(GuestAddress(entry + 4)).unwrap();
        assert!(self.interrupt.read().is_ok());
        assert_eq!(self.get(0x60) & 1, 1);
        self.set(0x64, 1);
        let mut all = Vec::new();
        for (at, length) in to {
            let mut part = vec![0; length];
            self.memory.read_slice(&mut part, GuestAddress(at)).unwrap();
            all.extend(part);
        }
        (all, length)
    }
}

fn header(kind: u32, sector: u64) -> [u8; 16] {
    let mut header = [0; 16];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    header[8..].copy_from_slice(&sector.to_le_bytes());
    header
}

const READ: u32 = 0;
const PUT: u32 = 1;
const FLUSH: u32 = 4;
const ID: u32 = 8;
const DISCARD: u32 = 11;
const ZERO: u32 = 13;

struct Disk {
    driver: Driver,
    file: tempfile::NamedTempFile,
}

impl Disk {
    fn new(sectors: u64, access: Access, leave_out: u64) -> Self {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(sectors * 512).unwrap();
        let block = Block::open(file.path(), access, "disk0").unwrap();
        let driver = Driver::new(Box::new(block)).start(leave_out);
        Self { driver, file }
    }

    fn put(&mut self, kind: u32, sector: u64, data: &[u8]) -> u8 {
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

    fn get(&mut self, kind: u32, sector: u64, length: usize) -> (Vec<u8>, u8) {
        let header = header(kind, sector);
        let parts = [Buffer::Out(&header), Buffer::In(length), Buffer::In(1)];
        let (mut data, written) = self.driver.request(&parts);
        let status = data.pop().unwrap();
        if status == 0 {
            assert_eq!(written as usize, length + 1);
        }
        (data, status)
    }

    fn content(&self) -> Vec<u8> {
        std::fs::read(self.file.path()).unwrap()
    }
}

fn range(sector: u64, count: u32, flags: u32) -> Vec<u8> {
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
fn random_bytes_differ() {
    let mut driver = Driver::new(Box::new(Rng)).start(0);
    let (one, length) = driver.request(&[Buffer::In(64)]);
    let (two, _) = driver.request(&[Buffer::In(64)]);
    assert_eq!((length, one.len()), (64, 64));
    assert_ne!(one, two);
    let (_, length) = driver.request(&[Buffer::In(10_000)]);
    assert!(length <= 10_000);
}

#[test]
fn features_that_were_not_offered_are_not_accepted() {
    let driver = Driver::new(Box::new(Rng));
    driver.set(0x70, 3);
    driver.set(0x24, 1);
    driver.set(0x20, 1 | 1 << 31);
    driver.set(0x70, 11);
    assert_eq!(driver.get(0x70), 3);
    // DRIVER_OK without FEATURES_OK.
    driver.set(0x70, 7);
    assert_eq!(driver.get(0x70), 3);
    driver.set(0x70, 0);
    assert_eq!(driver.get(0x70), 0);
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

#[test]
fn index_that_jumps_asks_for_a_reset() {
    let mut disk = Disk::new(64, Access::ReadWrite, 0);
    disk.driver.available = 1000;
    assert_eq!(disk.driver.announce(0), Left::Nothing);
    assert_ne!(disk.driver.get(0x70) & NEEDS_RESET, 0);
    let memory = Arc::clone(&disk.driver.memory);
    memory
        .write_slice(&[0; 0x200], GuestAddress(AVAILABLE))
        .unwrap();
    memory.write_slice(&[0; 0x200], GuestAddress(USED)).unwrap();
    disk.driver = disk.driver.start(0);
    disk.driver.available = 0;
    assert_eq!(disk.get(READ, 0, 512), (vec![0; 512], 0));
}

#[test]
fn descriptors_in_a_loop_end() {
    let mut disk = Disk::new(64, Access::ReadWrite, 0);
    for flags in [NEXT, NEXT | WRITE, 4, 4 | WRITE] {
        for index in 0..SIZE {
            disk.driver
                .descriptor(index, DATA, 512, flags, (index + 1) % SIZE);
        }
        let _ = disk.driver.announce(0);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// Any accesses of any width to the registers.
    #[test]
    fn any_register_access_is_answered(
        disk in any::<bool>(),
        accesses in prop::collection::vec((any::<bool>(), 0_u64..0x180, 1_usize..9, any::<u64>()), 1..200),
    ) {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(4096).unwrap();
        let device: Box<dyn VirtioDevice> = if disk {
            Box::new(Block::open(file.path(), Access::ReadWrite, "x").unwrap())
        } else {
            Box::new(Rng)
        };
        let driver = Driver::new(device);
        for (read, offset, width, value) in accesses {
            let mut data = value.to_le_bytes();
            if read {
                driver.transport.mmio_read(MmioAddress(0), offset, &mut data[..width]);
            } else {
                // Small values mean more to these registers.
                let small = if value & 1 == 0 { value >> 60 } else { value };
                data = small.to_le_bytes();
                driver.transport.mmio_write(MmioAddress(0), offset, &data[..width]);
            }
            let _ = driver.transport.serve(0);
        }
        let saved = driver.transport.save();
        prop_assert!(driver.transport.restore(&saved).is_ok());
    }

    /// Any content of the rings and of the descriptors.
    #[test]
    fn any_queue_is_answered_or_given_up(
        descriptors in prop::collection::vec(
            (prop_oneof![0_u64..0x2_0000, any::<u64>()], prop_oneof![0_u32..0x2000, any::<u32>()], 0_u16..8, 0_u16..20),
            16,
        ),
        heads in prop::collection::vec(0_u16..20, 16),
        index in prop_oneof![0_u16..20, any::<u16>()],
        header in (prop_oneof![0_u32..16, any::<u32>()], prop_oneof![0_u64..16, any::<u64>()]),
        leave_out in prop_oneof![Just(0_u64), Just(1 << 29), Just(1 << 9)],
    ) {
        let disk = Disk::new(8, Access::ReadWrite, leave_out);
        let memory = &disk.driver.memory;
        for (at, (address, length, flags, next)) in (0..).zip(descriptors) {
            disk.driver.descriptor(at, address, length, flags, next);
        }
        for (at, head) in (0..).zip(heads) {
            memory.write_obj(head, GuestAddress(AVAILABLE + 4 + at * 2)).unwrap();
        }
        memory.write_slice(&self::header(header.0, header.1), GuestAddress(DATA)).unwrap();
        memory.write_obj(index, GuestAddress(AVAILABLE + 2)).unwrap();
        for _ in 0..4 {
            let _ = disk.driver.transport.serve(0);
        }
        prop_assert_eq!(disk.content().len(), 8 * 512);
    }
}
