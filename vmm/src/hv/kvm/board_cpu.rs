//! A virtual CPU of a kernel guest: its registers are set once, then it runs, and every exit is an
//! access to a port or an address that is no memory, or an end.
//!
//! KVM itself answers CPUID, most MSRs, the interrupt controllers and HLT, and starts the other
//! processors when the first sends INIT and SIPI.
#![expect(
    unsafe_code,
    reason = "the width of a repeated port access is only in the shared page"
)]

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use kvm_bindings::{CpuId, Msrs, kvm_msr_entry, kvm_regs, kvm_sregs};
use kvm_ioctls::{VcpuExit, VcpuFd};

use super::vm::{Vm, VmError, refused};
use crate::hv::CpuError;

/// Whoever answers the guest's accesses. Any width from 1 to 8 may come, at any address.
pub trait Bus {
    /// Fills `data` from a port; 1, 2 or 4 bytes.
    fn port_read(&self, port: u16, data: &mut [u8]);
    /// Takes what was written to a port; 1, 2 or 4 bytes.
    fn port_write(&self, port: u16, data: &[u8]);
    /// Fills `data` from an address; 1 to 8 bytes.
    fn memory_read(&self, gpa: u64, data: &mut [u8]);
    /// Takes what was written to an address; 1 to 8 bytes.
    fn memory_write(&self, gpa: u64, data: &[u8]);
}

/// Why the processor stopped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stop {
    /// An access, answered; run again.
    Access(Access),
    /// A signal came, or nothing at all.
    Kicked,
    /// A fault while a double fault was being delivered.
    TripleFault,
    /// KVM cannot go on with this processor.
    Stuck(String),
}

/// Kinds of access, for counting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// IN.
    PortRead,
    /// OUT.
    PortWrite,
    /// A load.
    MemoryRead,
    /// A store.
    MemoryWrite,
}

/// A virtual CPU.
pub struct BoardCpu {
    pub(super) fd: VcpuFd,
    pub(super) vm: Arc<Vm>,
}

impl std::fmt::Debug for BoardCpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BoardCpu").finish_non_exhaustive()
    }
}

impl BoardCpu {
    /// Virtual CPU `id` of `vm`, which has its board; `id` is also its APIC id.
    ///
    /// # Errors
    /// KVM refused.
    pub fn new(vm: &Arc<Vm>, id: u8, cpuid: &CpuId) -> Result<Self, VmError> {
        let fd = vm
            .fd()?
            .create_vcpu(u64::from(id))
            .map_err(refused("a virtual CPU"))?;
        fd.set_cpuid2(cpuid).map_err(refused("the CPUID leaves"))?;
        vm.ioctls.fetch_add(2, Ordering::Relaxed);
        Ok(Self {
            fd,
            vm: Arc::clone(vm),
        })
    }

    /// Sets model-specific registers; each must be taken.
    ///
    /// # Errors
    /// KVM refused one.
    pub fn set_msrs(&self, list: &[(u32, u64)]) -> Result<(), VmError> {
        for &(index, data) in list {
            let entry = kvm_msr_entry {
                index,
                data,
                ..Default::default()
            };
            let one = Msrs::from_entries(&[entry]).expect("one entry");
            let set = self.fd.set_msrs(&one).map_err(refused("an MSR"))?;
            if set != 1 {
                return Err(VmError::Msr { index, data });
            }
        }
        Ok(())
    }

    /// Sets what the first processor starts with, by changing what KVM gives after a reset.
    ///
    /// # Errors
    /// KVM refused.
    pub fn set_start(
        &self,
        regs: &kvm_regs,
        change: impl FnOnce(&mut kvm_sregs),
    ) -> Result<(), VmError> {
        let mut sregs = self
            .fd
            .get_sregs()
            .map_err(refused("the system registers"))?;
        change(&mut sregs);
        self.fd
            .set_sregs(&sregs)
            .map_err(refused("the first system registers"))?;
        self.fd
            .set_regs(regs)
            .map_err(refused("the first registers"))
    }

