//! The calls that send signals.

use super::info::{SI_TKILL, SI_USER, SIGINFO_SIZE, own};
use super::send::{members, send};
use crate::linux::Errno;
use crate::linux::call::{Arg, Args, Ctx, Entry, SysResult};
use crate::linux::process::{INIT, Pid, Process, SIGNALS, SigInfo, State};
use crate::linux::thread::Tid;

use Arg::{Hex, Int, Sig};

/// The family's calls.
pub const TABLE: &[Entry] = &[
    Entry {
        nr: 62,
        name: "kill",
        args: &[Int, Sig],
        handler: sys_kill,
    },
    Entry {
        nr: 129,
        name: "rt_sigqueueinfo",
        args: &[Int, Sig, Hex],
        handler: sys_rt_sigqueueinfo,
    },
    Entry {
        nr: 200,
        name: "tkill",
        args: &[Int, Sig],
        handler: sys_tkill,
    },
    Entry {
        nr: 234,
        name: "tgkill",
        args: &[Int, Int, Sig],
        handler: sys_tgkill,
    },
    Entry {
        nr: 297,
        name: "rt_tgsigqueueinfo",
        args: &[Int, Int, Sig, Hex],
        handler: sys_rt_tgsigqueueinfo,
    },
];

fn check_signal(signo: i32) -> Result<(), Errno> {
    if (0..=SIGNALS as i32).contains(&signo) {
        Ok(())
    } else {
        Err(Errno::INVAL)
    }
}

/// Whether `from` may send `signo` to `to` (kill(2)).
fn permitted(from: &Process, to: &Process, signo: i32) -> bool {
    let [real, effective, _] = from.cred.uid;
    let theirs = [to.cred.uid[0], to.cred.uid[2]];
    from.pid == to.pid
        || effective == 0
        || theirs.contains(&real)
        || theirs.contains(&effective)
        || (signo == libc::SIGCONT && from.sid == to.sid)
}

/// Checks that `from` may send `signo` to `pid`, and to which process that is.
fn may_send(state: &State, from: Pid, pid: Pid, signo: i32) -> Result<(), Errno> {
    let (from, to) = (state.process(from)?, state.process(pid)?);
    if permitted(from, to, signo) {
        Ok(())
    } else {
        Err(Errno::PERM)
    }
}

fn sys_kill(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let (target, signo) = (a.i32(0), a.i32(1));
    check_signal(signo)?;
    let mut state = c.k.state();
    let me = state.process(c.t.pid)?;
    let info = own(me, signo, SI_USER);
    let targets = targets(&state, me, target)?;
    let mut outcome = Err(Errno::SRCH);
    for pid in targets {
        let sent = may_send(&state, c.t.pid, pid, signo)
            .and_then(|()| deliver(&c.k.sched, &mut state, (pid, None), info));
        // One success is success; EPERM is told only if nobody could be reached.
        if outcome.is_err() {
            outcome = sent;
        }
    }
    Ok(outcome.map(|()| 0)?)
}

/// Whom `kill(target)` means.
fn targets(state: &State, me: &Process, target: i32) -> Result<Vec<Pid>, Errno> {
    Ok(match target {
        1.. => vec![target],
        0 => members(state, me.pgid),
        -1 => state
            .procs
            .keys()
            .copied()
            .filter(|&p| p != INIT && p != me.pid)
            .collect(),
        i32::MIN => return Err(Errno::SRCH),
        _ => members(state, -target),
    })
}

/// Sends, unless the signal is 0, which only asks.
fn deliver(
    sched: &crate::linux::sched::Sched,
    state: &mut State,
    (pid, tid): (Pid, Option<Tid>),
    info: SigInfo,
) -> Result<(), Errno> {
    if info.signo == 0 {
        Ok(())
    } else {
        send(sched, state, pid, tid, info)
    }
}

fn sys_tkill(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    to_thread(c, None, a.i32(0), |me| Ok(own(me, a.i32(1), SI_TKILL)))
}

fn sys_tgkill(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let pid = a.i32(0);
    if pid <= 0 {
        return Err(Errno::INVAL.into());
    }
    to_thread(c, Some(pid), a.i32(1), |me| Ok(own(me, a.i32(2), SI_TKILL)))
}

