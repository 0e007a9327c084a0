//! A machine without a guest in it: the virtual machine, its virtual CPUs, memory slots, monitor and vDSO, the memory
//! manager and the threads. All of it is made before anybody knows what guest it is for, and is there for the next guest
//! when one has ended. A guest is started in it ([`Machine::build`]) or made again ([`Machine::restore`]); what is the guest's
//! is the [`Kernel`] with its scheduler, and everything these own. The threads serve whatever guests are in [`Guests`].
//!
//! A machine that a guest has left is as new: no frame is in use, none is promised, and every flush is acknowledged, so that no
//! virtual CPU knows a translation of the old guest's (who keeps a machine looks, and ends one that is not).

use std::sync::Arc;
use std::sync::atomic::Ordering;

use guest::abi;
use shadow_mm::CommitLimit;

use super::RunError;
use super::builder::Machine;
use super::guests::Guests;
use super::hardware::{Hardware, HardwareError};
use super::host_io::{HostIo, HostSide};
use super::kept::Kept;
use super::staff::{Failure, Staff};
use super::stats::Counters;
use super::strace::Strace;
use super::worker::{Limit, Shared};
use crate::config::{Commit, ForkMode, PageFileConfig};
use crate::hv::kvm::vcpu::{CpuSetup, Vcpu};
use crate::linux::events::Events;
use crate::linux::exec::MachineInfo;
use crate::linux::fs::Vfs;
use crate::linux::kernel::Kernel;
use crate::linux::sched::Sched;
use crate::linux::sched::roster::Roster;
use crate::linux::stdio;
use crate::linux::table::Table;
use crate::linux::thread::XsaveArea;
use crate::linux::time::TscInfo;
use crate::linux::vdso;
use crate::memory::{FRAME, PageFile};
use crate::snapshot::records::{Identity, LoadMemory, MemoryError, Parts, Place, Records, restore};

/// What a machine is asked for that does not depend on the guest in it.
#[derive(Clone, Debug, PartialEq, Eq)]
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
pub(crate) struct Bare {
    pub(super) hardware: Hardware,
    wanted: Wanted,
    /// None once there are threads.
    pub(super) cpus: Vec<Vcpu>,
    /// The spare one, where KVM shadows page tables.
    pub(super) spare: Option<CpuSetup>,
    /// Its guests, and who serves which when.
    pub(super) guests: Arc<Guests>,
    /// Its threads, once there are any.
    pub(super) staff: Option<Staff>,
    pub(super) failure: Failure,
    /// Watches the descriptors of the host that guests wait for.
    pub(super) events: Arc<Events>,
    supervisor_tables: u64,
    tsc: TscInfo,
    /// The FPU state of a virtual CPU that has run nothing.
    fresh: XsaveArea,
    /// What the last guest has left for the next one.
    pub(super) kept: Option<Kept>,
}

impl Bare {
    /// Makes it.
    ///
    /// # Errors
    /// The host cannot.
    pub(crate) fn new(wanted: &Wanted) -> Result<Self, RunError> {
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
        let cpus = (0..wanted.cpus as u64)
            .map(|index| hardware.vcpu(index))
            .collect::<Result<Vec<_>, HardwareError>>()?;
        let spare = match super::hardware::spare(hardware.profile.paging) {
            0 => None,
            _ => Some(hardware.cpu_setup(wanted.cpus as u64)?),
        };
        let fresh = cpus.first().map(Vcpu::fpu).transpose();
        let fresh = fresh.map_err(RunError::Cpu)?.ok_or(RunError::NoCpu)?;
        let supervisor_tables = hardware.memory.manager.stats().tables.active;
        let roster = Arc::new(Roster::default());
        let idle = Arc::downgrade(&roster);
        let wake = move || idle.upgrade().is_some_and(|roster| roster.wake_idle());
        hardware.memory.flushes.set_wake_idle(Box::new(wake));
        let events = Arc::new(Events::new().map_err(RunError::Stdio)?);
        let alarm = Arc::clone(&events);
        roster.set_alarm(Box::new(move || alarm.wake()));
        let guests = Arc::new(Guests::new(roster, Arc::clone(&hardware.memory)));
        let tsc = if hardware.profile.tsc_is_hosts {
            TscInfo::probe(0, None)
        } else {
            TscInfo::unusable()
        };
        Ok(Self {
            hardware,
            wanted: wanted.clone(),
            cpus,
            spare,
            guests,
            staff: None,
            failure: Failure::default(),
            events,
            supervisor_tables,
            tsc,
            fresh,
            kept: None,
        })
    }

