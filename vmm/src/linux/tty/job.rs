//! Job control: which processes may use the terminal (POSIX base definitions, chapter 11).

use super::super::Errno;
use super::super::call::{Ctx, Restart, Stop, Wait};
use super::super::process::{Pid, SigFields, SigInfo, State};
use super::super::signal;

/// `si_code` of a signal the kernel itself sends.
pub(super) const SI_KERNEL: i32 = 0x80;

/// A signal from the terminal.
pub(super) fn from_kernel(signo: i32) -> SigInfo {
    SigInfo { signo, code: SI_KERNEL, errno: 0, fields: SigFields::None }
}

/// The caller's group, if the terminal controls its session and another group is in the
/// foreground.
pub(super) fn in_background(c: &Ctx<'_>) -> Option<Pid> {
    let state = c.k.state();
    background(&state, c.t.pid)
}

fn background(state: &State, pid: Pid) -> Option<Pid> {
    let p = state.procs.get(&pid)?;
    let controlled = state.tty.session == Some(p.sid);
    (controlled && p.pgid != state.tty.foreground).then_some(p.pgid)
}

/// Whether no member of the group has a parent that could continue it: one in another group of the
/// same session, or the host's shell.
fn is_orphaned(state: &State, pgid: Pid) -> bool {
    let main = state.procs.get(&state.main);
    if state.tty.outer_shell && main.is_some_and(|main| main.pgid == pgid) {
        return false;
    }
    let members = state.procs.values().filter(|p| p.pgid == pgid);
    let mut parents = members.filter_map(|p| Some((p, state.procs.get(&p.ppid)?)));
    !parents.any(|(p, parent)| parent.pgid != pgid && parent.sid == p.sid)
}

/// What a process in the background gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    /// It may go on.
    Allowed,
    /// `EIO`.
    Refused,
    /// Its group is sent the signal.
    Stopped,
}

/// Reading is refused where the signal would have no effect; changing is allowed there.
fn verdict(indifferent: bool, orphaned: bool, when_indifferent: Verdict) -> Verdict {
    match (indifferent, orphaned) {
        (true, _) => when_indifferent,
        (false, true) => Verdict::Refused,
        (false, false) => Verdict::Stopped,
    }
}

fn check(c: &Ctx<'_>, signo: i32, when_indifferent: Verdict) -> Result<(), Stop> {
    let mut state = c.k.state();
    let Some(pgid) = background(&state, c.t.pid) else { return Ok(()) };
    let ignored = state
        .process(c.t.pid)
        .is_ok_and(|p| signal::action(p, signo).handler == signal::SIG_IGN);
    let blocked = c.t.mask & signal::bit(signo) != 0;
    match verdict(ignored || blocked, is_orphaned(&state, pgid), when_indifferent) {
        Verdict::Allowed => Ok(()),
        Verdict::Refused => Err(Errno::IO.into()),
        Verdict::Stopped => {
            // The group exists: the caller is in it.
            let _ = signal::send_to_group(c.k, &mut state, pgid, from_kernel(signo));
            Err(Stop::Block(Wait { keys: Vec::new(), deadline: None, restart: Restart::Sys }))
        }
    }
}

/// Whether the caller may read: not in the background.
pub(super) fn may_read(c: &Ctx<'_>) -> Result<(), Stop> {
    check(c, libc::SIGTTIN, Verdict::Refused)
}

/// Whether the caller may change the terminal (or write, with `TOSTOP`).
pub(super) fn may_change(c: &Ctx<'_>) -> Result<(), Stop> {
    check(c, libc::SIGTTOU, Verdict::Allowed)
}

/// The group that signals from the keyboard go to: the foreground group, or the first program's if
/// the terminal controls no session.
pub(super) fn keyboard_group(state: &State) -> Option<Pid> {
    match state.tty.session {
        Some(_) => Some(state.tty.foreground),
        None => main_group(state),
    }
}

/// The first program's group.
pub(super) fn main_group(state: &State) -> Option<Pid> {
    state.procs.get(&state.main).map(|p| p.pgid)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reader_that_ignores_the_signal_is_refused_and_writer_allowed() {
        assert_eq!(verdict(true, false, Verdict::Refused), Verdict::Refused);
        assert_eq!(verdict(true, true, Verdict::Allowed), Verdict::Allowed);
        assert_eq!(verdict(false, true, Verdict::Allowed), Verdict::Refused);
        assert_eq!(verdict(false, false, Verdict::Allowed), Verdict::Stopped);
    }
}
