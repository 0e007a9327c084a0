//! Everything KVM remembers about a kernel guest's processors and board, as data that `serde` can
//! write: taken from a machine that stands still, put into a new one with the same CPUID leaves and the
//! same memory.
//!
//! The order of a restore is [`BoardCpu::restore`] for each processor, then [`Vm::restore_board`]: the
//! I/O APIC hands what is pending to local APICs. The guest's clocks stand still in between.
#![expect(unsafe_code, reason = "an interrupt controller's state is a union")]

use std::ffi::c_char;
use std::io;

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, Msrs, kvm_clock_data,
    kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_pit_state2,
    kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs,
};
use serde::{Deserialize, Serialize};

use super::board_cpu::BoardCpu;
use super::vm::{Vm, VmError, refused};
use super::xsave;
use crate::linux::thread::XsaveArea;

/// Bytes of an interrupt controller's state.
const CHIP: usize = 512;
/// The interrupt controllers, as KVM numbers them.
const CHIPS: [u32; 3] = [
    KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE,
    KVM_IRQCHIP_IOAPIC,
];

/// A model-specific register.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MsrSaved {
    /// Its number.
    pub index: u32,
    /// What is in it.
    pub data: u64,
}

/// A virtual CPU, in KVM's own terms (KVM API, `KVM_GET_...`).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the names of the ioctls")]
pub struct CpuSaved {
    pub mp_state: kvm_mp_state,
    pub regs: kvm_regs,
    pub sregs: kvm_sregs,
    pub xcrs: kvm_xcrs,
    /// An XSAVE area.
    pub xsave: Vec<u8>,
    pub debugregs: kvm_debugregs,
    pub lapic: kvm_lapic_state,
    pub events: kvm_vcpu_events,
    pub tsc_khz: u32,
    /// In the order in which they are to be set.
    pub msrs: Vec<MsrSaved>,
}

/// Interrupt controllers, timer and clock.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BoardSaved {
    /// PICs and I/O APIC.
    pub chips: [Vec<u8>; 3],
    /// The timer.
    pub pit: kvm_pit_state2,
    /// The guest's nanoseconds (KVM clock).
    pub clock: u64,
}

impl BoardCpu {
    /// Everything KVM knows about this processor, with those of `msrs` that it has. An access that was
    /// answered last is completed first.
    ///
    /// # Errors
    /// KVM refused.
    pub fn save(&mut self, msrs: &[u32]) -> Result<CpuSaved, VmError> {
        self.complete()?;
        // First: it takes INIT and SIPI that are on their way.
        let mp_state = self.fd.get_mp_state().map_err(refused("what a CPU does"))?;
        let xsave = xsave::get(&self.fd, self.vm.xsave_bytes).map_err(refused("the FPU"))?;
        Ok(CpuSaved {
            mp_state,
            regs: self.fd.get_regs().map_err(refused("registers"))?,
            sregs: self.fd.get_sregs().map_err(refused("system registers"))?,
            xcrs: self.fd.get_xcrs().map_err(refused("XCR0"))?,
            xsave: xsave.0,
            debugregs: self
                .fd
                .get_debug_regs()
                .map_err(refused("debug registers"))?,
            lapic: self.fd.get_lapic().map_err(refused("the local APIC"))?,
            tsc_khz: self.fd.get_tsc_khz().map_err(refused("the TSC's rate"))?,
            msrs: self.msrs(msrs)?,
            events: self
                .fd
                .get_vcpu_events()
                .map_err(refused("pending events"))?,
        })
    }

    /// Makes this processor, which has not run, what `saved` was saved from.
    ///
    /// # Errors
    /// KVM refused: it is another kind of host, or what was saved is none of its own.
    pub fn restore(&self, saved: &CpuSaved) -> Result<(), VmError> {
        let fd = &self.fd;
        if fd.get_tsc_khz().ok() != Some(saved.tsc_khz) {
            fd.set_tsc_khz(saved.tsc_khz)
                .map_err(refused("the TSC's rate"))?;
        }
        fd.set_mp_state(saved.mp_state)
            .map_err(refused("what a CPU does"))?;
        fd.set_regs(&saved.regs).map_err(refused("registers"))?;
        fd.set_sregs(&saved.sregs)
            .map_err(refused("system registers"))?;
        fd.set_xcrs(&saved.xcrs).map_err(refused("XCR0"))?;
        let area = XsaveArea(saved.xsave.clone());
        if area.0.len() > self.vm.xsave_bytes {
            return Err(VmError::Lacks("room for the FPU that was saved"));
        }
        xsave::set(fd, &area).map_err(refused("the FPU"))?;
        fd.set_debug_regs(&saved.debugregs)
            .map_err(refused("debug registers"))?;
        fd.set_lapic(&saved.lapic)
            .map_err(refused("the local APIC"))?;
        // After the local APIC, whose timer's mode decides about the TSC deadline.
        self.set_changed_msrs(&saved.msrs)?;
        fd.set_vcpu_events(&saved.events)
            .map_err(refused("pending events"))?;
        // So that the guest's watchdogs forgive the pause; it need not have a clock.
        let _ = fd.kvmclock_ctrl();
        Ok(())
    }

