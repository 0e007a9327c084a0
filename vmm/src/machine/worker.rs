//! A worker: a host thread with a virtual CPU that runs guest threads, one at a time.
//!
//! The protocol between this loop and the signals of the Linux layer is described in
//! [`crate::linux::signal`]. A worker whose machine has nothing to do for a while rests (`worker/rest.rs`).

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use shadow_mm::{Access, Pfn};

use super::fpu::FpuSwitch;
use super::guests::Guests;
use super::kick::Kicker;
use super::stats::{Counters, count};
use super::strace::Strace;
use super::trap::{self, Faulted};
use super::victim::{self, Verdict};
use crate::hv::kvm::vcpu::Vcpu;
use crate::hv::{CpuError, Exit, Flush, Trap};
use crate::linux::Errno;
use crate::linux::call::{Args, CallRecord, Ctx, Stop, Wait};
use crate::linux::kernel::Kernel;
use crate::linux::process::SigInfo;
use crate::linux::saved::identity;
use crate::linux::sched::roster::Task;
use crate::linux::sched::{Kick, Leave, Sched};
use crate::linux::signal::{self, Outcome, Settled};
use crate::linux::table::Table;
use crate::linux::thread::{Cpu, Starved, Thread};
use crate::linux::user_mem::UserMem;
use crate::linux::vdso::data::CpuSource;
use crate::memory::{Eject, Memory, Room};

mod rest;
use rest::State;
pub(super) use rest::refused;

/// What all workers that run a guest share.
pub struct Shared {
    /// The Linux layer.
    pub kernel: Arc<Kernel>,
    /// The system calls.
    pub table: &'static Table,
    /// What is counted.
    pub counters: Counters,
    /// Where system calls are shown, if they are.
    pub strace: Option<Strace>,
    /// How programs learn which processor they run on.
    pub cpu_source: CpuSource,
    /// How long it may run.
    pub limit: Limit,
}

/// A guest's time limit.
#[derive(Debug, Default)]
pub struct Limit {
    at: OnceLock<u64>,
    passed: AtomicBool,
}

impl Limit {
    /// Whether the guest was ended because of it.
    pub fn has_passed(&self) -> bool {
        self.passed.load(Ordering::SeqCst)
    }
}

impl Shared {
    /// The guest ends after this time, from now on; to be said before it runs.
    pub fn end_after(&self, time: Duration) {
        let now = self.kernel.clock.monotonic();
        let at = now.saturating_add(time.as_nanos() as u64);
        let first = self.limit.at.set(at).is_ok();
        debug_assert!(first, "a guest is started once");
    }

    /// The clock thread's round: deadlines, turns, timers, the vDSO's page, the time limit.
    pub fn round(&self) {
        let now = || self.kernel.clock.monotonic();
        self.kernel.sched.round(now, || self.tick());
    }

    /// Lets the guest go, with its first round.
    pub fn begin(&self) {
        let now = || self.kernel.clock.monotonic();
        self.kernel.sched.begin(now, || self.tick());
    }

    fn tick(&self) -> Option<u64> {
        let kernel = &self.kernel;
        let limit = self.limit.at.get().copied();
        if limit.is_some_and(|at| kernel.clock.monotonic() >= at) {
            self.limit.passed.store(true, Ordering::SeqCst);
            kernel.sched.end();
        }
        let page = crate::linux::vdso::page(&kernel.memory);
        let clock = kernel.clock.tick(Some(&page), self.cpu_source);
        let timers = crate::linux::proc::timers_due(kernel);
        [limit, clock, timers].into_iter().flatten().min()
    }
}

/// How often in a row a thread finds no memory for a page, although there was some, before somebody is ended for it.
const STARVED: u32 = 64;

/// A worker.
pub struct Worker {
    guests: Arc<Guests>,
    memory: Arc<Memory>,
    index: usize,
    cpu: Vcpu,
    fpu: FpuSwitch,
    kicker: Arc<Kicker>,
    /// The page tables of no program, for errands.
    idle: Pfn,
    /// A kick of the scheduler was taken where it could not be acted on.
    look: bool,
}

