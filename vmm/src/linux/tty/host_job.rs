//! The VMM as a job of the host's: its process group, session and parent.
//!
//! The numbers are taken as the kernel gives them. In a PID namespace a group or session that began
//! outside is 0 (pid_namespaces(7)), as for all that a container's runtime starts.
#![expect(
    unsafe_code,
    reason = "rustix takes a group or session from outside the PID namespace for a mistake"
)]

use std::os::fd::{AsFd, AsRawFd};

/// Whether the VMM's group is the foreground group of a terminal.
pub(super) fn in_foreground_of(fd: impl AsFd) -> bool {
    // SAFETY: the descriptor is borrowed for the call, which gives a number only.
    let foreground = unsafe { libc::tcgetpgrp(fd.as_fd().as_raw_fd()) };
    foreground == group_of(0)
}

/// Whether the host has a shell that continues the VMM when it was stopped: its group is not
/// orphaned (POSIX job control).
#[must_use]
pub(super) fn under_job_control() -> bool {
    // SAFETY: getppid(2) gives a number only.
    let parent = unsafe { libc::getppid() };
    // A parent from outside is 0, which would ask for the VMM's own session.
    if parent <= 0 {
        return false;
    }
    let (session, group) = (session_of(parent), group_of(parent));
    // Two processes of the namespace for which it is 0 are in the same one, unless a third put the
    // VMM there; -1 is a parent that has gone.
    session >= 0 && session == session_of(0) && group >= 0 && group != group_of(0)
}

/// Whether another group of the VMM's session is in the foreground of its terminal `fd`: what is typed is not ours to read.
/// While no terminal is the session's, or this one is not, all may read.
pub(in super::super) fn in_background_of(fd: impl AsFd) -> bool {
    // SAFETY: the descriptor is borrowed for the call, which gives a number only.
    let foreground = unsafe { libc::tcgetpgrp(fd.as_fd().as_raw_fd()) };
    foreground >= 0 && foreground != group_of(0)
}

fn session_of(pid: libc::pid_t) -> libc::pid_t {
    // SAFETY: getsid(2) takes and gives a number only.
    unsafe { libc::getsid(pid) }
}

fn group_of(pid: libc::pid_t) -> libc::pid_t {
    // SAFETY: getpgid(2) takes and gives a number only.
    unsafe { libc::getpgid(pid) }
}
