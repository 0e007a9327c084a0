//! What can be done to a running guest from outside, besides looking at it: ending it, writing it down,
//! freezing it into a template that others are made of.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::control::protocol::{Frozen, Progress, Reply, Response, Written};
use crate::control::ready::Ready;
use crate::descriptors;
use crate::linux::Errno;
use crate::linux::kernel::Kernel;
use crate::linux::process::{SigFields, SigInfo};
use crate::linux::signal;
use crate::locks::{Mutex, rank};
use crate::snapshot::guest::{MachineData, SavedGuest, SnapshotError, expected_pages, save_guest};
use crate::snapshot::read::Snapshot;
use crate::snapshot::write::Writer;

/// How often progress is told.
const TELL: Duration = Duration::from_millis(100);

/// The verbs of one machine.
pub(crate) struct Verbs {
    kernel: Arc<Kernel>,
    machine: MachineData,
    /// The snapshot the guest came from.
    origin: Option<Arc<Snapshot>>,
    ready: Option<Ready>,
    saving: Mutex<rank::Saving, ()>,
    template: Mutex<rank::Template, Option<Template>>,
}

/// A frozen guest, in memory.
#[derive(Clone)]
struct Template {
    file: Arc<File>,
    told: Frozen,
}

/// Where progress goes.
pub(super) type Tell<'a> = &'a mut dyn FnMut(Response);

impl Verbs {
    pub(crate) fn new(
        kernel: &Arc<Kernel>,
        machine: MachineData,
        origin: Option<Arc<Snapshot>>,
        ready: Option<Ready>,
    ) -> Self {
        Self {
            kernel: Arc::clone(kernel),
            machine,
            origin,
            ready,
            saving: Mutex::default(),
            template: Mutex::default(),
        }
    }

    /// Whether the guest has said that it is ready; `None` if nobody asked it to.
    pub(super) fn ready(&self) -> Option<bool> {
        self.ready.as_ref().map(|ready| match ready {
            Ready::Line(line) => line.is_ready(),
            Ready::Freeze => self.template.lock().is_some(),
        })
    }

    /// Sends a signal to the first program.
    pub(super) fn kill(&self, signo: i32) -> Response {
        if !(1..=64).contains(&signo) {
            return Response::failed(format!("{signo} is not a signal"));
        }
        match self.signal(signo) {
            Ok(()) => Response::Done { ok: true },
            Err(_) => Response::failed("the guest has ended"),
        }
    }

    /// The same, for a number that is a signal's.
    ///
    /// # Errors
    /// It has ended.
    pub(crate) fn signal(&self, signo: i32) -> Result<(), Errno> {
        let info = SigInfo {
            signo,
            code: 0,
            errno: 0,
            fields: SigFields::None,
        };
        let mut state = self.kernel.state();
        let main = state.main;
        signal::send_to_process(&self.kernel, &mut state, main, info)
    }

    /// Writes the guest to a file; with `base` only what is not in that snapshot, which it was restored from.
    pub(super) fn snapshot(&self, path: &Path, base: Option<&str>, tell: Tell<'_>) -> Response {
        if !path.is_absolute() {
            return Response::failed("the path of a snapshot is absolute here");
        }
        let base = match (&self.origin, base) {
            (_, None) => None,
            (Some(origin), Some(id)) if origin.id().to_string() == id => Some(origin.as_base()),
            (Some(_), Some(_)) => {
                return Response::failed(
                    "--base is not the snapshot that the guest was restored from",
                );
            }
            (None, Some(_)) => {
                return Response::failed("the guest was not restored from a snapshot to build on");
            }
        };
        let _alone = self.saving.lock();
        let machine = self.machine.with_room_for(&self.kernel);
        let saved = Writer::create(path, base)
            .map_err(SnapshotError::from)
            .and_then(|writer| {
                let mut progress = self.progress(tell);
                save_guest(&self.kernel, &machine, writer, base, &mut progress)
            });
        match saved {
            Ok(saved) => Response::Written {
                ok: true,
                written: told(&saved),
            },
            Err(error) => Response::failed(chain(&error)),
        }
    }