    /// The FPU state of a virtual CPU that has run nothing.
    pub(super) fn fresh(&self) -> &XsaveArea {
        &self.fresh
    }

    /// What it was asked for.
    pub(crate) fn wanted(&self) -> &Wanted {
        &self.wanted
    }

    /// The time stamp counter as the guest will have it.
    pub(super) fn tsc(&self) -> TscInfo {
        self.tsc
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

    /// A scheduler for one more guest. Its world stands still until the guest is played ([`Machine::play`]): the machine's
    /// threads may run already.
    pub(super) fn sched(&self) -> Arc<Sched> {
        let sched = Arc::new(Sched::new(&self.guests.roster));
        let _nobody_ran = sched.stop();
        sched
    }

    /// ioctls so far that are no guest's: none, if they were made for the first one.
    fn ioctls_before(&self) -> u64 {
        match self.staff.is_some() {
            true => self.hardware.vm.ioctls.load(Ordering::Relaxed),
            false => 0,
        }
    }

    /// A guest of its records, to be put into the machine ([`Self::with`]), with a file tree if there is one.
    ///
    /// # Errors
    /// The guest cannot be made again. Nothing is left of it but what `image` has given it.
    pub(super) fn revive(
        &self,
        records: &Records,
        identity: Identity,
        host: HostSide,
        (image, tree): (&mut dyn LoadMemory, Option<Vfs>),
    ) -> Result<(Kernel, HostIo), RunError> {
        let sched = self.sched();
        let stdio = stdio::open_all(host.stdio, &sched, &self.events).map_err(RunError::Stdio)?;
        let parts = Parts {
            place: Place::Alone,
            memory: Arc::clone(&self.hardware.memory),
            sched,
            files: stdio.files,
            tty: stdio.tty,
            tsc: self.tsc(),
            tree,
            info: self.info(),
            fpu: (self.fresh.clone(), self.hardware.profile.state_components),
        };
        let kernel = restore(records, parts, image, identity)?;
        Ok((kernel, HostIo::new(stdio.events, host.signals)))
    }

    /// The machine with its guest; its clock is published.
    pub(super) fn with(self, kernel: Kernel, io: HostIo) -> Machine {
        let machine = Machine {
            shared: Arc::new(Shared {
                kernel: Arc::new(kernel),
                table: Table::shared(),
                counters: Counters::default(),
                strace: self.wanted.strace.then(Strace::default),
                cpu_source: self.hardware.cpu_source(),
                limit: Limit::default(),
            }),
            ioctls_before: self.ioctls_before(),
            bare: self,
            io,
            keeps: None,
            inspector: None,
            control: None,
            freezer: None,
        };
        let kernel = &machine.shared.kernel;
        let page = vdso::page(&kernel.memory);
        kernel.clock.publish(&page, machine.shared.cpu_source);
        machine
    }

    /// Table frames that belong to no guest.
    pub(super) fn supervisor_tables(&self) -> u64 {
        self.supervisor_tables
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
        let mut image = image(&bare.hardware).map_err(RunError::Image)?;
        let (kernel, io) = bare.revive(records, identity, host, (&mut image, None))?;
        Ok(bare.with(kernel, io))
    }
}

#[cfg(test)]
mod tests;
