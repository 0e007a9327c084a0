//! Why a guest cannot be saved, or not be made again.

use crate::linux::Errno;
use crate::linux::fs::VfsError;
use crate::snapshot::records::MemoryError;

/// Why a guest cannot be saved. It is as it was, and goes on when it is let.
#[derive(Debug, thiserror::Error)]
pub enum Refused {
    /// Its threads run.
    #[error("the guest is not stopped")]
    Running,
    /// Its first program has ended.
    #[error("the guest has ended")]
    Ended,
    /// The guards around its mappings are not part of a snapshot.
    #[error("a guest with --guard-alloc cannot be saved")]
    Guarded,
    /// An open or mapped file of the host has no name by which it could be opened again.
    #[error(
        "{path} is in use and cannot be found by that name any more: it was deleted, renamed or replaced"
    )]
    Nameless {
        /// Its guest path.
        path: String,
    },
    /// What was stored to a mapped file cannot be written to it.
    #[error("{path}: what was stored to a mapping of it cannot be written to it")]
    Unwritten {
        /// Its guest path.
        path: String,
    },
    /// The host refused to look at a file.
    #[error("{path}")]
    File {
        /// Its guest path.
        path: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// KVM did not give out what a thread has in a virtual CPU.
    #[error(transparent)]
    Cpu(crate::hv::CpuError),
    /// The memory cannot be saved.
    #[error("the guest's memory cannot be saved")]
    Memory(#[source] MemoryError),
}

/// A value that no guest could have had.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the records are damaged: {0}")]
pub struct Damaged(pub &'static str);

/// Why a guest cannot be made of its records.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The records cannot be a guest's.
    #[error(transparent)]
    Damaged(#[from] Damaged),
    /// Programs were told of features that this machine has not.
    #[error("the guest was started on a processor with features that this one has not")]
    Processor,
    /// Programs know addresses in the vDSO that are not right any more.
    #[error("the guest was made by a version of vmm with another vDSO")]
    Vdso,
    /// A file that the guest has open or mapped cannot be opened again.
    #[error("{path}: the guest has it open, and it cannot be opened again")]
    File {
        /// Its guest path.
        path: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A file that the guest has open or mapped is not the one it was.
    #[error("{path}: the guest has it open, and it is not the file it was")]
    Changed {
        /// Its guest path.
        path: String,
    },
    /// The guest uses a standard descriptor that the VMM has not.
    #[error("the guest has descriptor {0} of the host open, which is closed now")]
    Stdio(i32),
    /// The file tree could not be built.
    #[error(transparent)]
    Files(#[from] VfsError),
    /// What the guest keeps in the VMM's memory does not fit.
    #[error("the limits of the machine are too small for what the guest has: {what}")]
    Room {
        /// What.
        what: &'static str,
        /// Why.
        #[source]
        source: Errno,
    },
    /// The memory could not be loaded.
    #[error("the guest's memory cannot be loaded")]
    Memory(#[source] MemoryError),
}

/// Fails with [`Damaged`] unless `good`.
pub(in crate::linux) fn require(good: bool, what: &'static str) -> Result<(), Damaged> {
    if good { Ok(()) } else { Err(Damaged(what)) }
}

/// A guest path as a message shows it.
pub(in crate::linux) fn shown(path: &[u8]) -> String {
    String::from_utf8_lossy(path).into_owned()
}
