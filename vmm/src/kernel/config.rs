//! What `vmm boot` was asked for, checked.

use std::path::PathBuf;
use std::time::Duration;

use super::console::ConsoleChoice;
use crate::devices::virtio::block::Access;

/// Most processors: an APIC id has eight bits here.
pub const MAX_CPUS: u8 = 254;

/// What `vmm boot` was asked to do.
#[derive(Clone, Debug)]
pub struct BootConfig {
    /// The kernel.
    pub kernel: PathBuf,
    /// Its initrd.
    pub initrd: Option<PathBuf>,
    /// Its command line, without zeros.
    pub command_line: Vec<u8>,
    /// Processors, at least one.
    pub cpus: u8,
    /// Bytes of memory, a multiple of the page.
    pub memory: u64,
    /// Its disks, in order.
    pub disks: Vec<DiskConfig>,
    /// Where the serial port goes; nowhere, without.
    pub serial: Option<ConsoleChoice>,
    /// Where the virtio console goes; without, the machine has none.
    pub virtio_console: Option<ConsoleChoice>,
    /// End after this long.
    pub timeout: Option<Duration>,
}

/// A disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskConfig {
    /// The raw file.
    pub path: PathBuf,
    /// Whether it can be written.
    pub access: Access,
}
