//! The clones of a shared machine as those see them who ask from outside: by number, or by name.
//!
//! A clone that nobody asks for is a line in a table: it has no socket, no descriptor and nothing to look at it with. What
//! looks at one, freezes it, or keeps its template ([`Inspector`]) is made when somebody wants it. Who asks for a clone has
//! hold of its records, not of its place in the machine: a clone that ends meanwhile is taken out all the same, and who
//! asked hears so.
//!
//! A clone is asked to go back at its [`Door`], as one with a machine of its own is; who runs the clones makes it again
//! ([`Registry::was_asked`], [`Registry::enter`], [`Registry::is_back`]).

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::{Arc, Weak};
use std::time::Instant;

use super::super::Observed;
use super::super::freezer::Freezer;
use super::super::inspector::Inspector;
use super::super::resets::{Door, Stage};
use super::super::verbs::Tell;
use super::super::worker::Shared;
use super::SharedMachine;
use crate::control::protocol::{Hello, PROTOCOL, Reply, Request, Response};
use crate::control::server::Answer;
use crate::inspect::About;
use crate::locks::{Mutex, rank};
use crate::snapshot::guest::MachineData;
use crate::snapshot::read::Snapshot;

/// Clones that one answer tells of.
const AT_ONCE: usize = 1000;

/// The clones of a machine.
pub(crate) struct Registry {
    machine: Arc<SharedMachine>,
    /// The machine of the guest that was frozen, and what it was frozen to.
    data: MachineData,
    origin: Arc<Snapshot>,
    since: Instant,
    clones: Mutex<rank::SharedClones, BTreeMap<u32, Arc<Listed>>>,
}

/// One of them.
struct Listed {
    /// What it was called by a person.
    name: Option<Box<str>>,
    door: Door,
    now: Mutex<rank::Inspectors, Now>,
}

/// The guest that it is: another one, when it has gone back.
struct Now {
    guest: Arc<Shared>,
    since: Instant,
    /// Once somebody wants more of it than that it is there.
    inspector: Option<Arc<Inspector>>,
}

impl Now {
    fn of(guest: &Arc<Shared>) -> Self {
        Self {
            guest: Arc::clone(guest),
            since: Instant::now(),
            inspector: None,
        }
    }
}

impl Registry {
    /// Without clones. `data` and `origin` are of the template.
    pub(crate) fn new(
        machine: &Arc<SharedMachine>,
        data: MachineData,
        origin: &Arc<Snapshot>,
    ) -> Arc<Self> {
        Arc::new(Self {
            machine: Arc::clone(machine),
            data,
            origin: Arc::clone(origin),
            since: Instant::now(),
            clones: Mutex::default(),
        })
    }

    /// One more clone, or one that was asked to go back, and the guest that it is from now on, which does not run yet. One with
    /// a name may freeze itself, by the freezer.
    pub(crate) fn enter(
        self: &Arc<Self>,
        number: u32,
        guest: &Arc<Shared>,
        known: Option<(&str, &Freezer)>,
    ) {
        self.serve(number, guest, known);
        if let Some(listed) = self.get(number) {
            let before = std::mem::replace(&mut *listed.now.lock(), Now::of(guest));
            // Not with the lock: it may be the last of a guest.
            drop(before);
            return;
        }
        let listed = Arc::new(Listed {
            name: known.map(|(name, _)| name.into()),
            door: Door::open(),
            now: Mutex::new(Now::of(guest)),
        });
        self.clones.lock().insert(number, listed);
    }

    fn serve(self: &Arc<Self>, number: u32, guest: &Shared, known: Option<(&str, &Freezer)>) {
        let Some((name, freezer)) = known else { return };
        // The guest keeps this.
        let registry = Arc::downgrade(self);
        let freeze = Arc::new(move || {
            let Some(registry) = registry.upgrade() else {
                return;
            };
            if let Some(listed) = registry.get(number) {
                registry.inspector(number, &listed).freeze_if_wanted();
            }
        });
        freezer.serve(&guest.kernel.freezes, name, freeze);
    }

    /// A clone has ended: whether because somebody wants it to go back. If not, nobody can any more.
    pub(crate) fn was_asked(&self, number: u32) -> bool {
        let listed = self.get(number);
        listed.is_some_and(|listed| listed.door.was_asked())
    }

    /// Who wanted a clone to go back hears what came of it.
    pub(crate) fn is_back(&self, number: u32, back: Result<(), String>) {
        let Some(listed) = self.get(number) else {
            return;
        };
        let stage = match back {
            Ok(()) => Stage::Open,
            Err(_) => Stage::Over,
        };
        listed.door.tell(stage, || back);
    }

    /// One clone less.
    pub(crate) fn leave(&self, number: u32) {
        let left = self.clones.lock().remove(&number);
        if let Some(listed) = left {
            listed.close();
        }
    }

