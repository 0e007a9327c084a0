//! A guest that runs, in a thread of this process that waits for its machine's end.

use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::sync::Arc;
use std::thread::JoinHandle;

use super::error::{FreezeError, SignalError, SpawnError, WaitError};
use super::ready::{Bell, Ready};
use super::template::Template;
use crate::config::ReadyWhen;
use crate::linux::kernel::Kernel;
use crate::machine::report::Report;
use crate::machine::{Counts, End, Ended, Machine, RunError, Verbs, take_no_signals};
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

/// A guest that was started. Dropping it ends the guest.
pub(super) struct Running {
    name: String,
    /// While nobody has waited for its end.
    live: Option<Live>,
    over: Option<Over>,
}

struct Live {
    kernel: Arc<Kernel>,
    counts: Counts,
    verbs: Verbs,
    ready: Ready,
    runs: JoinHandle<Result<Ended, RunError>>,
}

/// How it ended.
struct Over {
    how: Result<ExitStatus, WaitError>,
    report: Report,
}

/// Rings when the guest has ended, however that comes.
struct RingAtEnd(Arc<Bell>);

impl Drop for RingAtEnd {
    fn drop(&mut self) {
        self.0.ring();
    }
}

impl Running {
    /// Lets a guest run, in a thread: `run` does it.
    ///
    /// # Errors
    /// The host has no thread.
    pub(super) fn start(
        seen: Seen,
        known: Known<'_>,
        run: impl FnOnce() -> Result<Ended, RunError> + Send + 'static,
    ) -> Result<Self, SpawnError> {
        let Seen { kernel, counts } = seen;
        let ready = Ready::watch(&kernel, known.ready, known.name);
        let verbs = Verbs::new(&kernel, known.data, None, None);
        let rings = RingAtEnd(Arc::clone(ready.bell()));
        let thread = std::thread::Builder::new().name("guest".into());
        let runs = thread.spawn(move || {
            let _rings = rings;
            take_no_signals();
            run()
        });
        Ok(Self {
            name: known.name.to_owned(),
            live: Some(Live {
                kernel,
                counts,
                verbs,
                ready,
                runs: runs.map_err(SpawnError::Thread)?,
            }),
            over: None,
        })
    }

    /// Ends the guest, as if its first program had been killed. It takes effect soon.
    pub(super) fn kill(&self) {
        if let Some(live) = &self.live {
            let mut state = live.kernel.state();
            state.main_status.get_or_insert(libc::SIGKILL);
            drop(state);
            live.kernel.sched.end();
        }
    }

    pub(super) fn signal(&self, signo: i32) -> Result<(), SignalError> {
        if !(1..=64).contains(&signo) {
            return Err(SignalError::Number(signo));
        }
        let live = self.live.as_ref().ok_or(SignalError::Ended)?;
        live.verbs.signal(signo).map_err(|_| SignalError::Ended)
    }

    pub(super) fn has_ended(&self) -> bool {
        self.live
            .as_ref()
            .is_none_or(|live| live.runs.is_finished())
    }

    /// Waits for its end, and gives back what it had.
    pub(super) fn wait(&mut self) -> Result<ExitStatus, WaitError> {
        if let Some(live) = self.live.take() {
            let how = match live.runs.join() {
                Ok(Ok(ended)) => status(&ended),
                Ok(Err(error)) => Err(WaitError::Machine(Arc::new(error))),
                // The panic has said itself what it was.
                Err(_) => Err(WaitError::Failed),
            };
            let report = live.counts.report();
            self.over = Some(Over { how, report });
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
            .wait(&live.kernel)
            .map_err(|_| FreezeError::Ended)
    }

    pub(super) fn freeze(&self) -> Result<Template, FreezeError> {
        let live = self.live.as_ref().ok_or(FreezeError::Ended)?;
        self.wait_until_ready()?;
        let (file, told) = live
            .verbs
            .hand_out_template(&self.name)
            .map_err(|error| match live.kernel.sched.has_ended() {
                true => FreezeError::Ended,
                false => error.into(),
            })?;
        let file = file.try_clone().map_err(FreezeError::Host)?;
        let pause = std::time::Duration::from_micros(told.pause_us);
        Template::of_file(file, &self.name, Some(pause))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.kill();
        // However it ended.
        let _ = self.wait();
    }
}

fn status(ended: &Ended) -> Result<ExitStatus, WaitError> {
    match ended.end {
        End::Program(status) => Ok(ExitStatus::from_raw(status)),
        End::TimedOut => Err(WaitError::TimedOut),
        End::Failed => Err(WaitError::Failed),
    }
}
