//! Trees in memory as data: every inode that has a name, is open or is mapped.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::MemFs;
use super::data::Data;
use super::fifo::{Fifo, FifoFile};
use super::file::{MemContent, MemFile};
use super::inode::{Body, Inode, Maker, Meta};
use super::seals::Seals;
use crate::linux::fd::pipe::Pipe;
use crate::linux::file::{File, Location, Stat};
use crate::linux::fs::mount::ANONYMOUS_DEV;
use crate::linux::fs::{NAME_MAX, Vfs};
use crate::linux::kernel::Kernel;
use crate::linux::saved::error::{Damaged, Refused, RestoreError, require};
use crate::linux::saved::tables::{InodeIx, PipeIx};
use crate::linux::saved::{Loader, Saver};
use crate::memory::{Backing, Memory};
use crate::snapshot::records::{BytesRef, LoadMemory, PAGE_BYTES, SaveMemory};

/// An inode.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SavedInode {
    /// Its tree's mount; `None` for a file that never had a name.
    mount: Option<usize>,
    ino: u64,
    meta: Meta,
    body: SavedBody,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
enum SavedBody {
    Directory(Vec<(Vec<u8>, InodeIx)>),
    Link(Vec<u8>),
    /// The bytes, and the seals.
    File(BytesRef, u32),
    Fifo(Option<PipeIx>),
    Socket,
}

impl MemFs {
    pub(in crate::linux) fn root(&self) -> &Arc<Inode> {
        &self.root
    }
}

impl Inode {
    /// What it is; its bytes go to `memory`.
    pub(in crate::linux) fn saved(
        &self,
        s: &mut Saver<'_>,
        memory: &mut dyn SaveMemory,
    ) -> Result<SavedInode, Refused> {
        let body = match &self.body {
            Body::Dir(entries) => {
                let entries = entries.lock();
                let entry =
                    |(name, e): (&Vec<u8>, &super::inode::Entry)| (name.clone(), s.inode(&e.inode));
                SavedBody::Directory(entries.iter().map(entry).collect())
            }
            Body::Link(target) => SavedBody::Link(target.clone()),
            Body::File(data) => {
                let bytes = memory.bytes(data).map_err(Refused::Memory)?;
                SavedBody::File(bytes, data.seals().bits())
            }
            Body::Fifo(fifo) => SavedBody::Fifo(fifo.pipe().map(|pipe| s.pipe(&pipe))),
            Body::Socket | Body::Host(_) => SavedBody::Socket,
        };
        Ok(SavedInode {
            mount: s.k.vfs.mount_of(self.dev()),
            ino: self.ino,
            meta: self.meta(),
            body,
        })
    }
}

impl SavedInode {
    /// Makes it again, a directory without its entries. `root` is what is there already, if it is the root
    /// of a tree.
    pub(in crate::linux) fn load(
        &self,
        l: &Loader<'_>,
        root: Option<&Arc<Inode>>,
        memory: &mut dyn LoadMemory,
    ) -> Result<Arc<Inode>, RestoreError> {
        require(self.ino < 1 << 62, "an inode's number")?;
        if let Some(root) = root {
            require(self.is_directory() && self.ino == root.ino, "a tree's root")?;
            root.set_meta(self.meta);
            return Ok(Arc::clone(root));
        }
        let own;
        let maker = match self.mount {
            Some(mount) => {
                l.k.vfs
                    .memory_mount(mount)
                    .ok_or(Damaged("an inode's tree"))?
                    .maker()
            }
            None => {
                own = Maker::new(ANONYMOUS_DEV, Arc::clone(l.k.vfs.budget()));
                &own
            }
        };
        let body = match &self.body {
            SavedBody::Directory(_) => Body::Dir(crate::locks::Mutex::default()),
            SavedBody::Link(target) => Body::Link(target.clone()),
            SavedBody::File(bytes, seals) => {
                let seals = Seals::from_bits(*seals).ok_or(Damaged("a file's seals"))?;
                let data = load_data(&l.k.memory, maker, (*bytes, memory))?;
                data.restore_seals(seals);
                Body::File(data)
            }
            SavedBody::Fifo(pipe) => {
                let pipe = pipe.map(|pipe| l.pipe(pipe)).transpose()?;
                Body::Fifo(Fifo::with(pipe))
            }
            SavedBody::Socket => Body::Socket,
        };
        let made = maker.make_again(body, self.ino, self.meta);
        made.map_err(no_room)
    }

    fn is_directory(&self) -> bool {
        matches!(self.body, SavedBody::Directory(_))
    }

