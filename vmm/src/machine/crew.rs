//! The threads a machine runs on, and their end.
//!
//! A thread that does not come back once the machine has ended is a bug of the VMM's; whoever waits for the machine
//! is told so then, and does not wait for ever.

use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// How long a thread may take to come back after the machine has ended: longer than the host takes to write out what
/// a system call was asked to.
const PATIENCE: Duration = Duration::from_secs(60);
/// Held by a thread while it runs.
#[derive(Clone)]
struct Running {
    _until_dropped: Sender<()>,
}

/// The threads.
pub(super) struct Crew {
    threads: Vec<JoinHandle<()>>,
    running: Option<Running>,
    gone: Receiver<()>,
}

impl Crew {
    pub(super) fn new() -> Self {
        let (sender, gone) = channel();
        Self {
            threads: Vec::new(),
            running: Some(Running {
                _until_dropped: sender,
            }),
            gone,
        }
    }

    /// Starts one.
    ///
    /// # Errors
    /// The host has no thread.
    pub(super) fn start(
        &mut self,
        name: &str,
        body: impl FnOnce() + Send + 'static,
    ) -> std::io::Result<()> {
        let running = self.running.clone();
        let builder = thread::Builder::new().name(name.to_owned());
        self.threads.push(builder.spawn(move || {
            let _running = running;
            body();
        })?);
        Ok(())
    }

    /// Has those look that are parked.
    pub(super) fn unpark(&self) {
        for thread in &self.threads {
            thread.thread().unpark();
        }
    }

    /// Waits until all have come back, after the machine has ended.
    ///
    /// # Errors
    /// The names of those that are still there long after that.
    pub(super) fn join(self) -> Result<(), Vec<String>> {
        self.join_within(PATIENCE)
    }

    fn join_within(mut self, patience: Duration) -> Result<(), Vec<String>> {
        drop(self.running.take());
        if self.gone.recv_timeout(patience) == Err(RecvTimeoutError::Timeout) {
            let left = self.threads.iter().filter(|thread| !thread.is_finished());
            let name = |thread: &JoinHandle<()>| thread.thread().name().map(str::to_owned);
            return Err(left.filter_map(name).collect());
        }
        for thread in self.threads {
            // A panic has said itself what it was, and ended the machine.
            let _ = thread.join();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_that_come_back_are_waited_for() {
        let mut crew = Crew::new();
        crew.start("one", || ()).unwrap();
        crew.start("two", || thread::sleep(Duration::from_millis(20)))
            .unwrap();
        assert_eq!(crew.join(), Ok(()));
    }

    #[test]
    fn one_that_does_not_come_back_is_named() {
        let mut crew = Crew::new();
        let (release, wait) = channel::<()>();
        crew.start("stuck", move || assert!(wait.recv().is_err()))
            .unwrap();
        let left = crew.join_within(Duration::from_millis(5));
        assert_eq!(left, Err(vec!["stuck".to_owned()]));
        drop(release);
    }
}
