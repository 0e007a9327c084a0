//! Open files and descriptions as data.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::error::{Damaged, RestoreError};
use super::load::Loader;
use super::save::Saver;
use super::tables::{FileIx, PipeIx, SocketIx};
use crate::linux::fd::eventfd::SavedEvent;
use crate::linux::fd::pipe::{SavedPipe, Side};
use crate::linux::file::{Description, File, Location};
use crate::linux::fs::saved::{
    SavedDirectory, SavedFifo, SavedHostFile, SavedMade, SavedMemFile, SavedVmm,
};
use crate::linux::signal::descriptor::SavedSignals;
use crate::linux::timers::SavedTimer;

/// An open file, by its kind.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum SavedFile {
    /// An end of a pipe.
    Pipe(PipeIx, Side),
    /// An event counter.
    Event(SavedEvent),
    /// A timer.
    Timer(SavedTimer),
    /// An epoll; what it looks at is with the records.
    Epoll,
    /// A socket.
    Socket(SocketIx),
    /// A regular file in memory.
    Memory(SavedMemFile),
    /// A FIFO.
    Fifo(SavedFifo),
    /// A regular file of the host.
    Host(SavedHostFile),
    /// A directory.
    Directory(SavedDirectory),
    /// A place (`O_PATH`): where it is, and its mode.
    Place(Location, u32),
    /// A file of `/proc` or `/sys`.
    Made(SavedMade),
    /// A device of `/dev`.
    Device(Location),
    /// A standard descriptor of the host.
    Stdio(i32),
    /// `/dev/vmm`.
    Vmm(SavedVmm),
    /// Signals to be read.
    Signals(SavedSignals),
}

impl SavedFile {
    pub(super) fn load(self, l: &Loader<'_>) -> Result<Arc<dyn File>, RestoreError> {
        Ok(match self {
            Self::Pipe(pipe, Side::Read) => l.pipe(pipe)?.reader(),
            Self::Pipe(pipe, Side::Write) => l.pipe(pipe)?.writer(),
            Self::Event(saved) => saved.load(&l.k.sched)?,
            Self::Timer(saved) => saved.load(&l.k.sched)?,
            Self::Epoll => crate::linux::fd::epoll::Epoll::empty(&l.k.sched),
            Self::Socket(socket) => Arc::clone(l.socket(socket)?) as Arc<dyn File>,
            Self::Memory(saved) => saved.load(l)?,
            Self::Fifo(saved) => saved.load(l)?,
            Self::Host(saved) => saved.load(l.k)?,
            Self::Directory(saved) => saved.load(l)?,
            Self::Place(at, mode) => {
                l.place(&at)?;
                Arc::new(crate::linux::fs::PathFile::new(at, mode))
            }
            Self::Made(saved) => saved.load(l)?,
            Self::Device(at) => l.device(&at)?,
            Self::Stdio(n) => l.stdio(n)?,
            Self::Vmm(saved) => saved.load(l)?,
            Self::Signals(saved) => saved.load(&l.k.sched),
        })
    }
}

/// An open file description.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SavedDescription {
    file: FileIx,
    flags: u32,
    offset: u64,
    /// The `flock` it holds, and whether that excludes others.
    flock: Option<bool>,
}

impl SavedDescription {
    pub(super) fn of(description: &Description, s: &mut Saver<'_>) -> Self {
        let offset = *description.offset.lock();
        let flock = description.flock.lock();
        Self {
            file: s.file(&description.file),
            flags: description.flags(),
            offset,
            flock: flock
                .as_ref()
                .map(crate::linux::fs::FlockGuard::is_exclusive),
        }
    }

    pub(super) fn load(&self, l: &Loader<'_>) -> Result<Arc<Description>, RestoreError> {
        let file = l.file(self.file)?;
        let description = Description::new(Arc::clone(file), self.flags);
        *description.offset.lock() = self.offset;
        if let Some(exclusive) = self.flock {
            let stat = file.stat(l.k).map_err(|_| Damaged("a lock on no file"))?;
            let flocks = l.k.vfs.flocks();
            let taken = flocks.take(&l.k.sched, (stat.dev, stat.ino), exclusive);
            let guard = taken.map_err(|_| Damaged("two locks exclude each other"))?;
            *description.flock.lock() = Some(guard);
        }
        Ok(description)
    }
}

/// Pipes first: what has their ends comes later.
pub(super) fn load_pipes(l: &mut Loader<'_>, saved: &[SavedPipe]) -> Result<(), RestoreError> {
    for pipe in saved {
        let made = pipe.load(&l.k.sched, &l.k.io.pipes)?;
        l.pipes.push(made);
    }
    Ok(())
}
