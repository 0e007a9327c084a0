//! A process that runs clones for `vmm fork`, each in a machine of its own ([`super::apart`] says why and how many).
//!
//! It reads orders from a socket that is its standard input. The template is opened once: its records, its image and its
//! mapping are there once for all clones. A machine whose clone has ended, and that is as new, gets the next clone: its virtual
//! machine, virtual CPUs, threads, and the slot with the template's pages are there. When the socket is closed, or
//! `vmm fork` has ended, the process ends, whatever it was doing.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::process::ExitCode;
use std::sync::Arc;

use super::opened;
use super::wire::{Line, Lot, News, One, Order};
use crate::cli::{STATUS_FAILURE, complain};
use crate::control::rundir::Called;
use crate::linux::stdio::{Given, copy};
use crate::locks::{Mutex, rank};
use crate::machine::restored::{Choice, Revived, wanted};
use crate::machine::{
    After, Bare, HostSide, Observed, ProcessSignals, RunError, Wanted, run_dir, take_no_signals,
};
use crate::snapshot::guest::{MachineData, OpenError, open_guest};
use crate::snapshot::image::Image;
use crate::snapshot::read::ReadError;
use crate::snapshot::records::{Identity, Records, Role};

/// How `vmm fork` starts its clones
#[derive(Debug, clap::Args)]
pub(in crate::cli) struct WorkerArgs {
    /// The process that waits for the clones, and with which they end
    #[arg(long, value_name = "PID", value_parser = clap::value_parser!(i32).range(1..))]
    parent: i32,
}

#[derive(Debug, thiserror::Error)]
enum WorkerError {
    #[error("the vmm fork that started this process has ended")]
    Alone,
    #[error("only vmm fork starts this")]
    Line(#[source] io::Error),
    #[error("vmm fork says something else than is expected")]
    Order,
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error(transparent)]
    Machine(#[from] RunError),
    #[error("a thread cannot be started")]
    Thread(#[source] io::Error),
}

impl From<ReadError> for WorkerError {
    fn from(error: ReadError) -> Self {
        Self::Open(error.into())
    }
}

pub(in crate::cli) fn main(args: &WorkerArgs) -> ExitCode {
    let served = end_with(args.parent).and_then(|()| {
        more_descriptors();
        serve()
    });
    if let Err(error) = &served {
        complain(error);
    }
    // Without taking down what is left: nobody waits for it any more.
    std::process::exit(i32::from(match served {
        Ok(()) => 0,
        Err(_) => STATUS_FAILURE,
    }))
}

/// Clones do not outlive the `vmm fork` that waits for them, however that ends.
fn end_with(parent: i32) -> Result<(), WorkerError> {
    use rustix::process::{Pid, Signal, getppid, set_parent_process_death_signal};
    if let Err(error) = set_parent_process_death_signal(Some(Signal::KILL)) {
        tracing::warn!(%error, "clones may outlive vmm fork for a moment");
    }
    // There is no signal for one that had ended before; but then the parent is another process by now.
    match getppid().map(Pid::as_raw_pid) == Some(parent) {
        true => Ok(()),
        false => Err(WorkerError::Alone),
    }
}

/// A machine takes a dozen descriptors or two, and the usual limit is 1,024: as many as this process may have.
fn more_descriptors() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    let most = Rlimit {
        current: maximum,
        maximum,
    };
    if let Err(error) = setrlimit(Resource::Nofile, most) {
        tracing::info!(%error, "the limit on descriptors stays");
    }
}

/// Takes orders until there is nobody to give any.
fn serve() -> Result<(), WorkerError> {
    let line = line().map_err(WorkerError::Line)?;
    let Some((order, with)) = line.hear().map_err(WorkerError::Line)? else {
        return Ok(());
    };
    let (Order::Serve(lot), Ok([template])) = (order, <[OwnedFd; 1]>::try_from(with)) else {
        return Err(WorkerError::Order);
    };
    let worker = Arc::new(Worker::new(lot, template, line)?);
    while let Some((order, with)) = worker.line.hear().map_err(WorkerError::Line)? {
        match order {
            Order::Start(one) => worker.start(one, with),
            Order::Serve(_) => return Err(WorkerError::Order),
        }
    }
    Ok(())
}

/// The socket; clones that are given nothing to read do not find it in its place.
fn line() -> io::Result<Line> {
    let socket = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3)?;
    let line = Line::of(socket)?;
    rustix::stdio::dup2_stdin(File::open("/dev/null")?)?;
    Ok(line)
}

struct Worker {
    lot: Lot,
    line: Line,
    /// Held while something is said.
    voice: Mutex<rank::CloneNews, ()>,
    image: Arc<Image>,
    records: Records,
    data: MachineData,
    wanted: Wanted,
    /// Machines whose clones have ended.
    free: Mutex<rank::FreeMachines, Vec<Bare>>,
}

