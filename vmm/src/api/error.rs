//! What can go wrong.

use std::io;
use std::sync::Arc;

use crate::control::rundir::RunDirError;
use crate::machine::RunError;
use crate::snapshot::guest::{OpenError, SnapshotError};
use crate::snapshot::read::ReadError;

/// Why a guest was not started.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    /// An argument or a path has a NUL byte, or a variable's name is empty or has an `=`.
    #[error("{0:?} cannot be given to a program")]
    Argument(String),
    /// A setting for `/dev/vmm` has no name, or an end of line.
    #[error("{0:?} cannot be read from /dev/vmm: NAME=VALUE, in one line")]
    Setting(String),
    /// The guest cannot be called that.
    #[error(transparent)]
    Name(#[from] RunDirError),
    /// A machine has 1 to 64 processors.
    #[error("{0} processors: a machine has 1 to 64")]
    Cpus(usize),
    /// Memory or processors were asked for, for a guest in a machine that it shares.
    #[error("memory and processors are those of the machine that the guest shares")]
    SharedMachine,
    /// A machine that guests share was asked for, of a template that is a file on a disk ([`Template::open`](crate::Template::open)).
    #[error(
        "guests that share a machine are made of a template in memory: freeze a clone of this one"
    )]
    OnDisk,
    /// This process has no descriptors left for standard input, output and error.
    #[error("the guest's standard input, output and error cannot be made")]
    Stdio(#[source] io::Error),
    /// The program cannot be run, the host has no usable KVM, or the template is not fit for it.
    #[error(transparent)]
    Machine(#[from] RunError),
    /// The host has no thread.
    #[error("cannot start a thread")]
    Thread(#[source] io::Error),
}

/// Why a guest did not end as its program wanted.
#[derive(Clone, Debug, thiserror::Error)]
pub enum WaitError {
    /// Its time ([`timeout`](crate::Builder::timeout)) was up, and it was ended.
    #[error("the guest's time was up")]
    TimedOut,
    /// The host failed, or a page of a snapshot's file is damaged.
    #[error(transparent)]
    Machine(Arc<RunError>),
    /// A bug: a thread that runs the guest has panicked.
    #[error("the machine failed: please report this")]
    Failed,
    /// What it printed could not be read.
    #[error("what the guest printed cannot be read")]
    Read(#[source] Arc<io::Error>),
}

/// Why a program was not run to its end and read.
#[derive(Debug, thiserror::Error)]
pub enum OutputError {
    /// It was not started.
    #[error(transparent)]
    Spawn(#[from] SpawnError),
    /// It did not end by itself.
    #[error(transparent)]
    Wait(#[from] WaitError),
}

/// Why there is no template.
#[derive(Debug, thiserror::Error)]
pub enum FreezeError {
    /// The guest ended before it was ready, or before it was frozen.
    #[error("the guest has ended")]
    Ended,
    /// It holds something that cannot be made again, or the host has no memory for it.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// A file is no template.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// What a file says of the guest's memory makes no sense.
    #[error(transparent)]
    Image(crate::snapshot::image::LoadError),
    /// The template's file cannot be used.
    #[error("the template cannot be kept")]
    Host(#[source] io::Error),
}

impl From<ReadError> for FreezeError {
    fn from(error: ReadError) -> Self {
        Self::Open(error.into())
    }
}

/// A signal that was not sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SignalError {
    /// Signals are 1 to 64.
    #[error("{0} is not a signal")]
    Number(i32),
    /// There is nobody to send it to.
    #[error("the guest has ended")]
    Ended,
}
