//! Who waits for which word, as data. A word is known by an address of the first waiter's address space; those
//! who cannot see it there any more wait for a word that nobody wakes, as they did.

use serde::{Deserialize, Serialize};

use super::table::{FutexKey, FutexTable};
use crate::linux::process::AddressSpace;
use crate::linux::saved::error::{Damaged, require};
use crate::linux::saved::tables::SpaceIx;
use crate::linux::thread::Tid;

/// The waiters in futex(2).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SavedFutexes {
    queues: Vec<SavedQueue>,
    woken: Vec<Tid>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct SavedQueue {
    word: SavedWord,
    /// In the order they came, and which wakes they take.
    waiters: Vec<(Tid, u32)>,
}

/// A word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct SavedWord {
    /// An address space that shows it.
    pub space: SpaceIx,
    /// Its address there.
    pub va: u64,
}

impl FutexKey {
    /// Where an address space shows the word.
    pub(in crate::linux) fn address_in(self, mm: &AddressSpace) -> Option<u64> {
        match self {
            Self::Private { space, va } => (mm.space.id() == space).then_some(va),
        }
    }
}

impl FutexTable {
    /// All waiters; `word` says where the word of a queue is, and may not know.
    pub(in crate::linux) fn saved(
        &self,
        word: impl Fn(FutexKey, &[(Tid, u32)]) -> Option<SavedWord>,
    ) -> SavedFutexes {
        let queue = |(key, waiters): (FutexKey, Vec<(Tid, u32)>)| {
            let word = word(key, &waiters)?;
            Some(SavedQueue { word, waiters })
        };
        let mut queues: Vec<_> = self.waiters().filter_map(queue).collect();
        queues.sort_by_key(|queue| queue.word);
        SavedFutexes {
            queues,
            woken: self.all_woken(),
        }
    }
}

impl SavedFutexes {
    /// Puts the waiters into their queues again. `key` says what a word is known by now, `waits` whether a
    /// thread waits at all.
    pub(in crate::linux) fn load(
        &self,
        table: &mut FutexTable,
        key: impl Fn(SavedWord) -> Result<FutexKey, Damaged>,
        waits: impl Fn(Tid) -> bool,
    ) -> Result<(), Damaged> {
        let mut all = std::collections::BTreeSet::new();
        let mut admit = |tid: Tid| require(waits(tid) && all.insert(tid), "a thread that waits");
        for queue in &self.queues {
            let key = key(queue.word)?;
            for &(tid, bitset) in &queue.waiters {
                admit(tid)?;
                table.enqueue(tid, key, bitset);
            }
        }
        for &tid in &self.woken {
            admit(tid)?;
            table.restore_woken(tid);
        }
        Ok(())
    }
}
