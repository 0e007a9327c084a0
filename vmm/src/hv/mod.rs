//! KVM: the virtual machine, its virtual CPUs, and what this host's KVM does (found by probing).

pub mod kvm;
pub mod probe;
mod tsc;

pub use tsc::host_tsc;

/// A virtual CPU's state could not be read or set.
#[derive(Debug, thiserror::Error)]
#[error("the virtual CPU's {what} could not be {verb}")]
pub struct CpuError {
    /// Which state.
    pub what: &'static str,
    /// `read`, `set`, `run` or `touched`.
    pub verb: &'static str,
    /// The host's reason.
    #[source]
    pub source: std::io::Error,
}

/// Why the guest stopped running.
#[derive(Debug, PartialEq, Eq)]
pub enum Exit {
    /// A system call: its number is in RAX; RIP is behind the SYSCALL instruction.
    Syscall,
    /// An exception in ring 3.
    Trap(Trap),
    /// Ring 3 used a port of the VMM's in a way SYSCALL does not: a general protection fault.
    Forged,
    /// A kick from outside, or nothing at all.
    Kicked,
    /// The monitor's `enter_out` has finished.
    MonitorDone,
    /// Something that must not happen: the thread cannot go on, the machine can.
    Broken(String),
}

/// An exception in ring 3 (Intel SDM volume 3, chapter 6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trap {
    /// Vector, 0 to 31.
    pub vector: u8,
    /// Error code, 0 for vectors without one.
    pub error: u64,
    /// CR2: the faulting address of a page fault.
    pub address: u64,
}

/// What must be dropped before the guest's next instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flush<'a> {
    /// Nothing.
    None,
    /// This virtual CPU's TLB, after a locked write that changes nothing to each of these words (on
    /// hosts where KVM shadows, that is how it learns that a page table changed).
    All {
        /// Addresses inside the monitor's view of the table zone.
        touches: &'a [u64],
    },
}

impl<'a> Flush<'a> {
    fn touches(&self) -> &'a [u64] {
        match self {
            Self::None => &[],
            Self::All { touches } => touches,
        }
    }
}

/// Where the SYSCALL instruction of ring 3 ends up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum SyscallRing {
    /// In ring 0, as the architecture says.
    Zero,
    /// At LSTAR, but in ring 3.
    Three,
}

/// Whether the monitor can return to ring 3 by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum IretWorks {
    /// Yes.
    Yes,
    /// No: the VMM sets the registers, which costs an exit more for each flush.
    No,
}

/// Who loads a thread's FPU and vector state into a virtual CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum FpuLoader {
    /// The monitor, on its way into ring 3.
    Monitor,
    /// KVM, asked by an ioctl.
    Kvm,
}
