//! `vmm fork`: live copies of a running guest, each in a machine and a process of its own, or all in one.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::process::{Child, Command, ExitCode, Stdio};

use super::snapshot::{VerbError, frozen};
use super::{STATUS_FAILURE, Size, complain};
use crate::control::protocol::Request;
use crate::control::rundir::{RunDirError, check_name};
use crate::machine::hardware::{MAX_MEMORY, MIN_MEMORY};

mod together;

/// Copies in machines of their own that are started at most.
const MOST_APART: u32 = 10_000;

/// Start copies of a running guest
///
/// The guest is frozen, unless it has frozen itself (/dev/vmm) or `vmm freeze` has done it, and goes on. Each copy goes on from there, in a machine of
/// its own or in one that all share (--isolation): the memory that none of them changes is there once. The command ends when all have ended; if it is
/// ended before, they end with it.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Exit status: 0 if every copy ended with 0, else that of the first that did not; 125 if vmm itself failed.")]
pub(super) struct ForkArgs {
    /// The guest's name or number
    #[arg(value_name = "GUEST")]
    guest: String,

    /// How many
    #[arg(short = 'n', long = "count", value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=200_000))]
    count: u32,

    /// What keeps the copies apart
    #[arg(long, value_name = "WHAT", value_enum, default_value_t = Isolation::Vm)]
    isolation: Isolation,

    /// Memory of the machine that copies share (--isolation process), page tables included [default: as much as each has, for
    /// each, as far as the host has it]
    #[arg(long, value_name = "SIZE")]
    memory: Option<Size>,

    /// Most that run at once [default: all]
    #[arg(long, short = 'j', value_name = "N", value_parser = clap::value_parser!(u32).range(1..=200_000))]
    jobs: Option<u32>,

    /// Standard input of the copies; `%i` stands for a copy's number, from 1
    #[arg(long, value_name = "FILE")]
    stdin: Option<String>,

    /// Standard output of the copies; `%i` stands for a copy's number
    #[arg(long, value_name = "FILE")]
    stdout: Option<String>,

    /// Something the copies read from /dev/vmm (repeatable); `%i` stands for a copy's number
    #[arg(long = "env", short = 'e', value_name = "NAME=VALUE", value_parser = super::restore::setting)]
    env: Vec<String>,

    /// Name of the copies for `vmm ps`; the copy's number follows it. Not with --isolation process
    #[arg(long, value_name = "NAME")]
    name: Option<String>,

    /// Processors of each machine [default: as many as the guest has]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=64))]
    cpus: Option<u8>,

    /// End each after this many seconds, with status 124
    #[arg(long, value_name = "SECONDS", value_parser = super::seconds)]
    timeout: Option<std::time::Duration>,

    /// Freeze the guest again, even if it is frozen
    #[arg(long)]
    anew: bool,
}

/// What keeps the copies apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Isolation {
    /// A virtual machine, and a process of the host, for each
    Vm,
    /// Page tables: all are in one virtual machine, and in this process, as processes are
    Process,
}

