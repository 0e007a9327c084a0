//! A conversation with `vmm fork`, in a process that runs clones for it: orders are carried out, and what becomes of the
//! clones is told. A clone does not outlive the conversation it was ordered in.
//!
//! No thread waits for a clone. One thread of the conversation hears of ends, and starts a thread for each clone that has
//! ended: to take it down, which takes its time, and to make it again if that is what it was ended for.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Weak};
use std::thread::Builder;

use super::stock::Stock;
use super::wire::{End, Line, Lot, News, One, Order};
use crate::cli::STATUS_FAILURE;
use crate::cli::restore::setting;
use crate::control::rundir::Called;
use crate::linux::sched::Sched;
use crate::linux::stdio::{Given, copy};
use crate::locks::{Mutex, rank};
use crate::machine::resets::{Closing, Run, Settled};
use crate::machine::restored::{Ahead, Revived};
use crate::machine::verbs::chain;
use crate::machine::{After, Bare, Observed, RunError, run_dir, take_no_signals};
use crate::snapshot::records::{Identity, Role};

/// How the clones of a process are told apart that were given no name.
pub(super) enum Numbers {
    /// By the number that `vmm fork` has given them: there is only one.
    Given,
    /// By the order in which they were made: several give numbers.
    Own(AtomicU32),
}

