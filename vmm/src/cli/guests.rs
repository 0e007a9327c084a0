//! `vmm ps`, `vmm kill` and `vmm reset`: the guests that run.

use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;

use super::{say, settled};
use crate::control::client::{self, AskError};
use crate::control::protocol::{Hello, Request, Response};
use crate::control::rundir::{self, RunDirError};

/// List the guests that run
#[derive(Debug, clap::Args)]
#[command(after_help = "Exit status: 0, or 125 if the run directories cannot be read.")]
pub(super) struct PsArgs {
    /// Print JSON instead of text
    #[arg(long)]
    json: bool,
}

/// Send a signal to a guest's first program
#[derive(Debug, clap::Args)]
#[command(
    allow_negative_numbers = true,
    after_help = "Exit status: 0 if it was sent, 125 if not."
)]
pub(super) struct KillArgs {
    /// The guest's name or number
    #[arg(value_name = "GUEST")]
    guest: String,

    /// The signal's number or name
    #[arg(long, short = 's', value_name = "SIGNAL", default_value = "KILL", value_parser = signal)]
    signal: i32,
}

/// Have a guest go back to the template or the snapshot that it was made of
///
/// A copy that `vmm fork` has made, or a guest that `vmm restore` goes on with, goes on where it began, in the middle of whatever it
/// does: it drops what it has stored to, and gets its processes, descriptors and files in memory anew. Its name, its standard
/// input, output and error, and what it reads from /dev/vmm are the same.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Exit status: 0 once it goes on, 125 if it does not: there is no such guest, it has ended, or it was not made of a template or a snapshot.")]
pub(super) struct ResetArgs {
    /// The guest's name or number
    #[arg(value_name = "GUEST")]
    guest: String,
}

#[derive(Debug, thiserror::Error)]
enum GuestsError {
    #[error(transparent)]
    RunDir(#[from] RunDirError),
    #[error(transparent)]
    Ask(#[from] AskError),
    #[error("cannot be shown")]
    Json(#[from] serde_json::Error),
    #[error("standard output: cannot be written")]
    Write(#[source] io::Error),
}

/// Signals that have names here.
const SIGNALS: [(&str, i32); 10] = [
    ("HUP", libc::SIGHUP),
    ("INT", libc::SIGINT),
    ("QUIT", libc::SIGQUIT),
    ("KILL", libc::SIGKILL),
    ("USR1", libc::SIGUSR1),
    ("USR2", libc::SIGUSR2),
    ("TERM", libc::SIGTERM),
    ("CONT", libc::SIGCONT),
    ("STOP", libc::SIGSTOP),
    ("TSTP", libc::SIGTSTP),
];

fn signal(text: &str) -> Result<i32, String> {
    let name = text.strip_prefix("SIG").unwrap_or(text);
    let known = SIGNALS.iter().find(|(known, _)| *known == name);
    let number = known.map(|(_, number)| *number);
    let number = number.or_else(|| text.parse().ok().filter(|n| (1..=64).contains(n)));
    number.ok_or_else(|| format!("`{text}` is not a signal"))
}

/// The guests that run, asked who they are.
pub(super) fn guests() -> Result<Vec<Hello>, RunDirError> {
    let folder = rundir::folder();
    let mut guests = Vec::new();
    for id in rundir::list(&folder)? {
        let asked = match client::ask(&folder, &id, &Request::Hello) {
            Ok(Response::Hello { hello, .. }) if hello.clones.is_some() => {
                clones(&folder, &id, &mut guests)
            }
            Ok(Response::Hello { hello, .. }) => {
                guests.push(hello);
                Ok(())
            }
            Ok(_) => Ok(()),
            Err(error) => Err(error),
        };
        match asked {
            // It ended between.
            Ok(()) | Err(AskError::NoGuest(_) | AskError::Ended(_)) => {}
            Err(error) => super::complain(&error),
        }
    }
    Ok(guests)
}

/// Those that share a machine and have no socket of their own.
fn clones(folder: &Path, id: &str, guests: &mut Vec<Hello>) -> Result<(), AskError> {
    let mut from = Some(0);
    while let Some(after) = from {
        let answer = client::ask(folder, id, &Request::Clones { after })?;
        let Response::Clones { clones, next, .. } = answer else {
            return Ok(());
        };
        guests.extend(clones);
        // Numbers that do not grow would never end.
        from = next.filter(|next| *next > after);
    }
    Ok(())
}

fn list(json: bool) -> Result<(), GuestsError> {
    let guests = guests()?;
    let text = if json {
        serde_json::to_string(&guests)? + "\n"
    } else {
        table(&guests)
    };
    match io::stdout().write_all(text.as_bytes()) {
        // Who reads has seen enough.
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(GuestsError::Write(error)),
        Ok(()) | Err(_) => Ok(()),
    }
}

fn table(guests: &[Hello]) -> String {
    if guests.is_empty() {
        say("vmm: no guest is running\n");
        return String::new();
    }
    let mut out = format!(
        "{:<20} {:>8} {:>10} {:<8} COMMAND\n",
        "GUEST", "PID", "SECONDS", "STATE"
    );
    for hello in guests {
        let state = match (hello.ready, hello.pool) {
            (Some(false), _) => "starts",
            (_, Some(_)) => "pool",
            (Some(true), None) => "ready",
            (None, None) => "runs",
        };
        let pool = hello.pool.map(|pool| {
            let (machines, copies) = (pool.machines, pool.copies);
            format!("(machines waiting: {machines}, copies running: {copies}) ")
        });
        out += &format!(
            "{:<20} {:>8} {:>10.1} {state:<8} {}{}\n",
            hello.guest.id,
            hello.guest.pid,
            hello.uptime_ms as f64 / 1000.0,
            pool.unwrap_or_default(),
            hello.guest.command.join(" ").replace(char::is_control, "?")
        );
    }
    out
}

pub(super) fn ps(args: &PsArgs) -> ExitCode {
    settled(list(args.json))
}

pub(super) fn kill(args: &KillArgs) -> ExitCode {
    let request = Request::Kill {
        signal: args.signal,
    };
    settled(client::ask(&rundir::folder(), &args.guest, &request).map(drop))
}

pub(super) fn reset(args: &ResetArgs) -> ExitCode {
    settled(client::ask(&rundir::folder(), &args.guest, &Request::Reset).map(drop))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_have_names_and_numbers() {
        assert_eq!(signal("TERM"), Ok(15));
        assert_eq!(signal("SIGTERM"), Ok(15));
        assert_eq!(signal("9"), Ok(9));
        for bad in ["0", "65", "-1", "TERMINATE", ""] {
            assert!(signal(bad).is_err(), "{bad}");
        }
    }
}
