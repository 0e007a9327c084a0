//! `vmm reset`: a guest that was made of a template or a snapshot goes back to it, with its name and its descriptors.
//!
//! Whoever asks, on the guest's socket, has the guest end and waits ([`Door::ask`]). Who takes the guest down when it has ended
//! makes it again in the same machine, and says so ([`Run::settle`]): a thread that has waited ([`Revived::run_again`]), or one
//! that was started then. The socket stays, and answers for the guest that is there.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Condvar;

use super::inspector::{Observed, Seen};
use super::restored::{Ahead, Going, Revived};
use super::verbs::chain;
use super::{After, Bare, Ended, RunError};
use crate::control::protocol::Response;
use crate::linux::kernel::Kernel;
use crate::locks::{WaitMutex, rank};

/// Where a guest is asked to go back.
#[derive(Debug, Default)]
pub(super) struct Door {
    state: WaitMutex<rank::ResetDoor, State>,
    told: Condvar,
}

#[derive(Debug, Default)]
struct State {
    stage: Stage,
    /// What came of it, until who asked has heard.
    answer: Option<Result<(), String>>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Stage {
    /// It was made of a program.
    #[default]
    Never,
    /// It can go back.
    Open,
    /// Somebody has asked, and waits.
    Asked,
    /// It has ended.
    Over,
}

impl Door {
    /// Where one that was made of a template is asked.
    pub(super) fn open() -> Self {
        let door = Self::default();
        door.state.lock().stage = Stage::Open;
        door
    }

    /// Has a guest go back; waits until it has. One asks at a time: whoever asks until he has heard is refused.
    /// `end` ends the guest that is there then.
    pub(super) fn ask(&self, end: impl FnOnce()) -> Response {
        let mut state = self.state.lock();
        match state.stage {
            Stage::Open if state.answer.is_none() => state.stage = Stage::Asked,
            Stage::Open | Stage::Asked => {
                return Response::failed("somebody else has it go back just now");
            }
            Stage::Never => {
                return Response::failed(
                    "it was not made of a template or a snapshot that it could go back to",
                );
            }
            Stage::Over => return Response::failed("the guest has ended"),
        }
        drop(state);
        end();
        let mut state = self.state.lock();
        loop {
            match state.answer.take() {
                Some(Ok(())) => return Response::Done { ok: true },
                Some(Err(why)) => return Response::failed(why),
                None => state.wait(&self.told),
            }
        }
    }

    /// The guest has ended: whether because somebody has asked. If not, nobody can any more.
    pub(super) fn was_asked(&self) -> bool {
        let mut state = self.state.lock();
        let asked = state.stage == Stage::Asked;
        if !asked {
            state.stage = Stage::Over;
        }
        asked
    }

    /// Answers who asks, if somebody does.
    pub(super) fn tell(&self, stage: Stage, answer: impl FnOnce() -> Result<(), String>) {
        let mut state = self.state.lock();
        if state.stage == Stage::Asked {
            state.answer = Some(answer());
        }
        state.stage = stage;
        self.told.notify_all();
    }
}

/// Nobody waits for a guest that is not made again, whatever the reason.
pub(crate) struct Closing(Option<Arc<Seen>>);

impl Drop for Closing {
    fn drop(&mut self) {
        if let Some(seen) = &self.0 {
            let gone = || Err("the guest has ended".to_owned());
            seen.door.tell(Stage::Over, gone);
        }
    }
}

/// A guest that runs, and may be asked to go back.
pub(crate) struct Run {
    kernel: Arc<Kernel>,
    going: Going,
    closing: Closing,
}

/// What became of a guest that has ended.
pub(crate) enum Settled {
    /// It was asked to go back, and is there again.
    Again(Box<(Revived, Closing)>),
    /// It is over; what is left of the machine.
    Over(Box<(Ended, Option<Bare>)>),
}

impl Revived {
    /// Who may ask it to go back, from its beginning on.
    pub(crate) fn closing(&self) -> Closing {
        Closing(self.machine.inspector.clone())
    }

