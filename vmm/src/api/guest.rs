//! A guest, as its owner has it.

use std::io::{PipeReader, PipeWriter};
use std::marker::PhantomData;
use std::process::{ExitStatus, Output};
use std::sync::Arc;

use super::builder::Builder;
use super::error::{FreezeError, SignalError, WaitError};
use super::running::Running;
use super::stdio::{Ends, read_both};
use super::template::Template;
use crate::machine::report::Report;

/// A guest that was started from a program ([`Guest::builder`]).
#[derive(Debug)]
pub struct Started(());

/// A guest that was made of a template ([`Template::fork`]).
#[derive(Debug)]
pub struct Forked(());

/// A guest that was made of a template.
pub type Clone = Guest<Forked>;

/// A guest: a Linux program, and all its processes, in a virtual machine that this process hosts.
///
/// It is to a machine what [`std::process::Child`] is to a process, with one difference: **dropping it ends the
/// guest**, and gives back everything it had. There can be any number of them in a process; they share nothing.
pub struct Guest<Kind = Started> {
    /// This process's end of the guest's standard input, if that is [`piped`](crate::Stdio::piped).
    pub stdin: Option<PipeWriter>,
    /// This process's end of the guest's standard output, if that is piped.
    pub stdout: Option<PipeReader>,
    /// This process's end of the guest's standard error, if that is piped.
    pub stderr: Option<PipeReader>,
    running: Running,
    kind: PhantomData<fn() -> Kind>,
}

impl<Kind> std::fmt::Debug for Guest<Kind> {
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

impl<Kind> Guest<Kind> {
    pub(super) fn new(running: Running, ends: Ends) -> Self {
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
            kind: PhantomData,
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
