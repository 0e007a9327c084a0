//! The records as a whole.

use std::hash::Hasher;
use std::path::PathBuf;
use std::sync::OnceLock;

use serde::{Deserialize, Serialize};

use super::content::SavedContent;
use super::file::{SavedDescription, SavedFile};
use super::tables::FileIx;
use crate::linux::exec::MachineInfo;
use crate::linux::fd::epoll::SavedMember;
use crate::linux::fd::locks::SavedLocks;
use crate::linux::fd::pipe::SavedPipe;
use crate::linux::fs::saved::{HostDirectory, SavedInode, SavedTree};
use crate::linux::kernel::KernelLimits;
use crate::linux::net::SavedSocket;
use crate::linux::proc::futex::saved::SavedFutexes;
use crate::linux::proc::saved::{SavedProcess, SavedThread};
use crate::linux::process::{MmLayout, Pid, TtyState};
use crate::linux::time::saved::SavedClock;
use crate::linux::tty::SavedTty;
use crate::memory::Backing;
use crate::snapshot::records::{ContentRef, SpaceRef};

/// A stopped guest's records. They are checked when a guest is made of them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Records {
    pub(super) machine: SavedMachine,
    pub(super) tree: SavedTree,
    pub(super) processes: Vec<SavedProcess>,
    /// Those that would run first, in their order.
    pub(super) threads: Vec<SavedThread>,
    pub(super) futexes: SavedFutexes,
    pub(super) spaces: Vec<SavedSpace>,
    pub(super) pipes: Vec<SavedPipe>,
    pub(super) inodes: Vec<SavedInode>,
    pub(super) contents: Vec<SavedContent>,
    pub(super) sockets: Vec<SavedSocket>,
    pub(super) files: Vec<SavedFile>,
    pub(super) descriptions: Vec<SavedDescription>,
    pub(super) epolls: Vec<SavedEpoll>,
    pub(super) locks: SavedLocks,
}

impl Records {
    /// The directories of the host that the guest will see: records from somebody else say where on *this*
    /// host to read and write.
    #[must_use]
    pub fn host_directories(&self) -> Vec<HostDirectory> {
        self.tree.host_directories()
    }

    /// Files of the host that the guest will see where it has no directory of the host as its root.
    #[must_use]
    pub fn host_files(&self) -> Vec<PathBuf> {
        self.tree.host_files()
    }

    /// Whether a content of mapped files is a file of the host.
    #[must_use]
    pub fn is_hosts(&self, at: ContentRef) -> bool {
        match self.contents.get(at.0 as usize) {
            Some(SavedContent::Host(_)) => true,
            Some(SavedContent::Memory(..)) | None => false,
        }
    }

    /// Whether a file of the host that was opened as a content of mapped files has not changed since.
    #[must_use]
    pub fn is_still(&self, at: ContentRef, opened: &Backing) -> bool {
        let content = self.contents.get(at.0 as usize);
        content.is_some_and(|content| content.is_still(opened))
    }

    /// Processors the guest was told about; 1 to 1024, whatever the records say.
    #[must_use]
    pub fn cpus(&self) -> usize {
        self.machine.limits.cpus.clamp(1, 1024) as usize
    }

    /// The guest's `CLOCK_MONOTONIC` when it was saved, in nanoseconds.
    #[must_use]
    pub fn monotonic(&self) -> u64 {
        self.machine.clock.monotonic()
    }

    /// As a version of the VMM would have written them whose vDSO is another one.
    #[cfg(test)]
    pub(crate) fn of_another_vdso(&self) -> Self {
        let mut records = self.clone();
        records.machine.vdso ^= 1;
        records
    }
}

/// What there is once.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct SavedMachine {
    pub(super) info: MachineInfo,
    pub(super) vdso: u64,
    pub(super) limits: SavedLimits,
    pub(super) next_pid: Pid,
    pub(super) main: Pid,
    pub(super) tty_state: TtyState,
    pub(super) tty: Option<SavedTty>,
    pub(super) clock: SavedClock,
    /// Objects made later have larger numbers than all that are there.
    pub(super) next_key: u64,
}

/// As [`KernelLimits`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct SavedLimits {
    pub(super) procs: u64,
    pub(super) threads: u64,
    pub(super) cpus: u64,
}

impl From<KernelLimits> for SavedLimits {
    fn from(limits: KernelLimits) -> Self {
        Self {
            procs: limits.max_procs as u64,
            threads: limits.max_threads as u64,
            cpus: limits.cpus as u64,
        }
    }
}

/// An address space.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct SavedSpace {
    pub(super) space: SpaceRef,
    pub(super) layout: MmLayout,
}

/// What an epoll looks at.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct SavedEpoll {
    pub(super) file: FileIx,
    pub(super) members: Vec<SavedMember>,
}

/// Programs keep addresses in the vDSO: it must be the same one.
pub(super) fn vdso_digest() -> u64 {
    static DIGEST: OnceLock<u64> = OnceLock::new();
    *DIGEST.get_or_init(|| {
        let mut hasher = Fnv::default();
        hasher.write(crate::linux::vdso::image());
        hasher.finish()
    })
}

/// FNV-1a, the same in every build.
struct Fnv(u64);

impl Default for Fnv {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl Hasher for Fnv {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.0 = (self.0 ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
        }
    }
}
