//! A guest out of a snapshot: its machine made, its memory laid under it, its working set read ahead.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use shadow_mm::{Access, Vpn};

use super::hardware::{Hardware, HardwareError};
use super::host_io::HostIo;
use super::inspector::{self, Observed};
use super::kept::Kept;
use super::{After, Bare, Ended, HostSide, Machine, Playing, RunError, Wanted};
use crate::control::server::Server;
use crate::linux::kernel::Kernel;
use crate::linux::sched::Sched;
use crate::memory::{Memory, PoolError};
use crate::snapshot::guest::MachineData;
use crate::snapshot::image::{Image, ImageLoader, KeptMemory, Loaded, Pages, WorkingSet};
use crate::snapshot::read::Snapshot;
use crate::snapshot::records::{Identity, MemoryError, Records};

/// What `vmm restore` was asked to do.
#[derive(Debug)]
pub struct RestoreConfig {
    /// The snapshot.
    pub snapshot: Arc<Snapshot>,
    /// Which of the guests made of it this is.
    pub identity: Identity,
    /// The machine.
    pub choice: Choice,
    /// What the machine is called.
    pub name: Option<String>,
    /// Where what `vmm inspect` shows is written at the end.
    pub report: Option<PathBuf>,
    /// End after this long.
    pub timeout: Option<Duration>,
}

/// What can be chosen of a machine that a guest goes on in; what is not said is as it was.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// Bytes of guest memory, page tables included.
    pub memory: Option<u64>,
    /// Where a page file goes, if the machine had one.
    pub page_file_dir: PathBuf,
    /// Processors; those it was told about if nothing is said.
    pub cpus: Option<usize>,
    /// Show system calls.
    pub strace: bool,
}

impl Default for Choice {
    fn default() -> Self {
        Self {
            memory: None,
            page_file_dir: "/var/tmp".into(),
            cpus: None,
            strace: false,
        }
    }
}

/// Runs the guest of a snapshot ([`crate::snapshot::guest::open_guest`]) to its end.
///
/// # Errors
/// The snapshot is damaged, the machine cannot be made, or the host fails.
pub fn restore(
    config: &RestoreConfig,
    (data, records): (MachineData, Records),
) -> Result<Ended, RunError> {
    let mut file = inspector::report_file(config.report.as_deref())?;
    let dir = inspector::run_dir(config.name.as_deref())?;
    let wanted = wanted(&config.choice, &data, records.cpus());
    let image = Image::read(&config.snapshot).map_err(|e| RunError::Image(e.into()))?;
    let image = Arc::new(image);
    let revive = |left: Option<Bare>| {
        let host = HostSide::whole_process().map_err(RunError::Stdio)?;
        let bare = left.map_or_else(|| Bare::new(&wanted), Ok)?;
        let identity = config.identity.clone();
        let revived = Revived::new(bare, &image, &records, identity, host);
        let revived = revived.map_err(|unmade| unmade.why)?;
        let observed = Observed {
            machine: data.clone(),
            origin: Some(Arc::clone(&config.snapshot)),
            ready: None,
            keeps_last: config.report.is_some(),
        };
        Ok((revived, observed))
    };
    let (mut revived, observed) = revive(None)?;
    revived.machine.observe(observed, dir);
    let inspector = revived.machine.inspector.clone();
    let (ended, _) = revived.run_again(config.timeout, After::End, revive)?;
    if let (Some(inspector), Some(file)) = (inspector, &mut file) {
        inspector.write_report(file, ended.status(), &ended.report);
    }
    Ok(ended)
}

/// Begins to load a guest's memory. The pages of a template are laid under the machine as they are; those of a file on a disk
/// are read, and compared with their checksums, when they are wanted.
pub(super) fn load(
    hardware: &Hardware,
    image: &Arc<Image>,
    loaded: &Arc<Loaded>,
) -> Result<ImageLoader, MemoryError> {
    let layer = image.snapshot().layer()?;
    let pages = match layer.map(|layer| hardware.attach_layer(layer)) {
        Some(Ok(frames)) => Pages::Mapped(frames),
        // A machine that has had guests of many templates.
        None | Some(Err(HardwareError::Pool(PoolError::NoRoom { .. }))) => Pages::Read,
        Some(Err(error)) => return Err(error.into()),
    };
    let (memory, image, loaded) = (&hardware.memory, Arc::clone(image), Arc::clone(loaded));
    Ok(ImageLoader::new(memory, (image, pages), loaded)?)
}

/// Lays the pages of a template under a machine that waits for guests of it.
///
/// # Errors
/// The template cannot be mapped.
pub(crate) fn lay_under(bare: &Bare, image: &Image) -> Result<(), RunError> {
    let layer = image.snapshot().layer();
    let layer = layer.map_err(|error| RunError::Image(error.into()))?;
    if let Some(layer) = layer {
        bare.hardware.attach_layer(layer)?;
    }
    Ok(())
}

/// A guest of a snapshot that could not be made.
pub(crate) struct Unmade {
    /// Why.
    pub(crate) why: RunError,
    /// The machine it was to be in, if another one can be made there.
    pub(crate) left: Option<Bare>,
}

