//! fork(2), vfork(2), clone(2), clone3(2): new processes and threads.
//!
//! A new process has its parent's memory copied (lazily) by the memory manager, or shares it
//! (`CLONE_VM`; with `CLONE_VFORK` as `vfork` and `posix_spawn` use it). A thread shares everything a thread can share, as
//! pthread_create(3) asks for it; a thread with files or a working directory of its own, and processes
//! that share those, are `ENOSYS`.

use std::sync::Arc;
use std::sync::Once;

use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

use super::adopt_leader;
use super::threads::{New, insert_thread, may_start};
use crate::linux::Errno;
use crate::linux::call::{
    Arg, Args, CallRecord, Ctx, Entry, Restart, Stop, SysResult, Wait, WaitKey,
};
use crate::linux::process::{AddressSpace, Pid, Prctl, Process, SigAction};
use crate::linux::signal::SIG_IGN;
use crate::linux::signal::frame::USER_END;
use crate::linux::thread::{AltStack, Fpu, Starved, Thread, ThreadShared};

use Arg::{Hex, Int};

/// The family's calls.
pub const TABLE: &[Entry] = &[
    Entry {
        nr: 56,
        name: "clone",
        args: &[Hex, Hex, Hex, Hex, Hex],
        handler: sys_clone,
    },
    Entry {
        nr: 57,
        name: "fork",
        args: &[],
        handler: sys_fork,
    },
    Entry {
        nr: 58,
        name: "vfork",
        args: &[],
        handler: sys_vfork,
    },
    Entry {
        nr: 435,
        name: "clone3",
        args: &[Hex, Int],
        handler: sys_clone3,
    },
];

bitflags::bitflags! {
    /// The flags of clone(2), without the exit signal.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    struct Flags: u64 {
        const VM = 0x100;
        const FS = 0x200;
        const FILES = 0x400;
        const SIGHAND = 0x800;
        const PIDFD = 0x1000;
        const PTRACE = 0x2000;
        const VFORK = 0x4000;
        const PARENT = 0x8000;
        const THREAD = 0x1_0000;
        const NEWNS = 0x2_0000;
        const SYSVSEM = 0x4_0000;
        const SETTLS = 0x8_0000;
        const PARENT_SETTID = 0x10_0000;
        const CHILD_CLEARTID = 0x20_0000;
        const DETACHED = 0x40_0000;
        const UNTRACED = 0x80_0000;
        const CHILD_SETTID = 0x100_0000;
        const NEWCGROUP = 0x200_0000;
        const NEWUTS = 0x400_0000;
        const NEWIPC = 0x800_0000;
        const NEWUSER = 0x1000_0000;
        const NEWPID = 0x2000_0000;
        const NEWNET = 0x4000_0000;
        const IO = 0x8000_0000;
        const CLEAR_SIGHAND = 0x1_0000_0000;
        const INTO_CGROUP = 0x2_0000_0000;
        const NEWTIME = 0x80;
    }
}

/// What processes do not share.
const SHARED: Flags = Flags::SIGHAND
    .union(Flags::FILES)
    .union(Flags::FS)
    .union(Flags::PARENT);

/// What threads always share.
const OF_THREADS: Flags = Flags::THREAD
    .union(Flags::VM)
    .union(Flags::SIGHAND)
    .union(Flags::FILES)
    .union(Flags::FS);

/// New namespaces, process descriptors, control groups: not there.
const REFUSED: Flags = Flags::NEWNS
    .union(Flags::NEWCGROUP)
    .union(Flags::NEWUTS)
    .union(Flags::NEWIPC)
    .union(Flags::NEWUSER)
    .union(Flags::NEWPID)
    .union(Flags::NEWNET)
    .union(Flags::NEWTIME)
    .union(Flags::PIDFD)
    .union(Flags::INTO_CGROUP);

/// What a call asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Request {
    flags: Flags,
    exit_signal: i32,
    /// The child's stack pointer; 0 to keep the parent's.
    stack: u64,
    parent_tid: u64,
    child_tid: u64,
    tls: u64,
}

/// `struct clone_args` up to `CLONE_ARGS_SIZE_VER2`.
#[repr(C)]
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
struct CloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

/// The progress of a call that a child begins with, to do its own part of what its parent asked for. Larger than any
/// process's number.
const BEGINS: u64 = 1 << 32;
// One that has not begun can be in a snapshot.
const _: () = assert!(BEGINS < super::saved::LARGEST && BEGINS > Pid::MAX as u64);

