//! Saving: from the processes to everything they hold.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::Records;
use super::content::SavedContent;
use super::error::Refused;
use super::file::{SavedDescription, SavedFile};
use super::records::{SavedEpoll, SavedMachine, SavedSpace};
use super::tables::{DescriptionIx, FileIx, InodeIx, PipeIx, Seen, SocketIx, SpaceIx};
use crate::linux::fd::epoll::Epoll;
use crate::linux::fd::pipe::Pipe;
use crate::linux::file::{Description, File};
use crate::linux::fs::memfs::Inode;
use crate::linux::fs::saved::SavedInode;
use crate::linux::kernel::Kernel;
use crate::linux::net::{SavedSocket, Socket};
use crate::linux::proc::futex::saved::SavedFutexes;
use crate::linux::proc::saved::{SavedProcess, SavedThread};
use crate::linux::process::{AddressSpace, State};
use crate::linux::vdso;
use crate::memory::{Backing, Content};
use crate::snapshot::records::{ContentRef, MemoryError, SaveContents, SaveMemory};

/// What was met so far. Whoever holds something shared asks for its number here; what has one is saved in its
/// turn.
pub struct Saver<'a> {
    pub(in crate::linux) k: &'a Kernel,
    spaces: Seen<AddressSpace>,
    descriptions: Seen<Description>,
    files: Seen<dyn File>,
    pipes: Seen<Pipe>,
    sockets: Seen<Socket>,
    inodes: Seen<Inode>,
    contents: Seen<dyn Content>,
    /// Deleted files of the host, by device and inode number: what they hold.
    orphans: BTreeMap<(u64, u64), Arc<Inode>>,
}

impl<'a> Saver<'a> {
    fn new(k: &'a Kernel) -> Self {
        Self {
            k,
            spaces: Seen::default(),
            descriptions: Seen::default(),
            files: Seen::default(),
            pipes: Seen::default(),
            sockets: Seen::default(),
            inodes: Seen::default(),
            contents: Seen::default(),
            orphans: BTreeMap::new(),
        }
    }

    pub(in crate::linux) fn space(&mut self, space: &Arc<AddressSpace>) -> SpaceIx {
        SpaceIx(self.spaces.number(space))
    }

    pub(in crate::linux) fn description(&mut self, d: &Arc<Description>) -> DescriptionIx {
        DescriptionIx(self.descriptions.number(d))
    }

    pub(in crate::linux) fn known(&self, d: &Arc<Description>) -> Option<DescriptionIx> {
        self.descriptions.find(d).map(DescriptionIx)
    }

    pub(in crate::linux) fn file(&mut self, file: &Arc<dyn File>) -> FileIx {
        FileIx(self.files.number(file))
    }

    pub(in crate::linux) fn pipe(&mut self, pipe: &Arc<Pipe>) -> PipeIx {
        PipeIx(self.pipes.number(pipe))
    }

    pub(in crate::linux) fn socket(&mut self, socket: &Arc<Socket>) -> SocketIx {
        SocketIx(self.sockets.number(socket))
    }

    /// The file in memory that a deleted file of the host becomes, made by `copy` the first time.
    pub(in crate::linux) fn orphan(
        &mut self,
        id: (u64, u64),
        copy: impl FnOnce(&Kernel) -> Result<Arc<Inode>, Refused>,
    ) -> Result<InodeIx, Refused> {
        let inode = match self.orphans.get(&id) {
            Some(inode) => Arc::clone(inode),
            None => copy(self.k)?,
        };
        let number = self.inode(&inode);
        self.orphans.insert(id, inode);
        Ok(number)
    }

    pub(in crate::linux) fn inode(&mut self, inode: &Arc<Inode>) -> InodeIx {
        InodeIx(self.inodes.number(inode))
    }
}

impl SaveContents for Saver<'_> {
    fn content(&mut self, backing: &Backing) -> Result<ContentRef, MemoryError> {
        let mapped = self.k.memory.sections.find(backing.0.id());
        if mapped.is_some_and(|mapped| mapped.is_modified(&self.k.memory)) {
            return Err(Refused::Unwritten {
                path: super::error::shown(&backing.0.path()),
            }
            .into());
        }
        Ok(ContentRef(self.contents.number(&backing.0)))
    }
}

/// Writes a stopped guest down. It stays as it was.
///
/// # Errors
/// It runs, has ended, or holds something that could not be made again.
pub fn save(k: &Kernel, memory: &mut dyn SaveMemory) -> Result<Records, Refused> {
    if !k.sched.is_stopped() {
        return Err(Refused::Running);
    }
    if k.sched.has_ended() || k.state().main_status.is_some() {
        return Err(Refused::Ended);
    }
    if k.memory.guard.get().is_some() {
        return Err(Refused::Guarded);
    }
    k.freezes.cover();
    // So that no mapping has what its file has not.
    k.memory.sections.tidy(&k.memory);
    let mut s = Saver::new(k);
    let tree = k.vfs.saved(&mut s);
    let (processes, threads, futexes) = people(&mut s)?;
    let spaces = spaces(&mut s, memory)?;
    let things = things(&mut s, memory)?;
    let epolls = epolls(&s);
    let locks = k.io.locks.saved(&s);
    Ok(Records {
        machine: machine(k),
        tree,
        processes,
        threads,
        futexes,
        spaces,
        pipes: s.pipes.all().iter().map(|pipe| pipe.saved()).collect(),
        inodes: things.inodes,
        contents: things.contents,
        sockets: things.sockets,
        files: things.files,
        descriptions: things.descriptions,
        epolls,
        locks,
    })
}

