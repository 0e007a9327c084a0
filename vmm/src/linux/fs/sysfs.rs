//! `/sys`: the little that C libraries and tools read of it.

use rustix::io::Errno;

use super::synth::{Node, Row, Synth, row_children, row_content, row_node};
use super::{Caller, Link, S_IFDIR, S_IFREG};

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

/// What a file says of the processor with a number.
type OfNumber = fn(usize) -> String;

/// The files of a processor's directory.
const CPU_ROWS: [(&str, OfNumber); 3] = [
    ("core_id", |cpu| format!("{cpu}\n")),
    ("physical_package_id", |_| "0\n".to_owned()),
    ("thread_siblings_list", |cpu| format!("{cpu}\n")),
];

/// What there is of one processor.
enum OfCpu {
    /// `cpuN`.
    Directory,
    /// `cpuN/topology`.
    Topology,
    /// A file there.
    Row(usize, OfNumber),
}

/// What a path means, if it is a processor's.
fn of_cpu(c: &Caller<'_>, path: &str) -> Option<OfCpu> {
    let rest = path.strip_prefix("devices/system/cpu/cpu")?;
    let (number, rest) = match rest.split_once('/') {
        Some((number, rest)) => (number, Some(rest)),
        None => (rest, None),
    };
    let cpu: usize = number.parse().ok()?;
    if cpu >= c.k.limits.cpus.max(1) || cpu.to_string() != number {
        return None;
    }
    match rest {
        None => Some(OfCpu::Directory),
        Some("topology") => Some(OfCpu::Topology),
        Some(file) => {
            let name = file.strip_prefix("topology/")?;
            let row = CPU_ROWS.iter().find(|(row, _)| *row == name)?;
            Some(OfCpu::Row(cpu, row.1))
        }
    }
}

fn cpus(c: &Caller<'_>) -> String {
    match c.k.limits.cpus {
        0 | 1 => "0\n".to_owned(),
        n => format!("0-{}\n", n - 1),
    }
}

impl Synth for SysFs {
    fn node(&self, c: &Caller<'_>, path: &str) -> Result<Node, Errno> {
        match of_cpu(c, path) {
            Some(OfCpu::Directory | OfCpu::Topology) => Ok(Node::new(S_IFDIR | 0o555)),
            Some(OfCpu::Row(..)) => Ok(Node::new(S_IFREG | 0o444)),
            None => row_node(ROWS, path),
        }
    }

    fn children(&self, c: &Caller<'_>, path: &str) -> Result<Vec<(String, u8)>, Errno> {
        self.node(c, path)?;
        Ok(match of_cpu(c, path) {
            Some(OfCpu::Directory) => vec![("topology".to_owned(), 4)],
            Some(OfCpu::Topology) => {
                let names = CPU_ROWS.iter().map(|(name, _)| ((*name).to_owned(), 8));
                names.collect()
            }
            Some(OfCpu::Row(..)) => Vec::new(),
            None => {
                let mut all = row_children(ROWS, path);
                if path == "devices/system/cpu" {
                    let cpus = 0..c.k.limits.cpus.max(1);
                    all.extend(cpus.map(|cpu| (format!("cpu{cpu}"), 4)));
                }
                all
            }
        })
    }

    fn link(&self, _: &Caller<'_>, _: &str) -> Result<Link, Errno> {
        Err(Errno::INVAL)
    }

    fn content(&self, c: &Caller<'_>, path: &str) -> Result<Vec<u8>, Errno> {
        match of_cpu(c, path) {
            Some(OfCpu::Row(cpu, says)) => Ok(says(cpu).into_bytes()),
            Some(OfCpu::Directory | OfCpu::Topology) | None => row_content(ROWS, c, path),
        }
    }

    fn kind(&self) -> (&'static str, u64) {
        ("sysfs", 0x6265_6572)
    }
}
