//! A machine that guests of one template share.

use std::sync::Arc;

use super::error::SpawnError;
use super::host::{Played, TakeDown};
use super::ready::Ready;
use super::reaper::Reaper;
use super::running::{Known, Running, Tenancy};
use super::stdio::{Ends, Three};
use super::template::{Fork, Template};
use crate::linux::stdio::Ends as GuestEnds;
use crate::machine::restored::Choice;
use crate::machine::shared::{SharedMachine as Machine, Wish};
use crate::machine::{Ended, Wanted, without_signals};
use crate::snapshot::image::Image;
use crate::snapshot::records::Records;

/// A machine that guests of one [`Template`] share, made by [`Template::shared`].
///
/// Its guests are kept apart as processes are: by page tables, and by the care of the program that hosts them. A guest that
/// waits is some records and the root of its page tables, about 30 KiB all in, without a thread or a descriptor but for its
/// pipes and files; so there can be a hundred thousand of them. Memory and processors are for all, first come, first served.
/// When the memory is used up, the process that has most of its own is killed, whichever guest it is of. `docs/clones.md` has a
/// table of what is the same and what is not.
///
/// Copying this copies nothing. The machine ends when it is dropped, with all copies, all [`Fork`]s that were made by it, and all
/// guests.
///
/// ```no_run
/// # fn serve(template: vmm::Template, requests: Vec<String>) -> Result<(), Box<dyn std::error::Error>> {
/// use vmm::Stdio;
///
/// let machine = template.shared(4 << 30)?;
/// let mut clones = Vec::new();
/// for _ in 0..1000 {
///     let mut fork = machine.fork();
///     clones.push(fork.stdin(Stdio::piped()).stdout(Stdio::null()).spawn()?);
/// }
/// let status = clones[17].wait()?; // whose standard input ends
/// clones[17].reset()?; // and is there again, as it was made
/// let later = clones[18].freeze()?; // the others go on
/// assert!(later.fork().output()?.status.success());
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct SharedMachine {
    template: Template,
    inside: Arc<Inside>,
}

struct Inside {
    /// Dropped before the machine whose guests it takes down.
    reaper: Reaper,
    machine: Arc<Machine>,
}

impl std::fmt::Debug for SharedMachine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SharedMachine")
            .field("template", &self.template)
            .finish_non_exhaustive()
    }
}

impl SharedMachine {
    pub(super) fn start(
        template: &Template,
        wanted: &Wanted,
        image: &Arc<Image>,
        records: Records,
    ) -> Result<Self, SpawnError> {
        let machine = without_signals(|| Machine::start(wanted, image, records))?;
        let reaper = Reaper::start().map_err(SpawnError::Thread)?;
        Ok(Self {
            template: template.clone(),
            inside: Arc::new(Inside { reaper, machine }),
        })
    }

    /// A guest that will be made of the template, in this machine. What is said of its own memory, processors and page file is
    /// an error when it is made.
    ///
    /// Its first `reset` takes it out of the machine and makes it there once more; so does each later one.
    #[must_use]
    pub fn fork(&self) -> Fork {
        let mut fork = self.template.fork();
        fork.shared = Some(self.clone());
        fork
    }

    /// Makes a guest, which goes on where the template was frozen.
    pub(super) fn run(&self, fork: &Fork, three: &Three) -> Result<(Running, Ends), SpawnError> {
        if fork.choice != Choice::default() {
            return Err(SpawnError::SharedMachine);
        }
        let (given, ends) = three.open().map_err(SpawnError::Stdio)?;
        let wish = Wish {
            identity: fork.identity(),
            ends: GuestEnds::new(given).map_err(SpawnError::Stdio)?,
            timeout: fork.timeout,
        };
        let of = &*self.template.0;
        let name = of.name.as_str();
        let Inside { reaper, machine } = &*self.inside;
        let (tenant, seen) = machine.fork_seen(wish, |guest| {
            let kernel = &guest.kernel;
            let ticket = reaper.announce(&kernel.sched);
            (ticket, Ready::watch(kernel, fork.ready.as_ref(), name))
        })?;
        let (ticket, ready) = seen;
        let known = Known {
            name,
            ready: fork.ready.as_ref(),
            data: of.machine.clone(),
            home: None,
        };
        let (kernel, counts) = (Arc::clone(tenant.kernel()), tenant.counts());
        let counted = counts.clone();
        let take_down: TakeDown = Box::new(move || {
            let end = tenant.wait();
            // Its memory is told as long as it has some.
            let report = counted.report();
            drop(tenant);
            Ok((Ended { end, report }, None))
        });
        let played = Arc::new(Played::new(&kernel, take_down));
        let finish = reaper.watch(ticket, &played, Arc::clone(ready.bell()));
        let tenancy = Tenancy { played, counts };
        Ok((Running::beside_others(tenancy, known, ready, finish), ends))
    }
}
