//! Processes and threads as data.
//!
//! What can be found from the rest is not kept and never believed: who whose child is follows from the parents,
//! a process's threads and their masks from the threads.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

use super::image::Image;
use super::posix_timers::PosixTimers;
use super::{comm, limits};
use crate::linux::call::{Args, CallRecord, Restart};
use crate::linux::exec::USER_END;
use crate::linux::file::Location;
use crate::linux::process::{
    Credentials, Fd, FdTable, INIT, Life, MmLayout, PID_MAX, Pending, Pid, Prctl, Process, SIGNALS,
    SigAction, Unreported, Usage,
};
use crate::linux::saved::error::{Damaged, Refused, RestoreError, require};
use crate::linux::saved::tables::{DescriptionIx, SpaceIx};
use crate::linux::saved::{Loader, Saver};
use crate::linux::signal::xsave;
use crate::linux::thread::{AltStack, Fpu, Regs, Starved, Thread, ThreadShared, Tid, XsaveArea};

/// Counters and times are below this, so that sums of them are numbers.
pub(super) const LARGEST: u64 = 1 << 62;
/// Bytes of the instruction `SYSCALL`.
const SYSCALL_BYTES: u64 = 2;
/// Bytes that argument or environment strings have at most.
const MOST_STRINGS: u64 = 64 << 20;
/// Bytes of an auxiliary vector at most.
const MOST_AUXV: usize = 4096;

/// A process.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SavedProcess {
    pid: Pid,
    ppid: Pid,
    pgid: Pid,
    sid: Pid,
    has_execed: bool,
    life: Life,
    unreported: Unreported,
    exiting: Option<i32>,
    exec: Option<Tid>,
    exit_signal: i32,
    thread_pending: BTreeMap<Tid, Pending>,
    thread_names: BTreeMap<Tid, Vec<u8>>,
    pending: Pending,
    /// Those that are not the default, by signal.
    actions: BTreeMap<i32, SigAction>,
    fds: BTreeMap<i32, (DescriptionIx, bool)>,
    cwd: Location,
    umask: u32,
    cred: Credentials,
    rlimits: [(u64, u64); 16],
    mm: Option<SpaceIx>,
    exe: Location,
    comm: Vec<u8>,
    nice: i32,
    vfork_waits: bool,
    itimer_real: Option<(u64, u64)>,
    itimer_cpu: [Option<(u64, u64)>; 2],
    posix_timers: PosixTimers,
    prctl: Prctl,
    started: u64,
    usage: Usage,
    children_usage: Usage,
}

impl SavedProcess {
    pub(in crate::linux) fn of(process: &Process, s: &mut Saver<'_>) -> Self {
        let p = process;
        let actions = (1..).zip(p.actions);
        let mut fd =
            |(&n, fd): (&i32, &Fd)| (n, (s.description(&fd.description), fd.close_on_exec));
        Self {
            fds: p.files.fds.iter().map(&mut fd).collect(),
            mm: p.mm.as_ref().map(|mm| s.space(mm)),
            pid: p.pid,
            ppid: p.ppid,
            pgid: p.pgid,
            sid: p.sid,
            has_execed: p.has_execed,
            life: p.life,
            unreported: p.unreported,
            exiting: p.exiting,
            exec: p.exec,
            exit_signal: p.exit_signal,
            thread_pending: p.thread_pending.clone(),
            thread_names: p.thread_names.clone(),
            pending: p.pending.clone(),
            actions: actions
                .filter(|(_, a)| *a != SigAction::default())
                .collect(),
            cwd: p.cwd.clone(),
            umask: p.umask,
            cred: p.cred.clone(),
            rlimits: p.rlimits,
            exe: p.exe.clone(),
            comm: p.comm.clone(),
            nice: p.nice,
            vfork_waits: p.vfork_waits,
            itimer_real: p.itimer_real,
            itimer_cpu: p.itimer_cpu,
            posix_timers: p.posix_timers.clone(),
            prctl: p.prctl,
            started: p.started,
            usage: p.usage,
            children_usage: p.children_usage,
        }
    }

