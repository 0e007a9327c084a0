//! The point of no return: a loaded program takes the place of the one that called `execve`.

use std::sync::Arc;

use super::load::Loaded;
use crate::linux::call::{Ctx, WaitKey};
use crate::linux::file::Location;
use crate::linux::kernel::Kernel;
use crate::linux::process::{AddressSpace, Fd, Process, SigAction};
use crate::linux::thread::{AltStack, Fpu, Regs};

/// Signal handler value `SIG_IGN`.
const SIG_IGN: u64 = 1;
/// `SIGCHLD`.
const SIGCHLD: i32 = 17;
/// RFLAGS at entry: interrupts enabled, and the bit that is always set.
const INITIAL_RFLAGS: u64 = 0x202;

/// Makes the calling thread run `loaded`.
pub(super) fn switch(c: &mut Ctx<'_>, loaded: Loaded) {
    let Loaded {
        mm,
        rip,
        rsp,
        exe,
        comm,
    } = loaded;
    let (closed, vfork_done) = c.with_process(|p| {
        p.mm = Some(Arc::clone(&mm));
        p.comm = comm;
        p.exe = exe.unwrap_or_else(|| Location {
            mount: 0,
            path: Vec::new(),
        });
        p.has_execed = true;
        p.exit_signal = SIGCHLD;
        p.cred.uid[2] = p.cred.uid[1];
        p.cred.gid[2] = p.cred.gid[1];
        reset_actions(p);
        (take_closed_on_exec(p), std::mem::take(&mut p.vfork_waits))
    });
    // Outside the state lock: closing may wake others or call the host.
    drop(closed);
    let old = std::mem::replace(&mut c.t.mm, mm);
    reset_thread(c, rip, rsp);
    release_space(c.k, &old);
    if vfork_done {
        c.k.sched.wake(WaitKey::VforkDone(c.t.pid));
    }
}

/// Handlers are gone with the old program; what was ignored stays ignored.
fn reset_actions(p: &mut Process) {
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

fn take_closed_on_exec(p: &mut Process) -> Vec<Fd> {
    p.files
        .fds
        .extract_if(.., |_, fd| fd.close_on_exec)
        .map(|(_, fd)| fd)
        .collect()
}

fn reset_thread(c: &mut Ctx<'_>, rip: u64, rsp: u64) {
    c.t.regs = Regs {
        rip,
        rsp,
        rflags: INITIAL_RFLAGS,
        ..Regs::default()
    };
    c.t.fpu = Fpu::Initial;
    c.t.altstack = AltStack::default();
    c.t.clear_child_tid = 0;
    c.t.robust_list = (0, 0);
}

/// Deletes a space if no process runs in it any more.
pub fn release_space(k: &Kernel, mm: &Arc<AddressSpace>) {
    let used = k
        .state()
        .procs
        .values()
        .any(|p| p.mm.as_ref().is_some_and(|used| Arc::ptr_eq(used, mm)));
    if !used {
        k.memory.submit(k.memory.manager.delete_space(&mm.space));
    }
}
