//! Opening: open(2), openat2(2), and executing.

use std::sync::Arc;

use rustix::io::Errno;

use super::walk::{Resolve, Walk};
use super::{
    Caller, DirFile, Follow, Found, PathFile, S_IFDIR, S_IFLNK, S_IFMT, S_IFREG, Vfs, split,
};
use crate::linux::file::{Description, File, Location, O_PATH, Stat};
use crate::linux::kernel::Kernel;

pub(super) const O_CREAT: u32 = 0o100;
const O_EXCL: u32 = 0o200;
const O_NOCTTY: u32 = 0o400;
pub(super) const O_TRUNC: u32 = 0o1000;
const O_LARGEFILE: u32 = 0o100_000;
pub(super) const O_DIRECTORY: u32 = 0o200_000;
pub(super) const O_NOFOLLOW: u32 = 0o400_000;
/// `O_CLOEXEC`.
pub(super) const O_CLOEXEC: u32 = 0o2_000_000;
const TMPFILE: u32 = 0o20_000_000;
/// How often a file that appears and goes meanwhile is tried again.
const RACES: usize = 16;

/// What openat2(2) is asked.
#[derive(Clone, Copy, Debug)]
pub struct OpenHow {
    /// `O_*`.
    pub flags: u32,
    /// Permission bits of a new file, the umask already taken off.
    pub mode: u32,
    /// Restrictions of the walk.
    pub resolve: Resolve,
}

impl OpenHow {
    /// As open(2).
    #[must_use]
    pub fn new(flags: u32, mode: u32) -> Self {
        Self {
            flags,
            mode,
            resolve: Resolve::empty(),
        }
    }

    fn has(&self, flag: u32) -> bool {
        self.flags & flag != 0
    }

    fn writes(&self) -> bool {
        matches!(self.flags & 3, 1 | 2)
    }

    /// The permissions (`rwx` as 4, 2, 1) it needs.
    fn wants(&self) -> u32 {
        let access = match self.flags & 3 {
            0 => 4,
            1 => 2,
            _ => 6,
        };
        if self.has(O_TRUNC) {
            access | 2
        } else {
            access
        }
    }

    fn walk(&self) -> Walk {
        let name_only = self.has(O_CREAT) && self.has(O_EXCL);
        let follow = match (name_only, self.has(O_NOFOLLOW)) {
            (true, _) => Follow::Name,
            (false, true) => Follow::Not,
            (false, false) => Follow::Last,
        };
        Walk {
            follow,
            resolve: self.resolve,
        }
    }

    /// Flags a description keeps (fcntl(2) `F_GETFL`).
    fn status(&self) -> u32 {
        let kept = !(O_CREAT | O_EXCL | O_NOCTTY | O_TRUNC | O_CLOEXEC);
        (self.flags & kept) | if self.has(O_PATH) { 0 } else { O_LARGEFILE }
    }
}

impl Vfs {
    /// Opens `path`.
    ///
    /// # Errors
    /// As open(2).
    pub fn open(
        &self,
        c: &Caller<'_>,
        base: &Location,
        path: &[u8],
        how: &OpenHow,
    ) -> Result<Arc<Description>, Errno> {
        let mut how = *how;
        if how.has(O_PATH) {
            how.flags &= O_PATH | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC;
        }
        if how.flags & TMPFILE != 0 {
            return Err(Errno::OPNOTSUPP);
        }
        if how.flags & 3 == 3 || (how.has(O_CREAT) && how.has(O_DIRECTORY)) {
            return Err(Errno::INVAL);
        }
        for _ in 0..RACES {
            let found = self.walk(c, base, path, how.walk())?;
            match self.open_found(c, found, &how) {
                Err(Errno::EXIST) if !how.has(O_EXCL) => {}
                Err(Errno::NOENT) if how.has(O_CREAT) && !how.has(O_EXCL) => {}
                result => return result,
            }
        }
        Err(Errno::NOENT)
    }

    /// Opens `path` with the flags of open(2) for the VMM itself, on nobody's behalf.
    ///
    /// # Errors
    /// As open(2).
    pub fn open_location(
        &self,
        k: &Kernel,
        cwd: &Location,
        path: &[u8],
        flags: u32,
    ) -> Result<Arc<dyn File>, Errno> {
        let how = OpenHow::new(flags, 0);
        Ok(Arc::clone(
            &self.open(&Caller::machine(k), cwd, path, &how)?.file,
        ))
    }

    /// Opens a program: a regular file that the caller may execute.
    ///
    /// # Errors
    /// `EACCES` if it is not, and as open(2).
    pub fn open_exec(
        &self,
        c: &Caller<'_>,
        base: &Location,
        path: &[u8],
        follow: Follow,
    ) -> Result<(Arc<dyn File>, Location, Stat), Errno> {
        let found = self.walk(c, base, path, follow)?;
        let stat = *found.existing()?;
        match stat.mode & S_IFMT {
            S_IFREG => {}
            S_IFLNK => return Err(Errno::LOOP),
            _ => return Err(Errno::ACCESS),
        }
        // Not left to the host: its reading is not the same right as executing.
        if !c.permitted(&stat, 1) {
            return Err(Errno::ACCESS);
        }
        let file = match &found.description {
            Some(description) => Arc::clone(
                &self
                    .reopen(c, description, &stat, &OpenHow::new(0, 0))?
                    .file,
            ),
            None => self.mount(&found.at)?.fs.open(c, &found.at.path, 0)?,
        };
        let at = file.location().unwrap_or(found.at);
        Ok((file, at, stat))
    }

