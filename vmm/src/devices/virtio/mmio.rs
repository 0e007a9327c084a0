//! The registers of a virtio device (virtio 1.2, 4.2.2), and its queues.
//!
//! Registers and queues have one lock. The device's thread holds it while it answers a batch of
//! requests, or, if the device is concurrent, to take one and to tell that it is answered ([`flight`]). Either way
//! a reset, when it returns, has left nothing in flight. What an interrupt handler touches is outside the lock.
//!
//! A queue whose indices make no sense makes the device ask for a reset; nothing else happens.

pub mod flight;
mod registers;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use serde::{Deserialize, Serialize};
use virtio_bindings::bindings::virtio_config::{
    VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_VERSION_1,
};
use virtio_bindings::bindings::virtio_mmio::{
    VIRTIO_MMIO_CONFIG, VIRTIO_MMIO_CONFIG_GENERATION, VIRTIO_MMIO_DEVICE_FEATURES,
    VIRTIO_MMIO_DEVICE_FEATURES_SEL, VIRTIO_MMIO_DEVICE_ID, VIRTIO_MMIO_DRIVER_FEATURES,
    VIRTIO_MMIO_DRIVER_FEATURES_SEL, VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING,
    VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_INTERRUPT_STATUS, VIRTIO_MMIO_MAGIC_VALUE,
    VIRTIO_MMIO_QUEUE_NUM_MAX, VIRTIO_MMIO_QUEUE_READY, VIRTIO_MMIO_QUEUE_SEL,
    VIRTIO_MMIO_SHM_LEN_HIGH, VIRTIO_MMIO_SHM_LEN_LOW, VIRTIO_MMIO_STATUS, VIRTIO_MMIO_VENDOR_ID,
    VIRTIO_MMIO_VERSION,
};
use virtio_bindings::bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC,
};
use virtio_queue::{Queue, QueueT};
use vm_device::DeviceMmio;
use vm_device::bus::{MmioAddress, MmioAddressOffset};
use vmm_sys_util::eventfd::EventFd;

use self::flight::Flights;
use self::registers::{Progress, Registers};
use super::queue::{self, Left, QUEUE_SIZE, QueueSaved};
use super::{Bell, Concurrent, VirtioDevice};
use crate::kernel::memory::Memory;

/// The register that a driver writes when a queue has something; KVM watches it.
pub const NOTIFY: u64 = virtio_bindings::bindings::virtio_mmio::VIRTIO_MMIO_QUEUE_NOTIFY as u64;
/// "virt".
const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
const VENDOR: u32 = u32::from_le_bytes(*b"VMM ");
/// Features of every device.
const COMMON: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// Registers and queues, as data.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransportSaved {
    registers: Registers,
    interrupts: u32,
    generation: u32,
    queues: Vec<QueueSaved>,
}

/// What was saved is not of such a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the saved virtio device is not one like this")]
pub struct RestoreError;

struct Core {
    registers: Registers,
    queues: Vec<Queue>,
    device: Box<dyn VirtioDevice>,
    flights: Flights,
}

/// A virtio device with its registers.
pub struct Transport {
    core: Mutex<Core>,
    /// A request in flight has been answered, or something else may be done that waited for some.
    landed: Condvar,
    /// What answers requests without the lock, if the device is such a one.
    concurrent: Option<Arc<dyn Concurrent>>,
    memory: Memory,
    /// Reasons for the interrupt that the driver has not acknowledged.
    interrupts: AtomicU32,
    /// Of the configuration space.
    generation: AtomicU32,
    /// The driver is ready; changed with the lock held.
    running: AtomicBool,
    line: EventFd,
}

impl std::fmt::Debug for Transport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Transport").finish_non_exhaustive()
    }
}

impl Transport {
    /// A device after a reset.
    #[must_use]
    pub fn new(device: Box<dyn VirtioDevice>, memory: &Memory, line: EventFd) -> Arc<Self> {
        let queue = |_| Queue::new(QUEUE_SIZE).expect("a power of two");
        Arc::new(Self {
            landed: Condvar::new(),
            concurrent: device.concurrent(),
            core: Mutex::new(Core {
                registers: Registers::default(),
                queues: (0..device.queues()).map(queue).collect(),
                device,
                flights: Flights::default(),
            }),
            memory: Arc::clone(memory),
            interrupts: AtomicU32::new(0),
            generation: AtomicU32::new(0),
            running: AtomicBool::new(false),
            line,
        })
    }