    pub(in crate::linux) fn pid(&self) -> Pid {
        self.pid
    }

    /// Makes it again, without threads and children.
    pub(in crate::linux) fn load(&self, l: &Loader<'_>) -> Result<Process, RestoreError> {
        self.check()?;
        l.place(&self.cwd)?;
        l.place(&self.exe)?;
        let mut fds = BTreeMap::new();
        for (&n, &(description, close_on_exec)) in &self.fds {
            require(n >= 0, "a descriptor's number")?;
            let description = Arc::clone(l.description(description)?);
            fds.insert(
                n,
                Fd {
                    description,
                    close_on_exec,
                },
            );
        }
        let mm = self.mm.map(|mm| l.space(mm).cloned()).transpose()?;
        Ok(Process {
            pid: self.pid,
            ppid: self.ppid,
            pgid: self.pgid,
            sid: self.sid,
            has_execed: self.has_execed,
            life: self.life,
            unreported: self.unreported,
            exiting: self.exiting,
            exec: self.exec,
            exit_signal: self.exit_signal,
            children: BTreeSet::new(),
            threads: BTreeMap::new(),
            thread_pending: checked_all(&self.thread_pending),
            thread_masks: BTreeMap::new(),
            thread_names: self
                .thread_names
                .iter()
                .map(|(&t, n)| (t, comm(n)))
                .collect(),
            pending: checked(&self.pending),
            actions: self.actions()?,
            files: FdTable { fds },
            cwd: self.cwd.clone(),
            umask: self.umask & 0o777,
            cred: self.cred.clone(),
            rlimits: self.rlimits,
            mm,
            exe: self.exe.clone(),
            comm: comm(&self.comm),
            nice: self.nice.clamp(-20, 19),
            vfork_waits: self.vfork_waits,
            itimer_real: self.itimer_real,
            itimer_cpu: self.itimer_cpu,
            posix_timers: self.posix_timers.clone(),
            prctl: self.prctl,
            started: self.started,
            usage: self.usage,
            children_usage: self.children_usage,
        })
    }

    fn check(&self) -> Result<(), Damaged> {
        let id = |pid: Pid| (0..PID_MAX).contains(&pid);
        require((1..PID_MAX).contains(&self.pid), "a process's number")?;
        let ids = id(self.ppid) && id(self.pgid) && id(self.sid);
        require(ids, "a process's family")?;
        require(
            (0..=SIGNALS as i32).contains(&self.exit_signal),
            "a signal's number",
        )?;
        if let Life::Stopped(signo) = self.life {
            require((1..=SIGNALS as i32).contains(&signo), "a signal's number")?;
        }
        let ended = matches!(self.life, Life::Zombie(_)) || self.pid == INIT;
        require(ended == self.mm.is_none(), "a process's memory")?;
        let usages = [self.usage, self.children_usage];
        let small = |u: &Usage| {
            [u.cpu_ns, u.minor_faults, u.major_faults, u.peak_pages]
                .iter()
                .all(|&n| n < LARGEST)
        };
        require(usages.iter().all(small), "a process's usage")?;
        require(self.posix_timers.are_sound(), "a process's timers")?;
        require(self.started < LARGEST, "a process's start")?;
        let nproc = self.rlimits[limits::NPROC];
        require(nproc.0 <= nproc.1, "a limit")
    }

    fn actions(&self) -> Result<[SigAction; SIGNALS], Damaged> {
        let mut actions = [SigAction::default(); SIGNALS];
        for (&signo, &action) in &self.actions {
            let slot = usize::try_from(signo - 1)
                .ok()
                .and_then(|n| actions.get_mut(n));
            *slot.ok_or(Damaged("a signal's number"))? = action;
        }
        Ok(actions)
    }
}

