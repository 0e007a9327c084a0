//! A pipe as data: what is in it. Its ends are with the files that have them.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

use super::{MAX_CAPACITY, NEXT_ID, PIPE_BUF, Pipe, PipeRoom};
use crate::linux::saved::error::{RestoreError, require};
use crate::linux::sched::Sched;

/// A pipe.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SavedPipe {
    id: u64,
    data: Vec<u8>,
    capacity: u64,
    opened: [u64; 2],
    /// Reads and writes so far.
    moved: [u64; 2],
}

impl Pipe {
    pub(in crate::linux) fn saved(&self) -> SavedPipe {
        let ring = self.ring.lock();
        SavedPipe {
            id: self.id,
            data: ring.data.iter().copied().collect(),
            capacity: ring.capacity as u64,
            opened: ring.opened,
            moved: [&self.reads, &self.writes].map(|n| n.load(Ordering::Relaxed)),
        }
    }

    /// Once it has all its ends: how often its sides had been opened.
    pub(in crate::linux) fn remember(&self, saved: &SavedPipe) {
        self.ring.lock().opened = saved.opened;
    }
}

impl SavedPipe {
    pub(in crate::linux) fn load(
        &self,
        sched: &Arc<Sched>,
        room: &Arc<PipeRoom>,
    ) -> Result<Arc<Pipe>, RestoreError> {
        let capacity = usize::try_from(self.capacity).unwrap_or(usize::MAX);
        let good = capacity.is_power_of_two() && (PIPE_BUF..=MAX_CAPACITY).contains(&capacity);
        require(good, "a pipe's size")?;
        require(self.data.len() <= capacity, "more in a pipe than it holds")?;
        require(self.id < 1 << 62, "a pipe's number")?;
        let no_room = |source| RestoreError::Room {
            what: "pipes",
            source,
        };
        let mut pipe = Pipe::new(sched, room).map_err(no_room)?;
        let new = Arc::get_mut(&mut pipe).expect("nobody else has it yet");
        new.id = self.id;
        [new.reads, new.writes] = self.moved.map(AtomicU64::new);
        let ring = new.ring.get_mut();
        room.resize(ring.capacity, capacity).map_err(no_room)?;
        ring.capacity = capacity;
        ring.data.extend(&self.data);
        NEXT_ID.fetch_max(self.id + 1, Ordering::Relaxed);
        Ok(pipe)
    }
}
