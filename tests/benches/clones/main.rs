//! The benchmark of clones: a template of so many MiB, its clones and resets in a warm machine of this process, beside
//! native forks of the same program, and `vmm restore` and `vmm fork` of the same guest.
//!
//! Times are medians and noisy; exits and ioctls are counted and exact.
//! `cargo bench -p tests --bench clones -- [MIB]... [freeze] [warm] [reset] [idle] [cold] [forks] [native]`.
#![expect(unsafe_code, reason = "the time stamp counter")]

mod commands;

use std::error::Error;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use vmm::{Clone, Fork, Guest, Stdio, Template};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const ROUNDS: usize = 30;
const COLD_ROUNDS: usize = 7;
/// Clones that are alive at once when memory is measured.
const IDLE: usize = 40;
/// After which a machine whose guest waits has come to rest.
const RESTS: Duration = Duration::from_secs(3);
/// Memory of the machines besides the template's.
const ROOM_MIB: u64 = 64;

fn tsc() -> u64 {
    // SAFETY: every x86-64 processor has the instruction, and it has no effect.
    unsafe { std::arch::x86_64::_rdtsc() }
}

/// Ticks of the time stamp counter in a microsecond.
fn ticks() -> f64 {
    let (from, started) = (tsc(), Instant::now());
    std::thread::sleep(Duration::from_millis(100));
    (tsc() - from) as f64 / started.elapsed().as_secs_f64() / 1e6
}

fn median(mut all: Vec<f64>) -> f64 {
    all.sort_by(f64::total_cmp);
    all[all.len() / 2]
}

fn micros(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e6
}

/// A clone that has said when it began.
struct Began {
    clone: Clone,
    first: u64,
}

impl Began {
    fn of(mut clone: Clone) -> Result<Self> {
        let first = answer(&mut clone)?;
        Ok(Self { clone, first })
    }

    /// Has it do something; its own time, in microseconds.
    fn has_done(&mut self, what: u8) -> Result<f64> {
        let stdin = self.clone.stdin.as_mut().ok_or("no pipe")?;
        stdin.write_all(&[what])?;
        Ok(answer(&mut self.clone)? as f64 / 1000.0)
    }
}

fn answer(clone: &mut Clone) -> Result<u64> {
    read_number(clone.stdout.as_mut().ok_or("no pipe")?)
}

fn read_number(from: &mut impl Read) -> Result<u64> {
    let mut bytes = [0; 8];
    from.read_exact(&mut bytes)?;
    Ok(u64::from_le_bytes(bytes))
}

/// How long the guest stood still that a template was made of, in microseconds.
fn pause(template: &Template) -> f64 {
    template.pause().unwrap_or_default().as_secs_f64() * 1e6
}

/// A part of the benchmark.
#[derive(Clone, Copy)]
enum Part {
    Freeze,
    Warm,
    Reset,
    Idle,
    Cold,
    Forks,
    Native,
}

const PARTS: [(&str, Part); 7] = [
    ("freeze", Part::Freeze),
    ("warm", Part::Warm),
    ("reset", Part::Reset),
    ("idle", Part::Idle),
    ("cold", Part::Cold),
    ("forks", Part::Forks),
    ("native", Part::Native),
];

struct Bench {
    program: PathBuf,
    vmm: PathBuf,
    mib: u64,
    ticks: f64,
}

impl Bench {
    fn template(&self) -> Result<Template> {
        let warm = Guest::builder(&self.program)
            .arg(self.mib.to_string())
            .memory(self.memory())
            .cpus(1)
            .ready_freeze()
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()?;
        let template = warm.freeze()?;
        self.row(
            "freeze of a guest that waits: it stands still",
            pause(&template),
            "",
        );
        Ok(template)
    }

    /// A machine's memory: page tables take some, and a thirty-second is promised to nobody.
    fn memory(&self) -> u64 {
        (self.mib + self.mib / 4 + ROOM_MIB) << 20
    }

