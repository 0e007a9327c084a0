//! Changing names and attributes by place.

use rustix::io::Errno;

use super::{Caller, Follow, Found, Node, S_IFDIR, S_IFLNK, S_IFMT, Vfs, below, split};
use crate::linux::file::{Change, Location, SetTime, Stat};

/// What a path's last component is (path_resolution(7)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Last {
    Name,
    Dot,
    DotDot,
    Root,
}

fn last(path: &[u8]) -> Last {
    match path.rsplit(|&b| b == b'/').find(|name| !name.is_empty()) {
        None => Last::Root,
        Some(b".") => Last::Dot,
        Some(b"..") => Last::DotDot,
        Some(_) => Last::Name,
    }
}

fn is_dir(stat: &Stat) -> bool {
    stat.mode & S_IFMT == S_IFDIR
}

impl Vfs {
    fn absent(&self, c: &Caller<'_>, base: &Location, path: &[u8]) -> Result<Found, Errno> {
        let found = self.walk(c, base, path, Follow::Name)?;
        if found.stat.is_some() {
            return Err(Errno::EXIST);
        }
        self.may_change_names(c, &found.at)?;
        Ok(found)
    }

    /// mkdir(2); the umask is already taken off `mode`.
    ///
    /// # Errors
    /// As mkdir(2).
    pub fn mkdir(
        &self,
        c: &Caller<'_>,
        base: &Location,
        path: &[u8],
        mode: u32,
    ) -> Result<(), Errno> {
        let found = self.absent(c, base, path)?;
        self.mount(&found.at)?
            .fs
            .mkdir(c, &found.at.path, mode & 0o1777)
    }

    /// symlink(2).
    ///
    /// # Errors
    /// As symlink(2).
    pub fn symlink(
        &self,
        c: &Caller<'_>,
        base: &Location,
        path: &[u8],
        target: &[u8],
    ) -> Result<(), Errno> {
        if target.is_empty() {
            return Err(Errno::NOENT);
        }
        let found = self.absent(c, base, path)?;
        if found.slash {
            return Err(Errno::NOENT);
        }
        self.mount(&found.at)?.fs.symlink(c, &found.at.path, target)
    }

    /// link(2): gives what is at `from` the name `path` too.
    ///
    /// # Errors
    /// As link(2).
    pub fn link(
        &self,
        c: &Caller<'_>,
        from: &Location,
        base: &Location,
        path: &[u8],
    ) -> Result<(), Errno> {
        let stat = self.look(c, from)?;
        let found = self.absent(c, base, path)?;
        if found.slash {
            return Err(Errno::NOENT);
        }
        if from.mount != found.at.mount {
            return Err(Errno::XDEV);
        }
        if is_dir(&stat) {
            return Err(Errno::PERM);
        }
        self.mount(from)?.fs.link(c, &from.path, &found.at.path)
    }

    /// mknod(2): regular files; FIFOs and sockets in memory.
    ///
    /// # Errors
    /// `EPERM` for these elsewhere; as open(2).
    pub fn mknod(
        &self,
        c: &Caller<'_>,
        base: &Location,
        path: &[u8],
        (node, mode): (Node, u32),
    ) -> Result<(), Errno> {
        let found = self.absent(c, base, path)?;
        if found.slash {
            return Err(Errno::NOENT);
        }
        let (fs, mode) = (&self.mount(&found.at)?.fs, mode & 0o7777);
        match node {
            Node::Regular => fs.create(c, &found.at.path, 2, mode).map(drop),
            Node::Fifo | Node::Socket => fs.mknod(c, &found.at.path, node, mode),
        }
    }

    /// Whether a mount is here or below.
    fn busy(&self, at: &Location) -> bool {
        at.path.is_empty() || self.leads_to_mount(at)
    }

    /// The sticky bit: only the owner of a file or of its directory takes its name away.
    fn may_remove(&self, c: &Caller<'_>, at: &Location, stat: &Stat) -> Result<(), Errno> {
        self.may_change_names(c, at)?;
        let path = self.clean_path(at);
        let dir = self.look(c, &self.locate(split(&path).0))?;
        let owner = c.uid() == 0 || c.uid() == dir.uid || c.uid() == stat.uid;
        if dir.mode & 0o1000 != 0 && !owner {
            Err(Errno::PERM)
        } else {
            Ok(())
        }
    }

