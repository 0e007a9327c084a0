//! The benchmark: the same program natively and in a machine, times beside exits.
//!
//! Times are of one run and noisy; exits are counted and exact. `cargo bench -p tests`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

/// Options of a machine.
type Options = &'static [&'static str];

/// A workload: its arguments, what its units are called, and the machines it is run in.
struct Workload {
    args: &'static [&'static str],
    unit: &'static str,
    machines: &'static [Options],
}

const DEFAULT: &[Options] = &[&[]];
/// Both kinds of fork.
const BOTH: &[Options] = &[&["--fork", "eager"], &["--fork", "shared"]];
/// The same for large processes: what a child might store to is promised to it.
const BOTH_LARGE: &[Options] = &[
    &["--memory", "3G", "--fork", "eager"],
    &["--memory", "3G", "--fork", "shared"],
];
const BOTH_HUGE: &[Options] = &[
    &["--memory", "10G", "--fork", "eager"],
    &["--memory", "10G", "--fork", "shared"],
];
/// Less memory than what the workloads `again` have.
const SMALL: &[Options] = &[&["--memory", "32M", "--page-file", "256M"]];

/// Stands for the path of a file of [`FILE_MIB`], which has another name in the machine.
const FILE: &str = "{file}";
const FILE_MIB: usize = 64;

const WORKLOADS: &[Workload] = &[
    Workload {
        args: &["syscall", "20000"],
        unit: "call",
        machines: DEFAULT,
    },
    Workload {
        args: &["clock", "100000"],
        unit: "call",
        machines: DEFAULT,
    },
    Workload {
        args: &["touch", "1", "64"],
        unit: "page",
        machines: DEFAULT,
    },
    Workload {
        args: &["scatter", "1", "64"],
        unit: "page",
        machines: DEFAULT,
    },
    Workload {
        args: &["cow", "1", "64"],
        unit: "page",
        machines: DEFAULT,
    },
    Workload {
        args: &["fork", "100", "1"],
        unit: "fork",
        machines: BOTH,
    },
    Workload {
        args: &["fork", "50", "16"],
        unit: "fork",
        machines: BOTH,
    },
    Workload {
        args: &["fork", "20", "128"],
        unit: "fork",
        machines: BOTH,
    },
    Workload {
        args: &["fork", "10", "512"],
        unit: "fork",
        machines: BOTH_LARGE,
    },
    Workload {
        args: &["fork", "5", "4096"],
        unit: "fork",
        machines: BOTH_HUGE,
    },
    Workload {
        args: &["exec", "50"],
        unit: "process",
        machines: BOTH,
    },
    Workload {
        args: &["file", "1", FILE],
        unit: "page",
        machines: DEFAULT,
    },
    Workload {
        args: &["file-scattered", "1", FILE],
        unit: "page",
        machines: DEFAULT,
    },
    Workload {
        args: &["again", "1", "64"],
        unit: "page",
        machines: SMALL,
    },
    Workload {
        args: &["again-scattered", "1", "64"],
        unit: "page",
        machines: SMALL,
    },
    Workload {
        args: &["after-read", "1", "128"],
        unit: "page",
        machines: BOTH,
    },
    Workload {
        args: &["after-write-1", "1", "128"],
        unit: "page",
        machines: BOTH,
    },
    Workload {
        args: &["after-write-100", "1", "128"],
        unit: "page",
        machines: BOTH,
    },
    Workload {
        args: &["after-write-1", "1", "1024"],
        unit: "page",
        machines: BOTH_LARGE,
    },
    Workload {
        args: &["after-write-100", "1", "256"],
        unit: "page",
        machines: BOTH,
    },
];

/// One line a workload printed: what, nanoseconds, units.
struct Measured {
    what: String,
    ns: f64,
    units: f64,
}

fn parse(output: &str) -> Vec<Measured> {
    output
        .lines()
        .filter_map(|line| {
            let mut words = line.rsplitn(3, ' ');
            let units = words.next()?.parse().ok()?;
            let ns = words.next()?.parse().ok()?;
            Some(Measured {
                what: words.next()?.to_owned(),
                ns,
                units,
            })
        })
        .collect()
}

/// Numbers of the JSON object on the last line, flattened: `exits.syscalls`.
fn counters(stderr: &str) -> BTreeMap<String, f64> {
    fn walk(prefix: &str, value: &serde_json::Value, into: &mut BTreeMap<String, f64>) {
        match value {
            serde_json::Value::Object(map) => {
                for (name, value) in map {
                    let dot = if prefix.is_empty() { "" } else { "." };
                    walk(&format!("{prefix}{dot}{name}"), value, into);
                }
            }
            other => {
                if let Some(number) = other.as_f64() {
                    into.insert(prefix.to_owned(), number);
                }
            }
        }
    }
    let mut all = BTreeMap::new();
    if let Some(value) = stderr
        .lines()
        .last()
        .and_then(|l| serde_json::from_str(l).ok())
    {
        walk("", &value, &mut all);
    }
    all
}