    /// Gives the device its bell: `doorbells` are what the driver announces its queues by.
    pub fn connect(self: &Arc<Self>, doorbells: Vec<EventFd>) {
        let transport = Arc::downgrade(self);
        let bell = Bell::new(transport, doorbells);
        self.core.lock().device.connect(bell);
    }

    /// Registers and queues as they are when nothing is in flight.
    #[must_use]
    pub fn save(&self) -> TransportSaved {
        let mut core = self.core.lock();
        self.quiesce(&mut core);
        TransportSaved {
            registers: core.registers,
            interrupts: self.interrupts.load(Ordering::SeqCst),
            generation: self.generation.load(Ordering::SeqCst),
            queues: core
                .queues
                .iter()
                .map(|q| QueueSaved::of(&q.state()))
                .collect(),
        }
    }

    /// Makes them what they were when `saved` was saved.
    ///
    /// # Errors
    /// It is of another kind of device, or could not have been saved.
    pub fn restore(&self, saved: &TransportSaved) -> Result<(), RestoreError> {
        let mut core = self.core.lock();
        self.quiesce(&mut core);
        let queues: Result<Vec<Queue>, _> = saved.queues.iter().map(QueueSaved::queue).collect();
        let queues = queues.map_err(|_| RestoreError)?;
        let fits = |q: &Queue| q.max_size() == QUEUE_SIZE;
        if queues.len() != core.queues.len() || !queues.iter().all(fits) {
            return Err(RestoreError);
        }
        core.queues = queues;
        core.registers = saved.registers;
        let running = saved.registers.status & VIRTIO_CONFIG_S_DRIVER_OK != 0;
        if running {
            core.device.start(saved.registers.driver_features);
        }
        // What the device said while it started, the driver knows already.
        self.generation.store(saved.generation, Ordering::SeqCst);
        self.running.store(running, Ordering::SeqCst);
        self.interrupts.store(saved.interrupts, Ordering::SeqCst);
        if saved.interrupts != 0 {
            let _ = self.line.write(1);
        }
        Ok(())
    }

    /// Waits, at most so long, until no request is being answered.
    pub fn settle(&self, patience: Duration) {
        let until = Instant::now() + patience;
        if let Some(mut core) = self.core.try_lock_until(until) {
            self.quiesce_until(&mut core, until);
        }
    }

    /// Answers what is in a queue, one queue length at most.
    #[must_use]
    pub fn serve(&self, index: usize) -> Left {
        if self.is_concurrent() {
            for _ in 0..QUEUE_SIZE {
                match self.take(index) {
                    Some(flight) => flight.finish(),
                    None => return Left::Nothing,
                }
            }
            return Left::More;
        }
        let mut core = self.core.lock();
        if !core.registers.may_answer() {
            return Left::Nothing;
        }
        let Core { queues, device, .. } = &mut *core;
        let Some(queue) = queues.get_mut(index) else {
            return Left::Nothing;
        };
        if !queue.ready() {
            return Left::Nothing;
        }
        match queue::answer_all(queue, &self.memory, device.as_mut(), index) {
            Ok(turn) => {
                if turn.interrupt {
                    self.interrupt(VIRTIO_MMIO_INT_VRING);
                }
                turn.left
            }
            Err(error) => {
                self.give_up(&mut core, &error);
                Left::Nothing
            }
        }
    }

    /// A queue makes no sense: the driver is asked for a reset.
    fn give_up(&self, core: &mut Core, error: &virtio_queue::Error) {
        tracing::debug!(%error, "a virtio queue");
        core.registers.status |= VIRTIO_CONFIG_S_NEEDS_RESET;
        self.interrupt(VIRTIO_MMIO_INT_CONFIG);
    }

    /// Tells the driver that the configuration space has changed. Never waits.
    pub(super) fn configuration_changed(&self) {
        self.generation.fetch_add(1, Ordering::SeqCst);
        if self.running.load(Ordering::SeqCst) {
            self.interrupt(VIRTIO_MMIO_INT_CONFIG);
        }
    }