#[derive(Debug, thiserror::Error)]
enum ForkError {
    #[error("--name: copies that share a machine (--isolation process) have no names yet")]
    Nameless,
    #[error("-n {0}: that many share a machine: add --isolation process")]
    Many(u32),
    #[error("--memory is for copies that share a machine: add --isolation process")]
    Memory,
    #[error("--memory {0}: a machine has 8M to 512G")]
    MemorySize(Size),
    #[error(transparent)]
    Together(#[from] together::TogetherError),
    #[error(transparent)]
    Verb(#[from] VerbError),
    #[error(transparent)]
    Name(#[from] RunDirError),
    #[error("{path}")]
    File {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("a copy cannot be started")]
    Start(#[source] io::Error),
}

pub(super) fn main(args: &ForkArgs) -> ExitCode {
    match run(args) {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            complain(&error);
            ExitCode::from(STATUS_FAILURE)
        }
    }
}

fn run(args: &ForkArgs) -> Result<u8, ForkError> {
    if let Some(name) = &args.name {
        check_name(&format!("{name}-{}", args.count))?;
    }
    check_memory(args)?;
    match args.isolation {
        Isolation::Vm if args.count > MOST_APART => Err(ForkError::Many(args.count)),
        Isolation::Vm => run_apart(args, &template(args)?),
        Isolation::Process if args.name.is_some() => Err(ForkError::Nameless),
        Isolation::Process => together::run(args, template(args)?),
    }
}

fn check_memory(args: &ForkArgs) -> Result<(), ForkError> {
    let Some(memory) = args.memory else {
        return Ok(());
    };
    match args.isolation {
        Isolation::Vm => Err(ForkError::Memory),
        Isolation::Process if (MIN_MEMORY..=MAX_MEMORY).contains(&memory.0) => Ok(()),
        Isolation::Process => Err(ForkError::MemorySize(memory)),
    }
}

/// Runs the copies in processes of their own.
fn run_apart(args: &ForkArgs, template: &File) -> Result<u8, ForkError> {
    // The copies get the descriptor under the number it has here.
    let inherited = rustix::io::fcntl_dupfd_cloexec(template, 3).map_err(|e| start(e.into()))?;
    rustix::io::fcntl_setfd(&inherited, rustix::io::FdFlags::empty())
        .map_err(|e| start(e.into()))?;
    let mut copies = Copies::default();
    let most = args.jobs.unwrap_or(args.count) as usize;
    for number in 1..=args.count {
        if copies.running.len() >= most {
            copies.wait_for_one()?;
        }
        let child = copy(args, number, inherited.as_raw_fd())?;
        copies.running.push_back(child);
    }
    drop(inherited);
    while !copies.running.is_empty() {
        copies.wait_for_one()?;
    }
    Ok(copies.status)
}

/// The copies that were started; they are ended if not all could be.
#[derive(Default)]
struct Copies {
    running: VecDeque<Child>,
    /// That of the first that did not end with 0.
    status: u8,
}

impl Copies {
    /// Waits for the one that was started first of those that run.
    fn wait_for_one(&mut self) -> Result<(), ForkError> {
        let Some(child) = self.running.front_mut() else {
            return Ok(());
        };
        let ended = child.wait().map_err(start)?;
        self.running.pop_front();
        if self.status == 0 {
            let code = ended.code().and_then(|code| u8::try_from(code).ok());
            self.status = code.unwrap_or(STATUS_FAILURE);
        }
        Ok(())
    }
}

impl Drop for Copies {
    fn drop(&mut self) {
        for child in &mut self.running {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn start(source: io::Error) -> ForkError {
    ForkError::Start(source)
}

fn template(args: &ForkArgs) -> Result<File, ForkError> {
    if !args.anew
        && let Ok((_, file)) = frozen(&args.guest, &Request::Template)
    {
        return Ok(file);
    }
    Ok(frozen(&args.guest, &Request::Freeze)?.1)
}

/// `text` as it is for one copy.
fn numbered(text: &str, number: u32) -> String {
    text.replace("%i", &number.to_string())
}

fn copy(args: &ForkArgs, number: u32, template: i32) -> Result<Child, ForkError> {
    let open = |pattern: &String, create: bool| {
        let path = PathBuf::from(numbered(pattern, number));
        let opened = if create {
            File::create(&path)
        } else {
            File::open(&path)
        };
        opened.map_err(|source| ForkError::File { path, source })
    };
    let vmm = std::env::current_exe().map_err(start)?;
    let mut command = Command::new(vmm);
    command.args(["restore", "--template", &template.to_string()]);
    let clone = format!("{number}/{}/{}", args.count, args.guest);
    command.args(["--clone", &clone]);
    command.args(["--parent", &std::process::id().to_string()]);
    for setting in &args.env {
        command.arg(format!("--env={}", numbered(setting, number)));
    }
    if let Some(name) = &args.name {
        command.args(["--name", &format!("{name}-{number}")]);
    }
    if let Some(cpus) = args.cpus {
        command.args(["--cpus", &cpus.to_string()]);
    }
    if let Some(timeout) = args.timeout {
        command.args(["--timeout", &timeout.as_secs_f64().to_string()]);
    }
    command.stdin(match &args.stdin {
        Some(pattern) => Stdio::from(open(pattern, false)?),
        None => Stdio::null(),
    });
    if let Some(pattern) = &args.stdout {
        command.stdout(open(pattern, true)?);
    }
    command.spawn().map_err(start)
}
