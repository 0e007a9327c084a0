//! `vmm snapshot` and `vmm freeze`: a running guest, written to a file or kept as a template.

use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::{say, settled};
use crate::control::client::{self, AskError};
use crate::control::protocol::{Frozen, Progress, Request, Response};
use crate::control::rundir;
use crate::memory::FRAME;
use crate::snapshot::read::{ReadError, number_of_file};

/// How often a guest is asked whether it is ready.
const LOOK: Duration = Duration::from_millis(20);
/// How long one may take to appear: the command before this one may have started it.
const APPEARS: Duration = Duration::from_secs(2);

/// Write a running guest to a file
///
/// The guest stands still for a moment, and goes on while its memory is written as it was then. The file appears under its name once all
/// of it is on the disk; until then what was there before stays. A guest that was started with --ready-line
/// is waited for.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Exit status: 0 once the snapshot is on the disk, 125 if it could not be written."
)]
pub(super) struct SnapshotArgs {
    /// The guest's name or number
    #[arg(value_name = "GUEST")]
    guest: String,

    /// The snapshot's file
    #[arg(value_name = "FILE")]
    file: PathBuf,

    /// Write only what is not in this snapshot, which the guest was restored from
    #[arg(long, value_name = "FILE")]
    base: Option<PathBuf>,
}

/// Make a template of a running guest, in memory, for `vmm fork`
///
/// The guest stands still for a moment, and goes on while its memory is copied as it was then. A guest that was started
/// with --ready-line is waited for.
#[derive(Debug, clap::Args)]
#[command(after_help = "Exit status: 0, or 125 if the guest could not be frozen.")]
pub(super) struct FreezeArgs {
    /// The guest's name or number
    #[arg(value_name = "GUEST")]
    guest: String,
}

/// Why nothing was written.
#[derive(Debug, thiserror::Error)]
pub(super) enum VerbError {
    #[error(transparent)]
    Ask(#[from] AskError),
    #[error(transparent)]
    Base(#[from] ReadError),
    #[error("{path}")]
    Path {
        path: String,
        #[source]
        source: io::Error,
    },
    #[error("guest `{0}` answers something else; its vmm may be of another version")]
    Other(String),
}

pub(super) fn main(args: &SnapshotArgs) -> ExitCode {
    settled(write(args))
}

pub(super) fn freeze(args: &FreezeArgs) -> ExitCode {
    settled(frozen(&args.guest, &Request::Freeze).map(|(frozen, _)| {
        say(&format!(
            "vmm: froze {}, {} MiB; it stood still for {}\n",
            args.guest,
            mib(frozen.bytes),
            pause(frozen.pause_us, frozen.pause_pages)
        ));
    }))
}

/// How long a guest stood still, and what was copied in that time.
fn pause(us: u64, pages: u64) -> String {
    let milliseconds = us as f64 / 1000.0;
    match pages {
        0 => format!("{milliseconds:.1} ms"),
        pages => {
            let copied = mib(pages * FRAME as u64);
            format!("{milliseconds:.1} ms, while {copied} MiB of it were copied")
        }
    }
}

fn mib(bytes: u64) -> u64 {
    bytes.div_ceil(1 << 20)
}

fn write(args: &SnapshotArgs) -> Result<(), VerbError> {
    let path = std::path::absolute(&args.file).map_err(|source| VerbError::Path {
        path: args.file.display().to_string(),
        source,
    })?;
    let base = args.base.as_deref().map(number_of_file).transpose()?;
    wait_until_ready(&args.guest)?;
    let request = Request::Snapshot {
        path,
        base: base.map(|id| id.to_string()),
    };
    let (answer, _) = ask(&args.guest, &request)?;
    match answer {
        Response::Written { written, .. } => {
            say(&format!(
                "vmm: wrote {}, {} MiB; the guest stood still for {}\n",
                args.file.display(),
                mib(written.bytes),
                pause(written.pause_us, written.pause_pages)
            ));
            Ok(())
        }
        _ => Err(VerbError::Other(args.guest.clone())),
    }
}

/// Waits for a guest that is being started, or that is to print a line or freeze itself.
pub(super) fn wait_until_ready(guest: &str) -> Result<(), VerbError> {
    let (since, mut seen) = (Instant::now(), false);
    loop {
        match client::ask(&rundir::folder(), guest, &Request::Hello) {
            Ok(Response::Hello { hello, .. }) if hello.ready != Some(false) => return Ok(()),
            Ok(Response::Hello { .. }) => seen = true,
            Ok(_) => return Err(VerbError::Other(guest.to_owned())),
            Err(AskError::NoGuest(_)) if !seen && since.elapsed() < APPEARS => {}
            Err(error) => return Err(error.into()),
        }
        std::thread::sleep(LOOK);
    }
}

/// A guest's template, made or there already.
pub(super) fn frozen(guest: &str, request: &Request) -> Result<(Frozen, File), VerbError> {
    wait_until_ready(guest)?;
    match ask(guest, request)? {
        (Response::Frozen { frozen, .. }, Some(file)) => Ok((frozen, file)),
        _ => Err(VerbError::Other(guest.to_owned())),
    }
}

/// The template that a guest has, or a new one.
pub(super) fn template(guest: &str, anew: bool) -> Result<(Frozen, File), VerbError> {
    if !anew && let Ok(there) = frozen(guest, &Request::Template) {
        return Ok(there);
    }
    frozen(guest, &Request::Freeze)
}

/// Asks, and shows on a terminal how far it is.
fn ask(guest: &str, request: &Request) -> Result<(Response, Option<File>), VerbError> {
    let bar = bar();
    let mut progress = |far: Progress| {
        bar.set_length(far.of.max(far.pages) * FRAME as u64);
        bar.set_position(far.pages * FRAME as u64);
    };
    let answer = client::converse(&rundir::folder(), guest, request, &mut progress);
    bar.finish_and_clear();
    Ok(answer?)
}

/// A bar on standard error, if that is a terminal.
pub(super) fn bar() -> Arc<ProgressBar> {
    let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
    let style = "{bar:30} {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left";
    if let Ok(style) = ProgressStyle::with_template(style) {
        bar.set_style(style);
    }
    Arc::new(bar)
}
