//! What a kernel guest's run is counted by. Counted, never timed, but for the one time that only a
//! clock can tell.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::Serialize;

use crate::hv::kvm::board_cpu::Access;

/// Exits to the VMM, by kind; counted by all processors.
#[derive(Debug, Default)]
pub struct Counters {
    port_reads: AtomicU64,
    port_writes: AtomicU64,
    memory_reads: AtomicU64,
    memory_writes: AtomicU64,
    kicks: AtomicU64,
}

impl Counters {
    /// Counts an access.
    pub fn access(&self, access: Access) {
        let counter = match access {
            Access::PortRead => &self.port_reads,
            Access::PortWrite => &self.port_writes,
            Access::MemoryRead => &self.memory_reads,
            Access::MemoryWrite => &self.memory_writes,
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts a kick.
    pub fn kick(&self) {
        self.kicks.fetch_add(1, Ordering::Relaxed);
    }

    /// What was counted.
    #[must_use]
    pub fn snapshot(&self) -> Exits {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Exits {
            port_reads: get(&self.port_reads),
            port_writes: get(&self.port_writes),
            memory_reads: get(&self.memory_reads),
            memory_writes: get(&self.memory_writes),
            kicks: get(&self.kicks),
        }
    }
}

/// Exits to the VMM, by kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Exits {
    /// IN.
    pub port_reads: u64,
    /// OUT.
    pub port_writes: u64,
    /// Loads from addresses that are no memory.
    pub memory_reads: u64,
    /// Stores to them.
    pub memory_writes: u64,
    /// Signals, or nothing at all.
    pub kicks: u64,
}

impl Exits {
    /// All of them.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.port_reads + self.port_writes + self.memory_reads + self.memory_writes + self.kicks
    }
}

/// What `--stats` prints.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct BootReport {
    /// How it ended, in a word.
    pub end: &'static str,
    /// Processors.
    pub cpus: u8,
    /// Bytes of memory.
    pub memory: u64,
    /// Milliseconds from the first processor's start to the end.
    pub milliseconds: u64,
    /// Exits to the VMM.
    pub exits: Exits,
    /// KVM ioctls, `KVM_RUN` included.
    pub ioctls: u64,
}

impl fmt::Display for BootReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let e = &self.exits;
        writeln!(
            f,
            "end       {} after {} ms; {} processors, {} bytes of memory",
            self.end, self.milliseconds, self.cpus, self.memory
        )?;
        writeln!(
            f,
            "exits     {}: {} port reads, {} port writes, {} memory reads, {} memory writes, {} kicks",
            e.total(),
            e.port_reads,
            e.port_writes,
            e.memory_reads,
            e.memory_writes,
            e.kicks
        )?;
        writeln!(f, "ioctls    {}", self.ioctls)
    }
}