    /// Completes the access that made the last exit, without running the guest any further.
    fn complete(&mut self) -> Result<(), VmError> {
        self.fd.set_kvm_immediate_exit(1);
        let left = match self.fd.run() {
            Err(error) if error.errno() == libc::EINTR || error.errno() == libc::EAGAIN => Ok(()),
            Err(error) => Err(refused("the end of an access")(error)),
            // A string access goes on: more of it is to be answered.
            Ok(_) => Err(VmError::Refused {
                what: "the end of an access",
                source: io::ErrorKind::ResourceBusy.into(),
            }),
        };
        self.fd.set_kvm_immediate_exit(0);
        left
    }

    /// Sets those that have another content now: KVM lets some be read that it does not let be written,
    /// because the guest has not the feature; those never change.
    fn set_changed_msrs(&self, saved: &[MsrSaved]) -> Result<(), VmError> {
        let entry = |m: &MsrSaved| kvm_msr_entry {
            index: m.index,
            data: m.data,
            ..Default::default()
        };
        let entries: Vec<kvm_msr_entry> = saved.iter().map(entry).collect();
        let list = |entries: &[kvm_msr_entry]| {
            Msrs::from_entries(entries).map_err(|_| VmError::Lacks("so many MSRs as were saved"))
        };
        let refused_at = |entries: &[kvm_msr_entry], done: usize| match entries.get(done) {
            None => Ok(()),
            Some(&kvm_msr_entry { index, data, .. }) => Err(VmError::Msr { index, data }),
        };
        let mut now = list(&entries)?;
        let known = self.fd.get_msrs(&mut now).map_err(refused("MSRs"))?;
        refused_at(&entries, known)?;
        let pairs = entries.iter().zip(now.as_slice());
        let changed = pairs.filter(|(want, has)| want.data != has.data);
        let changed: Vec<kvm_msr_entry> = changed.map(|(want, _)| *want).collect();
        let set = self.fd.set_msrs(&list(&changed)?);
        refused_at(&changed, set.map_err(refused("MSRs"))?)
    }

    /// Those of `wanted` that this KVM has.
    fn msrs(&self, wanted: &[u32]) -> Result<Vec<MsrSaved>, VmError> {
        let mut all = Vec::new();
        for &index in wanted {
            let entry = kvm_msr_entry {
                index,
                ..Default::default()
            };
            let mut one = Msrs::from_entries(&[entry]).expect("one entry");
            if self.fd.get_msrs(&mut one).map_err(refused("an MSR"))? == 1 {
                let data = one.as_slice()[0].data;
                all.push(MsrSaved { index, data });
            }
        }
        Ok(all)
    }
}

impl Vm {
    /// The interrupt controllers, the timer and the clock. No processor may be running.
    ///
    /// # Errors
    /// KVM refused.
    pub fn save_board(&self) -> Result<BoardSaved, VmError> {
        let clock = self.fd()?.get_clock().map_err(refused("the clock"))?;
        Ok(BoardSaved {
            chips: [
                self.chip(CHIPS[0])?,
                self.chip(CHIPS[1])?,
                self.chip(CHIPS[2])?,
            ],
            pit: self.fd()?.get_pit2().map_err(refused("the timer"))?,
            clock: clock.clock,
        })
    }

    /// Makes a board what `saved` was saved from, after its processors.
    ///
    /// # Errors
    /// KVM refused, or what was saved is no board's.
    pub fn restore_board(&self, saved: &BoardSaved) -> Result<(), VmError> {
        self.fd()?
            .set_pit2(&saved.pit)
            .map_err(refused("the timer"))?;
        let clock = kvm_clock_data {
            clock: saved.clock,
            ..Default::default()
        };
        self.fd()?.set_clock(&clock).map_err(refused("the clock"))?;
        for (&id, bytes) in CHIPS.iter().zip(&saved.chips) {
            self.set_chip(id, bytes)?;
        }
        Ok(())
    }

    fn chip(&self, id: u32) -> Result<Vec<u8>, VmError> {
        let mut chip = kvm_irqchip {
            chip_id: id,
            ..Default::default()
        };
        self.fd()?
            .get_irqchip(&mut chip)
            .map_err(refused("an interrupt controller"))?;
        // SAFETY: the union's member of plain bytes is as large as all of it and valid for any content.
        let bytes = unsafe { chip.chip.dummy };
        Ok(bytes.iter().map(|&b| b.to_ne_bytes()[0]).collect())
    }

    fn set_chip(&self, id: u32, bytes: &[u8]) -> Result<(), VmError> {
        if bytes.len() != CHIP {
            return Err(VmError::Lacks("an interrupt controller like the one saved"));
        }
        let mut chip = kvm_irqchip {
            chip_id: id,
            ..Default::default()
        };
        let dummy: [c_char; CHIP] = std::array::from_fn(|i| c_char::from_ne_bytes([bytes[i]]));
        chip.chip.dummy = dummy;
        self.fd()?
            .set_irqchip(&chip)
            .map_err(refused("an interrupt controller"))
    }
}

#[cfg(test)]
#[path = "board_state_tests.rs"]
mod tests;
