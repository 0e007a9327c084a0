//! Which groups the host's signals go to. The rules for using the terminal are in
//! [`proc::tty_check`](crate::linux::proc::tty_check).

use crate::linux::process::{Pid, State};

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