    /// A guest that stores to all of its pages while it is frozen.
    fn live(&self) -> Result<()> {
        let mut warm = Guest::builder(&self.program)
            .arg(self.mib.to_string())
            .memory(self.memory())
            .cpus(1)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let (mut stdin, mut stdout) = (warm.stdin.take(), warm.stdout.take());
        let (stdin, stdout) = (
            stdin.as_mut().ok_or("no pipe")?,
            stdout.as_mut().ok_or("no pipe")?,
        );
        read_number(stdout)?;
        let mut stores = |froze: bool| -> Result<(f64, f64, u64)> {
            let before = warm.report().exits.page_faults;
            stdin.write_all(b"W")?;
            let stood = if froze { pause(&warm.freeze()?) } else { 0.0 };
            let took = read_number(stdout)? as f64 / 1000.0;
            Ok((stood, took, warm.report().exits.page_faults - before))
        };
        stores(false)?;
        let (_, took, faults) = stores(false)?;
        self.row("100 % stored to", took, &format!("{faults} faults"));
        let (stood, took, faults) = stores(true)?;
        self.row("freeze of a guest that stores: it stands still", stood, "");
        self.row(
            "100 % stored to, and frozen meanwhile",
            took,
            &format!("{faults} faults"),
        );
        let (_, took, faults) = stores(false)?;
        self.row(
            "100 % stored to, the next time",
            took,
            &format!("{faults} faults"),
        );
        Ok(())
    }

    fn row(&self, what: &str, micros: f64, more: &str) {
        println!("{:>5} MiB  {what:<58} {micros:>12.1} us  {more}", self.mib);
    }

    /// A clone from its request to its end, in a machine that waits for it.
    fn warm(&self, fork: &Fork) -> Result<()> {
        let (mut instruction, mut output) = (Vec::new(), Vec::new());
        let mut counted = String::new();
        for _ in 0..ROUNDS {
            let (from, started) = (tsc(), Instant::now());
            let began = Began::of(fork.spawn()?)?;
            output.push(micros(started));
            instruction.push(began.first.saturating_sub(from) as f64 / self.ticks);
            let report = began.clone.report();
            let exits = report.exits;
            counted = format!(
                "until the output: {} ioctls, {} calls, {} faults, {} kicks",
                report.ioctls, exits.syscalls, exits.page_faults, exits.kicks
            );
        }
        self.row(
            "clone into a warm machine: first instruction",
            median(instruction),
            "",
        );
        self.row(
            "clone into a warm machine: first output",
            median(output),
            &counted,
        );
        for (what, name) in [
            (b'r', "all pages read once"),
            (b'w', "1 % stored to"),
            (b'W', "100 % stored to"),
        ] {
            let rounds = ROUNDS.min(if self.mib > 100 { 3 } else { ROUNDS });
            let took = (0..rounds).map(|_| Began::of(fork.spawn()?)?.has_done(what));
            let took = median(took.collect::<Result<_>>()?);
            self.row(&format!("clone: {name}, by the clone's clock"), took, "");
        }
        Ok(())
    }

    /// Pages are stored to, and the clone goes back; then it does something else.
    fn reset(&self, fork: &Fork) -> Result<()> {
        for (dirties, what) in [(b'n', "no page"), (b't', "10 pages"), (b'T', "1000 pages")] {
            let rounds = if dirties == b'T' { COLD_ROUNDS } else { ROUNDS };
            let went = (0..rounds).map(|_| self.reset_once(fork, dirties, b'n'));
            let went: Vec<_> = went.collect::<Result<_>>()?;
            let counted = went.last().map(|(_, counted, _)| counted.as_str());
            self.row(
                &format!("reset, {what} stored to before"),
                median(went.iter().map(|(times, _, _)| times[0]).collect()),
                "",
            );
            self.row(
                "  and its first output",
                median(went.iter().map(|(times, _, _)| times[1]).collect()),
                "",
            );
            self.row(
                "  and its answer to the next request",
                median(went.iter().map(|(times, _, _)| times[2]).collect()),
                counted.unwrap_or_default(),
            );
            let again = (0..rounds).map(|_| self.reset_once(fork, dirties, dirties));
            let again: Vec<_> = again.collect::<Result<_>>()?;
            self.row(
                "  or to one that stores to as many again",
                median(again.iter().map(|(times, _, _)| times[2]).collect()),
                again.last().map_or("", |(_, counted, _)| counted),
            );
        }
        for (then, what) in [
            (b't', "10 pages stored to"),
            (b'w', "1 % stored to"),
            (b'W', "100 % stored to"),
            (b'r', "all pages read once"),
        ] {
            let rounds = if self.mib > 100 { 3 } else { COLD_ROUNDS };
            let went = (0..rounds).map(|_| self.reset_once(fork, b't', then));
            let took = went.map(|went| went.map(|(_, _, own)| own));
            let took = median(took.collect::<Result<_>>()?);
            self.row(
                &format!("after a reset: {what}, by the clone's clock"),
                took,
                "",
            );
        }
        Ok(())
    }

