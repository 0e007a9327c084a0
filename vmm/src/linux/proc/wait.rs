//! wait4(2) and waitid(2).

use zerocopy::IntoBytes;

use super::exit::{code_and_status, reap};
use super::group_or_own;
use super::info::Rusage;
use crate::linux::Errno;
use crate::linux::call::{Arg, Args, Ctx, Entry, Stop, SysResult, Wait, WaitKey};
use crate::linux::process::{Life, Pid, Process, SigFields, SigInfo, State, Unreported, Usage};
use crate::linux::signal::info::cld;

use Arg::{Hex, Int};

/// The family's calls.
pub const TABLE: &[Entry] = &[
    Entry {
        nr: 61,
        name: "wait4",
        args: &[Int, Hex, Hex, Hex],
        handler: sys_wait4,
    },
    Entry {
        nr: 247,
        name: "waitid",
        args: &[Int, Int, Hex, Hex, Hex],
        handler: sys_waitid,
    },
];

bitflags::bitflags! {
    /// The options of both calls.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    struct Options: u32 {
        const NOHANG = 1;
        /// `WUNTRACED` and `WSTOPPED`.
        const STOPPED = 2;
        const EXITED = 4;
        const CONTINUED = 8;
        const NOWAIT = 0x0100_0000;
        const NOTHREAD = 0x2000_0000;
        const ALL = 0x4000_0000;
        const CLONE = 0x8000_0000;
    }
}

/// Which children.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Target {
    Any,
    One(Pid),
    Group(Pid),
}

/// A child's change.
#[derive(Clone, Copy, Debug)]
struct Event {
    pid: Pid,
    uid: u32,
    code: i32,
    /// As `si_status` has it.
    si_status: i32,
    /// As wait4(2) has it.
    status: i32,
    usage: Usage,
}

/// What a look at the children found.
#[derive(Debug)]
enum Found {
    Event(Event),
    NotYet,
    NoChild,
}

fn sys_wait4(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let given = Options::from_bits(a.u32(2)).ok_or(Errno::INVAL)?;
    if given.intersects(Options::EXITED | Options::NOWAIT) {
        return Err(Errno::INVAL.into());
    }
    let options = given | Options::EXITED;
    let pid = a.i32(0);
    if pid == i32::MIN {
        return Err(Errno::SRCH.into());
    }
    let Some(event) = wait(c, options, |me| match pid {
        -1 => Target::Any,
        0 => Target::Group(me.pgid),
        1.. => Target::One(pid),
        _ => Target::Group(-pid),
    })?
    else {
        return Ok(0);
    };
    if a.u64(1) != 0 {
        c.mem().write_obj(a.u64(1), &event.status)?;
    }
    write_usage(c, a.u64(3), &event.usage)?;
    Ok(event.pid as u64)
}

fn sys_waitid(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let options = Options::from_bits(a.u32(3)).ok_or(Errno::INVAL)?;
    if !options.intersects(Options::EXITED | Options::STOPPED | Options::CONTINUED) {
        return Err(Errno::INVAL.into());
    }
    let id = a.i32(1);
    let event = wait_by_id(c, options, a.u32(0), id)?;
    if a.u64(2) != 0 {
        // The union beyond si_status is left alone, as on Linux.
        let mut bytes = [0; 28];
        if let Some(e) = event {
            let fields = SigFields::Child {
                pid: e.pid,
                uid: e.uid,
                status: e.si_status,
            };
            let info = SigInfo {
                signo: libc::SIGCHLD,
                code: e.code,
                errno: 0,
                fields,
            };
            bytes.copy_from_slice(&info.encode()[..28]);
        }
        c.mem().write(a.u64(2), &bytes)?;
    }
    if let Some(event) = event {
        write_usage(c, a.u64(4), &event.usage)?;
    }
    Ok(0)
}

fn wait_by_id(
    c: &mut Ctx<'_>,
    options: Options,
    kind: u32,
    id: Pid,
) -> Result<Option<Event>, Stop> {
    match kind {
        libc::P_ALL => wait(c, options, |_| Target::Any),
        libc::P_PID if id > 0 => wait(c, options, |_| Target::One(id)),
        libc::P_PGID if id >= 0 => wait(c, options, |me| Target::Group(group_or_own(me, id))),
        _ => Err(Errno::INVAL.into()),
    }
}

fn write_usage(c: &Ctx<'_>, va: u64, usage: &Usage) -> Result<(), Errno> {
    if va == 0 {
        Ok(())
    } else {
        c.mem().write(va, Rusage::of(usage).as_bytes())
    }
}

/// The next event, `None` if there is none yet and the caller does not wait.
fn wait(
    c: &mut Ctx<'_>,
    options: Options,
    target: impl FnOnce(&Process) -> Target,
) -> Result<Option<Event>, Stop> {
    let pid = c.t.pid;
    let mut state = c.k.state();
    let target = target(state.process(pid)?);
    match look(&mut state, pid, target, options) {
        Found::Event(event) => Ok(Some(event)),
        Found::NoChild => Err(Errno::CHILD.into()),
        Found::NotYet if options.contains(Options::NOHANG) => Ok(None),
        Found::NotYet => Err(Stop::Block(Wait::on(WaitKey::ChildOf(pid)))),
    }
}

