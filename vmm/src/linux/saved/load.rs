//! Making a guest of its records.
//!
//! The order is that of who needs whom: pipes, inodes, memory with the contents of mapped files, sockets, files,
//! descriptions, processes, threads. Every number and every value is looked at before it is used: the
//! records may be damaged, or made by somebody who means harm. What is refused half-way is dropped
//! whole; nothing has run.

use std::cell::OnceCell;
use std::collections::BTreeSet;
use std::sync::Arc;

use super::content::SavedContent;
use super::error::{Damaged, RestoreError, require};
use super::file;
use super::records::Records;
use super::tables::{DescriptionIx, FileIx, InodeIx, Made, PipeIx, SocketIx, SpaceIx};
use crate::linux::exec::MachineInfo;
use crate::linux::fd::epoll::Epoll;
use crate::linux::fd::pipe::Pipe;
use crate::linux::file::{Description, File, Location};
use crate::linux::fs::Vfs;
use crate::linux::fs::memfs::Inode;
use crate::linux::fs::memfs::saved::check_trees;
use crate::linux::fs::saved::{check_place, load_device};
use crate::linux::kernel::{Kernel, KernelLimits, KernelParts};
use crate::linux::net::Socket;
use crate::linux::proc::saved::check_layout;
use crate::linux::process::{AddressSpace, FdTable};
use crate::linux::sched::Sched;
use crate::linux::thread::XsaveArea;
use crate::linux::time::{Clock, TscInfo};
use crate::linux::tty::Tty;
use crate::linux::vdso;
use crate::memory::{Backing, Memory};
use crate::snapshot::records::{ContentRef, Identity, LoadContents, LoadMemory, MemoryError};

/// Where a guest is made again.
#[derive(Clone, Copy)]
pub enum Place<'a> {
    /// In a machine of its own.
    Alone,
    /// In a machine with others, among them this one, which is made of the same records and never runs. The vDSO's page
    /// has no clock there, and what tells guests apart in their memory is written when they first run.
    Beside(&'a Kernel),
}

/// What the machine gives to a guest that is made again.
pub struct Parts<'a> {
    /// Where it is.
    pub place: Place<'a>,
    /// Its memory, still empty.
    pub memory: Arc<Memory>,
    /// Its scheduler, without threads.
    pub sched: Arc<Sched>,
    /// The standard descriptors it goes on with.
    pub files: FdTable,
    /// The terminal, if one of them is one.
    pub tty: Option<Arc<Tty>>,
    /// The time stamp counter.
    pub tsc: TscInfo,
    /// The file tree, if there is one of a guest of the same records that has ended; its parts in memory are empty.
    pub tree: Option<Vfs>,
    /// What programs are told about this machine.
    pub info: MachineInfo,
    /// The FPU state of a fresh virtual CPU, and the components the guest may use.
    pub fpu: (XsaveArea, u64),
}

/// What was made so far.
pub struct Loader<'a> {
    pub(in crate::linux) k: &'a Kernel,
    stdio: &'a FdTable,
    fpu: &'a (XsaveArea, u64),
    pub(super) pipes: Made<Arc<Pipe>>,
    inodes: Made<Arc<Inode>>,
    contents: Vec<(&'a SavedContent, OnceCell<Backing>)>,
    spaces: Made<Arc<AddressSpace>>,
    sockets: Made<Arc<Socket>>,
    files: Made<Arc<dyn File>>,
    descriptions: Made<Arc<Description>>,
}

