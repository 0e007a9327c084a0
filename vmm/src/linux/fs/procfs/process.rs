//! `/proc/PID` and `/proc/PID/task/TID`.

use std::collections::BTreeSet;
use std::sync::Arc;

use rustix::io::Errno;

use super::super::synth::Node;
use super::super::{Caller, Link, S_IFDIR, S_IFLNK, S_IFREG};
use super::{maps, status};
use crate::linux::file::Description;
use crate::linux::process::{AddressSpace, Pid, Process};
use crate::linux::thread::Tid;
use crate::linux::user_mem::UserMem;

/// Longest argument or environment list that is shown.
const STRINGS_MAX: u64 = 256 * 1024;

/// Files: name and permission bits.
const FILES: &[(&str, u32)] = &[
    ("auxv", 0o400),
    ("cgroup", 0o444),
    ("cmdline", 0o444),
    ("comm", 0o644),
    ("environ", 0o400),
    ("limits", 0o444),
    ("maps", 0o444),
    ("mountinfo", 0o444),
    ("mounts", 0o444),
    ("oom_score", 0o444),
    ("oom_score_adj", 0o644),
    ("stat", 0o444),
    ("statm", 0o444),
    ("status", 0o444),
    ("wchan", 0o444),
];
const LINKS: &[&str] = &["cwd", "exe", "root"];
const DIRECTORIES: &[(&str, u32)] = &[("fd", 0o500), ("fdinfo", 0o500), ("task", 0o555)];

/// A path below a process's directory.
enum Place<'p> {
    /// The directory of a process or (`true`) of one of its threads.
    Top(bool),
    File(&'p str, u32),
    Link(&'p str),
    Directory(&'p str, u32),
    Fd(i32),
    FdInfo(i32),
}

/// Runs `f` on the process, under the state lock.
fn with<R>(
    c: &Caller<'_>,
    pid: Pid,
    f: impl FnOnce(&Process) -> Result<R, Errno>,
) -> Result<R, Errno> {
    let state = c.k.state();
    f(state.procs.get(&pid).ok_or(Errno::NOENT)?)
}

fn place<'p>(p: &Process, path: &'p str) -> Result<Place<'p>, Errno> {
    let (first, rest) = path.split_once('/').unwrap_or((path, ""));
    if first == "task" && !rest.is_empty() {
        let (tid, rest) = rest.split_once('/').unwrap_or((rest, ""));
        let tid: i32 = tid.parse().map_err(|_| Errno::NOENT)?;
        if tid != p.pid && !p.threads.contains_key(&tid) {
            return Err(Errno::NOENT);
        }
        return match entry(p, rest)? {
            Place::Top(_) => Ok(Place::Top(true)),
            Place::Directory("task", _) => Err(Errno::NOENT),
            place => Ok(place),
        };
    }
    entry(p, path)
}

fn entry<'p>(p: &Process, path: &'p str) -> Result<Place<'p>, Errno> {
    let (first, rest) = path.split_once('/').unwrap_or((path, ""));
    let held = |rest: &str| {
        rest.parse()
            .ok()
            .filter(|fd| p.files.fds.contains_key(fd))
            .ok_or(Errno::NOENT)
    };
    match first {
        "" => Ok(Place::Top(false)),
        "fd" if !rest.is_empty() => Ok(Place::Fd(held(rest)?)),
        "fdinfo" if !rest.is_empty() => Ok(Place::FdInfo(held(rest)?)),
        _ if !rest.is_empty() => Err(Errno::NOENT),
        _ => {
            let file = FILES
                .iter()
                .find(|(name, _)| *name == first)
                .map(|&(_, mode)| Place::File(first, mode));
            let dir = DIRECTORIES.iter().find(|(name, _)| *name == first);
            let dir = dir.map(|&(_, mode)| Place::Directory(first, mode));
            let link = LINKS.contains(&first).then_some(Place::Link(first));
            file.or(dir).or(link).ok_or(Errno::NOENT)
        }
    }
}