    /// Lets it run, for the first time or again. There may be pages of its to be read ahead.
    ///
    /// # Errors
    /// The host has no threads.
    pub(crate) fn set_off(
        self,
        timeout: Option<Duration>,
        closing: Closing,
    ) -> Result<(Run, Option<Ahead>), RunError> {
        let kernel = self.machine.kernel();
        let (going, ahead) = self.begin(timeout)?;
        if let Some(seen) = &closing.0 {
            seen.door.tell(Stage::Open, || Ok(()));
        }
        let run = Run {
            kernel,
            going,
            closing,
        };
        Ok((run, ahead))
    }

    /// Runs it to its end, and as often as it is asked to go back, what `again` makes instead of it: in the machine that
    /// is left, or in another one if that cannot be.
    ///
    /// # Errors
    /// A page of the snapshot cannot be read, the host fails, or the guest cannot be made again.
    pub(crate) fn run_again(
        mut self,
        timeout: Option<Duration>,
        after: After,
        mut again: impl FnMut(Option<Bare>) -> Result<(Self, Observed), RunError>,
    ) -> Result<(Ended, Option<Bare>), RunError> {
        let mut closing = self.closing();
        loop {
            let (run, ahead) = self.set_off(timeout, closing)?;
            if let Some(ahead) = ahead {
                ahead.read();
            }
            run.kernel.sched.wait_for_end();
            match run.settle(after, &mut again)? {
                Settled::Over(over) => return Ok(*over),
                Settled::Again(next) => (self, closing) = *next,
            }
        }
    }
}

impl Run {
    /// Whether the guest has ended.
    pub(crate) fn has_ended(&self) -> bool {
        self.kernel.sched.has_ended()
    }

    /// Takes down the guest, which has ended; if it was asked to go back, it is made `again`.
    ///
    /// # Errors
    /// As [`Revived::run_again`].
    pub(crate) fn settle(
        mut self,
        after: After,
        again: &mut dyn FnMut(Option<Bare>) -> Result<(Revived, Observed), RunError>,
    ) -> Result<Settled, RunError> {
        // Whoever looks at the guest does not keep it.
        drop(self.kernel);
        let Some(seen) = self.closing.0.clone().filter(|seen| seen.door.was_asked()) else {
            return Ok(Settled::Over(Box::new(self.going.finish(after)?)));
        };
        let server = self.going.leave_socket();
        let made = self.going.finish(After::Keep);
        let made = made.and_then(|(_, left)| again(left));
        let (mut revived, observed) = made.inspect_err(|error| {
            let why = format!("it cannot be made again, and has ended: {}", chain(error));
            seen.door.tell(Stage::Over, || Err(why));
        })?;
        revived.machine.observe_as(observed, (&seen, server));
        Ok(Settled::Again(Box::new((revived, self.closing))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linux::sched::Sched;

    fn failed(response: &Response) -> bool {
        matches!(response, Response::Failed { .. })
    }

    #[test]
    fn guest_of_a_program_and_one_that_has_ended_are_refused() {
        let (door, sched) = (Door::default(), Sched::default());
        assert!(failed(&door.ask(|| sched.end())));
        assert!(!sched.has_ended());
        door.tell(Stage::Open, || Ok(()));
        assert!(!door.was_asked());
        assert!(failed(&door.ask(|| sched.end())));
        assert!(!sched.has_ended());
    }

    #[test]
    fn who_asks_hears_when_it_is_there_again_and_when_it_never_is() {
        let (door, sched) = (Arc::new(Door::default()), Arc::new(Sched::default()));
        for answer in [Ok(()), Err("why".to_owned())] {
            door.tell(Stage::Open, || Ok(()));
            let (asked, ends) = (Arc::clone(&door), Arc::new(Sched::default()));
            let end = Arc::clone(&ends);
            let asks = std::thread::spawn(move || asked.ask(|| end.end()));
            ends.wait_for_end();
            assert!(door.was_asked());
            let told = answer.clone();
            door.tell(Stage::Over, || told);
            assert_eq!(failed(&asks.join().expect("no panic")), answer.is_err());
        }
        assert!(failed(&door.ask(|| sched.end())));
    }
}
