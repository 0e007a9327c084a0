//! `vmm fork --isolation process`: all copies in one machine, in this process.
//!
//! One thread, this one, makes the copies, hears of their ends and takes them out. Others are told of a copy by the
//! [`Registry`]: at the socket of this process by its number, or, if it has a name, at one of its own.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use super::named::Named;
use super::{ForkArgs, ForkError, numbered, opened, start};
use crate::cli::{STATUS_FAILURE, say_line};
use crate::config::{Commit, ForkMode, PageFileConfig};
use crate::control::rundir::{self, Called, RunDir};
use crate::control::server::Server;
use crate::linux::stdio::{Ends, HostEnd, copy};
use crate::machine::freezer::Freezer;
use crate::machine::hardware::MAX_MEMORY;
use crate::machine::shared::registry::Registry;
use crate::machine::shared::{SharedMachine, Tenant, Wish};
use crate::machine::verbs::chain;
use crate::machine::{RunError, Wanted, run_dir};
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
    let mut copies = Copies::new(args, template)?;
    let most = args.jobs.unwrap_or(args.count) as usize;
    for number in 1..=args.count {
        copies.see_to_ended();
        while copies.running.len() >= most {
            copies.wait_for_one();
        }
        copies.start(number)?;
    }
    while !copies.running.is_empty() {
        copies.wait_for_one();
    }
    Ok(copies.failed.map_or(0, |(_, status)| status))
}

/// The copies. They are ended with this process, or if not all could be started.
struct Copies<'a> {
    args: &'a ForkArgs,
    streams: Streams<'a>,
    /// Told the number of one that has ended, perhaps more than once.
    ends: Sender<u32>,
    ended: Receiver<u32>,
    /// That of all. Dropped before what it answers for.
    _socket: Option<Server>,
    freezer: Option<Freezer>,
    running: BTreeMap<u32, Copy>,
    registry: Arc<Registry>,
    machine: Arc<SharedMachine>,
    /// The first that did not end with 0, and its status.
    failed: Option<(u32, u8)>,
}

/// One that runs.
struct Copy {
    tenant: Tenant,
    /// Its descriptors 0 to 2: one that goes back gets them again.
    ends: Ends,
    /// Its own, if it has a name.
    socket: Option<Box<Server>>,
}

impl<'a> Copies<'a> {
    fn new(args: &'a ForkArgs, template: File) -> Result<Self, ForkError> {
        let snapshot = Arc::new(opened(template).map_err(TogetherError::from)?);
        let (data, records) = open_guest(&snapshot).map_err(TogetherError::from)?;
        let wanted = wanted(args, &data, &records);
        let image = Image::read(&snapshot).map_err(|error| RunError::Image(error.into()));
        let image = Arc::new(image.map_err(TogetherError::from)?);
        let machine =
            SharedMachine::start(&wanted, &image, records).map_err(TogetherError::from)?;
        let registry = Registry::new(&machine, data, &snapshot);
        let dir = run_dir(Called::Process).map_err(TogetherError::from)?;
        let socket = dir.and_then(|dir| {
            let served = Server::start_for_many(dir, registry.answers());
            served
                .inspect_err(|error| tracing::warn!(%error, "vmm ps will not find these clones"))
                .ok()
        });
        let freezer = args.name.as_ref().map(|_| Freezer::start());
        let (ends, ended) = channel();
        Ok(Self {
            args,
            streams: Streams::new(args)?,
            ends,
            ended,
            _socket: socket,
            freezer: freezer.transpose().map_err(start)?,
            running: BTreeMap::new(),
            registry,
            machine,
            failed: None,
        })
    }

    fn name(&self, number: u32) -> Option<String> {
        let name = self.args.name.as_ref()?;
        Some(format!("{name}-{number}"))
    }

    /// Starts a copy.
    fn start(&mut self, number: u32) -> Result<(), ForkError> {
        let ends = self.streams.of(number)?;
        let socket = match self.name(number) {
            Some(name) => {
                // Taken before it runs, asked when it does.
                let dir = RunDir::create(&rundir::folder(), Called::Name(&name))?;
                let answer = self.registry.answers_for(number);
                Some(Box::new(Server::start(dir, answer).map_err(start)?))
            }
            None => None,
        };
        let tenant = self.fork(number, &ends);
        let tenant = tenant.map_err(TogetherError::from)?;
        let copy = Copy {
            tenant,
            ends,
            socket,
        };
        self.running.insert(number, copy);
        Ok(())
    }

