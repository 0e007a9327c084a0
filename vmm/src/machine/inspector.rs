//! Looking at a machine from outside: what its socket answers, and what `--report` keeps of it.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use super::freezer::Freezer;
use super::report::Report;
use super::resets::Door;
use super::verbs::{Tell, Verbs};
use super::{Counts, Machine, RunError};
use crate::control::protocol::{Hello, PROTOCOL, Reply, Request, Response};
use crate::control::ready::Ready;
use crate::control::rundir::{self, Called, RunDir};
use crate::control::server::{Answer, Server};
use crate::inspect::collect::{self, Detail, Given};
use crate::inspect::{About, Inspection};
use crate::locks::{Mutex, rank};
use crate::snapshot::guest::MachineData;
use crate::snapshot::read::Snapshot;

/// Looks at a machine.
pub(super) struct Inspector {
    counts: Counts,
    about: About,
    started: Instant,
    verbs: Verbs,
    /// The machine as its first program's end found it, if that is to be kept.
    last: Mutex<rank::LastLook, Option<Inspection>>,
}

/// The guest of a name, as others see it. When it goes back, there is another one to look at.
pub(super) struct Seen {
    now: Mutex<rank::Inspectors, Arc<Inspector>>,
    pub(super) door: Door,
    /// The name of its run directory, if somebody gave it that name.
    name: Option<String>,
}

impl Seen {
    fn now(&self) -> Arc<Inspector> {
        Arc::clone(&self.now.lock())
    }

    /// Writes what was kept, with the machine's end.
    pub(super) fn write_report(&self, file: &mut ReportFile, status: u8, counters: &Report) {
        self.now().write_report(file, status, counters);
    }
}

/// A machine as those see it who ask.
pub(crate) struct Observed {
    /// What it is.
    pub(crate) machine: MachineData,
    /// The snapshot it came from.
    pub(crate) origin: Option<Arc<Snapshot>>,
    /// What it does when it is ready.
    pub(crate) ready: Option<Ready>,
    /// Whether what its first program's end finds is kept, for a report.
    pub(crate) keeps_last: bool,
}

/// The file that `--report` names.
#[derive(Debug)]
pub(super) struct ReportFile {
    path: PathBuf,
    file: File,
}

impl Inspector {
    /// Looks at a guest that is called `id`, since it was `started`.
    pub(super) fn new(counts: Counts, observed: Observed, id: String, started: Instant) -> Self {
        let Observed {
            machine,
            origin,
            ready,
            keeps_last: _,
        } = observed;
        Self {
            about: machine.about(id),
            started,
            verbs: Verbs::new(&counts.shared.kernel, machine, origin, ready),
            counts,
            last: Mutex::default(),
        }
    }

    fn uptime_ms(&self) -> u64 {
        self.started.elapsed().as_millis() as u64
    }

    fn look(&self, detail: Detail) -> Inspection {
        let given = Given {
            guest: self.about.clone(),
            status: None,
            uptime_ms: self.uptime_ms(),
            counters: serde_json::to_value(self.counts.report()).unwrap_or_default(),
        };
        collect::collect(&self.counts.shared.kernel, given, detail)
    }

    /// Makes a template because the guest wants to be one.
    pub(super) fn freeze_if_wanted(&self) {
        self.verbs.freeze_if_wanted(&self.about.id);
    }

    pub(super) fn answer(&self, door: &Door, request: &Request, tell: Tell<'_>) -> Reply {
        let response = match request {
            Request::Hello => Response::Hello {
                ok: true,
                hello: Hello {
                    protocol: PROTOCOL,
                    guest: self.about.clone(),
                    uptime_ms: self.uptime_ms(),
                    ready: self.verbs.ready(),
                    pool: None,
                    clones: None,
                },
            },
            Request::Kill { signal } => self.verbs.kill(*signal),
            Request::Snapshot { path, base } => self.verbs.snapshot(path, base.as_deref(), tell),
            Request::Freeze => return self.verbs.freeze(&self.about.id, tell),
            Request::Template => return self.verbs.template(),
            Request::Reset => door.ask(|| self.counts.shared.kernel.sched.end()),
            Request::Inspect { summary } => {
                let detail = if *summary {
                    Detail::Summary
                } else {
                    Detail::Full
                };
                Response::Inspect {
                    ok: true,
                    inspect: Box::new(self.look(detail)),
                }
            }
            Request::Clones { .. } => Response::failed("this is no machine that clones share"),
            Request::Clone { .. } => Response::gone(),
        };
        response.into()
    }

    /// Keeps the machine as it is now.
    fn keep(&self) {
        let seen = self.look(Detail::Full);
        *self.last.lock() = Some(seen);
    }

