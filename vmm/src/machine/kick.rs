//! Taking a worker out of the guest: a signal its thread blocks, which only the virtual CPU lets
//! through. Arriving before it enters, it is pending and ends the next `KVM_RUN` at once.
#![expect(
    unsafe_code,
    reason = "tgkill, and a mask of all signals, have no safe wrapper"
)]

use std::sync::atomic::{AtomicBool, Ordering};

use vmm_sys_util::signal::{SIGRTMIN, block_signal, clear_signal};

use crate::linux::sched::Kick;
use crate::memory::Eject;

/// From now on the calling thread, and those it starts, take none of the process's signals: its handlers run
/// elsewhere, and a pipe that nobody reads is only an error. What the thread itself does wrong still ends it.
pub(crate) fn take_no_signals() {
    let mut set = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: sigfillset writes the set it is given, and nothing else.
    unsafe { libc::sigfillset(set.as_mut_ptr()) };
    // SAFETY: sigfillset has initialised it; it fails for no set.
    let mut set = unsafe { set.assume_init() };
    for fault in [
        libc::SIGSEGV,
        libc::SIGBUS,
        libc::SIGILL,
        libc::SIGFPE,
        libc::SIGTRAP,
    ] {
        // SAFETY: the set is initialised, and the numbers are signals'.
        unsafe { libc::sigdelset(&raw mut set, fault) };
    }
    // SAFETY: the set is initialised; the old mask is not asked for.
    unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) };
}

/// Does something as a thread does that takes no signals, and so do the threads it starts.
pub(crate) fn without_signals<R>(does: impl FnOnce() -> R) -> R {
    struct Restore(libc::sigset_t);
    impl Drop for Restore {
        fn drop(&mut self) {
            // SAFETY: the mask is the one that the thread had.
            unsafe {
                libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.0, std::ptr::null_mut())
            };
        }
    }
    let mut mask = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: no set is given, so that nothing changes; the mask is written, which cannot fail.
    unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, std::ptr::null(), mask.as_mut_ptr()) };
    // SAFETY: it was just written.
    let _restore = Restore(unsafe { mask.assume_init() });
    take_no_signals();
    does()
}

/// Kicks one worker.
#[derive(Debug)]
pub struct Kicker {
    process: i32,
    thread: i32,
    /// A kick is on its way and has not been noticed yet.
    sent: AtomicBool,
    /// The scheduler wants the worker to look at its thread; not set by a shoot-down.
    look: AtomicBool,
}

impl Kicker {
    /// For the calling thread, which from now on blocks the signal.
    #[must_use]
    pub fn for_this_thread() -> Self {
        // It may be blocked already, inherited from the thread that started this one.
        let _ = block_signal(Self::signal());
        Self {
            process: rustix::process::getpid().as_raw_nonzero().get(),
            thread: rustix::thread::gettid().as_raw_nonzero().get(),
            sent: AtomicBool::new(false),
            look: AtomicBool::new(false),
        }
    }

    /// The signal.
    #[must_use]
    pub fn signal() -> i32 {
        SIGRTMIN()
    }

    /// The worker has left the guest because of it: makes the next kick count again. On the worker,
    /// before it looks at what it may have been kicked for.
    ///
    /// The signal goes first: a kick in between is then one more reason to look, and the look comes
    /// next. The other way round, that kick's signal would be taken with `sent` left set, and no
    /// kick would ever be sent again.
    ///
    /// Returns whether the scheduler kicked; if not, the virtual CPU only had to leave the guest.
    pub fn taken(&self) -> bool {
        if let Err(error) = clear_signal(Self::signal()) {
            tracing::debug!(?error, "a kick could not be taken from the queue");
        }
        self.sent.store(false, Ordering::SeqCst);
        self.look.swap(false, Ordering::SeqCst)
    }

    /// Takes a kick that was meant for a thread that has left the worker since: the next one is not to be stopped by it.
    pub fn forget(&self) {
        if self.sent.load(Ordering::SeqCst) {
            self.taken();
        }
    }

    fn send(&self) {
        if self.sent.swap(true, Ordering::SeqCst) {
            return;
        }
        // SAFETY: tgkill takes three numbers; a thread that has ended makes it fail with ESRCH.
        unsafe { libc::syscall(libc::SYS_tgkill, self.process, self.thread, Self::signal()) };
    }
}

impl Kick for Kicker {
    fn kick(&self) {
        self.look.store(true, Ordering::SeqCst);
        self.send();
    }
}

impl Eject for Kicker {
    fn eject(&self) {
        self.send();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    /// Whether the calling thread has the signal pending.
    fn pending() -> bool {
        let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
        let set = status
            .lines()
            .find_map(|l| l.strip_prefix("SigPnd:"))
            .unwrap()
            .trim();
        u64::from_str_radix(set, 16).unwrap() & 1 << (Kicker::signal() - 1) != 0
    }

    #[test]
    fn kick_while_one_is_taken_is_never_the_last() {
        let kicker = Arc::new(Kicker::for_this_thread());
        let ended = Arc::new(AtomicBool::new(false));
        let other = {
            let (kicker, ended) = (Arc::clone(&kicker), Arc::clone(&ended));
            std::thread::spawn(move || {
                while !ended.load(Ordering::SeqCst) {
                    kicker.kick();
                }
            })
        };
        for _ in 0..20_000 {
            kicker.taken();
        }
        ended.store(true, Ordering::SeqCst);
        other.join().unwrap();
        kicker.taken();
        kicker.kick();
        assert!(pending(), "the kick was not sent");
        assert!(kicker.taken());
        assert!(!pending());
        // What the race left behind: a signal taken and the kicks after it suppressed.
        assert!(!kicker.sent.load(Ordering::SeqCst));
    }

    #[test]
    fn ejected_worker_need_not_look_at_its_thread() {
        let kicker = Kicker::for_this_thread();
        kicker.eject();
        assert!(pending());
        assert!(!kicker.taken());
        kicker.eject();
        kicker.kick();
        assert!(kicker.taken());
        assert!(!kicker.taken());
    }
}
