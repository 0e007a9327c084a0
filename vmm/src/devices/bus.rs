//! Which device answers for which port and which address.
//!
//! Where there is no device, or where an access reaches beyond one, reads give all ones and writes
//! are lost, as on a PC.

use std::sync::Arc;

use vm_device::bus::{MmioAddress, MmioRange, PioAddress, PioRange};
use vm_device::device_manager::{IoManager, MmioManager, PioManager};
use vm_device::{DeviceMmio, DevicePio};

use crate::hv::kvm::board_cpu::Bus;

/// A device could not be given its place: our bug.
#[derive(Debug, thiserror::Error)]
#[error("two devices want {what} {start:#x}: {source}")]
pub struct BusError {
    what: &'static str,
    start: u64,
    #[source]
    source: vm_device::bus::Error,
}

/// All devices by where they are.
#[derive(Default)]
pub struct Devices(IoManager);

impl std::fmt::Debug for Devices {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Devices").finish_non_exhaustive()
    }
}

impl Devices {
    /// Gives `count` ports from `first` on to a device.
    ///
    /// # Errors
    /// One of them belongs to another device already.
    pub fn add_ports(
        &mut self,
        first: u16,
        count: u16,
        device: Arc<dyn DevicePio + Send + Sync>,
    ) -> Result<(), BusError> {
        PioRange::new(PioAddress(first), count)
            .and_then(|range| self.0.register_pio(range, device))
            .map_err(|source| BusError {
                what: "port",
                start: u64::from(first),
                source,
            })
    }

    /// Gives `bytes` addresses from `start` on to a device.
    ///
    /// # Errors
    /// One of them belongs to another device already.
    pub fn add_memory(
        &mut self,
        start: u64,
        bytes: u64,
        device: Arc<dyn DeviceMmio + Send + Sync>,
    ) -> Result<(), BusError> {
        MmioRange::new(MmioAddress(start), bytes)
            .and_then(|range| self.0.register_mmio(range, device))
            .map_err(|source| BusError {
                what: "address",
                start,
                source,
            })
    }
}

impl Bus for Devices {
    fn port_read(&self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        // No device: nobody drives the bus.
        let _ = self.0.pio_read(PioAddress(port), data);
    }

    fn port_write(&self, port: u16, data: &[u8]) {
        let _ = self.0.pio_write(PioAddress(port), data);
    }

    fn memory_read(&self, gpa: u64, data: &mut [u8]) {
        data.fill(0xff);
        let _ = self.0.mmio_read(MmioAddress(gpa), data);
    }

    fn memory_write(&self, gpa: u64, data: &[u8]) {
        let _ = self.0.mmio_write(MmioAddress(gpa), data);
    }
}

#[cfg(test)]
mod tests {
    use vm_device::bus::PioAddressOffset;

    use super::*;

    struct Seven;

    impl DevicePio for Seven {
        fn pio_read(&self, _: PioAddress, _: PioAddressOffset, data: &mut [u8]) {
            data.fill(7);
        }
        fn pio_write(&self, _: PioAddress, _: PioAddressOffset, _: &[u8]) {}
    }

    #[test]
    fn where_nothing_is_reads_give_all_ones() {
        let mut devices = Devices::default();
        devices.add_ports(0x10, 2, Arc::new(Seven)).unwrap();
        let mut data = [0; 4];
        devices.port_read(0x11, &mut data[..1]);
        assert_eq!(data[0], 7);
        for (port, width) in [(0xf, 1), (0x12, 1), (0x11, 2), (0xfffe, 4)] {
            data = [0; 4];
            devices.port_read(port, &mut data[..width]);
            assert!(data[..width].iter().all(|&b| b == 0xff), "{port:#x}");
            devices.port_write(port, &data[..width]);
        }
        let mut eight = [0; 8];
        devices.memory_read(u64::MAX - 3, &mut eight);
        assert_eq!(eight, [0xff; 8]);
        devices.memory_write(u64::MAX - 3, &eight);
    }

    #[test]
    fn two_devices_in_one_place_are_refused() {
        let mut devices = Devices::default();
        devices.add_ports(0x10, 2, Arc::new(Seven)).unwrap();
        assert!(devices.add_ports(0x11, 1, Arc::new(Seven)).is_err());
    }
}
