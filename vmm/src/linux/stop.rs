//! A live guest, stopped at a defined point.
//!
//! [`Kernel::stop`] returns when no guest thread runs ([`super::sched::stop`] says what that means), so the
//! guest's records and memory can be looked at, written down or forked. The guest goes on when the
//! [`Stopped`] is dropped. Its clock has not stood still meanwhile: a program sees a pause, as after `SIGSTOP`
//! and `SIGCONT`.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::kernel::Kernel;

/// A guest that stands still for as long as this lives.
pub struct Stopped {
    kernel: Arc<Kernel>,
    took: Duration,
    kicked: usize,
}

impl std::fmt::Debug for Stopped {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Stopped")
            .field("took", &self.took)
            .field("kicked", &self.kicked)
            .finish_non_exhaustive()
    }
}

impl Kernel {
    /// Stops the guest; waits until it stands still. Not for a worker. A guest that ends meanwhile is not
    /// stopped: see [`Stopped::has_ended`].
    #[must_use]
    pub fn stop(self: &Arc<Self>) -> Stopped {
        let from = Instant::now();
        let halt = self.sched.stop();
        Stopped {
            kernel: Arc::clone(self),
            took: from.elapsed(),
            kicked: halt.kicked,
        }
    }
}

impl Stopped {
    /// The guest.
    #[must_use]
    pub fn kernel(&self) -> &Arc<Kernel> {
        &self.kernel
    }

    /// Whether the machine has ended: there is nothing left to look at.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.kernel.sched.has_ended()
    }

    /// How long it took until the guest stood still.
    #[must_use]
    pub fn took(&self) -> Duration {
        self.took
    }

    /// Threads that had to be taken from their workers for it.
    #[must_use]
    pub fn kicked(&self) -> usize {
        self.kicked
    }

    /// Lets the guest go on.
    pub fn resume(self) {}
}

impl Drop for Stopped {
    fn drop(&mut self) {
        self.kernel.sched.go_on();
    }
}