    /// What is in a queue is announced with the lock held: who saves the device has the answer with its interrupt.
    fn interrupt(&self, reason: u32) {
        self.interrupts.fetch_or(reason, Ordering::SeqCst);
        let _ = self.line.write(1);
    }

    fn read_register(&self, offset: u64) -> u32 {
        // What interrupt handlers read, without the lock.
        if offset == u64::from(VIRTIO_MMIO_INTERRUPT_STATUS) {
            return self.interrupts.load(Ordering::SeqCst);
        }
        let core = self.core.lock();
        let registers = &core.registers;
        let queue = core.queues.get(registers.queue as usize);
        match u32::try_from(offset).unwrap_or(u32::MAX) {
            VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            VIRTIO_MMIO_VERSION => VERSION,
            VIRTIO_MMIO_DEVICE_ID => core.device.kind(),
            VIRTIO_MMIO_VENDOR_ID => VENDOR,
            VIRTIO_MMIO_DEVICE_FEATURES => match registers.features_page {
                0 => core.offered() as u32,
                1 => (core.offered() >> 32) as u32,
                _ => 0,
            },
            VIRTIO_MMIO_QUEUE_NUM_MAX => queue.map_or(0, |q| u32::from(q.max_size())),
            VIRTIO_MMIO_QUEUE_READY => queue.map_or(0, |q| u32::from(q.ready())),
            VIRTIO_MMIO_STATUS => registers.status,
            VIRTIO_MMIO_CONFIG_GENERATION => self.generation.load(Ordering::SeqCst),
            // No shared memory regions.
            VIRTIO_MMIO_SHM_LEN_LOW | VIRTIO_MMIO_SHM_LEN_HIGH => u32::MAX,
            _ => 0,
        }
    }

    fn write_register(&self, offset: u64, value: u32) {
        if offset == u64::from(VIRTIO_MMIO_INTERRUPT_ACK) {
            self.interrupts.fetch_and(!value, Ordering::SeqCst);
            return;
        }
        let mut core = self.core.lock();
        match u32::try_from(offset).unwrap_or(u32::MAX) {
            VIRTIO_MMIO_DEVICE_FEATURES_SEL => core.registers.features_page = value,
            VIRTIO_MMIO_DRIVER_FEATURES_SEL => core.registers.driver_features_page = value,
            VIRTIO_MMIO_DRIVER_FEATURES => core.take_features(value),
            VIRTIO_MMIO_QUEUE_SEL => core.registers.queue = value,
            VIRTIO_MMIO_STATUS if value == 0 => {
                self.quiesce(&mut core);
                core.reset();
                self.running.store(false, Ordering::SeqCst);
                self.interrupts.store(0, Ordering::SeqCst);
            }
            VIRTIO_MMIO_STATUS => {
                if core.set_status(value) == Progress::Started {
                    self.running.store(true, Ordering::SeqCst);
                    let features = core.registers.driver_features;
                    core.device.start(features);
                }
            }
            VIRTIO_MMIO_QUEUE_READY => {
                self.quiesce(&mut core);
                core.configure_queue(VIRTIO_MMIO_QUEUE_READY, value);
            }
            offset => core.configure_queue(offset, value),
        }
    }
}

impl DeviceMmio for Transport {
    fn mmio_read(&self, _base: MmioAddress, offset: MmioAddressOffset, data: &mut [u8]) {
        data.fill(0);
        let config = u64::from(VIRTIO_MMIO_CONFIG);
        if let Some(start) = offset.checked_sub(config) {
            let core = self.core.lock();
            let space = core.device.config();
            let start = usize::try_from(start).unwrap_or(usize::MAX);
            for (byte, value) in data.iter_mut().zip(space.iter().skip(start)) {
                *byte = *value;
            }
        } else if data.len() == 4 && offset.is_multiple_of(4) {
            data.copy_from_slice(&self.read_register(offset).to_le_bytes());
        }
    }

    fn mmio_write(&self, _base: MmioAddress, offset: MmioAddressOffset, data: &[u8]) {
        // No device has a configuration that a driver may write.
        if offset < u64::from(VIRTIO_MMIO_CONFIG)
            && offset.is_multiple_of(4)
            && let Ok(value) = <[u8; 4]>::try_from(data)
        {
            self.write_register(offset, u32::from_le_bytes(value));
        }
    }
}
