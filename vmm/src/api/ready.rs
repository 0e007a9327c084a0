//! Waiting until a guest is ready.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Condvar;

use crate::config::ReadyWhen;
use crate::control::ready::ReadyLine;
use crate::linux::kernel::Kernel;
use crate::locks::{WaitMutex, rank};

/// Rung when there may be something new to see.
#[derive(Debug, Default)]
pub(super) struct Bell {
    rings: AtomicU64,
    lock: WaitMutex<rank::ReadyBell, ()>,
    rung: Condvar,
}

impl Bell {
    /// How often it rang; to be asked before looking.
    fn heard(&self) -> u64 {
        self.rings.load(Ordering::SeqCst)
    }

    pub(super) fn ring(&self) {
        let guard = self.lock.lock();
        self.rings.fetch_add(1, Ordering::SeqCst);
        drop(guard);
        self.rung.notify_all();
    }

    /// Waits until it rings once more than was heard.
    fn wait(&self, heard: u64) {
        let mut guard = self.lock.lock();
        while self.rings.load(Ordering::SeqCst) == heard {
            guard.wait(&self.rung);
        }
    }
}

/// What a guest does when it is ready.
#[derive(Debug)]
enum When {
    /// It is from the start.
    Always,
    /// It has printed a line.
    Printed(Arc<ReadyLine>),
    /// It asks to be frozen.
    Asked,
}

/// Knows when a guest is ready.
#[derive(Debug)]
pub(super) struct Ready {
    when: When,
    bell: Arc<Bell>,
}

/// A guest that ended is never ready.
#[derive(Debug)]
pub(super) struct Gone;

impl Ready {
    /// Has the guest watched; before it runs. `name` is what it is called by those who freeze it.
    pub(super) fn watch(kernel: &Kernel, when: Option<&ReadyWhen>, name: &str) -> Self {
        let bell = Arc::new(Bell::default());
        let rings = Arc::clone(&bell);
        let when = match when {
            None => When::Always,
            Some(ReadyWhen::Printed(line)) => {
                let line = Arc::new(ReadyLine::new(line));
                let fed = Arc::clone(&line);
                let printed = Box::new(move |bytes: &[u8]| {
                    fed.feed(bytes);
                    if fed.is_ready() {
                        rings.ring();
                    }
                });
                let _first = kernel.printed.set(printed);
                When::Printed(line)
            }
            Some(ReadyWhen::Frozen) => {
                kernel.freezes.allow(name, Box::new(move || rings.ring()));
                When::Asked
            }
        };
        Self { when, bell }
    }

    /// To be rung at the guest's end.
    pub(super) fn bell(&self) -> &Arc<Bell> {
        &self.bell
    }

    fn is_ready(&self, kernel: &Kernel) -> bool {
        match &self.when {
            When::Always => true,
            When::Printed(line) => line.is_ready(),
            When::Asked => kernel.freezes.is_wanted(),
        }
    }

    /// Waits until the guest is ready.
    ///
    /// # Errors
    /// It has ended.
    pub(super) fn wait(&self, kernel: &Kernel) -> Result<(), Gone> {
        loop {
            let heard = self.bell.heard();
            if kernel.sched.has_ended() {
                return Err(Gone);
            }
            if self.is_ready(kernel) {
                return Ok(());
            }
            self.bell.wait(heard);
        }
    }
}
