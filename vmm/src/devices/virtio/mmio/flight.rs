//! Requests in flight: taken from a queue, not answered yet, of a device that answers several at once.
//!
//! They are numbered in the order in which the driver announced them. A request's buffers and its queue's rings
//! are the device's until it is answered: who resets the device, takes a queue away or saves it waits for
//! that (`Transport::quiesce`), and nothing is taken meanwhile.
//!
//! **Interrupts.** Each answer is in the used ring at once, where a driver that looks sees it; the interrupt waits while more
//! requests are there to be taken, so that one does for all that were answered until the queue was found empty (if the driver
//! wants any: `VIRTIO_F_EVENT_IDX`). It never waits for an answer: while some are untold, somebody is about to
//! take a request. Whoever finds none tells, and so does the last thread that might have gone on looking.

use std::collections::BTreeSet;
use std::time::Instant;

use parking_lot::MutexGuard;
use virtio_bindings::bindings::virtio_mmio::VIRTIO_MMIO_INT_VRING;
use virtio_queue::{DescriptorChain, Queue, QueueT};

use super::{Core, Transport};
use crate::devices::virtio::worker::HANDS;
use crate::devices::virtio::{Concurrent, Earlier, Request, queue};
use crate::kernel::memory::Memory;

/// Most answers for which an interrupt waits.
const MOST_UNTOLD: usize = 32;

/// Which requests are in flight.
#[derive(Debug, Default)]
pub(super) struct Flights {
    next: u64,
    taken: BTreeSet<u64>,
    /// Somebody waits for all of them to land.
    grounded: bool,
    /// Queues that had a request when one was last taken: somebody will look again.
    busy: BTreeSet<usize>,
    /// The queue of each answer of which the driver has not been told.
    untold: Vec<usize>,
}

impl Flights {
    fn begin(&mut self) -> u64 {
        let number = self.next;
        self.next += 1;
        self.taken.insert(number);
        number
    }

    /// The queues are others from now on; nothing is in flight.
    pub(super) fn forget(&mut self) {
        debug_assert!(self.taken.is_empty());
        self.busy.clear();
        self.untold.clear();
    }

    fn any_before(&self, number: u64) -> bool {
        self.taken.first().is_some_and(|first| *first < number)
    }
}

/// A request in flight.
pub struct Flight<'a> {
    transport: &'a Transport,
    device: &'a dyn Concurrent,
    queue: usize,
    number: u64,
    chain: DescriptorChain<Memory>,
}

impl std::fmt::Debug for Flight<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Flight")
            .field("number", &self.number)
            .finish_non_exhaustive()
    }
}

/// Those that were taken before one.
struct Before<'a>(&'a Transport, u64);

impl Earlier for Before<'_> {
    fn wait(&self) {
        let Self(transport, number) = *self;
        let mut core = transport.core.lock();
        while core.flights.any_before(number) {
            transport.landed.wait(&mut core);
        }
    }
}

impl Flight<'_> {
    /// Answers it.
    pub fn finish(self) {
        let head = self.chain.head_index();
        let (transport, number) = (self.transport, self.number);
        let earlier = Before(transport, number);
        let request = Request::new(&transport.memory, self.chain);
        let written = request.map_or(0, |request| self.device.answer(request, &earlier));

        let mut core = transport.core.lock();
        core.flights.taken.remove(&number);
        transport.landed.notify_all();
        let Some(queue) = core.working_queue(self.queue) else {
            return;
        };
        match queue.add_used(&*transport.memory, head, written) {
            Ok(()) => core.flights.untold.push(self.queue),
            Err(error) => return transport.give_up(&mut core, &error),
        }
        let later = core.flights.busy.contains(&self.queue);
        if !later || core.flights.untold.len() >= MOST_UNTOLD {
            transport.tell(&mut core);
        }
    }
}

impl Core {
    /// A queue that the driver has set up, if the device may answer.
    pub(super) fn working_queue(&mut self, index: usize) -> Option<&mut Queue> {
        if !self.registers.may_answer() {
            return None;
        }
        self.queues.get_mut(index).filter(|queue| queue.ready())
    }
}

impl Transport {
    /// Whether several threads may take requests.
    pub fn is_concurrent(&self) -> bool {
        self.concurrent.is_some()
    }

    /// Takes a request from a queue, if there is one and the device is concurrent.
    pub fn take(&self, index: usize) -> Option<Flight<'_>> {
        let device = self.concurrent.as_deref()?;
        let mut core = self.core.lock();
        while core.flights.grounded {
            self.landed.wait(&mut core);
        }
        let Some(queue) = core.working_queue(index) else {
            core.flights.busy.remove(&index);
            return None;
        };
        match queue::next(queue, &self.memory) {
            Ok(Some(chain)) => {
                let number = core.flights.begin();
                core.flights.busy.insert(index);
                if core.flights.taken.len() >= HANDS {
                    self.tell(&mut core);
                }
                Some(Flight {
                    transport: self,
                    device,
                    queue: index,
                    chain,
                    number,
                })
            }
            Ok(None) => {
                core.flights.busy.remove(&index);
                self.tell(&mut core);
                None
            }
            Err(error) => {
                core.flights.busy.remove(&index);
                self.give_up(&mut core, &error);
                None
            }
        }
    }

    /// Interrupts the driver if it wants to hear of what was answered.
    fn tell(&self, core: &mut Core) {
        let mut untold = std::mem::take(&mut core.flights.untold);
        untold.sort_unstable();
        untold.dedup();
        for index in untold {
            let Some(queue) = core.working_queue(index) else {
                continue;
            };
            match queue.needs_notification(&*self.memory) {
                Ok(true) => self.interrupt(VIRTIO_MMIO_INT_VRING),
                Ok(false) => {}
                Err(error) => return self.give_up(core, &error),
            }
        }
    }

    /// Waits until nothing is in flight and nothing untold. Nothing is taken until `core` is unlocked.
    pub(super) fn quiesce(&self, core: &mut MutexGuard<'_, Core>) {
        while core.flights.grounded {
            self.landed.wait(core);
        }
        while !core.flights.taken.is_empty() {
            core.flights.grounded = true;
            self.landed.wait(core);
        }
        if std::mem::take(&mut core.flights.grounded) {
            self.landed.notify_all();
        }
        self.tell(core);
    }

    /// Waits until nothing is in flight, until that time.
    pub(super) fn quiesce_until(&self, core: &mut MutexGuard<'_, Core>, until: Instant) {
        while !core.flights.taken.is_empty() {
            if self.landed.wait_until(core, until).timed_out() {
                return;
            }
        }
    }
}