    /// Makes a guest, of which others are told before it runs.
    fn fork(&self, number: u32, ends: &Ends) -> Result<Tenant, RunError> {
        let wish = wish(self.args, number, ends.clone());
        let name = self.name(number);
        let made = self.machine.fork_seen(wish, |guest| {
            let ends = self.ends.clone();
            // Nobody hears when nobody is left who could see to it.
            let told = Box::new(move || _ = ends.send(number));
            guest.kernel.sched.at_end(told);
            let named = name.as_deref().zip(self.freezer.as_ref());
            self.registry.enter(number, guest, named);
        });
        Ok(made?.0)
    }

    /// Sees to those that have ended so far.
    fn see_to_ended(&mut self) {
        while let Ok(number) = self.ended.try_recv() {
            self.settle(number);
        }
    }

    /// Waits until one has ended, or goes back.
    fn wait_for_one(&mut self) {
        // This one has a sender too.
        if let Ok(number) = self.ended.recv() {
            self.settle(number);
        }
    }

    /// Takes out a copy that has ended, and makes it again if that is what it was ended for.
    fn settle(&mut self, number: u32) {
        let ended = |copy: &Copy| copy.tenant.has_ended();
        if !self.running.get(&number).is_some_and(ended) {
            return;
        }
        let asked = self.registry.was_asked(number);
        let Some(copy) = self.running.remove(&number) else {
            return;
        };
        if !asked {
            self.registry.leave(number);
            drop(copy.socket);
            self.note(number, copy.tenant.wait().status());
            return;
        }
        let Copy {
            tenant,
            ends,
            socket,
        } = copy;
        // Two do not read one input.
        drop(tenant);
        match self.fork(number, &ends) {
            Ok(tenant) => {
                let copy = Copy {
                    tenant,
                    ends,
                    socket,
                };
                self.running.insert(number, copy);
                self.registry.is_back(number, Ok(()));
            }
            Err(error) => {
                let why = chain(&error);
                say_line(&why);
                let why = format!("it cannot be made again, and has ended: {why}");
                self.registry.is_back(number, Err(why));
                self.registry.leave(number);
                self.note(number, STATUS_FAILURE);
            }
        }
    }

    fn note(&mut self, number: u32, status: u8) {
        if status != 0 && self.failed.is_none_or(|(first, _)| number < first) {
            self.failed = Some((number, status));
        }
    }
}

impl Drop for Copies<'_> {
    fn drop(&mut self) {
        // Sockets wait for those who ask, and they for clones that nobody sees to any more.
        self.registry.close();
    }
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

/// What copies have as descriptors 0 to 2.
struct Streams<'a> {
    named: Named<'a>,
    /// What those share that were given nothing of their own.
    shared: Ends,
}

impl<'a> Streams<'a> {
    fn new(args: &'a ForkArgs) -> Result<Self, ForkError> {
        let named = Named::new(args)?;
        let null = File::open("/dev/null").map_err(start)?;
        let own = [
            Some(end(null.into())?),
            own(rustix::stdio::stdout())?,
            own(rustix::stdio::stderr())?,
        ];
        let mut shared = Ends(own);
        for (n, shared) in shared.0.iter_mut().enumerate() {
            if let Some(file) = named.common(n) {
                *shared = Some(end(file.try_clone().map_err(start)?.into())?);
            }
        }
        Ok(Self { named, shared })
    }

    /// Those of one copy.
    fn of(&self, number: u32) -> Result<Ends, ForkError> {
        let mut ends = self.shared.clone();
        for (file, end_of) in self.named.of(number)?.into_iter().zip(&mut ends.0) {
            if let Some(file) = file {
                *end_of = Some(end(file.into())?);
            }
        }
        Ok(ends)
    }
}

fn end(fd: OwnedFd) -> Result<Arc<HostEnd>, ForkError> {
    Ok(Arc::new(HostEnd::new(fd).map_err(start)?))
}

/// A copy of one of this process's; `None` if it is not open.
fn own(fd: BorrowedFd<'_>) -> Result<Option<Arc<HostEnd>>, ForkError> {
    copy(fd).map_err(start)?.map(end).transpose()
}

fn wish(args: &ForkArgs, number: u32, ends: Ends) -> Wish {
    let settings = args.env.iter().map(|text| numbered(text, number).into());
    Wish {
        identity: Identity {
            role: Role::Clone {
                number,
                of: args.count,
                template: args.guest.clone(),
            },
            settings: settings.collect(),
        },
        ends,
        timeout: args.timeout,
    }
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
