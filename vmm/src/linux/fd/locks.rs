//! Record locks: `F_SETLK` and its relatives, within the machine (fcntl(2), "Advisory record
//! locking"). The host's processes do not see them.

use std::collections::BTreeMap;
use std::sync::{Arc, Weak};

use serde::{Deserialize, Serialize};

use super::super::Errno;
use super::super::call::WaitKey;
use super::super::file::Description;
use super::super::kernel::Kernel;
use super::super::process::Pid;
use super::super::sched::Sched;
use crate::locks::{Mutex, rank};

mod saved;

pub use saved::SavedLocks;

/// Most locks a machine may hold; more gives `ENOLCK`.
const MAX_LOCKS: usize = 1 << 16;

/// Device and inode.
pub type FileId = (u64, u64);

/// Who holds a lock.
#[derive(Clone, Debug)]
pub enum Owner {
    /// A process (`F_SETLK`).
    Process(Pid),
    /// An open file description (`F_OFD_SETLK`).
    Description(Weak<Description>),
}

impl PartialEq for Owner {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Process(a), Self::Process(b)) => a == b,
            (Self::Description(a), Self::Description(b)) => a.ptr_eq(b),
            (Self::Process(_), Self::Description(_)) | (Self::Description(_), Self::Process(_)) => {
                false
            }
        }
    }
}

/// Shared or exclusive.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    /// `F_RDLCK`.
    Read,
    /// `F_WRLCK`.
    Write,
}

/// A lock on the bytes `start..end`.
#[derive(Clone, Debug, PartialEq)]
pub struct Lock {
    /// Who holds it.
    pub owner: Owner,
    /// Shared or exclusive.
    pub kind: Kind,
    /// First byte.
    pub start: u64,
    /// One past the last byte; `u64::MAX` for the end of the file, however large it gets.
    pub end: u64,
}

impl Lock {
    fn conflicts(&self, other: &Self) -> bool {
        self.owner != other.owner
            && (self.kind == Kind::Write || other.kind == Kind::Write)
            && self.start < other.end
            && other.start < self.end
    }
}

#[derive(Debug, Default)]
struct Held {
    files: BTreeMap<FileId, Vec<Lock>>,
    count: usize,
    /// Which process a blocked one waits for, to refuse a circle.
    waits: BTreeMap<Pid, Pid>,
}

/// All record locks of a machine.
#[derive(Debug)]
pub struct RecordLocks {
    held: Mutex<rank::RecordLocks, Held>,
    key: WaitKey,
}

impl RecordLocks {
    /// None yet.
    #[must_use]
    pub fn new(sched: &Sched) -> Self {
        Self {
            held: Mutex::default(),
            key: sched.new_key(),
        }
    }

    /// What is woken when a lock was given up.
    #[must_use]
    pub fn key(&self) -> WaitKey {
        self.key
    }

    /// The first lock that stands in the way of `wanted`.
    #[must_use]
    pub fn conflict(&self, file: FileId, wanted: &Lock) -> Option<Lock> {
        let held = self.held.lock();
        held.files
            .get(&file)?
            .iter()
            .find(|lock| lock.conflicts(wanted))
            .cloned()
    }

    /// Takes a lock, in place of what its owner held there.
    ///
    /// # Errors
    /// `EAGAIN` if another's lock is in the way, `ENOLCK`.
    pub fn acquire(&self, k: &Kernel, file: FileId, wanted: Lock) -> Result<(), Errno> {
        let changed = self.held.lock().acquire(file, wanted)?;
        if changed {
            k.sched.wake(self.key);
        }
        Ok(())
    }

    /// Gives up what `owner` holds of `start..end`.
    ///
    /// # Errors
    /// `ENOLCK`: a lock would have to be split and there is no room for its second half.
    pub fn release(
        &self,
        k: &Kernel,
        file: FileId,
        owner: &Owner,
        range: (u64, u64),
    ) -> Result<(), Errno> {
        if self.held.lock().cut(file, owner, range)? {
            k.sched.wake(self.key);
        }
        Ok(())
    }

