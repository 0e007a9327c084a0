//! futex(2): waiting and waking by the address of a word.
//!
//! A waiter queues itself and then looks at the word; a waker changes the word and then looks at the queue.
//! So one of the two sees the other, with no lock held while the word is read.
//!
//! The priority-inheriting operations are absent (`ENOSYS`): there are no priorities to inherit.

use super::timeval::read_timespec;
use crate::linux::Errno;
use crate::linux::call::{Arg, Args, Ctx, Entry, Restart, Stop, SysResult, Wait};
use crate::linux::process::State;
use crate::linux::thread::Tid;

mod key;
pub mod robust;
pub mod saved;
pub mod table;

pub use key::FutexKey;
use key::{Scope, futex_key};
pub use table::FutexTable;

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

/// The owner's thread id in a lock word (`FUTEX_TID_MASK`).
const TID: u32 = 0x3fff_ffff;
/// The owner ended without giving it up (`FUTEX_OWNER_DIED`).
const OWNER_DIED: u32 = 0x4000_0000;
/// Somebody waits (`FUTEX_WAITERS`).
const WAITERS: u32 = 0x8000_0000;

fn sys_futex(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let op = a.i32(1) & !(PRIVATE | CLOCK_REALTIME);
    let wake = |c: &Ctx<'_>, bitset| {
        let key = futex_key(&c.k.memory, &c.t.mm, a.u64(0), scope(a))?;
        Ok(wake_key(c, key, at_least_one(a.i32(2)), bitset))
    };
    match op {
        libc::FUTEX_WAIT => wait(c, a, u32::MAX),
        libc::FUTEX_WAIT_BITSET => wait(c, a, a.u32(5)),
        libc::FUTEX_WAKE => wake(c, u32::MAX),
        libc::FUTEX_WAKE_BITSET if a.u32(5) == 0 => Err(Errno::INVAL.into()),
        libc::FUTEX_WAKE_BITSET => wake(c, a.u32(5)),
        libc::FUTEX_WAKE_OP => wake_op(c, a),
        libc::FUTEX_REQUEUE => requeue(c, a, None),
        libc::FUTEX_CMP_REQUEUE => requeue(c, a, Some(a.u32(5))),
        _ => Err(Errno::NOSYS.into()),
    }
}

/// Who the call says may know the word.
fn scope(a: &Args) -> Scope {
    if a.i32(1) & PRIVATE != 0 {
        Scope::Process
    } else {
        Scope::Mapping
    }
}

/// How many a wake-up is for: as on Linux at least one.
fn at_least_one(count: i32) -> usize {
    usize::try_from(count).unwrap_or(0).max(1)
}

