//! A machine without KVM for unit tests: real memory manager, real records, and a worker loop that
//! makes calls but never enters a guest.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use shadow_mm::{
    GuestVa, Limits, Manager, MapKind, MapRequest, Pfn, PfnRange, Placement, PoolLayout, Prot,
    VadFlags, VadTag,
};

use super::call::{Args, CallRecord, Ctx, Stop, Wait};
use super::exec::MachineInfo;
use super::file::Location;
use super::fs::{MountKind, MountSpec, Vfs};
use super::kernel::{Kernel, KernelLimits, KernelParts};
use super::proc::{FirstProcess, first_process};
use super::process::{AddressSpace, Credentials, FdTable, MmLayout, Pid, State};
use super::signal::{self, Outcome, Settled};
use super::table::Table;
use super::thread::{Cpu, Fpu, Regs, Thread, XsaveArea};
use super::time::{Clock, TscInfo};
use super::user_mem::UserMem;
use crate::hv::CpuError;
use crate::hv::probe::Paging;
use crate::memory::{Flushes, Memory, Pool};

/// First address of the pages every test program has.
pub(crate) const DATA: u64 = 0x10_0000;
/// Its pages.
const PAGES: u64 = 64;
/// Its stack pointer at the start.
pub(crate) const STACK: u64 = DATA + PAGES * 4096 - 64;
/// Where its code would be: behind a `syscall` instruction.
pub(crate) const TEXT: u64 = 0x40_0002;
/// Bytes of the test processor's XSAVE area.
pub(crate) const XSAVE: usize = 832;

/// A virtual CPU that only knows about FPU state.
pub(crate) struct FakeCpu;

impl Cpu for FakeCpu {
    fn save_fpu<'t>(&mut self, fpu: &'t mut Fpu) -> Result<&'t mut XsaveArea, CpuError> {
        if !matches!(fpu, Fpu::Saved(_)) {
            *fpu = Fpu::Saved(XsaveArea(vec![0; XSAVE]));
        }
        match fpu {
            Fpu::Saved(area) => Ok(area),
            Fpu::Initial | Fpu::Live | Fpu::Left(_) => unreachable!("saved above"),
        }
    }

    fn xsave_layout(&self) -> (usize, u64) {
        (XSAVE, 7)
    }
}

/// Where a thread got to.
#[derive(Debug)]
pub(crate) enum Turn {
    /// Back in the guest.
    Guest,
    /// Parked.
    Parked(Wait),
    /// Gone.
    Exited,
}

/// Guest memory of ten MiB, without virtual CPUs. The first two would be the monitor's.
pub(crate) fn memory() -> Arc<Memory> {
    let range = |start, count| PfnRange {
        start: Pfn::new(start),
        count,
    };
    let layout = PoolLayout {
        tables: range(512, 512),
        data: range(1024, 1536),
    };
    let va = |at| GuestVa::new(at).unwrap();
    let limits = Limits {
        user_end: va(0x7f80_0000_0000),
        min_va: va(0x1_0000),
    };
    let manager = Manager::new(Pool::new(2560).unwrap(), layout, limits).unwrap();
    Arc::new(Memory::new(manager, Flushes::new(Paging::Hardware, 1)))
}

/// The machine.
pub(crate) struct Machine {
    pub(crate) k: Kernel,
    table: Table,
}

impl Machine {
    /// A machine whose root is an empty tree in memory.
    pub(crate) fn new() -> Self {
        let kind = MountKind::Mem {
            size: 1 << 20,
            mode: 0o755,
        };
        let root = MountSpec {
            at: b"/".to_vec(),
            kind,
        };
        Self::with_mounts(vec![root])
    }

    /// A machine with this file tree.
    pub(crate) fn with_mounts(mounts: Vec<MountSpec>) -> Self {
        let memory = memory();
        let limits = KernelLimits {
            max_procs: 4,
            max_threads: 8,
            cpus: 2,
        };
        let k = Kernel::new(KernelParts {
            memory,
            sched: Arc::default(),
            clock: Arc::new(Clock::new(TscInfo::unusable())),
            vfs: Vfs::new(mounts, 16 << 20).unwrap(),
            tty: None,
            limits,
            info: MachineInfo::default(),
        });
        Self {
            k,
            table: Table::default(),
        }
    }

    /// A machine around a kernel that is there.
    pub(crate) fn of(k: Kernel) -> Self {
        Self {
            k,
            table: Table::default(),
        }
    }

    /// An address space with the data pages.
    pub(crate) fn space(&self) -> Arc<AddressSpace> {
        let manager = &self.k.memory.manager;
        let space = manager.create_space().unwrap();
        let request = MapRequest {
            placement: Placement::Fixed(GuestVa::new(DATA).unwrap().vpn()),
            count: PAGES,
            prot: Prot::READ | Prot::WRITE,
            kind: MapKind::Anonymous,
            flags: VadFlags::empty(),
            tag: VadTag(0),
        };
        let mapped = manager.map(&space, request).unwrap();
        self.k.memory.submit(mapped.flush);
        AddressSpace::new(&self.k.memory, space, MmLayout::default())
    }

