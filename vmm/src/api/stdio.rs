//! What a guest has as standard input, output and error.

use std::fs::File;
use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::MemfdFlags;

use crate::linux::stdio::{Given, copy};

/// A standard descriptor of a guest, as [`std::process::Stdio`] is one of a process.
///
/// It can be used for any number of guests: each gets a descriptor, a pipe or a copy of the bytes of its own. A file
/// is one open file for all of them: they share its position.
#[derive(Clone, Debug)]
pub struct Stdio(Kind);

#[derive(Clone, Debug)]
enum Kind {
    Null,
    Inherit,
    Piped,
    Bytes(Arc<[u8]>),
    Open(Arc<OwnedFd>),
}

impl Stdio {
    /// Nothing to read, and whatever is written is gone.
    #[must_use]
    pub fn null() -> Self {
        Self(Kind::Null)
    }

    /// This process's own.
    #[must_use]
    pub fn inherit() -> Self {
        Self(Kind::Inherit)
    }

    /// A pipe; this process's end of it is a field of the [`Guest`](crate::Guest).
    #[must_use]
    pub fn piped() -> Self {
        Self(Kind::Piped)
    }

    /// A file in memory with these bytes, at its beginning: what a guest is to read, without anybody who writes it to
    /// a pipe meanwhile.
    #[must_use]
    pub fn bytes(bytes: impl Into<Arc<[u8]>>) -> Self {
        Self(Kind::Bytes(bytes.into()))
    }
}

impl From<OwnedFd> for Stdio {
    fn from(fd: OwnedFd) -> Self {
        Self(Kind::Open(Arc::new(fd)))
    }
}

macro_rules! from_owners {
    ($($owner:ty),*) => {
        $(impl From<$owner> for Stdio {
            fn from(owner: $owner) -> Self {
                OwnedFd::from(owner).into()
            }
        })*
    };
}

from_owners!(
    File,
    PipeReader,
    PipeWriter,
    std::os::unix::net::UnixStream,
    std::process::ChildStdin,
    std::process::ChildStdout,
    std::process::ChildStderr
);

/// The three of a guest, as they were asked for.
#[derive(Clone, Debug, Default)]
pub(super) struct Three {
    pub(super) stdin: Option<Stdio>,
    pub(super) stdout: Option<Stdio>,
    pub(super) stderr: Option<Stdio>,
}

/// This process's ends of a guest's pipes.
#[derive(Debug, Default)]
pub(super) struct Ends {
    pub(super) stdin: Option<PipeWriter>,
    pub(super) stdout: Option<PipeReader>,
    pub(super) stderr: Option<PipeReader>,
}

impl Three {
    /// The same; what was not asked for has nothing to read, and is read.
    pub(super) fn captured(&self) -> Self {
        let piped = |asked: &Option<Stdio>| Some(asked.clone().unwrap_or_else(Stdio::piped));
        Self {
            stdin: Some(self.stdin.clone().unwrap_or_else(Stdio::null)),
            stdout: piped(&self.stdout),
            stderr: piped(&self.stderr),
        }
    }

    /// Descriptors for one guest; what was not asked for is this process's own.
    ///
    /// # Errors
    /// The host has no descriptor left.
    pub(super) fn open(&self) -> io::Result<(Given, Ends)> {
        let mut ends = Ends::default();
        let kind = |asked: &Option<Stdio>| asked.as_ref().map_or(Kind::Inherit, |s| s.0.clone());
        let stdin = match kind(&self.stdin) {
            Kind::Piped => {
                let (theirs, ours) = io::pipe()?;
                ends.stdin = Some(ours);
                Some(theirs.into())
            }
            other => other.open(rustix::stdio::stdin())?,
        };
        let output = |kind: Kind, own, end: &mut Option<PipeReader>| match kind {
            Kind::Piped => {
                let (ours, theirs) = io::pipe()?;
                *end = Some(ours);
                Ok(Some(theirs.into()))
            }
            other => other.open(own),
        };
        let stdout = output(
            kind(&self.stdout),
            rustix::stdio::stdout(),
            &mut ends.stdout,
        )?;
        let stderr = output(
            kind(&self.stderr),
            rustix::stdio::stderr(),
            &mut ends.stderr,
        )?;
        Ok((Given([stdin, stdout, stderr]), ends))
    }
}

impl Kind {
    /// A descriptor of it; `own` is this process's.
    fn open(self, own: BorrowedFd<'_>) -> io::Result<Option<OwnedFd>> {
        match self {
            Self::Null => {
                let options = File::options().read(true).write(true).open("/dev/null");
                Ok(Some(options?.into()))
            }
            // Who asks for a pipe makes it.
            Self::Inherit | Self::Piped => copy(own),
            Self::Bytes(bytes) => Ok(Some(in_memory(&bytes)?)),
            Self::Open(fd) => copy(fd.as_fd()),
        }
    }
}

fn in_memory(bytes: &[u8]) -> io::Result<OwnedFd> {
    let mut file: File = rustix::fs::memfd_create("standard input", MemfdFlags::CLOEXEC)?.into();
    file.write_all(bytes)?;
    rustix::fs::seek(&file, rustix::fs::SeekFrom::Start(0))?;
    Ok(file.into())
}

/// Reads both to their ends.
///
/// # Errors
/// The host's.
pub(super) fn read_both(
    out: Option<PipeReader>,
    err: Option<PipeReader>,
) -> io::Result<(Vec<u8>, Vec<u8>)> {
    let read = |from: Option<PipeReader>| {
        let mut bytes = Vec::new();
        match from {
            Some(mut from) => from.read_to_end(&mut bytes).map(|_| bytes),
            None => Ok(bytes),
        }
    };
    if err.is_none() {
        return Ok((read(out)?, Vec::new()));
    }
    std::thread::scope(|scope| {
        let other = std::thread::Builder::new().spawn_scoped(scope, || read(err))?;
        let out = read(out)?;
        let err = other.join().map_err(|_| io::ErrorKind::Other)??;
        Ok((out, err))
    })
}
