//! The thread of this process that waits for a guest's end, and who takes the guest down.

use std::io;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use parking_lot::Condvar;

use super::ready::Bell;
use crate::linux::kernel::Kernel;
use crate::locks::{Mutex, WaitMutex, rank};
use crate::machine::{Bare, Ended, RunError, take_no_signals};

/// What such a thread is given to do.
pub(super) type Job = Box<dyn FnOnce() + Send>;

/// The thread, for one guest after the other. It ends when this is dropped.
///
/// It sleeps until a guest has ended that nobody else takes down. So whoever ends one and takes it down himself
/// ([`Self::leave`]) does not wake it, and neither does the next guest.
#[derive(Debug)]
pub(super) struct Host {
    desk: Arc<Desk>,
    thread: Option<JoinHandle<()>>,
}

/// What lies there for the thread.
#[derive(Debug, Default)]
struct Desk {
    work: WaitMutex<rank::HostDesk, Work>,
    told: Condvar,
}

#[derive(Default)]
struct Work {
    meanwhile: Option<Job>,
    guest: Option<(Arc<Played>, Tells)>,
    closed: bool,
}

impl std::fmt::Debug for Work {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Work")
            .field("guest", &self.guest.is_some())
            .field("closed", &self.closed)
            .finish_non_exhaustive()
    }
}

impl Work {
    fn has_ended_guest(&self) -> bool {
        let guest = self.guest.as_ref();
        guest.is_some_and(|(guest, _)| guest.kernel.sched.has_ended())
    }
}

impl Desk {
    /// A guest has ended: the thread looks whether it is its own.
    fn ring(&self) {
        let work = self.work.lock();
        if work.guest.is_some() {
            self.told.notify_one();
        }
    }

    /// The next thing to do, waiting for it; `None` if there will be none.
    fn next(&self) -> Option<Job> {
        let mut work = self.work.lock();
        loop {
            if let Some(meanwhile) = work.meanwhile.take() {
                return Some(meanwhile);
            }
            if work.has_ended_guest() {
                let (guest, tells) = work.guest.take()?;
                return Some(Box::new(move || tells.take_down(&guest)));
            }
            if work.closed && work.guest.is_none() {
                return None;
            }
            work.wait(&self.told);
        }
    }
}

/// The thread takes nothing any more, however it ends: what is dropped with its work says so.
struct Closes<'a>(&'a Desk);

impl Drop for Closes<'_> {
    fn drop(&mut self) {
        let mut work = self.0.work.lock();
        work.closed = true;
        let left = (work.meanwhile.take(), work.guest.take());
        drop(work);
        drop(left);
    }
}

impl Host {
    /// Starts it.
    ///
    /// # Errors
    /// The host has no thread.
    pub(super) fn start() -> io::Result<Self> {
        let desk = Arc::new(Desk::default());
        let waits = Arc::clone(&desk);
        let thread = thread::Builder::new().name("guest".into());
        let thread = thread.spawn(move || {
            take_no_signals();
            let _closes = Closes(&waits);
            while let Some(job) = waits.next() {
                job();
            }
        })?;
        Ok(Self {
            desk,
            thread: Some(thread),
        })
    }

    /// Has `meanwhile` done there, and the guest taken down when it has ended, unless somebody else does. Its end is told, and
    /// `bell` is rung then.
    pub(super) fn watch(
        &self,
        guest: &Arc<Played>,
        bell: Arc<Bell>,
        meanwhile: Option<Job>,
    ) -> Arc<Finish> {
        let finish = Arc::new(Finish::default());
        let tells = Tells {
            finish: Arc::clone(&finish),
            bell,
        };
        let desk = Arc::clone(&self.desk);
        guest.kernel.sched.at_end(Box::new(move || desk.ring()));
        let mut work = self.desk.work.lock();
        if work.closed {
            // It has panicked.
            drop(work);
            drop(tells);
            return finish;
        }
        debug_assert!(work.guest.is_none(), "it watches another guest");
        work.meanwhile = meanwhile;
        work.guest = Some((Arc::clone(guest), tells));
        // It may have ended before it was watched.
        if work.meanwhile.is_some() || work.has_ended_guest() {
            self.desk.told.notify_one();
        }
        finish
    }

    /// Leaves a guest to the caller, who takes it down. False if the thread is about to.
    pub(super) fn leave(&self, guest: &Arc<Played>) -> bool {
        let mut work = self.desk.work.lock();
        let left = work.guest.take_if(|(own, _)| Arc::ptr_eq(own, guest));
        drop(work);
        left.is_some()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.desk.work.lock().closed = true;
        self.desk.told.notify_one();
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
pub(super) struct Tells {
    pub(super) finish: Arc<Finish>,
    pub(super) bell: Arc<Bell>,
}

impl Tells {
    /// Takes a guest down that has ended, unless somebody else does, and tells of it.
    pub(super) fn take_down(self, guest: &Played) {
        if let Some(finished) = guest.finish() {
            self.finish.settle(finished);
        }
    }
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
