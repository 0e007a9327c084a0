//! A guest that runs, in a thread of this process that waits for its machine's end.

use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::sync::Arc;

use super::error::{FreezeError, SignalError, SpawnError, WaitError};
use super::host::{Finish, Finished, Host, How, Job, Played, TakeDown};
use super::ready::Ready;
use super::template::Template;
use crate::config::ReadyWhen;
use crate::linux::kernel::Kernel;
use crate::machine::report::Report;
use crate::machine::{Bare, Counts, End, Ended, Machine, RunError, Verbs, Wanted, without_signals};
use crate::snapshot::guest::MachineData;

/// What others know a guest by.
#[derive(Debug)]
pub(super) struct Known<'a> {
    /// Its name.
    pub(super) name: &'a str,
    /// What it does when it is ready.
    pub(super) ready: Option<&'a ReadyWhen>,
    /// Its machine, to make another one.
    pub(super) data: MachineData,
    /// Who takes the machine that it leaves.
    pub(super) home: Option<Template>,
}

/// A machine, as those see it who do not run it.
pub(super) struct Seen {
    kernel: Arc<Kernel>,
    counts: Counts,
}

impl Seen {
    pub(super) fn of(machine: &Machine) -> Self {
        Self {
            kernel: machine.kernel(),
            counts: machine.counts(),
        }
    }
}

/// A guest in a machine that it shares, as those see it who do not run it.
pub(super) struct Tenancy {
    pub(super) played: Arc<Played>,
    pub(super) counts: Counts,
}

/// A guest that was started.
pub(super) struct Running {
    name: String,
    /// While nobody has waited for its end.
    live: Option<Live>,
    over: Option<Over>,
    /// The machine it has left, if that can have another guest.
    left: Option<Bare>,
    /// Taken with what it has left; none of a guest that shares its machine.
    host: Option<Host>,
    /// Whose machine it is.
    home: Option<Template>,
}

struct Live {
    played: Arc<Played>,
    counts: Counts,
    verbs: Verbs,
    ready: Ready,
    finish: Arc<Finish>,
}

/// How it ended.
struct Over {
    how: Result<ExitStatus, WaitError>,
    report: Report,
}

impl Running {
    /// Lets a guest run: `begin` does it, and gives what takes it down, and what the thread of `host` does beside it.
    ///
    /// # Errors
    /// `begin`'s.
    pub(super) fn start(
        seen: Seen,
        known: Known<'_>,
        host: Host,
        begin: impl FnOnce() -> Result<(TakeDown, Option<Job>), RunError>,
    ) -> Result<Self, RunError> {
        let Seen { kernel, counts } = seen;
        let ready = Ready::watch(&kernel, known.ready, known.name);
        let verbs = Verbs::new(&kernel, known.data, None, None);
        let (take_down, meanwhile) = without_signals(begin)?;
        let played = Arc::new(Played::new(&kernel, take_down));
        let finish = host.watch(&played, Arc::clone(ready.bell()), meanwhile);
        Ok(Self {
            name: known.name.to_owned(),
            live: Some(Live {
                played,
                counts,
                verbs,
                ready,
                finish,
            }),
            over: None,
            left: None,
            host: Some(host),
            home: known.home,
        })
    }

    /// A guest that shares its machine and runs already: `ready` has watched it since before it ran, and `finish` tells of its
    /// end.
    pub(super) fn beside_others(
        tenant: Tenancy,
        known: Known<'_>,
        ready: Ready,
        finish: Arc<Finish>,
    ) -> Self {
        let Tenancy { played, counts } = tenant;
        Self {
            name: known.name.to_owned(),
            live: Some(Live {
                verbs: Verbs::new(&played.kernel, known.data, None, None),
                played,
                counts,
                ready,
                finish,
            }),
            over: None,
            left: None,
            host: None,
            home: known.home,
        }
    }

    /// Ends the guest, as if its first program had been killed. It takes effect soon.
    pub(super) fn kill(&self) {
        if let Some(live) = &self.live {
            let mut state = live.played.kernel.state();
            state.main_status.get_or_insert(libc::SIGKILL);
            drop(state);
            live.played.kernel.sched.end();
        }
    }