    /// The first program.
    pub(crate) fn first(&self) -> Box<Thread> {
        let root = Location {
            mount: 0,
            path: Vec::new(),
        };
        let first = FirstProcess {
            exe: root.clone(),
            comm: b"first".to_vec(),
            mm: self.space(),
            regs: Regs {
                rip: TEXT,
                rsp: STACK,
                rflags: 0x202,
                ..Regs::default()
            },
            files: FdTable::default(),
            cwd: root,
            cred: Credentials::default(),
            umask: 0o022,
            terminal: true,
        };
        first_process(&self.k, first)
    }

    /// Runs `f` with what a handler works with.
    pub(crate) fn with<R>(&self, t: &mut Thread, f: impl FnOnce(&mut Ctx<'_>) -> R) -> R {
        let call = CallRecord::default();
        f(&mut Ctx {
            k: &self.k,
            t,
            cpu: &mut FakeCpu,
            call,
            interrupted: false,
        })
    }

    /// A system call of the guest, until the thread is back, parked or gone.
    pub(crate) fn call(&self, t: &mut Thread, nr: u64, args: &[u64]) -> Turn {
        let mut all = [0; 6];
        all[..args.len()].copy_from_slice(args);
        t.regs.rax = nr;
        t.call = Some(CallRecord {
            nr,
            args: Args(all),
            ..CallRecord::default()
        });
        self.go_on(t)
    }

    /// A call that ends at once: its result.
    pub(crate) fn result(&self, t: &mut Thread, nr: u64, args: &[u64]) -> i64 {
        match self.call(t, nr, args) {
            Turn::Guest => t.regs.rax as i64,
            other => panic!("{other:?}"),
        }
    }

    /// The worker's loop, as described in `signal`.
    pub(crate) fn go_on(&self, t: &mut Thread) -> Turn {
        self.rounds(t, 100).expect("the loop ends")
    }

    /// At most so many rounds of it.
    pub(crate) fn rounds(&self, t: &mut Thread, most: usize) -> Option<Turn> {
        for _ in 0..most {
            if t.shared.attention.load(Ordering::SeqCst) {
                match self.with(t, signal::before_return) {
                    Outcome::Resume => {}
                    Outcome::Park(wait) => return Some(Turn::Parked(wait)),
                    Outcome::Exited => return Some(Turn::Exited),
                }
            }
            let Some(call) = t.call.take() else {
                return Some(Turn::Guest);
            };
            match self.make(t, call) {
                Settled::Again => {}
                Settled::Park(wait) => return Some(Turn::Parked(wait)),
                Settled::Exited => return Some(Turn::Exited),
            }
        }
        None
    }

    fn make(&self, t: &mut Thread, call: CallRecord) -> Settled {
        let (nr, args) = (call.nr, call.args);
        let attention = t.shared.attention.load(Ordering::SeqCst);
        let mut c = Ctx {
            k: &self.k,
            t,
            cpu: &mut FakeCpu,
            call,
            interrupted: false,
        };
        c.interrupted = attention && signal::wants_handler(&c);
        let result = match self.table.get(nr) {
            Some(entry) => (entry.handler)(&mut c, &args),
            None => Err(Stop::Errno(super::Errno::NOSYS)),
        };
        signal::settle(&mut c, result)
    }

    /// The one thread in the run queue.
    pub(crate) fn runnable(&self) -> Box<Thread> {
        let mut all = self.k.sched.drain();
        assert_eq!(all.len(), 1);
        all.remove(0)
    }

    /// A fork of `t`: the child's thread.
    pub(crate) fn fork(&self, t: &mut Thread) -> Box<Thread> {
        let pid = self.result(t, 57, &[]);
        let child = self.runnable();
        assert_eq!(i64::from(child.pid), pid);
        child
    }

    pub(crate) fn mem<'a>(&'a self, t: &'a Thread) -> UserMem<'a> {
        UserMem::new(&self.k.memory, &t.mm)
    }

    /// Sends a signal from nowhere.
    pub(crate) fn send(&self, pid: Pid, signo: i32) {
        let mut state: crate::locks::MutexGuard<'_, crate::locks::rank::KernelState, State> =
            self.k.state();
        let info = super::process::SigInfo::kernel(signo);
        signal::send_to_process(&self.k, &mut state, pid, info).unwrap();
    }

    /// `rt_sigaction` with a handler that returns through `restorer`.
    pub(crate) fn handle(&self, t: &mut Thread, signo: i32, handler: u64, flags: u64) {
        let action = [handler, flags | signal::sa::RESTORER, 0x40_1000, 0];
        self.mem(t).write_obj(DATA, &action).unwrap();
        assert_eq!(self.result(t, 13, &[signo as u64, DATA, 0, 8]), 0);
    }
}
