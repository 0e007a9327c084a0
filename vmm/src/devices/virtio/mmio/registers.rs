//! What the registers remember, and what writing them does to the queues and the device.

use serde::{Deserialize, Serialize};
use virtio_bindings::bindings::virtio_config::{
    VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK,
    VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_VERSION_1,
};
use virtio_bindings::bindings::virtio_mmio::{
    VIRTIO_MMIO_QUEUE_AVAIL_HIGH, VIRTIO_MMIO_QUEUE_AVAIL_LOW, VIRTIO_MMIO_QUEUE_DESC_HIGH,
    VIRTIO_MMIO_QUEUE_DESC_LOW, VIRTIO_MMIO_QUEUE_NUM, VIRTIO_MMIO_QUEUE_READY,
    VIRTIO_MMIO_QUEUE_USED_HIGH, VIRTIO_MMIO_QUEUE_USED_LOW,
};
use virtio_bindings::bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{Queue, QueueT};

use super::{COMMON, Core};

/// What the registers remember.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Registers {
    pub(super) status: u32,
    pub(super) features_page: u32,
    pub(super) driver_features_page: u32,
    pub(super) driver_features: u64,
    pub(super) queue: u32,
}

impl Registers {
    /// The driver is ready, and its queues have made sense so far.
    pub(super) fn may_answer(self) -> bool {
        self.status & VIRTIO_CONFIG_S_DRIVER_OK != 0
            && self.status & VIRTIO_CONFIG_S_NEEDS_RESET == 0
    }
}

/// What writing the status did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Progress {
    /// The driver has become ready.
    Started,
    /// It was already, or is not yet.
    Other,
}

impl Core {
    pub(super) fn offered(&self) -> u64 {
        COMMON | self.device.features()
    }

    pub(super) fn reset(&mut self) {
        self.registers = Registers::default();
        self.queues.iter_mut().for_each(Queue::reset);
        self.flights.forget();
    }

    pub(super) fn take_features(&mut self, value: u32) {
        if self.registers.status & VIRTIO_CONFIG_S_FEATURES_OK != 0 {
            return;
        }
        let shift = match self.registers.driver_features_page {
            0 => 0,
            1 => 32,
            _ => return,
        };
        let kept = self.registers.driver_features & !(u64::from(u32::MAX) << shift);
        self.registers.driver_features = kept | u64::from(value) << shift;
    }

    /// Bits are only ever added; FEATURES_OK only for features that were offered, DRIVER_OK only
    /// after it.
    pub(super) fn set_status(&mut self, value: u32) -> Progress {
        let registers = &self.registers;
        let (old, features) = (registers.status, registers.driver_features);
        let mut added = value & !old & !VIRTIO_CONFIG_S_NEEDS_RESET;
        let acceptable = features & !self.offered() == 0 && features & 1 << VIRTIO_F_VERSION_1 != 0;
        if !acceptable {
            added &= !VIRTIO_CONFIG_S_FEATURES_OK;
        }
        if (old | added) & VIRTIO_CONFIG_S_FEATURES_OK == 0 || old & VIRTIO_CONFIG_S_FAILED != 0 {
            added &= !VIRTIO_CONFIG_S_DRIVER_OK;
        }
        self.registers.status |= added;
        if added & VIRTIO_CONFIG_S_DRIVER_OK == 0 {
            return Progress::Other;
        }
        let events = features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        for queue in &mut self.queues {
            queue.set_event_idx(events);
        }
        Progress::Started
    }

    pub(super) fn configure_queue(&mut self, offset: u32, value: u32) {
        let running = self.registers.status & VIRTIO_CONFIG_S_DRIVER_OK != 0;
        let Some(queue) = self.queues.get_mut(self.registers.queue as usize) else {
            return;
        };
        if offset == VIRTIO_MMIO_QUEUE_READY {
            queue.set_ready(value & 1 != 0);
            return;
        }
        // A queue in use keeps its place.
        if running || queue.ready() {
            return;
        }
        match offset {
            VIRTIO_MMIO_QUEUE_NUM => queue.set_size(u16::try_from(value).unwrap_or(0)),
            VIRTIO_MMIO_QUEUE_DESC_LOW => queue.set_desc_table_address(Some(value), None),
            VIRTIO_MMIO_QUEUE_DESC_HIGH => queue.set_desc_table_address(None, Some(value)),
            VIRTIO_MMIO_QUEUE_AVAIL_LOW => queue.set_avail_ring_address(Some(value), None),
            VIRTIO_MMIO_QUEUE_AVAIL_HIGH => queue.set_avail_ring_address(None, Some(value)),
            VIRTIO_MMIO_QUEUE_USED_LOW => queue.set_used_ring_address(Some(value), None),
            VIRTIO_MMIO_QUEUE_USED_HIGH => queue.set_used_ring_address(None, Some(value)),
            _ => {}
        }
    }
}
