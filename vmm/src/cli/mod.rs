//! The command line.

use std::process::ExitCode;
use std::sync::Arc;

use clap::{CommandFactory, Parser, Subcommand};

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
        Err(_) if number > 0.0 => Err("that is longer than this host can wait".to_owned()),
        Ok(_) | Err(_) => Err("a timeout is more than 0 seconds".to_owned()),
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
    crate::descriptors::raise_limit();
    hear_of_large_files();
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
        say_line(&one_line(&error.to_string(), &given));
    }
    ExitCode::from(STATUS_FAILURE)
}

/// A message of clap's as one line, without its usage; `given` is the command, if there is such a one: its help says more.
fn one_line(message: &str, given: &str) -> String {
    let known = Cli::command();
    let known = known.find_subcommand(given);
    let command = known.map_or(String::new(), |known| format!("{} ", known.get_name()));
    let words: Vec<_> = message
        .lines()
        .take_while(|line| !line.starts_with("Usage:") && !line.starts_with("For more"))
        .flat_map(str::split_whitespace)
        .collect();
    let text = words.join(" ");
    let text = text.strip_prefix("error: ").unwrap_or(&text);
    let text = text.replace(" tip: ", "; ");
    format!("{text} (see vmm {command}--help)")
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

/// A file that may not become as large as it should (`ulimit -f`), the memory of a machine included, is an error of who makes
/// it, and not the end of this process.
fn hear_of_large_files() {
    // That the signal has a handler is enough; what is executed does not inherit it.
    if let Err(error) = signal_hook::flag::register(libc::SIGXFSZ, Arc::default()) {
        tracing::warn!(%error, "a file that gets too large ends vmm");
    }
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
    say_line(&crate::machine::verbs::chain(error));
}

/// What is wrong, as one line. It may have names in it that are no words.
fn say_line(text: &str) {
    say(&format!("{}\n", line(text)));
}

fn line(text: &str) -> String {
    format!("vmm: {text}").replace(char::is_control, "?")
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
        let given = words.clone().nth(1).copied().unwrap_or_default();
        one_line(&Cli::try_parse_from(words).unwrap_err().to_string(), given)
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

    #[test]
    fn tip_is_told_apart_from_the_mistake() {
        assert_eq!(
            said(&["frok"]),
            "unrecognized subcommand 'frok'; a similar subcommand exists: 'fork' (see vmm --help)"
        );
    }

    #[test]
    fn mistakes_name_the_help_that_there_is() {
        for (words, help) in [
            (&["walk"][..], "(see vmm --help)"),
            (&["--walk"], "(see vmm --help)"),
            (&["run", "--walk"], "(see vmm run --help)"),
            (&["fork"], "(see vmm fork --help)"),
            (&["freeze", "a", "b"], "(see vmm freeze --help)"),
        ] {
            let text = said(words);
            assert!(text.ends_with(help), "{text}");
        }
    }

    #[test]
    fn negative_numbers_are_told_apart_from_options() {
        for words in [
            &["fork", "warm", "-n", "-1"][..],
            &["fork", "warm", "--timeout", "-1"],
            &["pool", "warm", "-m", "-1"],
            &["run", "--cpus", "-1", "true"],
            &["restore", "--timeout", "-1", "file"],
            &["kill", "warm", "--signal", "-1"],
        ] {
            let text = said(words);
            assert!(text.starts_with("invalid value '-1' for '--"), "{text}");
        }
    }

    #[test]
    fn names_with_ends_of_lines_leave_a_message_one_line() {
        assert_eq!(
            line("no guest `a\nb\x1b[2J` is running"),
            "vmm: no guest `a?b?[2J` is running"
        );
    }

    #[test]
    fn times_that_no_clock_has_are_told_apart() {
        assert_eq!(seconds("0.5"), Ok(std::time::Duration::from_millis(500)));
        for (text, why) in [
            ("0", "more than 0"),
            ("-1", "more than 0"),
            ("nan", "more than 0"),
            ("1e300", "longer than"),
            ("inf", "longer than"),
            ("soon", "not a number"),
        ] {
            assert!(seconds(text).unwrap_err().contains(why), "{text}");
        }
    }
}