/// `CLONE_ARGS_SIZE_VER0`.
const CLONE_ARGS_MIN: usize = 64;

fn sys_fork(c: &mut Ctx<'_>, _a: &Args) -> SysResult {
    clone(c, Request::plain(Flags::empty()))
}

fn sys_vfork(c: &mut Ctx<'_>, _a: &Args) -> SysResult {
    clone(c, Request::plain(Flags::VM | Flags::VFORK))
}

fn sys_clone(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let flags = a.u64(0) & 0xffff_ffff;
    let request = Request {
        flags: Flags::from_bits_retain(flags & !0xff) - Flags::DETACHED,
        exit_signal: (flags & 0xff) as i32,
        stack: a.u64(1),
        parent_tid: a.u64(2),
        child_tid: a.u64(3),
        tls: a.u64(4),
    };
    clone(c, request)
}

fn sys_clone3(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let size = usize::try_from(a.u64(1)).unwrap_or(usize::MAX);
    if size < CLONE_ARGS_MIN {
        return Err(Errno::INVAL.into());
    }
    if size > 4096 {
        return Err(Errno::TOOBIG.into());
    }
    let mut bytes = vec![0; size];
    c.mem().read(a.u64(0), &mut bytes)?;
    let known = size.min(size_of::<CloneArgs>());
    if bytes[known..].iter().any(|&b| b != 0) {
        return Err(Errno::TOOBIG.into());
    }
    let mut args = CloneArgs::new_zeroed();
    args.as_mut_bytes()[..known].copy_from_slice(&bytes[..known]);
    clone(c, Request::from_clone3(&args)?)
}

impl Request {
    fn plain(flags: Flags) -> Self {
        Self {
            flags,
            exit_signal: libc::SIGCHLD,
            stack: 0,
            parent_tid: 0,
            child_tid: 0,
            tls: 0,
        }
    }

    fn from_clone3(args: &CloneArgs) -> Result<Self, Errno> {
        let flags = Flags::from_bits(args.flags).ok_or(Errno::INVAL)?;
        let stack = match (args.stack, args.stack_size) {
            (0, 0) => 0,
            (0, _) | (_, 0) => return Err(Errno::INVAL),
            (base, size) => base
                .checked_add(size)
                .filter(|&top| top <= USER_END)
                .ok_or(Errno::INVAL)?,
        };
        let detached = flags.contains(Flags::DETACHED);
        let thread_signals = flags.contains(Flags::THREAD) && args.exit_signal != 0;
        if detached
            || thread_signals
            || args.exit_signal > 64
            || args.set_tid != 0
            || args.set_tid_size != 0
        {
            return Err(Errno::INVAL);
        }
        Ok(Self {
            flags,
            exit_signal: args.exit_signal as i32,
            stack,
            parent_tid: args.parent_tid,
            child_tid: args.child_tid,
            tls: args.tls,
        })
    }

    /// The call the child begins with, if it has anything to do.
    fn beginning(&self) -> Option<CallRecord> {
        let own = self.flags.contains(Flags::CHILD_SETTID) || !self.flags.contains(Flags::VM);
        let args = [self.flags.bits(), 0, 0, self.child_tid, 0, 0];
        own.then(|| CallRecord {
            nr: libc::SYS_clone as u64,
            args: Args(args),
            progress: BEGINS,
            ..CallRecord::default()
        })
    }

    /// Which requests there are.
    fn check(&self) -> Result<(), Errno> {
        let flags = self.flags;
        if self.exit_signal > 64 || (flags.contains(Flags::SIGHAND) && !flags.contains(Flags::VM)) {
            return Err(Errno::INVAL);
        }
        if flags.contains(Flags::THREAD) && !flags.contains(Flags::SIGHAND) {
            return Err(Errno::INVAL);
        }
        if flags.intersects(REFUSED) {
            return Err(Errno::INVAL);
        }
        let thread = flags.contains(Flags::THREAD);
        let offered = if thread {
            flags.contains(OF_THREADS) && !flags.intersects(Flags::VFORK | Flags::PARENT)
        } else {
            !flags.intersects(SHARED)
        };
        if !offered {
            static ONCE: Once = Once::new();
            ONCE.call_once(|| {
                tracing::warn!(
                    flags = format_args!("{:#x}", flags.bits()),
                    "this mixture of shared and own things is not offered: clone gives ENOSYS"
                );
            });
            return Err(Errno::NOSYS);
        }
        if flags.contains(Flags::SETTLS) && self.tls >= USER_END {
            return Err(Errno::PERM);
        }
        if self.stack > USER_END {
            return Err(Errno::INVAL);
        }
        Ok(())
    }
}

