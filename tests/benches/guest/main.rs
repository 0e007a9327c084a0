//! The benchmark: the same program natively and in a machine, times beside exits.
//!
//! Times are of one run and noisy; exits are counted and exact: those of a whole workload, less those of a
//! run that only gets there (one without forks, one that stores nothing after its fork).
//!
//! `cargo bench -p tests --bench guest -- [WORKLOAD [MIB]]`; the workload `work` is the memory manager's own work without a machine. `VMM_BENCH_HOST=npt` (or `shadow`) runs it in the emulated machine with
//! nested (or shadow) paging, the native program in that same machine. Environment: `VMM_BIN`.

#[path = "../shared/mod.rs"]
mod shared;
mod work;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use shared::FOLDER;

/// Options of a machine.
type Options = &'static [&'static str];

/// A workload: its arguments, those of a run that only gets to what is counted, what its units are called, and the
/// machines it is run in.
struct Workload {
    args: &'static [&'static str],
    without: &'static [&'static str],
    unit: &'static str,
    machines: &'static [Options],
}

/// A program that starts and ends.
const NONE: &[&str] = &["none", "0"];

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
        without: NONE,
        unit: "call",
        machines: DEFAULT,
    },
    Workload {
        args: &["clock", "100000"],
        without: NONE,
        unit: "call",
        machines: DEFAULT,
    },
    Workload {
        args: &["touch", "1", "64"],
        without: NONE,
        unit: "page",
        machines: DEFAULT,
    },
    Workload {
        args: &["scatter", "1", "64"],
        without: NONE,
        unit: "page",
        machines: DEFAULT,
    },
    Workload {
        args: &["cow", "1", "64"],
        without: NONE,
        unit: "page",
        machines: DEFAULT,
    },
    Workload {
        args: &["fork", "100", "1"],
        without: &["fork", "0", "1"],
        unit: "fork",
        machines: BOTH,
    },
    Workload {
        args: &["fork", "100", "4"],
        without: &["fork", "0", "4"],
        unit: "fork",
        machines: BOTH,
    },
    Workload {
        args: &["fork", "50", "16"],
        without: &["fork", "0", "16"],
        unit: "fork",
        machines: BOTH,
    },
    Workload {
        args: &["fork", "20", "128"],
        without: &["fork", "0", "128"],
        unit: "fork",
        machines: BOTH,
    },
    Workload {
        args: &["fork", "10", "512"],
        without: &["fork", "0", "512"],
        unit: "fork",
        machines: BOTH_LARGE,
    },
    Workload {
        args: &["fork", "20", "4096"],
        without: &["fork", "0", "4096"],
        unit: "fork",
        machines: BOTH_HUGE,
    },
    Workload {
        args: &["exec", "50"],
        without: NONE,
        unit: "process",
        machines: BOTH,
    },
    Workload {
        args: &["file", "1", FILE],
        without: NONE,
        unit: "page",
        machines: DEFAULT,
    },
    Workload {
        args: &["file-scattered", "1", FILE],
        without: NONE,
        unit: "page",
        machines: DEFAULT,
    },
    Workload {
        args: &["again", "1", "64"],
        without: NONE,
        unit: "page",
        machines: SMALL,
    },
    Workload {
        args: &["again-scattered", "1", "64"],
        without: NONE,
        unit: "page",
        machines: SMALL,
    },
    Workload {
        args: &["after-read", "7", "128"],
        without: &["after-nothing", "7", "128"],
        unit: "page",
        machines: BOTH,
    },
    Workload {
        args: &["after-write-1", "7", "128"],
        without: &["after-nothing", "7", "128"],
        unit: "page",
        machines: BOTH,
    },
    Workload {
        args: &["after-write-100", "7", "128"],
        without: &["after-nothing", "7", "128"],
        unit: "page",
        machines: BOTH,
    },
    Workload {
        args: &["after-write-1", "3", "1024"],
        without: &["after-nothing", "3", "1024"],
        unit: "page",
        machines: BOTH_LARGE,
    },
    Workload {
        args: &["after-write-100", "3", "256"],
        without: &["after-nothing", "3", "256"],
        unit: "page",
        machines: BOTH,
    },
];

