//! The terminal's `ioctl`s (ioctl_tty(2)).

use rustix::termios::{Action, QueueSelector, Winsize};

use super::super::Errno;
use super::super::call::{Ctx, SysResult};
use super::super::proc::groups::{self, TtyUse, tty_check};
use super::super::process::{Pid, Process, SigInfo, State};
use super::super::signal;
use super::file::Terminal;
use super::host::{OLD_SIZE, When, without_sigttou};

const TCGETS: u32 = 0x5401;
const TCSETS: u32 = 0x5402;
const TCSETSW: u32 = 0x5403;
const TCSETSF: u32 = 0x5404;
const TCSBRK: u32 = 0x5409;
const TCXONC: u32 = 0x540a;
const TCFLSH: u32 = 0x540b;
const TIOCSCTTY: u32 = 0x540e;
const TIOCGPGRP: u32 = 0x540f;
const TIOCSPGRP: u32 = 0x5410;
const TIOCSTI: u32 = 0x5412;
const TIOCGWINSZ: u32 = 0x5413;
const TIOCSWINSZ: u32 = 0x5414;
const TIOCNOTTY: u32 = 0x5422;
const TCSBRKP: u32 = 0x5425;
const TIOCGSID: u32 = 0x5429;
const TCGETS2: u32 = 0x802c_542a;
const TCSETS2: u32 = 0x402c_542b;
const TCSETSW2: u32 = 0x402c_542c;
const TCSETSF2: u32 = 0x402c_542d;

pub(super) fn ioctl(file: &Terminal, c: &mut Ctx<'_>, request: u32, arg: u64) -> SysResult {
    match request {
        TCGETS | TCGETS2 => {
            let size = if request == TCGETS { OLD_SIZE } else { 44 };
            let termios = file.tty().termios()?;
            c.mem().write(arg, &termios.0[..size])?;
            Ok(0)
        }
        TCSETS => set(file, c, arg, When::Now, OLD_SIZE),
        TCSETSW => set(file, c, arg, When::Drained, OLD_SIZE),
        TCSETSF => set(file, c, arg, When::Flushed, OLD_SIZE),
        TCSETS2 => set(file, c, arg, When::Now, 44),
        TCSETSW2 => set(file, c, arg, When::Drained, 44),
        TCSETSF2 => set(file, c, arg, When::Flushed, 44),
        TIOCGWINSZ => {
            let size = rustix::termios::tcgetwinsize(file.fd())?;
            let words = [size.ws_row, size.ws_col, size.ws_xpixel, size.ws_ypixel];
            c.mem().write_obj(arg, &words)?;
            Ok(0)
        }
        TIOCSWINSZ => {
            let [ws_row, ws_col, ws_xpixel, ws_ypixel]: [u16; 4] = c.mem().read_obj(arg)?;
            let size = Winsize {
                ws_row,
                ws_col,
                ws_xpixel,
                ws_ypixel,
            };
            rustix::termios::tcsetwinsize(file.fd(), size)?;
            Ok(0)
        }
        TCSBRK | TCSBRKP | TCXONC | TCFLSH => flow(file, c, request, arg as i32),
        TIOCGPGRP | TIOCGSID => {
            let state = c.k.state();
            let p = state.process(c.t.pid)?;
            controls(&state, p)?;
            let id = if request == TIOCGPGRP {
                state.tty.foreground
            } else {
                p.sid
            };
            drop(state);
            c.mem().write_obj(arg, &id)?;
            Ok(0)
        }
        TIOCSPGRP => {
            let pgid: Pid = c.mem().read_obj(arg)?;
            set_foreground(c, pgid)
        }
        TIOCSCTTY => {
            groups::take_terminal(&mut c.k.state(), c.t.pid)?;
            Ok(0)
        }
        TIOCNOTTY => give_up(c),
        // Typing for the person at the host's terminal is not the guest's to do.
        TIOCSTI => Err(Errno::PERM.into()),
        _ => Err(Errno::NOTTY.into()),
    }
}

fn set(file: &Terminal, c: &mut Ctx<'_>, arg: u64, when: When, size: usize) -> SysResult {
    tty_check(c, TtyUse::Change)?;
    let mut termios = file.tty().termios()?;
    c.mem().read(arg, &mut termios.0[..size])?;
    file.tty().set_termios(termios, when)?;
    Ok(0)
}

/// Breaks, flow control and discarding, passed on to the host.
fn flow(file: &Terminal, c: &mut Ctx<'_>, request: u32, arg: i32) -> SysResult {
    tty_check(c, TtyUse::Change)?;
    without_sigttou(|| match (request, arg) {
        (TCSBRK, 0) | (TCSBRKP, _) => rustix::termios::tcsendbreak(file.fd()),
        (TCSBRK, _) => rustix::termios::tcdrain(file.fd()),
        (TCXONC, 0) => rustix::termios::tcflow(file.fd(), Action::OOff),
        (TCXONC, 1) => rustix::termios::tcflow(file.fd(), Action::OOn),
        (TCXONC, 2) => rustix::termios::tcflow(file.fd(), Action::IOff),
        (TCXONC, 3) => rustix::termios::tcflow(file.fd(), Action::IOn),
        (TCFLSH, 0) => rustix::termios::tcflush(file.fd(), QueueSelector::IFlush),
        (TCFLSH, 1) => rustix::termios::tcflush(file.fd(), QueueSelector::OFlush),
        (TCFLSH, 2) => rustix::termios::tcflush(file.fd(), QueueSelector::IOFlush),
        _ => Err(Errno::INVAL),
    })?;
    Ok(0)
}

/// `ENOTTY` unless the terminal controls the session of `p`.
fn controls(state: &State, p: &Process) -> Result<(), Errno> {
    if state.tty.session == Some(p.sid) {
        Ok(())
    } else {
        Err(Errno::NOTTY)
    }
}

fn set_foreground(c: &mut Ctx<'_>, pgid: Pid) -> SysResult {
    {
        let state = c.k.state();
        controls(&state, state.process(c.t.pid)?)?;
    }
    tty_check(c, TtyUse::Change)?;
    let mut state = c.k.state();
    groups::set_foreground(&mut state, c.t.pid, pgid)?;
    Ok(0)
}

/// The caller gives the terminal up; if it leads the session, all of the session does.
fn give_up(c: &Ctx<'_>) -> SysResult {
    let mut state = c.k.state();
    let p = state.process(c.t.pid)?;
    controls(&state, p)?;
    if p.sid == p.pid {
        let foreground = state.tty.foreground;
        state.tty.session = None;
        state.tty.foreground = 0;
        for signo in [libc::SIGHUP, libc::SIGCONT] {
            // The group may have ended.
            let _ = signal::send_to_group(c.k, &mut state, foreground, SigInfo::kernel(signo));
        }
    }
    Ok(0)
}
