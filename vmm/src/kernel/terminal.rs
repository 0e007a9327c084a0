//! The person's terminal in raw mode, and back, whatever happens: on drop, after a panic (which
//! unwinds), and from a handler when the process gets a signal that ends it at once. Only SIGKILL
//! leaves it raw.
#![expect(unsafe_code, reason = "a signal handler, and what it may call, are C")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::ptr;
use std::sync::atomic::{AtomicPtr, Ordering};

use rustix::termios::{OptionalActions, OutputModes, Termios, tcgetattr, tcsetattr};

/// What the handler needs; leaked, since a handler may run at any moment.
struct Saved {
    fd: i32,
    termios: libc::termios,
}

static SAVED: AtomicPtr<Saved> = AtomicPtr::new(ptr::null_mut());

/// Signals that end the process at once: those of its own mistakes, and those that nobody waits for (`run` does for the others).
const FATAL: [i32; 17] = [
    libc::SIGSEGV,
    libc::SIGBUS,
    libc::SIGILL,
    libc::SIGFPE,
    libc::SIGABRT,
    libc::SIGTRAP,
    libc::SIGSYS,
    libc::SIGUSR1,
    libc::SIGUSR2,
    libc::SIGALRM,
    libc::SIGVTALRM,
    libc::SIGPROF,
    libc::SIGXCPU,
    libc::SIGXFSZ,
    libc::SIGIO,
    libc::SIGPWR,
    libc::SIGSTKFLT,
];

/// A terminal in raw mode.
#[derive(Debug)]
pub struct RawMode {
    fd: OwnedFd,
    before: Termios,
    raw: Termios,
}

impl RawMode {
    /// Makes the terminal raw: every key goes to the guest.
    ///
    /// # Errors
    /// It is no terminal.
    pub fn enter(fd: BorrowedFd<'_>) -> io::Result<Self> {
        let fd = fd.try_clone_to_owned()?;
        let before = tcgetattr(&fd)?;
        let mut raw = before.clone();
        raw.make_raw();
        // Messages of ours keep their line ends; a guest sends both characters itself.
        raw.output_modes |= OutputModes::OPOST | OutputModes::ONLCR;
        catch_fatal_signals(fd.as_raw_fd());
        tcsetattr(&fd, OptionalActions::Drain, &raw)?;
        Ok(Self { fd, before, raw })
    }

    /// Makes it raw again, after the process was stopped and somebody else has used it.
    pub fn again(&self) {
        let _ = tcsetattr(&self.fd, OptionalActions::Now, &self.raw);
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        let _ = tcsetattr(&self.fd, OptionalActions::Drain, &self.before);
        SAVED.store(ptr::null_mut(), Ordering::Release);
    }
}

fn catch_fatal_signals(fd: i32) {
    let mut termios = std::mem::MaybeUninit::<libc::termios>::uninit();
    // SAFETY: the pointer is to room for one, which tcgetattr fills if it gives 0.
    if unsafe { libc::tcgetattr(fd, termios.as_mut_ptr()) } != 0 {
        return;
    }
    // SAFETY: tcgetattr has filled it.
    let termios = unsafe { termios.assume_init() };
    let saved = Box::leak(Box::new(Saved { fd, termios }));
    SAVED.store(saved, Ordering::Release);
    for signal in FATAL {
        let handler: extern "C" fn(i32) = restore_and_die;
        // SAFETY: all zero is a valid sigaction: no flags, an empty mask.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = handler as *const () as usize;
        // Once: the signal then does what it does by default.
        action.sa_flags = libc::SA_RESETHAND | libc::SA_ONSTACK;
        // SAFETY: as above.
        let mut before: libc::sigaction = unsafe { std::mem::zeroed() };
        // SAFETY: the handler calls only async-signal-safe functions; both are valid.
        unsafe { libc::sigaction(signal, &raw const action, &raw mut before) };
        if before.sa_sigaction == libc::SIG_IGN {
            // Who started us wants that it does nothing.
            // SAFETY: it is what was there.
            unsafe { libc::sigaction(signal, &raw const before, ptr::null_mut()) };
        }
    }
}

extern "C" fn restore_and_die(signal: i32) {
    let saved = SAVED.load(Ordering::Acquire);
    if !saved.is_null() {
        // SAFETY: what SAVED points at is leaked and never changed.
        let saved = unsafe { &*saved };
        // SAFETY: async-signal-safe; both arguments are valid.
        unsafe { libc::tcsetattr(saved.fd, libc::TCSANOW, &raw const saved.termios) };
    }
    // SAFETY: async-signal-safe; the action is the default one now, so this ends the process as soon
    // as the handler returns.
    unsafe { libc::raise(signal) };
}
