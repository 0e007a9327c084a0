//! File systems that are made up: `/proc`, `/sys` and `/dev` say what is at a path, and this turns
//! it into a [`FileSystem`].
//!
//! A file's content is made when it is read from its start, and kept for the reads that go on.

use std::fmt::Debug;
use std::sync::Arc;

use rustix::io::Errno;

use super::saved::SavedMade;
use super::{Caller, FileSystem, FsStat, Home, Link, S_IFDIR, S_IFREG, below, path_ino};
use crate::linux::file::{DirEntry, File, Location, Stat};
use crate::linux::kernel::Kernel;
use crate::linux::process::Pid;
use crate::linux::saved::{Refused, SavedFile, Saver};
use crate::linux::thread::Tid;
use crate::locks::{Mutex, rank};

/// What is at a path.
#[derive(Clone, Copy, Debug)]
pub(super) struct Node {
    /// Type and permission bits.
    pub(super) mode: u32,
    /// User and group.
    pub(super) owner: (u32, u32),
    /// A device's number.
    pub(super) rdev: u64,
}

impl Node {
    /// Something of user 0.
    pub(super) fn new(mode: u32) -> Self {
        Self {
            mode,
            owner: (0, 0),
            rdev: 0,
        }
    }
}

/// A made-up tree. Paths are text: nothing in these trees has another name.
pub(super) trait Synth: Debug + Send + Sync + 'static {
    /// What is at `path`.
    fn node(&self, c: &Caller<'_>, path: &str) -> Result<Node, Errno>;

    /// A directory's entries: name and `DT_*`.
    fn children(&self, c: &Caller<'_>, path: &str) -> Result<Vec<(String, u8)>, Errno>;

    /// Where a link leads.
    fn link(&self, c: &Caller<'_>, path: &str) -> Result<Link, Errno>;

    /// A file's content.
    fn content(&self, c: &Caller<'_>, path: &str) -> Result<Vec<u8>, Errno>;

    /// Takes what is written to a file.
    fn store(&self, c: &Caller<'_>, path: &str, bytes: &[u8]) -> Result<(), Errno> {
        let _ = (c, path, bytes);
        Err(Errno::ACCESS)
    }

    /// A device.
    fn device(&self, c: &Caller<'_>, path: &str, at: Location) -> Result<Arc<dyn File>, Errno> {
        let _ = (c, path, at);
        Err(Errno::NXIO)
    }

    /// Name and `statfs` number of the type.
    fn kind(&self) -> (&'static str, u64);
}

/// A made-up tree as a file system.
#[derive(Debug)]
pub(super) struct SynthFs<T> {
    home: Home,
    synth: Arc<T>,
}

impl<T: Synth> SynthFs<T> {
    /// The tree at `home`.
    pub(super) fn new(home: Home, synth: T) -> Self {
        Self {
            home,
            synth: Arc::new(synth),
        }
    }

    fn stat_of(&self, c: &Caller<'_>, path: &str, node: &Node) -> Stat {
        let now = c.k.clock.realtime();
        let time = ((now / 1_000_000_000) as i64, (now % 1_000_000_000) as u32);
        Stat {
            dev: self.home.dev,
            ino: path_ino(path.as_bytes()),
            nlink: if node.mode & super::S_IFMT == S_IFDIR {
                2
            } else {
                1
            },
            mode: node.mode,
            uid: node.owner.0,
            gid: node.owner.1,
            rdev: node.rdev,
            blksize: 1024,
            atime: time,
            mtime: time,
            ctime: time,
            ..Stat::default()
        }
    }
}

fn text(path: &[u8]) -> Result<&str, Errno> {
    std::str::from_utf8(path).map_err(|_| Errno::NOENT)
}

impl<T: Synth> FileSystem for SynthFs<T> {
    fn look(&self, c: &Caller<'_>, path: &[u8]) -> Result<Stat, Errno> {
        let path = text(path)?;
        let node = self.synth.node(c, path)?;
        Ok(self.stat_of(c, path, &node))
    }

    fn read_link(&self, c: &Caller<'_>, path: &[u8]) -> Result<Link, Errno> {
        self.synth.link(c, text(path)?)
    }

    fn list(&self, c: &Caller<'_>, path: &[u8]) -> Result<Vec<DirEntry>, Errno> {
        let path = text(path)?;
        let entry = |(name, kind): (String, u8)| {
            let full = if path.is_empty() {
                name.clone()
            } else {
                format!("{path}/{name}")
            };
            DirEntry {
                ino: path_ino(full.as_bytes()),
                kind,
                name: name.into_bytes(),
            }
        };
        Ok(self
            .synth
            .children(c, path)?
            .into_iter()
            .map(entry)
            .collect())
    }

    fn open(&self, c: &Caller<'_>, path: &[u8], _: u32) -> Result<Arc<dyn File>, Errno> {
        let (at, guest) = (self.home.location(path), self.home.guest_path(path));
        let path = text(path)?;
        let node = self.synth.node(c, path)?;
        if node.mode & super::S_IFMT != S_IFREG {
            return self.synth.device(c, path, at);
        }
        Ok(Arc::new(SynthFile {
            synth: Arc::clone(&self.synth),
            stat: self.stat_of(c, path, &node),
            path: path.to_owned(),
            guest,
            at,
            who: (c.pid, c.tid),
            content: Mutex::new(None),
        }))
    }

    fn open_again(&self, saved: &SavedMade) -> Result<Arc<dyn File>, Errno> {
        Ok(Arc::new(SynthFile {
            synth: Arc::clone(&self.synth),
            stat: saved.stat,
            path: text(&saved.at.path)?.to_owned(),
            guest: self.home.guest_path(&saved.at.path),
            at: saved.at.clone(),
            who: saved.who,
            content: Mutex::new(saved.content.clone()),
        }))
    }

    fn statfs(&self, _: &[u8]) -> Result<FsStat, Errno> {
        Ok(FsStat {
            kind: self.synth.kind().1,
            block_size: 4096,
            ..FsStat::default()
        })
    }

    fn as_any(&self) -> &dyn std::any::Any {
        self
    }

    fn kind(&self) -> &'static str {
        self.synth.kind().0
    }
}

/// An open file of a made-up tree.
#[derive(Debug)]
struct SynthFile<T> {
    synth: Arc<T>,
    path: String,
    guest: Vec<u8>,
    at: Location,
    stat: Stat,
    who: (Pid, Tid),
    content: Mutex<rank::SynthContent, Option<Vec<u8>>>,
}

impl<T: Synth> SynthFile<T> {
    fn caller<'k>(&self, k: &'k Kernel) -> Caller<'k> {
        Caller {
            pid: self.who.0,
            tid: self.who.1,
            ..Caller::machine(k)
        }
    }
}

impl<T: Synth> File for SynthFile<T> {
    fn read(&self, k: &Kernel, offset: u64, buf: &mut [u8]) -> Result<usize, Errno> {
        let fresh = match (offset, &*self.content.lock()) {
            (0, _) | (_, None) => true,
            (_, Some(_)) => false,
        };
        if fresh {
            let content = self.synth.content(&self.caller(k), &self.path)?;
            *self.content.lock() = Some(content);
        }
        let content = self.content.lock();
        let all = content.as_deref().unwrap_or_default();
        let rest = usize::try_from(offset)
            .ok()
            .and_then(|at| all.get(at..))
            .unwrap_or_default();
        let n = rest.len().min(buf.len());
        buf[..n].copy_from_slice(&rest[..n]);
        Ok(n)
    }

    fn write(&self, k: &Kernel, _: u64, buf: &[u8]) -> Result<usize, Errno> {
        let bytes = &buf[..buf.len().min(4096)];
        self.synth.store(&self.caller(k), &self.path, bytes)?;
        Ok(buf.len())
    }

    fn seekable(&self) -> bool {
        true
    }

    fn stat(&self, _: &Kernel) -> Result<Stat, Errno> {
        Ok(self.stat)
    }

    fn truncate(&self, _: &Kernel, _: u64) -> Result<(), Errno> {
        Ok(())
    }

    fn location(&self) -> Option<Location> {
        Some(self.at.clone())
    }

    fn name(&self, _: &Kernel) -> Vec<u8> {
        self.guest.clone()
    }

    fn saved(&self, _: &mut Saver<'_>) -> Result<SavedFile, Refused> {
        Ok(SavedFile::Made(SavedMade {
            at: self.at.clone(),
            stat: self.stat,
            who: self.who,
            content: self.content.lock().clone(),
        }))
    }

    fn as_any(&self) -> &dyn std::any::Any {
        self
    }
}

/// A file with a fixed path in a made-up tree.
#[derive(Clone, Copy)]
pub(super) struct Row {
    /// Its path.
    pub(super) path: &'static str,
    /// Its permission bits.
    pub(super) mode: u32,
    /// Its content.
    pub(super) content: fn(&Caller<'_>) -> String,
}

/// What a table of rows has at `path`.
pub(super) fn row_node(rows: &[Row], path: &str) -> Result<Node, Errno> {
    if let Some(row) = rows.iter().find(|row| row.path == path) {
        return Ok(Node::new(S_IFREG | row.mode));
    }
    let directory = rows
        .iter()
        .any(|row| below(row.path.as_bytes(), path.as_bytes()).is_some());
    if directory {
        Ok(Node::new(S_IFDIR | 0o555))
    } else {
        Err(Errno::NOENT)
    }
}

/// A table's entries in the directory `path`.
pub(super) fn row_children(rows: &[Row], path: &str) -> Vec<(String, u8)> {
    let mut out: Vec<(String, u8)> = Vec::new();
    for row in rows {
        let Some(rest) = below(row.path.as_bytes(), path.as_bytes()) else {
            continue;
        };
        let rest = String::from_utf8_lossy(rest);
        let (name, kind) = match rest.split_once('/') {
            Some((name, _)) => (name, 4),
            None => (&*rest, 8),
        };
        if !name.is_empty() && !out.iter().any(|(seen, _)| seen == name) {
            out.push((name.to_owned(), kind));
        }
    }
    out
}

/// A row's content.
pub(super) fn row_content(rows: &[Row], c: &Caller<'_>, path: &str) -> Result<Vec<u8>, Errno> {
    let row = rows
        .iter()
        .find(|row| row.path == path)
        .ok_or(Errno::NOENT)?;
    Ok((row.content)(c).into_bytes())
}
