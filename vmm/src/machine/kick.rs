//! Taking a worker out of the guest: a signal its thread blocks, which only the virtual CPU lets
//! through. Arriving before it enters, it is pending and ends the next `KVM_RUN` at once.
#![expect(unsafe_code, reason = "tgkill has no safe wrapper")]

use std::sync::atomic::{AtomicBool, Ordering};

use vmm_sys_util::signal::{SIGRTMIN, block_signal, clear_signal};

use crate::linux::sched::Kick;

/// Kicks one worker.
#[derive(Debug)]
pub struct Kicker {
    process: i32,
    thread: i32,
    /// A kick is on its way and has not been noticed yet.
    sent: AtomicBool,
}

impl Kicker {
    /// For the calling thread, which from now on blocks the signal.
    #[must_use]
    pub fn for_this_thread() -> Self {
        // It may be blocked already, inherited from the thread that started this one.
        let _ = block_signal(Self::signal());
        Self {
            process: rustix::process::getpid().as_raw_nonzero().get(),
            thread: rustix::thread::gettid().as_raw_nonzero().get(),
            sent: AtomicBool::new(false),
        }
    }

    /// The signal.
    #[must_use]
    pub fn signal() -> i32 {
        SIGRTMIN()
    }

    /// The worker has left the guest because of it: makes the next kick count again. On the worker.
    pub fn taken(&self) {
        self.sent.store(false, Ordering::SeqCst);
        if let Err(error) = clear_signal(Self::signal()) {
            tracing::debug!(?error, "a kick could not be taken from the queue");
        }
    }
}

impl Kick for Kicker {
    fn kick(&self) {
        if self.sent.swap(true, Ordering::SeqCst) {
            return;
        }
        // SAFETY: tgkill takes three numbers; a thread that has ended makes it fail with ESRCH.
        unsafe { libc::syscall(libc::SYS_tgkill, self.process, self.thread, Self::signal()) };
    }
}
