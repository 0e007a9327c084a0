//! The threads that watch the host for the machine: descriptors guest threads wait for, and signals.

use std::sync::Arc;

use crate::linux::events::Events;
use crate::linux::kernel::Kernel;
use crate::linux::tty::HostSignals;

/// What watches the host.
#[derive(Debug)]
pub struct HostIo {
    events: Arc<Events>,
}

/// The watchers, running.
pub struct Watching {
    events: Arc<Events>,
    signals: Option<HostSignals>,
}

impl HostIo {
    /// With the watcher of the descriptors the machine inherited.
    #[must_use]
    pub fn new(events: Arc<Events>) -> Self {
        Self { events }
    }

    /// Starts to take the host's signals.
    #[must_use]
    pub fn start(&self, kernel: &Arc<Kernel>) -> Watching {
        let signals = match HostSignals::start(kernel) {
            Ok(signals) => Some(signals),
            Err(error) => {
                tracing::warn!(%error, "signals are not passed on to the guest");
                None
            }
        };
        Watching {
            events: Arc::clone(&self.events),
            signals,
        }
    }
}

impl Watching {
    /// Stops, and gives the terminal back.
    pub fn stop(self) {
        self.events.stop();
        if let Some(signals) = self.signals {
            signals.stop();
        }
    }
}