    /// unlink(2).
    ///
    /// # Errors
    /// As unlink(2).
    pub fn unlink(&self, c: &Caller<'_>, base: &Location, path: &[u8]) -> Result<(), Errno> {
        if last(path) != Last::Name && !path.is_empty() {
            return Err(Errno::ISDIR);
        }
        let found = self.walk(c, base, path, Follow::Name)?;
        let stat = found.existing()?;
        if is_dir(stat) {
            return Err(Errno::ISDIR);
        }
        if found.slash {
            return Err(Errno::NOTDIR);
        }
        self.may_remove(c, &found.at, stat)?;
        self.mount(&found.at)?.fs.remove(c, &found.at.path, false)
    }

    /// rmdir(2).
    ///
    /// # Errors
    /// As rmdir(2).
    pub fn rmdir(&self, c: &Caller<'_>, base: &Location, path: &[u8]) -> Result<(), Errno> {
        match last(path) {
            Last::Dot => return Err(Errno::INVAL),
            Last::DotDot => return Err(Errno::NOTEMPTY),
            Last::Root if !path.is_empty() => return Err(Errno::BUSY),
            Last::Root | Last::Name => {}
        }
        let found = self.walk(c, base, path, Follow::Name)?;
        let stat = found.existing()?;
        if !is_dir(stat) {
            return Err(Errno::NOTDIR);
        }
        if self.busy(&found.at) {
            return Err(Errno::BUSY);
        }
        self.may_remove(c, &found.at, stat)?;
        self.mount(&found.at)?.fs.remove(c, &found.at.path, true)
    }

    /// renameat2(2). Gives the places it was about, to those who keep paths.
    ///
    /// # Errors
    /// As rename(2).
    pub fn rename(
        &self,
        c: &Caller<'_>,
        from: (&Location, &[u8]),
        to: (&Location, &[u8]),
        flags: u32,
    ) -> Result<(Location, Location), Errno> {
        if [from.1, to.1]
            .iter()
            .any(|path| !path.is_empty() && last(path) != Last::Name)
        {
            return Err(Errno::BUSY);
        }
        let old = self.walk(c, from.0, from.1, Follow::Name)?;
        let new = self.walk(c, to.0, to.1, Follow::Name)?;
        let stat = old.existing()?;
        if old.at.mount != new.at.mount {
            return Err(Errno::XDEV);
        }
        if self.busy(&old.at) || self.busy(&new.at) {
            return Err(Errno::BUSY);
        }
        if !is_dir(stat) && (old.slash || new.slash) {
            return Err(Errno::NOTDIR);
        }
        if old.at != new.at && is_dir(stat) && below(&new.at.path, &old.at.path).is_some() {
            return Err(Errno::INVAL);
        }
        if old.at != new.at && below(&old.at.path, &new.at.path).is_some() {
            return Err(if flags & 2 != 0 {
                Errno::INVAL
            } else {
                Errno::NOTEMPTY
            });
        }
        self.may_remove(c, &old.at, stat)?;
        match &new.stat {
            Some(there) => self.may_remove(c, &new.at, there)?,
            None => self.may_change_names(c, &new.at)?,
        }
        self.mount(&old.at)?
            .fs
            .rename(c, &old.at.path, &new.at.path, flags)?;
        Ok((old.at, new.at))
    }

    /// Changes attributes of what is at a place (a symbolic link itself).
    ///
    /// # Errors
    /// `EROFS`, `EPERM` if it is not the caller's, `EOPNOTSUPP` for a link's mode.
    pub fn change_at(&self, c: &Caller<'_>, at: &Location, change: &Change) -> Result<(), Errno> {
        let stat = self.look(c, at)?;
        let mount = self.mount(at)?;
        if mount.read_only {
            return Err(Errno::ROFS);
        }
        may_change(c, &stat, change)?;
        if stat.mode & S_IFMT == S_IFLNK && matches!(change, Change::Mode(_)) {
            return Err(Errno::OPNOTSUPP);
        }
        mount.fs.change(c, &at.path, change)
    }
}

/// Whether the caller may make this change (chmod(2), chown(2), utimensat(2)).
pub(super) fn may_change(c: &Caller<'_>, stat: &Stat, change: &Change) -> Result<(), Errno> {
    let (root, owner) = (c.uid() == 0, c.uid() == stat.uid);
    let allowed = match *change {
        Change::Mode(_) => owner,
        Change::Owner(uid, gid) => {
            let group =
                |gid: u32| gid == stat.gid || gid == c.gid() || c.cred.groups.contains(&gid);
            owner && uid.is_none_or(|uid| uid == stat.uid) && gid.is_none_or(group)
        }
        Change::Times(SetTime::Now, SetTime::Now) => owner || c.permitted(stat, 2),
        Change::Times(..) => owner,
    };
    match (root || allowed, change) {
        (true, _) => Ok(()),
        (false, Change::Times(SetTime::Now, SetTime::Now)) => Err(Errno::ACCESS),
        (false, _) => Err(Errno::PERM),
    }
}
