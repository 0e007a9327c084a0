//! Who waits for which word, as data. A word is known by an address of the first waiter's address space; those
//! who cannot see it there any more wait for a word that nobody wakes, as they did.

use serde::{Deserialize, Serialize};

use super::key::{Scope, futex_key};
use super::{FutexKey, FutexTable};
use shadow_mm::{Sharing, Vpn};

use crate::linux::process::AddressSpace;
use crate::linux::saved::error::{Damaged, require};
use crate::linux::saved::tables::SpaceIx;
use crate::linux::thread::Tid;
use crate::memory::{FRAME, Memory};

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
    /// Who can wake those who wait for it.
    scope: Scope,
}

impl FutexKey {
    /// Where an address space shows the word.
    pub(in crate::linux) fn address_in(self, memory: &Memory, mm: &AddressSpace) -> Option<u64> {
        match self {
            Self::Private { space, va } => (mm.space.id() == space).then_some(va),
            Self::Shared { section, offset } => {
                let mut from = Vpn::new(0);
                while let Some(vad) = from.and_then(|at| memory.manager.query(&mm.space, at)) {
                    let shared = vad.sharing() == Sharing::Shared;
                    if let Some((of, first)) = vad.view().filter(|_| shared)
                        && of.id() == section
                        && let Some(at) = offset.checked_sub(first)
                        && at < vad.range.count() * FRAME as u64
                    {
                        return Some(vad.range.start().va().get() + at);
                    }
                    from = Vpn::new(vad.range.end());
                }
                None
            }
        }
    }

    fn scope(self) -> Scope {
        match self {
            Self::Private { .. } => Scope::Process,
            Self::Shared { .. } => Scope::Mapping,
        }
    }
}

impl SavedWord {
    /// What the word is known by now.
    pub(in crate::linux) fn key(
        self,
        memory: &Memory,
        mm: &AddressSpace,
    ) -> Result<FutexKey, Damaged> {
        let key = futex_key(memory, mm, self.va, self.scope);
        key.map_err(|_| Damaged("a word that is waited for"))
    }
}

impl FutexTable {
    /// All waiters; `word` says where the word of a queue is, and may not know.
    pub(in crate::linux) fn saved(
        &self,
        word: impl Fn(FutexKey, &[(Tid, u32)]) -> Option<(SpaceIx, u64)>,
    ) -> SavedFutexes {
        let queue = |(key, waiters): (FutexKey, Vec<(Tid, u32)>)| {
            let (space, va) = word(key, &waiters)?;
            let scope = key.scope();
            let word = SavedWord { space, va, scope };
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
