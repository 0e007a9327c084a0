//! The machine below the Linux layer: pool, memory manager, KVM, and the monitor in place.

use std::sync::{Arc, Weak};

use guest::abi::{self, frame};
use guest::descriptors::{self, SyscallPort};
use guest::monitor;
use shadow_mm::{
    CreateError, GuestVa, LayoutError, Limits, Manager, NonPagedPool, Pfn, PfnRange, PoolFull,
    PoolLayout, PoolMode, SupervisorError, SupervisorRights,
};
use vm_memory::{Bytes, MmapRegion};

use crate::hv::kvm::area::CpuArea;
use crate::hv::kvm::vcpu::{CpuSetup, Vcpu};
use crate::hv::kvm::vm::{self, Slot, Vm, VmError};
use crate::hv::probe::{self, HostProfile, Paging, ProbeError};
use crate::hv::{CpuError, SyscallRing};
use crate::linux::vdso::data::CpuSource;
use crate::locks::{Mutex, rank};
use crate::memory::{FRAME, Flushes, Layer, Memory, Pool, PoolError, Space, VmmPlatform};

/// Frames of a large page.
const LARGE: u64 = 512;
/// One frame in this many is for page tables.
const TABLE_SHARE: u64 = 8;
/// Least memory a machine has.
pub const MIN_MEMORY: u64 = 8 << 20;
/// Most memory a machine has: what a frame number and the narrowest guest-physical address hold.
pub const MAX_MEMORY: u64 = 512 << 30;
/// Lowest address a guest may map, as Linux's `mmap_min_addr`.
const MIN_VA: u64 = 0x1_0000;