/// Makes the child; a `vfork` parent then waits for it in the same call.
fn clone(c: &mut Ctx<'_>, request: Request) -> SysResult {
    match c.call.progress {
        0 => {}
        BEGINS => return begin(c, &request),
        child => return wait_for_vfork(c, child as Pid),
    }
    request.check()?;
    let new = if request.flags.contains(Flags::THREAD) {
        New::Thread
    } else {
        New::Process
    };
    may_start(c, &c.k.state(), new)?;
    let mm = child_memory(c, request.flags)?;
    let fpu = child_fpu(c)?;
    let mut thread = child_thread(c, &request, mm, fpu);
    let pid = match new {
        New::Process => insert_child(c, &request, &mut thread)?,
        New::Thread => insert_thread(c, &mut thread)?,
    };
    if !Arc::ptr_eq(&c.t.mm, &thread.mm) {
        thread.mm.inherit_guards(&c.t.mm, pid);
    }
    if request.flags.contains(Flags::PARENT_SETTID) {
        // As Linux: an address that cannot be written is the caller's own problem.
        let _ = c.mem().write_obj(request.parent_tid, &pid);
    }
    if !request.flags.contains(Flags::VM) {
        // Before the child runs beside it, and both want the same locks.
        c.t.foresee(&c.k.memory);
    }
    c.k.sched.enqueue(thread);
    if request.flags.contains(Flags::VFORK) {
        c.call.progress = pid as u64;
        return wait_for_vfork(c, pid);
    }
    Ok(pid as u64)
}

/// Whether a call in progress is the beginning of a child, which has not made it itself.
pub fn is_beginning(call: &CallRecord) -> bool {
    call.nr == libc::SYS_clone as u64 && call.progress == BEGINS
}

/// What a child does first: as on Linux, what is for it alone is not its parent's work.
fn begin(c: &mut Ctx<'_>, request: &Request) -> SysResult {
    if request.flags.contains(Flags::CHILD_SETTID) {
        // As Linux: an address that cannot be written is the caller's own problem.
        let _ = c.mem().write_obj(request.child_tid, &c.t.tid);
    }
    if !request.flags.contains(Flags::VM) {
        c.t.foresee(&c.k.memory);
    }
    Ok(0)
}

fn wait_for_vfork(c: &mut Ctx<'_>, child: Pid) -> SysResult {
    let waits = c.k.state().procs.get(&child).is_some_and(|p| p.vfork_waits);
    if !waits {
        return Ok(child as u64);
    }
    let keys = vec![WaitKey::VforkDone(child)];
    Err(Stop::Block(Wait {
        keys,
        deadline: None,
        restart: Restart::Uninterruptible,
    }))
}

fn child_memory(c: &Ctx<'_>, flags: Flags) -> Result<Arc<AddressSpace>, Errno> {
    if flags.contains(Flags::VM) {
        return Ok(Arc::clone(&c.t.mm));
    }
    let memory = &c.k.memory;
    let layout = c.t.mm.layout.lock().clone();
    let child = memory.fork(&c.t.mm.space).map_err(|_| Errno::NOMEM)?;
    Ok(AddressSpace::new(memory, child, layout))
}

fn child_fpu(c: &mut Ctx<'_>) -> Result<Fpu, Errno> {
    c.cpu.copy_fpu(&c.t.fpu).map_err(|error| {
        tracing::error!(pid = c.t.pid, %error, "a process could not be copied");
        Errno::NOMEM
    })
}

fn child_thread(c: &Ctx<'_>, request: &Request, mm: Arc<AddressSpace>, fpu: Fpu) -> Box<Thread> {
    let parent = &*c.t;
    let mut regs = parent.regs;
    regs.rax = 0;
    if request.stack != 0 {
        regs.rsp = request.stack;
    }
    if request.flags.contains(Flags::SETTLS) {
        regs.fs_base = request.tls;
    }
    let clear = request.flags.contains(Flags::CHILD_CLEARTID);
    // One stack for signals is for one thread.
    let altstack = match request.flags & (Flags::VM | Flags::VFORK) {
        Flags::VM => AltStack::default(),
        _ => parent.altstack,
    };
    Box::new(Thread {
        tid: 0,
        pid: 0,
        regs,
        fpu,
        last_cpu: None,
        call: request.beginning(),
        mask: parent.mask,
        saved_mask: None,
        altstack,
        clear_child_tid: if clear { request.child_tid } else { 0 },
        robust_list: (0, 0),
        personality: parent.personality,
        mm,
        last_trap: (0, 0, 0),
        starved: Starved::default(),
        image: None,
        yields: false,
        account: 0,
        shared: Arc::new(ThreadShared::default()),
    })
}

