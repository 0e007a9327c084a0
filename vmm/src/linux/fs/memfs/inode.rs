//! What an in-memory tree is made of.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::data::Data;
use super::fifo::Fifo;
use super::seals::Seals;
use crate::linux::file::{Change, SetTime, Stat};
use crate::linux::fs::budget::{Budget, Charge};
use crate::linux::fs::{S_IFDIR, S_IFIFO, S_IFLNK, S_IFMT, S_IFREG, S_IFSOCK};
use crate::locks::{Mutex, rank};

/// What an inode costs, its record and its bookkeeping.
const INODE_COST: u64 = 1024;

type Time = (i64, u32);

/// An inode.
#[derive(Debug)]
pub(in crate::linux) struct Inode {
    pub(super) ino: u64,
    dev: u64,
    meta: Mutex<rank::MemMeta, Meta>,
    pub(super) body: Body,
    _charge: Charge,
}

/// Attributes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Meta {
    mode: u32,
    uid: u32,
    gid: u32,
    nlink: u64,
    atime: Time,
    mtime: Time,
    ctime: Time,
}

impl Meta {
    /// Those of a regular file that has no name.
    pub(super) fn of(stat: &Stat) -> Self {
        Self {
            mode: stat.mode,
            uid: stat.uid,
            gid: stat.gid,
            nlink: 0,
            atime: stat.atime,
            mtime: stat.mtime,
            ctime: stat.ctime,
        }
    }
}

/// An entry of a directory.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) inode: Arc<Inode>,
    _charge: Charge,
}

pub(super) type Entries = BTreeMap<Vec<u8>, Entry>;

/// What an inode holds.
#[derive(Debug)]
pub(super) enum Body {
    Dir(Mutex<rank::MemEntries, Entries>),
    Link(Vec<u8>),
    File(Data),
    /// A regular file of the host, opened when the tree was built (never written).
    Host(Arc<OwnedFd>),
    Fifo(Fifo),
    /// The name of a socket.
    Socket,
}

impl Body {
    /// The file type bits of its mode.
    fn kind(&self) -> u32 {
        match self {
            Self::Dir(_) => S_IFDIR,
            Self::Link(_) => S_IFLNK,
            Self::File(_) | Self::Host(_) => S_IFREG,
            Self::Fifo(_) => S_IFIFO,
            Self::Socket => S_IFSOCK,
        }
    }
}

/// Makes inodes: their numbers, device and budget.
#[derive(Debug)]
pub(super) struct Maker {
    pub(super) dev: u64,
    pub(super) budget: Arc<Budget>,
    next: AtomicU64,
}

impl Maker {
    pub(super) fn new(dev: u64, budget: Arc<Budget>) -> Self {
        Self {
            dev,
            budget,
            next: AtomicU64::new(2),
        }
    }

    /// An inode with permission bits `mode`, owned by `owner`.
    pub(super) fn make(
        &self,
        body: Body,
        mode: u32,
        owner: (u32, u32),
    ) -> Result<Arc<Inode>, Errno> {
        let now = now();
        let meta = Meta {
            mode: body.kind() | (mode & 0o7777),
            uid: owner.0,
            gid: owner.1,
            nlink: if body.kind() == S_IFDIR { 2 } else { 1 },
            atime: now,
            mtime: now,
            ctime: now,
        };
        let ino = self.next.fetch_add(1, Ordering::Relaxed);
        self.inode(body, ino, meta)
    }

    /// An inode that was there before.
    pub(super) fn make_again(&self, body: Body, ino: u64, meta: Meta) -> Result<Arc<Inode>, Errno> {
        self.next.fetch_max(ino + 1, Ordering::Relaxed);
        let mode = body.kind() | (meta.mode & 0o7777);
        self.inode(body, ino, Meta { mode, ..meta })
    }

    fn inode(&self, body: Body, ino: u64, meta: Meta) -> Result<Arc<Inode>, Errno> {
        let extra = if let Body::Link(target) = &body {
            target.len() as u64
        } else {
            0
        };
        Ok(Arc::new(Inode {
            ino,
            dev: self.dev,
            meta: Mutex::new(meta),
            body,
            _charge: Charge::new(&self.budget, INODE_COST + extra)?,
        }))
    }

    /// An entry called `name`.
    pub(super) fn entry(&self, name: &[u8], inode: Arc<Inode>) -> Result<Entry, Errno> {
        let charge = Charge::new(&self.budget, 128 + name.len() as u64)?;
        Ok(Entry {
            inode,
            _charge: charge,
        })
    }
}

impl Inode {
    pub(super) fn dev(&self) -> u64 {
        self.dev
    }

    pub(super) fn meta(&self) -> Meta {
        *self.meta.lock()
    }