    fn write_report(&self, file: &mut ReportFile, status: u8, counters: &Report) {
        let kept = self.last.lock().take();
        let mut seen = kept.unwrap_or_else(|| self.look(Detail::Full));
        seen.status = Some(status);
        seen.uptime_ms = self.uptime_ms();
        seen.counters = serde_json::to_value(counters).unwrap_or_default();
        let written = serde_json::to_vec(&seen)
            .map_err(std::io::Error::from)
            .and_then(|text| file.file.write_all(&text))
            .and_then(|()| file.file.write_all(b"\n"));
        if let Err(error) = written {
            tracing::error!(%error, "--report {}: cannot be written", file.path.display());
        }
    }
}

impl Machine {
    /// Makes what looks at the machine, and the socket others ask on.
    pub(crate) fn observe(&mut self, observed: Observed, dir: Option<RunDir>) {
        let id = dir.as_ref().map(|dir| dir.id().to_owned());
        let id = id.unwrap_or_else(|| std::process::id().to_string());
        let seen = Arc::new(Seen {
            now: Mutex::new(self.inspect(observed, id)),
            door: Door::default(),
            name: dir.as_ref().and_then(RunDir::name).map(str::to_owned),
        });
        self.freeze_for(&seen);
        if let Some(dir) = dir {
            let asked = Arc::clone(&seen);
            let answer: Answer =
                Arc::new(move |request, tell| asked.now().answer(&asked.door, request, tell));
            match Server::start(dir, answer) {
                Ok(server) => self.control = Some(server),
                Err(error) => tracing::warn!(%error, "vmm inspect will not find this guest"),
            }
        }
        self.inspector = Some(seen);
    }

    /// The same of a guest that was made in the place of another one: with its name, and its socket.
    pub(super) fn observe_as(
        &mut self,
        observed: Observed,
        (seen, server): (&Arc<Seen>, Option<Server>),
    ) {
        let id = seen.now().about.id.clone();
        let now = self.inspect(observed, id);
        let before = std::mem::replace(&mut *seen.now.lock(), now);
        // Not with the lock: it may be the last of a guest.
        drop(before);
        self.freeze_for(seen);
        self.control = server;
        self.inspector = Some(Arc::clone(seen));
    }

    fn inspect(&self, observed: Observed, id: String) -> Arc<Inspector> {
        let keeps_last = observed.keeps_last;
        if let Some(Ready::Line(line)) = observed.ready.clone() {
            let printed = Box::new(move |bytes: &[u8]| line.feed(bytes));
            let _first = self.shared.kernel.printed.set(printed);
        }
        let inspector = Arc::new(Inspector::new(self.counts(), observed, id, Instant::now()));
        if keeps_last {
            // Weak: the kernel is part of what the inspector looks at.
            let weak = Arc::downgrade(&inspector);
            let keep = Box::new(move || {
                if let Some(inspector) = weak.upgrade() {
                    inspector.keep();
                }
            });
            let _first = self.shared.kernel.main_ends.set(keep);
        }
        inspector
    }

    /// Lets a guest with a name freeze itself.
    fn freeze_for(&mut self, seen: &Seen) {
        let Some(name) = &seen.name else { return };
        let asked = Arc::downgrade(&seen.now());
        let freeze = Arc::new(move || {
            if let Some(asked) = asked.upgrade() {
                asked.freeze_if_wanted();
            }
        });
        match Freezer::start() {
            Ok(freezer) => {
                freezer.serve(&self.shared.kernel.freezes, name, freeze);
                self.freezer = Some(freezer);
            }
            Err(error) => tracing::warn!(%error, "the guest cannot freeze itself"),
        }
    }
}

/// The run directory. Only a name that was asked for must have one.
pub(crate) fn run_dir<'a>(called: impl Into<Called<'a>>) -> Result<Option<RunDir>, RunError> {
    let called = called.into();
    match RunDir::create(&rundir::folder(), called) {
        Ok(dir) => Ok(Some(dir)),
        Err(error) if matches!(called, Called::Name(_)) => Err(RunError::RunDir(error)),
        Err(error) => {
            tracing::info!(%error, "vmm inspect will not find this guest");
            Ok(None)
        }
    }
}

/// The report's file, made before anything runs.
pub(super) fn report_file(path: Option<&Path>) -> Result<Option<ReportFile>, RunError> {
    let Some(path) = path.map(Path::to_owned) else {
        return Ok(None);
    };
    match File::create(&path) {
        Ok(file) => Ok(Some(ReportFile { path, file })),
        Err(source) => Err(RunError::Report { path, source }),
    }
}
