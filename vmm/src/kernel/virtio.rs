//! Where a machine's virtio devices are: each has a page of registers, an interrupt, and a thread.

use std::sync::Arc;
use std::time::Duration;

use vmm_sys_util::eventfd::EventFd;

use super::BootError;
use super::acpi::VirtioPlace;
use super::end::{End, Ending};
use super::layout;
use super::memory::Memory;
use crate::devices::Devices;
use crate::devices::virtio::mmio::{NOTIFY, Transport};
use crate::devices::virtio::{VirtioDevice, worker};
use crate::hv::kvm::board;
use crate::hv::kvm::vm::Vm;

/// Most devices: one for each input of the I/O APIC that is left.
pub const MOST: usize = (layout::IO_APIC_INPUTS - layout::VIRTIO_IRQ) as usize;

/// The machine's virtio devices.
#[derive(Debug)]
pub struct VirtioDevices {
    vm: Arc<Vm>,
    memory: Memory,
    ending: Arc<Ending>,
    stop: EventFd,
    transports: Vec<Arc<Transport>>,
    places: Vec<VirtioPlace>,
}

impl VirtioDevices {
    /// None yet.
    ///
    /// # Errors
    /// The host has no descriptor left.
    pub fn new(vm: &Arc<Vm>, memory: &Memory, ending: &Arc<Ending>) -> Result<Self, BootError> {
        Ok(Self {
            vm: Arc::clone(vm),
            memory: Arc::clone(memory),
            ending: Arc::clone(ending),
            stop: board::event()?,
            transports: Vec::new(),
            places: Vec::new(),
        })
    }

    /// Gives a device its place and its thread. `make` is told the device's name.
    ///
    /// # Errors
    /// `make` failed, there is no place left, or KVM or the host refused.
    pub fn add(
        &mut self,
        devices: &mut Devices,
        make: impl FnOnce(&str) -> Result<Box<dyn VirtioDevice>, BootError>,
    ) -> Result<(), BootError> {
        let index = u32::try_from(self.transports.len()).unwrap_or(u32::MAX);
        if self.transports.len() >= MOST {
            return Err(BootError::TooManyDisks(MOST - 1));
        }
        let name = format!("virtio{index}");
        let device = make(&name)?;
        let base = layout::VIRTIO + u64::from(index) * layout::VIRTIO_STEP;
        let gsi = layout::VIRTIO_IRQ + index;
        let doorbells = (0..)
            .take(device.queues())
            .map(|queue| self.vm.doorbell(base + NOTIFY, queue))
            .collect::<Result<Vec<_>, _>>()?;
        let line = self.vm.interrupt(gsi)?;
        let transport = Transport::new(device, &self.memory, line);
        let copies = doorbells.iter().map(EventFd::try_clone);
        let copies = copies.collect::<Result<_, _>>();
        transport.connect(copies.map_err(BootError::Thread)?);
        devices.add_memory(base, layout::VIRTIO_STEP, transport.clone())?;
        let stop = self.stop.try_clone().map_err(BootError::Thread)?;
        let ending = Arc::clone(&self.ending);
        worker::start(&name, &transport, doorbells, stop, move || {
            ending.tell(End::Bug("virtio device"));
        })
        .map_err(BootError::Thread)?;
        self.transports.push(transport);
        self.places.push(VirtioPlace {
            base: u32::try_from(base).expect("below 4 GiB"),
            bytes: u32::try_from(layout::VIRTIO_STEP).expect("a page"),
            gsi,
        });
        Ok(())
    }

    /// Where they are, for the tables.
    #[must_use]
    pub fn places(&self) -> &[VirtioPlace] {
        &self.places
    }

    /// Stops their threads; what is being answered is finished first, in so much time.
    pub fn stop(&self, patience: Duration) {
        let _ = self.stop.write(1);
        for transport in &self.transports {
            transport.settle(patience);
        }
    }
}