/// What is shown of what was counted.
const COUNTERS: [&str; 4] = [
    "exits.syscalls",
    "exits.page_faults",
    "ioctls",
    "memory.entries_written",
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

    /// Nanoseconds of the line that has this in its name.
    fn native_time(&self, args: &[&str], what: &str) -> Result<f64, String> {
        let lines = self.native(args)?;
        let line = lines.iter().find(|line| line.what.contains(what));
        line.map(|line| line.ns)
            .ok_or_else(|| format!("no {what:?} in {args:?}"))
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

    fn rows(&self, workload: &Workload) -> Result<(), String> {
        let native = self.native(workload.args)?;
        let mut machines = workload.machines.iter();
        machines.try_for_each(|options| self.row(workload, options, &native))
    }

    fn row(
        &self,
        workload: &Workload,
        options: Options,
        native: &[Measured],
    ) -> Result<(), String> {
        let (_, base) = self.machine(workload.without, options)?;
        let (machine, counted) = self.machine(workload.args, options)?;
        let kind = match (workload.machines, options) {
            ([_], _) | (_, []) => String::new(),
            (_, [.., kind]) => format!("{kind}: "),
        };
        let size = workload
            .args
            .get(2)
            .filter(|size| **size != FILE)
            .map_or(String::new(), |mib| format!(" ({mib} MiB)"));
        for (line, (n, m)) in native.iter().zip(&machine).enumerate() {
            print!(
                "{:<58} {:>10.3} {:>10.3} {:>8.2}",
                format!("{kind}{}{size}, per {}", m.what, workload.unit),
                n.ns / n.units / 1000.0,
                m.ns / m.units / 1000.0,
                (m.ns / m.units) / (n.ns / n.units),
            );
            // They are not of one line's time.
            for name in COUNTERS.iter().filter(|_| line == 0) {
                let of = |run: &BTreeMap<String, f64>| *run.get(*name).unwrap_or(&0.0);
                print!(" {:>9.3}", (of(&counted) - of(&base)) / m.units);
            }
            println!();
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

/// What was asked for.
fn asked() -> impl Iterator<Item = String> {
    std::env::args().skip(1).filter(|arg| !arg.starts_with('-'))
}

/// Those that were asked for by name, and size; all, if none was.
fn chosen() -> impl Iterator<Item = &'static Workload> {
    let asked: Vec<String> = asked().collect();
    let is_asked = move |workload: &&Workload| {
        let (name, size) = (workload.args[0], workload.args.get(2));
        let named = asked.first().is_none_or(|asked| asked == name);
        named && asked.get(1).is_none_or(|asked| size == Some(&&**asked))
    };
    WORKLOADS.iter().filter(is_asked)
}

/// This program again, in the emulated machine.
fn in_rig(host: &str, vmm: &Path, program: &Path) -> Result<(), String> {
    let this = std::env::current_exe().map_err(|e| e.to_string())?;
    let mut command = shared::rig(host, vmm)?;
    let place = format!("{FOLDER}/program");
    command.args(["--mem", "5120", "--add"]);
    command.arg(format!("{}:{place}", program.display()));
    command.args(["--env", &format!("VMM_BENCH_PROGRAM={place}")]);
    command.arg("--").arg(this);
    shared::run(command.args(std::env::args().skip(1)))
}

fn bench() -> Result<(), String> {
    let dir = tempfile::tempdir().map_err(|e| e.to_string())?;
    let vmm = shared::vmm()?;
    let program = match std::env::var_os("VMM_BENCH_PROGRAM") {
        Some(program) => PathBuf::from(program),
        None => build(dir.path())?,
    };
    if let Ok(host) = std::env::var("VMM_BENCH_HOST") {
        return in_rig(&host, &vmm, &program);
    }
    let data = dir.path().join("data");
    std::fs::create_dir(&data)
        .and_then(|()| std::fs::write(data.join("file"), vec![1; FILE_MIB << 20]))
        .map_err(|e| format!("{}: {e}", data.display()))?;
    let bench = Bench { vmm, program, data };
    println!("times in microseconds a unit, of one run; counts a unit, of the whole workload");
    println!(
        "{:<58} {:>10} {:>10} {:>8} {:>9} {:>9} {:>9} {:>9}",
        "", "native", "machine", "ratio", "calls", "faults", "ioctls", "entries"
    );
    chosen().try_for_each(|workload| bench.rows(workload))?;
    let mut asked = asked();
    match asked.next().as_deref() {
        None | Some("work") => work::table(|args, what| bench.native_time(args, what)),
        Some(_) => Ok(()),
    }
}

fn main() -> ExitCode {
    shared::end(bench())
}
