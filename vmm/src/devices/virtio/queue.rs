//! A virtio device's queue: its requests, one after the other, and the queue as data.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use serde::{Deserialize, Serialize};
use virtio_queue::{DescriptorChain, Queue, QueueState, QueueT};

use super::{Request, VirtioDevice};
use crate::kernel::memory::Memory;

/// Entries of a queue, at most.
pub const QUEUE_SIZE: u16 = 256;

/// A queue, as data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the fields of virtio_queue::QueueState")]
pub struct QueueSaved {
    pub max_size: u16,
    pub next_avail: u16,
    pub next_used: u16,
    pub event_idx_enabled: bool,
    pub size: u16,
    pub ready: bool,
    pub desc_table: u64,
    pub avail_ring: u64,
    pub used_ring: u64,
}

/// Whether a queue still has something when its turn is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Left {
    /// Nothing, or nothing that can be done.
    Nothing,
    /// More: let others have the lock first.
    More,
}

/// What came of a turn at a queue.
pub(super) struct Turn {
    /// The driver wants to hear of it.
    pub(super) interrupt: bool,
    /// What is left.
    pub(super) left: Left,
}

/// Answers what is in a queue, one queue length at most.
///
/// # Errors
/// The queue is not in memory, or its indices make no sense.
pub(super) fn answer_all(
    queue: &mut Queue,
    memory: &Memory,
    device: &mut dyn VirtioDevice,
    index: usize,
) -> Result<Turn, virtio_queue::Error> {
    if !queue.is_valid(&**memory) {
        return Err(virtio_queue::Error::QueueNotReady);
    }
    let mut answered = 0;
    let mut left = Left::More;
    queue.disable_notification(&**memory)?;
    // Each turn of this either answers, ends, or has seen the indices change.
    for _ in 0..2 * u32::from(queue.size()) {
        if !device.ready(index) {
            left = Left::Nothing;
            break;
        }
        let Some(chain) = queue.pop_descriptor_chain(&**memory) else {
            // Nothing, though there should be: the indices make no sense.
            let waiting = queue.enable_notification(&**memory)?;
            if !waiting {
                left = Left::Nothing;
                break;
            }
            let Some(available) = available(queue, memory)? else {
                return Err(virtio_queue::Error::InvalidAvailRingIndex);
            };
            if available == 0 {
                left = Left::Nothing;
                break;
            }
            continue;
        };
        let head = chain.head_index();
        let written = Request::new(memory, chain).map_or(0, |r| device.answer(index, r));
        queue.add_used(&**memory, head, written)?;
        answered += 1;
    }
    let interrupt = answered > 0 && queue.needs_notification(&**memory)?;
    Ok(Turn { interrupt, left })
}

/// Takes one request from a queue, if there is one; if not, the driver is asked to announce the next.
///
/// # Errors
/// The queue is not in memory, or its indices make no sense.
pub(super) fn next(
    queue: &mut Queue,
    memory: &Memory,
) -> Result<Option<DescriptorChain<Memory>>, virtio_queue::Error> {
    if !queue.is_valid(&**memory) {
        return Err(virtio_queue::Error::QueueNotReady);
    }
    // The second time is for a request that came before the driver was asked to announce it.
    for _ in 0..2 {
        if let Some(chain) = queue.pop_descriptor_chain(Arc::clone(memory)) {
            queue.disable_notification(&**memory)?;
            return Ok(Some(chain));
        }
        if !queue.enable_notification(&**memory)? {
            return Ok(None);
        }
        if available(queue, memory)?.is_none() {
            return Err(virtio_queue::Error::InvalidAvailRingIndex);
        }
    }
    Ok(None)
}

/// How many requests wait; None if there are more than the queue has room for.
fn available(queue: &Queue, memory: &Memory) -> Result<Option<u16>, virtio_queue::Error> {
    let index = queue.avail_idx(&**memory, Ordering::Acquire)?.0;
    let count = index.wrapping_sub(queue.next_avail());
    Ok((count <= queue.size()).then_some(count))
}

impl QueueSaved {
    pub(super) fn of(q: &QueueState) -> Self {
        Self {
            max_size: q.max_size,
            next_avail: q.next_avail,
            next_used: q.next_used,
            event_idx_enabled: q.event_idx_enabled,
            size: q.size,
            ready: q.ready,
            desc_table: q.desc_table,
            avail_ring: q.avail_ring,
            used_ring: q.used_ring,
        }
    }

    /// # Errors
    /// It could not have been saved.
    pub(super) fn queue(&self) -> Result<Queue, virtio_queue::Error> {
        let q = self;
        Queue::try_from(QueueState {
            max_size: q.max_size,
            next_avail: q.next_avail,
            next_used: q.next_used,
            event_idx_enabled: q.event_idx_enabled,
            size: q.size,
            ready: q.ready,
            desc_table: q.desc_table,
            avail_ring: q.avail_ring,
            used_ring: q.used_ring,
        })
    }
}
