//! Event counters (eventfd(2)).

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

use super::super::Errno;
use super::super::call::{Arg, Args, Ctx, Entry, SysResult, WaitKey};
use super::super::file::{Description, File, O_NONBLOCK, Ready, Stat, Viewer};
use super::super::kernel::Kernel;
use super::super::saved::error::{Damaged, require};
use super::super::saved::{Refused, SavedFile, Saver};
use super::super::sched::Sched;
use super::table::O_CLOEXEC;
use crate::locks::{Mutex, rank};

/// The calls of this file.
pub const TABLE: &[Entry] = &[
    Entry {
        nr: 284,
        name: "eventfd",
        args: &[Arg::Int],
        handler: sys_eventfd,
    },
    Entry {
        nr: 290,
        name: "eventfd2",
        args: &[Arg::Int, Arg::Hex],
        handler: sys_eventfd2,
    },
];

const EFD_SEMAPHORE: u32 = 1;
/// The counter's largest value.
const MAX: u64 = u64::MAX - 1;

/// Device of files without a name (`anon_inode`).
pub(in crate::linux) const ANON_DEV: u64 = 0xf;

/// What stat(2) tells of a file without a name.
pub(in super::super) fn anonymous_stat() -> Stat {
    Stat {
        dev: ANON_DEV,
        ino: 1,
        nlink: 1,
        mode: 0o600,
        blksize: 4096,
        ..Stat::default()
    }
}

/// What a read takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Takes {
    All,
    One,
}

/// An event counter.
#[derive(Debug)]
pub struct EventFd {
    count: Mutex<rank::EventCount, u64>,
    takes: Takes,
    sched: Arc<Sched>,
    key: WaitKey,
    edges: AtomicU64,
}

impl EventFd {
    fn new(sched: &Arc<Sched>, count: u64, takes: Takes) -> Self {
        let key = sched.new_key();
        let edges = AtomicU64::new(0);
        Self {
            count: Mutex::new(count),
            takes,
            sched: Arc::clone(sched),
            key,
            edges,
        }
    }

    fn take(&self) -> Result<u64, Errno> {
        let mut count = self.count.lock();
        if *count == 0 {
            return Err(Errno::AGAIN);
        }
        let taken = if self.takes == Takes::One { 1 } else { *count };
        *count -= taken;
        drop(count);
        self.changed();
        Ok(taken)
    }

    fn add(&self, n: u64) -> Result<(), Errno> {
        if n > MAX {
            return Err(Errno::INVAL);
        }
        let mut count = self.count.lock();
        if n > MAX - *count {
            return Err(Errno::AGAIN);
        }
        *count += n;
        drop(count);
        self.changed();
        Ok(())
    }

    fn changed(&self) {
        self.edges.fetch_add(1, Ordering::Relaxed);
        self.sched.wake(self.key);
    }

    fn ready_now(&self) -> Ready {
        let count = *self.count.lock();
        let mut ready = Ready::empty();
        ready.set(Ready::IN | Ready::RDNORM, count > 0);
        ready.set(Ready::OUT | Ready::WRNORM, count < MAX);
        ready
    }
}

/// An event counter as data.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SavedEvent {
    count: u64,
    takes: Takes,
    edges: u64,
}

impl SavedEvent {
    pub(in crate::linux) fn load(self, sched: &Arc<Sched>) -> Result<Arc<EventFd>, Damaged> {
        require(self.count <= MAX, "an event counter's value")?;
        let mut event = EventFd::new(sched, self.count, self.takes);
        event.edges = AtomicU64::new(self.edges);
        Ok(Arc::new(event))
    }
}

impl File for EventFd {
    fn read(&self, _: &Kernel, _: u64, buf: &mut [u8]) -> Result<usize, Errno> {
        let into = buf.get_mut(..8).ok_or(Errno::INVAL)?;
        into.copy_from_slice(&self.take()?.to_ne_bytes());
        Ok(8)
    }

    fn write(&self, _: &Kernel, _: u64, buf: &[u8]) -> Result<usize, Errno> {
        let bytes = buf.first_chunk::<8>().ok_or(Errno::INVAL)?;
        self.add(u64::from_ne_bytes(*bytes))?;
        Ok(8)
    }

    fn stat(&self, _: &Kernel) -> Result<Stat, Errno> {
        Ok(anonymous_stat())
    }

    fn ready(&self, _: Viewer<'_>) -> Ready {
        self.ready_now()
    }

    fn wait_key(&self) -> Option<WaitKey> {
        Some(self.key)
    }

    fn edges(&self) -> u64 {
        self.edges.load(Ordering::Relaxed)
    }

    fn name(&self, _: &Kernel) -> Vec<u8> {
        b"anon_inode:[eventfd]".to_vec()
    }

    fn saved(&self, _: &mut Saver<'_>) -> Result<SavedFile, Refused> {
        Ok(SavedFile::Event(SavedEvent {
            count: *self.count.lock(),
            takes: self.takes,
            edges: self.edges.load(Ordering::Relaxed),
        }))
    }

    fn as_any(&self) -> &dyn std::any::Any {
        self
    }
}

fn sys_eventfd(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    make(c, a.u32(0), 0)
}

fn sys_eventfd2(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    make(c, a.u32(0), a.u32(1))
}

fn make(c: &Ctx<'_>, count: u32, flags: u32) -> SysResult {
    if flags & !(EFD_SEMAPHORE | O_NONBLOCK | O_CLOEXEC) != 0 {
        return Err(Errno::INVAL.into());
    }
    let takes = if flags & EFD_SEMAPHORE != 0 {
        Takes::One
    } else {
        Takes::All
    };
    let file = Arc::new(EventFd::new(&c.k.sched, u64::from(count), takes));
    let description = Description::new(file, 2 | flags & O_NONBLOCK);
    Ok(c.add_fd(description, flags & O_CLOEXEC != 0)? as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counter(takes: Takes) -> EventFd {
        EventFd::new(&Arc::new(Sched::default()), 0, takes)
    }

    #[test]
    fn empty_counter_gives_eagain_and_is_only_writable() {
        let e = counter(Takes::All);
        assert_eq!(e.take(), Err(Errno::AGAIN));
        assert_eq!(e.ready_now(), Ready::OUT | Ready::WRNORM);
    }

    #[test]
    fn read_takes_all_or_one() {
        let all = counter(Takes::All);
        let one = counter(Takes::One);
        for e in [&all, &one] {
            assert_eq!(e.add(3), Ok(()));
        }
        assert_eq!((all.take(), all.take()), (Ok(3), Err(Errno::AGAIN)));
        assert_eq!((one.take(), one.take()), (Ok(1), Ok(1)));
    }

    #[test]
    fn full_counter_gives_eagain_and_is_only_readable() {
        let e = counter(Takes::All);
        assert_eq!(e.add(u64::MAX), Err(Errno::INVAL));
        assert_eq!(e.add(MAX), Ok(()));
        assert_eq!(e.add(1), Err(Errno::AGAIN));
        assert_eq!(e.ready_now(), Ready::IN | Ready::RDNORM);
    }
}
