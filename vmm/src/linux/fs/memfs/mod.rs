//! A file system in memory: `--tmpfs`, `/tmp`, `/dev/shm`, `memfd_create(2)`, and the read-only view of a
//! program and its libraries that is the root when no other was named.
//!
//! The pages of files are the guest's memory ([`crate::memory::Stored`]): charged, paged out, and limited by
//! the file system's size. Names and inodes are the VMM's memory. All counts against a [`Budget`].
//!
//! # Locks
//! `tree` serialises changes of names; a directory's entries are locked for a moment each, never
//! two at once.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::io::Errno;

use super::budget::Budget;
use super::host::HostFile;
use super::{Caller, FileSystem, FsStat, Home, Link, NAME_MAX, Node, entry_kind, split};
use crate::linux::file::{Change, DirEntry, File, Stat};
use crate::locks::{Mutex, rank};
use data::Data;
use fifo::Fifo;
use file::MemFile;
pub(in crate::linux) use inode::Inode;
use inode::{Body, Maker};
pub use seals::Seals;

mod data;
mod fifo;
mod file;
mod inode;
pub(in crate::linux) mod saved;
mod seals;

const RENAME_NOREPLACE: u32 = 1;
const RENAME_EXCHANGE: u32 = 2;
/// Longest path from the root of such a file system.
const DEPTH_MAX: usize = 4096;

/// An in-memory tree.
#[derive(Debug)]
pub(in crate::linux) struct MemFs {
    home: Home,
    root: Arc<Inode>,
    maker: Maker,
    tree: Mutex<rank::MemTree, ()>,
}

/// A file in memory without a name in the tree (memfd_create(2)).
pub(super) fn anonymous(
    c: &Caller<'_>,
    budget: &Arc<Budget>,
    name: &[u8],
    seals: Seals,
) -> Result<Arc<dyn File>, Errno> {
    let maker = Maker::new(super::mount::ANONYMOUS_DEV, Arc::clone(budget));
    let body = Body::File(Data::new(&c.k.memory, budget, seals)?);
    let mode = if seals.contains(Seals::EXEC) {
        0o666
    } else {
        0o777
    };
    let inode = maker.make(body, mode, (c.uid(), c.gid()))?;
    let mut path = b"/memfd:".to_vec();
    path.extend_from_slice(name);
    path.extend_from_slice(b" (deleted)");
    Ok(Arc::new(MemFile::new(inode, None, path, 0)))
}

impl MemFs {
    /// An empty tree whose root has permission bits `mode`.
    pub(super) fn new(
        home: Home,
        budget: Arc<Budget>,
        mode: u32,
        owner: (u32, u32),
    ) -> Result<Self, Errno> {
        let maker = Maker::new(home.dev, budget);
        let root = maker.make(Body::Dir(Mutex::default()), mode, owner)?;
        Ok(Self {
            home,
            root,
            maker,
            tree: Mutex::new(()),
        })
    }

    /// The bytes of a new file.
    fn data(&self, c: &Caller<'_>) -> Result<Data, Errno> {
        Data::new(&c.k.memory, &self.maker.budget, Seals::SEAL)
    }

    /// Takes all names away.
    pub(super) fn clear(&self) {
        let Ok(entries) = self.root.entries() else {
            return;
        };
        let gone = std::mem::take(&mut *entries.lock());
        // Without the lock: what goes gives back what it took.
        drop(gone);
    }

    /// What makes its inodes.
    fn maker(&self) -> &Maker {
        &self.maker
    }

    /// Adds a host file at `path`, with the directories to it. For building a tree.
    pub(super) fn add_host(&self, path: &[u8], fd: OwnedFd) -> Result<(), Errno> {
        self.add(path, Body::Host(Arc::new(fd)))
    }

    /// Adds a symbolic link at `path`, with the directories to it. For building a tree.
    pub(super) fn add_link(&self, path: &[u8], target: &[u8]) -> Result<(), Errno> {
        self.add(path, Body::Link(target.to_vec()))
    }

    fn add(&self, path: &[u8], body: Body) -> Result<(), Errno> {
        let (dir, _) = split(path);
        for (end, _) in dir
            .iter()
            .enumerate()
            .filter(|&(_, &b)| b == b'/')
            .chain([(dir.len(), &b'/')])
        {
            let part = &dir[..end];
            if !part.is_empty() && self.find(part).is_err() {
                self.insert(part, Body::Dir(Mutex::default()), 0o755, (0, 0))?;
            }
        }
        self.insert(path, body, 0o777, (0, 0)).map(drop)
    }

    fn find(&self, path: &[u8]) -> Result<Arc<Inode>, Errno> {
        let mut at = Arc::clone(&self.root);
        for name in path.split(|&b| b == b'/').filter(|name| !name.is_empty()) {
            let next = at.entries()?.lock().get(name).map(|e| Arc::clone(&e.inode));
            at = next.ok_or(Errno::NOENT)?;
        }
        Ok(at)
    }

