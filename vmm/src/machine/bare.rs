//! A machine before there is a guest in it: hardware, virtual CPUs, a scheduler, standard descriptors. A guest is
//! started in it ([`Machine::build`]) or made again ([`Machine::restore`]).

use std::sync::Arc;

use guest::abi;
use shadow_mm::CommitLimit;

use super::RunError;
use super::builder::Machine;
use super::guests::Guests;
use super::hardware::{Hardware, HardwareError};
use super::host_io::{HostIo, HostSide};
use super::stats::Counters;
use super::strace::Strace;
use super::worker::{Limit, Shared};
use crate::config::{Commit, ForkMode, PageFileConfig};
use crate::hv::kvm::vcpu::Vcpu;
use crate::linux::exec::MachineInfo;
use crate::linux::kernel::Kernel;
use crate::linux::sched::Sched;
use crate::linux::stdio::{self, Given, Stdio};
use crate::linux::table::Table;
use crate::linux::time::TscInfo;
use crate::linux::vdso;
use crate::locks::Mutex;
use crate::memory::{FRAME, PageFile};
use crate::snapshot::records::{Identity, LoadMemory, MemoryError, Parts, Place, Records, restore};

/// What a machine is asked for that does not depend on the guest in it.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// Bytes of guest memory, page tables included.
    pub memory: u64,
    /// Where pages go that find no room in the memory.
    pub page_file: Option<PageFileConfig>,
    /// How much memory programs may ask for.
    pub commit: Commit,
    /// Bytes of private memory that one process may ask for.
    pub process_memory: Option<u64>,
    /// How processes are forked.
    pub fork: ForkMode,
    /// Processors.
    pub cpus: usize,
    /// Show system calls.
    pub strace: bool,
}

/// A machine without a guest.
pub(super) struct Bare {
    pub(super) hardware: Hardware,
    /// The spare one last, if there is one.
    cpus: Vec<Vcpu>,
    pub(super) sched: Arc<Sched>,
    supervisor_tables: u64,
    strace: bool,
}

impl Bare {
    /// Makes it.
    ///
    /// # Errors
    /// The host cannot.
    pub(super) fn new(wanted: &Wanted) -> Result<Self, RunError> {
        let hardware = Hardware::new(wanted.memory, wanted.cpus)?;
        if let Some(wanted) = &wanted.page_file {
            let file = PageFile::create(&wanted.dir, wanted.bytes)?;
            let added = hardware.memory.add_page_file(file);
            added.map_err(HardwareError::Layout)?;
        }
        hardware.memory.manager.set_fork_mode(wanted.fork);
        if wanted.commit == Commit::Limited {
            hardware.memory.limit_commit();
        }
        if let Some(bytes) = wanted.process_memory {
            let quota = CommitLimit::Pages(bytes / FRAME as u64);
            hardware.memory.manager.set_first_quota(quota);
        }
        hardware.map_vdso(vdso::image())?;
        let all = wanted.cpus + super::hardware::spare(hardware.profile.paging);
        let cpus = (0..all as u64)
            .map(|index| hardware.vcpu(index))
            .collect::<Result<Vec<_>, HardwareError>>()?;
        let supervisor_tables = hardware.memory.manager.stats().tables.active;
        let sched = Arc::new(Sched::default());
        let idle = Arc::downgrade(sched.roster());
        let wake = move || idle.upgrade().is_some_and(|roster| roster.wake_idle());
        hardware.memory.flushes.set_wake_idle(Box::new(wake));
        Ok(Self {
            hardware,
            cpus,
            sched,
            supervisor_tables,
            strace: wanted.strace,
        })
    }

    /// A guest's descriptors 0 to 2.
    pub(super) fn stdio(&self, given: Given) -> Result<Stdio, RunError> {
        stdio::open_all(given, &self.sched).map_err(RunError::Stdio)
    }

    /// The time stamp counter as the guest will have it.
    pub(super) fn tsc(&self) -> TscInfo {
        if self.hardware.profile.tsc_is_hosts {
            TscInfo::probe(0, None)
        } else {
            TscInfo::unusable()
        }
    }

    /// What programs are told about the machine.
    pub(super) fn info(&self) -> MachineInfo {
        let vm = &self.hardware.vm;
        // A signal frame: the extended state, and what Linux puts around it.
        let xsave = u64::from(vm.cpuid(0xd, 0, 1)).max(512 + 64);
        let fsgsbase = self.hardware.profile.cr4 & crate::hv::kvm::regs::CR4_FSGSBASE != 0;
        MachineInfo {
            hwcap: u64::from(vm.cpuid(1, 0, 3)),
            hwcap2: if fsgsbase { 2 } else { 0 },
            minsigstksz: xsave + 1024,
            vdso: Some(abi::VDSO_CODE_VA),
            features: FEATURES.map(|(leaf, subleaf, register)| vm.cpuid(leaf, subleaf, register)),
        }
    }

    /// The machine with its guest; its clock is published.
    pub(super) fn with(self, kernel: Kernel, io: HostIo) -> Machine {
        let shared = Arc::new(Shared {
            kernel: Arc::new(kernel),
            table: Table::shared(),
            counters: Counters::default(),
            strace: self.strace.then(Strace::default),
            cpu_source: self.hardware.cpu_source(),
            limit: Limit::default(),
        });
        let roster = Arc::clone(self.sched.roster());
        let guests = Guests::new(roster, Arc::clone(&self.hardware.memory));
        guests.add(&shared);
        let machine = Machine {
            hardware: self.hardware,
            guests: Arc::new(guests),
            shared,
            cpus: Mutex::new(self.cpus),
            io,
            supervisor_tables: self.supervisor_tables,
            inspector: None,
            control: None,
            freezer: None,
        };
        let kernel = &machine.shared.kernel;
        kernel
            .clock
            .publish(&vdso::page(&kernel.memory), machine.shared.cpu_source);
        machine
    }
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

impl Machine {
    /// Makes a guest of its records, in a machine of its own that is ready to run. `image` gives the memory of
    /// the guest, once there is a machine to load it into. The guest goes on with the standard descriptors of `host`.
    ///
    /// # Errors
    /// The host cannot make a machine, or the guest cannot be made again.
    pub fn restore<L: LoadMemory>(
        wanted: &Wanted,
        records: &Records,
        identity: Identity,
        host: HostSide,
        image: impl FnOnce(&Hardware) -> Result<L, MemoryError>,
    ) -> Result<Self, RunError> {
        let bare = Bare::new(wanted)?;
        let stdio = bare.stdio(host.stdio)?;
        let memory = Arc::clone(&bare.hardware.memory);
        let mut image = image(&bare.hardware).map_err(RunError::Image)?;
        let fresh = bare.cpus.first().map(Vcpu::fpu).transpose();
        let fresh = fresh.map_err(RunError::Cpu)?;
        let parts = Parts {
            place: Place::Alone,
            memory,
            sched: Arc::clone(&bare.sched),
            files: stdio.files,
            tty: stdio.tty,
            tsc: bare.tsc(),
            info: bare.info(),
            fpu: (
                fresh.ok_or(RunError::NoCpu)?,
                bare.hardware.profile.state_components,
            ),
        };
        let kernel = restore(records, parts, &mut image, identity)?;
        Ok(bare.with(kernel, HostIo::new(stdio.events, host.signals)))
    }
}

#[cfg(test)]
mod tests;
