//! `/sys`: the little that C libraries and tools read of it.

use rustix::io::Errno;

use super::synth::{Node, Row, Synth, row_children, row_content, row_node};
use super::{Caller, Link};

/// The tree.
#[derive(Debug)]
pub(super) struct SysFs;

const ROWS: &[Row] = &[
    Row {
        path: "devices/system/cpu/online",
        mode: 0o444,
        content: cpus,
    },
    Row {
        path: "devices/system/cpu/possible",
        mode: 0o444,
        content: cpus,
    },
    Row {
        path: "devices/system/cpu/present",
        mode: 0o444,
        content: cpus,
    },
    Row {
        path: "devices/system/node/online",
        mode: 0o444,
        content: |_| "0\n".to_owned(),
    },
    Row {
        path: "devices/system/node/possible",
        mode: 0o444,
        content: |_| "0\n".to_owned(),
    },
    Row {
        path: "kernel/mm/transparent_hugepage/enabled",
        mode: 0o444,
        content: |_| "always madvise [never]\n".to_owned(),
    },
    Row {
        path: "kernel/mm/transparent_hugepage/hpage_pmd_size",
        mode: 0o444,
        content: |_| "2097152\n".to_owned(),
    },
];

fn cpus(c: &Caller<'_>) -> String {
    match c.k.limits.cpus {
        0 | 1 => "0\n".to_owned(),
        n => format!("0-{}\n", n - 1),
    }
}

impl Synth for SysFs {
    fn node(&self, _: &Caller<'_>, path: &str) -> Result<Node, Errno> {
        row_node(ROWS, path)
    }

    fn children(&self, c: &Caller<'_>, path: &str) -> Result<Vec<(String, u8)>, Errno> {
        self.node(c, path)?;
        Ok(row_children(ROWS, path))
    }

    fn link(&self, _: &Caller<'_>, _: &str) -> Result<Link, Errno> {
        Err(Errno::INVAL)
    }

    fn content(&self, c: &Caller<'_>, path: &str) -> Result<Vec<u8>, Errno> {
        row_content(ROWS, c, path)
    }

    fn kind(&self) -> (&'static str, u64) {
        ("sysfs", 0x6265_6572)
    }
}
