//! Putting a machine together.

use std::sync::Arc;

use super::RunError;
use super::bare::{Bare, Wanted};
use super::freezer::Freezer;
use super::host_io::{HostIo, HostSide};
use super::inspector::Seen;
use super::program;
use super::worker::Shared;
use crate::config::RunConfig;
use crate::control::server::Server;
use crate::linux::file::Location;
use crate::linux::fs::{Caller, Vfs};
use crate::linux::kernel::{Kernel, KernelLimits, KernelParts};
use crate::linux::proc::{FirstProcess, first_process};
use crate::linux::process::Credentials;
use crate::linux::stdio;
use crate::linux::time::Clock;
use crate::snapshot::image::KeptMemory;

/// Threads a machine may have, for each process it may have.
const THREADS_PER_PROCESS: usize = 16;
/// Threads a machine has at most: ids must be left for groups and sessions.
const MAX_THREADS: usize = 30_000;

/// A machine with a guest in it, which has not run yet.
pub struct Machine {
    pub(super) bare: Bare,
    pub(super) shared: Arc<Shared>,
    /// ioctls that were made before anybody asked for the guest.
    pub(super) ioctls_before: u64,
    pub(super) io: HostIo,
    /// The memory that the guest was made of, for the next one of its template.
    pub(super) keeps: Option<KeptMemory>,
    /// Looks at it from outside.
    pub(super) inspector: Option<Arc<Seen>>,
    /// The thread that answers those who ask.
    pub(super) control: Option<Server>,
    /// The thread that freezes it when it asks for it.
    pub(super) freezer: Option<Freezer>,
}

/// The guest runs as who runs the VMM: files show the same owners inside and outside.
fn credentials() -> Credentials {
    use rustix::process::{getegid, geteuid, getgid, getgroups, getuid};
    let (uid, euid) = (getuid().as_raw(), geteuid().as_raw());
    let (gid, egid) = (getgid().as_raw(), getegid().as_raw());
    let groups = getgroups()
        .unwrap_or_default()
        .iter()
        .map(|g| g.as_raw())
        .collect();
    Credentials {
        uid: [uid, euid, euid],
        gid: [gid, egid, egid],
        groups,
    }
}

impl Machine {
    /// Builds a machine and loads its first program, with what it gets of this process.
    ///
    /// # Errors
    /// The program cannot be run, or the host cannot make a machine.
    pub fn build(config: &RunConfig, host: HostSide) -> Result<Self, RunError> {
        let found = program::find(config)?;
        let bare = Bare::new(&Wanted {
            memory: config.memory,
            page_file: config.page_file.clone(),
            commit: config.commit,
            process_memory: config.process_memory,
            fork: config.fork,
            cpus: config.cpus,
            strace: config.strace,
        })?;
        if config.guard_alloc {
            bare.hardware.memory.guard.get_or_init(Default::default);
        }
        let sched = bare.sched();
        let stdio = stdio::open_all(host.stdio, &sched, &bare.events).map_err(RunError::Stdio)?;
        let kernel = Kernel::new(KernelParts {
            memory: Arc::clone(&bare.hardware.memory),
            sched,
            clock: Arc::new(Clock::new(bare.tsc())),
            vfs: Vfs::new(found.mounts, config.memory)?,
            tty: stdio.tty,
            limits: KernelLimits {
                max_procs: config.max_procs,
                max_threads: (config.max_procs * THREADS_PER_PROCESS).min(MAX_THREADS),
                cpus: config.cpus,
            },
            info: bare.info(),
        });
        let machine = bare.with(kernel, HostIo::new(stdio.events, host.signals));
        machine.start_program(config, found.path, stdio.files)?;
        Ok(machine)
    }

    fn start_program(
        &self,
        config: &RunConfig,
        path: Option<Vec<u8>>,
        files: crate::linux::process::FdTable,
    ) -> Result<(), RunError> {
        let kernel = &self.shared.kernel;
        let cred = credentials();
        let caller = Caller {
            k: kernel,
            pid: 0,
            tid: 0,
            cred: cred.clone(),
        };
        let cwd = workdir(kernel, &caller, &config.workdir)?;
        let image = program::load(kernel, &caller, config, path, &cwd)?.into_image();
        let thread = first_process(
            kernel,
            FirstProcess {
                exe: image.exe,
                comm: image.comm,
                mm: image.mm,
                regs: image.regs,
                files,
                cwd,
                cred,
                umask: 0o022,
                terminal: kernel.tty.is_some(),
            },
        );
        kernel.sched.enqueue(thread);
        Ok(())
    }
}

fn workdir(kernel: &Kernel, caller: &Caller<'_>, path: &[u8]) -> Result<Location, RunError> {
    let fail = |errno| RunError::Workdir {
        path: String::from_utf8_lossy(path).into_owned(),
        errno,
    };
    let (at, stat) = kernel
        .vfs
        .find(caller, &kernel.vfs.root(), path)
        .map_err(fail)?;
    if stat.mode & libc::S_IFMT == libc::S_IFDIR {
        Ok(at)
    } else {
        Err(fail(rustix::io::Errno::NOTDIR))
    }
}
