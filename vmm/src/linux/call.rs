//! A system call as data: its arguments, how it ends, and what it waits for.

use serde::{Deserialize, Serialize};

use super::Errno;
use super::kernel::Kernel;
use super::thread::{Cpu, Thread};

/// Arguments of a system call, in the order of the x86-64 ABI (RDI, RSI, RDX, R10, R8, R9).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Args(pub [u64; 6]);

impl Args {
    /// Argument `n` (0 to 5) as the 64-bit register held it.
    #[must_use]
    pub fn u64(&self, n: usize) -> u64 {
        self.0[n]
    }

    /// Argument `n` as the `int` the C prototype has: the upper half is ignored, as Linux does.
    #[must_use]
    pub fn i32(&self, n: usize) -> i32 {
        self.0[n] as i32
    }

    /// Argument `n` as an `unsigned int`.
    #[must_use]
    pub fn u32(&self, n: usize) -> u32 {
        self.0[n] as u32
    }

    /// Argument `n` as a `long` or `off_t`.
    #[must_use]
    pub fn i64(&self, n: usize) -> i64 {
        self.0[n] as i64
    }
}

/// A call in progress, kept in the thread's record while it blocks, so that it can be made again.
#[derive(Clone, Debug, Default)]
pub struct CallRecord {
    /// System call number (x86-64 table).
    pub nr: u64,
    /// Its arguments.
    pub args: Args,
    /// When the call times out: nanoseconds of the machine's `CLOCK_MONOTONIC`. Set by the handler
    /// the first time it blocks and kept when it is made again (see [`Ctx::deadline`]).
    pub deadline: Option<u64>,
    /// Bytes (or items) already transferred by a call that blocked half-way.
    pub progress: u64,
    /// What an open(2) that waits has opened: it counts as open meanwhile.
    pub opened: Option<std::sync::Arc<super::file::Description>>,
    /// It was interrupted: the next handler that runs ends or restarts it by this rule.
    pub interrupted: Option<Restart>,
}

/// What a call that cannot finish now waits for.
#[derive(Clone, Debug)]
pub struct Wait {
    /// The call is made again when any of these is woken. Empty: only a signal or the deadline.
    pub keys: Vec<WaitKey>,
    /// Nanoseconds of `CLOCK_MONOTONIC` at which the call is made again in any case.
    pub deadline: Option<u64>,
    /// What a signal does to it.
    pub restart: Restart,
}

impl Wait {
    /// Waits for `key`, without a deadline, restarted after a signal with `SA_RESTART`.
    #[must_use]
    pub fn on(key: WaitKey) -> Self {
        Self {
            keys: vec![key],
            deadline: None,
            restart: Restart::Sys,
        }
    }
}

/// Something a thread can wait for. Waking a key makes every waiter run its call again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum WaitKey {
    /// An object with an id from [`super::sched::Sched::new_key`]: a pipe, an event counter, a tty.
    Object(u64),
    /// A host file descriptor became readable, writable or hung up (watched by the event thread).
    HostFd(i32),
    /// A child of this process changed state.
    ChildOf(i32),
    /// This process may go on: `SIGCONT` or `SIGKILL` after a stop.
    Continued(i32),
    /// The child with this pid has called `execve` or ended: its `vfork` parent may go on.
    VforkDone(i32),
    /// The other threads of this process have ended: its `execve` may go on.
    Alone(i32),
    /// A signal was queued for this process or one of its threads, blocked or not.
    Signal(i32),
}

/// What happens to a blocked call when a signal handler is about to run (signal(7), "Interruption
/// of system calls"). If the signal runs no handler the call simply goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Restart {
    /// Made again if the handler has `SA_RESTART`, else `EINTR`.
    Sys,
    /// Always `EINTR` when a handler runs.
    Never,
    /// No handler runs before the call is over; only death ends it.
    Uninterruptible,
}

/// How a handler ends other than with a value.
#[derive(Debug)]
pub enum Stop {
    /// The guest gets `-errno`.
    Errno(Errno),
    /// Park the thread and make the same call again later.
    Block(Wait),
    /// A blocked call was interrupted by a signal that runs a handler (see [`Ctx::interrupted`]).
    Interrupted(Restart),
    /// The registers were replaced (`execve`, `rt_sigreturn`): store no result.
    Replaced,
    /// The thread is over.
    Exited,
}

impl From<Errno> for Stop {
    fn from(errno: Errno) -> Self {
        Self::Errno(errno)
    }
}

impl From<std::io::Error> for Stop {
    fn from(error: std::io::Error) -> Self {
        Self::Errno(Errno::from_io_error(&error).unwrap_or(Errno::IO))
    }
}

/// What a handler returns.
pub type SysResult = Result<u64, Stop>;

/// A system call handler.
pub type Handler = fn(&mut Ctx<'_>, &Args) -> SysResult;

/// How `--strace` shows an argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arg {
    /// Signed decimal.
    Int,
    /// Unsigned hexadecimal (flags, addresses).
    Hex,
    /// A file descriptor (`AT_FDCWD` by name).
    Fd,
    /// A NUL-terminated string in guest memory.
    Str,
    /// Octal (modes).
    Oct,
    /// A signal number, by name.
    Sig,
}

/// One row of the system call table.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    /// System call number (x86-64).
    pub nr: u32,
    /// Its name.
    pub name: &'static str,
    /// How its arguments are shown.
    pub args: &'static [Arg],
    /// What does it.
    pub handler: Handler,
}

impl Entry {
    /// For a table of many.
    #[must_use]
    pub const fn new(nr: u32, name: &'static str, args: &'static [Arg], handler: Handler) -> Self {
        Self {
            nr,
            name,
            args,
            handler,
        }
    }
}

/// What a handler works with: the machine's kernel state, the calling thread's record (owned by
/// the worker that runs it), and the virtual CPU it was stopped on.
pub struct Ctx<'a> {
    /// The machine-wide state.
    pub k: &'a Kernel,
    /// The calling thread.
    pub t: &'a mut Thread,
    /// The stopped virtual CPU, for state that is not in the record (FPU).
    pub cpu: &'a mut dyn Cpu,
    /// The call being made; kept by the thread if the handler returns [`Stop::Block`].
    pub call: CallRecord,
    /// True when the call blocked and a signal that runs a handler arrived: finish with what there
    /// is, or return [`Stop::Block`] as usual, which then becomes [`Stop::Interrupted`].
    pub interrupted: bool,
}

impl Ctx<'_> {
    /// The call's deadline: computed by `first` (nanoseconds of `CLOCK_MONOTONIC`, or `None` for
    /// ever) the first time, the same again when the call is made again.
    pub fn deadline(&mut self, first: impl FnOnce() -> Option<u64>) -> Option<u64> {
        if self.call.deadline.is_none() {
            self.call.deadline = first();
        }
        self.call.deadline
    }
}