    /// Gives a directory its entries, once all inodes are there.
    pub(in crate::linux) fn fill(&self, l: &Loader<'_>, made: &Inode) -> Result<(), RestoreError> {
        let SavedBody::Directory(entries) = &self.body else {
            return Ok(());
        };
        let fs = self.mount.and_then(|mount| l.k.vfs.memory_mount(mount));
        let fs = fs.ok_or(Damaged("a directory's tree"))?;
        let own = made
            .entries()
            .map_err(|_| Damaged("a directory that is none"))?;
        for (name, inode) in entries {
            let good = (1..=NAME_MAX).contains(&name.len())
                && !name.contains(&b'/')
                && !name.contains(&0)
                && name != b"."
                && name != b"..";
            require(good, "a name in a directory")?;
            let inode = Arc::clone(l.inode(*inode)?);
            require(inode.dev() == made.dev(), "a name for another tree's inode")?;
            let entry = fs.maker().entry(name, inode).map_err(no_room)?;
            let before = own.lock().insert(name.clone(), entry);
            require(before.is_none(), "a name twice in a directory")?;
        }
        Ok(())
    }
}

fn no_room(source: Errno) -> RestoreError {
    RestoreError::Room {
        what: "files in memory",
        source,
    }
}

fn load_data(
    memory: &Arc<Memory>,
    maker: &Maker,
    (bytes, image): (BytesRef, &mut dyn LoadMemory),
) -> Result<Data, RestoreError> {
    let data = Data::new(memory, &maker.budget, Seals::empty()).map_err(no_room)?;
    let length = image.bytes(bytes, &data).map_err(RestoreError::Memory)?;
    data.truncate(length)
        .map_err(|_| Damaged("a file's length"))?;
    Ok(data)
}

/// Whether directories form trees: each has one name at most, none is in itself, and no root has one.
pub(in crate::linux) fn check_trees(
    inodes: &[SavedInode],
    roots: &[InodeIx],
) -> Result<(), Damaged> {
    let mut parent: Vec<Option<usize>> = vec![None; inodes.len()];
    for (n, inode) in inodes.iter().enumerate() {
        let SavedBody::Directory(entries) = &inode.body else {
            continue;
        };
        for (_, InodeIx(entry)) in entries {
            let at = usize::try_from(*entry).unwrap_or(usize::MAX);
            let child = inodes.get(at).ok_or(Damaged("no such inode"))?;
            if child.is_directory() {
                let before = parent[at].replace(n);
                require(before.is_none(), "a directory with two names")?;
            }
        }
    }
    for InodeIx(root) in roots {
        let above = usize::try_from(*root).ok().and_then(|n| parent.get(n));
        require(above == Some(&None), "a tree's root in a directory")?;
    }
    // Upwards from each, marking what is known to end.
    let mut ends = vec![false; inodes.len()];
    for start in 0..inodes.len() {
        let mut way = Vec::new();
        let mut at = Some(start);
        while let Some(here) = at.filter(|&here| !ends[here]) {
            require(way.len() <= inodes.len(), "a directory in itself")?;
            way.push(here);
            at = parent[here];
        }
        way.into_iter().for_each(|n| ends[n] = true);
    }
    Ok(())
}

/// A regular file in memory, open.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SavedMemFile {
    inode: InodeIx,
    at: Option<Location>,
    path: Vec<u8>,
    append: bool,
}

impl SavedMemFile {
    /// A file without a name whose guest path was `path`.
    pub(in crate::linux) fn nameless(inode: InodeIx, path: &[u8], append: bool) -> Self {
        Self {
            inode,
            at: None,
            path: [path, b" (deleted)"].concat(),
            append,
        }
    }

    pub(super) fn of(file: &MemFile, s: &mut Saver<'_>) -> Self {
        Self {
            inode: s.inode(&file.content.inode),
            at: file.at.clone(),
            path: file.content.path.clone(),
            append: file.append.load(Ordering::Relaxed),
        }
    }

    pub(in crate::linux) fn load(self, l: &Loader<'_>) -> Result<Arc<dyn File>, RestoreError> {
        if let Some(at) = &self.at {
            l.place(at)?;
        }
        let content = load_content(l.inode(self.inode)?, self.path)?;
        Ok(Arc::new(MemFile {
            content: Arc::new(content),
            at: self.at,
            append: AtomicBool::new(self.append),
        }))
    }
}

fn load_content(inode: &Arc<Inode>, path: Vec<u8>) -> Result<MemContent, Damaged> {
    require(matches!(inode.body, Body::File(_)), "a file's inode")?;
    Ok(MemContent {
        inode: Arc::clone(inode),
        path,
    })
}

