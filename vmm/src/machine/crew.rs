//! The threads a machine runs on, and their end.
//!
//! A thread that does not come back once the machine has ended is a bug of the VMM's; whoever waits for the machine
//! is told so then, and does not wait for ever.

use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::linux::sched::Sched;

/// How long a thread may take to come back after the machine has ended: longer than the host takes to write out what
/// a system call was asked to.
const PATIENCE: Duration = Duration::from_secs(60);
/// How often it is looked whether the machine has ended.
const LOOK: Duration = Duration::from_secs(1);

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

    /// Waits until all have ended. A panic of one ends the machine.
    ///
    /// # Errors
    /// The names of those that are still there long after the machine has ended.
    pub(super) fn join(self, sched: &Sched) -> Result<(), Vec<String>> {
        self.join_within(sched, PATIENCE)
    }

    fn join_within(mut self, sched: &Sched, patience: Duration) -> Result<(), Vec<String>> {
        drop(self.running.take());
        let mut ended: Option<Instant> = None;
        while self.gone.recv_timeout(LOOK.min(patience)) == Err(RecvTimeoutError::Timeout) {
            if sched.has_ended() && ended.get_or_insert_with(Instant::now).elapsed() >= patience {
                let left = self.threads.iter().filter(|thread| !thread.is_finished());
                let name = |thread: &JoinHandle<()>| thread.thread().name().map(str::to_owned);
                return Err(left.filter_map(name).collect());
            }
        }
        for thread in self.threads {
            if thread.join().is_err() {
                // Said by the panic itself; the others ended because of it.
                sched.end();
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn all_that_come_back_are_waited_for() {
        let (sched, mut crew) = (Arc::new(Sched::default()), Crew::new());
        let ending = Arc::clone(&sched);
        crew.start("one", move || ending.end()).unwrap();
        crew.start("two", || thread::sleep(Duration::from_millis(20)))
            .unwrap();
        assert_eq!(crew.join(&sched), Ok(()));
    }

    #[test]
    fn one_that_does_not_come_back_is_named() {
        let (sched, mut crew) = (Sched::default(), Crew::new());
        let (release, wait) = channel::<()>();
        crew.start("stuck", move || assert!(wait.recv().is_err()))
            .unwrap();
        sched.end();
        let left = crew.join_within(&sched, Duration::from_millis(5));
        assert_eq!(left, Err(vec!["stuck".to_owned()]));
        drop(release);
    }
}
