//! `/dev`: the memory devices, the terminal, `/dev/vmm`, and the links to the descriptors. There is no
//! `ptmx`: the guest has no terminal but the one it was started on.

use std::sync::Arc;

use rustix::io::Errno;

use super::synth::{Node, Synth};
use super::vmm::VmmFile;
use super::{Caller, Link, S_IFCHR, S_IFDIR, S_IFLNK, S_IFMT};
use crate::linux::file::{Description, File, Location, Stat};
use crate::linux::kernel::Kernel;
use crate::linux::saved::{Refused, SavedFile, Saver};

/// The tree.
#[derive(Debug)]
pub(super) struct DevFs;

/// A character device that needs nothing but memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Null,
    Zero,
    Full,
    Random,
    /// The controlling terminal.
    Tty,
    /// What the guest and the VMM say to each other.
    Vmm,
}

/// Name, kind, minor and major number.
const DEVICES: &[(&str, Kind, u64)] = &[
    ("null", Kind::Null, rdev(1, 3)),
    ("zero", Kind::Zero, rdev(1, 5)),
    ("full", Kind::Full, rdev(1, 7)),
    ("random", Kind::Random, rdev(1, 8)),
    ("urandom", Kind::Random, rdev(1, 9)),
    ("tty", Kind::Tty, rdev(5, 0)),
    // A number for local use.
    ("vmm", Kind::Vmm, rdev(240, 0)),
];

const LINKS: &[(&str, &str)] = &[
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
];

const fn rdev(major: u64, minor: u64) -> u64 {
    (major << 8) | minor
}

impl Synth for DevFs {
    fn node(&self, _: &Caller<'_>, path: &str) -> Result<Node, Errno> {
        if path.is_empty() {
            return Ok(Node::new(S_IFDIR | 0o755));
        }
        if LINKS.iter().any(|(name, _)| *name == path) {
            return Ok(Node::new(S_IFLNK | 0o777));
        }
        let (_, _, rdev) = DEVICES
            .iter()
            .find(|(name, ..)| *name == path)
            .ok_or(Errno::NOENT)?;
        Ok(Node {
            rdev: *rdev,
            ..Node::new(S_IFCHR | 0o666)
        })
    }

    fn children(&self, _: &Caller<'_>, path: &str) -> Result<Vec<(String, u8)>, Errno> {
        if !path.is_empty() {
            return Err(Errno::NOTDIR);
        }
        let devices = DEVICES.iter().map(|(name, ..)| ((*name).to_owned(), 2));
        Ok(devices
            .chain(LINKS.iter().map(|(name, _)| ((*name).to_owned(), 10)))
            .collect())
    }

    fn link(&self, _: &Caller<'_>, path: &str) -> Result<Link, Errno> {
        let (_, target) = LINKS
            .iter()
            .find(|(name, _)| *name == path)
            .ok_or(Errno::INVAL)?;
        Ok(Link::Path(target.as_bytes().to_vec()))
    }

    fn content(&self, _: &Caller<'_>, _: &str) -> Result<Vec<u8>, Errno> {
        Err(Errno::NOENT)
    }

    fn device(&self, c: &Caller<'_>, path: &str, at: Location) -> Result<Arc<dyn File>, Errno> {
        let (name, kind, rdev) = DEVICES
            .iter()
            .find(|(name, ..)| *name == path)
            .ok_or(Errno::NXIO)?;
        if *kind == Kind::Tty {
            return terminal(c);
        }
        let stat = Stat {
            rdev: *rdev,
            ..c.k.vfs.look(c, &at)?
        };
        if *kind == Kind::Vmm {
            return Ok(Arc::new(VmmFile::new(c.k, stat, at)));
        }
        Ok(Arc::new(Device {
            kind: *kind,
            name,
            stat,
            at,
        }))
    }

    fn kind(&self) -> (&'static str, u64) {
        ("devtmpfs", 0x0102_1994)
    }
}

/// The terminal, which the guest holds as a descriptor of the caller or of the first program.
fn terminal(c: &Caller<'_>) -> Result<Arc<dyn File>, Errno> {
    let held: Vec<Arc<Description>> = {
        let state = c.k.state();
        let session = state.process(c.pid).map_or(0, |p| p.sid);
        if state.tty.session.is_none_or(|owner| owner != session) {
            return Err(Errno::NXIO);
        }
        let processes = [c.pid, session, state.main]
            .into_iter()
            .filter_map(|pid| state.procs.get(&pid));
        processes
            .flat_map(|p| p.files.fds.values())
            .map(|fd| Arc::clone(&fd.description))
            .collect()
    };
    let is_terminal = |description: &&Arc<Description>| {
        let stat = description.file.stat(c.k);
        stat.is_ok_and(|s| {
            s.mode & S_IFMT == S_IFCHR && matches!(s.rdev >> 8 & 0xfff, 4 | 5 | 136..=143)
        })
    };
    held.iter()
        .find(is_terminal)
        .map(|d| Arc::clone(&d.file))
        .ok_or(Errno::NXIO)
}

/// An open memory device.
#[derive(Debug)]
struct Device {
    kind: Kind,
    name: &'static str,
    stat: Stat,
    at: Location,
}

impl File for Device {
    fn read(&self, _: &Kernel, _: u64, buf: &mut [u8]) -> Result<usize, Errno> {
        match self.kind {
            Kind::Null | Kind::Tty | Kind::Vmm => return Ok(0),
            Kind::Zero | Kind::Full => buf.fill(0),
            Kind::Random => {
                let mut done = 0;
                while done < buf.len() {
                    let flags = rustix::rand::GetRandomFlags::empty();
                    done += rustix::rand::getrandom(&mut buf[done..], flags)?;
                }
            }
        }
        Ok(buf.len())
    }

    fn write(&self, _: &Kernel, _: u64, buf: &[u8]) -> Result<usize, Errno> {
        if self.kind == Kind::Full {
            Err(Errno::NOSPC)
        } else {
            Ok(buf.len())
        }
    }

    fn seekable(&self) -> bool {
        true
    }

    fn moves(&self) -> bool {
        false
    }

    fn stat(&self, _: &Kernel) -> Result<Stat, Errno> {
        Ok(self.stat)
    }

    fn location(&self) -> Option<Location> {
        Some(self.at.clone())
    }

    fn name(&self, _: &Kernel) -> Vec<u8> {
        format!("/dev/{}", self.name).into_bytes()
    }

    fn saved(&self, _: &mut Saver<'_>) -> Result<SavedFile, Refused> {
        Ok(SavedFile::Device(self.at.clone()))
    }

    fn as_any(&self) -> &dyn std::any::Any {
        self
    }
}
