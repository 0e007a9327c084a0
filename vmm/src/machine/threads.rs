//! The threads of a machine, whatever guests are in it: started before the first one runs, ended after the last.

use std::sync::Arc;
use std::thread::{self, JoinHandle};

use super::crew::Crew;
use super::guests::{EndOnPanic, WakeSpare};
use super::worker::Worker;
use super::{Machine, RunError, hardware};
use crate::hv::CpuError;
use crate::locks::{Mutex, rank};
use crate::memory::{Memory, Writeback};

/// What a virtual CPU failed with.
type Failure = Arc<Mutex<rank::MachineFailure, Option<CpuError>>>;

/// The threads of a machine that runs.
pub(super) struct Threads {
    crew: Crew,
    failure: Failure,
    paging: Vec<JoinHandle<()>>,
    writeback: Writeback,
}

impl Machine {
    /// Starts them.
    ///
    /// # Errors
    /// The host has no thread.
    pub(super) fn start_threads(&self) -> Result<Threads, RunError> {
        let memory = &self.guests.memory;
        let writeback = Writeback::start(memory).map_err(RunError::Thread)?;
        let mut threads = Threads {
            crew: Crew::new(),
            failure: Arc::default(),
            paging: self.start_paging(),
            writeback,
        };
        let started = self
            .start_workers(&mut threads.crew, &threads.failure)
            .and_then(|()| self.start_clock(&mut threads.crew));
        match started {
            Ok(()) => Ok(threads),
            Err(error) => {
                self.guests.close();
                Err(RunError::Thread(error))
            }
        }
    }

    /// Ends the machine, its guests and its threads. `aside` is done once no guest runs any more.
    ///
    /// # Errors
    /// Threads are stuck, and still use the machine; or a virtual CPU had failed.
    pub(super) fn end_threads(
        &mut self,
        threads: Threads,
        aside: impl FnOnce(),
    ) -> Result<(), RunError> {
        self.guests.close();
        let joined = threads.crew.join();
        aside();
        joined.map_err(RunError::Stuck)?;
        threads.writeback.stop();
        // Whoever looks at the memory does not keep it.
        drop(self.control.take());
        drop(self.freezer.take());
        self.guests.memory.end_paging();
        for handle in threads.paging {
            // A panic has said itself what it was.
            let _ = handle.join();
        }
        match threads.failure.lock().take() {
            Some(error) => Err(RunError::Cpu(error)),
            None => Ok(()),
        }
    }

    fn start_workers(&self, crew: &mut Crew, failure: &Failure) -> std::io::Result<()> {
        let mut cpus = std::mem::take(&mut *self.cpus.lock());
        let working = cpus.len() - hardware::spare(self.hardware.profile.paging);
        for (n, cpu) in cpus.drain(..).enumerate() {
            let guests = Arc::clone(&self.guests);
            let failure = Arc::clone(failure);
            let components = self.hardware.profile.state_components;
            let idle = self.hardware.idle.root();
            let name = format!("vcpu{}", cpu.index());
            crew.start(&name, move || {
                // Last of all: the machine has ended by then.
                let _wake = WakeSpare(&guests);
                let _end = EndOnPanic(&guests);
                let run = if n < working {
                    Worker::run
                } else {
                    Worker::run_spare
                };
                let ran = Worker::new(Arc::clone(&guests), cpu, components, idle).and_then(run);
                if let Err(error) = ran {
                    failure.lock().get_or_insert(error);
                    guests.close();
                }
            })?;
        }
        Ok(())
    }

    /// The pager and the zeroer. Without them memory is only tighter: the host may have no thread for
    /// them.
    fn start_paging(&self) -> Vec<JoinHandle<()>> {
        let start = |name: &str, body: fn(&Memory)| {
            let memory = Arc::clone(&self.shared.kernel.memory);
            thread::Builder::new()
                .name(name.into())
                .spawn(move || body(&memory))
        };
        let threads = [
            start("pager", Memory::run_pager),
            start("zeroer", Memory::run_zeroer),
        ];
        threads
            .into_iter()
            .filter_map(|thread| match thread {
                Ok(handle) => Some(handle),
                Err(error) => {
                    tracing::warn!(%error, "no thread to keep memory available with");
                    None
                }
            })
            .collect()
    }

    /// The clock thread: deadlines, turns, timers, the vDSO's page, time limits.
    fn start_clock(&self, crew: &mut Crew) -> std::io::Result<()> {
        let guests = Arc::clone(&self.guests);
        crew.start("clock", move || {
            let _end = EndOnPanic(&guests);
            guests.run_clock();
        })
    }
}
