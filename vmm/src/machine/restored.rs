//! A guest out of a snapshot: its machine made, its memory laid under it, its working set read ahead.

use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use shadow_mm::{Access, Vpn};

use super::hardware::Hardware;
use super::inspector::{self, Observed};
use super::{Ended, Machine, RunError, Wanted};
use crate::linux::sched::Sched;
use crate::memory::Memory;
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
    /// The machine; what is not said is as it was.
    pub memory: Option<u64>,
    /// Where a page file goes, if the machine had one.
    pub page_file_dir: PathBuf,
    /// Processors; those it was told about if nothing is said.
    pub cpus: Option<usize>,
    /// Show system calls.
    pub strace: bool,
    /// What the machine is called.
    pub name: Option<String>,
    /// Where what `vmm inspect` shows is written at the end.
    pub report: Option<PathBuf>,
    /// End after this long.
    pub timeout: Option<Duration>,
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
    let wanted = wanted(config, &data, records.cpus());
    let loaded = Arc::new(Loaded::default());
    let image = |hardware: &Hardware| load(hardware, &config.snapshot, &loaded);
    let mut machine = Machine::restore(&wanted, &records, config.identity.clone(), image)?;
    let broken = watch(&machine, &loaded);
    machine.observe(
        Observed {
            machine: data,
            origin: Some(Arc::clone(&config.snapshot)),
            ready: None,
            keeps_last: config.report.is_some(),
        },
        dir,
    );
    let inspector = machine.inspector.clone();
    let ahead = read_ahead(&machine, &loaded);
    let ended = machine.run(config.timeout);
    if let Some(ahead) = ahead {
        // A panic has said itself what it was.
        let _ = ahead.join();
    }
    if let Some(error) = broken.get() {
        return Err(RunError::Snapshot(std::io::Error::other(error.clone())));
    }
    let ended = ended?;
    if let (Some(inspector), Some(file)) = (inspector, &mut file) {
        inspector.write_report(file, ended.status, &ended.report);
    }
    Ok(ended)
}

/// Begins to load a guest's memory. The pages of a template are laid under the machine as they are; those of a file on a disk
/// are read, and compared with their checksums, when they are wanted.
fn load(
    hardware: &Hardware,
    snapshot: &Arc<Snapshot>,
    loaded: &Arc<Loaded>,
) -> Result<ImageLoader, MemoryError> {
    let layer = snapshot.layer()?;
    let layer = layer
        .map(|layer| hardware.attach_layer(&layer))
        .transpose()?;
    let pages = layer.map_or(Pages::Read, Pages::Mapped);
    let (memory, snapshot, loaded) = (&hardware.memory, Arc::clone(snapshot), Arc::clone(loaded));
    Ok(ImageLoader::new(memory, (snapshot, pages), loaded)?)
}

fn wanted(config: &RestoreConfig, data: &MachineData, cpus: usize) -> Wanted {
    use crate::config::{Commit, ForkMode, PageFileConfig};
    Wanted {
        memory: config.memory.unwrap_or(data.memory),
        page_file: (data.page_file > 0).then(|| PageFileConfig {
            bytes: data.page_file,
            dir: config.page_file_dir.clone(),
        }),
        commit: if data.overcommit {
            Commit::Over
        } else {
            Commit::Limited
        },
        fork: ForkMode::Shared,
        cpus: config.cpus.unwrap_or(cpus).clamp(1, 64),
        strace: config.strace,
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