fn machine(k: &Kernel) -> SavedMachine {
    let state = k.state();
    SavedMachine {
        info: k.info,
        vdso: super::records::vdso_digest(),
        limits: k.limits.into(),
        next_pid: state.next_pid,
        main: state.main,
        tty_state: state.tty,
        tty: k.tty.as_ref().map(|tty| tty.saved()),
        clock: k.clock.saved(&vdso::page(&k.memory)),
        next_key: k.sched.next_key(),
    }
}

type People = (Vec<SavedProcess>, Vec<SavedThread>, SavedFutexes);

/// Processes, threads, and who of them waits for which word.
fn people(s: &mut Saver<'_>) -> Result<People, Refused> {
    let k = s.k;
    let state = k.state();
    let processes = state
        .procs
        .values()
        .map(|p| SavedProcess::of(p, s))
        .collect();
    let mut threads = Vec::new();
    k.sched
        .each_resting(|rest| threads.push(SavedThread::of(rest.thread, s)));
    let threads = threads.into_iter().collect::<Result<Vec<_>, _>>()?;
    let futexes = futexes(s, &state, &threads);
    Ok((processes, threads, futexes))
}

fn futexes(s: &Saver<'_>, state: &State, threads: &[SavedThread]) -> SavedFutexes {
    let spaces = s.spaces.all();
    state.futexes.saved(|key, waiters| {
        // Any space shows a private word; a shared one is looked for where the waiters are.
        let of = |tid: i32| {
            threads
                .iter()
                .find(|t| t.tid() == tid)
                .map(SavedThread::space)
        };
        let mut candidates = waiters.iter().filter_map(|&(tid, _)| of(tid));
        candidates.find_map(|space| {
            let mm = spaces.get(space.0 as usize)?;
            Some((space, key.address_in(&s.k.memory, mm)?))
        })
    })
}

fn spaces(s: &mut Saver<'_>, memory: &mut dyn SaveMemory) -> Result<Vec<SavedSpace>, Refused> {
    let mut saved = Vec::new();
    while let Some(mm) = s.spaces.next() {
        let layout = mm.layout.lock().clone();
        let space = memory.space(&mm.space, s).map_err(unwrap_memory)?;
        saved.push(SavedSpace { space, layout });
    }
    Ok(saved)
}

/// A refusal of ours that came back through the image is not its.
fn unwrap_memory(error: MemoryError) -> Refused {
    match error.downcast::<Refused>() {
        Ok(refused) => *refused,
        Err(error) => Refused::Memory(error),
    }
}

#[derive(Default)]
struct Things {
    descriptions: Vec<SavedDescription>,
    files: Vec<SavedFile>,
    sockets: Vec<SavedSocket>,
    contents: Vec<SavedContent>,
    inodes: Vec<SavedInode>,
}

/// Everything that was met, and what is met by it, until nothing new is.
fn things(s: &mut Saver<'_>, memory: &mut dyn SaveMemory) -> Result<Things, Refused> {
    let mut all = Things::default();
    loop {
        let mut quiet = true;
        while let Some(description) = s.descriptions.next() {
            all.descriptions.push(SavedDescription::of(&description, s));
            quiet = false;
        }
        while let Some(file) = s.files.next() {
            all.files.push(file.saved(s)?);
            quiet = false;
        }
        while let Some(socket) = s.sockets.next() {
            all.sockets.push(socket.saved_socket(s));
            quiet = false;
        }
        while let Some(content) = s.contents.next() {
            all.contents.push(SavedContent::of(content, s)?);
            quiet = false;
        }
        while let Some(inode) = s.inodes.next() {
            all.inodes.push(inode.saved(s, memory)?);
            quiet = false;
        }
        if quiet {
            return Ok(all);
        }
    }
}

/// What each epoll looks at, once all descriptions have their numbers.
fn epolls(s: &Saver<'_>) -> Vec<SavedEpoll> {
    let members = |(n, file): (usize, &Arc<dyn File>)| {
        let epoll = file.as_any().downcast_ref::<Epoll>()?;
        Some(SavedEpoll {
            file: FileIx(n as u32),
            members: epoll.saved_members(|d| s.known(d)),
        })
    };
    s.files
        .all()
        .iter()
        .enumerate()
        .filter_map(members)
        .collect()
}

impl Saver<'_> {
    /// The file that is open and has an inode number on a device.
    pub(in crate::linux) fn open_file(&self, id: (u64, u64)) -> Option<FileIx> {
        let is = |file: &Arc<dyn File>| file.stat(self.k).is_ok_and(|s| (s.dev, s.ino) == id);
        let at = self.files.all().iter().position(is)?;
        Some(FileIx(at as u32))
    }
}
