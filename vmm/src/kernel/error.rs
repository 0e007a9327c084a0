//! Why a kernel guest could not be started. Each is said in one line, before anything runs.

use std::io;
use std::path::PathBuf;

use super::memory::MemoryError;
use crate::cli::Size;
use crate::devices::BusError;
use crate::devices::virtio::block::DiskError;
use crate::hv::CpuError;
use crate::hv::kvm::vm::VmError;

/// Why a kernel guest could not be started.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// A file cannot be opened or read.
    #[error("{what} {}", path.display())]
    File {
        /// What it was to be.
        what: &'static str,
        /// Its path.
        path: PathBuf,
        /// The host's reason.
        #[source]
        source: io::Error,
    },
    /// Not a regular file.
    #[error("{what} {}: not a regular file", path.display())]
    NotAFile {
        /// What it was to be.
        what: &'static str,
        /// Its path.
        path: PathBuf,
    },
    /// Not a kernel that can be booted.
    #[error("kernel {}: {why}", path.display())]
    Format {
        /// Its path.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// It ends before the kernel in it does.
    #[error("kernel {}: the file is cut off: {has} bytes of {needs}", path.display())]
    Truncated {
        /// Its path.
        path: PathBuf,
        /// Its length.
        has: u64,
        /// The length its header tells.
        needs: u64,
    },
    /// The kernel does not fit.
    #[error(
        "kernel {}: needs memory up to {needs}, and --memory {memory} ends (or has its hole) at {has}",
        path.display()
    )]
    KernelTooLarge {
        /// Its path.
        path: PathBuf,
        /// Where what it needs ends.
        needs: Size,
        /// Where RAM below 4 GiB ends.
        has: Size,
        /// All of it.
        memory: Size,
    },
    /// The initrd does not fit.
    #[error("initrd {}: has {bytes}, and only {room} of --memory {memory} are free for it", path.display())]
    InitrdTooLarge {
        /// Its path.
        path: PathBuf,
        /// Its length.
        bytes: Size,
        /// What is left beside the kernel.
        room: Size,
        /// All of it.
        memory: Size,
    },
    /// The command line does not fit.
    #[error("--cmdline: has {has} bytes, and this kernel takes {most}")]
    CommandLine {
        /// Its length.
        has: usize,
        /// The most the kernel takes.
        most: usize,
    },
    /// More processors than KVM gives.
    #[error("--cpus {asked}: this KVM gives {most} at most")]
    Cpus {
        /// Asked for.
        asked: u8,
        /// What there is.
        most: usize,
    },
    /// Guest memory refused an access of ours.
    #[error("the guest's memory cannot be written at {at:#x}")]
    Write {
        /// Where.
        at: u64,
        /// The library's reason.
        #[source]
        source: vm_memory::GuestMemoryError,
    },
    /// The console cannot be opened.
    #[error("--console {name}")]
    Console {
        /// What was asked for.
        name: String,
        /// The host's reason.
        #[source]
        source: io::Error,
    },
    /// A thread cannot be started.
    #[error("cannot start a thread")]
    Thread(#[source] io::Error),
    /// No memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// KVM refused.
    #[error("cannot make a machine (vmm doctor tells more)")]
    Vm(#[from] VmError),
    /// KVM refused something of a virtual CPU.
    #[error(transparent)]
    Cpu(#[from] CpuError),
    /// A disk cannot be used.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// More devices than there are interrupts.
    #[error("--disk: a machine has room for {0} at most")]
    TooManyDisks(usize),
    /// Two devices in one place.
    #[error(transparent)]
    Bus(#[from] BusError),
}
