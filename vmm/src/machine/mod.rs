//! A machine: built, run, taken down.

use std::sync::Arc;
use std::time::Duration;

use crate::config::{Commit, ReadyWhen, RunConfig};
use crate::control::ready::{Ready, ReadyLine};
use crate::control::rundir::RunDirError;
use crate::control::server::Server;
use crate::hv::CpuError;
use crate::linux::kernel::Kernel;
use crate::snapshot::guest::MachineData;

pub mod bare;
pub mod builder;
mod counts;
mod crew;
pub mod fpu;
pub(crate) mod freezer;
pub mod guests;
pub mod hardware;
pub mod host_io;
mod inspector;
mod kept;
pub mod kick;
pub mod program;
pub mod report;
pub(crate) mod resets;
pub mod restored;
pub mod shared;
mod spare;
mod staff;
pub mod stats;
pub mod strace;
#[cfg(test)]
mod testing;
pub mod trap;
pub(crate) mod verbs;
mod victim;
pub mod worker;

pub(crate) use bare::Bare;
pub use bare::Wanted;
pub use builder::Machine;
pub(crate) use counts::Counts;
use hardware::HardwareError;
use host_io::Watching;
pub use host_io::{HostSide, ProcessSignals};
pub(crate) use inspector::{Observed, run_dir};
pub(crate) use kick::{take_no_signals, without_signals};
use report::Report;
pub(crate) use verbs::Verbs;

/// Status of a machine whose time is up, as timeout(1) has it.
const STATUS_TIMEOUT: u8 = 124;

/// Status of a machine that ended without its program having ended: the VMM's own failure.
const STATUS_FAILURE: u8 = 125;

