//! futex(2): waiting and waking by the address of a word. Keyed by address space and address, which
//! is all there is while no memory is shared between spaces. The priority-inheriting operations and
//! `FUTEX_WAKE_OP` are absent.

use std::sync::Arc;

use super::timeval::read_timespec;
use crate::linux::Errno;
use crate::linux::call::{Arg, Args, Ctx, Entry, Restart, Stop, SysResult, Wait};
use crate::linux::process::{AddressSpace, FutexWaiter, State};
use crate::linux::thread::Tid;

use Arg::{Hex, Int};

/// The family's calls.
pub const TABLE: &[Entry] = &[Entry {
    nr: 202,
    name: "futex",
    args: &[Hex, Hex, Int, Hex, Hex, Hex],
    handler: sys_futex,
}];

const PRIVATE: i32 = 128;
const CLOCK_REALTIME: i32 = 256;

fn sys_futex(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let op = a.i32(1) & !(PRIVATE | CLOCK_REALTIME);
    let va = a.u64(0);
    match op {
        libc::FUTEX_WAIT => wait(c, a, u32::MAX),
        libc::FUTEX_WAIT_BITSET => wait(c, a, a.u32(5)),
        libc::FUTEX_WAKE => {
            aligned(va)?;
            Ok(wake(c, va, a.i32(2), u32::MAX))
        }
        libc::FUTEX_WAKE_BITSET if a.u32(5) == 0 => Err(Errno::INVAL.into()),
        libc::FUTEX_WAKE_BITSET => {
            aligned(va)?;
            Ok(wake(c, va, a.i32(2), a.u32(5)))
        }
        libc::FUTEX_REQUEUE => requeue(c, a, None),
        libc::FUTEX_CMP_REQUEUE => requeue(c, a, Some(a.u32(5))),
        _ => Err(Errno::NOSYS.into()),
    }
}

fn aligned(va: u64) -> Result<(), Errno> {
    if va.is_multiple_of(4) {
        Ok(())
    } else {
        Err(Errno::INVAL)
    }
}

/// A space's key: its record's address, unique while any of its threads lives.
fn space(mm: &Arc<AddressSpace>) -> u64 {
    Arc::as_ptr(mm) as usize as u64
}

/// The first time, queues the thread and then looks at the word: a waker changes the word before it
/// wakes, so one of the two is seen. Made again, looks whether it was woken.
fn wait(c: &mut Ctx<'_>, a: &Args, bitset: u32) -> SysResult {
    let va = a.u64(0);
    aligned(va)?;
    if bitset == 0 {
        return Err(Errno::INVAL.into());
    }
    let deadline = deadline(c, a)?;
    if c.call.progress == 0 {
        let waiter = FutexWaiter {
            tid: c.t.tid,
            space: space(&c.t.mm),
            va,
            bitset,
            woken: false,
        };
        c.k.state().futexes.push(waiter);
        let word = c.mem().read_obj::<u32>(va);
        if word != Ok(a.u32(2)) {
            let woken = forget(&mut c.k.state(), c.t.tid);
            word?;
            return if woken {
                Ok(0)
            } else {
                Err(Errno::AGAIN.into())
            };
        }
        c.call.progress = 1;
    }
    let late = deadline.is_some_and(|at| at <= c.k.clock.monotonic());
    let mut state = c.k.state();
    let woken = !state.futexes.iter().any(|w| w.tid == c.t.tid && !w.woken);
    if !woken && !late && !c.interrupted {
        let restart = if deadline.is_some() {
            Restart::Never
        } else {
            Restart::Sys
        };
        return Err(Stop::Block(Wait {
            keys: Vec::new(),
            deadline,
            restart,
        }));
    }
    forget(&mut state, c.t.tid);
    c.call.progress = 0;
    match (woken, late) {
        (true, _) => Ok(0),
        (false, true) => Err(Errno::TIMEDOUT.into()),
        (false, false) if deadline.is_some() => Err(Stop::Interrupted(Restart::Never)),
        (false, false) => Err(Stop::Interrupted(Restart::Sys)),
    }
}

