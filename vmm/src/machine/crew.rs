//! The threads of a machine: they wait for a guest, run it to its end, and wait for the next one.
//!
//! A machine and the guest in it have lives of their own ([`super::bare::Bare`], [`Seat`]): the threads, the virtual CPUs
//! and the memory manager are the machine's. [`Dock::seat`] gives all threads a guest; each comes back by itself once the
//! guest's scheduler says that it has ended ([`Sched::end`]), and [`Dock::wait`] returns when all are back. A thread that
//! does not come back is a bug of the VMM's: whoever waits is told so then, and does not wait for ever.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use parking_lot::Condvar;

use super::kick::take_no_signals;
use super::worker::Shared;
use crate::hv::CpuError;
use crate::linux::sched::Sched;
use crate::locks::{WaitMutex, rank};

/// How long a thread may take to come back after the guest has ended: longer than the host takes to write out what
/// a system call was asked to.
const PATIENCE: Duration = Duration::from_secs(60);
/// How often it is looked whether the guest has ended.
const LOOK: Duration = Duration::from_secs(1);

/// A guest in a machine.
pub(super) struct Seat {
    pub(super) shared: Arc<Shared>,
    /// It is ended after this long.
    pub(super) timeout: Option<Duration>,
    /// That is why it ended.
    pub(super) timed_out: AtomicBool,
}

impl Seat {
    fn sched(&self) -> &Sched {
        &self.shared.kernel.sched
    }
}

/// Where the threads wait.
#[derive(Default)]
pub(super) struct Dock {
    state: WaitMutex<rank::Dock, State>,
    /// There is a guest, or the machine is over.
    called: Condvar,
    /// A thread has come back.
    back: Condvar,
}

#[derive(Default)]
struct State {
    seat: Option<Arc<Seat>>,
    /// Guests so far.
    count: u64,
    hands: Vec<Hand>,
    failure: Option<CpuError>,
    /// A thread has gone that should not have.
    broken: bool,
    over: bool,
}

/// What a thread is there for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Duty {
    /// The guests.
    Guests,
    /// The machine, whatever guest is in it.
    Machine,
}

struct Hand {
    name: String,
    duty: Duty,
    /// It runs the guest, or has not begun to wait for one.
    busy: bool,
}

/// Why a machine takes no guest.
pub(super) enum Refused {
    /// A virtual CPU stopped working.
    Cpu(CpuError),
    /// A thread has panicked.
    Broken,
}

impl Dock {
    /// Lets the threads run a guest.
    pub(super) fn seat(&self, seat: Arc<Seat>) -> Result<(), Refused> {
        let mut state = self.state.lock();
        if let Some(error) = state.failure.take() {
            return Err(Refused::Cpu(error));
        }
        if state.broken {
            return Err(Refused::Broken);
        }
        state.count += 1;
        state.seat = Some(seat);
        for hand in &mut state.hands {
            hand.busy = hand.duty == Duty::Guests;
        }
        drop(state);
        self.called.notify_all();
        Ok(())
    }

    /// Waits until every thread has come back from the guest, or has begun to wait for one.
    ///
    /// # Errors
    /// The names of those that are still out long after the guest has ended.
    pub(super) fn wait(&self) -> Result<(), Vec<String>> {
        self.wait_within(PATIENCE)
    }

    fn wait_within(&self, patience: Duration) -> Result<(), Vec<String>> {
        let mut ended: Option<Instant> = None;
        let mut state = self.state.lock();
        while state.hands.iter().any(|hand| hand.busy) {
            state.wait_for(&self.back, LOOK.min(patience));
            let over = state.seat.as_ref().is_some_and(|s| s.sched().has_ended());
            if over && ended.get_or_insert_with(Instant::now).elapsed() >= patience {
                let left = state.hands.iter().filter(|hand| hand.busy);
                return Err(left.map(|hand| hand.name.clone()).collect());
            }
        }
        state.seat = None;
        Ok(())
    }

