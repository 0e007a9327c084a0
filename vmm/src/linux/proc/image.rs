//! What a successful `execve` does to the process around the new program (execve(2), "effect on
//! process attributes").

use std::sync::Arc;

use super::futex::robust;
use super::{comm, exit};
use crate::linux::call::{Ctx, WaitKey};
use crate::linux::file::Location;
use crate::linux::process::{AddressSpace, Fd, Process, SigAction};
use crate::linux::signal::SIG_IGN;
use crate::linux::thread::{AltStack, Fpu, Regs};

/// A new program, loaded.
#[derive(Debug)]
pub struct Image {
    /// Its memory.
    pub mm: Arc<AddressSpace>,
    /// Its program file.
    pub exe: Location,
    /// Its name: the last component of the path.
    pub comm: Vec<u8>,
    /// Its entry point and stack.
    pub regs: Regs,
}

/// Makes the calling process, of which the caller is the only thread, run `image`: from here on nothing can fail. The handler then returns
/// [`crate::linux::call::Stop::Replaced`].
pub fn commit_exec(c: &mut Ctx<'_>, image: Image) {
    robust::thread_ends(c);
    exit::clear_child_tid(c);
    let Image {
        mm,
        exe,
        comm: name,
        regs,
    } = image;
    let (old_mm, closed, vfork) = c.with_process(|p| {
        p.exe = exe;
        p.comm = comm(&name);
        p.has_execed = true;
        p.exit_signal = libc::SIGCHLD;
        p.cred.uid[2] = p.cred.uid[1];
        p.cred.gid[2] = p.cred.gid[1];
        p.usage.note_peak(&c.t.mm);
        p.posix_timers.clear();
        p.prctl.keep_caps = false;
        p.prctl.dumpable = 1;
        reset_handlers(p);
        let vfork = std::mem::take(&mut p.vfork_waits);
        (p.mm.replace(Arc::clone(&mm)), close_on_exec(p), vfork)
    });
    let t = &mut *c.t;
    t.regs = regs;
    t.fpu = Fpu::Initial;
    t.altstack = AltStack::default();
    t.robust_list = (0, 0);
    t.last_trap = (0, 0, 0);
    let own = std::mem::replace(&mut t.mm, mm);
    // Both may be the last: not under the lock.
    drop(closed);
    AddressSpace::retire(&own, old_mm);
    drop(own);
    if vfork {
        c.k.sched.wake(WaitKey::VforkDone(c.t.pid));
    }
}

/// Handlers are gone with their program; what is ignored stays ignored.
fn reset_handlers(p: &mut Process) {
    for action in &mut p.actions {
        let handler = if action.handler == SIG_IGN {
            SIG_IGN
        } else {
            0
        };
        *action = SigAction {
            handler,
            ..SigAction::default()
        };
    }
}

fn close_on_exec(p: &mut Process) -> Vec<Fd> {
    let closing: Vec<_> = p
        .files
        .fds
        .iter()
        .filter(|(_, fd)| fd.close_on_exec)
        .map(|(&n, _)| n)
        .collect();
    closing
        .into_iter()
        .filter_map(|n| p.files.fds.remove(&n))
        .collect()
}
