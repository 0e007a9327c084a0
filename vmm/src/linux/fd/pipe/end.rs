//! The ends of a pipe: files that read or write it.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use serde::{Deserialize, Serialize};

use super::Pipe;
use crate::linux::Errno;
use crate::linux::call::WaitKey;
use crate::linux::file::{File, Ready, Stat, Viewer};
use crate::linux::kernel::Kernel;
use crate::linux::saved::{Refused, SavedFile, Saver};

/// What an end is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Side {
    /// Reading.
    Read,
    /// Writing.
    Write,
}

impl Side {
    /// The side at the other end.
    #[must_use]
    pub fn other(self) -> Self {
        match self {
            Self::Read => Self::Write,
            Self::Write => Self::Read,
        }
    }
}

/// An end of a pipe: it counts as one as long as it lives.
#[derive(Debug)]
pub struct End {
    pipe: Arc<Pipe>,
    side: Side,
}

impl End {
    pub(super) fn new(pipe: &Arc<Pipe>, side: Side) -> Arc<Self> {
        let end = Self {
            pipe: Arc::clone(pipe),
            side,
        };
        let mut ring = pipe.ring.lock();
        *end.count(&mut ring) += 1;
        ring.opened[side as usize] += 1;
        drop(ring);
        pipe.sched.wake(end.others_key());
        Arc::new(end)
    }

    /// The pipe.
    #[must_use]
    pub fn pipe(&self) -> &Arc<Pipe> {
        &self.pipe
    }

    /// What it is for.
    #[must_use]
    pub fn side(&self) -> Side {
        self.side
    }

    /// How many ends of this side there are.
    fn count<'a>(&self, ring: &'a mut super::Ring) -> &'a mut usize {
        match self.side {
            Side::Read => &mut ring.readers,
            Side::Write => &mut ring.writers,
        }
    }

    /// What the other side waits for.
    fn others_key(&self) -> WaitKey {
        match self.side {
            Side::Read => self.pipe.drained,
            Side::Write => self.pipe.filled,
        }
    }
}

impl Drop for End {
    fn drop(&mut self) {
        let mut ring = self.pipe.ring.lock();
        let count = self.count(&mut ring);
        *count -= 1;
        let last = *count == 0;
        drop(ring);
        if last {
            let moved = match self.side {
                Side::Read => &self.pipe.reads,
                Side::Write => &self.pipe.writes,
            };
            moved.fetch_add(1, Ordering::Relaxed);
            self.pipe.sched.wake(self.others_key());
        }
    }
}

impl File for End {
    fn read(&self, _: &Kernel, _: u64, buf: &mut [u8]) -> Result<usize, Errno> {
        match self.side {
            Side::Read => self.pipe.read_some(buf),
            Side::Write => Err(Errno::BADF),
        }
    }

    fn write(&self, _: &Kernel, _: u64, buf: &[u8]) -> Result<usize, Errno> {
        match self.side {
            Side::Read => Err(Errno::BADF),
            Side::Write => self.pipe.write_some(buf),
        }
    }

    fn stat(&self, _: &Kernel) -> Result<Stat, Errno> {
        Ok(self.pipe.stat())
    }

    fn ready(&self, _: Viewer<'_>) -> Ready {
        match self.side {
            Side::Read => self.pipe.read_ready(),
            Side::Write => self.pipe.write_ready(),
        }
    }

    fn wait_key(&self) -> Option<WaitKey> {
        Some(match self.side {
            Side::Read => self.pipe.filled,
            Side::Write => self.pipe.drained,
        })
    }

    fn edges(&self) -> u64 {
        let moved = match self.side {
            Side::Read => &self.pipe.writes,
            Side::Write => &self.pipe.reads,
        };
        moved.load(Ordering::Relaxed)
    }

    fn readable_bytes(&self) -> Option<usize> {
        Some(self.pipe.len())
    }

    fn name(&self, _: &Kernel) -> Vec<u8> {
        format!("pipe:[{}]", self.pipe.id).into_bytes()
    }

    fn saved(&self, s: &mut Saver<'_>) -> Result<SavedFile, Refused> {
        Ok(SavedFile::Pipe(s.pipe(&self.pipe), self.side))
    }

    fn as_any(&self) -> &dyn std::any::Any {
        self
    }

    fn pipe(&self) -> Option<&Arc<Pipe>> {
        Some(&self.pipe)
    }
}