impl Loader<'_> {
    pub(in crate::linux) fn pipe(&self, at: PipeIx) -> Result<&Arc<Pipe>, Damaged> {
        self.pipes.get(at.0)
    }

    pub(in crate::linux) fn inode(&self, at: InodeIx) -> Result<&Arc<Inode>, Damaged> {
        self.inodes.get(at.0)
    }

    pub(in crate::linux) fn space(&self, at: SpaceIx) -> Result<&Arc<AddressSpace>, Damaged> {
        self.spaces.get(at.0)
    }

    pub(in crate::linux) fn socket(&self, at: SocketIx) -> Result<&Arc<Socket>, Damaged> {
        self.sockets.get(at.0)
    }

    pub(in crate::linux) fn file(&self, at: FileIx) -> Result<&Arc<dyn File>, Damaged> {
        self.files.get(at.0)
    }

    pub(in crate::linux) fn description(
        &self,
        at: DescriptionIx,
    ) -> Result<&Arc<Description>, Damaged> {
        self.descriptions.get(at.0)
    }

    /// All address spaces.
    pub(super) fn spaces(&self) -> &[Arc<AddressSpace>] {
        self.spaces.all()
    }

    /// Whether a place can be one.
    pub(in crate::linux) fn place(&self, at: &Location) -> Result<(), Damaged> {
        check_place(&self.k.vfs, at)
    }

    pub(super) fn device(&self, at: &Location) -> Result<Arc<dyn File>, RestoreError> {
        self.place(at)?;
        load_device(self.k, at)
    }

    pub(super) fn stdio(&self, n: i32) -> Result<Arc<dyn File>, RestoreError> {
        require((0..=2).contains(&n), "a standard descriptor's number")?;
        let own = self.stdio.fds.get(&n).ok_or(RestoreError::Stdio(n))?;
        Ok(Arc::clone(&own.description.file))
    }

    /// The FPU state of a fresh virtual CPU, and the components the guest may use.
    pub(in crate::linux) fn fpu(&self) -> (&XsaveArea, u64) {
        (&self.fpu.0, self.fpu.1)
    }
}

impl LoadContents for Loader<'_> {
    fn content(&self, at: ContentRef) -> Result<Backing, MemoryError> {
        let content = self.contents.get(at.0 as usize);
        let (saved, opened) = content.ok_or(Damaged("no such content of a mapping"))?;
        if let Some(backing) = opened.get() {
            return Ok(backing.clone());
        }
        let backing = saved.load(self)?;
        Ok(opened.get_or_init(|| backing).clone())
    }
}

/// Makes a guest of its records: a kernel whose threads are in the run queue. The vDSO's page is still to be
/// published, and nothing runs until there are workers.
///
/// # Errors
/// The records are damaged, this machine is not fit for them, or a file is not what it was.
pub fn restore(
    records: &Records,
    parts: Parts<'_>,
    memory: &mut dyn LoadMemory,
    identity: Identity,
) -> Result<Kernel, RestoreError> {
    let machine = &records.machine;
    if !parts.info.can_run(&machine.info) {
        return Err(RestoreError::Processor);
    }
    if machine.vdso != super::records::vdso_digest() {
        return Err(RestoreError::Vdso);
    }
    require(machine.next_key < 1 << 62, "the objects' numbers")?;
    parts.sched.keys_from(machine.next_key);
    let (tree, clock) = match (parts.place, parts.tree) {
        (Place::Alone, Some(tree)) => (tree, Clock::new(parts.tsc)),
        (Place::Alone, None) => (records.tree.build()?, Clock::new(parts.tsc)),
        (Place::Beside(other), _) => (other.vfs.another()?, Clock::default()),
    };
    let kernel = Kernel::new(KernelParts {
        memory: parts.memory,
        sched: parts.sched,
        clock: Arc::new(clock),
        vfs: tree,
        tty: parts.tty,
        limits: limits(records)?,
        info: machine.info,
    });
    let mut loader = Loader {
        k: &kernel,
        stdio: &parts.files,
        fpu: &parts.fpu,
        pipes: Made::new("no such pipe"),
        inodes: Made::new("no such inode"),
        contents: records
            .contents
            .iter()
            .map(|c| (c, OnceCell::new()))
            .collect(),
        spaces: Made::new("no such address space"),
        sockets: Made::new("no such socket"),
        files: Made::new("no such file"),
        descriptions: Made::new("no such description"),
    };
    load_files_in_memory(&mut loader, records, memory)?;
    load_spaces(&mut loader, records, memory)?;
    load_things(&mut loader, records)?;
    let threads = super::people::load(&loader, records)?;
    let first = kernel.identity.set(identity).is_ok();
    debug_assert!(first, "a guest is made once");
    super::identity::tell_apart(&loader)?;
    if let (Some(saved), Some(tty)) = (&machine.tty, &kernel.tty) {
        saved.load(tty)?;
    }
    let page = match parts.place {
        Place::Alone => Some(vdso::page(&kernel.memory)),
        Place::Beside(_) => None,
    };
    kernel.clock.go_on_from(&machine.clock, page.as_ref())?;
    for thread in threads {
        kernel.sched.enqueue(Box::new(thread));
    }
    Ok(kernel)
}