    /// A clone that has done something goes back and does something else: microseconds until it is reset, its first output,
    /// and its answer; what was counted until then; and the time that the answer says.
    fn reset_once(&self, fork: &Fork, first: u8, then: u8) -> Result<([f64; 3], String, f64)> {
        let mut began = Began::of(fork.spawn()?)?;
        began.has_done(first)?;
        // As any that is not the first.
        began.clone.reset()?;
        began.first = answer(&mut began.clone)?;
        began.has_done(first)?;
        let started = Instant::now();
        began.clone.reset()?;
        let reset = micros(started);
        began.first = answer(&mut began.clone)?;
        let output = micros(started);
        let took = began.has_done(then)?;
        let answered = micros(started);
        let report = began.clone.report();
        let exits = report.exits;
        let counted = format!(
            "{} ioctls, {} calls, {} faults, {} kicks, {} FPU loads, {} FPU saves",
            report.ioctls,
            exits.syscalls,
            exits.page_faults,
            exits.kicks,
            exits.fpu_loads,
            exits.fpu_saves
        );
        Ok(([reset, output, answered], counted, took))
    }

    /// Memory of the host that a clone takes which waits.
    fn idle(&self, template: &Template, fork: &Fork) -> Result<()> {
        template.warm(0)?;
        let before = available()?;
        let clones: Vec<_> = (0..IDLE)
            .map(|_| Began::of(fork.spawn()?))
            .collect::<Result<_>>()?;
        for (when, wait) in [("has just begun to wait", Duration::ZERO), ("rests", RESTS)] {
            std::thread::sleep(wait);
            let taken = before.saturating_sub(available()?) as f64;
            println!(
                "{:>5} MiB  {:<58} {:>12.1} KiB",
                self.mib,
                format!("a clone in a machine of its own that {when} (of {IDLE})"),
                taken / 1024.0 / clones.len() as f64
            );
        }
        Ok(())
    }

    /// fork(2) of the same program.
    fn native(&self) -> Result<()> {
        let rounds = if self.mib > 100 { "5" } else { "30" };
        let output = Command::new(&self.program)
            .args([&self.mib.to_string(), "native", rounds])
            .output()?;
        let text = String::from_utf8(output.stdout)?;
        let names = [
            "first instruction of the child",
            "1 % stored to",
            "100 % stored to",
            "all pages read once",
        ];
        for (name, ns) in names.iter().zip(text.split_whitespace()) {
            self.row(
                &format!("native fork, pages of 4 KiB: {name}"),
                ns.parse::<f64>()? / 1000.0,
                "",
            );
        }
        Ok(())
    }

    fn run(&self, parts: &[Part], dir: &Path) -> Result<()> {
        let template = self.template()?;
        let mut fork = template.fork();
        fork.stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null());
        template.warm(1)?;
        for part in parts {
            match part {
                Part::Freeze => self.live()?,
                Part::Warm => self.warm(&fork)?,
                Part::Reset => self.reset(&fork)?,
                Part::Idle => self.idle(&template, &fork)?,
                Part::Cold => self.restored(dir)?,
                Part::Forks => self.forks(dir)?,
                Part::Native => self.native()?,
            }
        }
        Ok(())
    }
}

/// Bytes of the host that are available.
fn available() -> Result<u64> {
    let text = std::fs::read_to_string("/proc/meminfo")?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|rest| rest.trim().strip_suffix(" kB"));
    Ok(kib.ok_or("no MemAvailable")?.parse::<u64>()? * 1024)
}

fn bench() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let mut sizes: Vec<u64> = args.iter().filter_map(|arg| arg.parse().ok()).collect();
    if sizes.is_empty() {
        sizes = vec![4, 64, 1024];
    }
    let named = |(name, _): &&(&str, Part)| args.iter().any(|arg| arg == name);
    let mut parts: Vec<Part> = PARTS.iter().filter(named).map(|(_, part)| *part).collect();
    if parts.is_empty() {
        parts = PARTS.map(|(_, part)| part).to_vec();
    }
    let dir = tempfile::tempdir()?;
    let (program, vmm) = (
        tests::programs::folder()?.join("clone_bench"),
        tests::programs::vmm()?,
    );
    for mib in sizes {
        let bench = Bench {
            program: program.clone(),
            vmm: vmm.clone(),
            mib,
            ticks: ticks(),
        };
        bench.run(&parts, dir.path())?;
    }
    Ok(())
}

fn main() -> ExitCode {
    match bench() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}
