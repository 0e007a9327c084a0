//! What a machine has of the process it is in: standard descriptors and signals; and who watches them.

use std::sync::Arc;

use crate::linux::events::Events;
use crate::linux::kernel::Kernel;
use crate::linux::sched::roster::GuestId;
use crate::linux::stdio::Given;
use crate::linux::tty::HostSignals;

/// Where the signals of this process go. They are the whole process's: at most one machine in it has them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProcessSignals {
    /// Those of the keyboard, of the terminal and of who ends this process become the guest's; a guest that stops
    /// itself stops the process.
    PassedOn,
    /// The process's own affair.
    LeftAlone,
}

/// What a guest gets of the process it is in.
#[derive(Debug)]
pub struct HostSide {
    /// Its descriptors 0 to 2.
    pub stdio: Given,
    /// The signals.
    pub signals: ProcessSignals,
}

impl HostSide {
    /// All there is: for a process that is there for this guest alone.
    ///
    /// # Errors
    /// The host has no descriptor left.
    pub fn whole_process() -> std::io::Result<Self> {
        Ok(Self {
            stdio: Given::inherited()?,
            signals: ProcessSignals::PassedOn,
        })
    }
}

/// What watches the host.
#[derive(Debug)]
pub struct HostIo {
    events: Arc<Events>,
    signals: ProcessSignals,
}

/// The watchers, running.
pub struct Watching {
    events: Arc<Events>,
    guest: GuestId,
    signals: Option<HostSignals>,
}

impl HostIo {
    /// With the watcher of the descriptors the guest was given.
    #[must_use]
    pub fn new(events: Arc<Events>, signals: ProcessSignals) -> Self {
        Self { events, signals }
    }

    /// Starts to take the process's signals, if they are the guest's.
    #[must_use]
    pub fn start(&self, kernel: &Arc<Kernel>) -> Watching {
        let taken = match self.signals {
            ProcessSignals::PassedOn => HostSignals::start(kernel).map(Some),
            ProcessSignals::LeftAlone => Ok(None),
        };
        let signals = match taken {
            Ok(signals) => signals,
            Err(error) => {
                tracing::warn!(%error, "signals are not passed on to the guest");
                None
            }
        };
        Watching {
            events: Arc::clone(&self.events),
            guest: kernel.sched.guest(),
            signals,
        }
    }
}

impl Watching {
    /// Stops, and gives the terminal back. The watcher of descriptors is the machine's, and ends with it.
    pub(super) fn stop(self) {
        self.events.forget(self.guest);
        if let Some(signals) = self.signals {
            signals.stop();
        }
    }
}