/// Gives the child its pid and its place in the tree.
fn insert_child(c: &Ctx<'_>, request: &Request, thread: &mut Thread) -> Result<Pid, Errno> {
    let started = c.k.clock.monotonic();
    let mut state = c.k.state();
    may_start(c, &state, New::Process)?;
    let pid = state.allocate_pid()?;
    thread.tid = pid;
    thread.pid = pid;
    let mut child = inherit(state.process(c.t.pid)?, pid);
    child.started = started;
    child.exit_signal = request.exit_signal;
    child.vfork_waits = request.flags.contains(Flags::VFORK);
    child.mm = Some(Arc::clone(&thread.mm));
    if request.flags.contains(Flags::CLEAR_SIGHAND) {
        for action in child.actions.iter_mut().filter(|a| a.handler != SIG_IGN) {
            *action = SigAction::default();
        }
    }
    adopt_leader(&mut state, child, thread);
    Ok(pid)
}

/// What a child has from its parent (fork(2)).
fn inherit(parent: &Process, pid: Pid) -> Process {
    let prctl = Prctl {
        death_signal: 0,
        subreaper: false,
        ..parent.prctl
    };
    Process {
        ppid: parent.pid,
        pgid: parent.pgid,
        sid: parent.sid,
        actions: parent.actions,
        files: parent.files.clone(),
        umask: parent.umask,
        cred: parent.cred.clone(),
        rlimits: parent.rlimits,
        exe: parent.exe.clone(),
        comm: parent.comm.clone(),
        nice: parent.nice,
        prctl,
        ..Process::new(pid, parent.cwd.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fork_and_vfork_are_offered() {
        assert_eq!(Request::plain(Flags::empty()).check(), Ok(()));
        assert_eq!(Request::plain(Flags::VM | Flags::VFORK).check(), Ok(()));
        assert_eq!(
            Request::plain(Flags::CHILD_SETTID | Flags::CHILD_CLEARTID).check(),
            Ok(())
        );
    }

    #[test]
    fn thread_shares_all_or_is_refused() {
        let settings = Flags::SETTLS | Flags::PARENT_SETTID | Flags::CHILD_CLEARTID;
        let pthread = OF_THREADS | Flags::SYSVSEM | settings;
        assert_eq!(Request::plain(pthread).check(), Ok(()));
        assert_eq!(
            Request::plain(pthread - Flags::FILES).check(),
            Err(Errno::NOSYS)
        );
        assert_eq!(
            Request::plain(pthread | Flags::VFORK).check(),
            Err(Errno::NOSYS)
        );
        assert_eq!(Request::plain(Flags::VM).check(), Ok(()));
        assert_eq!(
            Request::plain(Flags::VM | Flags::FILES).check(),
            Err(Errno::NOSYS)
        );
    }

    #[test]
    fn contradictory_flags_are_invalid() {
        assert_eq!(Request::plain(Flags::THREAD).check(), Err(Errno::INVAL));
        assert_eq!(Request::plain(Flags::SIGHAND).check(), Err(Errno::INVAL));
        assert_eq!(Request::plain(Flags::NEWPID).check(), Err(Errno::INVAL));
    }

    #[test]
    fn kernel_addresses_are_refused() {
        let tls = Request {
            tls: 1 << 63,
            ..Request::plain(Flags::SETTLS)
        };
        assert_eq!(tls.check(), Err(Errno::PERM));
        let stack = Request {
            stack: 1 << 62,
            ..Request::plain(Flags::empty())
        };
        assert_eq!(stack.check(), Err(Errno::INVAL));
    }

    #[test]
    fn clone3_stack_grows_from_its_top() {
        let mut args = CloneArgs::new_zeroed();
        (args.stack, args.stack_size, args.exit_signal) = (0x1000, 0x2000, 17);
        assert_eq!(Request::from_clone3(&args).map(|r| r.stack), Ok(0x3000));
        args.stack_size = u64::MAX;
        assert_eq!(Request::from_clone3(&args), Err(Errno::INVAL));
        args.stack_size = 0;
        assert_eq!(Request::from_clone3(&args), Err(Errno::INVAL));
    }
}
