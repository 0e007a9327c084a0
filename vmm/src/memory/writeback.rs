//! The thread that writes back what guests stored through shared mappings of files.
//!
//! It runs once a second as long as a file is mapped so, and sleeps otherwise. A file that is mapped
//! while the machine ends is written by [`Writeback::stop`].

use std::sync::Arc;
use std::thread::{self, JoinHandle};
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

    fn end(&self) {
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

/// The running thread.
#[derive(Debug)]
pub struct Writeback {
    memory: Arc<Memory>,
    thread: Option<JoinHandle<()>>,
}

impl Writeback {
    /// Starts it.
    ///
    /// # Errors
    /// The host has no thread.
    pub fn start(memory: &Arc<Memory>) -> std::io::Result<Self> {
        let ours = Arc::clone(memory);
        let thread = thread::Builder::new().name("writeback".into());
        let thread = thread.spawn(move || {
            let mut busy = false;
            while ours.bell.wait(!busy) {
                busy = ours.sections.tidy(&ours);
            }
        })?;
        Ok(Self {
            memory: Arc::clone(memory),
            thread: Some(thread),
        })
    }

    /// Ends it. What is left to write is written by [`super::Sections::close`].
    pub fn stop(mut self) {
        self.end();
    }

    fn end(&mut self) {
        self.memory.bell.end();
        if let Some(thread) = self.thread.take() {
            // Its panic has been said.
            let _ = thread.join();
        }
    }
}

impl Drop for Writeback {
    fn drop(&mut self) {
        self.end();
    }
}