/// Signals as they would have been queued.
fn checked(saved: &Pending) -> Pending {
    let mut pending = Pending::default();
    let known = |signo: i32| (1..=SIGNALS as i32).contains(&signo);
    let known = saved.queue.iter().filter(|info| known(info.signo));
    known.for_each(|info| pending.push(*info));
    pending
}

fn checked_all(saved: &BTreeMap<Tid, Pending>) -> BTreeMap<Tid, Pending> {
    saved.iter().map(|(&tid, p)| (tid, checked(p))).collect()
}

/// A thread.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SavedThread {
    tid: Tid,
    pid: Pid,
    regs: Regs,
    /// `None`: the state a program starts with.
    fpu: Option<XsaveArea>,
    call: Option<SavedCall>,
    mask: u64,
    saved_mask: Option<u64>,
    altstack: AltStack,
    clear_child_tid: u64,
    robust_list: (u64, u64),
    personality: u32,
    mm: SpaceIx,
    last_trap: (u64, u64, u64),
    image: Option<SavedImage>,
    cpu_time: u64,
}

/// A call that is to be made again.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct SavedCall {
    nr: u64,
    args: Args,
    deadline: Option<u64>,
    progress: u64,
    opened: Option<DescriptionIx>,
    interrupted: Option<Restart>,
}

/// A program that `execve` has loaded.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct SavedImage {
    mm: SpaceIx,
    exe: Location,
    comm: Vec<u8>,
    regs: Regs,
}

impl SavedThread {
    pub(in crate::linux) fn of(t: &Thread, s: &mut Saver<'_>) -> Result<Self, Refused> {
        let fpu = match &t.fpu {
            Fpu::Saved(area) => Some(area.clone()),
            Fpu::Left(left) => Some(left.get().map_err(Refused::Cpu)?),
            Fpu::Initial => None,
            Fpu::Live => {
                debug_assert!(false, "it is out of the virtual CPU");
                None
            }
        };
        Ok(Self {
            tid: t.tid,
            pid: t.pid,
            regs: before_call(t.regs),
            fpu,
            call: t.call.as_ref().map(|call| SavedCall {
                nr: call.nr,
                args: call.args,
                deadline: call.deadline,
                progress: call.progress,
                opened: call.opened.as_ref().map(|d| s.description(d)),
                interrupted: call.interrupted,
            }),
            mask: t.mask,
            saved_mask: t.saved_mask,
            altstack: t.altstack,
            clear_child_tid: t.clear_child_tid,
            robust_list: t.robust_list,
            personality: t.personality,
            mm: s.space(&t.mm),
            last_trap: t.last_trap,
            image: t.image.as_ref().map(|image| SavedImage {
                mm: s.space(&image.mm),
                exe: image.exe.clone(),
                comm: image.comm.clone(),
                regs: image.regs,
            }),
            cpu_time: t.shared.cpu_time.load(Ordering::Relaxed),
        })
    }

    pub(in crate::linux) fn tid(&self) -> Tid {
        self.tid
    }

    pub(in crate::linux) fn space(&self) -> SpaceIx {
        self.mm
    }

    /// Whether it is in a futex(2) that waits.
    pub(in crate::linux) fn waits_for_futex(&self) -> bool {
        let waits = |call: &SavedCall| call.nr == libc::SYS_futex as u64 && call.progress == 1;
        self.call.as_ref().is_some_and(waits)
    }

