//! `vmm run`: a program in a virtual machine.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use super::{
    STATUS_FAILURE, STATUS_NOT_EXECUTABLE, STATUS_NOT_FOUND, Size, StatsFormat, complain, say,
    say_line, seconds,
};
use crate::config::{Commit, ForkMode, Mount, PageFileConfig, ReadyWhen, RunConfig};
use crate::machine::{self, Ended, RunError, hardware};

/// Run an unmodified Linux program in a virtual machine
///
/// The program runs in ring 3 of a machine of its own, without a guest kernel. Without --root it
/// sees only itself, its interpreter and its libraries; no process, environment variable or device of
/// the host is visible to it.
#[derive(Debug, clap::Args)]
#[command(
    allow_negative_numbers = true,
    override_usage = "vmm run [OPTIONS] [--] PROGRAM [ARGS]...",
    after_help = "\
Exit status: the program's; 128+N if signal N ended it; 124 if --timeout ran out; 125 if vmm itself \
failed; 126 if the program cannot be executed; 127 if it was not found. `vmm doctor` tells whether \
this host can run guests."
)]
pub(super) struct RunArgs {
    /// Memory of the machine, page tables included
    #[arg(long, value_name = "SIZE", default_value = "1G")]
    memory: Size,

    /// Let the guests' memory be larger than the machine's by this much: pages not used for long are
    /// kept in an unnamed file
    #[arg(long, value_name = "SIZE")]
    page_file: Option<Size>,

    /// Put the page file there [default: $TMPDIR, or /var/tmp]
    #[arg(long, value_name = "DIR", requires = "page_file")]
    page_file_dir: Option<PathBuf>,

    /// Grant programs memory that there may not be, and kill one that then uses too much
    #[arg(long)]
    overcommit: bool,

    /// Grant one process that much private memory at most
    #[arg(long, value_name = "SIZE")]
    process_memory: Option<Size>,

    /// How a process's memory is copied by fork: `shared` shares the page tables until one side changes
    /// something in them, `eager` visits every page at once
    #[arg(long, value_name = "MODE", value_enum, default_value_t = Fork::Shared)]
    fork: Fork,

    /// Show this host directory, read-only, as the guest's /
    #[arg(long, value_name = "DIR")]
    root: Option<PathBuf>,

    /// Show a host directory, writable, at the same or another path (repeatable)
    #[arg(long, value_name = "HOST[:GUEST]")]
    rw: Vec<OsString>,

    /// Put an empty in-memory file system there (repeatable)
    #[arg(long, value_name = "PATH")]
    tmpfs: Vec<OsString>,

    /// Start in this directory of the guest
    #[arg(long, value_name = "DIR", default_value = "/")]
    workdir: OsString,

    /// Set an environment variable (repeatable); the host's are not passed on
    #[arg(long = "env", short = 'e', value_name = "NAME=VALUE")]
    env: Vec<OsString>,

    /// Show every system call on standard error
    #[arg(long)]
    strace: bool,

    /// Find memory errors: guard pages around anonymous mappings and the heap, unmapped memory stays
    /// inaccessible, bytes behind the requested length are checked; what is found is told on standard
    /// error
    #[arg(long)]
    guard_alloc: bool,

    /// Name of the machine for `vmm ps` and the commands that take one [default: the number of the vmm process]
    #[arg(long, value_name = "NAME")]
    name: Option<String>,

    /// The guest is ready once it prints this line: what `vmm freeze` and `vmm snapshot` wait for
    #[arg(long, value_name = "TEXT")]
    ready_line: Option<OsString>,

    /// The guest is ready once it has frozen itself, by writing `freeze` to /dev/vmm: what `vmm fork` waits for
    #[arg(long, requires = "name", conflicts_with = "ready_line")]
    ready_freeze: bool,

    /// Write what `vmm inspect` shows to a file: the memory as the program's end found it
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,

    /// Print what was counted on standard error at the end
    #[arg(long, value_name = "FORMAT", num_args = 0..=1, require_equals = true, default_missing_value = "text")]
    stats: Option<StatsFormat>,

    /// End the machine after this many seconds, with status 124
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    timeout: Option<Duration>,

    /// Processes the machine may have at once; fork gives EAGAIN beyond
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = clap::value_parser!(u32).range(1..=32_000))]
    max_procs: u32,

    /// Processors of the machine [default: the host's]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=64))]
    cpus: Option<u8>,

    /// The program, looked up in PATH on the host, or in the guest's with --root, and its arguments
    #[arg(
        value_name = "PROGRAM [ARGS]",
        required = true,
        num_args = 1..,
        trailing_var_arg = true
    )]
    command: Vec<OsString>,
}

/// Ways of forking.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Fork {
    Shared,
    Eager,
}