/// What is at `path` of process `pid`.
pub(super) fn node(c: &Caller<'_>, pid: Pid, path: &str) -> Result<Node, Errno> {
    with(c, pid, |p| {
        let mode = match place(p, path)? {
            Place::Top(_) => S_IFDIR | 0o555,
            Place::File(_, mode) => S_IFREG | mode,
            Place::Directory(_, mode) => S_IFDIR | mode,
            Place::Link(_) => S_IFLNK | 0o777,
            Place::FdInfo(_) => S_IFREG | 0o400,
            Place::Fd(fd) => S_IFLNK | fd_mode(&p.files.fds[&fd].description),
        };
        Ok(Node {
            owner: (p.cred.uid[1], p.cred.gid[1]),
            ..Node::new(mode)
        })
    })
}

fn fd_mode(description: &Description) -> u32 {
    let read = if description.readable() { 0o500 } else { 0 };
    let write = if description.writable() { 0o300 } else { 0 };
    read | write
}

/// The entries of the directory at `path`.
pub(super) fn children(c: &Caller<'_>, pid: Pid, path: &str) -> Result<Vec<(String, u8)>, Errno> {
    with(c, pid, |p| match place(p, path)? {
        Place::Top(of_thread) => {
            let files = FILES.iter().map(|(name, _)| ((*name).to_owned(), 8));
            let links = LINKS.iter().map(|name| ((*name).to_owned(), 10));
            let shown = DIRECTORIES
                .iter()
                .filter(|(name, _)| !of_thread || *name != "task");
            Ok(files
                .chain(links)
                .chain(shown.map(|(name, _)| ((*name).to_owned(), 4)))
                .collect())
        }
        Place::Directory("task", _) => {
            // A leader that has ended is listed as long as its process is there.
            let tids: BTreeSet<Tid> = p.threads.keys().copied().chain([p.pid]).collect();
            Ok(tids.into_iter().map(|tid| (tid.to_string(), 4)).collect())
        }
        Place::Directory("fd", _) => {
            Ok(p.files.fds.keys().map(|fd| (fd.to_string(), 10)).collect())
        }
        Place::Directory(..) => Ok(p.files.fds.keys().map(|fd| (fd.to_string(), 8)).collect()),
        Place::File(..) | Place::Link(_) | Place::Fd(_) | Place::FdInfo(_) => Err(Errno::NOTDIR),
    })
}

/// Whether the caller may look into the process: the same user, or root.
fn may_look(c: &Caller<'_>, p: &Process) -> Result<(), Errno> {
    if c.uid() == 0 || c.uid() == p.cred.uid[0] {
        Ok(())
    } else {
        Err(Errno::ACCESS)
    }
}

/// Where the link at `path` leads.
pub(super) fn link(c: &Caller<'_>, pid: Pid, path: &str) -> Result<Link, Errno> {
    let root = c.k.vfs.root();
    with(c, pid, |p| {
        let place = place(p, path)?;
        if matches!(place, Place::Link(_) | Place::Fd(_)) {
            may_look(c, p)?;
        }
        match place {
            Place::Link("root") => Ok(Link::At(root)),
            Place::Link("cwd") if p.mm.is_some() => Ok(Link::At(p.cwd.clone())),
            Place::Link("exe") if p.mm.is_some() => Ok(Link::At(p.exe.clone())),
            Place::Link(_) => Err(Errno::NOENT),
            Place::Fd(fd) => Ok(Link::Open(Arc::clone(&p.files.fds[&fd].description))),
            Place::Top(_) | Place::File(..) | Place::Directory(..) | Place::FdInfo(_) => {
                Err(Errno::INVAL)
            }
        }
    })
}

