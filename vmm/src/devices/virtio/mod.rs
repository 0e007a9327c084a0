//! Virtio devices (virtio 1.2), each behind a register page of its own ([`mmio`]).
//!
//! A device answers its requests on threads of its own ([`worker`]), never on a virtual processor's: one at a time, or
//! several at once if it is [`Concurrent`]. It sees a request's buffers only through [`Request`], which has checked that they are
//! the guest's memory.

mod bell;
pub mod block;
pub mod console;
mod disk_file;
pub mod mmio;
pub mod queue;
pub mod rng;
pub mod worker;

use std::borrow::Cow;
use std::ops::Deref;
use std::sync::Arc;

use crate::kernel::memory::Regions;
use virtio_queue::{DescriptorChain, Reader, Writer};

pub use bell::Bell;

/// What a device is, behind its registers and queues.
pub trait VirtioDevice: Send {
    /// Its kind (virtio 1.2, 5).
    fn kind(&self) -> u32;

    /// Feature bits it offers, besides those of every device.
    fn features(&self) -> u64;

    /// Its number of queues.
    fn queues(&self) -> usize;

    /// Its configuration space.
    fn config(&self) -> Cow<'_, [u8]>;

    /// Told once, before anything else: how to get the driver's attention.
    fn connect(&mut self, _bell: Bell) {}

    /// The driver is ready, and has taken these features.
    fn start(&mut self, _features: u64) {}

    /// Whether it has an answer for a request of this queue. If not, requests stay where they are until
    /// [`Bell::look`].
    fn ready(&self, _queue: usize) -> bool {
        true
    }

    /// Answers a request; returns how many bytes were written into it. Not asked if it is concurrent.
    fn answer(&mut self, _queue: usize, _request: Request<'_>) -> u32 {
        0
    }

    /// What answers the requests, if several are to be answered at once.
    fn concurrent(&self) -> Option<Arc<dyn Concurrent>> {
        None
    }
}

/// What answers several requests at once, each on some thread, without the device's lock.
pub trait Concurrent: Send + Sync {
    /// Answers a request; returns how many bytes were written into it.
    fn answer(&self, request: Request<'_>, earlier: &dyn Earlier) -> u32;
}

/// The requests that were announced before one.
pub trait Earlier {
    /// Waits until all of them have been answered.
    fn wait(&self);
}

/// The buffers of a request, all of them in guest memory. They may overlap, and the guest may change
/// them at any time: what was read once is not read again.
pub struct Request<'a> {
    /// What the driver wrote.
    pub from: Reader<'a>,
    /// Where the answer goes.
    pub to: Writer<'a>,
}

impl std::fmt::Debug for Request<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Request").finish_non_exhaustive()
    }
}

impl<'a> Request<'a> {
    /// None if a buffer is not in memory.
    fn new<M>(memory: &'a Regions, chain: DescriptorChain<M>) -> Option<Self>
    where
        M: Clone + Deref<Target = Regions>,
    {
        Some(Self {
            from: chain.clone().reader(memory).ok()?,
            to: chain.writer(memory).ok()?,
        })
    }
}

#[cfg(any(test, feature = "fuzzing"))]
pub(super) mod harness;