fn sys_rt_sigqueueinfo(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let (pid, signo) = (a.i32(0), a.i32(1));
    let info = read_info(c, a.u64(2), signo)?;
    check_signal(signo)?;
    forgery(&info, pid == c.t.pid)?;
    let mut state = c.k.state();
    may_send(&state, c.t.pid, pid, signo)?;
    deliver(&c.k.sched, &mut state, (pid, None), info)?;
    Ok(0)
}

fn sys_rt_tgsigqueueinfo(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let (pid, tid, signo) = (a.i32(0), a.i32(1), a.i32(2));
    if pid <= 0 {
        return Err(Errno::INVAL.into());
    }
    let info = read_info(c, a.u64(3), signo)?;
    forgery(&info, pid == c.t.pid)?;
    to_thread(c, Some(pid), tid, |_| Ok(info))
}

fn read_info(c: &Ctx<'_>, va: u64, signo: i32) -> Result<SigInfo, Errno> {
    let mut bytes = [0; SIGINFO_SIZE];
    c.mem().read(va, &mut bytes)?;
    Ok(SigInfo::decode(signo, &bytes))
}

/// Others may not be told that the kernel or kill(2) sent a signal.
fn forgery(info: &SigInfo, to_itself: bool) -> Result<(), Errno> {
    if (info.code >= 0 || info.code == SI_TKILL) && !to_itself {
        Err(Errno::PERM)
    } else {
        Ok(())
    }
}

fn to_thread(
    c: &mut Ctx<'_>,
    pid: Option<Pid>,
    tid: Tid,
    info: impl FnOnce(&Process) -> Result<SigInfo, Errno>,
) -> SysResult {
    if tid <= 0 {
        return Err(Errno::INVAL.into());
    }
    let mut state = c.k.state();
    let info = info(state.process(c.t.pid)?)?;
    check_signal(info.signo)?;
    let owner = state.owner_of(tid).ok_or(Errno::SRCH)?;
    if pid.is_some_and(|pid| pid != owner) {
        return Err(Errno::SRCH.into());
    }
    may_send(&state, c.t.pid, owner, info.signo)?;
    deliver(&c.k.sched, &mut state, (owner, Some(tid)), info)?;
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linux::file::Location;

    fn process(pid: Pid, uid: [u32; 3]) -> Process {
        let mut p = Process::new(
            pid,
            Location {
                mount: 0,
                path: Vec::new(),
            },
        );
        p.cred.uid = uid;
        p
    }

    #[test]
    fn stranger_may_only_continue_its_session() {
        let from = process(5, [1000; 3]);
        let mut to = process(6, [1001; 3]);
        assert!(!permitted(&from, &to, libc::SIGTERM));
        assert!(!permitted(&from, &to, libc::SIGCONT));
        to.sid = from.sid;
        assert!(permitted(&from, &to, libc::SIGCONT));
        assert!(!permitted(&from, &to, libc::SIGTERM));
    }

    #[test]
    fn same_saved_user_or_root_is_permitted() {
        let from = process(5, [1000; 3]);
        assert!(permitted(&from, &process(6, [7, 7, 1000]), libc::SIGTERM));
        assert!(!permitted(&from, &process(6, [7, 1000, 7]), libc::SIGTERM));
        assert!(permitted(
            &process(5, [1, 0, 1]),
            &process(6, [7; 3]),
            libc::SIGKILL
        ));
    }

    #[test]
    fn forged_kernel_code_is_refused() {
        let info = |code| SigInfo {
            code,
            ..SigInfo::kernel(40)
        };
        assert_eq!(forgery(&info(SI_USER), false), Err(Errno::PERM));
        assert_eq!(forgery(&info(SI_TKILL), false), Err(Errno::PERM));
        assert_eq!(forgery(&info(-1), false), Ok(()));
        assert_eq!(forgery(&info(SI_USER), true), Ok(()));
    }

    #[test]
    fn kill_minus_one_spares_the_reaper_and_the_caller() {
        let mut state = State::new(Location {
            mount: 0,
            path: Vec::new(),
        });
        for pid in 2..5 {
            state.procs.insert(pid, Box::new(process(pid, [0; 3])));
        }
        let me = state.process(3).unwrap();
        assert_eq!(targets(&state, me, -1), Ok(vec![2, 4]));
        assert_eq!(targets(&state, me, 0), Ok(vec![3]));
        assert_eq!(targets(&state, me, -4), Ok(vec![4]));
        assert_eq!(targets(&state, me, i32::MIN), Err(Errno::SRCH));
    }
}