/// A file in memory with the attributes of `stat` and the bytes that `content` holds, for a file of the host that
/// has no name any more.
///
/// # Errors
/// The host's; `ENOSPC` when it does not fit the limit on files in memory.
pub(in crate::linux) fn copy_of(
    k: &Kernel,
    stat: &Stat,
    content: &OwnedFd,
) -> Result<Arc<Inode>, Errno> {
    let budget = k.vfs.budget();
    let maker = Maker::new(ANONYMOUS_DEV, Arc::clone(budget));
    let data = Data::new(&k.memory, budget, Seals::SEAL)?;
    let mut page = vec![0; PAGE_BYTES];
    let mut at = 0;
    // Holes are left out: a file of any length has no more pages than the host keeps.
    while let Some(start) = data_from(content, at)?.filter(|&start| start < stat.size) {
        at = start - start % PAGE_BYTES as u64;
        let n = rustix::io::pread(content, &mut page[..], at)?;
        if n == 0 {
            break;
        }
        if data.write(Some(at), &page[..n])? < n {
            return Err(Errno::NOSPC);
        }
        at += n as u64;
    }
    data.truncate(stat.size)?;
    let meta = Meta::of(stat);
    maker.make_again(Body::File(data), 2, meta)
}

/// Where the host keeps bytes of a file, from an offset on; `None` at its end.
fn data_from(file: &OwnedFd, at: u64) -> Result<Option<u64>, Errno> {
    match rustix::fs::seek(file, rustix::fs::SeekFrom::Data(at)) {
        Ok(start) => Ok(Some(start)),
        Err(Errno::NXIO) => Ok(None),
        Err(errno) => Err(errno),
    }
}

/// The inode and the path of a mapped file in memory.
pub(in crate::linux) fn saved_content(
    content: &Arc<dyn std::any::Any + Send + Sync>,
    s: &mut Saver<'_>,
) -> Option<(InodeIx, Vec<u8>)> {
    let content = content.downcast_ref::<MemContent>()?;
    Some((s.inode(&content.inode), content.path.clone()))
}

/// A mapped file in memory.
pub(in crate::linux) fn load_backing(inode: &Arc<Inode>, path: &[u8]) -> Result<Backing, Damaged> {
    Ok(Backing(Arc::new(load_content(inode, path.to_vec())?)))
}

/// An open FIFO.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SavedFifo {
    inode: InodeIx,
    pipe: PipeIx,
    at: Location,
    path: Vec<u8>,
    reads: bool,
    writes: bool,
    alone_since: Option<u64>,
}

impl SavedFifo {
    pub(super) fn of(fifo: &FifoFile, s: &mut Saver<'_>) -> Option<Self> {
        let pipe: &Arc<Pipe> = File::pipe(fifo)?;
        Some(Self {
            inode: s.inode(&fifo.inode),
            pipe: s.pipe(pipe),
            at: fifo.at.clone(),
            path: fifo.path.clone(),
            reads: fifo.input.is_some(),
            writes: fifo.output.is_some(),
            alone_since: fifo.alone_since,
        })
    }

    pub(in crate::linux) fn load(self, l: &Loader<'_>) -> Result<Arc<dyn File>, RestoreError> {
        l.place(&self.at)?;
        let (inode, pipe) = (l.inode(self.inode)?, l.pipe(self.pipe)?);
        require(matches!(inode.body, Body::Fifo(_)), "a FIFO's inode")?;
        require(self.reads || self.writes, "a FIFO open for nothing")?;
        Ok(Arc::new(FifoFile {
            inode: Arc::clone(inode),
            at: self.at,
            path: self.path,
            input: self.reads.then(|| pipe.reader()),
            output: self.writes.then(|| pipe.writer()),
            alone_since: self.alone_since,
        }))
    }
}

impl Vfs {
    /// The mount with a device number, if it is a tree in memory.
    fn mount_of(&self, dev: u64) -> Option<usize> {
        self.mounts.iter().position(|mount| mount.dev == dev)
    }

    /// The tree in memory that is mounted with a number.
    pub(in crate::linux) fn memory_mount(&self, mount: usize) -> Option<&MemFs> {
        let mount = self.mounts.get(mount).filter(|mount| !mount.read_only)?;
        mount.fs.as_any().downcast_ref()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn directory(entries: &[u32]) -> SavedInode {
        let entry = |&n: &u32| (n.to_string().into_bytes(), InodeIx(n));
        SavedInode {
            mount: Some(0),
            ino: 2,
            meta: Meta::default(),
            body: SavedBody::Directory(entries.iter().map(entry).collect()),
        }
    }

    #[test]
    fn directories_that_are_no_tree_are_damage() {
        let root = [InodeIx(0)];
        let good = [
            directory(&[1, 2]),
            directory(&[]),
            directory(&[3]),
            directory(&[]),
        ];
        assert_eq!(check_trees(&good, &root), Ok(()));
        let cases = [
            vec![directory(&[0])],
            vec![directory(&[1]), directory(&[0])],
            vec![directory(&[]), directory(&[2]), directory(&[1])],
            vec![
                directory(&[1, 2]),
                directory(&[3]),
                directory(&[3]),
                directory(&[]),
            ],
            vec![directory(&[7])],
            vec![],
        ];
        for case in cases {
            assert!(check_trees(&case, &root).is_err(), "{case:?}");
        }
    }
}