    /// `pid` is about to wait for the holder of `blocker`.
    ///
    /// # Errors
    /// `EDEADLK`: that one waits for `pid`.
    pub fn wait_for(&self, pid: Pid, blocker: &Lock) -> Result<(), Errno> {
        let Owner::Process(holder) = blocker.owner else {
            return Ok(());
        };
        let mut held = self.held.lock();
        let mut at = holder;
        for _ in 0..=held.waits.len() {
            if at == pid {
                return Err(Errno::DEADLK);
            }
            match held.waits.get(&at) {
                Some(&next) => at = next,
                None => break,
            }
        }
        held.waits.insert(pid, holder);
        Ok(())
    }

    /// `pid` no longer waits.
    pub fn stop_waiting(&self, pid: Pid) {
        self.held.lock().waits.remove(&pid);
    }

    /// Process `pid` has closed a descriptor of this description: its locks on that file are gone,
    /// whichever descriptor they were taken through.
    pub fn closed(&self, k: &Kernel, pid: Pid, description: &Description) {
        if self.held.lock().files.is_empty() {
            return;
        }
        let Ok(stat) = description.file.stat(k) else {
            return;
        };
        let all = (0, u64::MAX);
        let owner = Owner::Process(pid);
        if self
            .held
            .lock()
            .cut((stat.dev, stat.ino), &owner, all)
            .unwrap_or(false)
        {
            k.sched.wake(self.key);
        }
    }

    /// Process `pid` has ended (its descriptors are dropped): all its locks are gone, and those of
    /// descriptions that went with it.
    pub fn process_ended(&self, k: &Kernel, pid: Pid) {
        self.stop_waiting(pid);
        self.forget(k, |owner| matches!(owner, Owner::Process(p) if *p == pid));
    }

    /// Drops the locks of descriptions that are gone.
    pub fn sweep(&self, k: &Kernel) {
        self.forget(k, |_| false);
    }

    fn forget(&self, k: &Kernel, gone: impl Fn(&Owner) -> bool) {
        let mut held = self.held.lock();
        if held.files.is_empty() {
            return;
        }
        let before = held.count;
        held.retain(|lock| match &lock.owner {
            Owner::Description(d) if d.strong_count() == 0 => false,
            owner => !gone(owner),
        });
        let fewer = held.count < before;
        drop(held);
        if fewer {
            k.sched.wake(self.key);
        }
    }
}

impl Held {
    fn retain(&mut self, keep: impl Fn(&Lock) -> bool) {
        self.files.retain(|_, locks| {
            locks.retain(&keep);
            !locks.is_empty()
        });
        self.count = self.files.values().map(Vec::len).sum();
    }

    /// Whether the owner gave something up by it (write to read).
    fn acquire(&mut self, file: FileId, wanted: Lock) -> Result<bool, Errno> {
        let locks = self.files.get(&file);
        if locks.is_some_and(|locks| locks.iter().any(|lock| lock.conflicts(&wanted))) {
            return Err(Errno::AGAIN);
        }
        if self.count + 2 > MAX_LOCKS {
            return Err(Errno::NOLCK);
        }
        let changed = self.cut(file, &wanted.owner, (wanted.start, wanted.end))?;
        let locks = self.files.entry(file).or_default();
        let before = locks.len();
        join(locks, wanted);
        self.count = self.count + locks.len() - before;
        Ok(changed)
    }

