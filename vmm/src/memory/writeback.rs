//! The thread that writes back what guests stored through shared mappings of files.
//!
//! It runs once a second as long as a file is mapped so, and sleeps otherwise. A file that is mapped
//! while the machine ends is written by [`super::Sections::close`].

use std::time::{Duration, Instant};

use parking_lot::Condvar;

use super::Memory;
use crate::locks::{WaitMutex, rank};

/// How long stores through a mapping wait before they are written, if nobody asks for it.
const PERIOD: Duration = Duration::from_secs(1);

#[derive(Debug, Default)]
struct State {
    woken: bool,
    ended: bool,
}

/// Wakes the thread.
#[derive(Debug, Default)]
pub(super) struct Bell {
    state: WaitMutex<rank::WritebackBell, State>,
    rung: Condvar,
}

impl Bell {
    /// Something may have to be written soon, or let go.
    pub(super) fn ring(&self) {
        self.state.lock().woken = true;
        self.rung.notify_one();
    }

    pub(super) fn end(&self) {
        self.state.lock().ended = true;
        self.rung.notify_one();
    }

    /// Waits for the next round; false at the end.
    fn wait(&self, idle: bool) -> bool {
        let mut state = self.state.lock();
        if idle {
            while !state.woken && !state.ended {
                state.wait(&self.rung);
            }
        }
        // What comes within one period is done together.
        let until = Instant::now() + PERIOD;
        while !state.ended && Instant::now() < until {
            state.wait_for(&self.rung, until.saturating_duration_since(Instant::now()));
        }
        state.woken = false;
        !state.ended
    }
}

impl Memory {
    /// The thread that writes mapped files back: returns when its bell has been told to end.
    pub(super) fn run_writeback(&self) {
        let mut busy = false;
        while self.bell.wait(!busy) {
            busy = self.sections.tidy(self);
        }
    }
}
