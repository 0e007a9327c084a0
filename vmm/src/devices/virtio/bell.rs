//! How a device gets attention without having been asked.

use std::sync::Weak;

use vmm_sys_util::eventfd::EventFd;

use super::mmio::Transport;

/// How a device gets its driver's attention without having been asked. Never waits.
#[derive(Debug)]
pub struct Bell {
    transport: Weak<Transport>,
    doorbells: Vec<EventFd>,
}

impl Bell {
    /// For a device behind `transport` whose queues are announced by `doorbells`.
    pub(super) fn new(transport: Weak<Transport>, doorbells: Vec<EventFd>) -> Self {
        Self {
            transport,
            doorbells,
        }
    }

    /// Has the device's thread look at a queue again.
    pub fn look(&self, queue: usize) {
        if let Some(doorbell) = self.doorbells.get(queue) {
            let _ = doorbell.write(1);
        }
    }

    /// Tells the driver that the configuration space has changed.
    pub fn configuration_changed(&self) {
        if let Some(transport) = self.transport.upgrade() {
            transport.configuration_changed();
        }
    }
}