struct Bench {
    vmm: PathBuf,
    program: PathBuf,
    /// The folder of the file that is mapped.
    data: PathBuf,
}

/// A workload's arguments, with the file's path.
fn with_file(args: &[&str], folder: &str) -> Vec<String> {
    let file = format!("{folder}/file");
    args.iter().map(|a| a.replace(FILE, &file)).collect()
}

impl Bench {
    fn native(&self, args: &[&str]) -> Result<Vec<Measured>, String> {
        let out = Command::new(&self.program)
            .args(with_file(args, &self.data.to_string_lossy()))
            .output()
            .map_err(|e| e.to_string())?;
        if !out.status.success() {
            return Err(format!("bench {args:?} failed: {}", out.status));
        }
        Ok(parse(&String::from_utf8_lossy(&out.stdout)))
    }

    fn machine(
        &self,
        args: &[&str],
        options: &[&str],
    ) -> Result<(Vec<Measured>, BTreeMap<String, f64>), String> {
        let out = Command::new(&self.vmm)
            .args(["run", "--stats=json", "--rw"])
            .arg(format!("{}:/data", self.data.display()))
            .args(options)
            .arg("--")
            .arg(&self.program)
            .args(with_file(args, "/data"))
            .output()
            .map_err(|e| e.to_string())?;
        let stderr = String::from_utf8_lossy(&out.stderr);
        if !out.status.success() {
            return Err(format!(
                "vmm run bench {args:?} failed: {}: {stderr}",
                out.status
            ));
        }
        Ok((
            parse(&String::from_utf8_lossy(&out.stdout)),
            counters(&stderr),
        ))
    }

    fn rows(&self, workload: &Workload, base: &BTreeMap<String, f64>) -> Result<(), String> {
        let native = self.native(workload.args)?;
        let mut machines = workload.machines.iter();
        machines.try_for_each(|options| self.row(workload, options, &native, base))
    }

    fn row(
        &self,
        workload: &Workload,
        options: Options,
        native: &[Measured],
        base: &BTreeMap<String, f64>,
    ) -> Result<(), String> {
        let (machine, counted) = self.machine(workload.args, options)?;
        let kind = match (workload.machines, options) {
            ([_], _) | (_, []) => String::new(),
            (_, [.., kind]) => format!("{kind}: "),
        };
        for (n, m) in native.iter().zip(&machine) {
            let per = |name: &str| {
                let extra = counted.get(name).unwrap_or(&0.0) - base.get(name).unwrap_or(&0.0);
                extra / m.units
            };
            let size = workload
                .args
                .get(2)
                .filter(|size| **size != FILE)
                .map_or(String::new(), |mib| format!(" ({mib} MiB)"));
            println!(
                "{:<52} {:>10.3} {:>10.3} {:>8.2} {:>8.3} {:>8.3} {:>8.3} {:>9.3}",
                format!("{kind}{}{size}, per {}", m.what, workload.unit),
                n.ns / n.units / 1000.0,
                m.ns / m.units / 1000.0,
                (m.ns / m.units) / (n.ns / n.units),
                per("exits.syscalls"),
                per("exits.page_faults"),
                per("ioctls"),
                per("memory.entries_written"),
            );
        }
        Ok(())
    }
}

fn build(out: &Path) -> Result<PathBuf, String> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../guest/programs/bench.c");
    let program = out.join("bench");
    let status = Command::new("cc")
        .args(["-static", "-O1", "-o"])
        .arg(&program)
        .arg(source)
        .status()
        .map_err(|e| format!("cannot run cc: {e}"))?;
    if status.success() {
        Ok(program)
    } else {
        Err(format!("cc failed: {status}"))
    }
}

fn bench() -> Result<(), String> {
    let dir = tempfile::tempdir().map_err(|e| e.to_string())?;
    let vmm = match std::env::var_os("VMM_BIN") {
        Some(path) => PathBuf::from(path),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/release/vmm"),
    };
    if !vmm.exists() {
        return Err(format!(
            "{} is not there: run `cargo build --release` first",
            vmm.display()
        ));
    }
    let data = dir.path().join("data");
    std::fs::create_dir(&data)
        .and_then(|()| std::fs::write(data.join("file"), vec![1; FILE_MIB << 20]))
        .map_err(|e| format!("{}: {e}", data.display()))?;
    let bench = Bench {
        vmm,
        program: build(dir.path())?,
        data,
    };
    let (_, base) = bench.machine(&["none", "0"], &[])?;
    println!("times in microseconds a unit, of one run; counts a unit, start-up taken off");
    println!(
        "{:<52} {:>10} {:>10} {:>8} {:>8} {:>8} {:>8} {:>9}",
        "", "native", "machine", "ratio", "calls", "faults", "ioctls", "entries"
    );
    WORKLOADS.iter().try_for_each(|w| bench.rows(w, &base))
}

fn main() -> ExitCode {
    match bench() {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("bench: {message}");
            ExitCode::FAILURE
        }
    }
}