impl Worker {
    /// A worker with virtual CPU `cpu`, to be made on the thread that will run it. `idle` is a root
    /// without programs.
    ///
    /// # Errors
    /// KVM refused the signal mask or the FPU state.
    pub fn new(
        guests: Arc<Guests>,
        cpu: Vcpu,
        components: u64,
        idle: Pfn,
    ) -> Result<Self, CpuError> {
        let kicker = Arc::new(Kicker::for_this_thread());
        cpu.set_kick_signal(Kicker::signal())?;
        let index = cpu.index() as usize;
        let fpu = FpuSwitch::new(&cpu, components)?;
        let eject = Arc::clone(&kicker) as Arc<dyn Eject>;
        let memory = Arc::clone(&guests.memory);
        memory.flushes.set_eject(index, eject);
        Ok(Self {
            guests,
            memory,
            index,
            cpu,
            fpu,
            kicker,
            idle,
            look: false,
        })
    }

    /// Runs guest threads until the machine ends.
    ///
    /// # Errors
    /// KVM refused to go on: the machine cannot either.
    pub fn run(self) -> Result<(), CpuError> {
        let (guests, memory) = (Arc::clone(&self.guests), Arc::clone(&self.memory));
        let (kicker, index) = (Arc::clone(&self.kicker), self.index);
        let kick: Arc<dyn Kick> = Arc::clone(&kicker) as _;
        let errand = || memory.flushes.errand_waits();
        let mut state = State::Awake(self);
        loop {
            kicker.forget();
            state = match guests.roster.next(index, &kick, errand) {
                Task::Guest(id) => {
                    // One that is no more wants no worker.
                    let guest = guests.get(id);
                    let thread = guest.as_ref().and_then(|g| g.kernel.sched.start(&kick));
                    match (&guest, thread) {
                        (Some(guest), Some(thread)) => {
                            let tid = thread.tid;
                            let ran = state.wake().and_then(|mut worker| {
                                worker.run_thread(guest, thread)?;
                                Ok(State::Awake(worker))
                            });
                            if ran.is_err() {
                                // Nobody is to wait for it when the guest is taken down.
                                guest.kernel.sched.forget(tid);
                            }
                            ran?
                        }
                        (Some(_) | None, _) => state,
                    }
                }
                Task::Errand => {
                    let mut worker = state.wake()?;
                    worker.errands()?;
                    State::Awake(worker)
                }
                Task::Rest => state.rest(),
                Task::End => return Ok(()),
            }
        }
    }

    /// Touches every table that waits for it, so that flushes of spaces that do not run are done too.
    pub(super) fn errands(&mut self) -> Result<(), CpuError> {
        let memory = Arc::clone(&self.memory);
        while let Some(entry) = memory.flushes.errand(self.index, self.idle) {
            let touched = self.cpu.touch(self.idle.gpa(), &entry.touches);
            let done = matches!(touched, Ok(true));
            memory.acknowledge(memory.flushes.errand_done(&entry, done));
            if !touched? {
                // Kicked, perhaps to look at a thread: once this is done.
                self.look |= self.kicker.taken();
            }
        }
        Ok(())
    }

    /// Has every flush that waits finished, so that its frames can be used. False if none did.
    fn finish_flushes(&mut self) -> Result<bool, CpuError> {
        let memory = Arc::clone(&self.memory);
        let any = memory.flushes.pending();
        if any {
            self.errands()?;
            memory.flushes.settle();
        }
        Ok(any)
    }

    /// Waits for frames, and does meanwhile what others that want some wait for. False if there will be
    /// none.
    fn make_room(&mut self, shared: &Shared) -> Result<bool, CpuError> {
        let memory = Arc::clone(&self.memory);
        let sched = &shared.kernel.sched;
        // A thread that is to be put back faults again when it runs again.
        while !sched.has_ended() && !sched.is_stopping() {
            match memory.wait_for_room() {
                Room::There => return Ok(true),
                Room::Never => return Ok(false),
                Room::Wait => self.errands()?,
            }
        }
        Ok(true)
    }

