//! Following a host path one component at a time, noting each symbolic link.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::path::{Component, Path, PathBuf};

/// Links followed before giving up, as the kernel does (`MAXSYMLINKS`).
const LINKS_MAX: usize = 40;

/// Where a path leads.
#[derive(Debug)]
pub(super) struct Resolved {
    /// The end, free of links.
    pub(super) file: PathBuf,
    /// Every link on the way: where it is, free of links itself, and what it says.
    pub(super) links: Vec<(PathBuf, PathBuf)>,
}

/// Follows `path` from the root; `None` if it leads nowhere.
pub(super) fn resolve(path: &Path) -> Option<Resolved> {
    let mut at = PathBuf::from("/");
    let mut links = Vec::new();
    let mut rest: VecDeque<Step> = steps(path).collect();
    while let Some(step) = rest.pop_front() {
        let name = match step {
            Step::Root => {
                at = PathBuf::from("/");
                continue;
            }
            Step::Up => {
                at.pop();
                continue;
            }
            Step::Down(name) => name,
        };
        let next = at.join(name);
        if !std::fs::symlink_metadata(&next).ok()?.is_symlink() {
            at = next;
            continue;
        }
        let target = std::fs::read_link(&next).ok()?;
        for step in steps(&target).collect::<Vec<_>>().into_iter().rev() {
            rest.push_front(step);
        }
        links.push((next, target));
        if links.len() > LINKS_MAX {
            return None;
        }
    }
    Some(Resolved { file: at, links })
}

enum Step {
    Root,
    Up,
    Down(OsString),
}

fn steps(path: &Path) -> impl Iterator<Item = Step> {
    path.components().filter_map(|component| match component {
        Component::RootDir => Some(Step::Root),
        Component::ParentDir => Some(Step::Up),
        Component::Normal(name) => Some(Step::Down(name.to_owned())),
        Component::CurDir | Component::Prefix(_) => None,
    })
}