    fn open_found(
        &self,
        c: &Caller<'_>,
        found: Found,
        how: &OpenHow,
    ) -> Result<Arc<Description>, Errno> {
        let Some(stat) = found.stat else {
            return self.create(c, &found, how);
        };
        if how.has(O_CREAT) && how.has(O_EXCL) {
            return Err(Errno::EXIST);
        }
        let kind = stat.mode & S_IFMT;
        if how.has(O_DIRECTORY) && kind != S_IFDIR {
            return Err(Errno::NOTDIR);
        }
        if let Some(description) = &found.description {
            return self.reopen(c, description, &stat, how);
        }
        if how.has(O_PATH) {
            let file: Arc<dyn File> = Arc::new(PathFile::new(found.at, stat.mode));
            return Ok(Description::new(file, how.status()));
        }
        match kind {
            S_IFLNK => Err(Errno::LOOP),
            S_IFDIR => self.open_directory(c, found.at, &stat, how),
            _ => self.open_file(c, &found.at, &stat, how),
        }
    }

    fn open_directory(
        &self,
        c: &Caller<'_>,
        at: Location,
        stat: &Stat,
        how: &OpenHow,
    ) -> Result<Arc<Description>, Errno> {
        if how.has(O_CREAT) || how.writes() || how.has(O_TRUNC) {
            return Err(Errno::ISDIR);
        }
        self.check(c, &at, stat, 4)?;
        match self.mount(&at)?.fs.open_dir(c, &at.path) {
            Err(Errno::NOENT | Errno::NOTDIR) if self.leads_to_mount(&at) => {}
            result => result?,
        }
        Ok(Description::new(Arc::new(DirFile::new(at)), how.status()))
    }

    fn open_file(
        &self,
        c: &Caller<'_>,
        at: &Location,
        stat: &Stat,
        how: &OpenHow,
    ) -> Result<Arc<Description>, Errno> {
        self.check(c, at, stat, how.wants())?;
        let mount = self.mount(at)?;
        let regular = stat.mode & S_IFMT == S_IFREG;
        if regular && mount.read_only && how.wants() & 2 != 0 {
            return Err(Errno::ROFS);
        }
        let file = mount.fs.open(c, &at.path, how.flags)?;
        if regular && how.has(O_TRUNC) {
            file.truncate(c.k, 0)?;
        }
        Ok(Description::new(file, how.status()))
    }

    fn create(
        &self,
        c: &Caller<'_>,
        found: &Found,
        how: &OpenHow,
    ) -> Result<Arc<Description>, Errno> {
        if !how.has(O_CREAT) {
            return Err(Errno::NOENT);
        }
        if found.slash {
            return Err(Errno::ISDIR);
        }
        self.may_change_names(c, &found.at)?;
        let file =
            self.mount(&found.at)?
                .fs
                .create(c, &found.at.path, how.flags, how.mode & 0o7777)?;
        Ok(Description::new(file, how.status()))
    }

    /// Whether the caller may add or take away the name at a place.
    pub(super) fn may_change_names(&self, c: &Caller<'_>, at: &Location) -> Result<(), Errno> {
        if self.mount(at)?.read_only {
            return Err(Errno::ROFS);
        }
        let path = self.clean_path(at);
        let dir = self.locate(split(&path).0);
        let stat = self.look(c, &dir)?;
        self.check(c, &dir, &stat, 3)
    }

    /// Opens what a description is of once more: by its place if it is still there, else the same
    /// file, for no more than it was opened for.
    fn reopen(
        &self,
        c: &Caller<'_>,
        old: &Arc<Description>,
        stat: &Stat,
        how: &OpenHow,
    ) -> Result<Arc<Description>, Errno> {
        if let Some(at) = old.file.location()
            && let Ok(there) = self.look(c, &at)
            && (there.dev, there.ino) == (stat.dev, stat.ino)
        {
            let found = Found {
                at,
                stat: Some(there),
                description: None,
                slash: false,
            };
            return self.open_found(c, found, how);
        }
        let wants = how.wants();
        if how.has(O_PATH)
            || (wants & 4 != 0 && !old.readable())
            || (wants & 2 != 0 && !old.writable())
        {
            return Err(Errno::ACCESS);
        }
        if how.has(O_TRUNC) && stat.mode & S_IFMT == S_IFREG {
            old.file.truncate(c.k, 0)?;
        }
        Ok(Description::new(Arc::clone(&old.file), how.status()))
    }
}
