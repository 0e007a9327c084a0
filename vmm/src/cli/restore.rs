//! `vmm restore`: a guest out of a snapshot.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use super::run::finish;
use super::snapshot::bar;
use super::{STATUS_FAILURE, Size, StatsFormat, complain, say, seconds};
use crate::machine::hardware;
use crate::machine::restored::{Choice, RestoreConfig, restore};
use crate::snapshot::guest::{OpenError, open_guest};
use crate::snapshot::read::{Check, ReadError, Snapshot};
use crate::snapshot::records::{Identity, Records, Role};

/// Go on with the guest of a snapshot
///
/// The guest goes on where it was, with the standard input, output and error of this command. Its memory is
/// read when it is used. It sees the same directories of the host as before, and files that it has open must
/// be what they were. A snapshot that somebody has written to since, or that is a copy, is looked at as a whole before.
#[derive(Debug, clap::Args)]
#[command(
    allow_negative_numbers = true,
    after_help = "\
Exit status: as of `vmm run`; 125 if the snapshot is damaged, in which case nothing of it has run. A disk that loses bits of \
a file nobody writes to is noticed when the page is read: the guest then ends with 125, and has seen no wrong byte."
)]
pub(super) struct RestoreArgs {
    /// The snapshot's file
    #[arg(value_name = "FILE")]
    file: PathBuf,

    /// The snapshot that FILE builds on (repeatable: the one that builds on none first)
    #[arg(long, value_name = "FILE")]
    base: Vec<PathBuf>,

    /// Whether every page of the snapshot, and of what it builds on, is looked at before the guest goes on
    #[arg(long, value_name = "WHEN", num_args = 0..=1, require_equals = true, default_value = "auto", default_missing_value = "always")]
    verify: Verify,

    /// Give the guest the directories and files of this host that a snapshot of another user names
    #[arg(long)]
    allow_dirs: bool,

    /// Memory of the machine [default: as it was]
    #[arg(long, value_name = "SIZE")]
    memory: Option<Size>,

    /// Where a page file goes, if the guest had one [default: $TMPDIR, or /var/tmp]
    #[arg(long, value_name = "DIR")]
    page_file_dir: Option<PathBuf>,

    /// Processors of the machine [default: as many as it had]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=64))]
    cpus: Option<u8>,

    /// Show every system call on standard error
    #[arg(long)]
    strace: bool,

    /// Name of the machine for `vmm ps` and the commands that take one [default: the number of the vmm
    /// process]
    #[arg(long, value_name = "NAME")]
    name: Option<String>,

    /// Write what `vmm inspect` shows to a file: the memory as the program's end found it
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,

    /// Print what was counted on standard error at the end
    #[arg(long, value_name = "FORMAT", num_args = 0..=1, require_equals = true, default_missing_value = "text")]
    stats: Option<StatsFormat>,

    /// End the machine after this many seconds, with status 124
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    timeout: Option<Duration>,

    /// Something the guest reads from /dev/vmm (repeatable)
    #[arg(long = "env", short = 'e', value_name = "NAME=VALUE", value_parser = setting)]
    env: Vec<String>,
}

/// When all of a snapshot is looked at before anything runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Verify {
    /// If somebody may have written to the file since `vmm snapshot`, and if it is a copy.
    Auto,
    /// Always.
    Always,
    /// Never: a page is looked at when it is read.
    Never,
}

/// A line that the guest will read.
pub(super) fn setting(text: &str) -> Result<String, String> {
    match text.split_once('=') {
        _ if text.contains('\n') => Err("a value has no ends of lines".to_owned()),
        Some((name, _)) if !name.is_empty() => Ok(text.to_owned()),
        _ => Err("write NAME=VALUE".to_owned()),
    }
}

/// Why a snapshot is not made a guest.
#[derive(Debug, thiserror::Error)]
enum RefusedError {
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error(
        "{path}: user {owner} made it, and it gives the guest {what} of this host; if that is right, say --allow-dirs"
    )]
    Foreign {
        path: String,
        owner: u32,
        what: String,
    },
}

pub(super) fn main(args: &RestoreArgs) -> ExitCode {
    let opened = open(args).map_err(RefusedError::from);
    let opened = opened.and_then(|snapshot| {
        let guest = open_guest(&snapshot)?;
        check_host_files(args, &snapshot, &guest.1)?;
        Ok((snapshot, guest))
    });
    let (snapshot, guest) = match opened {
        Ok(opened) => opened,
        Err(error) => {
            complain(&error);
            return ExitCode::from(STATUS_FAILURE);
        }
    };
    let (least, most) = (Size(hardware::MIN_MEMORY), Size(hardware::MAX_MEMORY));
    if let Some(memory) = args.memory.filter(|size| !(least..=most).contains(size)) {
        say(&format!(
            "vmm: --memory {memory}: a machine has {least} to {most}\n"
        ));
        return ExitCode::from(STATUS_FAILURE);
    }
    let config = RestoreConfig {
        snapshot: Arc::new(snapshot),
        identity: Identity {
            role: Role::Restored,
            settings: args.env.iter().map(|pair| pair.clone().into()).collect(),
        },
        choice: Choice {
            memory: args.memory.map(|size| size.0),
            page_file_dir: super::run::page_file_dir(args.page_file_dir.as_ref()),
            cpus: args.cpus.map(usize::from),
            strace: args.strace,
        },
        name: args.name.clone(),
        report: args.report.clone(),
        timeout: args.timeout,
    };
    finish(restore(&config, guest), args.stats)
}

/// Says which directories of the host the guest gets; somebody else's snapshot gets none unless that was said.
fn check_host_files(
    args: &RestoreArgs,
    snapshot: &Snapshot,
    records: &Records,
) -> Result<(), RefusedError> {
    let directories = records.host_directories();
    let files = records.host_files();
    let shown = |path: &Path| path.display().to_string().replace(char::is_control, "?");
    let own = rustix::process::geteuid().as_raw();
    let owner = rustix::fs::fstat(snapshot.file()).map_or(u32::MAX, |stat| stat.st_uid);
    let first = directories.first().map(|directory| &directory.path);
    if let Some(first) = first.or(files.first())
        && owner != own
        && !args.allow_dirs
    {
        return Err(RefusedError::Foreign {
            path: snapshot.path().to_owned(),
            owner,
            what: shown(first),
        });
    }
    for directory in directories {
        let rights = if directory.writable {
            "writable"
        } else {
            "read-only"
        };
        say(&format!(
            "vmm: the guest sees {}, {rights}\n",
            shown(&directory.path)
        ));
    }
    Ok(())
}

fn open(args: &RestoreArgs) -> Result<Snapshot, ReadError> {
    let mut base = None;
    for path in &args.base {
        base = Some(Arc::new(Snapshot::open(path, base.take())?));
    }
    let snapshot = Snapshot::open(&args.file, base)?;
    let which = match args.verify {
        Verify::Auto => Check::Changed,
        Verify::Always => Check::All,
        Verify::Never => Check::Nothing,
    };
    let bytes = snapshot.bytes_to_check(which);
    if bytes > 0 {
        let bar = bar();
        bar.set_length(bytes);
        let checked = snapshot.check(which, &mut |bytes| bar.inc(bytes));
        bar.finish_and_clear();
        checked?;
    }
    Ok(snapshot)
}