/// A guest of a snapshot for a machine, and its memory. If it cannot be made, nothing of it is left there, nor of the last one.
fn make(
    bare: &mut Bare,
    (image, records): (&Arc<Image>, &Records),
    identity: Identity,
    host: HostSide,
) -> Result<(Kernel, HostIo, KeptMemory), RunError> {
    let (mut memory, tree) = match bare.take_kept(image, records) {
        Some(Kept { memory, tree }) => (memory, Some(tree)),
        None => {
            let loader = load(&bare.hardware, image, &Arc::default());
            let loader = loader.map_err(RunError::Image)?;
            (KeptMemory::new(loader), None)
        }
    };
    match bare.revive(records, identity, host, (&mut memory, tree)) {
        Ok((kernel, io)) => {
            memory.is_given();
            Ok((kernel, io, memory))
        }
        Err(error) => {
            memory.is_refused();
            bare.give_up(memory);
            Err(error)
        }
    }
}

/// A guest of a snapshot in its machine; it has not run yet.
pub(crate) struct Revived {
    pub(crate) machine: Machine,
    loaded: Arc<Loaded>,
    broken: Broken,
}

impl Revived {
    /// Makes it, in a machine that is there.
    ///
    /// # Errors
    /// The guest cannot be made of what the snapshot has.
    pub(crate) fn new(
        mut bare: Bare,
        image: &Arc<Image>,
        records: &Records,
        identity: Identity,
        host: HostSide,
    ) -> Result<Self, Box<Unmade>> {
        let (kernel, io, memory) = match make(&mut bare, (image, records), identity, host) {
            Ok(made) => made,
            Err(why) => {
                let left = bare.is_as_new().then_some(bare);
                return Err(Box::new(Unmade { why, left }));
            }
        };
        let mut machine = bare.with(kernel, io);
        let loaded = Arc::clone(memory.loaded());
        machine.keeps = Some(memory);
        let broken = watch(&machine, &loaded);
        Ok(Self {
            machine,
            loaded,
            broken,
        })
    }

    /// Lets it run; there may be pages of its to be read ahead.
    ///
    /// # Errors
    /// The host has no threads.
    pub(crate) fn begin(
        self,
        timeout: Option<Duration>,
    ) -> Result<(Going, Option<Ahead>), RunError> {
        let sets = self.loaded.take_working_sets();
        let ahead = (!sets.is_empty()).then(|| Ahead {
            sets,
            kernel: self.machine.kernel(),
        });
        let going = Going {
            playing: self.machine.begin(timeout)?,
            broken: self.broken,
        };
        Ok((going, ahead))
    }
}

/// A guest of a snapshot that runs.
pub(crate) struct Going {
    playing: Playing,
    broken: Broken,
}

impl Going {
    /// The socket on which others ask for it: it does not end with this guest.
    pub(super) fn leave_socket(&mut self) -> Option<Server> {
        self.playing.leave_socket()
    }

    /// Takes it down: it has ended, or ends soon.
    ///
    /// # Errors
    /// A page of the snapshot could not be read, or the host failed.
    pub(crate) fn finish(self, after: After) -> Result<(Ended, Option<Bare>), RunError> {
        let ended = self.playing.finish(after);
        match self.broken.get() {
            Some(error) => Err(RunError::Snapshot(std::io::Error::other(error.clone()))),
            None => ended,
        }
    }
}

/// Pages that a guest had in use.
pub(crate) struct Ahead {
    sets: Vec<WorkingSet>,
    kernel: Arc<Kernel>,
}

impl Ahead {
    /// Reads them, while the guest runs.
    pub(crate) fn read(&self) {
        for set in &self.sets {
            read_set(&self.kernel.memory, &self.kernel.sched, set);
        }
    }
}

/// The machine for a guest that was in one of `data`, with so many processors.
pub(crate) fn wanted(choice: &Choice, data: &MachineData, cpus: usize) -> Wanted {
    use crate::config::{Commit, ForkMode, PageFileConfig};
    Wanted {
        memory: choice.memory.unwrap_or(data.memory),
        page_file: (data.page_file > 0).then(|| PageFileConfig {
            bytes: data.page_file,
            dir: choice.page_file_dir.clone(),
        }),
        commit: if data.overcommit {
            Commit::Over
        } else {
            Commit::Limited
        },
        process_memory: data.process_memory,
        fork: ForkMode::Shared,
        cpus: choice.cpus.unwrap_or(cpus).clamp(1, 64),
        strace: choice.strace,
    }
}

type Broken = Arc<std::sync::OnceLock<String>>;

/// Ends the machine when a page of the snapshot cannot be read: its memory is gone, by no fault of its own.
fn watch(machine: &Machine, loaded: &Loaded) -> Broken {
    let broken = Broken::default();
    if let Some(content) = loaded.content() {
        let (told, sched) = (Arc::clone(&broken), Arc::downgrade(&machine.kernel().sched));
        content.on_failure(Arc::new(move |error| {
            let _first = told.set(error.to_string());
            if let Some(sched) = sched.upgrade() {
                sched.end();
            }
        }));
    }
    broken
}

/// Reads the pages that were in use, while the guest runs.
fn read_set(memory: &Memory, sched: &Sched, set: &WorkingSet) {
    let pages = set.pages.iter();
    let pages = pages.flat_map(|(start, count)| *start..start.saturating_add(*count));
    for page in pages {
        if sched.has_ended() || memory.manager.frames_short() {
            return;
        }
        let Some(vpn) = Vpn::new(page) else { return };
        // What it may not read, or has unmapped meanwhile, it does not miss.
        let _ = memory.with_page(&set.space, vpn.va(), Access::Read, |_, _| ());
    }
}
