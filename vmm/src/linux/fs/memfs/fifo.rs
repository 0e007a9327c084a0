//! FIFOs (fifo(7)): pipes with a name. What is in one is gone when its last end is closed.

use std::sync::{Arc, Weak};

use rustix::io::Errno;

use super::inode::Inode;
use crate::linux::call::{Wait, WaitKey};
use crate::linux::fd::pipe::{End, Pipe, Side};
use crate::linux::file::{Change, File, Location, O_NONBLOCK, Ready, Stat, Viewer};
use crate::linux::kernel::Kernel;
use crate::linux::saved::{Refused, SavedFile, Saver};
use crate::locks::{Mutex, rank};

/// The pipe behind a FIFO's inode, while it is open.
#[derive(Debug, Default)]
pub(super) struct Fifo(Mutex<rank::FifoPipe, Weak<Pipe>>);

/// An open FIFO.
#[derive(Debug)]
pub(super) struct FifoFile {
    pub(super) inode: Arc<Inode>,
    pub(super) at: Location,
    pub(super) path: Vec<u8>,
    pub(super) input: Option<Arc<End>>,
    pub(super) output: Option<Arc<End>>,
    /// How often the other side had been opened when this one was, if it was not open then.
    pub(super) alone_since: Option<u64>,
}

impl Fifo {
    /// One whose pipe is there already, if it is open.
    pub(super) fn with(pipe: Option<&Arc<Pipe>>) -> Self {
        Self(Mutex::new(pipe.map(Arc::downgrade).unwrap_or_default()))
    }

    /// Its pipe, if it is open.
    pub(super) fn pipe(&self) -> Option<Arc<Pipe>> {
        self.0.lock().upgrade()
    }

    /// Opens it; [`File::unopened`] tells whether that is complete.
    ///
    /// # Errors
    /// `ENXIO` for writing without waiting when nobody reads; `ENFILE`.
    pub(super) fn open(
        &self,
        k: &Kernel,
        inode: &Arc<Inode>,
        (at, path): (Location, Vec<u8>),
        flags: u32,
    ) -> Result<Arc<FifoFile>, Errno> {
        let mut known = self.0.lock();
        let pipe = match known.upgrade() {
            Some(pipe) => pipe,
            None => {
                let pipe = Pipe::new(&k.sched, &k.io.pipes)?;
                *known = Arc::downgrade(&pipe);
                pipe
            }
        };
        let (reads, writes) = (flags & 3 != 1, flags & 3 != 0);
        let other = if reads { Side::Write } else { Side::Read };
        let alone = reads != writes && pipe.ends(other) == 0;
        if alone && writes && flags & O_NONBLOCK != 0 {
            return Err(Errno::NXIO);
        }
        let opened = pipe.opened(other);
        Ok(Arc::new(FifoFile {
            inode: Arc::clone(inode),
            at,
            path,
            input: reads.then(|| pipe.reader()),
            output: writes.then(|| pipe.writer()),
            alone_since: (alone && flags & O_NONBLOCK == 0).then_some(opened),
        }))
    }
}

impl FifoFile {
    fn ends(&self) -> impl Iterator<Item = &Arc<End>> {
        self.input.iter().chain(&self.output)
    }
}

impl File for FifoFile {
    fn read(&self, _: &Kernel, _: u64, buf: &mut [u8]) -> Result<usize, Errno> {
        self.input
            .as_ref()
            .ok_or(Errno::BADF)?
            .pipe()
            .read_some(buf)
    }

    fn write(&self, _: &Kernel, _: u64, buf: &[u8]) -> Result<usize, Errno> {
        self.output
            .as_ref()
            .ok_or(Errno::BADF)?
            .pipe()
            .write_some(buf)
    }

    fn stat(&self, _: &Kernel) -> Result<Stat, Errno> {
        Ok(self.inode.stat())
    }

    fn ready(&self, by: Viewer<'_>) -> Ready {
        self.ends()
            .fold(Ready::empty(), |ready, end| ready | end.ready(by))
    }

    fn wait_key(&self) -> Option<WaitKey> {
        self.ends().next().and_then(|end| end.wait_key())
    }

    fn watch(&self, _: Viewer<'_>, _: Ready, wait: &mut Wait) {
        wait.keys
            .extend(self.ends().filter_map(|end| end.wait_key()));
    }

    fn unopened(&self) -> Option<WaitKey> {
        let since = self.alone_since?;
        let end = self.ends().next()?;
        let still = end.pipe().opened(end.side().other()) == since;
        still.then(|| end.wait_key()).flatten()
    }

    fn edges(&self) -> u64 {
        self.ends()
            .fold(0, |sum, end| sum.wrapping_add(end.edges()))
    }

    fn readable_bytes(&self) -> Option<usize> {
        self.ends().next().map(|end| end.pipe().len())
    }

    fn change(&self, _: &Kernel, change: &Change) -> Result<(), Errno> {
        self.inode.change(change)
    }

    fn location(&self) -> Option<Location> {
        Some(self.at.clone())
    }

    fn name(&self, _: &Kernel) -> Vec<u8> {
        self.path.clone()
    }

    fn saved(&self, s: &mut Saver<'_>) -> Result<SavedFile, Refused> {
        let saved = super::saved::SavedFifo::of(self, s);
        Ok(SavedFile::Fifo(
            saved.expect("a FIFO is open for something"),
        ))
    }

    fn as_any(&self) -> &dyn std::any::Any {
        self
    }

    fn pipe(&self) -> Option<&Arc<Pipe>> {
        self.ends().next().map(|end| end.pipe())
    }
}