/// Why a conversation ends.
#[derive(Debug, thiserror::Error)]
pub(super) enum TalkError {
    #[error("no order is understood")]
    Line(#[source] io::Error),
    #[error("another order is expected: one `serve`, then any number of `start`")]
    Order,
    #[error("the template's name is not one word")]
    Template,
    #[error("a thread cannot be started")]
    Thread(#[source] io::Error),
}

/// The clones that run.
#[derive(Default)]
struct Running {
    /// Nobody waits for them any more.
    over: bool,
    clones: BTreeMap<u32, Arc<Sched>>,
}

/// A conversation.
pub(super) struct Talk {
    line: Line,
    lot: Lot,
    stock: Arc<Stock>,
    numbers: Arc<Numbers>,
    /// Clones at once.
    room: usize,
    /// Held while something is said.
    voice: Mutex<rank::CloneNews, ()>,
    running: Mutex<rank::RunningClones, Running>,
    /// Clones whose end is waited for.
    waits: Mutex<rank::WaitingClones, BTreeMap<u32, Waiting>>,
    /// Told the number of one that has ended.
    ends: Sender<u32>,
}

/// A clone that runs, and what its end takes.
struct Waiting {
    run: Run,
    order: Ordered,
}

/// A clone, as it was ordered.
struct Ordered {
    one: One,
    with: Vec<OwnedFd>,
    ending: Ending,
}

impl Talk {
    /// Begins it. At most `room` clones run at once.
    ///
    /// # Errors
    /// The host has no thread to hear of ends.
    pub(super) fn new(
        line: Line,
        lot: Lot,
        stock: &Arc<Stock>,
        (numbers, room): (&Arc<Numbers>, usize),
    ) -> Result<Arc<Self>, TalkError> {
        let (ends, ended) = channel();
        let talk = Arc::new(Self {
            line,
            lot,
            stock: Arc::clone(stock),
            numbers: Arc::clone(numbers),
            room,
            voice: Mutex::default(),
            running: Mutex::default(),
            waits: Mutex::default(),
            ends,
        });
        let known = Arc::downgrade(&talk);
        Builder::new()
            .name("ends".into())
            .spawn(move || hear_of_ends(&ended, &known))
            .map_err(TalkError::Thread)?;
        Ok(talk)
    }

    /// Takes orders until there is nobody to give any; then the clones are told to end.
    pub(super) fn listen(self: &Arc<Self>) -> Result<(), TalkError> {
        let heard = loop {
            match self.line.hear() {
                Ok(Some((Order::Start(one), with))) => self.start(one, with),
                Ok(Some((Order::Serve(_), _))) => break Err(TalkError::Order),
                Ok(None) => break Ok(()),
                Err(error) => break Err(TalkError::Line(error)),
            }
        };
        if let Err(error) = &heard {
            self.tell(&News::Error(chain(error)));
        }
        self.end();
        heard
    }

    /// Has all clones end, and hears nothing more.
    pub(super) fn end(&self) {
        self.line.hang_up();
        let mut running = self.running.lock();
        running.over = true;
        let clones = std::mem::take(&mut running.clones);
        drop(running);
        clones.values().for_each(|sched| sched.end());
    }

    /// Clones that run.
    pub(super) fn clones(&self) -> usize {
        self.running.lock().clones.len()
    }

    pub(super) fn tell(&self, news: &News) {
        let _one_at_a_time = self.voice.lock();
        // Who does not listen any more has ended, and so will the clones.
        let _gone = self.line.say(news, &[]);
    }

    /// Starts a clone, and says what comes of it.
    fn start(self: &Arc<Self>, one: One, with: Vec<OwnedFd>) {
        let number = one.number;
        if let Err(why) = self.may_start(&one) {
            return self.tell(&News::Failed { number, why });
        }
        let end = Ending {
            talk: Arc::clone(self),
            number,
            news: News::Ended {
                number,
                status: STATUS_FAILURE,
            },
        };
        let revived = match self.make(&one, &with) {
            Ok(revived) => revived,
            Err(error) => return end.fails(&error),
        };
        let order = Ordered {
            one,
            with,
            ending: end,
        };
        let closing = revived.closing();
        let told = News::Runs(number);
        self.set_off((revived, closing), order, Some(&told));
    }

    /// Whether a clone can be what was ordered.
    fn may_start(&self, one: &One) -> Result<(), String> {
        let running = self.running.lock();
        if running.clones.contains_key(&one.number) {
            return Err(format!("clone {} runs", one.number));
        }
        if running.clones.len() >= self.room {
            return Err(format!(
                "{} copies of this conversation run, which is all there was room for when it began",
                self.room
            ));
        }
        drop(running);
        for text in &one.env {
            setting(text).map_err(|why| format!("{text:?}: {why}"))?;
        }
        Ok(())
    }

    /// Lets a clone run. Its end will be heard of.
    fn set_off(
        self: &Arc<Self>,
        (revived, closing): (Revived, Closing),
        order: Ordered,
        told: Option<&News>,
    ) {
        let number = order.one.number;
        let sched = Arc::clone(&revived.machine.kernel().sched);
        let (run, ahead) = match revived.set_off(self.lot.timeout(), closing) {
            Ok(runs) => runs,
            Err(error) => return order.ending.fails(&error),
        };
        if let Some(told) = told {
            self.tell(told);
        }
        read_ahead(ahead);
        self.waits.lock().insert(number, Waiting { run, order });
        let ends = self.ends.clone();
        // Nobody hears when nobody is left who could have it settled.
        sched.at_end(Box::new(move || _ = ends.send(number)));
        if sched.has_ended() {
            // Perhaps before anybody was to be told.
            let _ = self.ends.send(number);
        }
    }

    /// A clone whose end nobody has seen to. It may be told of more than once, and be there again by then.
    fn take_ended(&self, number: u32) -> Option<Waiting> {
        let mut waits = self.waits.lock();
        let ended = waits.get(&number)?.run.has_ended();
        ended.then(|| waits.remove(&number)).flatten()
    }

    /// Takes down a clone that has ended, and keeps its machine for the next; or makes it again.
    fn settle(self: &Arc<Self>, Waiting { run, order }: Waiting) {
        let Ordered {
            one,
            with,
            mut ending,
        } = order;
        let mut again = |left| self.revive(&one, &with, left);
        match run.settle(After::Keep, &mut again) {
            Ok(Settled::Over(over)) => {
                let (ended, left) = *over;
                ending.news = News::Ended {
                    number: one.number,
                    status: ended.status(),
                };
                if let Some(left) = left {
                    self.stock.give_back(left);
                }
            }
            Ok(Settled::Again(next)) => {
                let order = Ordered { one, with, ending };
                self.set_off(*next, order, None);
            }
            Err(error) => ending.fails(&error),
        }
    }

    fn make(&self, one: &One, with: &[OwnedFd]) -> Result<Revived, RunError> {
        let called = match (&one.name, &*self.numbers) {
            (Some(name), _) => Called::Name(name),
            (None, Numbers::Given) => Called::Clone(one.number),
            (None, Numbers::Own(made)) => Called::Clone(made.fetch_add(1, Ordering::Relaxed)),
        };
        let dir = run_dir(called)?;
        let (mut revived, observed) = self.revive(one, with, self.stock.take())?;
        revived.machine.observe(observed, dir);
        Ok(revived)
    }

    fn revive(
        &self,
        one: &One,
        with: &[OwnedFd],
        mut left: Option<Bare>,
    ) -> Result<(Revived, Observed), RunError> {
        let stdio = given(one, with).map_err(|error| {
            // It was not touched.
            let untouched = left.take().into_iter();
            untouched.for_each(|left| self.stock.give_back(left));
            RunError::Stdio(error)
        })?;
        let settings = one.env.iter().map(|text| text.clone().into());
        let identity = Identity {
            role: Role::Clone {
                number: one.number,
                of: self.lot.of,
                template: self.lot.template.clone().unwrap_or_else(|| "-".to_owned()),
            },
            settings: settings.collect(),
        };
        let made = self.stock.revive(identity, stdio, left)?;
        let sched = Arc::clone(&made.0.machine.kernel().sched);
        if self.is_over(one.number, &sched) {
            sched.end();
        }
        Ok(made)
    }

    /// Notes a clone, in the place of what it went back from. Whether nobody waits for it any more.
    fn is_over(&self, number: u32, sched: &Arc<Sched>) -> bool {
        let mut running = self.running.lock();
        if !running.over {
            running.clones.insert(number, Arc::clone(sched));
        }
        running.over
    }
}

fn failed(number: u32, error: &dyn std::error::Error) -> News {
    News::Failed {
        number,
        why: chain(error),
    }
}

/// Descriptors 0 to 2 of a clone, copies of those that came `with` its order: a clone that goes back gets them again.
fn given(one: &One, with: &[OwnedFd]) -> io::Result<Given> {
    let mut with = with.iter();
    let mut given = [None, None, None];
    let own = [
        rustix::stdio::stdin(),
        rustix::stdio::stdout(),
        rustix::stdio::stderr(),
    ];
    for ((end, own), given) in one.stdio.iter().zip(own).zip(&mut given) {
        *given = match end {
            End::Given => match with.next() {
                Some(fd) => Some(rustix::io::fcntl_dupfd_cloexec(fd, 3)?),
                None => return Err(io::Error::other("fewer came than were said to be given")),
            },
            End::Own => copy(own.as_fd())?,
            End::Null => Some(null()?),
            End::Nothing => None,
        };
    }
    if given[0].is_none() {
        given[0] = Some(null()?);
    }
    Ok(Given(given))
}

fn null() -> io::Result<OwnedFd> {
    let null = File::options().read(true).write(true).open("/dev/null");
    Ok(null?.into())
}

/// Reads what a guest had in use, if it has to be read, while it runs.
fn read_ahead(ahead: Option<Ahead>) {
    let Some(ahead) = ahead else { return };
    let reads = Builder::new().name("ahead".into()).spawn(move || {
        take_no_signals();
        ahead.read();
    });
    if let Err(error) = reads {
        tracing::info!(%error, "pages are read when they are touched");
    }
}

/// Has those settled that have ended, until the conversation is over.
fn hear_of_ends(ended: &Receiver<u32>, talk: &Weak<Talk>) {
    take_no_signals();
    while let Ok(number) = ended.recv() {
        let Some(talk) = talk.upgrade() else { return };
        let Some(waiting) = talk.take_ended(number) else {
            continue;
        };
        // A thread that the host refuses takes what it was given with it: it is to be had back.
        let waiting = Arc::new(Mutex::<rank::WaitingClones, _>::new(Some(waiting)));
        let given = (Arc::clone(&waiting), Arc::clone(&talk));
        let settles = Builder::new()
            .name(format!("clone{number}"))
            .spawn(move || {
                take_no_signals();
                let (waiting, talk) = given;
                let waiting = waiting.lock().take();
                if let Some(waiting) = waiting {
                    talk.settle(waiting);
                }
            });
        if let Err(error) = settles {
            tracing::warn!(%error, "clones are taken down one after the other");
            let waiting = waiting.lock().take();
            if let Some(waiting) = waiting {
                talk.settle(waiting);
            }
        }
    }
}

/// Tells of a clone's end, however that comes.
struct Ending {
    talk: Arc<Talk>,
    number: u32,
    news: News,
}

impl Ending {
    fn fails(mut self, error: &dyn std::error::Error) {
        self.news = failed(self.number, error);
    }
}

impl Drop for Ending {
    fn drop(&mut self) {
        self.talk.running.lock().clones.remove(&self.number);
        self.talk.tell(&self.news);
    }
}
