//! A process that runs clones for `vmm fork`, each in a machine of its own ([`super::apart`] says why and how many).
//!
//! It reads orders from a socket that is its standard input ([`super::talk`]), for clones of one template
//! ([`super::stock`]). When the socket is closed, or `vmm fork` has ended, the process ends, whatever it was doing.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::process::ExitCode;
use std::sync::Arc;

use super::stock::{Stock, StockError};
use super::talk::{Numbers, Talk, TalkError};
use super::wire::{Line, Order};
use crate::cli::{STATUS_FAILURE, complain};

/// How `vmm fork` starts its clones
#[derive(Debug, clap::Args)]
pub(in crate::cli) struct WorkerArgs {
    /// The process that waits for the clones, and with which they end
    #[arg(long, value_name = "PID", value_parser = clap::value_parser!(i32).range(1..))]
    parent: i32,
}

#[derive(Debug, thiserror::Error)]
enum WorkerError {
    #[error("the vmm fork that started this process has ended")]
    Alone,
    #[error(transparent)]
    Talk(#[from] TalkError),
    #[error(transparent)]
    Stock(#[from] StockError),
}

pub(in crate::cli) fn main(args: &WorkerArgs) -> ExitCode {
    let served = end_with(args.parent).and_then(|()| serve());
    if let Err(error) = &served {
        complain(error);
    }
    // Without taking down what is left: nobody waits for it any more.
    std::process::exit(i32::from(match served {
        Ok(()) => 0,
        Err(_) => STATUS_FAILURE,
    }))
}

/// Clones do not outlive the `vmm fork` that waits for them, however that ends.
fn end_with(parent: i32) -> Result<(), WorkerError> {
    use rustix::process::{Pid, Signal, getppid, set_parent_process_death_signal};
    if let Err(error) = set_parent_process_death_signal(Some(Signal::KILL)) {
        tracing::warn!(%error, "clones may outlive vmm fork for a moment");
    }
    // There is no signal for one that had ended before; but then the parent is another process by now.
    match getppid().map(Pid::as_raw_pid) == Some(parent) {
        true => Ok(()),
        false => Err(WorkerError::Alone),
    }
}

/// Takes orders until there is nobody to give any.
fn serve() -> Result<(), WorkerError> {
    let line = line().map_err(TalkError::Line)?;
    let Some((order, with)) = line.hear().map_err(TalkError::Line)? else {
        return Ok(());
    };
    let (Order::Serve(lot), Ok([template])) = (order, <[OwnedFd; 1]>::try_from(with)) else {
        return Err(TalkError::Order.into());
    };
    let stock = Stock::open(File::from(template), lot.cpus, usize::MAX)?;
    let numbers = Arc::new(Numbers::Given);
    Ok(Talk::new(line, lot, &Arc::new(stock), (&numbers, usize::MAX))?.listen()?)
}

/// The socket; clones that are given nothing to read do not find it in its place.
fn line() -> io::Result<Line> {
    let socket = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3)?;
    let line = Line::of(socket)?;
    rustix::stdio::dup2_stdin(File::open("/dev/null")?)?;
    Ok(line)
}