    /// Runs one thread until it is parked, ended, or it is another's turn.
    fn run_thread(&mut self, shared: &Shared, mut thread: Box<Thread>) -> Result<(), CpuError> {
        let sched = &shared.kernel.sched;
        let mut since = Instant::now();
        while !sched.has_ended() {
            if sched.is_stopping() {
                self.fpu.leave(&mut self.cpu, &mut thread);
                sched.put_back(thread);
                return Ok(());
            }
            let seen = sched.epoch();
            let turn = self.turn(shared, &mut thread)?;
            let now = Instant::now();
            let spent = now.duration_since(since).as_nanos() as u64;
            thread.shared.cpu_time.fetch_add(spent, Ordering::Relaxed);
            since = now;
            let turn = match turn {
                // Nobody wants what it waits for any more, nor its FPU state.
                Turn::Park(_) | Turn::Leave(_) if sched.has_ended() => Turn::Again,
                turn => turn,
            };
            let back = match turn {
                Turn::Again => Some(thread),
                Turn::Exited => {
                    end(sched, thread);
                    None
                }
                Turn::Park(wait) => {
                    self.fpu.leave(&mut self.cpu, &mut thread);
                    sched.park(thread, wait, seen).err()
                }
                Turn::Leave(how) => {
                    self.fpu.leave(&mut self.cpu, &mut thread);
                    sched.yield_running(thread, how).err()
                }
            };
            match back {
                Some(again) => thread = again,
                None => return Ok(()),
            }
        }
        end(sched, thread);
        Ok(())
    }

    /// One round: signals, then a call that is in progress or a stay in the guest.
    fn turn(&mut self, shared: &Shared, thread: &mut Thread) -> Result<Turn, CpuError> {
        let attention = thread.shared.attention.load(Ordering::SeqCst);
        if attention {
            let mut cpu = self.fpu.access(&self.cpu, &shared.counters);
            let mut c = context(shared, thread, &mut cpu, CallRecord::default());
            match signal::before_return(&mut c) {
                Outcome::Resume => {}
                Outcome::Park(wait) => return Ok(Turn::Park(wait)),
                Outcome::Exited => return Ok(Turn::Exited),
            }
        }
        if let Some(call) = thread.call.take() {
            if shared.kernel.memory.give_way() {
                self.errands()?;
            }
            return Ok(self.make_call(shared, thread, call));
        }
        if shared.kernel.memory.flushes.take_hurry() {
            self.errands()?;
            if std::mem::take(&mut self.look) {
                return Ok(Turn::Leave(self.whose_turn()));
            }
        }
        self.enter(shared, thread)
    }

    /// To whom the thread that runs is to leave its place, after a kick.
    fn whose_turn(&self) -> Leave {
        if self.guests.roster.gives_way(self.index) {
            Leave::ForGuest
        } else {
            Leave::IfBehind
        }
    }

    /// Makes a call, for the first time or again.
    fn make_call(&mut self, shared: &Shared, thread: &mut Thread, call: CallRecord) -> Turn {
        let (nr, args) = (call.nr, call.args);
        let attention = thread.shared.attention.load(Ordering::SeqCst);
        let mut cpu = self.fpu.access(&self.cpu, &shared.counters);
        let mut c = context(shared, thread, &mut cpu, call);
        c.interrupted = attention && signal::wants_handler(&c);
        let result = match shared.table.get(nr) {
            Some(entry) => {
                if let Some(strace) = &shared.strace {
                    strace.call(&c, entry, &args);
                }
                (entry.handler)(&mut c, &args)
            }
            None => {
                unknown_call(shared, &c, nr, &args);
                Err(Stop::Errno(Errno::NOSYS))
            }
        };
        if let Some(strace) = &shared.strace {
            strace.result(&c, shared.table.get(nr), &result);
        }
        match signal::settle(&mut c, result) {
            Settled::Again
                if std::mem::take(&mut thread.yields) && shared.kernel.sched.others_wait() =>
            {
                Turn::Leave(Leave::Last)
            }
            Settled::Again => Turn::Again,
            Settled::Park(wait) => Turn::Park(wait),
            Settled::Exited => Turn::Exited,
        }
    }

