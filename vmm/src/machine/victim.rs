//! Who ends when the machine's memory is used up and nothing more can be paged out.
//!
//! The thread that finds no frame is not to blame for it: whoever has most is. So the process whose memory is largest is
//! killed, of all guests in the machine, as Linux's out-of-memory killer does without the adjustments
//! (`mm/oom_kill.c`, `oom_badness`); whoever wants a frame waits for what it gives back. A process's size is the pages that
//! are its own, resident or in the page file, and its page tables. What it shares with others does not count: its end
//! would not give that back.
//!
//! One ends at a time. If it has not given back its memory in [`PATIENCE`], whoever wants some is killed instead, so that
//! nobody waits for ever.

use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use super::guests::Guests;
use super::worker::Shared;
use crate::linux::process::{AddressSpace, Pid, SigFields, SigInfo};
use crate::linux::sched::roster::GuestId;
use crate::linux::signal;

/// How long a process that was killed may take to give back its memory.
const PATIENCE: Duration = Duration::from_secs(5);

/// The address space that somebody's end will give back, and since when.
#[derive(Debug, Default)]
pub(super) struct Leaving {
    space: Weak<AddressSpace>,
    of: Option<(GuestId, Instant)>,
}

/// What becomes of the thread that wants memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Its own process ends.
    Ends,
    /// Another process of its guest gives back memory: it is to let others run, and then to try again.
    Waits,
    /// A process of another guest does.
    WaitsForGuest,
}

impl Verdict {
    /// For a process of `guest`.
    fn waits(guest: GuestId, own: &Shared) -> Self {
        match guest == own.kernel.sched.guest() {
            true => Self::Waits,
            false => Self::WaitsForGuest,
        }
    }
}

/// A process that may end.
struct Candidate {
    guest: Arc<Shared>,
    pid: Pid,
    mm: Arc<AddressSpace>,
    size: u64,
}

/// How far it is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Progress {
    Nobody,
    /// Its memory comes back: it is to be tried once more before the next one.
    Over(GuestId),
    /// In this guest.
    UnderWay(GuestId),
    /// It takes too long.
    Late,
}

impl Leaving {
    fn progress(&self) -> Progress {
        match (self.space.upgrade(), self.of) {
            (Some(mm), Some((guest, since))) if !mm.is_deleted() => {
                match since.elapsed() > PATIENCE {
                    true => Progress::Late,
                    false => Progress::UnderWay(guest),
                }
            }
            (_, Some((guest, _))) => Progress::Over(guest),
            (_, None) => Progress::Nobody,
        }
    }
}

impl Guests {
    /// Has somebody end because process `pid` of `own` finds no memory, unless somebody ends already. No lock may be held.
    pub(super) fn end_largest(&self, own: &Shared, pid: Pid) -> Verdict {
        // Held all the while, so that two who find no frame at once do not end two.
        let mut leaving = self.leaving.lock();
        let largest = match leaving.progress() {
            Progress::UnderWay(guest) => return Verdict::waits(guest, own),
            Progress::Over(guest) => {
                *leaving = Leaving::default();
                return Verdict::waits(guest, own);
            }
            Progress::Late => None,
            Progress::Nobody => self.candidates().max_by_key(|one| one.size),
        };
        let Some(largest) = largest else {
            *leaving = Leaving::default();
            kill(own, pid);
            return Verdict::Ends;
        };
        let guest = largest.guest.kernel.sched.guest();
        *leaving = Leaving {
            space: Arc::downgrade(&largest.mm),
            of: Some((guest, Instant::now())),
        };
        drop(leaving);
        tracing::warn!(
            pid = largest.pid,
            pages = largest.size,
            "killed: the guest's memory is used up; run with a larger --memory"
        );
        kill_users(&largest);
        match Verdict::waits(guest, own) {
            Verdict::Waits if largest.pid == pid => Verdict::Ends,
            waits => waits,
        }
    }

    /// Processes of guests that run.
    fn candidates(&self) -> impl Iterator<Item = Candidate> {
        let running = self.everyone().into_iter();
        running
            .filter(|guest| !guest.kernel.sched.is_stopping() && !guest.kernel.sched.has_ended())
            .flat_map(|guest| {
                let state = guest.kernel.state();
                let processes = state.procs.iter().filter(|(_, p)| p.exiting.is_none());
                let spaces = processes.filter_map(|(&pid, p)| Some((pid, p.mm.clone()?)));
                let spaces: Vec<_> = spaces.collect();
                drop(state);
                spaces.into_iter().map(move |(pid, mm)| Candidate {
                    size: size(&guest, &mm),
                    guest: Arc::clone(&guest),
                    pid,
                    mm,
                })
            })
    }
}

/// Pages that would come back.
fn size(guest: &Shared, mm: &AddressSpace) -> u64 {
    let usage = guest.kernel.memory.manager.usage(&mm.space);
    usage.private + usage.tables
}

/// Ends every process that uses the space: it goes with the last of them.
fn kill_users(largest: &Candidate) {
    let state = largest.guest.kernel.state();
    let uses =
        |mm: &Option<Arc<AddressSpace>>| mm.as_ref().is_some_and(|mm| Arc::ptr_eq(mm, &largest.mm));
    let users = state.procs.iter().filter(|(_, p)| uses(&p.mm));
    let users: Vec<Pid> = users.map(|(&pid, _)| pid).collect();
    drop(state);
    for pid in users {
        kill(&largest.guest, pid);
    }
}

/// Ends a process as `SIGKILL` does.
pub(super) fn kill(guest: &Shared, pid: Pid) {
    let mut state = guest.kernel.state();
    let info = SigInfo {
        signo: libc::SIGKILL,
        code: 0x80,
        errno: 0,
        fields: SigFields::None,
    };
    if let Err(error) = signal::send_to_process(&guest.kernel, &mut state, pid, info) {
        // It has gone meanwhile.
        tracing::debug!(pid, "not killed: {error}");
    }
}