    /// Takes `range` away from the owner's locks; whether it held any of it.
    fn cut(&mut self, file: FileId, owner: &Owner, range: (u64, u64)) -> Result<bool, Errno> {
        let (start, end) = range;
        let Some(locks) = self.files.get_mut(&file) else {
            return Ok(false);
        };
        let touches = |lock: &Lock| lock.owner == *owner && lock.start < end && start < lock.end;
        if !locks.iter().any(touches) {
            return Ok(false);
        }
        if self.count + 1 > MAX_LOCKS {
            return Err(Errno::NOLCK);
        }
        let before = locks.len();
        let (cut, mut rest): (Vec<Lock>, Vec<Lock>) = locks.drain(..).partition(touches);
        for lock in cut {
            if lock.start < start {
                rest.push(Lock {
                    end: start,
                    ..lock.clone()
                });
            }
            if end < lock.end {
                rest.push(Lock { start: end, ..lock });
            }
        }
        let after = rest.len();
        if rest.is_empty() {
            self.files.remove(&file);
        } else {
            *locks = rest;
        }
        self.count = self.count + after - before;
        Ok(true)
    }
}

/// Adds `lock`, as one with those of its owner and kind that it touches.
fn join(locks: &mut Vec<Lock>, mut lock: Lock) {
    locks.retain(|other| {
        let one = other.owner == lock.owner
            && other.kind == lock.kind
            && other.start <= lock.end
            && lock.start <= other.end;
        if one {
            lock.start = lock.start.min(other.start);
            lock.end = lock.end.max(other.end);
        }
        !one
    });
    locks.push(lock);
}

/// The owner that stands for `description`.
#[must_use]
pub fn owner_of(description: &Arc<Description>) -> Owner {
    Owner::Description(Arc::downgrade(description))
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: FileId = (1, 2);

    fn lock(pid: Pid, kind: Kind, start: u64, end: u64) -> Lock {
        Lock {
            owner: Owner::Process(pid),
            kind,
            start,
            end,
        }
    }

    #[test]
    fn readers_share_and_a_writer_is_refused() {
        let mut held = Held::default();
        assert_eq!(held.acquire(FILE, lock(2, Kind::Read, 0, 10)), Ok(false));
        assert_eq!(held.acquire(FILE, lock(3, Kind::Read, 5, 15)), Ok(false));
        assert_eq!(
            held.acquire(FILE, lock(3, Kind::Write, 9, 12)),
            Err(Errno::AGAIN)
        );
        assert_eq!(held.acquire(FILE, lock(3, Kind::Write, 10, 12)), Ok(true));
    }

    #[test]
    fn unlock_in_the_middle_splits() {
        let mut held = Held::default();
        assert_eq!(held.acquire(FILE, lock(2, Kind::Write, 0, 100)), Ok(false));
        assert_eq!(held.cut(FILE, &Owner::Process(2), (40, 60)), Ok(true));
        assert_eq!(held.count, 2);
        assert_eq!(held.acquire(FILE, lock(3, Kind::Write, 40, 60)), Ok(false));
        assert_eq!(
            held.acquire(FILE, lock(3, Kind::Write, 39, 60)),
            Err(Errno::AGAIN)
        );
    }

    #[test]
    fn neighbours_of_one_owner_become_one() {
        let mut held = Held::default();
        for (start, end) in [(0, 10), (20, 30), (10, 20)] {
            assert_eq!(
                held.acquire(FILE, lock(2, Kind::Write, start, end)),
                Ok(false)
            );
        }
        assert_eq!(held.files[&FILE], vec![lock(2, Kind::Write, 0, 30)]);
        assert_eq!(held.cut(FILE, &Owner::Process(2), (0, u64::MAX)), Ok(true));
        assert!(held.files.is_empty());
        assert_eq!(held.count, 0);
    }

    #[test]
    fn circle_of_waiters_gives_edeadlk() {
        let locks = RecordLocks::new(&Sched::default());
        assert_eq!(locks.wait_for(2, &lock(3, Kind::Write, 0, 1)), Ok(()));
        assert_eq!(locks.wait_for(3, &lock(4, Kind::Write, 0, 1)), Ok(()));
        assert_eq!(
            locks.wait_for(4, &lock(2, Kind::Write, 0, 1)),
            Err(Errno::DEADLK)
        );
        locks.stop_waiting(3);
        assert_eq!(locks.wait_for(4, &lock(2, Kind::Write, 0, 1)), Ok(()));
    }
}
