//! Delivery: what a thread does about its signals before it goes back to ring 3.

use std::sync::atomic::Ordering;

use super::frame::{self, FrameError};
use super::info::{dequeue, peek};
use super::{Effect, Outcome, bit, deliverable, effect, errno_value, sa, send, set_mask};
use crate::linux::Errno;
use crate::linux::call::{Ctx, Restart, Wait, WaitKey};
use crate::linux::proc::{exit, groups};
use crate::linux::process::{Life, SigAction, SigInfo, State};
use crate::linux::sched::Sched;
use crate::linux::thread::Thread;

/// What the state says the thread has to do next.
enum Step {
    Nothing,
    Park(Wait),
    Exit,
    Run(SigAction, SigInfo),
}

/// To be called before a thread returns to ring 3 or makes its blocked call again, when its
/// `attention` is set. Handles stops, death and, unless a call is in progress, runs handlers: one
/// frame on top of the other until nothing is deliverable.
pub fn before_return(c: &mut Ctx<'_>) -> Outcome {
    loop {
        let step = {
            let mut state = c.k.state();
            let before = state.procs.get(&c.t.pid).map(|p| p.life);
            let step = next(&c.k.sched, &mut state, c.t);
            let life = state.procs.get(&c.t.pid).map(|p| p.life);
            if let Some(Life::Stopped(signo)) = life
                && life != before
                && c.t.pid == state.main
            {
                c.k.io.main_stops.stopped(signo);
            }
            step
        };
        match step {
            Step::Nothing => return Outcome::Resume,
            Step::Park(wait) => return Outcome::Park(wait),
            Step::Exit => {
                exit::thread_exit(c, 0);
                return Outcome::Exited;
            }
            Step::Run(action, info) => run_handler(c, &action, &info),
        }
    }
}

/// Whether a signal that runs a handler is deliverable now: the call is then made again with
/// [`Ctx::interrupted`] set.
#[must_use]
pub fn wants_handler(c: &Ctx<'_>) -> bool {
    let state = c.k.state();
    let Some(p) = state.procs.get(&c.t.pid) else {
        return false;
    };
    let set = deliverable(p, c.t.tid, c.t.mask);
    (1..=crate::linux::process::SIGNALS as i32)
        .any(|signo| set & bit(signo) != 0 && effect(p, signo) == Effect::Handler)
}

/// A signal the calling thread has brought upon itself: it cannot be blocked or ignored.
pub fn fault(c: &mut Ctx<'_>, info: SigInfo) {
    let mut state = c.k.state();
    force(&c.k.sched, &mut state, c.t, info);
}

/// As [`fault`], under the state lock.
pub(crate) fn force(sched: &Sched, state: &mut State, t: &mut Thread, info: SigInfo) {
    let Some(p) = state.procs.get_mut(&t.pid) else {
        return;
    };
    let blocked = t.mask & bit(info.signo) != 0;
    if (blocked || effect(p, info.signo) == Effect::Ignore)
        && let Some(action) = p.actions.get_mut(info.signo as usize - 1)
    {
        action.handler = super::SIG_DFL;
    }
    p.thread_pending.entry(t.tid).or_default().push(info);
    t.shared.call_attention();
    if blocked {
        set_mask(sched, state, t, t.mask & !bit(info.signo));
    }
}

/// Takes the next signal the thread has to do something about.
fn next(sched: &Sched, state: &mut State, t: &mut Thread) -> Step {
    let mid_call = t
        .call
        .as_ref()
        .is_some_and(|call| call.interrupted.is_none());
    loop {
        let Some(p) = state.procs.get_mut(&t.pid) else {
            return Step::Exit;
        };
        if p.is_leaving(t.tid) {
            return Step::Exit;
        }
        let set = deliverable(p, t.tid, t.mask);
        if set & bit(libc::SIGKILL) != 0 {
            exit::end_process(sched, state, t, libc::SIGKILL);
            return Step::Exit;
        }
        if let Life::Stopped(_) = p.life {
            return Step::Park(Wait::on(WaitKey::Continued(t.pid)));
        }
        let Some(signo) = peek(p, t.tid, set) else {
            t.shared.attention.store(false, Ordering::SeqCst);
            if let Some(call) = &mut t.call {
                call.interrupted = None;
            }
            return Step::Nothing;
        };
        let effect = effect(p, signo);
        if effect == Effect::Handler && mid_call {
            return Step::Nothing;
        }
        let Some(info) = dequeue(p, t.tid, bit(signo)) else {
            continue;
        };
        match effect {
            Effect::Ignore => {}
            Effect::Handler => return Step::Run(take_action(p, signo), info),
            Effect::Stop => {
                let pgid = p.pgid;
                if signo == libc::SIGSTOP || !groups::is_orphaned(state, pgid, None) {
                    send::stop(sched, state, t.pid, signo);
                }
            }
            Effect::Kill => {
                exit::end_process(sched, state, t, signo);
                return Step::Exit;
            }
        }
    }
}

/// The disposition to run, reset if it is for one time only.
fn take_action(p: &mut crate::linux::process::Process, signo: i32) -> SigAction {
    let action = super::action(p, signo);
    if action.flags & sa::RESETHAND != 0
        && let Some(slot) = p.actions.get_mut(signo as usize - 1)
    {
        slot.handler = super::SIG_DFL;
    }
    action
}

fn run_handler(c: &mut Ctx<'_>, action: &SigAction, info: &SigInfo) {
    finish_call(c.t, action.flags);
    match frame::push(c, action, info) {
        Ok(()) => {
            let own = if action.flags & sa::NODEFER == 0 {
                bit(info.signo)
            } else {
                0
            };
            let mut state = c.k.state();
            set_mask(&c.k.sched, &mut state, c.t, c.t.mask | action.mask | own);
        }
        Err(FrameError::Unwritable) => no_frame(c, info.signo),
        Err(FrameError::Host(error)) => {
            tracing::error!(pid = c.t.pid, %error, "a signal frame could not be made");
            let mut state = c.k.state();
            exit::end_process(&c.k.sched, &mut state, c.t, libc::SIGKILL);
        }
    }
}

/// `SIGSEGV` because the frame of `signo` could not be written: fatal if that was `SIGSEGV` itself.
fn no_frame(c: &mut Ctx<'_>, signo: i32) {
    let mut state = c.k.state();
    if signo == libc::SIGSEGV
        && let Some(p) = state.procs.get_mut(&c.t.pid)
    {
        p.actions[libc::SIGSEGV as usize - 1].handler = super::SIG_DFL;
    }
    force(&c.k.sched, &mut state, c.t, SigInfo::kernel(libc::SIGSEGV));
}

/// Ends or restarts the interrupted call, visibly for the handler: the frame has RAX with the
/// call's number and RIP on the `syscall` instruction, or RAX with `-EINTR`.
fn finish_call(t: &mut Thread, flags: u64) {
    let Some(call) = t.call.take() else { return };
    if call.interrupted == Some(Restart::Sys) && flags & sa::RESTART != 0 {
        t.regs.rip = t.regs.rip.wrapping_sub(2);
        t.regs.rax = call.nr;
    } else {
        t.regs.rax = errno_value(Errno::INTR);
    }
}
