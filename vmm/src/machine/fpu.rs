//! Whose FPU and vector state is in a worker's virtual CPU.
//!
//! The state of a thread that leaves is copied out at once, since another worker may take it next;
//! it is copied in only if the virtual CPU has run another thread meanwhile.

use crate::hv::CpuError;
use crate::hv::kvm::vcpu::Vcpu;
use crate::linux::thread::{Cpu, Fpu, Thread, Tid, XsaveArea};

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

/// Tracks the state in one virtual CPU.
#[derive(Debug)]
pub struct FpuSwitch {
    /// What the virtual CPU holds while the thread it belongs to is away.
    kept: Option<(Tid, XsaveArea)>,
    bytes: usize,
    components: u64,
}

impl FpuSwitch {
    /// For a fresh virtual CPU.
    ///
    /// # Errors
    /// KVM refused to tell the state's size.
    pub fn new(cpu: &Vcpu, components: u64) -> Result<Self, CpuError> {
        Ok(Self {
            kept: None,
            bytes: cpu.fpu()?.0.len(),
            components,
        })
    }

    /// The virtual CPU is another one from now on, which has run nothing.
    pub fn forget(&mut self) {
        self.kept = None;
    }

    /// Before `thread` runs: its state goes into the virtual CPU unless it is there.
    ///
    /// # Errors
    /// KVM refused it.
    pub fn enter(
        &mut self,
        cpu: &Vcpu,
        thread: &mut Thread,
        counters: &Counters,
    ) -> Result<(), CpuError> {
        let area = match std::mem::replace(&mut thread.fpu, Fpu::Live) {
            Fpu::Live => return Ok(()),
            Fpu::Initial => initial_area(self.bytes),
            Fpu::Saved(area) => area,
        };
        // Comparing four KiB is far cheaper than the ioctl.
        if self
            .kept
            .take()
            .is_some_and(|(tid, kept)| tid == thread.tid && kept == area)
        {
            return Ok(());
        }
        count(&counters.fpu_loads);
        cpu.set_fpu(&area)
    }

    /// `thread` leaves the virtual CPU, perhaps for another one.
    ///
    /// # Errors
    /// KVM refused to tell it.
    pub fn leave(
        &mut self,
        cpu: &Vcpu,
        thread: &mut Thread,
        counters: &Counters,
    ) -> Result<(), CpuError> {
        if thread.fpu == Fpu::Live {
            count(&counters.fpu_saves);
            let area = cpu.fpu()?;
            self.kept = Some((thread.tid, area.clone()));
            thread.fpu = Fpu::Saved(area);
        }
        Ok(())
    }

    /// What a handler may ask of the virtual CPU.
    pub fn access<'a>(&self, cpu: &'a Vcpu, counters: &'a Counters) -> CpuAccess<'a> {
        CpuAccess {
            cpu,
            counters,
            bytes: self.bytes,
            components: self.components,
        }
    }
}

/// The stopped virtual CPU, as a handler sees it.
pub struct CpuAccess<'a> {
    cpu: &'a Vcpu,
    counters: &'a Counters,
    bytes: usize,
    components: u64,
}

impl Cpu for CpuAccess<'_> {
    fn save_fpu<'t>(&mut self, fpu: &'t mut Fpu) -> Result<&'t mut XsaveArea, CpuError> {
        match fpu {
            Fpu::Saved(_) => {}
            Fpu::Initial => *fpu = Fpu::Saved(initial_area(self.bytes)),
            Fpu::Live => {
                count(&self.counters.fpu_saves);
                *fpu = Fpu::Saved(self.cpu.fpu()?);
            }
        }
        match fpu {
            Fpu::Saved(area) => Ok(area),
            Fpu::Initial | Fpu::Live => unreachable!("just saved"),
        }
    }

    fn xsave_layout(&self) -> (usize, u64) {
        (self.bytes, self.components)
    }
}
