//! Walking a path: component by component, symbolic links resolved in the guest's tree.

use std::sync::Arc;

use rustix::io::Errno;

use super::{Caller, Link, NAME_MAX, S_IFDIR, S_IFLNK, S_IFMT, Vfs, below, split};
use crate::linux::file::{Description, Location, Stat};

/// Symbolic links followed in one walk (path_resolution(7)).
const LINKS_MAX: usize = 40;
/// Components a walk may have, links' targets included: a step costs as much as it is deep.
const STEPS_MAX: usize = 8192;
/// Longest path a walk may come to.
const PATH_LIMIT: usize = 16 * 4096;

/// What is done with a symbolic link in the last place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Follow {
    /// It is followed.
    Last,
    /// It is not, unless a slash comes after it.
    Not,
    /// It is not: the call is about the name.
    Name,
}

bitflags::bitflags! {
    /// openat2(2) `RESOLVE_*`.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Resolve: u64 {
        /// No mount may be crossed.
        const NO_XDEV = 0x01;
        /// No magic link may be followed.
        const NO_MAGICLINKS = 0x02;
        /// No link at all.
        const NO_SYMLINKS = 0x04;
        /// Nothing above the start.
        const BENEATH = 0x08;
        /// The start is the root.
        const IN_ROOT = 0x10;
    }
}

/// How a path is walked.
#[derive(Clone, Copy, Debug)]
pub struct Walk {
    /// A link in the last place.
    pub follow: Follow,
    /// openat2(2)'s restrictions.
    pub resolve: Resolve,
}

impl From<Follow> for Walk {
    fn from(follow: Follow) -> Self {
        Self {
            follow,
            resolve: Resolve::empty(),
        }
    }
}

/// Where a path leads.
#[derive(Debug)]
pub struct Found {
    /// The place. If nothing is there, its parent is a directory that is.
    pub at: Location,
    /// What is there, if anything is.
    pub stat: Option<Stat>,
    /// The path led to an open description (`/proc/self/fd/N`): `at` is the link's place.
    pub description: Option<Arc<Description>>,
    /// The path ended in a slash.
    pub slash: bool,
}

impl Found {
    /// What is there.
    ///
    /// # Errors
    /// `ENOENT`.
    pub fn existing(&self) -> Result<&Stat, Errno> {
        self.stat.as_ref().ok_or(Errno::NOENT)
    }
}

struct Walker<'w> {
    vfs: &'w Vfs,
    c: &'w Caller<'w>,
    how: Walk,
    /// Clean guest path that is not left, and where absolute paths start.
    top: Vec<u8>,
    /// Clean guest path of a directory.
    here: Vec<u8>,
    /// Components to come, the next one last.
    pending: Vec<Vec<u8>>,
    slash: bool,
    links: usize,
    steps: usize,
}

impl Vfs {
    /// Walks `path` from `base`, which is a directory.
    ///
    /// # Errors
    /// `ENOENT` (also for an empty path), `ENOTDIR`, `EACCES`, `ELOOP`, `ENAMETOOLONG`, `EXDEV`.
    pub fn walk(
        &self,
        c: &Caller<'_>,
        base: &Location,
        path: &[u8],
        how: impl Into<Walk>,
    ) -> Result<Found, Errno> {
        let how = how.into();
        if path.is_empty() {
            return Err(Errno::NOENT);
        }
        let start = self.clean_path(base);
        let scoped = how.resolve.intersects(Resolve::BENEATH | Resolve::IN_ROOT);
        let top = if scoped { start.clone() } else { Vec::new() };
        let mut walker = Walker {
            vfs: self,
            c,
            how,
            top,
            here: start,
            pending: Vec::new(),
            slash: false,
            links: 0,
            steps: 0,
        };
        walker.enter(path)?;
        walker.run()
    }

    /// The guest path of an existing place the walk finds, following links.
    ///
    /// # Errors
    /// As [`Vfs::walk`], and `ENOENT`.
    pub fn find(
        &self,
        c: &Caller<'_>,
        base: &Location,
        path: &[u8],
    ) -> Result<(Location, Stat), Errno> {
        let found = self.walk(c, base, path, Follow::Last)?;
        let stat = *found.existing()?;
        Ok((found.at, stat))
    }
}

