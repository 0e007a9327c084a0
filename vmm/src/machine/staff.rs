//! Whom a machine's threads are: workers, the spare virtual CPU's, the clock's, and those that keep memory available.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use shadow_mm::ZoneStats;

use super::bare::Bare;
use super::crew::Seat;
use super::hardware;
use super::worker::Worker;
use crate::hv::CpuError;
use crate::hv::kvm::vcpu::Vcpu;
use crate::linux::vdso::data::CpuSource;
use crate::memory::{Memory, Writeback};

impl Bare {
    /// Starts the threads, unless they are there.
    ///
    /// # Errors
    /// The host has none.
    pub(super) fn staff(&mut self) -> io::Result<()> {
        if self.crew.is_there() {
            return Ok(());
        }
        self.writeback = Some(Writeback::start(&self.hardware.memory)?);
        self.start_paging();
        self.start_workers()?;
        let source = self.cpu_source();
        self.crew.start(
            "clock",
            || Ok(()),
            move |(), seat| {
                run_clock(seat, source);
                Ok(())
            },
        )
    }

    /// The same, and waits until they wait for a guest.
    ///
    /// # Errors
    /// The host has none.
    pub(crate) fn warm_up(&mut self) -> io::Result<()> {
        self.staff()?;
        self.crew
            .dock
            .wait()
            .map_err(|left| io::Error::other(left.join(", ")))
    }

    fn start_workers(&mut self) -> io::Result<()> {
        let working = self.cpus.len() - hardware::spare(self.hardware.profile.paging);
        for (n, cpu) in std::mem::take(&mut self.cpus).into_iter().enumerate() {
            let name = format!("vcpu{}", cpu.index());
            let begin = self.worker(cpu);
            if n < working {
                let run = |worker: &mut Worker, seat: &Seat| worker.run(&seat.shared);
                self.crew.start(&name, begin, run)?;
            } else {
                self.crew
                    .start_apart(&name, move |dock| begin()?.run_spare(|| dock.is_over()))?;
            }
        }
        Ok(())
    }

    /// What makes a worker, on its thread.
    fn worker(&self, cpu: Vcpu) -> impl FnOnce() -> Result<Worker, CpuError> + Send + use<> {
        let memory = Arc::clone(&self.hardware.memory);
        let components = self.hardware.profile.state_components;
        let idle = self.hardware.idle.root();
        move || Worker::new(memory, cpu, components, idle)
    }

    /// The pager and the zeroer. Without them memory is only tighter: the host may have no thread for
    /// them.
    fn start_paging(&mut self) {
        let threads: [(&str, fn(&Memory)); 2] =
            [("pager", Memory::run_pager), ("zeroer", Memory::run_zeroer)];
        for (name, body) in threads {
            let memory = Arc::clone(&self.hardware.memory);
            let started = self.crew.start_apart(name, move |_| {
                body(&memory);
                Ok(())
            });
            if let Err(error) = started {
                tracing::warn!(%error, "no thread to keep memory available with");
            }
        }
    }

    /// Whether nothing of a guest is left in it.
    pub(super) fn is_as_new(&self) -> bool {
        let memory = &self.hardware.memory;
        let stats = memory.manager.stats();
        // A frame in flight is the zeroer's: no flush is pending, and nobody reads.
        let held =
            |zone: &ZoneStats| zone.active + zone.standby + zone.modified + zone.modified_no_write;
        let left =
            (held(&stats.data) + held(&stats.tables)).saturating_sub(self.supervisor_tables());
        let clean = left == 0 && stats.commit_charged == 0 && !memory.flushes.pending();
        if !clean {
            tracing::info!(
                left,
                committed = stats.commit_charged,
                "a machine is not used again"
            );
        }
        clean
    }
}

/// Ends the threads.
impl Drop for Bare {
    fn drop(&mut self) {
        if let Some(writeback) = self.writeback.take() {
            writeback.stop();
        }
        let memory = Arc::clone(&self.hardware.memory);
        memory.end_paging();
        self.crew.end(|| memory.flushes.wake_spare());
    }
}

/// The clock thread: deadlines, turns, timers, the vDSO's page, the machine's own time limit.
fn run_clock(seat: &Seat, source: CpuSource) {
    let kernel = &seat.shared.kernel;
    let limit = seat.timeout.map(|time| {
        let now = kernel.clock.monotonic();
        now.saturating_add(time.as_nanos() as u64)
    });
    let tick = || {
        if limit.is_some_and(|at| kernel.clock.monotonic() >= at) {
            seat.timed_out.store(true, Ordering::SeqCst);
            kernel.sched.end();
        }
        let page = crate::linux::vdso::page(&kernel.memory);
        let clock = kernel.clock.tick(Some(&page), source);
        let timers = crate::linux::proc::timers_due(kernel);
        [limit, clock, timers].into_iter().flatten().min()
    };
    let now = || kernel.clock.monotonic();
    kernel.sched.run_clock(now, tick);
}