/// Why the machine could not be made.
#[derive(Debug, thiserror::Error)]
pub enum HardwareError {
    /// The memory asked for is not between the limits.
    #[error("--memory {0}: a machine has 8M to 512G")]
    MemorySize(u64),
    /// KVM refused.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// The probe failed.
    #[error(transparent)]
    Probe(#[from] ProbeError),
    /// KVM refused something of a virtual CPU.
    #[error(transparent)]
    Cpu(#[from] CpuError),
    /// No pool.
    #[error(transparent)]
    Pool(#[from] PoolError),
    /// The memory manager refused the layout.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// The memory manager has no table for a space.
    #[error("a space without programs cannot be made")]
    Idle(#[from] CreateError),
    /// The memory manager has no room for the monitor.
    #[error("the monitor cannot be mapped")]
    Monitor(#[from] SupervisorError),
    /// There are too many virtual CPUs.
    #[error("a virtual CPU has no room for its stack")]
    Area(#[from] PoolFull),
}

/// The machine below the Linux layer.
#[derive(Debug)]
pub struct Hardware {
    /// What the host was found to do.
    pub profile: HostProfile,
    /// Memory manager and pool.
    pub memory: Arc<Memory>,
    /// The virtual machine.
    pub vm: Arc<Vm>,
    /// A space without programs, for a virtual CPU that only touches tables.
    pub idle: Arc<Space<VmmPlatform>>,
    /// What the VMM and the monitor share and is not there from the start: the virtual CPUs' areas. A special pool: a
    /// monitor that leaves an area's ends faults.
    monitor_pool: Mutex<rank::MonitorPool, NonPagedPool>,
}

/// The pool of a machine whose virtual CPUs have no areas yet.
fn monitor_pool() -> NonPagedPool {
    NonPagedPool::new(abi::POOL_PAGES as u32, PoolMode::Special)
}

fn va(address: u64) -> GuestVa {
    GuestVa::new(address).expect("an address of the supervisor's slot")
}

fn zone(start: u64, frames: u64) -> PfnRange {
    let number = |n: u64| u32::try_from(n).expect("memory is below MAX_MEMORY");
    PfnRange {
        start: Pfn::new(number(start)),
        count: number(frames),
    }
}

/// Splits a machine's memory into the monitor's zone, tables and data.
fn layout(bytes: u64) -> PoolLayout {
    let frames = bytes / FRAME as u64;
    let tables = (frames / TABLE_SHARE)
        .next_multiple_of(LARGE)
        .min(frames / 2 / LARGE * LARGE)
        .max(LARGE);
    PoolLayout {
        tables: zone(frame::ZONE, tables),
        data: zone(frame::ZONE + tables, frames - tables),
    }
}

/// Virtual CPUs besides those that run programs: where KVM shadows page tables, one that touches tables when nobody else
/// can (see [`crate::memory::Flushes`]).
pub fn spare(paging: Paging) -> usize {
    match paging {
        Paging::Shadow => 1,
        Paging::Hardware => 0,
    }
}

impl Hardware {
    /// How programs learn which processor they run on.
    #[must_use]
    pub fn cpu_source(&self) -> CpuSource {
        if self.profile.tsc_aux_works {
            CpuSource::TscAux
        } else {
            CpuSource::Zero
        }
    }

    /// A machine with `bytes` of memory for guests and room for `cpus` virtual CPUs.
    ///
    /// # Errors
    /// The host has no usable KVM or not the memory.
    pub fn new(bytes: u64, cpus: usize) -> Result<Self, HardwareError> {
        if !(MIN_MEMORY..=MAX_MEMORY).contains(&bytes) {
            return Err(HardwareError::MemorySize(bytes));
        }
        let kvm = vm::open()?;
        let profile = probe::once(&kvm)?;
        let layout = layout(bytes);
        let frames = u64::from(layout.data.start.get()) + u64::from(layout.data.count);
        let pool = Pool::new(frames)?;
        let vm = Arc::new(Vm::new(&kvm)?);
        let first = u64::from(layout.data.start.get());
        vm.add_slot(slot(pool.region(), 0, first))?;
        let pool = pool_of(pool, &vm);
        if profile.paging == Paging::Shadow {
            vm.set_shadow_pages(u64::from(layout.tables.count) + LARGE)?;
        }
        let limits = Limits {
            user_end: va(abi::USER_END),
            min_va: va(MIN_VA),
        };
        let manager = Manager::new(pool, layout, limits)?;
        install_monitor(&manager, profile.syscall)?;
        let idle = manager.create_space()?;
        let cpus = cpus + spare(profile.paging);
        let memory = Arc::new(Memory::new(manager, Flushes::new(profile.paging, cpus)));
        let flushes = Arc::downgrade(&memory);
        vm.set_on_turn(Box::new(move |turn| {
            if let Some(memory) = flushes.upgrade() {
                memory.flushes.turn(turn);
            }
        }));
        Ok(Self {
            profile,
            memory,
            vm,
            idle,
            monitor_pool: Mutex::new(monitor_pool()),
        })
    }

    /// Makes virtual CPU `index`.
    ///
    /// # Errors
    /// KVM refused.
    pub fn vcpu(&self, index: u64) -> Result<Vcpu, HardwareError> {
        Ok(Vcpu::new(&self.vm, self.cpu_setup(index)?)?)
    }

    /// What virtual CPU `index` is made with; its area is there from now on.
    ///
    /// # Errors
    /// There is no room for its area.
    pub fn cpu_setup(&self, index: u64) -> Result<CpuSetup, HardwareError> {
        let port = match self.profile.syscall {
            SyscallRing::Zero => SyscallPort::Closed,
            SyscallRing::Three => SyscallPort::Open,
        };
        let area = self.area()?;
        area.write_tss(&descriptors::tss(area.va(), port));
        put_at(
            self.memory.manager.store(),
            frame::GDT * FRAME as u64 + descriptors::tss_descriptor_offset(index),
            &descriptors::tss_descriptor(area.va()),
        );
        // No root yet: the first entry changes to the thread's own.
        Ok(CpuSetup {
            index,
            area,
            root: 0,
            cr4: self.profile.cr4,
            xcr0: self.profile.xcr0,
            syscall: self.profile.syscall,
            iret: self.profile.iret,
            fpu: self.profile.fpu,
        })
    }

    /// The area of a virtual CPU, in the monitor's pool. It stays: whoever gets none, or no virtual CPU for it, makes
    /// no machine.
    fn area(&self) -> Result<CpuArea, HardwareError> {
        let got = self
            .monitor_pool
            .lock()
            .allocate(abi::CPU_AREA_PAGES as u32)?;
        for run in &got.unbacked {
            let (first, pages) = (u64::from(run.start), u64::from(run.end - run.start));
            self.memory.manager.map_supervisor(
                va(abi::pool_page(first)),
                frame::POOL + first,
                pages,
                SupervisorRights::WRITE,
            )?;
        }
        let first = u64::from(got.pages.start);
        let region = Arc::clone(self.memory.manager.store().region());
        let offset = (frame::POOL + first) as usize * FRAME;
        Ok(CpuArea::new(region, offset, abi::pool_page(first)))
    }

    /// Lays a layer under the guest's memory ([`Pool::lay`]), in a slot that nothing can be stored to.
    ///
    /// # Errors
    /// There is no room for it, or KVM refused the slot.
    pub fn attach_layer(&self, layer: &Layer) -> Result<PfnRange, HardwareError> {
        Ok(self.memory.manager.store().lay(layer)?)
    }

    /// Shows ring 3 the vDSO.
    ///
    /// # Errors
    /// The memory manager has no table frame left.
    pub fn map_vdso(&self, image: &[u8]) -> Result<(), HardwareError> {
        let pages = (image.len() as u64).div_ceil(FRAME as u64);
        assert!(
            pages <= abi::VDSO_CODE_PAGES,
            "the vDSO has outgrown its pages"
        );
        let manager = &self.memory.manager;
        put(manager.store(), frame::VDSO_CODE, image);
        let user = SupervisorRights::USER;
        manager.map_supervisor(
            va(abi::VDSO_CODE_VA),
            frame::VDSO_CODE,
            pages,
            user | SupervisorRights::EXEC,
        )?;
        manager.map_supervisor(va(abi::VDSO_DATA_VA), frame::VDSO_DATA, 1, user)?;
        Ok(())
    }
}

/// The pool's frames from `first` to `end`, as a slot.
fn slot(region: &Arc<MmapRegion>, first: u64, end: u64) -> Slot {
    Slot {
        gpa: first * FRAME as u64,
        host: region.as_ptr() as u64 + first * FRAME as u64,
        bytes: (end - first) * FRAME as u64,
        owner: Arc::clone(region) as _,
    }
}

/// The pool of a machine. The monitor's zone and the tables are one slot that is there from the start. Of the data zone
/// a slot is made when its first frame is used: KVM keeps something for each page of a slot, and most
/// machines never use most of their memory.
fn pool_of(pool: Pool, vm: &Arc<Vm>) -> Pool {
    // Who has the pool does not keep the machine; and without that nobody needs the slot.
    let (vm, region) = (Arc::downgrade(vm), Arc::clone(pool.region()));
    let for_layers = Weak::clone(&vm);
    let open = Box::new(move |frames: PfnRange| {
        let Some(vm) = vm.upgrade() else { return true };
        let added = vm.add_slot(slot(&region, frames.start.get().into(), frames.end()));
        if let Err(error) = &added {
            tracing::warn!(%error, "the machine's memory ends here");
        }
        added.is_ok()
    });
    let show = Box::new(move |frames: PfnRange, layer: &Layer| {
        let Some(vm) = for_layers.upgrade() else {
            return Ok(());
        };
        Ok(vm.add_read_only_slot(Slot {
            gpa: frames.start.gpa(),
            host: layer.region().as_ptr() as u64,
            bytes: u64::from(frames.count) * FRAME as u64,
            owner: Arc::clone(layer.region()) as _,
        })?)
    });
    pool.opened_by(open, show)
}

fn put(pool: &Pool, first: u64, bytes: &[u8]) {
    put_at(pool, first * FRAME as u64, bytes);
}

fn put_at(pool: &Pool, gpa: u64, bytes: &[u8]) {
    let to = pool.bytes(gpa, bytes.len());
    to.write_slice(bytes, 0).expect("the same length");
}

/// Copies the monitor into its zone and maps it.
fn install_monitor(
    manager: &Manager<VmmPlatform>,
    syscall: SyscallRing,
) -> Result<(), SupervisorError> {
    let pool = manager.store();
    for (first, bytes) in [
        (frame::MONITOR_CODE, monitor::image()),
        (frame::IDT, &descriptors::idt()),
        (frame::GDT, &descriptors::gdt()),
        (frame::SYSCALL_STUB, monitor::syscall_stub()),
    ] {
        put(pool, first, bytes);
    }
    let exec = SupervisorRights::EXEC;
    let stub = match syscall {
        SyscallRing::Zero => exec,
        SyscallRing::Three => exec | SupervisorRights::USER,
    };
    let none = SupervisorRights::empty();
    manager.map_supervisor(va(abi::MONITOR_CODE_VA), frame::MONITOR_CODE, 1, exec)?;
    manager.map_supervisor(va(abi::IDT_VA), frame::IDT, 1, none)?;
    // The processor sets the accessed bit of a descriptor it loads.
    manager.map_supervisor(va(abi::GDT_VA), frame::GDT, 1, SupervisorRights::WRITE)?;
    manager.map_supervisor(va(abi::SYSCALL_STUB_VA), frame::SYSCALL_STUB, 1, stub)?;
    let tables = manager.layout().tables;
    let first = u64::from(tables.start.get());
    manager.map_supervisor(
        va(abi::TABLES_VA + first * FRAME as u64),
        first,
        u64::from(tables.count),
        SupervisorRights::WRITE,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn areas_of_all_virtual_cpus_fit_and_the_first_have_gaps() {
        let mut pool = monitor_pool();
        let mut area = || {
            let got = pool.allocate(abi::CPU_AREA_PAGES as u32).expect("room");
            got.pages
        };
        let areas: Vec<_> = (0..abi::MAX_CPUS).map(|_| area()).collect();
        assert!(areas[0].start >= areas[1].end + 2, "two gaps in between");
        assert!(pool.usage().unguarded < abi::MAX_CPUS as u32 / 3 * 2);
    }

    #[test]
    fn zones_follow_each_other_and_tables_are_large_pages() {
        for bytes in [MIN_MEMORY, 64 << 20, 1 << 30, MAX_MEMORY] {
            let l = layout(bytes);
            assert_eq!(u64::from(l.tables.count) % LARGE, 0);
            assert_eq!(l.tables.start.get() + l.tables.count, l.data.start.get());
            assert_eq!(
                (u64::from(l.tables.count) + u64::from(l.data.count)) * 4096,
                bytes
            );
        }
    }
}
