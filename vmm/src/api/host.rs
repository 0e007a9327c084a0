//! The thread of this process that waits for a guest's end, and who takes the guest down.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::thread::{self, JoinHandle};

use parking_lot::Condvar;

use super::ready::Bell;
use crate::linux::kernel::Kernel;
use crate::locks::{Mutex, WaitMutex, rank};
use crate::machine::{Bare, Ended, RunError, take_no_signals};

/// What such a thread is given to do.
pub(super) type Job = Box<dyn FnOnce() + Send>;

/// The thread, for one guest after the other. It ends when this is dropped.
#[derive(Debug)]
pub(super) struct Host {
    jobs: Option<Sender<Job>>,
    thread: Option<JoinHandle<()>>,
}

impl Host {
    /// Starts it.
    ///
    /// # Errors
    /// The host has no thread.
    pub(super) fn start() -> io::Result<Self> {
        let (jobs, to_do) = channel::<Job>();
        let thread = thread::Builder::new().name("guest".into());
        let thread = thread.spawn(move || {
            take_no_signals();
            while let Ok(job) = to_do.recv() {
                job();
            }
        })?;
        Ok(Self {
            jobs: Some(jobs),
            thread: Some(thread),
        })
    }

    /// Has `meanwhile` done there, and the guest taken down when it has ended, unless somebody else does. Its end is told, and
    /// `bell` is rung then.
    pub(super) fn watch(
        &self,
        guest: &Arc<Played>,
        bell: Arc<Bell>,
        meanwhile: Job,
    ) -> Arc<Finish> {
        let finish = Arc::new(Finish::default());
        let tells = Tells {
            finish: Arc::clone(&finish),
            bell,
        };
        let guest = Arc::clone(guest);
        let job = Box::new(move || {
            meanwhile();
            guest.kernel.sched.wait_for_end();
            if let Some(finished) = guest.finish() {
                tells.finish.settle(finished);
            }
        });
        // A thread that has panicked takes no job: what is dropped with it says so.
        let _gone = self.jobs.as_ref().map(|jobs| jobs.send(job));
        finish
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        drop(self.jobs.take());
        if let Some(thread) = self.thread.take() {
            // A panic has said itself what it was.
            let _ = thread.join();
        }
    }
}

/// Takes down a guest that has ended or ends soon.
pub(super) type TakeDown = Box<dyn FnOnce() -> Result<(Ended, Option<Bare>), RunError> + Send>;

/// A guest that runs. Whoever comes first takes it down.
pub(super) struct Played {
    pub(super) kernel: Arc<Kernel>,
    take_down: Mutex<rank::TakeDown, Option<TakeDown>>,
}

impl Played {
    pub(super) fn new(kernel: &Arc<Kernel>, take_down: TakeDown) -> Self {
        Self {
            kernel: Arc::clone(kernel),
            take_down: Mutex::new(Some(take_down)),
        }
    }

    /// Takes it down here, unless somebody does already.
    pub(super) fn finish(&self) -> Option<Finished> {
        let take_down = self.take_down.lock().take()?;
        Some(match take_down() {
            Ok((ended, left)) => Finished {
                how: How::Ended(Box::new(ended)),
                left,
            },
            Err(error) => Finished {
                how: How::Failed(error),
                left: None,
            },
        })
    }
}

/// How it ended.
#[derive(Debug)]
pub(super) enum How {
    /// As the machine says.
    Ended(Box<Ended>),
    /// The machine failed.
    Failed(RunError),
    /// The thread panicked.
    Panicked,
}

/// A guest's end.
pub(super) struct Finished {
    pub(super) how: How,
    /// Its machine, if that can have another guest.
    pub(super) left: Option<Bare>,
}

/// Where a guest's end is waited for.
#[derive(Default)]
pub(super) struct Finish {
    state: WaitMutex<rank::Finish, Option<Finished>>,
    told: Condvar,
}

impl Finish {
    fn settle(&self, finished: Finished) {
        self.state.lock().get_or_insert(finished);
        self.told.notify_all();
    }

    pub(super) fn is_there(&self) -> bool {
        self.state.lock().is_some()
    }

    /// Waits for it; once.
    pub(super) fn wait(&self) -> Finished {
        let mut state = self.state.lock();
        loop {
            match state.take() {
                Some(finished) => return finished,
                None => state.wait(&self.told),
            }
        }
    }
}

/// Tells of a guest's end, however that comes.
struct Tells {
    finish: Arc<Finish>,
    bell: Arc<Bell>,
}

impl Drop for Tells {
    fn drop(&mut self) {
        self.finish.settle(Finished {
            how: How::Panicked,
            left: None,
        });
        self.bell.ring();
    }
}
