//! Process groups, sessions, and the terminal's rules for them (credentials(7), setpgid(2),
//! tcsetpgrp(3)).

use crate::linux::Errno;
use crate::linux::call::{Arg, Args, Ctx, Entry, Restart, Stop, SysResult, Wait};
use crate::linux::process::{INIT, Life, Pid, SigInfo, State};
use crate::linux::sched::Sched;
use crate::linux::signal::{Effect, bit, effect, send};

use Arg::Int;

/// The family's calls.
pub const TABLE: &[Entry] = &[
    Entry {
        nr: 109,
        name: "setpgid",
        args: &[Int, Int],
        handler: sys_setpgid,
    },
    Entry {
        nr: 111,
        name: "getpgrp",
        args: &[],
        handler: sys_getpgrp,
    },
    Entry {
        nr: 112,
        name: "setsid",
        args: &[],
        handler: sys_setsid,
    },
    Entry {
        nr: 121,
        name: "getpgid",
        args: &[Int],
        handler: sys_getpgid,
    },
    Entry {
        nr: 124,
        name: "getsid",
        args: &[Int],
        handler: sys_getsid,
    },
];

fn sys_setpgid(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let mut state = c.k.state();
    Ok(setpgid(&mut state, c.t.pid, a.i32(0), a.i32(1)).map(|()| 0)?)
}

/// setpgid(2), for `me`.
fn setpgid(state: &mut State, me: Pid, pid: Pid, pgid: Pid) -> Result<(), Errno> {
    let pid = if pid == 0 { me } else { pid };
    let pgid = if pgid == 0 { pid } else { pgid };
    if pgid < 0 {
        return Err(Errno::INVAL);
    }
    let my_sid = state.process(me)?.sid;
    let target = state.process(pid)?;
    if target.ppid == me && pid != me {
        if target.sid != my_sid {
            return Err(Errno::PERM);
        }
        if target.has_execed {
            return Err(Errno::ACCESS);
        }
    } else if pid != me {
        return Err(Errno::SRCH);
    }
    if target.sid == pid {
        return Err(Errno::PERM);
    }
    let joins = pgid != pid;
    if joins
        && !state
            .procs
            .values()
            .any(|p| p.pgid == pgid && p.sid == my_sid && p.pid != INIT)
    {
        return Err(Errno::PERM);
    }
    state.process_mut(pid)?.pgid = pgid;
    Ok(())
}

fn sys_getpgrp(c: &mut Ctx<'_>, _a: &Args) -> SysResult {
    Ok(c.with_process(|p| p.pgid) as u64)
}

fn sys_getpgid(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let pid = if a.i32(0) == 0 { c.t.pid } else { a.i32(0) };
    Ok(c.k.state().process(pid)?.pgid as u64)
}

fn sys_getsid(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let pid = if a.i32(0) == 0 { c.t.pid } else { a.i32(0) };
    Ok(c.k.state().process(pid)?.sid as u64)
}

fn sys_setsid(c: &mut Ctx<'_>, _a: &Args) -> SysResult {
    let pid = c.t.pid;
    let mut state = c.k.state();
    if state.procs.values().any(|p| p.pgid == pid) {
        return Err(Errno::PERM.into());
    }
    let p = state.process_mut(pid)?;
    p.sid = pid;
    p.pgid = pid;
    Ok(pid as u64)
}

/// Whether no member of group `pgid`, `except` not counted, has a parent in another group of the
/// same session: then nobody could continue it (POSIX 3.264). The first program's parent is the
/// host's shell, if there is one.
#[must_use]
pub fn is_orphaned(state: &State, pgid: Pid, except: Option<Pid>) -> bool {
    let first = state.procs.get(&state.main);
    if state.tty.outer_shell && first.is_some_and(|first| first.pgid == pgid) {
        return false;
    }
    let held = |p: &crate::linux::process::Process| {
        let parent = state.procs.get(&p.ppid);
        Some(p.pid) != except
            && !p.is_zombie()
            && p.ppid != INIT
            && parent.is_some_and(|parent| parent.pgid != pgid && parent.sid == p.sid)
    };
    !state
        .procs
        .values()
        .filter(|p| p.pgid == pgid && p.pid != INIT)
        .any(|p| held(p))
}

fn has_stopped(state: &State, pgid: Pid) -> bool {
    state
        .procs
        .values()
        .any(|p| p.pgid == pgid && matches!(p.life, Life::Stopped(_)))
}

fn hang_up(sched: &Sched, state: &mut State, pgid: Pid) {
    for signo in [libc::SIGHUP, libc::SIGCONT] {
        // The group has a stopped member.
        let _ = send::group(sched, state, pgid, SigInfo::kernel(signo));
    }
}

