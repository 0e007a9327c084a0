//! `vmm fork`: live copies of a running guest, each in a machine of its own, or all in one.

use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::process::ExitCode;

use rustix::fs::SealFlags;

use super::snapshot::{VerbError, template};
use super::{STATUS_FAILURE, Size, complain};
use crate::control::rundir::{RunDirError, check_name};
use crate::machine::hardware::{MAX_MEMORY, MIN_MEMORY};
use crate::snapshot::read::{ReadError, Snapshot, Trust};

mod apart;
mod named;
pub(super) mod pool;
mod stock;
mod talk;
mod together;
mod wire;
pub(super) mod worker;

/// Copies in machines of their own, or with names, that are started at most.
const MOST_APART: u32 = 10_000;

/// Start copies of a running guest
///
/// The guest is frozen, unless it has frozen itself (/dev/vmm) or `vmm freeze` has done it, and goes on. Each copy goes on from there, in a machine of
/// its own or in one that all share (--isolation): the memory that none of them changes is there once. The command ends when all have ended; if it is
/// ended before, they end with it.
#[derive(Debug, clap::Args)]
#[command(
    allow_negative_numbers = true,
    after_help = "\
Exit status: 0 if every copy ended with 0, else that of the first that did not; 125 if vmm itself failed."
)]
pub(super) struct ForkArgs {
    /// The guest's name or number, or a pool's name (vmm pool)
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

    /// Standard input of the copies; `%i` stands for a copy's number, from 1; `-` is this command's own [default: nothing to read]
    #[arg(long, value_name = "FILE")]
    stdin: Option<String>,

    /// Standard output of the copies; `%i` stands for a copy's number; without it all write to one file [default: this command's own]
    #[arg(long, value_name = "FILE")]
    stdout: Option<String>,

    /// Standard error of the copies, as --stdout
    #[arg(long, value_name = "FILE")]
    stderr: Option<String>,

    /// Something the copies read from /dev/vmm (repeatable); `%i` stands for a copy's number
    #[arg(long = "env", short = 'e', value_name = "NAME=VALUE", value_parser = super::restore::setting)]
    env: Vec<String>,

    /// Name of the copies for `vmm ps`; the copy's number follows it
    #[arg(long, value_name = "NAME")]
    name: Option<String>,

    /// Processors of each machine [default: as many as the guest has]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=64))]
    cpus: Option<u8>,

    /// Most machines that share a process of the host, 1 to 100; if that fails, all clones in it end [default: 100]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=i64::from(apart::MOST_IN_A_PROCESS)))]
    per_process: Option<u8>,

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
    /// A virtual machine for each; --per-process of them share a process of the host
    Vm,
    /// Page tables: all are in one virtual machine, and in this process, as processes are
    Process,
}

#[derive(Debug, thiserror::Error)]
enum ForkError {
    #[error("-n {0}: that many share a machine: add --isolation process")]
    Many(u32),
    #[error("-n {0}: at most {MOST_APART} copies have names, each with a socket of its own")]
    Names(u32),
    #[error("--memory is for copies that share a machine: add --isolation process")]
    Memory,
    #[error("--per-process is for copies with machines of their own (--isolation vm)")]
    PerProcess,
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
        Isolation::Vm => apart::run(args),
        Isolation::Process if args.name.is_some() && args.count > MOST_APART => {
            Err(ForkError::Names(args.count))
        }
        Isolation::Process if args.per_process.is_some() => Err(ForkError::PerProcess),
        Isolation::Process => together::run(args, template(&args.guest, args.anew)?.1),
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

fn start(source: io::Error) -> ForkError {
    ForkError::Start(source)
}

/// `text` as it is for one copy.
fn numbered(text: &str, number: u32) -> String {
    text.replace("%i", &number.to_string())
}

/// A template that was handed over.
fn opened(template: File) -> Result<Snapshot, ReadError> {
    let trust = match rustix::fs::fcntl_get_seals(&template) {
        Ok(seals) if seals.contains(SealFlags::WRITE) => Trust::Sealed,
        Ok(_) | Err(_) => Trust::Verify,
    };
    Snapshot::from_file(template, "the template".to_owned(), trust, None)
}

#[cfg(test)]
mod testing {
    use clap::Parser;

    use super::ForkArgs;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: ForkArgs,
    }

    /// `vmm fork warm` with these options.
    pub(super) fn args(words: &[&str]) -> ForkArgs {
        let words = ["fork", "warm"].iter().chain(words);
        Line::try_parse_from(words).unwrap().args
    }
}
