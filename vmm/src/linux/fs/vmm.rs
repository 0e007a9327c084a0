//! `/dev/vmm`: a program asks to be frozen, and learns which of the guests made of it it is.
//!
//! Writing `freeze`, with or without an end of line, is one request: the write returns when the template is there, and in each guest
//! made of it as the first thing that happens. Anything else is `EINVAL`. Reading gives [`text`] as it is when the reading
//! begins; it begins anew after every write, and in a guest that was made again. `docs/clones.md` is the
//! protocol as programs see it; the limits are [`crate::linux::freezes`]'s.

use std::sync::Arc;

use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::linux::call::{Restart, Wait, WaitKey};
use crate::linux::file::{File, Location, Ready, Stat, Viewer};
use crate::linux::freezes::{Asked, Freezes, Ticket};
use crate::linux::kernel::Kernel;
use crate::linux::saved::{Damaged, Loader, Refused, SavedFile, Saver};
use crate::locks::{Mutex, rank};
use crate::snapshot::records::Role;

/// An open `/dev/vmm`.
#[derive(Debug)]
pub(super) struct VmmFile {
    stat: Stat,
    at: Location,
    freezes: Arc<Freezes>,
    state: Mutex<rank::VmmFile, State>,
}

#[derive(Debug, Default)]
struct State {
    /// The request that was made and has not been answered to.
    asked: Option<Ticket>,
    /// What is being read, and how far it was.
    shown: Option<(Vec<u8>, usize)>,
}

/// Which guest this is: `ROLE NUMBER COUNT NAME` in the first line, then what was set for it, a line each.
fn text(k: &Kernel) -> Vec<u8> {
    let identity = k.identity.get();
    let own = k.freezes.name().unwrap_or("-");
    let first = match identity.map(|identity| &identity.role) {
        None => format!("original 0 0 {own}\n"),
        Some(Role::Restored) => "restored 0 0 -\n".to_owned(),
        Some(Role::Clone {
            number,
            of,
            template,
        }) => format!("clone {number} {of} {template}\n"),
    };
    let mut text = first.into_bytes();
    for setting in identity.iter().flat_map(|identity| &identity.settings) {
        text.extend_from_slice(setting);
        text.push(b'\n');
    }
    text
}

impl VmmFile {
    /// Opens it.
    pub(super) fn new(k: &Kernel, stat: Stat, at: Location) -> Self {
        Self {
            stat,
            at,
            freezes: Arc::clone(&k.freezes),
            state: Mutex::default(),
        }
    }

    fn freeze(&self, state: &mut State) -> Result<(), Errno> {
        let ticket = match state.asked {
            Some(ticket) => ticket,
            None => match self.freezes.ask()? {
                Asked::Nobody => return Ok(()),
                Asked::Soon(ticket) => *state.asked.insert(ticket),
            },
        };
        let answer = self.freezes.answer(ticket).ok_or(Errno::AGAIN)?;
        state.asked = None;
        answer
    }
}

impl File for VmmFile {
    fn read(&self, k: &Kernel, _: u64, buf: &mut [u8]) -> Result<usize, Errno> {
        let mut state = self.state.lock();
        let (text, done) = state.shown.get_or_insert_with(|| (text(k), 0));
        let rest = &text[*done..];
        let n = rest.len().min(buf.len());
        buf[..n].copy_from_slice(&rest[..n]);
        *done += n;
        Ok(n)
    }

    fn write(&self, _: &Kernel, _: u64, buf: &[u8]) -> Result<usize, Errno> {
        if buf.is_empty() {
            return Ok(0);
        }
        if !matches!(buf, b"freeze" | b"freeze\n") {
            return Err(Errno::INVAL);
        }
        let mut state = self.state.lock();
        self.freeze(&mut state)?;
        state.shown = None;
        Ok(buf.len())
    }

    fn stat(&self, _: &Kernel) -> Result<Stat, Errno> {
        Ok(self.stat)
    }

    fn ready(&self, _: Viewer<'_>) -> Ready {
        let asked = self.state.lock().asked;
        let mut ready = Ready::IN | Ready::RDNORM;
        let waits = asked.is_some_and(|ticket| self.freezes.answer(ticket).is_none());
        ready.set(Ready::OUT | Ready::WRNORM, !waits);
        ready
    }

    fn wait_key(&self) -> Option<WaitKey> {
        Some(self.freezes.key())
    }

    fn watch(&self, _: Viewer<'_>, interest: Ready, wait: &mut Wait) {
        wait.keys.push(self.freezes.key());
        if interest == Ready::OUT {
            // The host's doing, and soon over: what was asked for is not asked for again after a signal.
            wait.restart = Restart::Uninterruptible;
        }
    }

    fn edges(&self) -> u64 {
        self.freezes.settled()
    }

    fn location(&self) -> Option<Location> {
        Some(self.at.clone())
    }

    fn name(&self, _: &Kernel) -> Vec<u8> {
        b"/dev/vmm".to_vec()
    }

    fn saved(&self, _: &mut Saver<'_>) -> Result<SavedFile, Refused> {
        Ok(SavedFile::Vmm(SavedVmm {
            at: self.at.clone(),
            stat: self.stat,
            asked: self.state.lock().asked.is_some(),
        }))
    }

    fn as_any(&self) -> &dyn std::any::Any {
        self
    }
}

/// An open `/dev/vmm` as data.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SavedVmm {
    at: Location,
    stat: Stat,
    /// Whether a write waits: in this guest it returns.
    asked: bool,
}

impl SavedVmm {
    pub(in crate::linux) fn load(self, l: &Loader<'_>) -> Result<Arc<dyn File>, Damaged> {
        l.place(&self.at)?;
        let file = VmmFile::new(l.k, self.stat, self.at);
        if self.asked {
            file.state.lock().asked = Some(l.k.freezes.was_saved());
        }
        Ok(Arc::new(file))
    }
}
