//! Record locks as data. A file is named by somebody who has it open: its inode number may be another one when
//! the guest is made again.

use serde::{Deserialize, Serialize};

use super::{FileId, Kind, Lock, Owner, RecordLocks};
use crate::linux::process::Pid;
use crate::linux::saved::error::{Damaged, RestoreError, require};
use crate::linux::saved::tables::{DescriptionIx, FileIx};
use crate::linux::saved::{Loader, Saver};

/// All record locks.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SavedLocks(Vec<(FileIx, Vec<SavedLock>)>);

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct SavedLock {
    owner: SavedOwner,
    kind: Kind,
    start: u64,
    end: u64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
enum SavedOwner {
    Process(Pid),
    Description(DescriptionIx),
}

impl RecordLocks {
    /// All of them, but those of files and descriptions that nobody has open any more.
    pub(in crate::linux) fn saved(&self, s: &Saver<'_>) -> SavedLocks {
        let files: Vec<(FileId, Vec<Lock>)> = {
            let held = self.held.lock();
            held.files
                .iter()
                .map(|(&id, locks)| (id, locks.clone()))
                .collect()
        };
        let file = |(id, locks): (FileId, Vec<Lock>)| {
            let lock = |lock: Lock| SavedLock::of(&lock, s);
            Some((
                s.open_file(id)?,
                locks.into_iter().filter_map(lock).collect(),
            ))
        };
        SavedLocks(files.into_iter().filter_map(file).collect())
    }
}

impl SavedLock {
    fn of(lock: &Lock, s: &Saver<'_>) -> Option<Self> {
        let owner = match &lock.owner {
            Owner::Process(pid) => SavedOwner::Process(*pid),
            Owner::Description(d) => SavedOwner::Description(s.known(&d.upgrade()?)?),
        };
        Some(Self {
            owner,
            kind: lock.kind,
            start: lock.start,
            end: lock.end,
        })
    }

    fn load(&self, l: &Loader<'_>) -> Result<Lock, Damaged> {
        require(self.start < self.end, "a lock of no bytes")?;
        let owner = match self.owner {
            SavedOwner::Process(pid) => Owner::Process(pid),
            SavedOwner::Description(d) => super::owner_of(l.description(d)?),
        };
        Ok(Lock {
            owner,
            kind: self.kind,
            start: self.start,
            end: self.end,
        })
    }
}

impl SavedLocks {
    pub(in crate::linux) fn load(&self, l: &Loader<'_>) -> Result<(), RestoreError> {
        for (file, locks) in &self.0 {
            let stat = l.file(*file)?.stat(l.k);
            let stat = stat.map_err(|_| Damaged("a lock on no file"))?;
            for lock in locks {
                let taken =
                    l.k.io
                        .locks
                        .acquire(l.k, (stat.dev, stat.ino), lock.load(l)?);
                taken.map_err(|_| Damaged("two locks exclude each other"))?;
            }
        }
        Ok(())
    }
}