/// The content of the file at `path`.
pub(super) fn content(c: &Caller<'_>, pid: Pid, path: &str) -> Result<Vec<u8>, Errno> {
    enum What {
        Name(String),
        FdInfo(Arc<Description>),
    }
    let what = with(c, pid, |p| match place(p, path)? {
        Place::File(name, _) => Ok(What::Name(name.to_owned())),
        Place::FdInfo(fd) => Ok(What::FdInfo(Arc::clone(&p.files.fds[&fd].description))),
        Place::Top(_) | Place::Link(_) | Place::Directory(..) | Place::Fd(_) => Err(Errno::INVAL),
    })?;
    match what {
        What::Name(name) => named(c, (pid, thread_of(pid, path)), &name),
        What::FdInfo(description) => {
            let offset = description.offset.seen();
            Ok(format!(
                "pos:\t{offset}\nflags:\t0{:o}\nmnt_id:\t0\n",
                description.flags()
            )
            .into_bytes())
        }
    }
}

/// The thread a path below a process's directory is about.
fn thread_of(pid: Pid, path: &str) -> Tid {
    let of_thread = path.strip_prefix("task/");
    of_thread
        .and_then(|rest| rest.split('/').next()?.parse().ok())
        .unwrap_or(pid)
}

fn named(c: &Caller<'_>, (pid, tid): (Pid, Tid), name: &str) -> Result<Vec<u8>, Errno> {
    match name {
        "stat" => status::stat(c, (pid, tid)),
        "status" => status::status(c, (pid, tid)),
        "statm" => status::statm(c, pid),
        "limits" => with(c, pid, |p| Ok(status::limits(p).into_bytes())),
        "comm" => with(c, pid, |p| Ok([p.name_of(tid), b"\n"].concat())),
        "maps" => maps::maps(c, pid),
        // Not with the process tree locked: brk(2) asks for a limit with the layout locked.
        "auxv" => {
            let auxv = space(c, pid)?.map(|mm| mm.layout.lock().auxv.clone());
            Ok(auxv.unwrap_or_default())
        }
        "cmdline" => strings(c, pid, |mm| mm.layout.lock().args),
        "environ" => strings(c, pid, |mm| mm.layout.lock().envs),
        "mounts" => Ok(c.k.vfs.mount_lines().into_bytes()),
        "mountinfo" => Ok(c.k.vfs.mountinfo_lines().into_bytes()),
        "oom_score" | "oom_score_adj" => Ok(b"0\n".to_vec()),
        "cgroup" => Ok(b"0::/\n".to_vec()),
        "wchan" => Ok(b"0".to_vec()),
        _ => Err(Errno::NOENT),
    }
}

/// The address space of a process that still has one.
pub(super) fn space(c: &Caller<'_>, pid: Pid) -> Result<Option<Arc<AddressSpace>>, Errno> {
    with(c, pid, |p| Ok(p.mm.clone()))
}

/// The strings in a range of the process's memory.
fn strings(
    c: &Caller<'_>,
    pid: Pid,
    range: impl FnOnce(&AddressSpace) -> (u64, u64),
) -> Result<Vec<u8>, Errno> {
    let Some(mm) = space(c, pid)? else {
        return Ok(Vec::new());
    };
    let (start, end) = range(&mm);
    let length = end.saturating_sub(start).min(STRINGS_MAX) as usize;
    let mut out = vec![0; length];
    match UserMem::new(&c.k.memory, &mm).read(start, &mut out) {
        Ok(()) => Ok(out),
        Err(_) => Ok(Vec::new()),
    }
}

/// Takes what is written to the file at `path`.
pub(super) fn store(c: &Caller<'_>, pid: Pid, path: &str, bytes: &[u8]) -> Result<(), Errno> {
    let mut state = c.k.state();
    let p = state.procs.get_mut(&pid).ok_or(Errno::NOENT)?;
    match place(p, path)? {
        Place::File("comm", _) => {
            let name = bytes
                .split(|&b| b == b'\n' || b == 0)
                .next()
                .unwrap_or_default();
            p.set_name(thread_of(pid, path), name[..name.len().min(15)].to_vec());
            Ok(())
        }
        // Taken and without effect: no process of the machine is ever chosen to be killed.
        Place::File("oom_score_adj", _) => Ok(()),
        Place::File(..)
        | Place::Top(_)
        | Place::Link(_)
        | Place::Directory(..)
        | Place::Fd(_)
        | Place::FdInfo(_) => Err(Errno::ACCESS),
    }
}