    /// A stay in the guest.
    fn enter(&mut self, shared: &Shared, thread: &mut Thread) -> Result<Turn, CpuError> {
        let memory = &shared.kernel.memory;
        if identity::renew(memory, &thread.mm) {
            thread.foresee(memory);
        }
        self.fpu.enter(&mut self.cpu, thread, &shared.counters)?;
        let entry = memory.flushes.enter(self.index, &thread.mm.space);
        let flush = if entry.needed {
            count(&shared.counters.flushes);
            let touches = entry.touches.len() as u64;
            shared
                .counters
                .touches
                .fetch_add(touches, Ordering::Relaxed);
            Flush::All {
                touches: &entry.touches,
            }
        } else {
            Flush::None
        };
        let ran = self.cpu.run(&mut thread.regs, entry.root, flush);
        let flushed = matches!(ran, Ok((_, true)));
        memory.acknowledge(memory.flushes.leave(self.index, &entry, flushed));
        let (exit, _) = ran?;
        self.dispatch(shared, thread, exit)
    }

    /// What an exit leads to.
    fn dispatch(
        &mut self,
        shared: &Shared,
        thread: &mut Thread,
        exit: Exit,
    ) -> Result<Turn, CpuError> {
        let counters = &shared.counters;
        match exit {
            Exit::Syscall => {
                count(&counters.syscalls);
                let r = &thread.regs;
                let args = Args([r.rdi, r.rsi, r.rdx, r.r10, r.r8, r.r9]);
                let call = CallRecord {
                    nr: r.rax,
                    args,
                    ..CallRecord::default()
                };
                if shared.kernel.memory.give_way() {
                    self.errands()?;
                }
                return Ok(self.make_call(shared, thread, call));
            }
            Exit::Trap(trap) if trap.vector == 14 => {
                count(&counters.page_faults);
                return self.page_fault(shared, thread, trap);
            }
            Exit::Trap(trap) => {
                count(&counters.exceptions);
                let info = self.exception(shared, thread, trap);
                self.fault(shared, thread, trap, info);
            }
            Exit::Forged => {
                count(&counters.forged);
                let trap = Trap {
                    vector: 13,
                    error: 0,
                    address: 0,
                };
                self.fault(shared, thread, trap, trap::general_protection());
            }
            Exit::Kicked => {
                count(&counters.kicks);
                if self.kicker.taken() | std::mem::take(&mut self.look) {
                    return Ok(Turn::Leave(self.whose_turn()));
                }
            }
            Exit::MonitorDone => count(&counters.monitor),
            Exit::Broken(what) => {
                count(&counters.broken);
                tracing::error!(
                    pid = thread.pid,
                    rip = thread.regs.rip,
                    "the guest stopped: {what}"
                );
                victim::kill(shared, thread.pid);
            }
        }
        Ok(Turn::Again)
    }

    fn page_fault(
        &mut self,
        shared: &Shared,
        thread: &mut Thread,
        trap: Trap,
    ) -> Result<Turn, CpuError> {
        match trap::page_fault(&shared.kernel.memory, thread, trap) {
            Faulted::Resolved(_) | Faulted::ReadFile => thread.starved.resolved(trap.address),
            Faulted::Signal(info) => self.fault(shared, thread, trap, info),
            // The frames that flushes held are back, or others: fault again.
            Faulted::NoMemory
                if (self.finish_flushes()? || self.make_room(shared)?)
                    && !self.starves(thread, trap.address) => {}
            Faulted::NoMemory => match self.ends(shared, thread) {
                Verdict::Ends => {}
                Verdict::Waits => return Ok(Turn::Leave(Leave::Last)),
                Verdict::WaitsForGuest => return Ok(Turn::Leave(Leave::ForGuest)),
            },
        }
        Ok(Turn::Again)
    }

