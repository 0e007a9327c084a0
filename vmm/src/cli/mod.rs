//! The command line.

use std::process::ExitCode;

use clap::{Parser, Subcommand};

mod boot;
mod doctor;
mod fork;
mod guests;
mod inspect;
mod restore;
mod run;
mod size;
mod snapshot;

pub use size::Size;

/// Exit status of the VMM's own failures.
pub const STATUS_FAILURE: u8 = 125;
/// Exit status when `--timeout` ran out.
pub const STATUS_TIMEOUT: u8 = 124;
/// Exit status when the program was found but cannot be run.
pub const STATUS_NOT_EXECUTABLE: u8 = 126;
/// Exit status when the program was not found.
pub const STATUS_NOT_FOUND: u8 = 127;

/// A KVM hypervisor whose guests fork.
#[derive(Debug, Parser)]
#[command(name = "vmm", version, about, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Run(Box<run::RunArgs>),
    Boot(Box<boot::BootArgs>),
    Doctor(doctor::DoctorArgs),
    Ps(guests::PsArgs),
    Inspect(inspect::InspectArgs),
    Kill(guests::KillArgs),
    Reset(guests::ResetArgs),
    Snapshot(snapshot::SnapshotArgs),
    Restore(Box<restore::RestoreArgs>),
    Freeze(snapshot::FreezeArgs),
    Fork(fork::ForkArgs),
    Pool(fork::pool::PoolArgs),
    #[command(hide = true)]
    RunClones(fork::worker::WorkerArgs),
}

/// How `--stats` is printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum StatsFormat {
    /// A table.
    Text,
    /// One JSON object on the last line.
    Json,
}

fn seconds(text: &str) -> Result<std::time::Duration, String> {
    let number: f64 = text
        .parse()
        .map_err(|_| format!("`{text}` is not a number of seconds"))?;
    match std::time::Duration::try_from_secs_f64(number) {
        Ok(duration) if !duration.is_zero() => Ok(duration),
        _ => Err("a timeout is more than 0 seconds".to_owned()),
    }
}

/// Runs the command line; everything has been said on standard error when it returns.
#[must_use]
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            return refuse(&error);
        }
    };
    start_log();
    match cli.command {
        Command::Run(args) => run::main(&args),
        Command::Boot(args) => boot::main(&args),
        Command::Doctor(args) => doctor::main(&args),
        Command::Ps(args) => guests::ps(&args),
        Command::Inspect(args) => inspect::main(&args),
        Command::Kill(args) => guests::kill(&args),
        Command::Reset(args) => guests::reset(&args),
        Command::Snapshot(args) => snapshot::main(&args),
        Command::Restore(args) => restore::main(&args),
        Command::Freeze(args) => snapshot::freeze(&args),
        Command::Fork(args) => fork::main(&args),
        Command::Pool(args) => fork::pool::main(&args),
        Command::RunClones(args) => fork::worker::main(&args),
    }
}

/// Shows what clap has to say: help and version in full, a mistake as one line.
fn refuse(error: &clap::Error) -> ExitCode {
    use clap::error::ErrorKind;
    if !error.use_stderr() {
        // Asked for: not a failure.
        let _ = error.print();
        return ExitCode::SUCCESS;
    }
    if error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        let _ = error.print();
    } else {
        let given = std::env::args().nth(1).unwrap_or_default();
        let known = [
            "boot", "doctor", "fork", "freeze", "inspect", "kill", "pool", "ps", "reset",
            "restore", "snapshot",
        ];
        let command = known.into_iter().find(|name| *name == given);
        let command = command.unwrap_or("run");
        say(&format!("vmm: {}\n", one_line(&error.to_string(), command)));
    }
    ExitCode::from(STATUS_FAILURE)
}

/// A message of clap's as one line, without its usage; `command` is whose help says more.
fn one_line(message: &str, command: &str) -> String {
    let words: Vec<_> = message
        .lines()
        .take_while(|line| !line.starts_with("Usage:") && !line.starts_with("For more"))
        .flat_map(str::split_whitespace)
        .collect();
    let text = words.join(" ");
    let text = text.strip_prefix("error: ").unwrap_or(&text);
    format!("{text} (see vmm {command} --help)")
}

/// Messages go to standard error; `VMM_LOG` chooses how many (`error` to `trace`, by module).
fn start_log() {
    use std::io::IsTerminal;
    let filter = tracing_subscriber::EnvFilter::try_from_env("VMM_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("warn"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .without_time()
        .with_target(false)
        .init();
}

/// The exit status of what either worked or is complained about.
fn settled<E: std::error::Error>(done: Result<(), E>) -> ExitCode {
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            complain(&error);
            ExitCode::from(STATUS_FAILURE)
        }
    }
}

/// One clear line on standard error: what failed, and every cause.
fn complain(error: &dyn std::error::Error) {
    let text = crate::machine::verbs::chain(error);
    say(&format!("vmm: {text}\n"));
}

/// Writes to standard error. That it may be closed or full changes nothing else.
fn say(text: &str) {
    use std::io::Write;
    let _ = std::io::stderr().write_all(text.as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(words: &[&str]) -> String {
        let words = std::iter::once(&"vmm").chain(words);
        one_line(&Cli::try_parse_from(words).unwrap_err().to_string(), "run")
    }

    #[test]
    fn mistakes_on_the_command_line_are_one_line() {
        assert_eq!(
            said(&["run", "--memory", "x", "true"]),
            "invalid value 'x' for '--memory <SIZE>': `x` is not a size: write a number with K, M, G \
             or T, such as 512M (see vmm run --help)"
        );
        for words in [
            &["run"][..],
            &["run", "--bogus", "true"],
            &["run", "--stats=xml", "true"],
            &["walk"],
        ] {
            let text = said(words);
            assert!(!text.contains('\n') && !text.contains("Usage"), "{text}");
        }
    }
}
