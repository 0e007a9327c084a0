//! `--strace`: each system call on a line, much as strace(1) shows it.

use std::fmt::Write as _;
use std::io::Write as _;

use rustix::io::Errno;

use crate::linux::call::{Arg, Args, Ctx, Entry, Stop, SysResult};
use crate::linux::proc::fork::is_beginning;
use crate::locks::{Mutex, rank};

/// Longest string shown of a guest's.
const SHOWN: usize = 64;

/// Writes the lines to standard error, one piece each, so that they do not mix.
#[derive(Debug, Default)]
pub struct Strace {
    /// Calls shown and not finished: pid and text.
    open: Mutex<rank::StraceOpen, Vec<(i32, String)>>,
}

impl Strace {
    /// A call is being made (again, if it blocked: then it is not shown a second time).
    /// The end of its parent's, which a child begins with, is not either.
    pub fn call(&self, c: &Ctx<'_>, entry: &Entry, args: &Args) {
        if is_beginning(&c.call) {
            return;
        }
        let mut open = self.open.lock();
        if open.iter().all(|(tid, _)| *tid != c.t.tid) {
            open.push((c.t.tid, format!("[{}] {}", c.t.tid, show(c, entry, args))));
        }
    }

    /// A call has ended, or blocks.
    pub fn result(&self, c: &Ctx<'_>, entry: Option<&Entry>, result: &SysResult) {
        let ending = match result {
            Ok(value) => format!("= {}", shown_value(entry, *value)),
            Err(Stop::Errno(errno)) => format!("= -1 {}", errno_name(*errno)),
            Err(Stop::Block(_)) if !c.interrupted => return,
            Err(Stop::Block(_) | Stop::Interrupted(_)) => {
                "= ? (interrupted by a signal)".to_owned()
            }
            Err(Stop::Replaced) => "= ? (registers replaced)".to_owned(),
            Err(Stop::Exited) => "= ?".to_owned(),
        };
        let mut open = self.open.lock();
        if let Some(at) = open.iter().position(|(tid, _)| *tid == c.t.tid) {
            let (_, text) = open.swap_remove(at);
            line(&format!("{text} {ending}"));
        }
    }

    /// A call that is not there.
    pub fn unknown(&self, c: &Ctx<'_>, nr: u64, args: &Args) {
        let a = args.0;
        line(&format!(
            "[{}] syscall_{nr}({:#x}, {:#x}, {:#x}, {:#x}, {:#x}, {:#x}) = -1 ENOSYS",
            c.t.tid, a[0], a[1], a[2], a[3], a[4], a[5]
        ));
    }
}

fn line(text: &str) {
    // A closed standard error is no reason to end the guest.
    let _ = writeln!(std::io::stderr().lock(), "{text}");
}

fn show(c: &Ctx<'_>, entry: &Entry, args: &Args) -> String {
    let mut text = format!("{}(", entry.name);
    for (n, kind) in entry.args.iter().enumerate() {
        if n > 0 {
            text.push_str(", ");
        }
        let value = args.u64(n);
        // Writing to a String does not fail.
        let _ = match kind {
            Arg::Int => write!(text, "{}", value as i64),
            Arg::Hex => write!(text, "{value:#x}"),
            Arg::Fd if value as i32 == libc::AT_FDCWD => write!(text, "AT_FDCWD"),
            Arg::Fd => write!(text, "{}", value as i32),
            Arg::Oct => write!(text, "{value:#o}"),
            Arg::Sig => write!(text, "{}", signal_name(value as i32)),
            Arg::Str => write!(text, "{}", string(c, value)),
        };
    }
    text.push(')');
    text
}

fn string(c: &Ctx<'_>, va: u64) -> String {
    match c.mem().read_cstr(va, crate::linux::user_mem::PATH_MAX) {
        Ok(bytes) if bytes.len() > SHOWN => format!("\"{}\"...", bytes[..SHOWN].escape_ascii()),
        Ok(bytes) => format!("\"{}\"", bytes.escape_ascii()),
        Err(_) => format!("{va:#x}"),
    }
}

fn shown_value(entry: Option<&Entry>, value: u64) -> String {
    let address = entry.is_some_and(|e| matches!(e.name, "mmap" | "brk" | "mremap"));
    if address {
        format!("{value:#x}")
    } else {
        format!("{}", value as i64)
    }
}

/// The name of a signal, or its number.
#[must_use]
pub fn signal_name(signo: i32) -> String {
    const NAMES: [&str; 31] = [
        "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2",
        "PIPE", "ALRM", "TERM", "STKFLT", "CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG",
        "XCPU", "XFSZ", "VTALRM", "PROF", "WINCH", "IO", "PWR", "SYS",
    ];
    let name = usize::try_from(signo - 1).ok().and_then(|n| NAMES.get(n));
    name.map_or_else(|| signo.to_string(), |name| format!("SIG{name}"))
}

/// `ENOENT (No such file or directory)`.
fn errno_name(errno: Errno) -> String {
    let text = std::io::Error::from(errno).to_string();
    let words = text.split(" (os error").next().unwrap_or_default();
    format!("{} ({words})", errno_symbol(errno))
}

fn errno_symbol(errno: Errno) -> String {
    // rustix's Debug names the constants without their E; unknown ones show as numbers.
    let debug = format!("{errno:?}");
    match libc_name(errno.raw_os_error()) {
        Some(name) => name.to_owned(),
        None => debug,
    }
}

fn libc_name(raw: i32) -> Option<&'static str> {
    Some(match raw {
        libc::EPERM => "EPERM",
        libc::ENOENT => "ENOENT",
        libc::ESRCH => "ESRCH",
        libc::EINTR => "EINTR",
        libc::EIO => "EIO",
        libc::ENXIO => "ENXIO",
        libc::E2BIG => "E2BIG",
        libc::ENOEXEC => "ENOEXEC",
        libc::EBADF => "EBADF",
        libc::ECHILD => "ECHILD",
        libc::EAGAIN => "EAGAIN",
        libc::ENOMEM => "ENOMEM",
        libc::EACCES => "EACCES",
        libc::EFAULT => "EFAULT",
        libc::EBUSY => "EBUSY",
        libc::EEXIST => "EEXIST",
        libc::EXDEV => "EXDEV",
        libc::ENODEV => "ENODEV",
        libc::ENOTDIR => "ENOTDIR",
        libc::EISDIR => "EISDIR",
        libc::EINVAL => "EINVAL",
        libc::EMFILE => "EMFILE",
        libc::ENOTTY => "ENOTTY",
        libc::EFBIG => "EFBIG",
        libc::ENOSPC => "ENOSPC",
        libc::ESPIPE => "ESPIPE",
        libc::EROFS => "EROFS",
        libc::EPIPE => "EPIPE",
        libc::ERANGE => "ERANGE",
        libc::ENAMETOOLONG => "ENAMETOOLONG",
        libc::ENOSYS => "ENOSYS",
        libc::ENOTEMPTY => "ENOTEMPTY",
        libc::ELOOP => "ELOOP",
        libc::EOVERFLOW => "EOVERFLOW",
        libc::EOPNOTSUPP => "EOPNOTSUPP",
        libc::EAFNOSUPPORT => "EAFNOSUPPORT",
        libc::ETIMEDOUT => "ETIMEDOUT",
        _ => return None,
    })
}