/// `FUTEX_WAIT` has a duration, `FUTEX_WAIT_BITSET` a point in time of the clock it names.
fn deadline(c: &mut Ctx<'_>, a: &Args) -> Result<Option<u64>, Errno> {
    if c.call.deadline.is_some() {
        return Ok(c.call.deadline);
    }
    let Some(given) = read_timespec(c, a.u64(3))? else {
        return Ok(None);
    };
    let now = c.k.clock.monotonic();
    let absolute = a.i32(1) & !(PRIVATE | CLOCK_REALTIME) == libc::FUTEX_WAIT_BITSET;
    let at = match (absolute, a.i32(1) & CLOCK_REALTIME != 0) {
        (false, _) => now.saturating_add(given),
        (true, false) => given,
        (true, true) => now.saturating_add(given.saturating_sub(c.k.clock.realtime())),
    };
    c.call.deadline = Some(at);
    Ok(Some(at))
}

/// Wakes at most `count` waiters of the word at `va`, in the order they came.
pub(crate) fn wake(c: &Ctx<'_>, va: u64, count: i32, bitset: u32) -> u64 {
    let mut state = c.k.state();
    let tids = mark(&mut state, (space(&c.t.mm), va), count, bitset);
    for &tid in &tids {
        c.k.sched.interrupt(tid);
    }
    tids.len() as u64
}

fn mark(state: &mut State, (space, va): (u64, u64), count: i32, bitset: u32) -> Vec<Tid> {
    let wanted =
        |w: &&mut FutexWaiter| w.space == space && w.va == va && w.bitset & bitset != 0 && !w.woken;
    let some = state
        .futexes
        .iter_mut()
        .filter(wanted)
        .take(usize::try_from(count).unwrap_or(0));
    some.map(|w| {
        w.woken = true;
        w.tid
    })
    .collect()
}

/// Wakes some and moves others to a second word.
fn requeue(c: &mut Ctx<'_>, a: &Args, expected: Option<u32>) -> SysResult {
    let (from, to) = (a.u64(0), a.u64(4));
    let (count, moved) = (a.i32(2), a.u64(3) as i32);
    aligned(from)?;
    aligned(to)?;
    if count < 0 || moved < 0 {
        return Err(Errno::INVAL.into());
    }
    if let Some(value) = expected
        && c.mem().read_obj::<u32>(from)? != value
    {
        return Err(Errno::AGAIN.into());
    }
    let woken = wake(c, from, count, u32::MAX);
    let space = space(&c.t.mm);
    let mut state = c.k.state();
    let waiting = |w: &&mut FutexWaiter| w.space == space && w.va == from && !w.woken;
    let mut requeued = 0;
    for waiter in state
        .futexes
        .iter_mut()
        .filter(waiting)
        .take(moved as usize)
    {
        waiter.va = to;
        requeued += 1;
    }
    Ok(woken + requeued)
}

/// Takes a thread out of the queue. Returns whether it had been woken.
pub(crate) fn forget(state: &mut State, tid: Tid) -> bool {
    let at = state.futexes.iter().position(|w| w.tid == tid);
    at.is_some_and(|at| state.futexes.remove(at).woken)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linux::file::Location;

    #[test]
    fn wakes_in_order_only_what_matches() {
        let mut state = State::new(Location {
            mount: 0,
            path: Vec::new(),
        });
        for (tid, va, bitset) in [(2, 8, 1), (3, 8, 2), (4, 12, 1), (5, 8, 1), (6, 8, 1)] {
            state.futexes.push(FutexWaiter {
                tid,
                space: 1,
                va,
                bitset,
                woken: false,
            });
        }
        assert_eq!(mark(&mut state, (1, 8), 2, 1), [2, 5]);
        assert_eq!(mark(&mut state, (1, 8), 9, 1), [6]);
        assert!(mark(&mut state, (2, 8), 9, 1).is_empty());
        assert!(forget(&mut state, 2));
        assert!(!forget(&mut state, 3));
        assert!(!forget(&mut state, 3));
    }
}