impl Walker<'_> {
    /// Puts a path's components before those to come.
    fn enter(&mut self, path: &[u8]) -> Result<(), Errno> {
        if path.first() == Some(&b'/') {
            if self.how.resolve.contains(Resolve::BENEATH) {
                return Err(Errno::XDEV);
            }
            self.here.clone_from(&self.top);
        }
        if self.pending.is_empty() {
            self.slash |= path.last() == Some(&b'/');
        }
        let names = path.split(|&b| b == b'/').filter(|name| !name.is_empty());
        self.pending.extend(names.rev().map(<[u8]>::to_vec));
        Ok(())
    }

    fn run(mut self) -> Result<Found, Errno> {
        while let Some(name) = self.pending.pop() {
            self.steps += 1;
            if self.steps > STEPS_MAX {
                return Err(Errno::LOOP);
            }
            match &name[..] {
                b"." => {}
                b".." => self.up()?,
                _ => {
                    if let Some(found) = self.step(&name)? {
                        return Ok(found);
                    }
                }
            }
        }
        let at = self.vfs.locate(&self.here);
        let stat = self.vfs.look(self.c, &at)?;
        Ok(Found {
            at,
            stat: Some(stat),
            description: None,
            slash: self.slash,
        })
    }

    fn up(&mut self) -> Result<(), Errno> {
        if self.here == self.top {
            let beneath = self.how.resolve.contains(Resolve::BENEATH);
            return if beneath { Err(Errno::XDEV) } else { Ok(()) };
        }
        let parent = split(&self.here).0.to_vec();
        self.cross(&parent)?;
        self.here = parent;
        Ok(())
    }

    /// One name further: the end of the walk, if it is.
    fn step(&mut self, name: &[u8]) -> Result<Option<Found>, Errno> {
        let dir = self.vfs.locate(&self.here);
        if self.vfs.mount(&dir)?.fs.host_checks() != Some(self.c.uid()) {
            let stat = self.vfs.look(self.c, &dir)?;
            self.vfs.check(self.c, &dir, &stat, 1)?;
        }
        if name.len() > NAME_MAX || self.here.len() > PATH_LIMIT {
            return Err(Errno::NAMETOOLONG);
        }
        let next = super::join(&self.here, name);
        let at = self.vfs.locate(&next);
        let last = self.pending.is_empty();
        let stat = match self.vfs.look(self.c, &at) {
            Err(Errno::NOENT) if last => {
                return Ok(Some(Found {
                    at,
                    stat: None,
                    description: None,
                    slash: self.slash,
                }));
            }
            result => result?,
        };
        self.cross(&next)?;
        match stat.mode & S_IFMT {
            S_IFLNK if self.follows(last) => self.link(at, stat),
            S_IFDIR => {
                self.here = next;
                Ok(None)
            }
            _ => self.end(at, stat, last).map(Some),
        }
    }

    fn follows(&self, last: bool) -> bool {
        !last
            || match self.how.follow {
                Follow::Last => true,
                Follow::Not => self.slash,
                Follow::Name => false,
            }
    }

    /// What is neither directory nor link to follow ends the walk.
    fn end(&self, at: Location, stat: Stat, last: bool) -> Result<Found, Errno> {
        if !last || (self.slash && self.how.follow != Follow::Name) {
            return Err(Errno::NOTDIR);
        }
        Ok(Found {
            at,
            stat: Some(stat),
            description: None,
            slash: self.slash,
        })
    }

    fn link(&mut self, at: Location, stat: Stat) -> Result<Option<Found>, Errno> {
        self.links += 1;
        if self.links > LINKS_MAX || self.how.resolve.contains(Resolve::NO_SYMLINKS) {
            return Err(Errno::LOOP);
        }
        let refuse = Resolve::NO_MAGICLINKS | Resolve::BENEATH | Resolve::IN_ROOT;
        match self.vfs.read_link(self.c, &at)? {
            Link::Path(target) if target.is_empty() => Err(Errno::NOENT),
            Link::Path(target) => {
                self.enter(&target)?;
                Ok(None)
            }
            _ if self.how.resolve.intersects(refuse) => Err(Errno::LOOP),
            Link::At(place) => self.jump(place),
            Link::Open(description) => self.opened(at, stat, description),
        }
    }

    /// A magic link to a place.
    fn jump(&mut self, place: Location) -> Result<Option<Found>, Errno> {
        let stat = self.vfs.look(self.c, &place)?;
        let path = self.vfs.clean_path(&place);
        self.cross(&path)?;
        if stat.mode & S_IFMT == S_IFDIR {
            self.here = path;
            return Ok(None);
        }
        self.end(place, stat, self.pending.is_empty()).map(Some)
    }

    /// A magic link to an open description.
    fn opened(
        &mut self,
        at: Location,
        stat: Stat,
        description: Arc<Description>,
    ) -> Result<Option<Found>, Errno> {
        let seen = description.file.stat(self.c.k)?;
        if seen.mode & S_IFMT == S_IFDIR
            && let Some(place) = description.file.location()
        {
            return self.jump(place);
        }
        if !self.pending.is_empty() || self.slash {
            return Err(Errno::NOTDIR);
        }
        debug_assert_eq!(stat.mode & S_IFMT, S_IFLNK);
        Ok(Some(Found {
            at,
            stat: Some(seen),
            description: Some(description),
            slash: false,
        }))
    }

    /// `RESOLVE_NO_XDEV`, and `RESOLVE_BENEATH` for magic links.
    fn cross(&self, next: &[u8]) -> Result<(), Errno> {
        debug_assert!(below(next, b"").is_some());
        let crosses = self.vfs.locate(next).mount != self.vfs.locate(&self.here).mount;
        if crosses && self.how.resolve.contains(Resolve::NO_XDEV) {
            return Err(Errno::XDEV);
        }
        Ok(())
    }
}
