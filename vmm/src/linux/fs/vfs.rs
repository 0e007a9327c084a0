//! The mount table: from guest paths to file systems.

use std::sync::Arc;

use rustix::io::Errno;

use super::budget::Budget;
use super::memfs::Seals;
use super::mount::{Mount, text};
use super::{Caller, Flocks, FsStat, Link, S_IFDIR, S_IFMT, below, join, path_ino, split};
use crate::linux::file::{DirEntry, File, Location, Stat};

/// Mounts and path walking. The mounts never change.
#[derive(Debug)]
pub struct Vfs {
    pub(super) mounts: Vec<Mount>,
    pub(super) budget: Arc<Budget>,
    pub(super) flocks: Arc<Flocks>,
    pub(super) owner: (u32, u32),
}

impl Vfs {
    /// The root directory.
    #[must_use]
    pub fn root(&self) -> Location {
        Location {
            mount: 0,
            path: Vec::new(),
        }
    }

    /// The guest path of a place, with its leading slash.
    #[must_use]
    pub fn path_of(&self, at: &Location) -> Vec<u8> {
        let mut out = vec![b'/'];
        out.extend_from_slice(&self.clean_path(at));
        out
    }

    /// Empties the trees in memory, for the end of the guest: their files have frames of the machine. What is another
    /// guest's too stays.
    pub fn close(&self) {
        for mount in &self.mounts {
            if Arc::strong_count(&mount.fs) == 1
                && let Some(tree) = mount.fs.as_any().downcast_ref::<super::memfs::MemFs>()
            {
                tree.clear();
            }
        }
    }

    /// The memory its files may take.
    #[must_use]
    pub fn budget(&self) -> &Arc<Budget> {
        &self.budget
    }

    /// The machine's flock(2) locks.
    #[must_use]
    pub fn flocks(&self) -> &Arc<Flocks> {
        &self.flocks
    }

    /// A file in memory without a name in the tree (memfd_create(2)).
    ///
    /// # Errors
    /// `ENOSPC`.
    pub fn memory_file(
        &self,
        c: &Caller<'_>,
        name: &[u8],
        seals: Seals,
    ) -> Result<Arc<dyn File>, Errno> {
        super::memfs::anonymous(c, &self.budget, name, seals)
    }

    /// The guest path of a place, clean.
    pub(super) fn clean_path(&self, at: &Location) -> Vec<u8> {
        self.mounts
            .get(at.mount)
            .map(|mount| join(&mount.at, &at.path))
            .unwrap_or_default()
    }

    /// The place of a clean guest path: the mount with the longest prefix.
    pub(super) fn locate(&self, path: &[u8]) -> Location {
        let fits =
            |(index, mount): (usize, &Mount)| below(path, &mount.at).map(|rest| (index, rest));
        let all = self.mounts.iter().enumerate().filter_map(fits);
        let found = all.min_by_key(|(_, rest)| rest.len());
        let (mount, rest) = found.unwrap_or((0, path));
        Location {
            mount,
            path: rest.to_vec(),
        }
    }

    pub(super) fn mount(&self, at: &Location) -> Result<&Mount, Errno> {
        self.mounts.get(at.mount).ok_or(Errno::NOENT)
    }

    /// Whether a mount point is below this place: then it is a directory that cannot go.
    pub(super) fn leads_to_mount(&self, at: &Location) -> bool {
        let path = self.clean_path(at);
        self.mounts
            .iter()
            .any(|m| m.at.len() > path.len() && below(&m.at, &path).is_some())
    }

    /// What is at a place, not following a symbolic link.
    ///
    /// # Errors
    /// `ENOENT`, `ENOTDIR`, `EACCES`, or the host's.
    pub fn look(&self, c: &Caller<'_>, at: &Location) -> Result<Stat, Errno> {
        let mount = self.mount(at)?;
        let seen = mount.fs.look(c, &at.path);
        let is_directory = seen
            .as_ref()
            .is_ok_and(|stat| stat.mode & S_IFMT == S_IFDIR);
        if !is_directory && self.leads_to_mount(at) {
            return Ok(self.made_up_directory(mount, &at.path));
        }
        seen
    }

