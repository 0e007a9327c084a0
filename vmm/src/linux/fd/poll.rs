//! `poll` and `ppoll`, and what they share with `select`: looking at many files, and waiting for
//! one of them.

use std::sync::Arc;

use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::super::Errno;
use super::super::call::{Arg, Args, Ctx, Entry, Restart, Stop, SysResult, Wait};
use super::super::file::{Description, Ready};
use super::super::signal;
use super::super::time::Timespec;
use super::table::fd_limit;

/// The calls of this file.
pub const TABLE: &[Entry] = &[
    Entry {
        nr: 7,
        name: "poll",
        args: &[Arg::Hex, Arg::Int, Arg::Int],
        handler: sys_poll,
    },
    Entry {
        nr: 271,
        name: "ppoll",
        args: &[Arg::Hex, Arg::Int, Arg::Hex, Arg::Hex, Arg::Int],
        handler: sys_ppoll,
    },
];

/// Reported whether asked for or not.
const ALWAYS: Ready = Ready::ERR.union(Ready::HUP).union(Ready::NVAL);

/// How long a call that looks at many files may wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Patience {
    /// Only looks.
    None,
    /// Until this time (ns of `CLOCK_MONOTONIC`).
    Until(u64),
    /// For ever.
    Forever,
}

impl Patience {
    /// From a relative time in nanoseconds; `None` is for ever. A call that is made again keeps its
    /// first deadline.
    pub fn of(c: &mut Ctx<'_>, ns: Option<u64>) -> Self {
        match ns {
            None => Self::Forever,
            Some(0) => Self::None,
            Some(ns) => {
                let now = c.k.clock.monotonic();
                c.deadline(|| Some(now.saturating_add(ns)))
                    .map_or(Self::Forever, Self::Until)
            }
        }
    }

    /// Whether there is no time left.
    #[must_use]
    pub fn is_over(self, c: &Ctx<'_>) -> bool {
        match self {
            Self::None => true,
            Self::Until(at) => c.k.clock.monotonic() >= at,
            Self::Forever => false,
        }
    }

    /// Nanoseconds left, for calls that report them.
    #[must_use]
    pub fn left(self, c: &Ctx<'_>) -> Option<u64> {
        match self {
            Self::None => Some(0),
            Self::Until(at) => Some(at.saturating_sub(c.k.clock.monotonic())),
            Self::Forever => None,
        }
    }

    /// A wait that ends with it, for keys to be added to.
    #[must_use]
    pub fn wait(self) -> Wait {
        let deadline = match self {
            Self::Until(at) => Some(at),
            Self::None | Self::Forever => None,
        };
        Wait {
            keys: Vec::new(),
            deadline,
            restart: Restart::Never,
        }
    }
}

/// The temporary signal mask of `ppoll`, `pselect6` and `epoll_pwait`: `at` is 0 for none.
///
/// # Errors
/// `EINVAL` unless `size` is 8, `EFAULT`.
pub(super) fn take_mask(c: &mut Ctx<'_>, at: u64, size: u64) -> Result<(), Errno> {
    if at == 0 {
        return Ok(());
    }
    if size != 8 {
        return Err(Errno::INVAL);
    }
    let mask: u64 = c.mem().read_obj(at)?;
    signal::set_temporary_mask(c, mask);
    Ok(())
}

/// `struct pollfd`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct PollFd {
    fd: i32,
    events: u16,
    revents: u16,
}

impl PollFd {
    fn wanted(self) -> Ready {
        Ready::from_bits_truncate(self.events) | ALWAYS
    }
}

fn sys_poll(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let ms = u64::try_from(a.i32(2)).ok();
    let patience = Patience::of(c, ms.map(|ms| ms * 1_000_000));
    poll(c, a.u64(0), a.u64(1), patience)
}

fn sys_ppoll(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let at = a.u64(2);
    let ns = if at == 0 {
        None
    } else {
        Some(c.mem().read_obj::<Timespec>(at)?.to_ns()?)
    };
    take_mask(c, a.u64(3), a.u64(4))?;
    let patience = Patience::of(c, ns);
    let result = poll(c, a.u64(0), a.u64(1), patience);
    if !matches!(result, Err(Stop::Block(_)))
        && let Some(left) = patience.left(c)
    {
        // Linux ignores that it cannot be stored.
        let _ = c.mem().write_obj(at, &Timespec::from_ns(left));
    }
    result
}

fn poll(c: &mut Ctx<'_>, at: u64, count: u64, patience: Patience) -> SysResult {
    if count > c.with_process(|p| fd_limit(p)) {
        return Err(Errno::INVAL.into());
    }
    let mut fds = vec![
        PollFd {
            fd: -1,
            events: 0,
            revents: 0
        };
        count as usize
    ];
    c.mem().read(at, fds.as_mut_bytes())?;
    let files = lookup(c, fds.iter().map(|p| p.fd));
    let mut ready = 0;
    for (poll, file) in fds.iter_mut().zip(&files) {
        let now = match file {
            _ if poll.fd < 0 => Ready::empty(),
            None => Ready::NVAL,
            Some(d) => d.file.ready(c.viewer()) & poll.wanted(),
        };
        poll.revents = now.bits();
        ready += u64::from(!now.is_empty());
    }
    if ready > 0 || patience.is_over(c) {
        c.mem().write(at, fds.as_bytes())?;
        return Ok(ready);
    }
    let mut wait = patience.wait();
    for (poll, file) in fds.iter().zip(&files) {
        if let Some(d) = file {
            d.file.watch(c.viewer(), poll.wanted(), &mut wait);
        }
    }
    Err(Stop::Block(wait))
}

/// The descriptions behind descriptors of the calling process.
pub(super) fn lookup(c: &Ctx<'_>, fds: impl Iterator<Item = i32>) -> Vec<Option<Arc<Description>>> {
    c.with_process(|p| {
        fds.map(|fd| p.files.fds.get(&fd).map(|f| Arc::clone(&f.description)))
            .collect()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn error_bits_are_always_wanted() {
        let poll = PollFd {
            fd: 0,
            events: Ready::IN.bits(),
            revents: 0,
        };
        assert_eq!(
            poll.wanted(),
            Ready::IN | Ready::ERR | Ready::HUP | Ready::NVAL
        );
    }

    #[test]
    fn finite_patience_bounds_the_wait() {
        assert_eq!(Patience::Until(7).wait().deadline, Some(7));
        assert_eq!(Patience::Forever.wait().deadline, None);
    }
}
