//! How a machine ends: the first reason wins, and everybody hears of it.

use std::fmt;
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Instant;

use parking_lot::RwLock;

use crate::linux::sched::Kick;
use crate::machine::kick::Kicker;

/// Why a machine ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// The guest turned it off.
    PowerOff,
    /// The guest reset it.
    Reset,
    /// The guest's kernel told that it has panicked.
    Panic,
    /// A processor could not deliver a fault, nor the fault that came of that.
    TripleFault,
    /// KVM cannot go on; why.
    Stuck(String),
    /// The time was up.
    Timeout,
    /// Somebody typed the escape sequence.
    Quit,
    /// A signal.
    Signal(i32),
    /// The console cannot be written to any more; why.
    Console(String),
    /// A thread of ours is gone; which.
    Bug(&'static str),
}

impl End {
    /// The exit status; see `vmm boot --help`.
    #[must_use]
    pub fn status(&self) -> u8 {
        match self {
            Self::PowerOff => 0,
            Self::Reset => 120,
            Self::Panic => 121,
            Self::TripleFault => 122,
            Self::Stuck(_) => 123,
            Self::Timeout => crate::cli::STATUS_TIMEOUT,
            Self::Console(_) | Self::Bug(_) => crate::cli::STATUS_FAILURE,
            Self::Quit => 130,
            Self::Signal(number) => u8::try_from(128 + number).unwrap_or(255),
        }
    }

    /// One word for programs.
    #[must_use]
    pub fn word(&self) -> &'static str {
        match self {
            Self::PowerOff => "power-off",
            Self::Reset => "reset",
            Self::Panic => "panic",
            Self::TripleFault => "triple-fault",
            Self::Stuck(_) => "stuck",
            Self::Timeout => "timeout",
            Self::Quit => "quit",
            Self::Signal(_) => "signal",
            Self::Console(_) => "console",
            Self::Bug(_) => "bug",
        }
    }
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PowerOff => f.write_str("the guest turned the machine off"),
            Self::Reset => f.write_str("the guest reset the machine"),
            Self::Panic => f.write_str("the guest's kernel panicked"),
            Self::TripleFault => f.write_str("the guest had a triple fault"),
            Self::Stuck(why) => write!(f, "the guest cannot go on: {why}"),
            Self::Timeout => f.write_str("the time was up"),
            Self::Quit => f.write_str("ended from the console"),
            Self::Signal(number) => write!(f, "ended by signal {number}"),
            Self::Console(why) => write!(f, "the console is gone: {why}"),
            Self::Bug(thread) => write!(f, "the {thread} thread failed; this is a bug"),
        }
    }
}

/// Where the end is told and waited for.
#[derive(Debug, Default)]
pub struct Ending {
    end: Mutex<Option<End>>,
    told: Condvar,
    /// The processors to be taken out of the guest.
    kickers: RwLock<Vec<Kicker>>,
}

impl Ending {
    /// Ends the machine, unless it has ended already.
    pub fn tell(&self, end: End) {
        {
            let mut slot = self.end.lock().unwrap_or_else(PoisonError::into_inner);
            if slot.is_some() {
                return;
            }
            *slot = Some(end);
        }
        self.told.notify_all();
        for kicker in self.kickers.read().iter() {
            kicker.kick();
        }
    }

    /// The end, if it has come.
    #[must_use]
    pub fn get(&self) -> Option<End> {
        let slot = self.end.lock().unwrap_or_else(PoisonError::into_inner);
        slot.clone()
    }

    /// Whether it has come.
    #[must_use]
    pub fn has_come(&self) -> bool {
        let slot = self.end.lock().unwrap_or_else(PoisonError::into_inner);
        slot.is_some()
    }

    /// Kicks this thread too when the end comes.
    pub fn add_kicker(&self, kicker: Kicker) {
        self.kickers.write().push(kicker);
        // It may have come before.
        if self.has_come()
            && let Some(kicker) = self.kickers.read().last()
        {
            kicker.kick();
        }
    }

    /// Waits for the end; at `deadline` it is [`End::Timeout`].
    #[must_use]
    pub fn wait(&self, deadline: Option<Instant>) -> End {
        loop {
            let slot = self.end.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(end) = slot.as_ref() {
                return end.clone();
            }
            let Some(deadline) = deadline else {
                drop(self.told.wait(slot));
                continue;
            };
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                drop(slot);
                self.tell(End::Timeout);
                continue;
            }
            drop(self.told.wait_timeout(slot, left));
        }
    }
}

/// Ends the machine if the thread that holds it panics.
#[derive(Debug)]
pub struct Watch<'a> {
    /// Whom to tell.
    pub ending: &'a Ending,
    /// Which thread it is.
    pub thread: &'static str,
}

impl Drop for Watch<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.ending.tell(End::Bug(self.thread));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn first_end_wins_and_is_heard() {
        let ending = Ending::default();
        let soon = Instant::now() + Duration::from_millis(10);
        assert_eq!(ending.wait(Some(soon)), End::Timeout);
        ending.tell(End::PowerOff);
        assert_eq!(ending.get(), Some(End::Timeout));
    }

    #[test]
    fn thread_that_panics_ends_the_machine() {
        let ending = Ending::default();
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                let _watch = Watch {
                    ending: &ending,
                    thread: "test",
                };
                panic!("on purpose");
            });
            assert!(thread.join().is_err());
        });
        assert_eq!(ending.wait(None), End::Bug("test"));
    }
}
