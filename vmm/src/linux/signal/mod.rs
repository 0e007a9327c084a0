//! Signals: sending, delivery, frames, and what they do to a blocked call.
//!
//! # How a worker runs a thread
//! ```text
//! loop {
//!     seen = sched.epoch()
//!     if attention: match before_return(c) {
//!         Resume => (), Park(wait) => park(wait, seen), Exited => forget the thread }
//!     if no call in t.call: enter the guest; a system call exit puts the call into t.call,
//!         a fault calls `fault`; again
//!     c.call = t.call; c.interrupted = attention and wants_handler(c)
//!     match settle(c, handler(c)) {
//!         Again => (), Park(wait) => park(wait, seen), Exited => forget the thread }
//! }
//! ```
//! * Whoever changes something a thread must look at sets its `attention` under the state lock, then
//!   calls [`super::sched::Sched::interrupt`], which moves the epoch: a park with an older `seen`
//!   gives the thread back. After any park the loop starts from the top.
//! * With a call in `t.call` that was not interrupted, [`before_return`] stops and kills but runs no
//!   handler: the call must first finish with what it has. It leaves `attention` set; the call is
//!   made again with [`Ctx::interrupted`], and what it returns is its result, or
//!   [`settle`] marks it [`super::call::CallRecord::interrupted`].
//! * With an interrupted call, [`before_return`] writes the frame with either `-EINTR` in RAX or the
//!   call's number there and RIP back on the `syscall` instruction. If the signal has gone in the
//!   meantime the call goes on as if nothing had happened.
//! * [`Restart::Uninterruptible`] parks although `attention` may be set.
//!
//! # Known holes
//! Single-stepping (`TF`) cannot be switched on by `rt_sigreturn`. No core is dumped. A stopped process is
//! reported as such when its first thread stops; the others follow as soon as they leave the guest.

use super::Errno;
use super::call::{Ctx, Restart, Stop, SysResult, Wait};
use super::process::{Process, SIGNALS, State};
use super::sched::Sched;
use super::thread::{Thread, Tid};

pub mod calls;
pub mod deliver;
pub mod descriptor;
pub mod frame;
pub mod info;
pub mod kill;
pub mod send;
pub mod sigreturn;
pub mod xsave;

#[cfg(test)]
mod tests;

pub use deliver::{before_return, fault, wants_handler};
pub use info::{dequeue, own};
pub use send::{send_to_group, send_to_process, send_to_thread};

/// `SIG_DFL`.
pub const SIG_DFL: u64 = 0;
/// `SIG_IGN`.
pub const SIG_IGN: u64 = 1;

/// The flags of sigaction(2).
pub mod sa {
    /// No SIGCHLD when a child stops.
    pub const NOCLDSTOP: u64 = 1;
    /// Children do not become zombies.
    pub const NOCLDWAIT: u64 = 2;
    /// Three arguments.
    pub const SIGINFO: u64 = 4;
    /// The return trampoline is given.
    pub const RESTORER: u64 = 0x0400_0000;
    /// On the alternate stack.
    pub const ONSTACK: u64 = 0x0800_0000;
    /// Restart calls.
    pub const RESTART: u64 = 0x1000_0000;
    /// Do not block the signal in its own handler.
    pub const NODEFER: u64 = 0x4000_0000;
    /// Back to the default when the handler runs.
    pub const RESETHAND: u64 = 0x8000_0000;
}

/// The bit of signal `signo` in a set; 0 for what is no signal.
#[must_use]
pub const fn bit(signo: i32) -> u64 {
    if signo >= 1 && signo <= SIGNALS as i32 {
        1 << (signo - 1)
    } else {
        0
    }
}

/// The signals that can be neither blocked, caught nor ignored.
pub const UNBLOCKABLE: u64 = bit(libc::SIGKILL) | bit(libc::SIGSTOP);

/// The signals whose default is to stop.
pub const STOPPING: u64 =
    bit(libc::SIGSTOP) | bit(libc::SIGTSTP) | bit(libc::SIGTTIN) | bit(libc::SIGTTOU);

/// The signals whose default is nothing (`SIGCONT` has done its work when it was sent).
pub const IGNORED_BY_DEFAULT: u64 =
    bit(libc::SIGCHLD) | bit(libc::SIGURG) | bit(libc::SIGWINCH) | bit(libc::SIGCONT);

/// The signals a fault of the program itself raises: taken first.
pub const SYNCHRONOUS: u64 = bit(libc::SIGSEGV)
    | bit(libc::SIGBUS)
    | bit(libc::SIGILL)
    | bit(libc::SIGTRAP)
    | bit(libc::SIGFPE)
    | bit(libc::SIGSYS);

/// What [`before_return`] found.
#[derive(Debug)]
pub enum Outcome {
    /// Go on: with the call in `t.call` if there is one, else in the guest.
    Resume,
    /// The process is stopped: park the thread, then ask again.
    Park(Wait),
    /// The thread is over: drop it.
    Exited,
}

