//! What a guest is to be, before there is one.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::process::Output;
use std::time::Duration;

use super::error::{OutputError, SpawnError};
use super::guest::{Guest, Started};
use super::host::{Host, Job, TakeDown};
use super::running::{Known, Running, Seen};
use super::stdio::{Stdio, Three};
use crate::config::{Commit, Mount, PageFileConfig, ReadyWhen, RunConfig};
use crate::control::rundir::check_name;
use crate::machine::{After, HostSide, Machine, ProcessSignals, RunError, machine_data};

/// Processors a machine has at most.
const MOST_CPUS: usize = 64;
/// What a guest is called that has no name.
const NAMELESS: &str = "-";

/// A guest that is described, and not yet there: what [`std::process::Command`] is to a process. Made by
/// [`Guest::builder`].
///
/// ```no_run
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let output = vmm::Guest::builder("sh")
///     .args(["-c", "echo $GREETING; pwd"])
///     .env("GREETING", "hello")
///     .root("/")
///     .current_dir("/usr")
///     .memory(64 << 20)
///     .output()?;
/// assert_eq!(output.stdout, b"hello\n/usr\n");
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Builder {
    config: RunConfig,
    stdio: Three,
    /// The first thing that cannot be: it is told when the guest is to be started.
    wrong: Option<String>,
}

fn bytes(text: impl AsRef<OsStr>) -> Vec<u8> {
    text.as_ref().as_bytes().to_vec()
}

impl Builder {
    pub(super) fn new(program: &OsStr) -> Self {
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        let mut builder = Self {
            config: RunConfig {
                cpus: cpus.min(MOST_CPUS),
                ..RunConfig::new(Vec::new(), Vec::new())
            },
            stdio: Three::default(),
            wrong: None,
        };
        builder.config.program = builder.checked(program);
        builder
    }

    /// A string for the guest: it ends at the first NUL, so there must be none.
    fn checked(&mut self, text: impl AsRef<OsStr>) -> Vec<u8> {
        let text = text.as_ref();
        if text.as_bytes().contains(&0) {
            let wrong = || text.to_string_lossy().into_owned();
            self.wrong.get_or_insert_with(wrong);
        }
        bytes(text)
    }

    /// Adds an argument.
    pub fn arg(&mut self, arg: impl AsRef<OsStr>) -> &mut Self {
        let arg = self.checked(arg);
        self.config.args.push(arg);
        self
    }