impl Worker {
    fn new(lot: Lot, template: OwnedFd, line: Line) -> Result<Self, WorkerError> {
        let snapshot = Arc::new(opened(File::from(template))?);
        let (data, records) = open_guest(&snapshot)?;
        let image = Image::read(&snapshot).map_err(|error| RunError::Image(error.into()))?;
        let choice = Choice {
            page_file_dir: crate::cli::run::page_file_dir(None),
            cpus: lot.cpus.map(usize::from),
            ..Choice::default()
        };
        Ok(Self {
            wanted: wanted(&choice, &data, records.cpus()),
            lot,
            line,
            voice: Mutex::default(),
            image: Arc::new(image),
            records,
            data,
            free: Mutex::default(),
        })
    }

    fn tell(&self, news: News) {
        let _one_at_a_time = self.voice.lock();
        // Who does not listen any more has ended, and so will this process.
        let _gone = self.line.say(&news, &[]);
    }

    /// Starts a clone, and says what comes of it.
    fn start(self: &Arc<Self>, one: One, with: Vec<OwnedFd>) {
        let number = one.number;
        let end = End {
            worker: Arc::clone(self),
            number,
            status: STATUS_FAILURE,
        };
        let revived = match self.make(&one, &with) {
            Ok(revived) => revived,
            Err(error) => return complain(&error),
        };
        let thread = std::thread::Builder::new().name(format!("clone{number}"));
        match thread.spawn(move || run(revived, (&one, &with), end)) {
            Ok(_) => self.tell(News::Runs(number)),
            Err(error) => complain(&WorkerError::Thread(error)),
        }
    }

    fn make(&self, one: &One, with: &[OwnedFd]) -> Result<Revived, WorkerError> {
        let called = match &one.name {
            Some(name) => Called::Name(name),
            None => Called::Clone(one.number),
        };
        let dir = run_dir(called)?;
        let free = self.free.lock().pop();
        let (mut revived, observed) = self.revive(one, with, free)?;
        revived.machine.observe(observed, dir);
        Ok(revived)
    }

    /// Makes a clone, in the machine that another one has left if there is one.
    fn revive(
        &self,
        one: &One,
        with: &[OwnedFd],
        left: Option<Bare>,
    ) -> Result<(Revived, Observed), RunError> {
        let stdio = given(one, with).map_err(RunError::Stdio)?;
        let identity = Identity {
            role: Role::Clone {
                number: one.number,
                of: self.lot.of,
                template: self.lot.template.clone(),
            },
            settings: one
                .settings
                .iter()
                .map(|text| text.clone().into())
                .collect(),
        };
        let host = HostSide {
            stdio,
            signals: ProcessSignals::LeftAlone,
        };
        let bare = left.map_or_else(|| Bare::new(&self.wanted), Ok)?;
        let revived = Revived::new(bare, &self.image, &self.records, identity, host)?;
        let observed = Observed {
            machine: self.data.clone(),
            origin: Some(Arc::clone(self.image.snapshot())),
            ready: None,
            keeps_last: false,
        };
        Ok((revived, observed))
    }
}

/// Descriptors 0 to 2 of a clone, copies of those that came `with` its order: a clone that goes back gets them again.
fn given(one: &One, with: &[OwnedFd]) -> io::Result<Given> {
    let mut with = with.iter();
    let mut next = || match with.next() {
        Some(fd) => Ok(rustix::io::fcntl_dupfd_cloexec(fd, 3)?),
        None => Err(io::Error::from(io::ErrorKind::InvalidData)),
    };
    let stdin = match one.stdin {
        true => next()?,
        false => File::open("/dev/null")?.into(),
    };
    let stdout = match one.stdout {
        true => Some(next()?),
        false => copy(rustix::stdio::stdout().as_fd())?,
    };
    Ok(Given([Some(stdin), stdout, copy(rustix::stdio::stderr())?]))
}

/// Runs a clone to its end, and keeps its machine for the next.
fn run(revived: Revived, (one, with): (&One, &[OwnedFd]), mut end: End) {
    take_no_signals();
    let worker = Arc::clone(&end.worker);
    let again = |left| worker.revive(one, with, left);
    match revived.run_again(worker.lot.timeout, After::Keep, again) {
        Ok((ended, left)) => {
            end.status = ended.status();
            end.worker.free.lock().extend(left);
        }
        Err(error) => complain(&error),
    }
}

/// Tells of a clone's end, however that comes.
struct End {
    worker: Arc<Worker>,
    number: u32,
    status: u8,
}

impl Drop for End {
    fn drop(&mut self) {
        self.worker.tell(News::Ended {
            number: self.number,
            status: self.status,
        });
    }
}