/// What a worker does after a handler has returned.
#[derive(Debug)]
pub enum Settled {
    /// From the top of its loop.
    Again,
    /// Park the thread.
    Park(Wait),
    /// The thread is over: drop it.
    Exited,
}

/// Stores what a handler returned into the thread's record, by the protocol above. `c.call` is the
/// call that was made.
pub fn settle(c: &mut Ctx<'_>, result: SysResult) -> Settled {
    let rax = match result {
        Ok(value) => value,
        // A handler that says itself what an interruption means.
        Err(Stop::Errno(Errno::INTR)) if c.interrupted => return interrupted(c, Restart::Never),
        Err(Stop::Errno(errno)) => errno_value(errno),
        Err(Stop::Replaced) => {
            c.t.call = None;
            return Settled::Again;
        }
        Err(Stop::Exited) => return Settled::Exited,
        Err(Stop::Interrupted(restart)) => return interrupted(c, restart),
        Err(Stop::Block(wait)) => return blocked(c, wait),
    };
    c.t.regs.rax = rax;
    c.t.call = None;
    restore_saved_mask(c);
    Settled::Again
}

fn blocked(c: &mut Ctx<'_>, wait: Wait) -> Settled {
    let must_sleep = wait.restart == Restart::Uninterruptible;
    if c.interrupted && !must_sleep {
        return interrupted(c, wait.restart);
    }
    c.t.call = Some(std::mem::take(&mut c.call));
    let attention =
        c.t.shared
            .attention
            .load(std::sync::atomic::Ordering::SeqCst);
    if attention && !must_sleep {
        Settled::Again
    } else {
        Settled::Park(wait)
    }
}

fn interrupted(c: &mut Ctx<'_>, restart: Restart) -> Settled {
    let mut call = std::mem::take(&mut c.call);
    call.interrupted = Some(restart);
    c.t.call = Some(call);
    c.t.shared.call_attention();
    Settled::Again
}

/// `-errno` as RAX has it.
#[must_use]
pub fn errno_value(errno: Errno) -> u64 {
    i64::from(-errno.raw_os_error()) as u64
}

/// Sets a thread's mask, in its record and where senders look. Signals for the process that it was to take and
/// now blocks go to another thread.
pub fn set_mask(sched: &Sched, state: &mut State, t: &mut Thread, mask: u64) {
    let newly_blocked = mask & !t.mask;
    t.mask = mask & !UNBLOCKABLE;
    if let Some(p) = state.procs.get_mut(&t.pid) {
        p.thread_masks.insert(t.tid, t.mask);
        if deliverable(p, t.tid, t.mask) != 0 {
            t.shared.call_attention();
        }
        if p.threads.len() > 1 {
            send::retarget(sched, p, newly_blocked);
        }
    }
}

/// Waits under `mask` (`rt_sigsuspend`, `ppoll`, `pselect6`, `epoll_pwait`): to be called before the
/// condition is looked at, every time the call is made. The old mask comes back when the call ends,
/// after a handler that interrupts it has run.
pub fn set_temporary_mask(c: &mut Ctx<'_>, mask: u64) {
    if c.t.saved_mask.is_some() {
        return;
    }
    let mut state = c.k.state();
    c.t.saved_mask = Some(c.t.mask);
    set_mask(&c.k.sched, &mut state, c.t, mask);
}

/// The mask before [`set_temporary_mask`], when no handler takes it into its frame.
fn restore_saved_mask(c: &mut Ctx<'_>) {
    if let Some(mask) = c.t.saved_mask.take() {
        let mut state = c.k.state();
        set_mask(&c.k.sched, &mut state, c.t, mask);
    }
}

/// Signals pending for thread `tid`, its own and its process's, that `mask` lets through.
#[must_use]
pub fn deliverable(p: &Process, tid: Tid, mask: u64) -> u64 {
    let own = p.thread_pending.get(&tid).map_or(0, |q| q.set);
    (own | p.pending.set) & (!mask | UNBLOCKABLE)
}

/// What a process does with a signal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Nothing.
    Ignore,
    /// Runs the handler.
    Handler,
    /// Stops.
    Stop,
    /// Ends.
    Kill,
}

/// What process `p` does with signal `signo` now.
#[must_use]
pub fn effect(p: &Process, signo: i32) -> Effect {
    let bit = bit(signo);
    let handler = action(p, signo).handler;
    match handler {
        SIG_IGN if bit & UNBLOCKABLE == 0 => Effect::Ignore,
        SIG_DFL | SIG_IGN if bit & STOPPING != 0 => Effect::Stop,
        SIG_DFL | SIG_IGN if bit & IGNORED_BY_DEFAULT != 0 => Effect::Ignore,
        SIG_DFL | SIG_IGN => Effect::Kill,
        _ => Effect::Handler,
    }
}

/// The disposition of a signal; the default one for what is no signal.
#[must_use]
pub fn action(p: &Process, signo: i32) -> super::process::SigAction {
    usize::try_from(signo - 1)
        .ok()
        .and_then(|n| p.actions.get(n))
        .copied()
        .unwrap_or_default()
}
