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
use super::host::{Job, TakeDown};
use super::running::{Known, Running, Seen, Warm};
use super::shared::SharedMachine;
use super::stdio::{Ends, Stdio, Three};
use crate::config::ReadyWhen;
use crate::locks::{Mutex, rank};
use crate::machine::restored::{Ahead, Choice, Revived, Unmade, lay_under, wanted};
use crate::machine::{After, HostSide, ProcessSignals, RunError, Wanted};
use crate::snapshot::guest::{MachineData, open_guest};
use crate::snapshot::image::Image;
use crate::snapshot::read::{Check, Snapshot, Trust};
use crate::snapshot::records::{Identity, Records, Role};

/// A frozen guest: what guests are made of, as many as one likes, at once or one after the other.
///
/// It never changes, and copying it copies nothing: it is a file in memory that its clones read their pages from.
/// It does not need the guest it was made of any more.
#[derive(Clone, Debug)]
pub struct Template(pub(super) Arc<Inner>);

#[derive(Debug)]
pub(super) struct Inner {
    /// What the snapshot says, read once for all guests.
    image: Arc<Image>,
    pub(super) machine: MachineData,
    records: Records,
    pub(super) name: String,
    pause: Option<Duration>,
    /// Guests made of it so far.
    forks: AtomicU32,
    warm: Mutex<rank::WarmMachines, Pool>,
}

/// Machines that wait for a guest.
#[derive(Default)]
struct Pool {
    machines: Vec<Warm>,
    /// As many are kept when their guests have ended.
    keep: usize,
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { machines, keep } = self;
        write!(f, "{} of {keep}", machines.len())
    }
}

impl Template {
    /// Opens a snapshot that `vmm snapshot` has written as a template. Its pages are read as they are used, and each is
    /// compared with its checksum. One that somebody may have written to since, or that is a copy, is read as a whole first.
    ///
    /// A snapshot names directories and files of this host that its guests will see: open only what you would run.
    ///
    /// # Errors
    /// It cannot be read, or is damaged. (A page of a file that nobody has written to, and that the disk lost, is noticed
    /// when it is read: that ends the guest.)
    pub fn open(path: impl AsRef<Path>) -> Result<Self, FreezeError> {
        let snapshot = Snapshot::open(path.as_ref(), None)?;
        snapshot.check(Check::Changed, &mut |_| ())?;
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
        snapshot.check(Check::Changed, &mut |_| ())?;
        Self::new(snapshot, name, pause)
    }

    fn new(snapshot: Snapshot, name: &str, pause: Option<Duration>) -> Result<Self, FreezeError> {
        let (machine, records) = open_guest(&snapshot)?;
        let image = Image::read(&Arc::new(snapshot)).map_err(FreezeError::Image)?;
        Ok(Self(Arc::new(Inner {
            image: Arc::new(image),
            machine,
            records,
            name: name.to_owned(),
            pause,
            forks: AtomicU32::new(0),
            warm: Mutex::default(),
        })))
    }

    /// The file it is in; of one that was frozen, sealed memory. Another process that is given it can make guests of it
    /// too ([`from_file`](Self::from_file)).
    #[must_use]
    pub fn file(&self) -> &File {
        self.0.image.snapshot().file()
    }