    /// Makes it again. Before it goes back to the guest it looks at its process, as after any wait.
    pub(in crate::linux) fn load(&self, l: &Loader<'_>) -> Result<Thread, RestoreError> {
        require((1..PID_MAX).contains(&self.tid), "a thread's number")?;
        require(self.cpu_time < LARGEST, "a thread's time")?;
        check_regs(&self.regs)?;
        let fpu = match &self.fpu {
            Some(area) => Fpu::Saved(load_fpu(area, l)?),
            None => Fpu::Initial,
        };
        let call = self.call.as_ref().map(|call| call.load(l)).transpose()?;
        let image = self.image.as_ref().map(|image| image.load(l)).transpose()?;
        Ok(Thread {
            tid: self.tid,
            pid: self.pid,
            regs: self.regs,
            fpu,
            last_cpu: None,
            call,
            mask: self.mask & !crate::linux::signal::UNBLOCKABLE,
            saved_mask: self.saved_mask,
            altstack: self.altstack,
            clear_child_tid: self.clear_child_tid,
            robust_list: self.robust_list,
            personality: self.personality,
            mm: Arc::clone(l.space(self.mm)?),
            last_trap: self.last_trap,
            starved: Starved::default(),
            image,
            yields: false,
            account: 0,
            shared: Arc::new(ThreadShared {
                attention: AtomicBool::new(true),
                cpu_time: AtomicU64::new(self.cpu_time),
            }),
        })
    }
}

/// Where `SYSCALL` ends up in ring 3, a thread may have been stopped there, before the call was seen. It makes
/// the call again: on another host the place may not be a program's. `SYSCALL` has left RIP in RCX and RFLAGS
/// in R11.
fn before_call(regs: Regs) -> Regs {
    if regs.rip != guest::abi::SYSCALL_STUB_VA {
        return regs;
    }
    Regs {
        rip: regs.rcx.wrapping_sub(SYSCALL_BYTES),
        rflags: regs.r11,
        ..regs
    }
}

/// The bases may be in either half, as programs can set them without a call.
fn check_regs(regs: &Regs) -> Result<(), Damaged> {
    let canonical = |base: u64| matches!((base as i64) >> 47, 0 | -1);
    require(
        canonical(regs.fs_base) && canonical(regs.gs_base),
        "a thread's registers",
    )
}

/// The state as this machine can load it.
fn load_fpu(area: &XsaveArea, l: &Loader<'_>) -> Result<XsaveArea, RestoreError> {
    let (fresh, components) = l.fpu();
    if area.0.len() != fresh.0.len() {
        return Err(RestoreError::Processor);
    }
    let mut area = area.0.clone();
    xsave::restrict(&mut area, components);
    let area = xsave::import(area, components, &fresh.0);
    Ok(XsaveArea(
        area.map_err(|_| Damaged("a thread's FPU state"))?,
    ))
}

impl SavedCall {
    fn load(&self, l: &Loader<'_>) -> Result<CallRecord, Damaged> {
        require(self.progress < LARGEST, "a call's progress")?;
        let opened = self.opened.map(|d| l.description(d).cloned()).transpose()?;
        Ok(CallRecord {
            nr: self.nr,
            args: self.args,
            deadline: self.deadline,
            progress: self.progress,
            opened,
            interrupted: self.interrupted,
        })
    }
}

impl SavedImage {
    fn load(&self, l: &Loader<'_>) -> Result<Box<Image>, RestoreError> {
        l.place(&self.exe)?;
        check_regs(&self.regs)?;
        Ok(Box::new(Image {
            mm: Arc::clone(l.space(self.mm)?),
            exe: self.exe.clone(),
            comm: self.comm.clone(),
            regs: self.regs,
        }))
    }
}

/// Whether a layout can be a program's.
pub(in crate::linux) fn check_layout(layout: &MmLayout) -> Result<(), Damaged> {
    let MmLayout {
        brk_start,
        brk,
        stack,
        mmap_top,
        args,
        envs,
        auxv,
    } = layout;
    let ordered = |(start, end): (u64, u64)| start <= end && end <= USER_END;
    let short = |(start, end): (u64, u64)| ordered((start, end)) && end - start <= MOST_STRINGS;
    let good = ordered((*brk_start, *brk))
        && ordered(*stack)
        && *mmap_top <= USER_END
        && short(*args)
        && short(*envs)
        && auxv.len() <= MOST_AUXV;
    require(good, "an address space's layout")
}