    /// A directory on the way to a mount point that the lower file system does not have.
    fn made_up_directory(&self, mount: &Mount, path: &[u8]) -> Stat {
        Stat {
            dev: mount.dev,
            ino: path_ino(path),
            nlink: 2,
            mode: S_IFDIR | 0o755,
            uid: self.owner.0,
            gid: self.owner.1,
            blksize: 4096,
            ..Stat::default()
        }
    }

    /// Where the link at a place leads.
    ///
    /// # Errors
    /// `EINVAL` if it is none.
    pub fn read_link(&self, c: &Caller<'_>, at: &Location) -> Result<Link, Errno> {
        self.mount(at)?.fs.read_link(c, &at.path)
    }

    /// A directory's entries: `.` and `..`, then its own with the mount points among them.
    ///
    /// # Errors
    /// `ENOTDIR`, or the host's.
    pub fn list(&self, c: &Caller<'_>, at: &Location) -> Result<Vec<DirEntry>, Errno> {
        let mut own = match self.mount(at)?.fs.list(c, &at.path) {
            Err(Errno::NOENT | Errno::NOTDIR) if self.leads_to_mount(at) => Vec::new(),
            result => result?,
        };
        let path = self.clean_path(at);
        let below_here = |mount: &Mount| {
            let rest = below(&mount.at, &path)?;
            let name = rest.split(|&b| b == b'/').next()?;
            (!name.is_empty()).then(|| name.to_vec())
        };
        for name in self.mounts.iter().filter_map(below_here) {
            own.retain(|entry| entry.name != name);
            let ino = self
                .look(c, &self.locate(&join(&path, &name)))
                .map_or(1, |stat| stat.ino);
            own.push(DirEntry { ino, kind: 4, name });
        }
        let parent = if path.is_empty() {
            &path[..]
        } else {
            split(&path).0
        };
        let ino_of = |at: &Location| self.look(c, at).map_or(1, |stat| stat.ino);
        let dots = [
            (&b"."[..], ino_of(at)),
            (b"..", ino_of(&self.locate(parent))),
        ];
        let mut out: Vec<_> = dots
            .into_iter()
            .map(|(name, ino)| DirEntry {
                ino,
                kind: 4,
                name: name.to_vec(),
            })
            .collect();
        out.append(&mut own);
        Ok(out)
    }

    /// What statfs(2) tells, and whether the mount is read-only.
    ///
    /// # Errors
    /// The host's.
    pub fn statfs(&self, at: &Location) -> Result<(FsStat, bool), Errno> {
        let mount = self.mount(at)?;
        let stat = match mount.fs.statfs(&at.path) {
            Err(Errno::NOENT | Errno::NOTDIR) if self.leads_to_mount(at) => mount.fs.statfs(b""),
            result => result,
        };
        Ok((stat?, mount.read_only))
    }

    /// Whether the caller may do all of `want` (`rwx` as 4, 2, 1) with what is at a place.
    pub(super) fn check(
        &self,
        c: &Caller<'_>,
        at: &Location,
        stat: &Stat,
        want: u32,
    ) -> Result<(), Errno> {
        let by_host = self.mount(at)?.fs.host_checks() == Some(c.uid());
        if by_host || c.permitted(stat, want) {
            Ok(())
        } else {
            Err(Errno::ACCESS)
        }
    }

    /// The lines of `/proc/mounts`: source, mount point, type, options.
    #[must_use]
    pub fn mount_lines(&self) -> String {
        let line = |m: &Mount| {
            let options = if m.read_only { "ro" } else { "rw" };
            format!(
                "{0} /{1} {0} {options},nosuid,nodev 0 0\n",
                m.fs.kind(),
                text(&m.at).replace(' ', "\\040")
            )
        };
        self.mounts.iter().map(line).collect()
    }
}

impl Vfs {
    /// The lines of `/proc/PID/mountinfo`.
    #[must_use]
    pub fn mountinfo_lines(&self) -> String {
        let line = |(index, m): (usize, &Mount)| {
            let options = if m.read_only { "ro" } else { "rw" };
            let (id, parent) = (index + 21, if index == 0 { 1 } else { 21 });
            let (minor, at, kind) = (
                0xff001 + index,
                text(&m.at).replace(' ', "\\040"),
                m.fs.kind(),
            );
            format!(
                "{id} {parent} 0:{minor} / /{at} {options},nosuid,nodev - {kind} {kind} {options}\n"
            )
        };
        self.mounts.iter().enumerate().map(line).collect()
    }
}
