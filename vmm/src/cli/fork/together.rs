//! `vmm fork --isolation process`: all copies in one machine, in this process.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;

use super::{ForkArgs, ForkError, numbered, opened, start};
use crate::config::{Commit, ForkMode, PageFileConfig};
use crate::linux::stdio::{Ends, HostEnd, copy};
use crate::machine::hardware::MAX_MEMORY;
use crate::machine::shared::{SharedMachine, Tenant, Wish};
use crate::machine::{RunError, Wanted};
use crate::snapshot::guest::{MachineData, OpenError, open_guest};
use crate::snapshot::image::Image;
use crate::snapshot::read::ReadError;
use crate::snapshot::records::{Identity, Records, Role};

/// Memory that a copy is counted with at least: a few page tables, and as many again of its own.
const LEAST: u64 = 1 << 20;

/// What goes wrong here only.
#[derive(Debug, thiserror::Error)]
pub(super) enum TogetherError {
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error(transparent)]
    Machine(#[from] RunError),
}

impl From<ReadError> for TogetherError {
    fn from(error: ReadError) -> Self {
        Self::Open(error.into())
    }
}

/// Runs the copies to their end: 0, or the status of the first that did not end with it.
pub(super) fn run(args: &ForkArgs, template: File) -> Result<u8, ForkError> {
    let machine = machine(args, template)?;
    let shared = Streams::new()?;
    let most = args.jobs.unwrap_or(args.count) as usize;
    let mut copies = Copies::default();
    for number in 1..=args.count {
        while copies.running.len() >= most {
            copies.wait_for_one();
        }
        let wish = wish(args, number, &shared)?;
        let made = machine.fork(wish).map_err(TogetherError::from)?;
        copies.running.push_back(made);
    }
    while !copies.running.is_empty() {
        copies.wait_for_one();
    }
    Ok(copies.status)
}

/// The copies that were started. They are ended with this process, or if not all could be started.
#[derive(Default)]
struct Copies {
    running: VecDeque<Tenant>,
    /// That of the first that did not end with 0.
    status: u8,
}

impl Copies {
    /// Waits for the one that was started first of those that run.
    fn wait_for_one(&mut self) {
        if let Some(first) = self.running.pop_front() {
            let status = first.wait();
            if self.status == 0 {
                self.status = status;
            }
        }
    }
}

fn machine(args: &ForkArgs, template: File) -> Result<Arc<SharedMachine>, TogetherError> {
    let snapshot = Arc::new(opened(template)?);
    let (data, records) = open_guest(&snapshot)?;
    let wanted = wanted(args, &data, &records);
    let image = Arc::new(Image::read(&snapshot).map_err(|error| RunError::Image(error.into()))?);
    Ok(SharedMachine::start(&wanted, &image, records)?)
}

fn wanted(args: &ForkArgs, data: &MachineData, records: &Records) -> Wanted {
    let at_once = u64::from(args.jobs.unwrap_or(args.count).min(args.count));
    let memory = args.memory.map(|size| size.0);
    Wanted {
        memory: memory.unwrap_or_else(|| memory_for(data.memory, at_once, host_memory())),
        page_file: (data.page_file > 0).then(|| PageFileConfig {
            bytes: data.page_file,
            dir: crate::cli::run::page_file_dir(None),
        }),
        commit: Commit::Over,
        process_memory: data.process_memory,
        fork: ForkMode::Shared,
        cpus: args.cpus.map_or(records.cpus(), usize::from).clamp(1, 64),
        strace: false,
    }
}

/// As much as all copies would have in machines of their own, but not more than the host has unless there are so many
/// that they need it for their page tables.
fn memory_for(one: u64, copies: u64, host: u64) -> u64 {
    let all = one.saturating_mul(copies).min(host.max(one));
    let least = one.saturating_add(LEAST.saturating_mul(copies));
    all.max(least).min(MAX_MEMORY)
}

fn host_memory() -> u64 {
    let info = rustix::system::sysinfo();
    info.totalram.saturating_mul(u64::from(info.mem_unit))
}

/// What copies share that were given nothing of their own.
struct Streams {
    null: Arc<HostEnd>,
    stdout: Option<Arc<HostEnd>>,
    stderr: Option<Arc<HostEnd>>,
}

impl Streams {
    fn new() -> Result<Self, ForkError> {
        let null = File::open("/dev/null").map_err(start)?;
        Ok(Self {
            null: end(null.into())?,
            stdout: own(rustix::stdio::stdout())?,
            stderr: own(rustix::stdio::stderr())?,
        })
    }
}

fn end(fd: OwnedFd) -> Result<Arc<HostEnd>, ForkError> {
    Ok(Arc::new(HostEnd::new(fd).map_err(start)?))
}

/// A copy of one of this process's; `None` if it is not open.
fn own(fd: BorrowedFd<'_>) -> Result<Option<Arc<HostEnd>>, ForkError> {
    copy(fd).map_err(start)?.map(end).transpose()
}

fn wish(args: &ForkArgs, number: u32, shared: &Streams) -> Result<Wish, ForkError> {
    let opened = |pattern: &String, open: fn(&PathBuf) -> io::Result<File>| {
        let path = PathBuf::from(numbered(pattern, number));
        match open(&path) {
            Ok(file) => end(file.into()),
            Err(source) => Err(ForkError::File { path, source }),
        }
    };
    let stdin = match &args.stdin {
        Some(pattern) => opened(pattern, |path| File::open(path))?,
        None => Arc::clone(&shared.null),
    };
    let stdout = match &args.stdout {
        Some(pattern) => Some(opened(pattern, |path| File::create(path))?),
        None => shared.stdout.clone(),
    };
    let settings = args.env.iter().map(|text| numbered(text, number).into());
    Ok(Wish {
        identity: Identity {
            role: Role::Clone {
                number,
                of: args.count,
                template: args.guest.clone(),
            },
            settings: settings.collect(),
        },
        ends: Ends([Some(stdin), stdout, shared.stderr.clone()]),
        timeout: args.timeout,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn copies_have_what_they_would_have_alone_as_far_as_the_host_has_it() {
        assert_eq!(memory_for(GIB, 4, 16 * GIB), 4 * GIB);
        assert_eq!(memory_for(GIB, 1, 16 * GIB), GIB + LEAST);
        assert_eq!(memory_for(GIB, 100, 16 * GIB), 16 * GIB);
        // More than the host has if one had it.
        assert_eq!(memory_for(32 * GIB, 2, 16 * GIB), 32 * GIB + 2 * LEAST);
        // Page tables.
        assert_eq!(memory_for(GIB, 100_000, 16 * GIB), GIB + 100_000 * LEAST);
        assert_eq!(memory_for(u64::MAX, 3, 16 * GIB), MAX_MEMORY);
    }
}