    /// The parent directory and the name.
    fn place<'p>(&self, path: &'p [u8]) -> Result<(Arc<Inode>, &'p [u8]), Errno> {
        if path.is_empty() {
            return Err(Errno::BUSY);
        }
        let (dir, name) = split(path);
        if name.len() > NAME_MAX || path.len() > DEPTH_MAX {
            return Err(Errno::NAMETOOLONG);
        }
        let dir = self.find(dir)?;
        dir.entries()?;
        Ok((dir, name))
    }

    /// Puts a new inode at `path`.
    fn insert(
        &self,
        path: &[u8],
        body: Body,
        mode: u32,
        owner: (u32, u32),
    ) -> Result<Arc<Inode>, Errno> {
        let _tree = self.tree.lock();
        let (dir, name) = self.place(path)?;
        // A directory without a name takes no new entries.
        if dir.stat().nlink == 0 {
            return Err(Errno::NOENT);
        }
        let inode = self.maker.make(body, mode, owner)?;
        let entry = self.maker.entry(name, Arc::clone(&inode))?;
        let mut entries = dir.entries()?.lock();
        if entries.contains_key(name) {
            return Err(Errno::EXIST);
        }
        entries.insert(name.to_vec(), entry);
        drop(entries);
        dir.count_links(i64::from(inode.is_dir()));
        dir.modified();
        Ok(inode)
    }

    fn open_inode(
        &self,
        c: &Caller<'_>,
        inode: Arc<Inode>,
        path: &[u8],
        flags: u32,
    ) -> Result<Arc<dyn File>, Errno> {
        let (at, guest) = (self.home.location(path), self.home.guest_path(path));
        match &inode.body {
            Body::Host(fd) => Ok(Arc::new(HostFile::new(Arc::clone(fd), at, guest)?)),
            Body::File(_) => Ok(Arc::new(MemFile::new(inode, Some(at), guest, flags))),
            Body::Fifo(fifo) => Ok(fifo.open(c.k, &inode, (at, guest), flags)?),
            Body::Socket => Err(Errno::NXIO),
            Body::Dir(_) => Err(Errno::ISDIR),
            Body::Link(_) => Err(Errno::LOOP),
        }
    }

    /// Takes the name away; the tree is locked.
    fn detach(dir: &Inode, name: &[u8]) -> Result<(), Errno> {
        let gone = dir.entries()?.lock().remove(name);
        let inode = gone.ok_or(Errno::NOENT)?.inode;
        if inode.is_dir() {
            dir.count_links(-1);
            inode.count_links(-1);
        }
        inode.count_links(-1);
        dir.modified();
        Ok(())
    }
}

/// Whether `inode` may go to make place, as rename(2) and rmdir(2) say.
fn replaceable(inode: &Inode, by_directory: bool) -> Result<(), Errno> {
    match (inode.is_dir(), by_directory) {
        (false, false) => Ok(()),
        (true, false) => Err(Errno::ISDIR),
        (false, true) => Err(Errno::NOTDIR),
        (true, true) if inode.entries()?.lock().is_empty() => Ok(()),
        (true, true) => Err(Errno::NOTEMPTY),
    }
}

impl FileSystem for MemFs {
    fn look(&self, _: &Caller<'_>, path: &[u8]) -> Result<Stat, Errno> {
        Ok(self.find(path)?.stat())
    }

    fn read_link(&self, _: &Caller<'_>, path: &[u8]) -> Result<Link, Errno> {
        self.find(path)?;
        self.target(path).map(Link::Path).ok_or(Errno::INVAL)
    }

    fn target(&self, path: &[u8]) -> Option<Vec<u8>> {
        match &self.find(path).ok()?.body {
            Body::Link(target) => Some(target.clone()),
            Body::Dir(_) | Body::File(_) | Body::Host(_) | Body::Fifo(_) | Body::Socket => None,
        }
    }

    fn list(&self, _: &Caller<'_>, path: &[u8]) -> Result<Vec<DirEntry>, Errno> {
        let dir = self.find(path)?;
        let entries = dir.entries()?.lock();
        let entry = |(name, e): (&Vec<u8>, &inode::Entry)| DirEntry {
            ino: e.inode.ino,
            kind: entry_kind(e.inode.mode()),
            name: name.clone(),
        };
        Ok(entries.iter().map(entry).collect())
    }

    fn open(&self, c: &Caller<'_>, path: &[u8], flags: u32) -> Result<Arc<dyn File>, Errno> {
        self.open_inode(c, self.find(path)?, path, flags)
    }

