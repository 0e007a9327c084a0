//! Workers that rest: without their virtual CPU.
//!
//! What KVM keeps for a machine that does nothing is several times what the VMM does. So when all workers of a machine have had
//! nothing to do for a while (the roster says when), each gives its virtual CPU back, and with the last one KVM gives back the
//! whole virtual machine ([`crate::hv::kvm::vm`]). Nothing of the guest is in it: the threads that wait are records, with their
//! registers and FPU state, and memory and page tables are the pool's. The worker that gets the next task makes
//! its virtual CPU again; the guest notices nothing but the time that takes.
//!
//! A host that has no memory for the machine at that moment is asked again for some seconds; then the machine ends.

use std::sync::Arc;
use std::time::Duration;

use shadow_mm::Pfn;

use super::{CpuError, FpuSwitch, Guests, Kicker, Memory, Vcpu, Worker};
use crate::hv::kvm::vcpu::CpuSetup;
use crate::hv::kvm::vm::{Vm, VmError};

/// How often KVM is asked for a virtual CPU again, and how long it is let alone in between.
const ATTEMPTS: u32 = 50;
const PAUSE: Duration = Duration::from_millis(100);

/// A worker, at work or at rest.
pub(super) enum State {
    Awake(Worker),
    Resting(Resting),
}

/// A worker without its virtual CPU.
pub(super) struct Resting {
    guests: Arc<Guests>,
    memory: Arc<Memory>,
    index: usize,
    vm: Arc<Vm>,
    setup: CpuSetup,
    fpu: FpuSwitch,
    kicker: Arc<Kicker>,
    idle: Pfn,
}

impl State {
    /// Gives the virtual CPU back, if there is one.
    pub(super) fn rest(self) -> Self {
        match self {
            Self::Awake(worker) => Self::Resting(worker.rest()),
            Self::Resting(_) => self,
        }
    }

    /// The worker with its virtual CPU, made again if it rested.
    ///
    /// # Errors
    /// KVM refused.
    pub(super) fn wake(self) -> Result<Worker, CpuError> {
        match self {
            Self::Awake(worker) => Ok(worker),
            Self::Resting(resting) => resting.wake(),
        }
    }
}

impl Worker {
    /// Gives the virtual CPU back: it holds no thread.
    fn rest(self) -> Resting {
        let Self {
            guests,
            memory,
            index,
            cpu,
            fpu,
            kicker,
            idle,
            // Nothing runs that could be looked at.
            look: _,
        } = self;
        let (vm, setup) = cpu.rest();
        memory.flushes.rest_spare();
        memory.acknowledge(memory.flushes.rested());
        Resting {
            guests,
            memory,
            index,
            vm,
            setup,
            fpu,
            kicker,
            idle,
        }
    }
}

impl Resting {
    fn wake(self) -> Result<Worker, CpuError> {
        let mut made = self.cpu();
        for attempt in 1..ATTEMPTS {
            match &made {
                Err(error) if !self.guests.is_closed() => {
                    // Once; and if it cannot go on at all, its end says why.
                    if attempt == 1 {
                        tracing::info!(%error, "a machine that rested cannot go on yet");
                    }
                    std::thread::sleep(PAUSE);
                    made = self.cpu();
                }
                Ok(_) | Err(_) => break,
            }
        }
        let Self {
            guests,
            memory,
            index,
            fpu,
            kicker,
            idle,
            ..
        } = self;
        Ok(Worker {
            guests,
            memory,
            index,
            cpu: made?,
            fpu,
            kicker,
            idle,
            look: false,
        })
    }

    fn cpu(&self) -> Result<Vcpu, CpuError> {
        let made = Vcpu::new(&self.vm, self.setup.clone());
        let cpu = made.map_err(refused)?;
        cpu.set_kick_signal(Kicker::signal())?;
        Ok(cpu)
    }
}

/// Why there is no virtual CPU.
pub(in crate::machine) fn refused(error: VmError) -> CpuError {
    CpuError {
        what: "virtual machine",
        verb: "made again",
        source: std::io::Error::other(error),
    }
}

#[cfg(test)]
mod tests;