impl RunArgs {
    fn config(&self) -> Result<RunConfig, String> {
        let (least, most) = (Size(hardware::MIN_MEMORY), Size(hardware::MAX_MEMORY));
        if !(least..=most).contains(&self.memory) {
            return Err(format!(
                "--memory {}: a machine has {least} to {most}",
                self.memory
            ));
        }
        let page_file = self.page_file.map(|size| PageFileConfig {
            bytes: size.0,
            dir: page_file_dir(self.page_file_dir.as_ref()),
        });
        let mut mounts = Vec::new();
        for spec in &self.rw {
            let bytes = spec.clone().into_vec();
            let (host, guest) = match bytes.iter().position(|&b| b == b':') {
                Some(at) => (bytes[..at].to_vec(), bytes[at + 1..].to_vec()),
                None => (bytes.clone(), bytes.clone()),
            };
            let host = PathBuf::from(OsString::from_vec(host));
            let guest = if guest.starts_with(b"/") {
                guest
            } else {
                // `--rw data` shows ./data at its own absolute path.
                std::fs::canonicalize(OsString::from_vec(guest))
                    .map_err(|e| format!("--rw {}: {e}", spec.display()))?
                    .into_os_string()
                    .into_vec()
            };
            mounts.push(Mount::ReadWrite { host, guest });
        }
        for path in &self.tmpfs {
            let guest = path.clone().into_vec();
            if !guest.starts_with(b"/") {
                return Err(format!("--tmpfs {}: give an absolute path", path.display()));
            }
            mounts.push(Mount::Tmpfs { guest });
        }
        let mut env = Vec::new();
        for pair in &self.env {
            let bytes = pair.clone().into_vec();
            match bytes.iter().position(|&b| b == b'=') {
                Some(at) if at > 0 => env.push((bytes[..at].to_vec(), bytes[at + 1..].to_vec())),
                _ => return Err(format!("--env {}: write NAME=VALUE", pair.display())),
            }
        }
        if let Some(line) = &self.ready_line
            && line.as_encoded_bytes().contains(&b'\n')
        {
            return Err("--ready-line: give one line, without its end".to_owned());
        }
        let mut words = self.command.iter().map(|word| word.clone().into_vec());
        let host_cpus = std::thread::available_parallelism().map_or(1, usize::from);
        Ok(RunConfig {
            memory: self.memory.0,
            page_file,
            commit: if self.overcommit {
                Commit::Over
            } else {
                Commit::Limited
            },
            process_memory: self.process_memory.map(|size| size.0),
            fork: match self.fork {
                Fork::Shared => ForkMode::Shared,
                Fork::Eager => ForkMode::Eager,
            },
            root: self.root.clone(),
            mounts,
            workdir: self.workdir.clone().into_vec(),
            env,
            strace: self.strace,
            guard_alloc: self.guard_alloc,
            name: self.name.clone(),
            report: self.report.clone(),
            ready: match &self.ready_line {
                Some(line) => Some(ReadyWhen::Printed(line.clone().into_vec())),
                None => self.ready_freeze.then_some(ReadyWhen::Frozen),
            },
            timeout: self.timeout,
            max_procs: self.max_procs as usize,
            cpus: self.cpus.map_or(host_cpus.min(64), usize::from),
            program: words.next().ok_or("give a PROGRAM to run")?,
            args: words.collect(),
        })
    }
}

pub(super) fn main(args: &RunArgs) -> ExitCode {
    let config = match args.config() {
        Ok(config) => config,
        Err(message) => {
            say_line(&message);
            return ExitCode::from(STATUS_FAILURE);
        }
    };
    finish(machine::run(&config), args.stats)
}

/// Where the page file is put: not in /tmp by itself, which often is memory.
pub(super) fn page_file_dir(given: Option<&PathBuf>) -> PathBuf {
    let temporary = || std::env::var_os("TMPDIR").filter(|dir| !dir.is_empty());
    match given {
        Some(dir) => dir.clone(),
        None => temporary().map_or_else(|| PathBuf::from("/var/tmp"), PathBuf::from),
    }
}

/// Says how a machine ended.
pub(super) fn finish(ended: Result<Ended, RunError>, stats: Option<StatsFormat>) -> ExitCode {
    match ended {
        Ok(ended) => {
            match stats {
                None => {}
                Some(StatsFormat::Text) => say(&ended.report.to_string()),
                Some(StatsFormat::Json) => match serde_json::to_string(&ended.report) {
                    Ok(text) => say(&format!("{text}\n")),
                    Err(error) => complain(&error),
                },
            }
            ExitCode::from(ended.status())
        }
        Err(error) => {
            complain(&error);
            ExitCode::from(match error {
                RunError::NotFound { .. } | RunError::Hidden { .. } => STATUS_NOT_FOUND,
                RunError::NotExecutable { .. } => STATUS_NOT_EXECUTABLE,
                _ => STATUS_FAILURE,
            })
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        run: RunArgs,
    }

    fn parsed(words: &[&str]) -> RunConfig {
        let words = std::iter::once(&"vmm").chain(words);
        Line::try_parse_from(words).unwrap().run.config().unwrap()
    }

    #[test]
    fn options_after_the_program_are_the_programs() {
        for before in [&["--strace"][..], &["--strace", "--"]] {
            let after = ["echo", "--help", "-V", "--", "--stats"];
            let config = parsed(&[before, &after].concat());
            assert_eq!(config.program, b"echo");
            assert_eq!(
                config.args,
                [&b"--help"[..], b"-V", b"--", b"--stats"].map(<[u8]>::to_vec)
            );
            assert!(config.strace);
        }
    }

    #[test]
    fn ready_line_that_no_line_can_be_is_refused() {
        for text in ["READY\n", "two\nlines"] {
            let words = ["vmm", "--ready-line", text, "true"];
            let config = Line::try_parse_from(words).unwrap().run.config();
            assert!(config.unwrap_err().starts_with("--ready-line"));
        }
    }

    #[test]
    fn unknown_option_before_the_program_is_refused() {
        assert!(Line::try_parse_from(["vmm", "--bogus", "true"]).is_err());
    }
}