/// Process `dead` has ended: if that orphaned its own group and a member is stopped, the group is
/// hung up and continued.
pub(crate) fn hang_up_if_orphaned(sched: &Sched, state: &mut State, dead: Pid) {
    let Some(p) = state.procs.get(&dead) else {
        return;
    };
    let (pgid, sid, parent) = (p.pgid, p.sid, p.ppid);
    // It held the group together only if its parent was outside, in the session.
    let held = state
        .procs
        .get(&parent)
        .is_some_and(|q| q.pgid != pgid && q.sid == sid);
    if held && parent != INIT && is_orphaned(state, pgid, Some(dead)) && has_stopped(state, pgid) {
        hang_up(sched, state, pgid);
    }
}

/// The parent `dead` of `child` has ended: the same for the child's group, if that is another one.
pub(crate) fn hang_up_if_orphaned_by(sched: &Sched, state: &mut State, child: Pid, dead: Pid) {
    let (Some(c), Some(d)) = (state.procs.get(&child), state.procs.get(&dead)) else {
        return;
    };
    let pgid = c.pgid;
    let was_held = d.pgid != pgid && d.sid == c.sid;
    if was_held && is_orphaned(state, pgid, None) && has_stopped(state, pgid) {
        hang_up(sched, state, pgid);
    }
}

/// What a process does with the terminal, for [`tty_check`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TtyUse {
    /// Reads from it.
    Read,
    /// Writes to it while `TOSTOP` is set.
    Write,
    /// Changes its settings or its foreground group.
    Change,
}

/// What the terminal's rules say to a use of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Allowed,
    Refused,
    Signal(i32),
}

/// Whether the calling process may use its controlling terminal now (termios(3), "job control"). A
/// background process is sent `SIGTTIN` or `SIGTTOU` and its call blocks until it is continued.
///
/// # Errors
/// `EIO` for a background process that cannot be stopped; else [`Stop::Block`], to be returned.
pub fn tty_check(c: &mut Ctx<'_>, what: TtyUse) -> Result<(), Stop> {
    let mut state = c.k.state();
    match verdict(&state, c.t.pid, c.t.mask, what) {
        Verdict::Allowed => Ok(()),
        Verdict::Refused => Err(Errno::IO.into()),
        Verdict::Signal(signo) => {
            let pgid = state.process(c.t.pid)?.pgid;
            send::group(&c.k.sched, &mut state, pgid, SigInfo::kernel(signo))?;
            Err(Stop::Block(Wait {
                keys: Vec::new(),
                deadline: None,
                restart: Restart::Sys,
            }))
        }
    }
}

fn verdict(state: &State, pid: Pid, mask: u64, what: TtyUse) -> Verdict {
    let Some(p) = state.procs.get(&pid) else {
        return Verdict::Refused;
    };
    if state.tty.session != Some(p.sid) || p.pgid == state.tty.foreground {
        return Verdict::Allowed;
    }
    let signo = if what == TtyUse::Read {
        libc::SIGTTIN
    } else {
        libc::SIGTTOU
    };
    let deaf = mask & bit(signo) != 0 || effect(p, signo) == Effect::Ignore;
    match what {
        TtyUse::Read if deaf => Verdict::Refused,
        TtyUse::Write | TtyUse::Change if deaf => Verdict::Allowed,
        _ if is_orphaned(state, p.pgid, None) => Verdict::Refused,
        _ => Verdict::Signal(signo),
    }
}

/// tcsetpgrp(3), after [`tty_check`]: makes `pgid` the foreground group.
///
/// # Errors
/// `ENOTTY` if it is not the caller's terminal, `EINVAL`, `EPERM` if the group is not of its session.
pub fn set_foreground(state: &mut State, me: Pid, pgid: Pid) -> Result<(), Errno> {
    let sid = state.process(me)?.sid;
    if state.tty.session != Some(sid) {
        return Err(Errno::NOTTY);
    }
    if pgid <= 0 {
        return Err(Errno::INVAL);
    }
    let mut members = state.procs.values().filter(|p| p.pgid == pgid).peekable();
    if members.peek().is_none() {
        return Err(Errno::SRCH);
    }
    if !members.any(|p| p.sid == sid) {
        return Err(Errno::PERM);
    }
    state.tty.foreground = pgid;
    Ok(())
}

/// `TIOCSCTTY`: the terminal becomes the controlling one of the caller's session.
///
/// # Errors
/// `EPERM` unless the caller leads a session without a terminal and no other session has this one.
pub fn take_terminal(state: &mut State, me: Pid) -> Result<(), Errno> {
    let p = state.process(me)?;
    let (sid, pgid) = (p.sid, p.pgid);
    if state.tty.session == Some(sid) {
        return Ok(());
    }
    if sid != me || state.tty.session.is_some() {
        return Err(Errno::PERM);
    }
    state.tty.session = Some(sid);
    state.tty.foreground = pgid;
    Ok(())
}
