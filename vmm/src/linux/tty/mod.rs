//! The guest's terminal: the host's, when a standard descriptor is one.
//!
//! Editing, echo and signals from keys are the host's line discipline's work: the guest's termios
//! is set on the host's terminal. Job control is ours: which group is in the foreground is in
//! [`State::tty`](super::process::State::tty), and the host's foreground group is always the VMM's.
//!
//! The terminal is given back as it was found whenever the VMM stops itself, when the machine
//! ends, and on a panic. While another job has the host's terminal it is left alone, and what the
//! guest sets is kept for later.
//!
//! Known holes: `TCSADRAIN` on a terminal stopped by Ctrl-S keeps a worker; `TIOCNOTTY` of a
//! process that does not lead its session does nothing; a VMM killed by `SIGKILL` or a fault of its
//! own leaves the terminal as the guest set it.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;

mod control;
mod file;
mod host;
pub(super) mod host_job;
pub mod host_signals;
mod job;
mod saved;

pub use file::Terminal;
pub use host_signals::{HostSignals, MainStops};
pub use saved::SavedTty;

use super::Errno;
use crate::locks::{Mutex, rank};
use host::{Termios, When};

/// The terminal.
#[derive(Debug)]
pub struct Tty {
    fd: OwnedFd,
    /// As it was found.
    original: Termios,
    /// As the guest wants it; `None` until it has set anything.
    wanted: Mutex<rank::TtyWanted, Option<Termios>>,
}

impl Tty {
    /// The terminal behind `fd`, if it is one.
    #[must_use]
    pub fn of(fd: BorrowedFd<'_>) -> Option<Self> {
        let original = host::get(fd).ok()?;
        let fd = rustix::io::fcntl_dupfd_cloexec(fd, 3).ok()?;
        Some(Self {
            fd,
            original,
            wanted: Mutex::new(None),
        })
    }

    /// The attributes the guest sees.
    fn termios(&self) -> Result<Termios, Errno> {
        let wanted = *self.wanted.lock();
        match wanted {
            Some(termios) => Ok(termios),
            None => host::get(&self.fd),
        }
    }

    /// Sets them; on the host now, unless another job has its terminal.
    fn set_termios(&self, termios: Termios, when: When) -> Result<(), Errno> {
        if !self.has_terminal() {
            *self.wanted.lock() = Some(termios);
            return Ok(());
        }
        host::set(&self.fd, when, &termios)?;
        // The host may have refused parts of it.
        *self.wanted.lock() = Some(host::get(&self.fd)?);
        Ok(())
    }

    /// Whether the VMM's group is the foreground group of the host's terminal.
    fn has_terminal(&self) -> bool {
        host_job::in_foreground_of(&self.fd)
    }

    /// Gives the terminal back as it was found, if the guest changed it and it is ours to set.
    pub fn restore(&self) {
        let changed = self.wanted.lock().is_some();
        if changed
            && self.has_terminal()
            && let Err(errno) = host::set(&self.fd, When::Now, &self.original)
        {
            tracing::warn!(%errno, "cannot restore the terminal");
        }
    }

    /// Sets what the guest wants again, after the VMM was stopped.
    fn reapply(&self) {
        let wanted = *self.wanted.lock();
        if let Some(termios) = wanted
            && self.has_terminal()
            && let Err(errno) = host::set(&self.fd, When::Now, &termios)
        {
            tracing::warn!(%errno, "cannot set the terminal");
        }
    }

    /// Makes a panic of the VMM give the terminal back before it is reported.
    pub fn restore_on_panic(self: &Arc<Self>) {
        let tty = Arc::downgrade(self);
        let report = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if let Some(tty) = tty.upgrade() {
                tty.restore();
            }
            report(info);
        }));
    }
}

impl Drop for Tty {
    fn drop(&mut self) {
        self.restore();
    }
}