    /// What a virtual CPU failed with.
    pub(super) fn take_failure(&self) -> Option<CpuError> {
        self.state.lock().failure.take()
    }

    /// Whether the machine can take another guest.
    pub(super) fn is_fit(&self) -> bool {
        let state = self.state.lock();
        !state.broken && state.failure.is_none()
    }

    /// Whether the threads are to end.
    pub(super) fn is_over(&self) -> bool {
        self.state.lock().over
    }

    /// The next guest, for a thread that has seen `seen`; `None` at the end.
    fn next(&self, hand: usize, seen: &mut u64) -> Option<Arc<Seat>> {
        let mut state = self.state.lock();
        loop {
            if state.over {
                return None;
            }
            if state.count != *seen {
                *seen = state.count;
                return state.seat.clone();
            }
            self.come_back(&mut state, hand);
            state.wait(&self.called);
        }
    }

    fn come_back(&self, state: &mut State, hand: usize) {
        if std::mem::take(&mut state.hands[hand].busy) {
            self.back.notify_all();
        }
    }

    /// A thread is of no more use, and the machine neither: ends the guest.
    fn fail(&self, hand: usize, error: Option<CpuError>) {
        let mut state = self.state.lock();
        state.broken = true;
        if let Some(error) = error {
            state.failure.get_or_insert(error);
        }
        let seat = state.seat.clone();
        self.come_back(&mut state, hand);
        drop(state);
        if let Some(seat) = seat {
            seat.sched().end();
        }
    }
}

/// A thread's place; whoever leaves it without having said so has panicked.
struct Place<'a> {
    dock: &'a Dock,
    hand: usize,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            // The panic has said itself what it was.
            self.dock.fail(self.hand, None);
        }
    }
}

/// The threads; they end when this is dropped.
pub(super) struct Crew {
    pub(super) dock: Arc<Dock>,
    threads: Vec<JoinHandle<()>>,
}

impl Crew {
    pub(super) fn new() -> Self {
        Self {
            dock: Arc::new(Dock::default()),
            threads: Vec::new(),
        }
    }

    /// Whether there are threads.
    pub(super) fn is_there(&self) -> bool {
        !self.threads.is_empty()
    }

    /// Starts a thread that runs guests with what `begin` gives it.
    ///
    /// # Errors
    /// The host has no thread.
    pub(super) fn start<W>(
        &mut self,
        name: &str,
        begin: impl FnOnce() -> Result<W, CpuError> + Send + 'static,
        run: impl Fn(&mut W, &Seat) -> Result<(), CpuError> + Send + 'static,
    ) -> std::io::Result<()> {
        let (dock, hand) = (Arc::clone(&self.dock), self.hire(name, Duty::Guests));
        let started = self.spawn(name, move || {
            let _place = Place { dock: &dock, hand };
            let ran = begin().and_then(|mut with| {
                let mut seen = 0;
                while let Some(seat) = dock.next(hand, &mut seen) {
                    run(&mut with, &seat)?;
                }
                Ok(())
            });
            if let Err(error) = ran {
                dock.fail(hand, Some(error));
            }
        });
        if started.is_err() {
            self.dock.fail(hand, None);
        }
        started
    }

    /// Starts a thread that has nothing to do with guests; what ends it is asked of the dock.
    ///
    /// # Errors
    /// The host has no thread.
    pub(super) fn start_apart(
        &mut self,
        name: &str,
        run: impl FnOnce(&Dock) -> Result<(), CpuError> + Send + 'static,
    ) -> std::io::Result<()> {
        let (dock, hand) = (Arc::clone(&self.dock), self.hire(name, Duty::Machine));
        self.spawn(name, move || {
            let _place = Place { dock: &dock, hand };
            if let Err(error) = run(&dock) {
                dock.fail(hand, Some(error));
            }
        })
    }

