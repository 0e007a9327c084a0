//! An open file of an in-memory tree.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::FallocateFlags;
use rustix::io::Errno;
use shadow_mm::Section;

use super::data::Data;
use super::inode::{Body, Inode};
use super::seals::Seals;
use crate::linux::file::{Change, File, Location, O_APPEND, Stat};
use crate::linux::kernel::Kernel;
use crate::linux::saved::{Refused, SavedFile, Saver};
use crate::memory::{Backing, Content, FileId, Version};

/// A regular file in memory, open. Lives on when its last name goes.
#[derive(Debug)]
pub(super) struct MemFile {
    pub(super) content: Arc<MemContent>,
    pub(super) at: Option<Location>,
    pub(super) append: AtomicBool,
}

#[derive(Debug)]
pub(super) struct MemContent {
    pub(super) inode: Arc<Inode>,
    pub(super) path: Vec<u8>,
}

impl Content for MemContent {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> std::io::Result<usize> {
        match &self.inode.body {
            Body::File(data) => Ok(data.read(offset, buf)?),
            Body::Dir(_) | Body::Link(_) | Body::Host(_) | Body::Fifo(_) | Body::Socket => Ok(0),
        }
    }

    fn write_at(&self, offset: u64, buf: &[u8]) -> std::io::Result<()> {
        let Body::File(data) = &self.inode.body else {
            return Err(Errno::BADF.into());
        };
        let mut done = 0;
        while done < buf.len() {
            // Short where the budget ends, and an error at the next attempt.
            done += data.write(Some(offset + done as u64), &buf[done..])?;
        }
        self.inode.modified();
        Ok(())
    }

    fn sync(&self) -> std::io::Result<()> {
        Ok(())
    }

    fn version(&self) -> std::io::Result<Version> {
        let size = match &self.inode.body {
            Body::File(data) => data.size().0,
            Body::Dir(_) | Body::Link(_) | Body::Host(_) | Body::Fifo(_) | Body::Socket => 0,
        };
        Ok(Version {
            size,
            ..Version::default()
        })
    }

    fn id(&self) -> FileId {
        FileId::Memory(Arc::as_ptr(&self.inode) as usize)
    }

    fn keeps(&self) -> bool {
        false
    }

    fn storage(&self) -> Option<Section<Backing>> {
        match &self.inode.body {
            Body::File(data) => Some(data.section().clone()),
            Body::Dir(_) | Body::Link(_) | Body::Host(_) | Body::Fifo(_) | Body::Socket => None,
        }
    }

    fn punch(&self, offset: u64, length: u64) -> std::io::Result<()> {
        match &self.inode.body {
            Body::File(data) => Ok(data.punch(offset, length)?),
            Body::Dir(_) | Body::Link(_) | Body::Host(_) | Body::Fifo(_) | Body::Socket => {
                Err(Errno::OPNOTSUPP.into())
            }
        }
    }

    fn identity(&self) -> (u64, u64) {
        let stat = self.inode.stat();
        (stat.dev, stat.ino)
    }

    fn path(&self) -> Vec<u8> {
        self.path.clone()
    }

    fn as_any(self: Arc<Self>) -> Arc<dyn std::any::Any + Send + Sync> {
        self
    }
}

impl MemFile {
    /// `inode`, at `at`, whose name in the guest is `path`.
    pub(super) fn new(inode: Arc<Inode>, at: Option<Location>, path: Vec<u8>, flags: u32) -> Self {
        let append = AtomicBool::new(flags & O_APPEND != 0);
        Self {
            content: Arc::new(MemContent { inode, path }),
            at,
            append,
        }
    }

    fn inode(&self) -> &Inode {
        &self.content.inode
    }

    fn data(&self) -> Result<&Data, Errno> {
        match &self.inode().body {
            Body::File(data) => Ok(data),
            Body::Dir(_) | Body::Link(_) | Body::Host(_) | Body::Fifo(_) | Body::Socket => {
                Err(Errno::INVAL)
            }
        }
    }
}

impl File for MemFile {
    fn read(&self, _: &Kernel, offset: u64, buf: &mut [u8]) -> Result<usize, Errno> {
        self.data()?.read(offset, buf)
    }

    fn write(&self, _: &Kernel, offset: u64, buf: &[u8]) -> Result<usize, Errno> {
        let offset = (!self.append.load(Ordering::Relaxed)).then_some(offset);
        let n = self.data()?.write(offset, buf)?;
        self.inode().modified();
        Ok(n)
    }

    fn seekable(&self) -> bool {
        true
    }

    fn stat(&self, _: &Kernel) -> Result<Stat, Errno> {
        Ok(self.inode().stat())
    }

    fn truncate(&self, _: &Kernel, length: u64) -> Result<(), Errno> {
        self.data()?.truncate(length)?;
        self.inode().modified();
        Ok(())
    }

    fn sync(&self, _: &Kernel, _: bool) -> Result<(), Errno> {
        Ok(())
    }

    fn allocate(&self, _: &Kernel, mode: u32, offset: u64, length: u64) -> Result<(), Errno> {
        let mode = FallocateFlags::from_bits(mode).ok_or(Errno::OPNOTSUPP)?;
        if length == 0 {
            return Err(Errno::INVAL);
        }
        let data = self.data()?;
        if mode == FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE {
            data.punch(offset, length)?;
        } else if FallocateFlags::KEEP_SIZE.contains(mode) {
            data.reserve(offset, length, mode.is_empty())?;
        } else {
            return Err(Errno::OPNOTSUPP);
        }
        self.inode().modified();
        Ok(())
    }

    fn change(&self, _: &Kernel, change: &Change) -> Result<(), Errno> {
        self.inode().change(change)
    }

    fn set_status(&self, flags: u32) -> Result<(), Errno> {
        self.append.store(flags & O_APPEND != 0, Ordering::Relaxed);
        Ok(())
    }

    fn mapping(&self, _: &Kernel) -> Result<Backing, Errno> {
        self.data()?;
        Ok(Backing(self.content.clone()))
    }

    fn seals(&self) -> Result<Seals, Errno> {
        Ok(self.data()?.seals())
    }

    fn seal(&self, more: Seals) -> Result<(), Errno> {
        let executable = self.inode().mode() & 0o111 != 0;
        let implied = if more.contains(Seals::EXEC) && executable {
            Seals::SHRINK | Seals::GROW | Seals::WRITE | Seals::FUTURE_WRITE
        } else {
            Seals::empty()
        };
        self.data()?.seal(more | implied)
    }

    fn location(&self) -> Option<Location> {
        self.at.clone()
    }

    fn name(&self, _: &Kernel) -> Vec<u8> {
        self.content.path.clone()
    }

    fn saved(&self, s: &mut Saver<'_>) -> Result<SavedFile, Refused> {
        Ok(SavedFile::Memory(super::saved::SavedMemFile::of(self, s)))
    }

    fn as_any(&self) -> &dyn std::any::Any {
        self
    }
}
