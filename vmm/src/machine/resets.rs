//! `vmm reset`: a guest that was made of a template or a snapshot goes back to it, with its name and its descriptors.
//!
//! Whoever asks, on the guest's socket, has the guest end and waits ([`Door::ask`]). The thread that runs the guest takes it
//! down, makes it again in the same machine, and says so ([`Revived::run_again`]). The socket stays, and answers for the guest
//! that is there.

use std::time::Duration;

use parking_lot::Condvar;

use super::inspector::{Observed, Seen};
use super::restored::Revived;
use super::verbs::chain;
use super::{After, Bare, Ended, RunError};
use crate::control::protocol::Response;
use crate::linux::sched::Sched;
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
enum Stage {
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
    /// Has a guest go back; waits until it has. At most one asks at a time: the socket's thread.
    pub(super) fn ask(&self, sched: &Sched) -> Response {
        let mut state = self.state.lock();
        match state.stage {
            Stage::Open => state.stage = Stage::Asked,
            Stage::Never => {
                return Response::failed(
                    "it was not made of a template or a snapshot that it could go back to",
                );
            }
            Stage::Asked | Stage::Over => return Response::failed("the guest has ended"),
        }
        drop(state);
        sched.end();
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
    fn was_asked(&self) -> bool {
        let mut state = self.state.lock();
        let asked = state.stage == Stage::Asked;
        if !asked {
            state.stage = Stage::Over;
        }
        asked
    }

    /// Answers who asks, if somebody does.
    fn tell(&self, stage: Stage, answer: impl FnOnce() -> Result<(), String>) {
        let mut state = self.state.lock();
        if state.stage == Stage::Asked {
            state.answer = Some(answer());
        }
        state.stage = stage;
        self.told.notify_all();
    }
}

/// Nobody waits for a guest that is not made again, whatever the reason.
struct Closing<'a>(Option<&'a Seen>);

impl Drop for Closing<'_> {
    fn drop(&mut self) {
        if let Some(seen) = self.0 {
            let gone = || Err("the guest has ended".to_owned());
            seen.door.tell(Stage::Over, gone);
        }
    }
}

impl Revived {
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
        let seen = self.machine.inspector.clone();
        let _closing = Closing(seen.as_deref());
        loop {
            let kernel = self.machine.kernel();
            let (mut going, ahead) = self.begin(timeout)?;
            if let Some(seen) = &seen {
                seen.door.tell(Stage::Open, || Ok(()));
            }
            if let Some(ahead) = &ahead {
                ahead.read();
            }
            kernel.sched.wait_for_end();
            let asked = seen.as_ref().filter(|seen| seen.door.was_asked());
            let Some(seen) = asked else {
                return going.finish(after);
            };
            let server = going.leave_socket();
            drop(ahead);
            let made = going.finish(After::Keep).and_then(|(_, left)| again(left));
            let (revived, observed) = made.inspect_err(|error| {
                let why = format!("it cannot be made again, and has ended: {}", chain(error));
                seen.door.tell(Stage::Over, || Err(why));
            })?;
            self = revived;
            self.machine.observe_as(observed, (seen, server));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn failed(response: &Response) -> bool {
        matches!(response, Response::Failed { .. })
    }

    #[test]
    fn guest_of_a_program_and_one_that_has_ended_are_refused() {
        let (door, sched) = (Door::default(), Sched::default());
        assert!(failed(&door.ask(&sched)));
        assert!(!sched.has_ended());
        door.tell(Stage::Open, || Ok(()));
        assert!(!door.was_asked());
        assert!(failed(&door.ask(&sched)));
        assert!(!sched.has_ended());
    }

    #[test]
    fn who_asks_hears_when_it_is_there_again_and_when_it_never_is() {
        let (door, sched) = (Arc::new(Door::default()), Arc::new(Sched::default()));
        for answer in [Ok(()), Err("why".to_owned())] {
            door.tell(Stage::Open, || Ok(()));
            let (asked, ends) = (Arc::clone(&door), Arc::new(Sched::default()));
            let end = Arc::clone(&ends);
            let asks = std::thread::spawn(move || asked.ask(&end));
            ends.wait_for_end();
            assert!(door.was_asked());
            let told = answer.clone();
            door.tell(Stage::Over, || told);
            assert_eq!(failed(&asks.join().expect("no panic")), answer.is_err());
        }
        assert!(failed(&door.ask(&sched)));
    }
}