    /// Pages it has.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.0.image.snapshot().pages()
    }

    /// How long the guest stood still while it was frozen here; `None` if it was not.
    #[must_use]
    pub fn pause(&self) -> Option<Duration> {
        self.0.pause
    }

    /// Makes machines ahead: virtual machine, processors, threads, everything that does not depend on the guest. Afterwards
    /// `machines` of them wait for guests of this template that are asked for no other memory or processors than it has; a
    /// guest then only takes what makes it this guest. A machine whose guest has ended is used again. 0 ends those that wait.
    ///
    /// # Errors
    /// The host cannot make so many; those that were made are there.
    pub fn warm(&self, machines: usize) -> Result<(), SpawnError> {
        let wanted = self.wanted(&Choice::default());
        let (lacking, surplus) = {
            let mut pool = self.0.warm.lock();
            pool.keep = machines;
            let there = pool.machines.len();
            (
                machines.saturating_sub(there),
                pool.machines.split_off(machines.min(there)),
            )
        };
        drop(surplus);
        for _ in 0..lacking {
            let mut warm = Warm::new(&wanted)?;
            lay_under(&warm.bare, &self.0.image)?;
            warm.bare.staff().map_err(SpawnError::Thread)?;
            self.take_back(warm);
        }
        Ok(())
    }

    fn wanted(&self, choice: &Choice) -> Wanted {
        wanted(choice, &self.0.machine, self.0.records.cpus())
    }

    /// A machine like that: one that waits, or a new one.
    fn machine(&self, wanted: &Wanted) -> Result<Warm, SpawnError> {
        let waits = {
            let mut pool = self.0.warm.lock();
            let at = pool
                .machines
                .iter()
                .rposition(|warm| warm.bare.wanted() == wanted);
            at.map(|at| pool.machines.swap_remove(at))
        };
        waits.map_or_else(|| Warm::new(wanted), Ok)
    }

    /// Takes a machine that a guest has left; ends it if enough wait, or it is unlike the template's.
    pub(super) fn take_back(&self, warm: Warm) {
        let like = *warm.bare.wanted() == self.wanted(&Choice::default());
        let mut pool = self.0.warm.lock();
        if like && pool.machines.len() < pool.keep {
            pool.machines.push(warm);
        } else {
            // Without the lock: it takes a while.
            drop(pool);
            drop(warm);
        }
    }

    /// Makes a machine with so many bytes of memory, page tables included, that guests of this template share: they are kept
    /// apart as processes are, and one that waits takes some 30 KiB ([`SharedMachine`]). Not of a snapshot on a disk: freeze a clone
    /// of that, and use the template.
    ///
    /// # Errors
    /// See [`SpawnError`].
    pub fn shared(&self, memory: u64) -> Result<SharedMachine, SpawnError> {
        let choice = Choice {
            memory: Some(memory),
            ..Choice::default()
        };
        let of = &self.0;
        let layer = of.image.snapshot().layer();
        let layer = layer.map_err(|error| RunError::Image(error.into()))?;
        if layer.is_none() && self.pages() > 0 {
            return Err(SpawnError::OnDisk);
        }
        SharedMachine::start(self, &self.wanted(&choice), &of.image, of.records.clone())
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
            shared: None,
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
    /// Where it will be, if not in a machine of its own.
    pub(super) shared: Option<SharedMachine>,
    pub(super) choice: Choice,
    pub(super) timeout: Option<Duration>,
    pub(super) ready: Option<ReadyWhen>,
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

    /// Memory of the machine in bytes; as much as the frozen guest had if nothing is said. Not of a guest in a machine that it
    /// shares, as the number of processors and the place of the page file.
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

    /// What was asked for as standard input, output and error.
    pub(super) fn three(&self) -> &Three {
        &self.stdio
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
        let fork = self.numbered();
        let (running, ends) = fork.start_in(None, three)?;
        Ok(Guest::of(fork, running, ends))
    }

    /// Makes the guest, in the machine `left` if that is like the one it is to have.
    pub(super) fn start_in(
        &self,
        left: Option<Warm>,
        three: &Three,
    ) -> Result<(Running, Ends), SpawnError> {
        if let Some(wrong) = &self.wrong {
            return Err(SpawnError::Setting(wrong.clone()));
        }
        if let Some(machine) = &self.shared {
            return machine.run(self, three);
        }
        let of = &*self.template.0;
        let wanted = self.template.wanted(&self.choice);
        check_cpus(self.choice.cpus.unwrap_or(wanted.cpus))?;
        let (given, ends) = three.open().map_err(SpawnError::Stdio)?;
        let side = HostSide {
            stdio: given,
            signals: ProcessSignals::LeftAlone,
        };
        let Warm { bare, host } = match left.filter(|left| *left.bare.wanted() == wanted) {
            Some(left) => left,
            None => self.template.machine(&wanted)?,
        };
        let made = Revived::new(bare, &of.image, &of.records, self.identity(), side);
        let (revived, host) = match made {
            Ok(revived) => (revived, host),
            Err(unmade) => {
                let Unmade { why, left } = *unmade;
                if let Some(bare) = left {
                    self.template.take_back(Warm { bare, host });
                }
                return Err(why.into());
            }
        };
        let known = Known {
            name: &of.name,
            ready: self.ready.as_ref(),
            data: of.machine.clone(),
            home: Some(self.template.clone()),
        };
        let (seen, timeout) = (Seen::of(&revived.machine), self.timeout);
        let begin = move || -> Result<(TakeDown, Option<Job>), RunError> {
            let (going, ahead) = revived.begin(timeout)?;
            let take_down = Box::new(move || going.finish(After::Keep));
            let reads = |ahead: Ahead| -> Job { Box::new(move || ahead.read()) };
            Ok((take_down, ahead.map(reads)))
        };
        Ok((Running::start(seen, known, host, begin)?, ends))
    }

    /// The same, with a number.
    pub(super) fn numbered(&self) -> Self {
        let mut fork = self.clone();
        let forks = &self.template.0.forks;
        let next = || forks.fetch_add(1, Ordering::Relaxed).wrapping_add(1);
        fork.number.get_or_insert_with(next);
        fork
    }

    pub(super) fn identity(&self) -> Identity {
        Identity {
            role: Role::Clone {
                number: self.number.unwrap_or_default(),
                of: self.of,
                template: self.template.0.name.clone(),
            },
            settings: self.settings.clone(),
        }
    }
}
