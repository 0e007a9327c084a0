//! A guest, as its owner has it.

use std::io::{PipeReader, PipeWriter};
use std::process::{ExitStatus, Output};
use std::sync::Arc;

use super::builder::Builder;
use super::error::{FreezeError, SignalError, SpawnError, WaitError};
use super::running::Running;
use super::stdio::{Ends, read_both};
use super::template::{Fork, Template};
use crate::machine::report::Report;

/// A guest that was started from a program ([`Guest::builder`]).
#[derive(Debug)]
pub struct Started(());

impl Started {
    pub(super) fn new() -> Self {
        Self(())
    }
}

/// A guest that was made of a template ([`Template::fork`]).
#[derive(Debug)]
pub struct Forked {
    /// What was asked for.
    fork: Fork,
}

/// A guest that was made of a template.
pub type Clone = Guest<Forked>;

/// A guest: a Linux program, and all its processes, in a virtual machine that this process hosts.
///
/// It is to a machine what [`std::process::Child`] is to a process, with one difference: **dropping it ends the
/// guest**, and gives back everything it had. There can be any number of them in a process; they share nothing.
pub struct Guest<Origin = Started> {
    /// This process's end of the guest's standard input, if that is [`piped`](crate::Stdio::piped).
    pub stdin: Option<PipeWriter>,
    /// This process's end of the guest's standard output, if that is piped.
    pub stdout: Option<PipeReader>,
    /// This process's end of the guest's standard error, if that is piped.
    pub stderr: Option<PipeReader>,
    running: Running,
    origin: Origin,
}

impl<Origin> std::fmt::Debug for Guest<Origin> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Guest")
            .field("stdin", &self.stdin)
            .field("stdout", &self.stdout)
            .field("stderr", &self.stderr)
            .field("ended", &self.running.has_ended())
            .finish_non_exhaustive()
    }
}

impl Guest<Started> {
    /// A guest that will run `program`, which is looked up as `vmm run` does: in the `PATH` of the host, or in that of the
    /// guest's root if it has one ([`Builder::root`]).
    pub fn builder(program: impl AsRef<std::ffi::OsStr>) -> Builder {
        Builder::new(program.as_ref())
    }
}

impl<Origin> Guest<Origin> {
    pub(super) fn new(running: Running, ends: Ends, origin: Origin) -> Self {
        let Ends {
            stdin,
            stdout,
            stderr,
        } = ends;
        Self {
            stdin,
            stdout,
            stderr,
            running,
            origin,
        }
    }

    /// Waits until the first program has ended, which ends the others, and says how. Its standard input is closed
    /// first, if that is a pipe.
    ///
    /// # Errors
    /// See [`WaitError`]: the guest has ended, but not by itself.
    pub fn wait(&mut self) -> Result<ExitStatus, WaitError> {
        drop(self.stdin.take());
        self.running.wait()
    }

    /// Says how the guest ended, if it has.
    ///
    /// # Errors
    /// See [`WaitError`].
    pub fn try_wait(&mut self) -> Result<Option<ExitStatus>, WaitError> {
        match self.running.has_ended() {
            true => self.running.wait().map(Some),
            false => Ok(None),
        }
    }

    /// Reads what it prints, as far as that goes to pipes, until its end.
    ///
    /// # Errors
    /// See [`WaitError`]; what was printed until then is lost.
    pub fn wait_with_output(mut self) -> Result<Output, WaitError> {
        drop(self.stdin.take());
        let read = read_both(self.stdout.take(), self.stderr.take());
        let (stdout, stderr) = read.map_err(|error| WaitError::Read(Arc::new(error)))?;
        Ok(Output {
            status: self.wait()?,
            stdout,
            stderr,
        })
    }

    /// Ends the guest: all its programs at once, and without their doing. Does not wait. [`wait`](Self::wait) will say that
    /// `SIGKILL` ended it, unless it has ended before.
    pub fn kill(&mut self) {
        self.running.kill();
    }

    /// Sends a signal to the first program.
    ///
    /// # Errors
    /// It is no signal, or the guest has ended.
    pub fn signal(&self, signal: i32) -> Result<(), SignalError> {
        self.running.signal(signal)
    }

    /// What has been counted so far: exits, ioctls, faults, frames.
    #[must_use]
    pub fn report(&self) -> Report {
        self.running.report()
    }

    /// Waits until the guest is ready: has printed its [`ready_line`](Builder::ready_line), or asks to be frozen
    /// ([`ready_freeze`](Builder::ready_freeze)). A guest that was given neither is ready from the start.
    ///
    /// # Errors
    /// [`FreezeError::Ended`].
    pub fn wait_until_ready(&self) -> Result<(), FreezeError> {
        self.running.wait_until_ready()
    }

    /// Waits until the guest is ready, and makes a template of it. The guest stands still meanwhile, and goes on. If it
    /// had asked for that, its `write` to `/dev/vmm` returns, in the guest as in every clone.
    ///
    /// # Errors
    /// See [`FreezeError`].
    pub fn freeze(&self) -> Result<Template, FreezeError> {
        self.running.freeze()
    }
}

impl Guest<Forked> {
    pub(super) fn of(fork: Fork, running: Running, ends: Ends) -> Self {
        Self::new(running, ends, Forked { fork })
    }

    /// Has it be as it was made: what the guest does is ended, in the middle of it, and it goes on where its template was
    /// frozen, in the same machine. A guest that has ended runs again.
    ///
    /// What was said to [`Fork`] holds again: pipes are new ones, bytes are read from their beginning, a file goes on where it
    /// is. The guest has the same number. Its time ([`Fork::timeout`]) begins anew.
    ///
    /// # Errors
    /// See [`SpawnError`]; the guest has ended then.
    pub fn reset(&mut self) -> Result<(), SpawnError> {
        let fork = self.origin.fork.clone();
        self.restart(fork)
    }

    /// The same, as another guest of any template: with the settings, the number and the standard input, output and
    /// error of `fork`.
    ///
    /// # Errors
    /// See [`SpawnError`]; the guest has ended then.
    pub fn reset_as(&mut self, fork: &Fork) -> Result<(), SpawnError> {
        self.restart(fork.numbered())
    }

    fn restart(&mut self, fork: Fork) -> Result<(), SpawnError> {
        // First of all: the end of its input is nothing it is to hear of.
        self.running.end();
        drop((self.stdin.take(), self.stdout.take(), self.stderr.take()));
        let (running, ends) = fork.start_in(self.running.take_left(), fork.three())?;
        self.running = running;
        let Ends {
            stdin,
            stdout,
            stderr,
        } = ends;
        (self.stdin, self.stdout, self.stderr) = (stdin, stdout, stderr);
        self.origin.fork = fork;
        Ok(())
    }
}
