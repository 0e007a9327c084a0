//! Whose FPU and vector state is in a worker's virtual CPU.
//!
//! The state of a thread that leaves stays there until somebody wants it ([`crate::hv::kvm::vcpu::LeftState`]);
//! it is copied in only if the virtual CPU has run another thread meanwhile.

use crate::hv::kvm::vcpu::Vcpu;
use crate::hv::{CpuError, FpuLoader};
use crate::linux::thread::{Cpu, Fpu, LeftFpu, Thread, XsaveArea};

use super::stats::{Counters, count};

/// The state a program starts with: x87 control word and MXCSR as the x86-64 psABI (3.4.1) says.
fn initial_area(bytes: usize) -> XsaveArea {
    let mut area = vec![0_u8; bytes];
    area[0..2].copy_from_slice(&0x037f_u16.to_le_bytes());
    area[24..28].copy_from_slice(&0x1f80_u32.to_le_bytes());
    // XSTATE_BV: x87 and SSE are here, everything else is in its initial state.
    area[512] = 3;
    XsaveArea(area)
}

/// Counts a copy that is about to be made.
fn count_copy(left: &dyn LeftFpu, counters: &Counters) {
    if left.is_only_there() {
        count(&counters.fpu_saves);
    }
}

/// Moves states into a virtual CPU and out of it.
#[derive(Clone, Copy, Debug)]
pub struct FpuSwitch {
    bytes: usize,
    components: u64,
}

impl FpuSwitch {
    /// For a virtual CPU.
    ///
    /// # Errors
    /// KVM refused to tell the state's size.
    pub fn new(cpu: &Vcpu, components: u64) -> Result<Self, CpuError> {
        Ok(Self {
            bytes: cpu.fpu()?.0.len(),
            components,
        })
    }

    /// Before `thread` runs: its state goes into the virtual CPU unless it is there.
    ///
    /// # Errors
    /// KVM refused it.
    pub fn enter(
        self,
        cpu: &mut Vcpu,
        thread: &mut Thread,
        counters: &Counters,
    ) -> Result<(), CpuError> {
        let area = match std::mem::replace(&mut thread.fpu, Fpu::Live) {
            Fpu::Live => return Ok(()),
            Fpu::Initial => initial_area(self.bytes),
            Fpu::Saved(area) => area,
            Fpu::Left(left) => {
                if cpu.finds_left(&left)? {
                    return Ok(());
                }
                count_copy(&*left, counters);
                left.get()?
            }
        };
        count(&counters.fpu_loads);
        let loaded = cpu.set_fpu(area)?;
        if loaded.copied_out {
            count(&counters.fpu_saves);
        }
        if loaded.by == FpuLoader::Kvm {
            count(&counters.fpu_loads_by_kvm);
        }
        Ok(())
    }

    /// `thread` leaves the virtual CPU, perhaps for another one.
    pub fn leave(self, cpu: &mut Vcpu, thread: &mut Thread) {
        if matches!(thread.fpu, Fpu::Live) {
            thread.fpu = cpu.leave_fpu();
        }
    }

    /// What a handler may ask of the virtual CPU.
    pub fn access<'a>(self, cpu: &'a Vcpu, counters: &'a Counters) -> CpuAccess<'a> {
        CpuAccess {
            cpu,
            counters,
            fpu: self,
        }
    }
}

/// The stopped virtual CPU, as a handler sees it.
pub struct CpuAccess<'a> {
    cpu: &'a Vcpu,
    counters: &'a Counters,
    fpu: FpuSwitch,
}

impl Cpu for CpuAccess<'_> {
    fn save_fpu<'t>(&mut self, fpu: &'t mut Fpu) -> Result<&'t mut XsaveArea, CpuError> {
        let area = match fpu {
            Fpu::Saved(_) => None,
            Fpu::Initial => Some(initial_area(self.fpu.bytes)),
            Fpu::Live => {
                count(&self.counters.fpu_saves);
                Some(self.cpu.fpu()?)
            }
            Fpu::Left(left) => {
                count_copy(&**left, self.counters);
                Some(left.get()?)
            }
        };
        if let Some(area) = area {
            *fpu = Fpu::Saved(area);
        }
        match fpu {
            Fpu::Saved(area) => Ok(area),
            Fpu::Initial | Fpu::Live | Fpu::Left(_) => unreachable!("just saved"),
        }
    }

    fn xsave_layout(&self) -> (usize, u64) {
        (self.fpu.bytes, self.fpu.components)
    }
}