    fn hire(&self, name: &str, duty: Duty) -> usize {
        let mut state = self.dock.state.lock();
        state.hands.push(Hand {
            name: name.to_owned(),
            duty,
            busy: duty == Duty::Guests,
        });
        state.hands.len() - 1
    }

    fn spawn(&mut self, name: &str, body: impl FnOnce() + Send + 'static) -> std::io::Result<()> {
        let builder = thread::Builder::new().name(name.to_owned());
        self.threads.push(builder.spawn(|| {
            take_no_signals();
            body();
        })?);
        Ok(())
    }

    /// Has the threads end; `wake` wakes those that wait elsewhere.
    pub(super) fn end(&mut self, wake: impl Fn()) {
        self.dock.state.lock().over = true;
        self.dock.called.notify_all();
        wake();
        for thread in self.threads.drain(..) {
            // A panic has been told already.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;
    use crate::linux::testing;
    use crate::machine::stats::Counters;

    fn seat() -> Arc<Seat> {
        Arc::new(Seat {
            shared: Arc::new(Shared {
                kernel: Arc::new(testing::Machine::new().k),
                table: crate::linux::table::Table::default(),
                counters: Counters::default(),
                strace: None,
            }),
            timeout: None,
            timed_out: AtomicBool::new(false),
        })
    }

    fn until_ended(_: &mut (), seat: &Seat) -> Result<(), CpuError> {
        while !seat.sched().has_ended() {
            thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    #[test]
    fn threads_take_one_guest_after_the_other() {
        let mut crew = Crew::new();
        for name in ["one", "two"] {
            crew.start(name, || Ok(()), until_ended).unwrap();
        }
        let wait = |dock: &Dock| {
            while !dock.is_over() {
                thread::sleep(Duration::from_millis(1));
            }
            Ok(())
        };
        crew.start_apart("apart", wait).unwrap();
        for _ in 0..3 {
            let seat = seat();
            assert!(crew.dock.seat(Arc::clone(&seat)).is_ok());
            let busy = |hand: &Hand| hand.busy;
            assert_eq!(
                crew.dock
                    .state
                    .lock()
                    .hands
                    .iter()
                    .filter(|h| busy(h))
                    .count(),
                2
            );
            seat.sched().end();
            assert_eq!(crew.dock.wait(), Ok(()));
            assert_eq!(Arc::strong_count(&seat), 1, "somebody keeps the guest");
        }
        assert!(crew.dock.is_fit());
        crew.end(|| ());
    }

    #[test]
    fn one_that_does_not_come_back_is_named() {
        let (mut crew, (release, wait)) = (Crew::new(), channel::<()>());
        let wait = std::sync::Mutex::new(wait);
        let stuck = move |(): &mut (), _: &Seat| {
            let gone = wait.lock().unwrap().recv();
            assert!(gone.is_err());
            Ok(())
        };
        crew.start("stuck", || Ok(()), stuck).unwrap();
        let seat = seat();
        assert!(crew.dock.seat(Arc::clone(&seat)).is_ok());
        seat.sched().end();
        let left = crew.dock.wait_within(Duration::from_millis(5));
        assert_eq!(left, Err(vec!["stuck".to_owned()]));
        drop(release);
        crew.end(|| ());
    }

    #[test]
    fn failure_ends_the_guest_and_the_machine_takes_no_other() {
        let failed = || CpuError {
            what: "test",
            verb: "fail",
            source: std::io::ErrorKind::Other.into(),
        };
        let mut crew = Crew::new();
        crew.start("good", || Ok(()), until_ended).unwrap();
        crew.start("bad", || Ok(()), move |(), _| Err(failed()))
            .unwrap();
        assert!(crew.dock.seat(seat()).is_ok());
        assert_eq!(crew.dock.wait(), Ok(()));
        assert!(!crew.dock.is_fit());
        assert!(crew.dock.take_failure().is_some());
        assert!(matches!(crew.dock.seat(seat()), Err(Refused::Broken)));
        crew.end(|| ());
    }
}
