//! Putting a machine together.

use std::sync::Arc;

use guest::abi;

use super::hardware::{Hardware, HardwareError};
use super::inspector::Inspector;
use super::program;
use super::stats::Counters;
use super::strace::Strace;
use super::worker::Shared;
use super::{RunError, host_io::HostIo};
use crate::config::{Commit, RunConfig};
use crate::control::server::Server;
use crate::hv::kvm::vcpu::Vcpu;
use crate::linux::exec::MachineInfo;
use crate::linux::file::Location;
use crate::linux::fs::{Caller, Vfs};
use crate::linux::kernel::{Kernel, KernelLimits, KernelParts};
use crate::linux::proc::{FirstProcess, first_process};
use crate::linux::process::Credentials;
use crate::linux::sched::Sched;
use crate::linux::stdio;
use crate::linux::table::Table;
use crate::linux::time::{Clock, TscInfo};
use crate::linux::vdso;
use crate::locks::{Mutex, rank};
use crate::memory::PageFile;

/// Threads a machine may have, for each process it may have.
const THREADS_PER_PROCESS: usize = 16;
/// Threads a machine has at most: ids must be left for groups and sessions.
const MAX_THREADS: usize = 30_000;

/// A machine with its first program loaded.
pub struct Machine {
    pub(super) hardware: Hardware,
    pub(super) shared: Arc<Shared>,
    pub(super) cpus: Mutex<rank::MachineCpus, Vec<Vcpu>>,
    pub(super) io: HostIo,
    /// Table frames that belong to no guest: the supervisor's.
    pub(super) supervisor_tables: u64,
    /// Looks at it from outside.
    pub(super) inspector: Option<Arc<Inspector>>,
    /// The thread that answers those who ask.
    pub(super) control: Option<Server>,
}

/// The words of CPUID whose bits are features (SDM volume 2, CPUID): leaf, subleaf, and EAX to EDX by number.
const FEATURES: [(u32, u32, usize); 9] = [
    (1, 0, 2),
    (1, 0, 3),
    (7, 0, 1),
    (7, 0, 2),
    (7, 0, 3),
    (7, 1, 0),
    (0xd, 0, 0),
    (0x8000_0001, 0, 2),
    (0x8000_0001, 0, 3),
];

/// What programs are told about the machine.
fn info(hardware: &Hardware) -> MachineInfo {
    let vm = &hardware.vm;
    // A signal frame: the extended state, and what Linux puts around it.
    let xsave = u64::from(vm.cpuid(0xd, 0, 1)).max(512 + 64);
    MachineInfo {
        hwcap: u64::from(vm.cpuid(1, 0, 3)),
        hwcap2: if hardware.profile.cr4 & crate::hv::kvm::regs::CR4_FSGSBASE != 0 {
            2
        } else {
            0
        },
        minsigstksz: xsave + 1024,
        vdso: Some(abi::VDSO_CODE_VA),
        features: FEATURES.map(|(leaf, subleaf, register)| vm.cpuid(leaf, subleaf, register)),
    }
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
    /// Builds a machine and loads its first program.
    ///
    /// # Errors
    /// The program cannot be run, or the host cannot make a machine.
    pub fn build(config: &RunConfig) -> Result<Self, RunError> {
        let found = program::find(config)?;
        let hardware = Hardware::new(config.memory, config.cpus)?;
        if let Some(wanted) = &config.page_file {
            let file = PageFile::create(&wanted.dir, wanted.bytes)?;
            let added = hardware.memory.add_page_file(file);
            added.map_err(HardwareError::Layout)?;
        }
        if config.commit == Commit::Limited {
            hardware.memory.limit_commit();
        }
        if config.guard_alloc {
            hardware.memory.guard.get_or_init(Default::default);
        }
        hardware.map_vdso(vdso::image())?;
        let cpus = (0..config.cpus as u64)
            .map(|index| hardware.vcpu(index))
            .collect::<Result<Vec<_>, HardwareError>>()?;
        let supervisor_tables = hardware.memory.manager.stats().tables.active;

        let sched = Arc::new(Sched::default());
        let idle = Arc::downgrade(&sched);
        let wake = move || idle.upgrade().is_some_and(|sched| sched.wake_idle());
        hardware.memory.flushes.set_wake_idle(Box::new(wake));
        let stdio = stdio::inherit(&sched).map_err(RunError::Thread)?;
        let tsc = if hardware.profile.tsc_is_hosts {
            TscInfo::probe(0, None)
        } else {
            TscInfo::unusable()
        };
        let vfs = Vfs::new(found.mounts, config.memory)?;
        let kernel = Arc::new(Kernel::new(KernelParts {
            memory: Arc::clone(&hardware.memory),
            sched,
            clock: Arc::new(Clock::new(tsc)),
            vfs,
            tty: stdio.tty,
            limits: KernelLimits {
                max_procs: config.max_procs,
                max_threads: (config.max_procs * THREADS_PER_PROCESS).min(MAX_THREADS),
                cpus: config.cpus,
            },
            info: info(&hardware),
        }));
        let machine = Self {
            hardware,
            shared: Arc::new(Shared {
                kernel,
                table: Table::default(),
                counters: Counters::default(),
                strace: config.strace.then(Strace::default),
            }),
            cpus: Mutex::new(cpus),
            io: HostIo::new(stdio.events),
            supervisor_tables,
            inspector: None,
            control: None,
        };
        let kernel = &machine.shared.kernel;
        kernel
            .clock
            .publish(&vdso::page(&kernel.memory), machine.cpu_source());
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
