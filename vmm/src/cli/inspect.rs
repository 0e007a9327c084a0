//! `vmm inspect`: the memory of a guest.

use std::fs;
use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use super::guests::guests;
use super::{STATUS_FAILURE, complain, say};
use crate::control::client::{self, AskError};
use crate::control::protocol::{Request, Response};
use crate::control::rundir::{self, RunDirError};
use crate::inspect::text::{self, Style};
use crate::inspect::{FORMAT, Inspection, html};

/// Show the memory of a running or finished guest
///
/// Without GUEST, lists the guests that run. GUEST is the name given with `vmm run --name`, the number of
/// the vmm process, or a file written by `vmm run --report`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Exit status: 0, or 125 if there is no such guest or file, or it cannot be read.")]
pub(super) struct InspectArgs {
    /// A guest's name or number, or a report's file
    #[arg(value_name = "GUEST")]
    guest: Option<String>,

    /// Print JSON instead of text
    #[arg(long, conflicts_with = "html")]
    json: bool,

    /// Write one HTML page with a map of the frames
    #[arg(long, value_name = "FILE", requires = "guest")]
    html: Option<PathBuf>,

    /// Show every mapping of every process too
    #[arg(long, requires = "guest", conflicts_with_all = ["json", "html"])]
    maps: bool,
}

/// Why nothing can be shown.
#[derive(Debug, thiserror::Error)]
enum InspectError {
    #[error(transparent)]
    RunDir(#[from] RunDirError),
    #[error(transparent)]
    Ask(#[from] AskError),
    #[error("no guest `{0}` is running, and there is no such file (vmm inspect lists the guests)")]
    Nothing(String),
    #[error("{path}")]
    Read {
        path: String,
        #[source]
        source: io::Error,
    },
    #[error("{path}: not a report of `vmm run --report`")]
    NoReport {
        path: String,
        #[source]
        source: serde_json::Error,
    },
    #[error("{path}: a report of format {format}, this vmm reads format {FORMAT}")]
    Format { path: String, format: u64 },
    #[error("{path}: cannot be written")]
    Write {
        path: String,
        #[source]
        source: io::Error,
    },
    #[error("cannot be shown")]
    Json(#[from] serde_json::Error),
}

pub(super) fn main(args: &InspectArgs) -> ExitCode {
    let shown = match &args.guest {
        None => list(args.json),
        Some(guest) => show(args, guest),
    };
    let shown = shown.and_then(|text| match io::stdout().write_all(text.as_bytes()) {
        // Who reads has seen enough.
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(InspectError::Write {
            path: "standard output".to_owned(),
            source: error,
        }),
        Ok(()) | Err(_) => Ok(()),
    });
    match shown {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            complain(&error);
            ExitCode::from(STATUS_FAILURE)
        }
    }
}

/// The guests that run.
fn list(json: bool) -> Result<String, InspectError> {
    let guests = guests()?;
    if json {
        return Ok(serde_json::to_string(&guests)? + "\n");
    }
    if guests.is_empty() {
        say("vmm: no guest is running\n");
        return Ok(String::new());
    }
    let mut out = format!("{:<20} {:>8} {:>10}  COMMAND\n", "GUEST", "PID", "SECONDS");
    for hello in guests {
        let command = hello.guest.command.join(" ");
        out += &format!(
            "{:<20} {:>8} {:>10.1}  {}\n",
            hello.guest.id,
            hello.guest.pid,
            hello.uptime_ms as f64 / 1000.0,
            command.replace(char::is_control, "?")
        );
    }
    Ok(out)
}

fn show(args: &InspectArgs, guest: &str) -> Result<String, InspectError> {
    let what = find(guest)?;
    if let Some(path) = &args.html {
        let page = html::render(&what)?;
        fs::write(path, page).map_err(|source| InspectError::Write {
            path: path.display().to_string(),
            source,
        })?;
        return Ok(String::new());
    }
    if args.json {
        return Ok(serde_json::to_string(&what)? + "\n");
    }
    let terminal = io::stdout().is_terminal();
    let style = Style {
        width: terminal
            .then(|| rustix::termios::tcgetwinsize(io::stdout()).ok())
            .flatten()
            .map(|size| usize::from(size.ws_col))
            .filter(|columns| *columns > 0),
        colour: terminal && std::env::var_os("NO_COLOR").is_none(),
        maps: args.maps,
    };
    Ok(text::render(&what, style))
}

/// The running guest of that name, or else the file.
fn find(guest: &str) -> Result<Inspection, InspectError> {
    let request = Request::Inspect { summary: false };
    match client::ask(&rundir::folder(), guest, &request) {
        Ok(Response::Inspect { inspect, .. }) => return Ok(*inspect),
        Ok(_) | Err(AskError::NoGuest(_)) => {}
        Err(AskError::Folder(_)) if Path::new(guest).exists() => {}
        Err(error) => return Err(error.into()),
    }
    if !Path::new(guest).exists() {
        return Err(InspectError::Nothing(guest.to_owned()));
    }
    read(guest)
}

fn read(path: &str) -> Result<Inspection, InspectError> {
    let file = fs::File::open(path).map_err(|source| InspectError::Read {
        path: path.to_owned(),
        source,
    })?;
    let no_report = |source| InspectError::NoReport {
        path: path.to_owned(),
        source,
    };
    // No more of it than it takes to know that it is none.
    let read = serde_json::from_reader(io::BufReader::new(file));
    let value: serde_json::Value = read.map_err(no_report)?;
    match value.get("format").and_then(serde_json::Value::as_u64) {
        Some(format) if format != u64::from(FORMAT) => Err(InspectError::Format {
            path: path.to_owned(),
            format,
        }),
        Some(_) | None => serde_json::from_value(value).map_err(no_report),
    }
}
