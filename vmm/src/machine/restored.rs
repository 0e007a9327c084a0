//! A guest out of a snapshot: its machine made, its memory laid under it, its working set read ahead.

use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use shadow_mm::{Access, Vpn};

use super::hardware::{Hardware, HardwareError};
use super::inspector::{self, Observed};
use super::{Ended, HostSide, Machine, RunError, Wanted};
use crate::linux::sched::Sched;
use crate::memory::{Memory, PoolError};
use crate::snapshot::guest::MachineData;
use crate::snapshot::image::{ImageLoader, Loaded, Pages, WorkingSet};
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
#[derive(Clone, Debug)]
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
    let host = HostSide::whole_process().map_err(RunError::Stdio)?;
    let identity = config.identity.clone();
    let mut revived = Revived::new(&config.snapshot, &records, &wanted, identity, host)?;
    revived.machine.observe(
        Observed {
            machine: data,
            origin: Some(Arc::clone(&config.snapshot)),
            ready: None,
            keeps_last: config.report.is_some(),
        },
        dir,
    );
    let inspector = revived.machine.inspector.clone();
    let ended = revived.run(config.timeout)?;
    if let (Some(inspector), Some(file)) = (inspector, &mut file) {
        inspector.write_report(file, ended.status(), &ended.report);
    }
    Ok(ended)
}

/// Begins to load a guest's memory. The pages of a template are laid under the machine as they are; those of a file on a disk
/// are read, and compared with their checksums, when they are wanted.
pub(super) fn load(
    hardware: &Hardware,
    snapshot: &Arc<Snapshot>,
    loaded: &Arc<Loaded>,
) -> Result<ImageLoader, MemoryError> {
    let layer = snapshot.layer()?;
    let pages = match layer.map(|layer| hardware.attach_layer(layer)) {
        Some(Ok(frames)) => Pages::Mapped(frames),
        // A machine that has had guests of many templates.
        None | Some(Err(HardwareError::Pool(PoolError::NoRoom { .. }))) => Pages::Read,
        Some(Err(error)) => return Err(error.into()),
    };
    let (memory, snapshot, loaded) = (&hardware.memory, Arc::clone(snapshot), Arc::clone(loaded));
    Ok(ImageLoader::new(memory, (snapshot, pages), loaded)?)
}

/// A guest of a snapshot in its machine; it has not run yet.
pub(crate) struct Revived {
    pub(crate) machine: Machine,
    loaded: Arc<Loaded>,
    broken: Broken,
}

impl Revived {
    /// Makes it.
    ///
    /// # Errors
    /// The snapshot is damaged, or the machine cannot be made.
    pub(crate) fn new(
        snapshot: &Arc<Snapshot>,
        records: &Records,
        wanted: &Wanted,
        identity: Identity,
        host: HostSide,
    ) -> Result<Self, RunError> {
        let loaded = Arc::new(Loaded::default());
        let image = |hardware: &Hardware| load(hardware, snapshot, &loaded);
        let machine = Machine::restore(wanted, records, identity, host, image)?;
        let broken = watch(&machine, &loaded);
        Ok(Self {
            machine,
            loaded,
            broken,
        })
    }

    /// Runs it to its end.
    ///
    /// # Errors
    /// A page of the snapshot cannot be read, or the host fails.
    pub(crate) fn run(self, timeout: Option<Duration>) -> Result<Ended, RunError> {
        let ahead = read_ahead(&self.machine, &self.loaded);
        let ended = self.machine.run(timeout);
        if let Some(ahead) = ahead {
            // A panic has said itself what it was.
            let _ = ahead.join();
        }
        if let Some(error) = self.broken.get() {
            return Err(RunError::Snapshot(std::io::Error::other(error.clone())));
        }
        ended
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
        content.on_failure(Box::new(move |error| {
            let _first = told.set(error.to_string());
            if let Some(sched) = sched.upgrade() {
                sched.end();
            }
        }));
    }
    broken
}

/// Reads the pages that were in use, while the guest runs. Without a thread for it they are read as they
/// are wanted.
fn read_ahead(machine: &Machine, loaded: &Loaded) -> Option<JoinHandle<()>> {
    let sets = loaded.take_working_sets();
    // A template's pages are there without being read.
    if sets.is_empty() {
        return None;
    }
    let kernel = machine.kernel();
    let started = std::thread::Builder::new()
        .name("read ahead".into())
        .spawn(move || {
            for set in sets {
                read_set(&kernel.memory, &kernel.sched, &set);
            }
        });
    match started {
        Ok(thread) => Some(thread),
        Err(error) => {
            tracing::warn!(%error, "no thread to read ahead with");
            None
        }
    }
}

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
