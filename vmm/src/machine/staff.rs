//! A machine's threads: workers, the spare virtual CPU's, the clock's. They belong to no guest, and end with the machine.
//! Those that look after its memory are started when they are wanted (`crate::memory::aides`).

use std::io;
use std::sync::Arc;
use std::time::Duration;

use shadow_mm::ZoneStats;

use super::bare::Bare;
use super::crew::Crew;
use super::guests::EndOnPanic;
use super::kick::take_no_signals;
use super::spare::{Calls, Made, Spare};
use super::worker::{Shared, Worker};
use crate::hv::CpuError;
use crate::hv::kvm::vcpu::CpuSetup;
use crate::locks::{Mutex, rank};

/// How long the threads may take to leave a guest that has ended: longer than the host takes to write out what a system
/// call was asked to.
const PATIENCE: Duration = Duration::from_secs(60);

/// What a virtual CPU failed with.
pub(super) type Failure = Arc<Mutex<rank::MachineFailure, Option<CpuError>>>;

/// The threads.
pub(super) struct Staff {
    /// Those that run guests.
    crew: Crew,
    /// Where KVM shadows page tables.
    spare: Option<Arc<Spare>>,
}

impl Bare {
    /// Starts the threads, unless they are there.
    ///
    /// # Errors
    /// The host has none.
    pub(crate) fn staff(&mut self) -> io::Result<()> {
        if self.staff.is_some() {
            return Ok(());
        }
        self.hardware.memory.open_aides();
        let spare = self.spare.take();
        let spare = spare.map(|setup| self.spare(setup));
        let mut crew = Crew::new();
        let started = self
            .start_workers(&mut crew)
            .and_then(|()| self.start_clock(&mut crew));
        if started.is_err() {
            self.guests.close();
        }
        self.staff = Some(Staff { crew, spare });
        started
    }

    /// The spare virtual CPU, which is made when it is called.
    fn spare(&self, setup: CpuSetup) -> Arc<Spare> {
        let made = Made {
            vm: Arc::clone(&self.hardware.vm),
            setup,
            components: self.hardware.profile.state_components,
            idle: self.hardware.idle.root(),
        };
        let spare = Spare::new(&self.guests, &self.failure, made);
        let calls = Calls(Arc::downgrade(&spare));
        self.hardware.memory.flushes.set_spare(Arc::new(calls));
        spare
    }

    fn start_workers(&mut self, crew: &mut Crew) -> io::Result<()> {
        self.guests.may_rest(self.cpus.len());
        for cpu in std::mem::take(&mut self.cpus) {
            let guests = Arc::clone(&self.guests);
            let failure = Arc::clone(&self.failure);
            let components = self.hardware.profile.state_components;
            let idle = self.hardware.idle.root();
            let name = format!("vcpu{}", cpu.index());
            crew.start(&name, move || {
                take_no_signals();
                let _end = EndOnPanic(&guests);
                let worker = Worker::new(Arc::clone(&guests), cpu, components, idle);
                let ran = worker.and_then(Worker::run);
                if let Err(error) = ran {
                    failure.lock().get_or_insert(error);
                    guests.close();
                }
            })?;
        }
        Ok(())
    }

    /// The clock thread: deadlines, turns, timers, the vDSO's page, time limits, and the host's descriptors.
    fn start_clock(&self, crew: &mut Crew) -> io::Result<()> {
        let (guests, events) = (Arc::clone(&self.guests), Arc::clone(&self.events));
        crew.start("clock", move || {
            take_no_signals();
            let _end = EndOnPanic(&guests);
            guests.run_clock(&events);
        })
    }

    /// Takes a guest that has ended out of the machine, which can have another one then. False if that cannot be.
    pub(super) fn vacate(&self, guest: &Shared) -> bool {
        let left = guest.kernel.sched.wait_until_left(PATIENCE);
        if left {
            self.guests.remove(guest);
        }
        left && !self.guests.is_closed()
    }

    /// Ends the machine's threads.
    ///
    /// # Errors
    /// The names of those that do not come back.
    pub(super) fn dismiss(&mut self) -> Result<(), Vec<String>> {
        self.guests.close();
        let Some(staff) = self.staff.take() else {
            return Ok(());
        };
        staff.crew.join()?;
        if let Some(spare) = staff.spare {
            spare.join()?;
        }
        self.hardware.memory.close_aides();
        Ok(())
    }

    /// What a virtual CPU failed with.
    pub(super) fn take_failure(&self) -> Option<CpuError> {
        self.failure.lock().take()
    }

    /// Whether nothing of a guest is left in it but what the next one can have.
    pub(super) fn is_as_new(&self) -> bool {
        let memory = &self.hardware.memory;
        let stats = memory.manager.stats();
        // A frame in flight is the zeroer's: no flush is pending, and nobody reads.
        let held =
            |zone: &ZoneStats| zone.active + zone.standby + zone.modified + zone.modified_no_write;
        let left = held(&stats.data) + held(&stats.tables);
        let kept = self.kept.as_ref().map(|kept| kept.holdings(memory));
        let kept = kept.unwrap_or_default();
        // The pages of sections are counted by these: there are no others than those of mapped files.
        let pages = if kept.sections == 0 {
            0
        } else {
            stats.section_pages
        };
        let left = left.saturating_sub(self.supervisor_tables() + pages + kept.tables + kept.pages);
        let sections = stats.sections.saturating_sub(kept.sections);
        let committed = stats.commit_charged.saturating_sub(kept.charged);
        // The flushes of spaces that stay are done when they are entered.
        let flushed = self.kept.is_some() || !memory.flushes.pending();
        let private = kept.private.abs_diff(kept.pages);
        let clean = left + sections + committed + private == 0 && flushed;
        if !clean {
            tracing::info!(
                left,
                sections,
                committed,
                private,
                "a machine is not used again"
            );
        }
        clean && !self.guests.is_closed()
    }
}

/// Ends the threads.
impl Drop for Bare {
    fn drop(&mut self) {
        if let Err(left) = self.dismiss() {
            tracing::error!("threads of a machine do not end: {}", left.join(", "));
        }
    }
}