/// Looks for a child with something to tell, and takes the news (or the zombie) unless `NOWAIT`.
fn look(state: &mut State, me: Pid, target: Target, options: Options) -> Found {
    let Some(parent) = state.procs.get(&me) else {
        return Found::NoChild;
    };
    let children: Vec<_> = match target {
        Target::One(pid) => parent.children.get(&pid).copied().into_iter().collect(),
        Target::Any | Target::Group(_) => parent.children.iter().copied().collect(),
    };
    let mut any = false;
    for pid in children {
        let Some(child) = state
            .procs
            .get_mut(&pid)
            .filter(|p| eligible(p, target, options))
        else {
            continue;
        };
        any = true;
        let Some(mut event) = event(child, options) else {
            continue;
        };
        if !options.contains(Options::NOWAIT) {
            match child.life {
                Life::Zombie(_) => event.usage = reap(state, pid),
                Life::Running | Life::Stopped(_) => child.unreported = Unreported::None,
            }
        }
        return Found::Event(event);
    }
    if any { Found::NotYet } else { Found::NoChild }
}

fn eligible(child: &Process, target: Target, options: Options) -> bool {
    let named = match target {
        Target::Any => true,
        Target::One(pid) => child.pid == pid,
        Target::Group(pgid) => child.pgid == pgid,
    };
    let is_clone = child.exit_signal != libc::SIGCHLD;
    named && (options.contains(Options::ALL) || is_clone == options.contains(Options::CLONE))
}

/// What the child has to tell that `options` asks for.
fn event(child: &Process, options: Options) -> Option<Event> {
    let (code, si_status, status) = match (child.life, child.unreported) {
        (Life::Zombie(status), _) => {
            options.contains(Options::EXITED).then_some(())?;
            let (code, si_status) = code_and_status(status);
            (code, si_status, status)
        }
        (Life::Stopped(signo), Unreported::Stopped) if options.contains(Options::STOPPED) => {
            (cld::STOPPED, signo, signo << 8 | 0x7f)
        }
        (Life::Running, Unreported::Continued) if options.contains(Options::CONTINUED) => {
            (cld::CONTINUED, libc::SIGCONT, 0xffff)
        }
        (Life::Stopped(_) | Life::Running, _) => return None,
    };
    let usage = child.usage.plus(&child.children_usage);
    Some(Event {
        pid: child.pid,
        uid: child.cred.uid[0],
        code,
        si_status,
        status,
        usage,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linux::file::Location;

    /// Process 2 with children 3 (group 2) and 4 (group 4).
    fn family() -> State {
        let root = Location {
            mount: 0,
            path: Vec::new(),
        };
        let mut state = State::new(root.clone());
        for (pid, ppid, pgid) in [(2, 1, 2), (3, 2, 2), (4, 2, 4)] {
            let mut p = Process::new(pid, root.clone());
            (p.ppid, p.pgid, p.sid) = (ppid, pgid, 2);
            state.procs.insert(pid, Box::new(p));
            state.procs.get_mut(&ppid).unwrap().children.insert(pid);
        }
        state
    }

    fn found(state: &mut State, target: Target, options: Options) -> Option<(Pid, i32)> {
        match look(state, 2, target, options) {
            Found::Event(e) => Some((e.pid, e.status)),
            Found::NotYet | Found::NoChild => None,
        }
    }

    #[test]
    fn no_child_of_that_name_is_an_error() {
        let mut state = family();
        assert!(matches!(
            look(&mut state, 2, Target::One(9), Options::EXITED),
            Found::NoChild
        ));
        assert!(matches!(
            look(&mut state, 3, Target::Any, Options::EXITED),
            Found::NoChild
        ));
        assert!(matches!(
            look(&mut state, 2, Target::Any, Options::EXITED),
            Found::NotYet
        ));
    }

    #[test]
    fn zombie_is_reported_once_and_its_usage_kept() {
        let mut state = family();
        let child = state.process_mut(4).unwrap();
        child.life = Life::Zombie(7 << 8);
        child.usage.cpu_ns = 5;
        let seen = Options::EXITED | Options::NOWAIT;
        assert_eq!(found(&mut state, Target::Any, seen), Some((4, 7 << 8)));
        assert_eq!(found(&mut state, Target::Group(2), Options::EXITED), None);
        assert_eq!(
            found(&mut state, Target::Group(4), Options::EXITED),
            Some((4, 7 << 8))
        );
        assert_eq!(found(&mut state, Target::Any, Options::EXITED), None);
        assert!(!state.procs.contains_key(&4));
        assert_eq!(state.process(2).unwrap().children_usage.cpu_ns, 5);
    }

    #[test]
    fn stop_and_continue_are_reported_only_when_asked() {
        let mut state = family();
        let child = state.process_mut(3).unwrap();
        (child.life, child.unreported) = (Life::Stopped(20), Unreported::Stopped);
        assert_eq!(found(&mut state, Target::One(3), Options::EXITED), None);
        let both = Options::EXITED | Options::STOPPED | Options::CONTINUED;
        assert_eq!(
            found(&mut state, Target::One(3), both),
            Some((3, 20 << 8 | 0x7f))
        );
        assert_eq!(found(&mut state, Target::One(3), both), None);
        let child = state.process_mut(3).unwrap();
        (child.life, child.unreported) = (Life::Running, Unreported::Continued);
        assert_eq!(found(&mut state, Target::One(3), both), Some((3, 0xffff)));
    }

    #[test]
    fn clone_child_needs_the_option() {
        let mut state = family();
        let child = state.process_mut(3).unwrap();
        (child.life, child.exit_signal) = (Life::Zombie(0), 0);
        assert_eq!(found(&mut state, Target::One(3), Options::EXITED), None);
        let all = Options::EXITED | Options::ALL | Options::NOWAIT;
        assert_eq!(found(&mut state, Target::One(3), all), Some((3, 0)));
        assert_eq!(
            found(&mut state, Target::One(3), Options::EXITED | Options::CLONE),
            Some((3, 0))
        );
    }
}
