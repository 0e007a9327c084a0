//! Drivers that mean harm.

use std::sync::Arc;

use proptest::prelude::*;
use vm_device::DeviceMmio;
use vm_device::bus::MmioAddress;
use vm_memory::{Bytes, GuestAddress};

use super::super::VirtioDevice;
use super::super::block::{Access, Block};
use super::super::queue::Left;
use super::super::rng::Rng;
use super::disk::{self, Disk, READ};
use super::{AVAILABLE, DATA, Driver, NEEDS_RESET, NEXT, SIZE, USED, WRITE};

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
        memory.write_slice(&disk::header(header.0, header.1), GuestAddress(DATA)).unwrap();
        memory.write_obj(index, GuestAddress(AVAILABLE + 2)).unwrap();
        for _ in 0..4 {
            let _ = disk.driver.transport.serve(0);
        }
        prop_assert_eq!(disk.content().len(), 8 * 512);
    }
}
