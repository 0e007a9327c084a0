//! The command line.

use std::process::ExitCode;

use clap::{Parser, Subcommand};

mod doctor;
mod run;
mod size;

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
    Doctor(doctor::DoctorArgs),
}

/// Runs the command line; everything has been said on standard error when it returns.
#[must_use]
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are asked for: not a failure.
            let wanted = !error.use_stderr();
            let _ = error.print();
            return ExitCode::from(if wanted { 0 } else { STATUS_FAILURE });
        }
    };
    start_log();
    match cli.command {
        Command::Run(args) => run::main(&args),
        Command::Doctor(args) => doctor::main(&args),
    }
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

/// One clear line on standard error: what failed, and every cause.
fn complain(error: &dyn std::error::Error) {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        if !text.ends_with(&next) {
            text.push_str(": ");
            text.push_str(&next);
        }
        cause = error.source();
    }
    eprintln!("vmm: {text}");
}