    /// Makes a template of the guest, which goes on.
    pub(super) fn freeze(&self, id: &str, tell: Tell<'_>) -> Reply {
        match self.make_template(id, tell) {
            Ok(template) => Reply::with_file(
                Response::Frozen {
                    ok: true,
                    frozen: template.told,
                },
                template.file,
            ),
            Err(error) => Response::failed(chain(&error)).into(),
        }
    }

    /// Makes a template of the guest, and keeps nothing of it. `id` is what the guest is called.
    ///
    /// # Errors
    /// The guest cannot be written down; it goes on as before.
    pub(crate) fn hand_out_template(&self, id: &str) -> Result<(Arc<File>, Frozen), SnapshotError> {
        let made = self.make_template(id, &mut |_| ());
        self.template.lock().take();
        made.map(|template| (template.file, template.told))
    }

    /// The template there is.
    pub(super) fn template(&self) -> Reply {
        let template = self.template.lock().clone();
        match template {
            Some(template) => Reply::with_file(
                Response::Frozen {
                    ok: true,
                    frozen: template.told,
                },
                template.file,
            ),
            None => Response::failed("the guest is not frozen").into(),
        }
    }

    /// Makes a template because the guest wants to be one, unless it has become one meanwhile.
    pub(super) fn freeze_if_wanted(&self, id: &str) {
        if self.kernel.freezes.is_wanted()
            && let Err(error) = self.make_template(id, &mut |_| ())
        {
            let error = chain(&error);
            tracing::warn!(%error, "the guest cannot be frozen as it asked for");
        }
    }

    /// Makes a template, and tells the guest, if it asked for one.
    fn make_template(&self, id: &str, tell: Tell<'_>) -> Result<Template, SnapshotError> {
        let _alone = self.saving.lock();
        let made = self.write_template(id, tell);
        let freezes = &self.kernel.freezes;
        match &made {
            Ok(_) => freezes.settle(&self.kernel.sched, Ok(())),
            Err(SnapshotError::Refused(_)) => freezes.fail(&self.kernel.sched, Errno::OPNOTSUPP),
            Err(_) => freezes.fail(&self.kernel.sched, Errno::IO),
        }
        made
    }

    fn write_template(&self, id: &str, tell: Tell<'_>) -> Result<Template, SnapshotError> {
        let writer = Writer::in_memory(id)?;
        let mut progress = self.progress(tell);
        let machine = self.machine.with_room_for(&self.kernel);
        let saved = save_guest(&self.kernel, &machine, writer, None, &mut progress)?;
        let written = told(&saved);
        let template = Template {
            file: Arc::new(saved.written.file),
            told: Frozen {
                pages: written.pages,
                bytes: written.bytes,
                pause_us: written.pause_us,
                pause_pages: written.pause_pages,
            },
        };
        *self.template.lock() = Some(template.clone());
        Ok(template)
    }

    fn progress<'a>(&self, tell: Tell<'a>) -> impl FnMut(u64) + 'a {
        let of = expected_pages(&self.kernel);
        let (mut pages, mut last) = (0, Instant::now());
        move |more| {
            pages += more;
            if last.elapsed() >= TELL {
                last = Instant::now();
                tell(Response::Progress {
                    ok: true,
                    progress: Progress { pages, of },
                });
            }
        }
    }
}

fn told(saved: &SavedGuest) -> Written {
    Written {
        pages: saved.written.pages,
        bytes: saved.written.bytes,
        pause_us: saved.pause.as_micros() as u64,
        pause_pages: saved.copied_in_pause,
    }
}

/// An error with its causes, in one line, and with what to do if descriptors were too few.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        if !text.ends_with(&next) {
            text.push_str(": ");
            text.push_str(&next);
        }
        cause = error.source();
    }
    text.push_str(&descriptors::advice(&text).unwrap_or_default());
    text
}
