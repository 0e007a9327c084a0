//! The FPU and vector state of the threads a virtual CPU runs: how it gets there, and out again.
//!
//! **In.** Where ring 0 runs natively, the VMM puts it into the virtual CPU's area and the monitor loads it on its way into
//! ring 3: no ioctl. XRSTOR refuses a state that is not as it must be, with an exception of ring 0; so what the VMM puts
//! there it has made plain first ([`xsave::loadable`]), and what cannot be made plain goes to KVM, which checks all of it. Elsewhere
//! it goes to KVM at once.
//!
//! **Out.** The state of a thread that leaves stays where it is ([`LeftState`]) until somebody wants it: the worker of another
//! virtual CPU that goes on with the thread, somebody who writes it down, or this virtual CPU, because it is to run another thread.
//! A thread that comes back first finds it there, and one that has ended meanwhile (or was reset) never had it copied.
//! KVM lets any thread of the host ask for the state of a virtual CPU that does not run. What was measured: `docs/adr/0015-fpu-state.md`.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use guest::abi;

use super::{Vcpu, cpu_error, xsave as ioctl};
use crate::hv::kvm::vm::Vm;
use crate::hv::{CpuError, FpuLoader, IretWorks};
use crate::linux::signal::xsave;
use crate::linux::thread::{Fpu, LeftFpu, XsaveArea};
use crate::locks::{Mutex, rank};

/// What loading a state came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Loaded {
    /// Who does it.
    pub by: FpuLoader,
    /// Whether the state of the thread before was copied out for it.
    pub copied_out: bool,
}

/// The state of a thread that has left a virtual CPU.
pub struct LeftState {
    vm: Arc<Vm>,
    place: Mutex<rank::LeftFpu, Place>,
}

/// Where it is.
enum Place {
    /// In the virtual CPU with this descriptor, which does not run: it is open, because whoever closes it looks here first.
    Cpu(RawFd),
    /// Here; perhaps in the virtual CPU as well.
    Here(XsaveArea),
    /// KVM did not give it out.
    Lost,
}

impl std::fmt::Debug for LeftState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LeftState").finish_non_exhaustive()
    }
}

impl LeftFpu for LeftState {
    fn is_only_there(&self) -> bool {
        matches!(*self.place.lock(), Place::Cpu(_))
    }

    fn get(&self) -> Result<XsaveArea, CpuError> {
        let mut place = self.place.lock();
        match &*place {
            Place::Here(area) => Ok(area.clone()),
            Place::Cpu(fd) => {
                let area = read(&self.vm, fd)?;
                *place = Place::Here(area.clone());
                Ok(area)
            }
            Place::Lost => Err(cpu_error("FPU state", "read")(kvm_ioctls::Error::new(
                libc::EIO,
            ))),
        }
    }
}

fn read(vm: &Vm, fd: &impl AsRawFd) -> Result<XsaveArea, CpuError> {
    vm.ioctls.fetch_add(1, Ordering::Relaxed);
    ioctl::get(fd, vm.xsave_bytes).map_err(cpu_error("FPU state", "read"))
}

impl Vcpu {
    /// Copies the FPU state of the thread it runs.
    ///
    /// # Errors
    /// KVM refused.
    pub fn fpu(&self) -> Result<XsaveArea, CpuError> {
        match &self.coming {
            Some(area) => Ok(area.clone()),
            None => read(&self.vm, &self.fd),
        }
    }

    /// Sets the FPU state, for another thread than the one that left last.
    ///
    /// # Errors
    /// KVM refused it, or to give out the one before.
    pub fn set_fpu(&mut self, area: XsaveArea) -> Result<Loaded, CpuError> {
        let copied_out = self.keep_left(1)?;
        let xcr0 = self.setup.xcr0;
        let plain = match (self.fpu, self.iret) {
            (FpuLoader::Monitor, IretWorks::Yes) => {
                let size = xsave::size_of_components(xcr0, self.vm.xsave_bytes);
                xsave::loadable(&area.0, size, xcr0)
            }
            (FpuLoader::Kvm, _) | (FpuLoader::Monitor, IretWorks::No) => None,
        };
        let by = match plain {
            Some(plain) if self.area.write_xsave(&plain) => {
                self.coming = Some(area);
                FpuLoader::Monitor
            }
            Some(_) | None => {
                self.coming = None;
                self.vm.ioctls.fetch_add(1, Ordering::Relaxed);
                ioctl::set(&self.fd, &area).map_err(cpu_error("FPU state", "set"))?;
                FpuLoader::Kvm
            }
        };
        Ok(Loaded { by, copied_out })
    }

    /// The thread it ran leaves: where its state is from now on.
    pub fn leave_fpu(&mut self) -> Fpu {
        if let Some(area) = self.coming.take() {
            return Fpu::Saved(area);
        }
        let left = Arc::new(LeftState {
            vm: Arc::clone(&self.vm),
            place: Mutex::new(Place::Cpu(self.fd.as_raw_fd())),
        });
        self.left = Some(Arc::clone(&left));
        Fpu::Left(left)
    }

    /// Whether a thread that comes back, having left its state there, finds it in this virtual CPU.
    ///
    /// # Errors
    /// KVM refused to give out the state that somebody else wants too.
    pub fn finds_left(&mut self, left: &Arc<dyn LeftFpu>) -> Result<bool, CpuError> {
        let there = |mine: &Arc<LeftState>| std::ptr::addr_eq(Arc::as_ptr(mine), Arc::as_ptr(left));
        let found = self.left.as_ref().is_some_and(there);
        if found {
            self.keep_left(2)?;
        }
        Ok(found)
    }

    /// Copies out the state that was left here, if anybody has it but the so many who ask. Whether it did.
    fn keep_left(&mut self, ask: usize) -> Result<bool, CpuError> {
        let Some(left) = self.left.take() else {
            return Ok(false);
        };
        let wanted = Arc::strong_count(&left) > ask;
        let here = wanted && left.is_only_there();
        if here && let Err(error) = left.get() {
            *left.place.lock() = Place::Lost;
            return Err(error);
        }
        Ok(here)
    }

    /// What the monitor's `restore` is told, to load the state in the area.
    pub(super) fn ask_for_restore(&mut self) {
        let regs = &mut self.fd.sync_regs_mut().regs;
        (regs.rax, regs.rdx) = (self.setup.xcr0 & 0xffff_ffff, self.setup.xcr0 >> 32);
        regs.rcx = self.area.va() + abi::AREA_XSAVE;
    }
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        // The descriptor is open until this is over.
        if let Err(error) = self.keep_left(1) {
            tracing::error!(%error, "a thread has lost its FPU state");
        }
    }
}