    /// Adds arguments.
    pub fn args(&mut self, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> &mut Self {
        for arg in args {
            self.arg(arg);
        }
        self
    }

    /// Sets an environment variable. Those of this process are not passed on, but for `TERM` with a terminal; `PATH`
    /// and `HOME` have values of their own.
    pub fn env(&mut self, name: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> &mut Self {
        let (name, value) = (self.checked(name), self.checked(value));
        if name.is_empty() || name.contains(&b'=') {
            let name = String::from_utf8_lossy(&name).into_owned();
            self.wrong.get_or_insert(name);
        }
        self.config.env.push((name, value));
        self
    }

    /// Sets environment variables.
    pub fn envs<N: AsRef<OsStr>, V: AsRef<OsStr>>(
        &mut self,
        pairs: impl IntoIterator<Item = (N, V)>,
    ) -> &mut Self {
        for (name, value) in pairs {
            self.env(name, value);
        }
        self
    }

    /// Shows this directory of the host, read-only, as the guest's `/`. Without it the guest sees only its program, that
    /// one's interpreter and libraries.
    pub fn root(&mut self, directory: impl Into<PathBuf>) -> &mut Self {
        self.config.root = Some(directory.into());
        self
    }

    /// Shows a directory of the host, writable, as `guest`, an absolute path.
    pub fn read_write(&mut self, host: impl Into<PathBuf>, guest: impl AsRef<Path>) -> &mut Self {
        let guest = self.absolute(guest.as_ref());
        self.config.mounts.push(Mount::ReadWrite {
            host: host.into(),
            guest,
        });
        self
    }

    /// Puts an empty file system in memory at `guest`, an absolute path.
    pub fn tmpfs(&mut self, guest: impl AsRef<Path>) -> &mut Self {
        let guest = self.absolute(guest.as_ref());
        self.config.mounts.push(Mount::Tmpfs { guest });
        self
    }

    fn absolute(&mut self, path: &Path) -> Vec<u8> {
        if !path.is_absolute() {
            self.wrong.get_or_insert_with(|| path.display().to_string());
        }
        self.checked(path)
    }

    /// The directory of the guest to start in; `/` if nothing is said.
    pub fn current_dir(&mut self, guest: impl AsRef<Path>) -> &mut Self {
        self.config.workdir = self.checked(guest.as_ref());
        self
    }

    /// Memory of the machine in bytes, page tables included: 8 MiB to 512 GiB, 1 GiB if nothing is said. The host gives it
    /// as it is used.
    pub fn memory(&mut self, bytes: u64) -> &mut Self {
        self.config.memory = bytes;
        self
    }

    /// Lets the guest's memory be larger than the machine's: pages not used for long are kept in an unnamed file of
    /// this size in `directory`.
    pub fn page_file(&mut self, bytes: u64, directory: impl Into<PathBuf>) -> &mut Self {
        self.config.page_file = Some(PageFileConfig {
            bytes,
            dir: directory.into(),
        });
        self
    }

    /// Grants programs memory that there may not be; one that then uses too much is killed.
    pub fn overcommit(&mut self) -> &mut Self {
        self.config.commit = Commit::Over;
        self
    }

    /// Processors: 1 to 64; those of the host if nothing is said.
    pub fn cpus(&mut self, cpus: usize) -> &mut Self {
        self.config.cpus = cpus;
        self
    }

    /// Processes the guest may have at once; 1024 if nothing is said. `fork` gives `EAGAIN` beyond.
    pub fn max_processes(&mut self, most: usize) -> &mut Self {
        self.config.max_procs = most;
        self
    }

    /// Ends the guest after this time.
    pub fn timeout(&mut self, time: Duration) -> &mut Self {
        self.config.timeout = Some(time);
        self
    }

    /// What the guest is called: its clones read it from `/dev/vmm`. Letters, digits, `.`, `-`, `_`.
    pub fn name(&mut self, name: impl Into<String>) -> &mut Self {
        self.config.name = Some(name.into());
        self
    }

    /// The guest is ready to be frozen once it has printed this line, given without its end, on its standard output.
    pub fn ready_line(&mut self, line: impl AsRef<OsStr>) -> &mut Self {
        self.config.ready = Some(ReadyWhen::Printed(bytes(line)));
        self
    }

    /// The guest is ready to be frozen once it writes `freeze` to `/dev/vmm`; it waits there until
    /// [`Guest::freeze`] has done it. Without this, that write returns at once and nothing comes of it.
    pub fn ready_freeze(&mut self) -> &mut Self {
        self.config.ready = Some(ReadyWhen::Frozen);
        self
    }

    /// Standard input.
    pub fn stdin(&mut self, stdin: impl Into<Stdio>) -> &mut Self {
        self.stdio.stdin = Some(stdin.into());
        self
    }

    /// Standard output.
    pub fn stdout(&mut self, stdout: impl Into<Stdio>) -> &mut Self {
        self.stdio.stdout = Some(stdout.into());
        self
    }

    /// Standard error.
    pub fn stderr(&mut self, stderr: impl Into<Stdio>) -> &mut Self {
        self.stdio.stderr = Some(stderr.into());
        self
    }

    /// Starts the guest. What was not said of its standard input, output and error is this process's own.
    ///
    /// # Errors
    /// See [`SpawnError`].
    pub fn spawn(&self) -> Result<Guest, SpawnError> {
        self.start(&self.stdio)
    }

    /// Runs the guest to its end, and reads what it prints. Its standard input has nothing to read unless something else
    /// was said.
    ///
    /// # Errors
    /// See [`OutputError`].
    pub fn output(&self) -> Result<Output, OutputError> {
        Ok(self.start(&self.stdio.captured())?.wait_with_output()?)
    }

    fn start(&self, three: &Three) -> Result<Guest, SpawnError> {
        let config = self.config()?;
        let (given, ends) = three.open().map_err(SpawnError::Stdio)?;
        let host = HostSide {
            stdio: given,
            signals: ProcessSignals::LeftAlone,
        };
        let host_thread = Host::start().map_err(SpawnError::Thread)?;
        let machine = Machine::build(config, host)?;
        let known = Known {
            name: config.name.as_deref().unwrap_or(NAMELESS),
            ready: config.ready.as_ref(),
            data: machine_data(config),
            home: None,
        };
        let (seen, timeout) = (Seen::of(&machine), config.timeout);
        let begin = move || -> Result<(TakeDown, Option<Job>), RunError> {
            let playing = machine.begin(timeout)?;
            let take_down = Box::new(move || playing.finish(After::End));
            Ok((take_down, None))
        };
        let running = Running::start(seen, known, host_thread, begin)?;
        Ok(Guest::new(running, ends, Started::new()))
    }

    /// What was asked for, if it can be.
    fn config(&self) -> Result<&RunConfig, SpawnError> {
        if let Some(wrong) = &self.wrong {
            return Err(SpawnError::Argument(wrong.clone()));
        }
        if let Some(name) = &self.config.name {
            check_name(name)?;
        }
        check_cpus(self.config.cpus)?;
        Ok(&self.config)
    }
}

/// Whether a machine can have so many processors.
pub(super) fn check_cpus(cpus: usize) -> Result<(), SpawnError> {
    match cpus {
        1..=MOST_CPUS => Ok(()),
        _ => Err(SpawnError::Cpus(cpus)),
    }
}

/// `NAME=VALUE` for `/dev/vmm`.
///
/// # Errors
/// That, if it cannot be read from there.
pub(super) fn setting(name: &OsStr, value: &OsStr) -> Result<Vec<u8>, String> {
    let line: OsString = [name, OsStr::new("="), value].into_iter().collect();
    let bad =
        name.is_empty() || name.as_bytes().contains(&b'=') || line.as_bytes().contains(&b'\n');
    match bad {
        false => Ok(line.into_vec()),
        true => Err(line.to_string_lossy().into_owned()),
    }
}