    /// Has somebody end for a thread that gets no memory; what that gives back is waited for anew.
    fn ends(&self, shared: &Shared, thread: &mut Thread) -> Verdict {
        thread.starved = Starved::default();
        self.guests.end_largest(shared, thread.pid)
    }

    /// Whether frames come, and somebody else always takes them: without a page file only pages of files can be had back, and
    /// if programs need those to run, they go round.
    fn starves(&self, thread: &mut Thread, address: u64) -> bool {
        thread.starved.again(address) > STARVED && !self.memory.has_page_file()
    }

    /// The signal of an exception that is not a page fault.
    fn exception(&mut self, shared: &Shared, thread: &mut Thread, trap: Trap) -> SigInfo {
        if trap.vector == INVALID_OPCODE {
            let mem = UserMem::new(&shared.kernel.memory, &thread.mm);
            let mut bytes = [0; trap::LONGEST_INSTRUCTION];
            let length = mem.accessible(thread.regs.rip, bytes.len(), Access::Execute);
            let read = mem.read(thread.regs.rip, &mut bytes[..length]);
            if read.is_ok() && trap::is_control_transfer(&bytes[..length]) {
                return trap::general_protection();
            }
        }
        let mut mxcsr = 0;
        if trap.vector == SIMD_EXCEPTION {
            let mut fpu = thread.fpu.clone();
            let mut cpu = self.fpu.access(&self.cpu, &shared.counters);
            if let Ok(area) = cpu.save_fpu(&mut fpu) {
                mxcsr = area
                    .0
                    .get(24..28)
                    .map_or(0, |b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]));
            }
        }
        trap::exception_signal(trap, thread.regs.rip, mxcsr)
    }

    fn fault(&mut self, shared: &Shared, thread: &mut Thread, trap: Trap, info: SigInfo) {
        thread.last_trap = (u64::from(trap.vector), trap.error, trap.address);
        if let (Some(counters), Some(guards)) =
            (shared.kernel.memory.guard.get(), &thread.mm.guards)
            && trap.vector == PAGE_FAULT
        {
            guards.lock().fault(counters, trap.address);
        }
        tracing::debug!(
            pid = thread.pid,
            signal = info.signo,
            vector = trap.vector,
            error = trap.error,
            "a fault at {:#x}, address {:#x}",
            thread.regs.rip,
            trap.address
        );
        let mut cpu = self.fpu.access(&self.cpu, &shared.counters);
        let mut c = context(shared, thread, &mut cpu, CallRecord::default());
        signal::fault(&mut c, info);
    }
}

/// A thread that ran is over. What it had is gone when the scheduler hears of it.
fn end(sched: &Sched, thread: Box<Thread>) {
    let tid = thread.tid;
    drop(thread);
    sched.forget(tid);
}

/// What a handler works with.
fn context<'a>(
    shared: &'a Shared,
    thread: &'a mut Thread,
    cpu: &'a mut dyn Cpu,
    call: CallRecord,
) -> Ctx<'a> {
    Ctx {
        k: &shared.kernel,
        t: thread,
        cpu,
        call,
        interrupted: false,
    }
}

/// Vectors that need a look at more than the exception (Intel SDM volume 3, table 6-1).
const INVALID_OPCODE: u8 = 6;
const PAGE_FAULT: u8 = 14;
const SIMD_EXCEPTION: u8 = 19;

/// What a round came to.
enum Turn {
    /// Another one.
    Again,
    /// The thread waits.
    Park(Wait),
    /// Somebody else may run.
    Leave(Leave),
    /// The thread is over.
    Exited,
}

/// A call that is not there: said once for each number.
fn unknown_call(shared: &Shared, c: &Ctx<'_>, nr: u64, args: &Args) {
    count(&shared.counters.unknown_syscalls);
    if shared.table.first_time(nr) {
        tracing::info!(
            nr,
            "the program makes a system call that is not there: ENOSYS"
        );
    }
    if let Some(strace) = &shared.strace {
        strace.unknown(c, nr, args);
    }
}