    fn create(
        &self,
        c: &Caller<'_>,
        path: &[u8],
        flags: u32,
        mode: u32,
    ) -> Result<Arc<dyn File>, Errno> {
        let body = Body::File(self.data(c)?);
        let inode = self.insert(path, body, mode, (c.uid(), c.gid()))?;
        self.open_inode(c, inode, path, flags)
    }

    fn mknod(&self, c: &Caller<'_>, path: &[u8], node: Node, mode: u32) -> Result<(), Errno> {
        let body = match node {
            Node::Regular => Body::File(self.data(c)?),
            Node::Fifo => Body::Fifo(Fifo::default()),
            Node::Socket => Body::Socket,
        };
        self.insert(path, body, mode, (c.uid(), c.gid())).map(drop)
    }

    fn mkdir(&self, c: &Caller<'_>, path: &[u8], mode: u32) -> Result<(), Errno> {
        self.insert(path, Body::Dir(Mutex::default()), mode, (c.uid(), c.gid()))
            .map(drop)
    }

    fn remove(&self, _: &Caller<'_>, path: &[u8], directory: bool) -> Result<(), Errno> {
        let _tree = self.tree.lock();
        let (dir, name) = self.place(path)?;
        replaceable(&*self.find(path)?, directory)?;
        Self::detach(&dir, name)
    }

    fn symlink(&self, c: &Caller<'_>, path: &[u8], target: &[u8]) -> Result<(), Errno> {
        self.insert(path, Body::Link(target.to_vec()), 0o777, (c.uid(), c.gid()))
            .map(drop)
    }

    fn link(&self, _: &Caller<'_>, from: &[u8], to: &[u8]) -> Result<(), Errno> {
        let _tree = self.tree.lock();
        let inode = self.find(from)?;
        if inode.is_dir() {
            return Err(Errno::PERM);
        }
        let (dir, name) = self.place(to)?;
        if dir.entries()?.lock().contains_key(name) {
            return Err(Errno::EXIST);
        }
        let entry = self.maker.entry(name, Arc::clone(&inode))?;
        dir.entries()?.lock().insert(name.to_vec(), entry);
        inode.count_links(1);
        dir.modified();
        Ok(())
    }

    fn rename(&self, _: &Caller<'_>, from: &[u8], to: &[u8], flags: u32) -> Result<(), Errno> {
        if flags & !(RENAME_NOREPLACE | RENAME_EXCHANGE) != 0 || flags == 3 {
            return Err(Errno::INVAL);
        }
        let _tree = self.tree.lock();
        let moved = self.find(from)?;
        let ((old, old_name), (new, new_name)) = (self.place(from)?, self.place(to)?);
        // Everything that can fail comes before the first change.
        let entry = self.maker.entry(new_name, Arc::clone(&moved))?;
        match self.find(to) {
            Ok(_) if flags & RENAME_NOREPLACE != 0 => return Err(Errno::EXIST),
            Ok(there) if Arc::ptr_eq(&there, &moved) => return Ok(()),
            Ok(there) if flags & RENAME_EXCHANGE != 0 => {
                let other = self.maker.entry(old_name, there)?;
                let shift = i64::from(other.inode.is_dir()) - i64::from(moved.is_dir());
                old.count_links(shift);
                new.count_links(-shift);
                old.entries()?.lock().insert(old_name.to_vec(), other);
                new.entries()?.lock().insert(new_name.to_vec(), entry);
                return Ok(());
            }
            Ok(there) => {
                replaceable(&there, moved.is_dir())?;
                Self::detach(&new, new_name)?;
            }
            Err(_) if flags & RENAME_EXCHANGE != 0 => return Err(Errno::NOENT),
            Err(_) => {}
        }
        old.entries()?.lock().remove(old_name);
        new.entries()?.lock().insert(new_name.to_vec(), entry);
        let directories = i64::from(moved.is_dir());
        old.count_links(-directories);
        new.count_links(directories);
        old.modified();
        new.modified();
        Ok(())
    }

    fn change(&self, _: &Caller<'_>, path: &[u8], change: &Change) -> Result<(), Errno> {
        let inode = self.find(path)?;
        if matches!((change, &inode.body), (Change::Mode(_), Body::Link(_))) {
            return Err(Errno::OPNOTSUPP);
        }
        inode.change(change)
    }

    fn statfs(&self, _: &[u8]) -> Result<FsStat, Errno> {
        let (limit, used) = self.maker.budget.usage();
        let (blocks, free) = (limit / 4096, limit.saturating_sub(used) / 4096);
        Ok(FsStat {
            kind: 0x0102_1994,
            block_size: 4096,
            blocks,
            free,
            available: free,
            files: blocks,
            files_free: free,
        })
    }

    fn as_any(&self) -> &dyn std::any::Any {
        self
    }

    fn kind(&self) -> &'static str {
        "tmpfs"
    }
}