fn limits(records: &Records) -> Result<KernelLimits, Damaged> {
    let limits = records.machine.limits;
    let bounded = |n: u64| {
        usize::try_from(n)
            .ok()
            .filter(|n| (1..=1 << 20).contains(n))
    };
    let bounded = |n: u64| bounded(n).ok_or(Damaged("the machine's limits"));
    Ok(KernelLimits {
        max_procs: bounded(limits.procs)?,
        max_threads: bounded(limits.threads)?,
        cpus: bounded(limits.cpus)?,
    })
}

/// Pipes, and the trees in memory, whose FIFOs have pipes.
fn load_files_in_memory(
    l: &mut Loader<'_>,
    records: &Records,
    memory: &mut dyn LoadMemory,
) -> Result<(), RestoreError> {
    file::load_pipes(l, &records.pipes)?;
    let roots: Vec<_> = records.tree.roots().collect();
    let numbers: Vec<_> = roots.iter().map(|&(_, root)| root).collect();
    let different: BTreeSet<_> = numbers.iter().collect();
    require(different.len() == numbers.len(), "a root of two trees")?;
    check_trees(&records.inodes, &numbers)?;
    for (n, saved) in records.inodes.iter().enumerate() {
        let root = roots.iter().find(|(_, root)| root.0 as usize == n);
        let root = root.and_then(|&(mount, _)| l.k.vfs.memory_mount(mount));
        let root = root.map(|fs| Arc::clone(fs.root()));
        let inode = saved.load(l, root.as_ref(), memory)?;
        l.inodes.push(inode);
    }
    for (saved, inode) in records.inodes.iter().zip(l.inodes.all()) {
        saved.fill(l, inode)?;
    }
    Ok(())
}

fn load_spaces(
    l: &mut Loader<'_>,
    records: &Records,
    memory: &mut dyn LoadMemory,
) -> Result<(), RestoreError> {
    let mut seen = BTreeSet::new();
    for saved in &records.spaces {
        require(seen.insert(saved.space), "an address space twice")?;
        check_layout(&saved.layout)?;
        let space = memory.space(saved.space, l).map_err(unwrap_memory)?;
        let mm = AddressSpace::new(&l.k.memory, space, saved.layout.clone());
        l.spaces.push(mm);
    }
    Ok(())
}

/// An error of ours that came back through the image is not its.
fn unwrap_memory(error: MemoryError) -> RestoreError {
    let error = match error.downcast::<RestoreError>() {
        Ok(error) => return *error,
        Err(error) => error,
    };
    match error.downcast::<Damaged>() {
        Ok(damaged) => RestoreError::Damaged(*damaged),
        Err(error) => RestoreError::Memory(error),
    }
}

/// Sockets, files, descriptions, and what holds those weakly.
fn load_things(l: &mut Loader<'_>, records: &Records) -> Result<(), RestoreError> {
    for socket in &records.sockets {
        let socket = socket.load(l)?;
        l.sockets.push(socket);
    }
    for (saved, socket) in records.sockets.iter().zip(l.sockets.all()) {
        saved.fill(l, socket)?;
    }
    for file in &records.files {
        let file = file.clone().load(l)?;
        l.files.push(file);
    }
    for (saved, pipe) in records.pipes.iter().zip(l.pipes.all()) {
        pipe.remember(saved);
    }
    for description in &records.descriptions {
        let description = description.load(l)?;
        l.descriptions.push(description);
    }
    for saved in &records.epolls {
        let file = l.file(saved.file)?;
        let epoll = file.as_any().downcast_ref::<Epoll>();
        let epoll = epoll.ok_or(Damaged("an epoll that is none"))?;
        for member in &saved.members {
            epoll.restore_member(member, l.description(member.of())?)?;
        }
    }
    records.locks.load(l)?;
    Ok(())
}
