//! What a thread's end does to the locks it holds: the list of set_robust_list(2) is walked, each word
//! that names the thread is marked, and one waiter is told.
//!
//! The list is the guest's and may be anything; the walk is bounded as Linux bounds it.

use super::{OWNER_DIED, TID, WAITERS, wake_one};
use crate::linux::call::Ctx;

/// `ROBUST_LIST_LIMIT`.
const LIMIT: usize = 2048;

/// A list entry: the address, whose lowest bit says that the lock is a priority-inheriting one.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Link(u64);

impl Link {
    fn address(self) -> u64 {
        self.0 & !1
    }

    fn inherits_priority(self) -> bool {
        self.0 & 1 != 0
    }
}

/// When the entry was seen: in the list, or as the operation that was going on.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Seen {
    Listed,
    Pending,
}

/// Walks the calling thread's list, which is gone afterwards.
pub(crate) fn thread_ends(c: &mut Ctx<'_>) {
    let (head, _) = std::mem::take(&mut c.t.robust_list);
    if head == 0 {
        return;
    }
    let Ok([first, offset, pending]) = c.mem().read_obj::<[u64; 3]>(head) else {
        return;
    };
    let (mut link, pending) = (Link(first), Link(pending));
    for _ in 0..LIMIT {
        if link.address() == head {
            break;
        }
        // Before the word is given up: whoever gets the lock may take the entry away.
        let next = c.mem().read_obj::<u64>(link.address());
        if link.address() != pending.address() {
            give_up(c, link, offset, Seen::Listed);
        }
        match next {
            Ok(next) => link = Link(next),
            Err(_) => return,
        }
    }
    if pending.address() != 0 {
        give_up(c, pending, offset, Seen::Pending);
    }
}

fn give_up(c: &mut Ctx<'_>, link: Link, offset: u64, seen: Seen) {
    let va = link.address().wrapping_add(offset);
    if !va.is_multiple_of(4) {
        return;
    }
    let tid = c.t.tid as u32;
    let marked = c.mem().update_u32(va, |word| {
        (word & TID == tid).then_some(word & WAITERS | OWNER_DIED)
    });
    let Ok(word) = marked else { return };
    let was_mine = word & TID == tid;
    // The thread may have died between giving the word back and waking who waits for it.
    let half_unlocked = seen == Seen::Pending && word == 0;
    let told = was_mine && word & WAITERS != 0;
    if !link.inherits_priority() && (told || half_unlocked) {
        wake_one(c, va);
    }
}