/// The first time, queues the thread and then looks at the word: a waker changes the word before it
/// wakes, so one of the two is seen. Made again, looks whether it was woken.
fn wait(c: &mut Ctx<'_>, a: &Args, bitset: u32) -> SysResult {
    let va = a.u64(0);
    if bitset == 0 {
        return Err(Errno::INVAL.into());
    }
    let deadline = deadline(c, a)?;
    if c.call.progress == 0 {
        let key = futex_key(&c.k.memory, &c.t.mm, va, scope(a))?;
        c.k.state().futexes.enqueue(c.t.tid, key, bitset);
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
    let woken = state.futexes.woken(c.t.tid);
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

/// Wakes who has waited longest for the word at `va`, in whatever process: the kernel's own wake-ups. How many
/// that were.
pub(crate) fn wake_one(c: &Ctx<'_>, va: u64) -> u64 {
    let key = futex_key(&c.k.memory, &c.t.mm, va, Scope::Mapping);
    key.map_or(0, |key| wake_key(c, key, 1, u32::MAX))
}

/// Wakes at most `count` waiters, in the order they came.
fn wake_key(c: &Ctx<'_>, key: FutexKey, count: usize, bitset: u32) -> u64 {
    let mut state = c.k.state();
    let tids = state.futexes.wake(key, count, bitset);
    for &tid in &tids {
        c.k.sched.resume(tid);
    }
    tids.len() as u64
}

/// What `FUTEX_WAKE_OP` does with the second word: an operation and a comparison with the old value, in
/// one argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct WakeOp {
    op: u32,
    operand: u32,
    compare: u32,
    with: i32,
}

impl WakeOp {
    fn new(encoded: u32) -> Result<Self, Errno> {
        let signed = |twelve: u32| ((twelve << 20) as i32) >> 20;
        let (op, compare) = (encoded >> 28, encoded >> 24 & 15);
        let mut operand = signed(encoded >> 12 & 0xfff) as u32;
        if op & 8 != 0 {
            operand = 1 << (operand & 31);
        }
        let this = Self {
            op: op & 7,
            operand,
            compare,
            with: signed(encoded & 0xfff),
        };
        if this.op > 4 || compare > 5 {
            return Err(Errno::NOSYS);
        }
        Ok(this)
    }

    fn apply(self, old: u32) -> u32 {
        match self.op {
            0 => self.operand,
            1 => old.wrapping_add(self.operand),
            2 => old | self.operand,
            3 => old & !self.operand,
            _ => old ^ self.operand,
        }
    }

    fn holds(self, old: u32) -> bool {
        let (old, with) = (old as i32, self.with);
        match self.compare {
            0 => old == with,
            1 => old != with,
            2 => old < with,
            3 => old <= with,
            4 => old > with,
            _ => old >= with,
        }
    }
}

/// Changes the second word, wakes waiters of the first, and of the second if its old value says so.
fn wake_op(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let key = |va| futex_key(&c.k.memory, &c.t.mm, va, scope(a));
    let (first, second) = (key(a.u64(0))?, key(a.u64(4))?);
    let op = WakeOp::new(a.u32(5))?;
    let old = c.mem().update_u32(a.u64(4), |word| Some(op.apply(word)))?;
    let mut woken = wake_key(c, first, at_least_one(a.i32(2)), u32::MAX);
    if op.holds(old) {
        woken += wake_key(c, second, at_least_one(a.u64(3) as i32), u32::MAX);
    }
    Ok(woken)
}

/// Wakes some and moves others to a second word.
fn requeue(c: &mut Ctx<'_>, a: &Args, expected: Option<u32>) -> SysResult {
    let (from, to) = (a.u64(0), a.u64(4));
    let (count, moved) = (a.i32(2), a.u64(3) as i32);
    if count < 0 || moved < 0 {
        return Err(Errno::INVAL.into());
    }
    let key = |va| futex_key(&c.k.memory, &c.t.mm, va, scope(a));
    let keys = (key(from)?, key(to)?);
    if let Some(value) = expected
        && c.mem().read_obj::<u32>(from)? != value
    {
        return Err(Errno::AGAIN.into());
    }
    let (from, to) = keys;
    let woken = if count == 0 {
        0
    } else {
        wake_key(c, from, count as usize, u32::MAX)
    };
    let requeued = c.k.state().futexes.requeue(from, to, moved as usize);
    Ok(woken + requeued as u64)
}

/// Takes a thread out of the queue. Returns whether it had been woken.
pub(crate) fn forget(state: &mut State, tid: Tid) -> bool {
    state.futexes.forget(tid)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `FUTEX_OP(op, operand, compare, with)`.
    fn encoded(op: u32, operand: u32, compare: u32, with: u32) -> u32 {
        op << 28 | compare << 24 | (operand & 0xfff) << 12 | with & 0xfff
    }

    #[test]
    fn wake_op_decodes_signed_operands_and_shifts() {
        let add = WakeOp::new(encoded(1, -1_i32 as u32, 4, -2_i32 as u32)).unwrap();
        assert_eq!(add.apply(5), 4);
        assert!(add.holds(-1_i32 as u32) && !add.holds(-2_i32 as u32));
        let or = WakeOp::new(encoded(2 | 8, 4, 0, 0)).unwrap();
        assert_eq!((or.apply(1), or.holds(0)), (17, true));
        assert_eq!(WakeOp::new(encoded(5, 0, 0, 0)), Err(Errno::NOSYS));
        assert_eq!(WakeOp::new(encoded(0, 0, 6, 0)), Err(Errno::NOSYS));
    }
}