    /// Ends it, as [`Self::kill`] does, and takes it down, in this thread if it is the first that comes to it.
    pub(super) fn end(&mut self) {
        if let (Some(host), Some(live)) = (&self.host, &self.live) {
            host.leave(&live.played);
        }
        self.kill();
        let here = self.live.as_ref();
        let here = here.and_then(|live| without_signals(|| live.played.finish()));
        if let Some((finished, live)) = here.and_then(|done| Some((done, self.live.take()?))) {
            live.ready.bell().ring();
            self.is_over(&live, finished);
        } else {
            // However it ended.
            let _ = self.wait();
        }
    }

    fn is_over(&mut self, live: &Live, finished: Finished) {
        let Finished { how, left } = finished;
        self.left = left;
        self.over = Some(match how {
            How::Ended(ended) => Over {
                how: status(&ended),
                report: ended.report,
            },
            How::Failed(error) => Over {
                how: Err(WaitError::Machine(Arc::new(error))),
                report: live.counts.report(),
            },
            How::Panicked => Over {
                how: Err(WaitError::Failed),
                report: live.counts.report(),
            },
        });
    }

    pub(super) fn signal(&self, signo: i32) -> Result<(), SignalError> {
        if !(1..=64).contains(&signo) {
            return Err(SignalError::Number(signo));
        }
        let live = self.live.as_ref().ok_or(SignalError::Ended)?;
        live.verbs.signal(signo).map_err(|_| SignalError::Ended)
    }

    pub(super) fn has_ended(&self) -> bool {
        self.live.as_ref().is_none_or(|live| live.finish.is_there())
    }

    /// Waits for its end, and gives back what it had.
    pub(super) fn wait(&mut self) -> Result<ExitStatus, WaitError> {
        if let Some(live) = self.live.take() {
            let finished = live.finish.wait();
            self.is_over(&live, finished);
        }
        match &self.over {
            Some(over) => over.how.clone(),
            None => Err(WaitError::Failed),
        }
    }

    pub(super) fn report(&self) -> Report {
        match (&self.live, &self.over) {
            (Some(live), _) => live.counts.report(),
            (None, Some(over)) => over.report.clone(),
            (None, None) => Report::default(),
        }
    }

    pub(super) fn wait_until_ready(&self) -> Result<(), FreezeError> {
        let live = self.live.as_ref().ok_or(FreezeError::Ended)?;
        live.ready
            .wait(&live.played.kernel)
            .map_err(|_| FreezeError::Ended)
    }

    pub(super) fn freeze(&self) -> Result<Template, FreezeError> {
        let live = self.live.as_ref().ok_or(FreezeError::Ended)?;
        self.wait_until_ready()?;
        let (file, told) = live
            .verbs
            .hand_out_template(&self.name)
            .map_err(|error| match live.played.kernel.sched.has_ended() {
                true => FreezeError::Ended,
                false => error.into(),
            })?;
        let file = file.try_clone().map_err(FreezeError::Host)?;
        let pause = std::time::Duration::from_micros(told.pause_us);
        Template::of_file(file, &self.name, Some(pause))
    }
}

/// A machine without a guest, and the thread that waits for those it will have.
pub(super) struct Warm {
    pub(super) bare: Bare,
    pub(super) host: Host,
}

impl Warm {
    /// Makes one.
    ///
    /// # Errors
    /// The host cannot.
    pub(super) fn new(wanted: &Wanted) -> Result<Self, SpawnError> {
        Ok(Self {
            bare: Bare::new(wanted)?,
            host: Host::start().map_err(SpawnError::Thread)?,
        })
    }
}

impl Running {
    /// The machine that a guest that was waited for has left.
    pub(super) fn take_left(&mut self) -> Option<Warm> {
        let bare = self.left.take()?;
        let host = self.host.take()?;
        Some(Warm { bare, host })
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.end();
        if let (Some(home), Some(left)) = (self.home.take(), self.take_left()) {
            home.take_back(left);
        }
    }
}

fn status(ended: &Ended) -> Result<ExitStatus, WaitError> {
    match ended.end {
        End::Program(status) => Ok(ExitStatus::from_raw(status)),
        End::TimedOut => Err(WaitError::TimedOut),
        End::Failed => Err(WaitError::Failed),
    }
}