    /// Connects the legacy interrupt controller and NMIs to the local APIC, as firmware does.
    ///
    /// # Errors
    /// KVM refused.
    pub fn set_local_interrupts(&self) -> Result<(), VmError> {
        const LVT_LINT0: usize = 0x350;
        const LVT_LINT1: usize = 0x360;
        const MODE: u32 = 0b111 << 8;
        const NMI: u32 = 0b100 << 8;
        const EXT_INT: u32 = 0b111 << 8;
        let mut lapic = self.fd.get_lapic().map_err(refused("the local APIC"))?;
        for (at, mode) in [(LVT_LINT0, EXT_INT), (LVT_LINT1, NMI)] {
            let old: [u8; 4] = std::array::from_fn(|i| lapic.regs[at + i].to_ne_bytes()[0]);
            let new = (u32::from_le_bytes(old) & !MODE | mode).to_le_bytes();
            for (i, byte) in new.into_iter().enumerate() {
                lapic.regs[at + i] = std::ffi::c_char::from_ne_bytes([byte]);
            }
        }
        self.fd
            .set_lapic(&lapic)
            .map_err(refused("the local APIC's inputs"))
    }

    /// Lets `signal` interrupt the guest, though the thread blocks it.
    ///
    /// # Errors
    /// KVM refused.
    pub fn set_kick_signal(&self, signal: i32) -> Result<(), CpuError> {
        super::ioctls::allow_signal(&self.fd, signal).map_err(|source| CpuError {
            what: "signal mask",
            verb: "set",
            source,
        })
    }

    /// Runs until the next exit, answering it from `bus`.
    ///
    /// # Errors
    /// KVM refused to run.
    pub fn run(&mut self, bus: &dyn Bus) -> Result<Stop, CpuError> {
        self.vm.ioctls.fetch_add(1, Ordering::Relaxed);
        let (access, data) = match self.fd.run() {
            Ok(VcpuExit::IoIn(port, data)) => (PortAccess::In(port), std::ptr::from_mut(data)),
            Ok(VcpuExit::IoOut(port, data)) => {
                (PortAccess::Out(port), std::ptr::from_ref(data).cast_mut())
            }
            Ok(VcpuExit::MmioRead(gpa, data)) => {
                bus.memory_read(gpa, data);
                return Ok(Stop::Access(Access::MemoryRead));
            }
            Ok(VcpuExit::MmioWrite(gpa, data)) => {
                bus.memory_write(gpa, data);
                return Ok(Stop::Access(Access::MemoryWrite));
            }
            Ok(VcpuExit::Intr) => return Ok(Stop::Kicked),
            Ok(VcpuExit::Shutdown) => return Ok(Stop::TripleFault),
            Ok(VcpuExit::InternalError) => return Ok(Stop::Stuck(self.internal_error())),
            Ok(other) => return Ok(Stop::Stuck(format!("KVM left with {other:?}"))),
            Err(e) if e.errno() == libc::EINTR || e.errno() == libc::EAGAIN => {
                return Ok(Stop::Kicked);
            }
            Err(e) => {
                return Err(CpuError {
                    what: "kernel",
                    verb: "run",
                    source: io::Error::from_raw_os_error(e.errno()),
                });
            }
        };
        // SAFETY: the exit was a port access, so this is the union's valid member.
        let width = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.io.size };
        // SAFETY: the bytes are in the page KVM shares with us, which `self.fd` keeps mapped, and
        // nothing else refers to them until the next run.
        let data = unsafe { &mut *data };
        Ok(Stop::Access(access.answer(bus, usize::from(width), data)))
    }

    /// What KVM says about why it gave up, with the place.
    fn internal_error(&mut self) -> String {
        const EMULATION: u32 = 1;
        // SAFETY: the exit was an internal error, so this is the union's valid member.
        let internal = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.internal };
        let what = match internal.suberror {
            EMULATION => "KVM cannot emulate an instruction".to_owned(),
            other => format!("KVM gave up (internal error {other})"),
        };
        match self.fd.get_regs() {
            Ok(regs) => format!("{what} at {:#x}", regs.rip),
            Err(_) => what,
        }
    }
}

/// A port access, whose data is one element or several (string instructions).
#[derive(Clone, Copy, Debug)]
enum PortAccess {
    In(u16),
    Out(u16),
}

impl PortAccess {
    fn answer(self, bus: &dyn Bus, width: usize, data: &mut [u8]) -> Access {
        let elements = data.chunks_mut(width.max(1));
        match self {
            Self::In(port) => {
                elements.for_each(|element| bus.port_read(port, element));
                Access::PortRead
            }
            Self::Out(port) => {
                elements.for_each(|element| bus.port_write(port, element));
                Access::PortWrite
            }
        }
    }
}