    /// No clones any more, and who waits for one hears so.
    pub(crate) fn close(&self) {
        let left = std::mem::take(&mut *self.clones.lock());
        left.values().for_each(|listed| listed.close());
    }

    fn get(&self, number: u32) -> Option<Arc<Listed>> {
        self.clones.lock().get(&number).map(Arc::clone)
    }

    /// What looks at a clone.
    fn inspector(&self, number: u32, listed: &Listed) -> Arc<Inspector> {
        let mut now = listed.now.lock();
        if let Some(there) = &now.inspector {
            return Arc::clone(there);
        }
        let observed = Observed {
            machine: self.data.clone(),
            origin: Some(Arc::clone(&self.origin)),
            ready: None,
            keeps_last: false,
        };
        let counts = self.machine.counts(&now.guest);
        let made = Inspector::new(counts, observed, listed.id(number), now.since);
        Arc::clone(now.inspector.insert(Arc::new(made)))
    }

    /// What the socket of a clone with a name answers.
    pub(crate) fn answers_for(self: &Arc<Self>, number: u32) -> Answer {
        self.answers_with(move |registry, request, tell| registry.ask(number, request, tell))
    }

    /// What the socket that all have together answers.
    pub(crate) fn answers(self: &Arc<Self>) -> Answer {
        self.answers_with(Self::answer)
    }

    fn answers_with(
        self: &Arc<Self>,
        answer: impl Fn(&Self, &Request, Tell<'_>) -> Reply + Send + Sync + 'static,
    ) -> Answer {
        // A socket does not keep the machine.
        let registry: Weak<Self> = Arc::downgrade(self);
        Arc::new(move |request, tell| match registry.upgrade() {
            Some(registry) => answer(&registry, request, tell),
            None => Response::gone().into(),
        })
    }

    fn answer(&self, request: &Request, tell: Tell<'_>) -> Reply {
        match request {
            Request::Hello => Response::Hello {
                ok: true,
                hello: Hello {
                    protocol: PROTOCOL,
                    guest: self.data.about(std::process::id().to_string()),
                    uptime_ms: self.since.elapsed().as_millis() as u64,
                    ready: None,
                    pool: None,
                    clones: Some(self.clones.lock().len() as u32),
                },
            }
            .into(),
            Request::Clones { after } => self.list(*after).into(),
            Request::Clone { number, ask } => self.ask(*number, ask, tell),
            Request::Inspect { .. }
            | Request::Kill { .. }
            | Request::Snapshot { .. }
            | Request::Freeze
            | Request::Template
            | Request::Reset => Response::failed(
                "this is a machine that clones share, not a guest: vmm ps lists them",
            )
            .into(),
        }
    }

    /// What one clone answers.
    fn ask(&self, number: u32, request: &Request, tell: Tell<'_>) -> Reply {
        let Some(listed) = self.get(number) else {
            return Response::gone().into();
        };
        match request {
            Request::Hello => Response::Hello {
                ok: true,
                hello: self.hello(number, &listed, &self.data.about(String::new())),
            }
            .into(),
            // Of the guest that it is once nobody else has it go back.
            Request::Reset => listed
                .door
                .ask(|| {
                    let guest = Arc::clone(&listed.now.lock().guest);
                    guest.kernel.sched.end();
                })
                .into(),
            request => self
                .inspector(number, &listed)
                .answer(&listed.door, request, tell),
        }
    }

    fn hello(&self, number: u32, listed: &Listed, about: &About) -> Hello {
        Hello {
            protocol: PROTOCOL,
            guest: About {
                id: listed.id(number),
                ..about.clone()
            },
            uptime_ms: listed.now.lock().since.elapsed().as_millis() as u64,
            ready: None,
            pool: None,
            clones: None,
        }
    }

    /// Some of those without a socket of their own.
    fn list(&self, after: u32) -> Response {
        let about = self.data.about(String::new());
        let clones = self.clones.lock();
        let rest = clones.range((Bound::Excluded(after), Bound::Unbounded));
        let mut some = rest
            .filter(|(_, listed)| listed.name.is_none())
            .take(AT_ONCE + 1)
            .map(|(number, listed)| (*number, Arc::clone(listed)))
            .collect::<Vec<_>>();
        drop(clones);
        let more = some.len() > AT_ONCE;
        some.truncate(AT_ONCE);
        let last = some.last().map(|(number, _)| *number);
        let hellos = some.iter();
        Response::Clones {
            ok: true,
            clones: hellos
                .map(|(number, listed)| self.hello(*number, listed, &about))
                .collect(),
            next: last.filter(|_| more),
        }
    }
}

impl Listed {
    /// What it is called.
    fn id(&self, number: u32) -> String {
        match &self.name {
            Some(name) => name.to_string(),
            None => format!("{}.{number}", std::process::id()),
        }
    }

    /// Nobody can have it go back any more, and who waits for that hears so.
    fn close(&self) {
        let gone = || Err("the guest has ended".to_owned());
        self.door.tell(Stage::Over, gone);
    }
}