    /// Takes attributes of one that was there before, of the same kind.
    pub(super) fn set_meta(&self, meta: Meta) {
        let mode = self.body.kind() | (meta.mode & 0o7777);
        *self.meta.lock() = Meta { mode, ..meta };
    }

    pub(super) fn mode(&self) -> u32 {
        self.meta.lock().mode
    }

    pub(super) fn is_dir(&self) -> bool {
        matches!(self.body, Body::Dir(_))
    }

    /// A directory's entries.
    pub(super) fn entries(&self) -> Result<&Mutex<rank::MemEntries, Entries>, Errno> {
        match &self.body {
            Body::Dir(entries) => Ok(entries),
            Body::Link(_) | Body::File(_) | Body::Host(_) | Body::Fifo(_) | Body::Socket => {
                Err(Errno::NOTDIR)
            }
        }
    }

    pub(super) fn stat(&self) -> Stat {
        if let Body::Host(fd) = &self.body {
            return self.host_stat(fd);
        }
        let meta = *self.meta.lock();
        let (size, pages) = match &self.body {
            Body::Dir(entries) => (40 + 20 * entries.lock().len() as u64, 0),
            Body::Link(target) => (target.len() as u64, 0),
            Body::File(data) => data.size(),
            Body::Host(_) | Body::Fifo(_) | Body::Socket => (0, 0),
        };
        Stat {
            dev: self.dev,
            ino: self.ino,
            nlink: meta.nlink,
            mode: meta.mode,
            uid: meta.uid,
            gid: meta.gid,
            rdev: 0,
            size,
            blksize: 4096,
            blocks: pages * 8,
            atime: meta.atime,
            mtime: meta.mtime,
            ctime: meta.ctime,
        }
    }

    fn host_stat(&self, fd: &OwnedFd) -> Stat {
        let Ok(host) = rustix::fs::fstat(fd) else {
            return Stat::default();
        };
        Stat {
            dev: self.dev,
            ino: self.ino,
            nlink: 1,
            ..crate::linux::fs::host::guest_stat(&host)
        }
    }

    /// # Errors
    /// `EPERM`: the file is sealed.
    pub(super) fn change(&self, change: &Change) -> Result<(), Errno> {
        let sealed = match &self.body {
            Body::File(data) => data.seals().contains(Seals::EXEC),
            Body::Dir(_) | Body::Link(_) | Body::Host(_) | Body::Fifo(_) | Body::Socket => false,
        };
        let mut meta = self.meta.lock();
        if let Change::Mode(mode) = change
            && sealed
            && (mode ^ meta.mode) & 0o111 != 0
        {
            return Err(Errno::PERM);
        }
        meta.ctime = now();
        match *change {
            Change::Mode(mode) => meta.mode = (meta.mode & S_IFMT) | (mode & 0o7777),
            Change::Owner(uid, gid) => {
                meta.uid = uid.unwrap_or(meta.uid);
                meta.gid = gid.unwrap_or(meta.gid);
                if meta.mode & S_IFMT == S_IFREG {
                    meta.mode &= !0o6000;
                }
            }
            Change::Times(atime, mtime) => {
                let pick = |set: SetTime, old: Time| match set {
                    SetTime::Keep => old,
                    SetTime::Now => now(),
                    SetTime::At(seconds, nanos) => (seconds, nanos),
                };
                meta.atime = pick(atime, meta.atime);
                meta.mtime = pick(mtime, meta.mtime);
            }
        }
        Ok(())
    }

    /// The content changed now.
    pub(super) fn modified(&self) {
        let mut meta = self.meta.lock();
        meta.mtime = now();
        meta.ctime = meta.mtime;
    }

    /// One name more, or one less.
    pub(super) fn count_links(&self, change: i64) {
        let mut meta = self.meta.lock();
        meta.nlink = meta.nlink.saturating_add_signed(change);
        meta.ctime = now();
    }
}

/// A deep tree is taken apart level by level: a guest may not choose how deep our stack gets.
impl Drop for Inode {
    fn drop(&mut self) {
        let Body::Dir(entries) = &mut self.body else {
            return;
        };
        let mut left: Vec<Entry> = std::mem::take(entries.get_mut()).into_values().collect();
        while let Some(entry) = left.pop() {
            let Some(mut inode) = Arc::into_inner(entry.inode) else {
                continue;
            };
            if let Body::Dir(entries) = &mut inode.body {
                left.extend(std::mem::take(entries.get_mut()).into_values());
            }
        }
    }
}

/// `CLOCK_REALTIME`.
fn now() -> Time {
    let t = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
    (t.tv_sec, t.tv_nsec as u32)
}
