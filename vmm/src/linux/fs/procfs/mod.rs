//! `/proc`, made up from the machine's own records: the guest's processes and what tools read of a
//! kernel. Nothing of the host's is in it.

use rustix::io::Errno;

use super::synth::{Node, Synth, row_children, row_content, row_node};
use super::{Caller, Link, S_IFDIR, S_IFLNK};

mod global;
mod maps;
mod process;
mod status;

/// The tree.
#[derive(Debug)]
pub(super) struct ProcFs;

/// A path in it.
enum Place<'p> {
    Root,
    /// A link in the root.
    Link(String),
    /// Below a process's directory: pid, and the rest of the path.
    Process(i32, &'p str),
    Global(&'p str),
}

fn place<'p>(c: &Caller<'_>, path: &'p str) -> Place<'p> {
    let (first, rest) = path.split_once('/').unwrap_or((path, ""));
    match path {
        "" => return Place::Root,
        "self" => return Place::Link(c.pid.to_string()),
        "thread-self" => return Place::Link(format!("{}/task/{}", c.pid, c.tid)),
        "mounts" => return Place::Link("self/mounts".to_owned()),
        _ => {}
    }
    match first.parse() {
        Ok(pid) if first.bytes().all(|b| b.is_ascii_digit()) => Place::Process(pid, rest),
        _ => Place::Global(path),
    }
}

impl Synth for ProcFs {
    fn node(&self, c: &Caller<'_>, path: &str) -> Result<Node, Errno> {
        match place(c, path) {
            Place::Root => Ok(Node::new(S_IFDIR | 0o555)),
            Place::Link(_) if c.pid == 0 && path != "mounts" => Err(Errno::NOENT),
            Place::Link(_) => Ok(Node::new(S_IFLNK | 0o777)),
            Place::Process(pid, rest) => process::node(c, pid, rest),
            Place::Global(path) => row_node(global::ROWS, path),
        }
    }

    fn children(&self, c: &Caller<'_>, path: &str) -> Result<Vec<(String, u8)>, Errno> {
        match place(c, path) {
            Place::Root => {
                let mut out = row_children(global::ROWS, "");
                out.extend(["self", "thread-self", "mounts"].map(|name| (name.to_owned(), 10)));
                out.extend(c.k.state().procs.keys().map(|pid| (pid.to_string(), 4)));
                Ok(out)
            }
            Place::Link(_) => Err(Errno::NOTDIR),
            Place::Process(pid, rest) => process::children(c, pid, rest),
            Place::Global(path) => {
                row_node(global::ROWS, path)?;
                Ok(row_children(global::ROWS, path))
            }
        }
    }

    fn link(&self, c: &Caller<'_>, path: &str) -> Result<Link, Errno> {
        match place(c, path) {
            Place::Link(target) => Ok(Link::Path(target.into_bytes())),
            Place::Process(pid, rest) => process::link(c, pid, rest),
            Place::Root | Place::Global(_) => Err(Errno::INVAL),
        }
    }

    fn content(&self, c: &Caller<'_>, path: &str) -> Result<Vec<u8>, Errno> {
        match place(c, path) {
            Place::Process(pid, rest) => process::content(c, pid, rest),
            Place::Global(path) => row_content(global::ROWS, c, path),
            Place::Root | Place::Link(_) => Err(Errno::NOENT),
        }
    }

    fn store(&self, c: &Caller<'_>, path: &str, bytes: &[u8]) -> Result<(), Errno> {
        match place(c, path) {
            Place::Process(pid, rest) => process::store(c, pid, rest, bytes),
            Place::Root | Place::Link(_) | Place::Global(_) => Err(Errno::ACCESS),
        }
    }

    fn kind(&self) -> (&'static str, u64) {
        ("proc", 0x9fa0)
    }
}
