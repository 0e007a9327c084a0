//! A frozen guest, and the guests that are made of it.

use std::ffi::OsStr;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Output;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use super::builder::{check_cpus, setting};
use super::error::{FreezeError, OutputError, SpawnError};
use super::guest::{Clone as Made, Guest};
use super::running::{Known, Running, Seen};
use super::stdio::{Stdio, Three};
use crate::config::ReadyWhen;
use crate::machine::restored::{Choice, Revived, wanted};
use crate::machine::{HostSide, ProcessSignals};
use crate::snapshot::guest::{MachineData, open_guest};
use crate::snapshot::read::{Snapshot, Trust};
use crate::snapshot::records::{Identity, Records, Role};

/// A frozen guest: what guests are made of, as many as one likes, at once or one after the other.
///
/// It never changes, and copying it copies nothing: it is a file in memory that its clones read their pages from.
/// It does not need the guest it was made of any more.
#[derive(Clone, Debug)]
pub struct Template(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    snapshot: Arc<Snapshot>,
    machine: MachineData,
    records: Records,
    name: String,
    pause: Option<Duration>,
    /// Guests made of it so far.
    forks: AtomicU32,
}

impl Template {
    /// Opens a snapshot that `vmm snapshot` has written as a template. Its pages are read as they are used, and each is
    /// compared with its checksum.
    ///
    /// A snapshot names directories and files of this host that its guests will see: open only what you would run.
    ///
    /// # Errors
    /// It cannot be read, or is damaged anywhere but in its pages.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, FreezeError> {
        let snapshot = Snapshot::open(path.as_ref(), None)?;
        Self::new(snapshot, "-", None)
    }

    /// A template of another process, by [its file](Self::file). What is said of [`open`](Self::open) holds here too.
    ///
    /// # Errors
    /// It is none.
    pub fn from_file(file: File) -> Result<Self, FreezeError> {
        Self::of_file(file, "-", None)
    }

    pub(super) fn of_file(
        file: File,
        name: &str,
        pause: Option<Duration>,
    ) -> Result<Self, FreezeError> {
        let trust = match rustix::fs::fcntl_get_seals(&file) {
            Ok(seals) if seals.contains(rustix::fs::SealFlags::WRITE) => Trust::Sealed,
            Ok(_) | Err(_) => Trust::Verify,
        };
        let snapshot = Snapshot::from_file(file, "the template".to_owned(), trust, None)?;
        Self::new(snapshot, name, pause)
    }

    fn new(snapshot: Snapshot, name: &str, pause: Option<Duration>) -> Result<Self, FreezeError> {
        let (machine, records) = open_guest(&snapshot)?;
        Ok(Self(Arc::new(Inner {
            snapshot: Arc::new(snapshot),
            machine,
            records,
            name: name.to_owned(),
            pause,
            forks: AtomicU32::new(0),
        })))
    }

    /// The file it is in; of one that was frozen, sealed memory. Another process that is given it can make guests of it
    /// too ([`from_file`](Self::from_file)).
    #[must_use]
    pub fn file(&self) -> &File {
        self.0.snapshot.file()
    }

    /// Pages it has.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.0.snapshot.pages()
    }

    /// How long the guest stood still while it was frozen here; `None` if it was not.
    #[must_use]
    pub fn pause(&self) -> Option<Duration> {
        self.0.pause
    }

    /// A guest that will be made of it.
    #[must_use]
    pub fn fork(&self) -> Fork {
        Fork {
            template: self.clone(),
            stdio: Three::default(),
            settings: Vec::new(),
            number: None,
            of: 0,
            choice: Choice::default(),
            timeout: None,
            ready: None,
            wrong: None,
        }
    }
}

/// A guest that will be made of a template: what [`std::process::Command`] is to a process. Made by
/// [`Template::fork`]; it can be used again, for one more guest each time.
#[derive(Clone, Debug)]
pub struct Fork {
    template: Template,
    stdio: Three,
    settings: Vec<Vec<u8>>,
    number: Option<u32>,
    of: u32,
    choice: Choice,
    timeout: Option<Duration>,
    ready: Option<ReadyWhen>,
    /// The first setting that cannot be: it is told when the guest is to be made.
    wrong: Option<String>,
}

