//! What a person asked for, checked once.

use std::path::PathBuf;
use std::time::Duration;

pub use shadow_mm::ForkMode;

/// A part of the guest's file tree besides its root.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Mount {
    /// A host directory, writable.
    ReadWrite {
        /// Host path.
        host: PathBuf,
        /// Absolute guest path.
        guest: Vec<u8>,
    },
    /// An empty in-memory file system.
    Tmpfs {
        /// Absolute guest path.
        guest: Vec<u8>,
    },
}

/// A page file to make.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageFileConfig {
    /// Its size in bytes.
    pub bytes: u64,
    /// The host directory it is in.
    pub dir: PathBuf,
}

/// How much memory programs may ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Commit {
    /// What memory and page file hold: a program that asks for more is told so (ENOMEM).
    Limited,
    /// Anything: a program that uses more than there is gets killed.
    Over,
}

/// Memory of a machine, if nothing else is said.
const MEMORY: u64 = 1 << 30;
/// Processes of a machine, if nothing else is said.
const PROCESSES: usize = 1024;

/// What shows that a guest is ready.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReadyWhen {
    /// It has printed this line.
    Printed(Vec<u8>),
    /// It has frozen itself.
    Frozen,
}

/// What `vmm run` was asked to do.
#[derive(Clone, Debug)]
pub struct RunConfig {
    /// Bytes of guest memory, page tables included.
    pub memory: u64,
    /// Where pages go that find no room in the memory.
    pub page_file: Option<PageFileConfig>,
    /// How much memory programs may ask for.
    pub commit: Commit,
    /// Bytes of private memory that one process may ask for; any number without it.
    pub process_memory: Option<u64>,
    /// How processes are forked.
    pub fork: ForkMode,
    /// Host directory shown read-only as `/`; without it only the program and what it needs.
    pub root: Option<PathBuf>,
    /// Other parts of the file tree.
    pub mounts: Vec<Mount>,
    /// Guest directory to start in.
    pub workdir: Vec<u8>,
    /// Environment variables besides the few that are always there.
    pub env: Vec<(Vec<u8>, Vec<u8>)>,
    /// Show system calls.
    pub strace: bool,
    /// End after this long.
    pub timeout: Option<Duration>,
    /// Processes at once.
    pub max_procs: usize,
    /// Put guard pages around anonymous mappings.
    pub guard_alloc: bool,
    /// What `vmm inspect` calls the machine; its number if there is none.
    pub name: Option<String>,
    /// What the guest does when it is ready, if anybody is to wait for that.
    pub ready: Option<ReadyWhen>,
    /// Where what `vmm inspect` shows is written at the end.
    pub report: Option<PathBuf>,
    /// Processors.
    pub cpus: usize,
    /// The program, as given.
    pub program: Vec<u8>,
    /// Its arguments, without its name.
    pub args: Vec<Vec<u8>>,
}

impl RunConfig {
    /// A program and its arguments, as they are run if nothing else is said, on one processor.
    #[must_use]
    pub fn new(program: Vec<u8>, args: Vec<Vec<u8>>) -> Self {
        Self {
            memory: MEMORY,
            page_file: None,
            commit: Commit::Limited,
            process_memory: None,
            fork: ForkMode::Shared,
            root: None,
            mounts: Vec::new(),
            workdir: b"/".to_vec(),
            env: Vec::new(),
            strace: false,
            timeout: None,
            max_procs: PROCESSES,
            guard_alloc: false,
            name: None,
            ready: None,
            report: None,
            cpus: 1,
            program,
            args,
        }
    }
}