/// Why a program could not be run.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// There is no such program.
    #[error("{name}: not found")]
    NotFound {
        /// As given.
        name: String,
    },
    /// The host has it, and one of the mounts asked for lies over it.
    #[error(
        "{name}: not found in the guest: a --tmpfs or --rw covers {path}; choose another path for it"
    )]
    Hidden {
        /// As given.
        name: String,
        /// Where the host found it.
        path: String,
    },
    /// It is there and cannot be executed.
    #[error("{name}: cannot be executed")]
    NotExecutable {
        /// As given.
        name: String,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The machine could not be made.
    #[error("cannot make a machine (vmm doctor tells more)")]
    Hardware(#[from] HardwareError),
    /// The page file could not be made.
    #[error(transparent)]
    PageFile(#[from] crate::memory::PageFileError),
    /// The file tree could not be built.
    #[error(transparent)]
    Files(#[from] crate::linux::fs::VfsError),
    /// The directory to start in is not there.
    #[error("--workdir {path}: {errno}")]
    Workdir {
        /// As given.
        path: String,
        /// Why.
        errno: rustix::io::Errno,
    },
    /// The memory of a guest that is made again cannot be loaded.
    #[error("the guest's memory cannot be loaded")]
    Image(#[source] crate::snapshot::records::MemoryError),
    /// A guest cannot be made of its records.
    #[error(transparent)]
    Restore(#[from] crate::snapshot::records::RestoreError),
    /// A page of the snapshot could not be read while the guest ran.
    #[error("the guest was ended: its memory cannot be read")]
    Snapshot(#[source] std::io::Error),
    /// A machine without processors was asked for.
    #[error("a machine needs a processor")]
    NoCpu,
    /// A virtual CPU stopped working.
    #[error("a virtual CPU stopped working (vmm doctor tells more)")]
    Cpu(#[source] CpuError),
    /// A guest with that name cannot be.
    #[error(transparent)]
    RunDir(#[from] RunDirError),
    /// The report cannot be written there.
    #[error("--report {path}")]
    Report {
        /// As given.
        path: std::path::PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The guest's standard descriptors cannot be made.
    #[error("the guest's standard input, output and error cannot be made")]
    Stdio(#[source] std::io::Error),
    /// The host has no thread for a worker.
    #[error("cannot start a thread")]
    Thread(#[source] std::io::Error),
    /// A bug: threads that should have ended did not.
    #[error("the machine has ended, but not its threads {}: please report this", .0.join(", "))]
    Stuck(Vec<String>),
}

/// What ended a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// Its first program's end, with this wait status (wait4(2)).
    Program(i32),
    /// Its time was up.
    TimedOut,
    /// A failure of the VMM's own.
    Failed,
}

/// What becomes of a machine when its guest has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum After {
    /// It ends too.
    End,
    /// It is kept for another guest.
    Keep,
}

impl End {
    /// Exit status: the program's, 128 + the signal that ended it, 124 when time was up, 125 when the machine failed.
    #[must_use]
    pub fn status(self) -> u8 {
        match self {
            Self::Program(status) => exit_status(status),
            Self::TimedOut => STATUS_TIMEOUT,
            Self::Failed => STATUS_FAILURE,
        }
    }
}

/// How a machine ended.
#[derive(Debug)]
pub struct Ended {
    /// What ended it.
    pub end: End,
    /// What was counted.
    pub report: Report,
}

impl Ended {
    /// The exit status ([`End::status`]).
    #[must_use]
    pub fn status(&self) -> u8 {
        self.end.status()
    }
}

/// Runs a program in a machine of its own, to its end.
///
/// # Errors
/// The program cannot be started, or the host fails.
pub fn run(config: &RunConfig) -> Result<Ended, RunError> {
    let mut file = inspector::report_file(config.report.as_deref())?;
    let dir = inspector::run_dir(config.name.as_deref())?;
    let host = HostSide::whole_process().map_err(RunError::Stdio)?;
    let mut machine = Machine::build(config, host)?;
    machine.observe(observed(config), dir);
    let inspector = machine.inspector.clone();
    let ended = machine.run(config.timeout)?;
    if let (Some(inspector), Some(file)) = (inspector, &mut file) {
        inspector.write_report(file, ended.status(), &ended.report);
    }
    Ok(ended)
}

/// What a guest's machine is, to make another one.
pub(crate) fn machine_data(config: &RunConfig) -> MachineData {
    let words = std::iter::once(&config.program).chain(&config.args);
    MachineData {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        command: words.cloned().collect(),
        memory: config.memory,
        page_file: config.page_file.as_ref().map_or(0, |file| file.bytes),
        overcommit: config.commit == Commit::Over,
        process_memory: config.process_memory,
    }
}

fn observed(config: &RunConfig) -> Observed {
    let ready = |when: &ReadyWhen| match when {
        ReadyWhen::Printed(line) => Ready::Line(Arc::new(ReadyLine::new(line))),
        ReadyWhen::Frozen => Ready::Freeze,
    };
    Observed {
        machine: machine_data(config),
        origin: None,
        ready: config.ready.as_ref().map(ready),
        keeps_last: config.report.is_some(),
    }
}

/// The exit status of a wait status (wait4(2)), as shells have it.
fn exit_status(status: i32) -> u8 {
    let signal = status & 0x7f;
    if signal == 0 {
        (status >> 8) as u8
    } else {
        128 + signal as u8
    }
}

impl Machine {
    /// The Linux layer, for looking at the guest and stopping it while it runs.
    #[must_use]
    pub fn kernel(&self) -> Arc<Kernel> {
        Arc::clone(&self.shared.kernel)
    }

    /// Runs the guest to its end, and ends the machine.
    ///
    /// # Errors
    /// A virtual CPU or a host thread failed.
    pub fn run(self, timeout: Option<Duration>) -> Result<Ended, RunError> {
        let (ended, _) = self.play(timeout, After::End, || ())?;
        Ok(ended)
    }

    /// Runs the guest to its end, and does `meanwhile` beside it. What is left of the machine can take another guest, if
    /// that was asked for and nothing went wrong.
    ///
    /// # Errors
    /// A virtual CPU or a host thread failed.
    pub(crate) fn play(
        self,
        timeout: Option<Duration>,
        after: After,
        meanwhile: impl FnOnce(),
    ) -> Result<(Ended, Option<Bare>), RunError> {
        let kernel = Arc::clone(&self.shared.kernel);
        let playing = self.begin(timeout)?;
        meanwhile();
        kernel.sched.wait_for_end();
        playing.finish(after)
    }

    /// Lets the guest run.
    ///
    /// # Errors
    /// The host has no threads.
    pub(crate) fn begin(mut self, timeout: Option<Duration>) -> Result<Playing, RunError> {
        self.bare.staff().map_err(RunError::Thread)?;
        let host = self.io.start(&self.shared.kernel);
        self.seat(timeout);
        Ok(Playing {
            machine: self,
            host,
        })
    }

    fn finish(mut self, host: Watching, after: After) -> Result<(Ended, Option<Bare>), RunError> {
        let kernel = Arc::clone(&self.shared.kernel);
        let after = match after {
            After::Keep if self.bare.vacate(&self.shared) => After::Keep,
            After::Keep | After::End => After::End,
        };
        let left = match after {
            After::Keep => Ok(()),
            After::End => self.bare.dismiss(),
        };
        host.stop();
        if let Err(left) = left {
            // They still use what the machine is made of.
            std::mem::forget(self);
            return Err(RunError::Stuck(left));
        }
        // Whoever looks at the memory does not keep it.
        drop(self.control.take());
        drop(self.freezer.take());
        let status = kernel.state().main_status;
        let report = self.take_down(after);
        if let Some(error) = self.bare.take_failure() {
            return Err(RunError::Cpu(error));
        }
        let end = match status {
            Some(status) => End::Program(status),
            None if self.shared.limit.has_passed() => End::TimedOut,
            None => End::Failed,
        };
        let Self { bare, .. } = self;
        let bare = (after == After::Keep && bare.is_as_new()).then_some(bare);
        Ok((Ended { end, report }, bare))
    }

    /// Shows the machine's threads the guest, and lets that go.
    fn seat(&self, timeout: Option<Duration>) {
        if let Some(timeout) = timeout {
            self.shared.end_after(timeout);
        }
        self.bare.guests.add(&self.shared);
        self.shared.begin();
    }

    /// Ends every process, whatever it was doing, and counts what is left.
    fn take_down(&mut self, after: After) -> Report {
        let kernel = &self.shared.kernel;
        let memory = &kernel.memory;
        match (after, self.keeps.take()) {
            (After::Keep, Some(keeps)) => self.bare.kept = kept::leave(&self.shared, keeps),
            (After::Keep | After::End, _) => kernel.take_down(),
        }
        if self.bare.kept.is_none() {
            memory.sections.close(memory);
        }
        match after {
            // No virtual CPU will run again.
            After::End => memory.acknowledge(memory.flushes.drain()),
            // Spaces that stay are flushed when the next guest enters them, as at any time.
            After::Keep if self.bare.kept.is_some() => {}
            After::Keep => {
                memory.finish_flushes();
            }
        }
        self.counts().report()
    }
}

/// A guest that runs, in its machine.
pub(crate) struct Playing {
    machine: Machine,
    host: Watching,
}

impl Playing {
    fn leave_socket(&mut self) -> Option<Server> {
        self.machine.control.take()
    }

    /// Takes down the guest, which has ended or ends soon. What is left of the machine can take another one, if that was asked
    /// for and nothing went wrong.
    ///
    /// # Errors
    /// A virtual CPU failed, or a thread does not come back.
    pub(crate) fn finish(self, after: After) -> Result<(Ended, Option<Bare>), RunError> {
        self.machine.finish(self.host, after)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_status_is_the_shells() {
        assert_eq!(exit_status(7 << 8), 7);
        assert_eq!(exit_status(libc::SIGSEGV), 139);
        assert_eq!(exit_status(libc::SIGABRT | 0x80), 134);
    }
}