impl Fork {
    /// Something that the guest reads from `/dev/vmm`. The environment of the program is in its own memory, and stays what
    /// it was.
    pub fn env(&mut self, name: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> &mut Self {
        match setting(name.as_ref(), value.as_ref()) {
            Ok(line) => self.settings.push(line),
            Err(text) => {
                self.wrong.get_or_insert(text);
            }
        }
        self
    }

    /// Which of how many this is: what the guest reads in the first line of `/dev/vmm`. If nothing is said, guests of a
    /// template are numbered from 1, of 0.
    pub fn number(&mut self, number: u32, of: u32) -> &mut Self {
        (self.number, self.of) = (Some(number), of);
        self
    }

    /// Standard input, in place of the template's.
    pub fn stdin(&mut self, stdin: impl Into<Stdio>) -> &mut Self {
        self.stdio.stdin = Some(stdin.into());
        self
    }

    /// Standard output, in place of the template's.
    pub fn stdout(&mut self, stdout: impl Into<Stdio>) -> &mut Self {
        self.stdio.stdout = Some(stdout.into());
        self
    }

    /// Standard error, in place of the template's.
    pub fn stderr(&mut self, stderr: impl Into<Stdio>) -> &mut Self {
        self.stdio.stderr = Some(stderr.into());
        self
    }

    /// Ends the guest after this time.
    pub fn timeout(&mut self, time: Duration) -> &mut Self {
        self.timeout = Some(time);
        self
    }

    /// Memory of the machine in bytes; as much as the frozen guest had if nothing is said.
    pub fn memory(&mut self, bytes: u64) -> &mut Self {
        self.choice.memory = Some(bytes);
        self
    }

    /// Processors; as many as the frozen guest had if nothing is said. The guest is not told of another number.
    pub fn cpus(&mut self, cpus: usize) -> &mut Self {
        self.choice.cpus = Some(cpus);
        self
    }

    /// Where a page file goes, if the frozen guest had one; `/var/tmp` if nothing is said.
    pub fn page_file_dir(&mut self, directory: impl Into<PathBuf>) -> &mut Self {
        self.choice.page_file_dir = directory.into();
        self
    }

    /// As [`Builder::ready_line`](crate::Builder::ready_line), of this guest.
    pub fn ready_line(&mut self, line: impl AsRef<OsStr>) -> &mut Self {
        let line = line.as_ref().as_encoded_bytes().to_vec();
        self.ready = Some(ReadyWhen::Printed(line));
        self
    }

    /// As [`Builder::ready_freeze`](crate::Builder::ready_freeze), of this guest.
    pub fn ready_freeze(&mut self) -> &mut Self {
        self.ready = Some(ReadyWhen::Frozen);
        self
    }

    /// Makes the guest, which goes on where the template was frozen. What was not said of its standard input, output and
    /// error is this process's own.
    ///
    /// # Errors
    /// See [`SpawnError`].
    pub fn spawn(&self) -> Result<Made, SpawnError> {
        self.start(&self.stdio)
    }

    /// Makes the guest, runs it to its end, and reads what it prints. Its standard input has nothing to read unless
    /// something else was said.
    ///
    /// # Errors
    /// See [`OutputError`].
    pub fn output(&self) -> Result<Output, OutputError> {
        Ok(self.start(&self.stdio.captured())?.wait_with_output()?)
    }

    fn start(&self, three: &Three) -> Result<Made, SpawnError> {
        if let Some(wrong) = &self.wrong {
            return Err(SpawnError::Setting(wrong.clone()));
        }
        let of = &*self.template.0;
        let wanted = wanted(&self.choice, &of.machine, of.records.cpus());
        check_cpus(wanted.cpus)?;
        let (given, ends) = three.open().map_err(SpawnError::Stdio)?;
        let host = HostSide {
            stdio: given,
            signals: ProcessSignals::LeftAlone,
        };
        let revived = Revived::new(&of.snapshot, &of.records, &wanted, self.identity(), host)?;
        let known = Known {
            name: &of.name,
            ready: self.ready.as_ref(),
            data: of.machine.clone(),
        };
        let (seen, timeout) = (Seen::of(&revived.machine), self.timeout);
        let running = Running::start(seen, known, move || revived.run(timeout))?;
        Ok(Guest::new(running, ends))
    }

    fn identity(&self) -> Identity {
        let of = &*self.template.0;
        let next = || of.forks.fetch_add(1, Ordering::Relaxed).wrapping_add(1);
        Identity {
            role: Role::Clone {
                number: self.number.unwrap_or_else(next),
                of: self.of,
                template: of.name.clone(),
            },
            settings: self.settings.clone(),
        }
    }
}
