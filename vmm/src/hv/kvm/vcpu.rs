//! A virtual CPU: entering the guest with a thread's registers, and what an exit means.
//!
//! Registers and system registers travel in the shared `kvm_run` page (`KVM_CAP_SYNC_REGS`), so an
//! exit costs one ioctl, the next `KVM_RUN`. An exit may find the processor in ring 0, inside a
//! stub of the monitor; the thread's record always holds ring-3 state, and entering chooses the
//! cheapest way from where the processor is to there:
//!
//! * from the SYSCALL stub, when only general registers changed: run on into its SYSRET;
//! * from ring 3: set the general registers;
//! * otherwise: set segments as well;
//! * when a flush is due, the address space changes, or the monitor is to load the thread's FPU state: through the
//!   monitor's `enter`.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use guest::abi::{self, MONITOR_CODE_VA, SYSCALL_STUB_VA, selector};
use guest::monitor::{self, Ending};
use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::{SyncReg, VcpuExit, VcpuFd};

use super::area::CpuArea;
use super::regs::{
    initial_sregs, msrs, put_regs, set_segments, take_regs, user_address, user_flags,
};
use super::touches::{List, Touches};
use super::vm::{Vm, VmError, refused};
use super::xsave;
use crate::hv::{CpuError, Exit, Flush, FpuLoader, IretWorks, SyscallRing, Trap};
use crate::linux::thread::{Regs, XsaveArea};

mod fpu;
pub use fpu::{LeftState, Loaded};

/// What a virtual CPU is made with.
#[derive(Clone, Debug)]
pub struct CpuSetup {
    /// Its index, below [`abi::MAX_CPUS`].
    pub index: u64,
    /// Its area.
    pub area: CpuArea,
    /// The first root CR3 holds: any that maps the monitor.
    pub root: u64,
    /// CR4 bits beyond the necessary ones.
    pub cr4: u64,
    /// XCR0, 0 where XSAVE is not to be used.
    pub xcr0: u64,
    /// Where SYSCALL ends up on this host.
    pub syscall: SyscallRing,
    /// Whether the monitor's `enter` can leave by IRET.
    pub iret: IretWorks,
    /// Who loads FPU states.
    pub fpu: FpuLoader,
}

/// Where the stopped processor is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum At {
    /// Behind the `out` of the SYSCALL stub in ring 0, with the thread's registers.
    SyscallStub,
    /// In ring 3, with the thread's segments.
    Ring3,
    /// In ring 0 after an exception, or before its first run: segments must be set.
    Elsewhere,
    /// Inside the monitor's `enter`: not in ring 3 since it was last asked to.
    Monitor,
}

/// A virtual CPU.
pub struct Vcpu {
    fd: VcpuFd,
    vm: Arc<Vm>,
    index: u64,
    area: CpuArea,
    at: At,
    root: u64,
    bases: (u64, u64),
    syscall: SyscallRing,
    iret: IretWorks,
    fpu: FpuLoader,
    /// The FPU state that the monitor is to load: it is in the area too.
    coming: Option<XsaveArea>,
    /// That of the thread that was the last to leave.
    left: Option<Arc<LeftState>>,
    /// What it was made with.
    setup: CpuSetup,
    /// Dropped after the descriptor.
    _held: Held,
}

/// One of a machine's virtual CPUs is there.
struct Held(Arc<Vm>);

impl Drop for Held {
    fn drop(&mut self) {
        self.0.cpu_goes();
    }
}

fn cpu_error(what: &'static str, verb: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> CpuError {
    move |e| CpuError {
        what,
        verb,
        source: io::Error::from_raw_os_error(e.errno()),
    }
}

impl Vcpu {
    /// A virtual CPU of `vm`.
    ///
    /// # Errors
    /// KVM refused.
    pub fn new(vm: &Arc<Vm>, setup: CpuSetup) -> Result<Self, VmError> {
        let (mut fd, held) = (vm.create_cpu(setup.index)?, Held(Arc::clone(vm)));
        fd.set_cpuid2(&vm.cpuid)
            .map_err(refused("the CPUID leaves"))?;
        let mut sregs = fd.get_sregs().map_err(refused("the system registers"))?;
        let place = (setup.index, setup.area.va());
        initial_sregs(&mut sregs, place, setup.root, setup.cr4);
        fd.set_sregs(&sregs).map_err(refused("64-bit mode"))?;
        if setup.xcr0 != 0 {
            let mut xcrs = fd.get_xcrs().map_err(refused("XCR0"))?;
            xcrs.nr_xcrs = 1;
            xcrs.xcrs[0].xcr = 0;
            xcrs.xcrs[0].value = setup.xcr0;
            fd.set_xcrs(&xcrs).map_err(refused("XCR0"))?;
        }
        for msr in msrs(setup.index) {
            let one = Msrs::from_entries(&[msr]).expect("one entry");
            let set = fd.set_msrs(&one).map_err(refused("the MSRs"))?;
            if set != 1 && msr.index != super::regs::MSR_TSC_AUX {
                return Err(VmError::Refused {
                    what: "a SYSCALL MSR",
                    source: io::Error::from_raw_os_error(libc::EINVAL),
                });
            }
        }
        if let Err(error) = super::ioctls::clear_tsc_offset(&fd) {
            // The probe notices, and the vDSO makes a system call.
            tracing::debug!(%error, "KVM keeps an offset in the guest's time stamp counter");
        }
        fd.set_sync_valid_reg(SyncReg::Register);
        fd.set_sync_valid_reg(SyncReg::SystemRegister);
        fd.set_sync_valid_reg(SyncReg::VcpuEvents);
        fd.get_kvm_run().s.regs.sregs = sregs;
        vm.ioctls.fetch_add(8, Ordering::Relaxed);
        Ok(Self {
            fd,
            vm: Arc::clone(vm),
            index: setup.index,
            area: setup.area.clone(),
            at: At::Elsewhere,
            root: setup.root,
            bases: (0, 0),
            syscall: setup.syscall,
            iret: setup.iret,
            fpu: setup.fpu,
            coming: None,
            left: None,
            setup,
            _held: held,
        })
    }

    /// Gives it back to KVM, and with the last one what KVM has of the machine. What it takes to make it again.
    #[must_use]
    pub fn rest(self) -> (Arc<Vm>, CpuSetup) {
        (Arc::clone(&self.vm), self.setup.clone())
    }

    /// Its index.
    #[must_use]
    pub fn index(&self) -> u64 {
        self.index
    }

    /// Runs the guest in ring 3 with `regs` on the page tables at `root` until it exits; `regs` then
    /// holds its ring-3 state. `flush` is done before its first instruction: the second half of the
    /// result says whether it was (a kick may have come first; then it is still due).
    ///
    /// # Errors
    /// KVM refused to run.
    pub fn run(
        &mut self,
        regs: &mut Regs,
        root: u64,
        flush: Flush<'_>,
    ) -> Result<(Exit, bool), CpuError> {
        if flush == Flush::None && root == self.root && self.coming.is_none() {
            self.load(regs);
            return Ok((self.run_once(regs)?, true));
        }
        let mut touches = Touches::new(flush.touches());
        loop {
            let list = touches.take();
            let last = touches.is_empty();
            if last && self.iret == IretWorks::Yes {
                self.load_enter(regs, root, &list);
                let exit = self.run_once(regs)?;
                let done = self.at != At::Monitor;
                if done {
                    self.coming = None;
                }
                return Ok((exit, done));
            }
            self.load_enter_out(root, &list);
            match self.run_once(regs)? {
                Exit::MonitorDone => {}
                other => return Ok((other, false)),
            }
            if last {
                self.load(regs);
                return Ok((self.run_once(regs)?, true));
            }
        }
    }

    /// Touches tables from the monitor, on the page tables at `root`, without entering ring 3. False if a
    /// kick came first: then some may not have been touched.
    ///
    /// # Errors
    /// KVM refused to run.
    pub fn touch(&mut self, root: u64, touches: &[u64]) -> Result<bool, CpuError> {
        let mut touches = Touches::new(touches);
        while !touches.is_empty() {
            self.load_enter_out(root, &touches.take());
            match self.run_once(&mut Regs::default())? {
                Exit::MonitorDone => {}
                Exit::Kicked => return Ok(false),
                other => {
                    return Err(CpuError {
                        what: "page tables",
                        verb: "touched",
                        source: io::Error::other(format!("{other:?}")),
                    });
                }
            }
        }
        Ok(true)
    }

    /// Sets the processor's registers from `regs`, the cheapest way from where it is.
    fn load(&mut self, regs: &Regs) {
        let bases = (regs.fs_base, regs.gs_base);
        let flags = user_flags(regs.rflags);
        let by_sysret = self.at == At::SyscallStub
            && bases == self.bases
            && regs.rcx == regs.rip
            && user_flags(regs.r11) == flags;
        let segments = !by_sysret && (self.at != At::Ring3 || bases != self.bases);
        let s = self.fd.sync_regs_mut();
        put_regs(&mut s.regs, regs);
        if by_sysret {
            s.regs.rip = SYSCALL_STUB_VA + monitor::STUB_OUT_BYTES;
            s.regs.rflags = 2;
            s.regs.r11 = flags;
        } else {
            s.regs.rip = regs.rip;
            s.regs.rflags = flags;
        }
        if segments {
            set_segments(&mut s.sregs, selector::USER_CS, selector::USER_DS, bases);
            self.bases = bases;
        }
        self.mark_dirty(segments);
    }

    /// Sets up the monitor's `enter`, which leaves to ring 3 with `regs`.
    fn load_enter(&mut self, regs: &Regs, root: u64, list: &List) {
        let (start, mut words) = list.run(Ending::Ring3);
        words.extend([
            regs.rax,
            regs.rdx,
            regs.rip,
            u64::from(selector::USER_CS),
            user_flags(regs.rflags),
            regs.rsp,
            u64::from(selector::USER_DS),
        ]);
        put_regs(&mut self.fd.sync_regs_mut().regs, regs);
        let bases = (regs.fs_base, regs.gs_base);
        if self.coming.is_none() {
            self.call_monitor(bases, root, (start, &words));
        } else {
            let (start, words) = monitor::restore_first((start, &words), root, regs.rcx);
            self.call_monitor(bases, root, (start, &words));
            self.ask_for_restore();
        }
    }

    /// Sets up the monitor's `enter_out`, which comes back.
    fn load_enter_out(&mut self, root: u64, list: &List) {
        let (start, words) = list.run(Ending::Out);
        self.call_monitor(self.bases, root, (start, &words));
    }

    /// Sets up a run of the monitor with these words on its stack.
    fn call_monitor(&mut self, bases: (u64, u64), root: u64, (start, words): (u64, &[u64])) {
        let at = abi::AREA_STACK_TOP - (words.len() * 8) as u64;
        self.area.write_words(at, words);
        let s = self.fd.sync_regs_mut();
        s.regs.rip = MONITOR_CODE_VA + start;
        s.regs.rsp = self.area.va() + at;
        s.regs.rflags = 2;
        s.regs.rax = root;
        set_segments(
            &mut s.sregs,
            selector::KERNEL_CS,
            selector::KERNEL_DS,
            bases,
        );
        s.sregs.cr3 = root;
        self.bases = bases;
        self.root = root;
        self.mark_dirty(true);
    }

    fn mark_dirty(&mut self, segments: bool) {
        self.fd.set_sync_dirty_reg(SyncReg::Register);
        if segments {
            self.fd.set_sync_dirty_reg(SyncReg::SystemRegister);
        }
    }

    /// One `KVM_RUN`; `regs` is replaced if the guest was in ring 3 when it exited.
    fn run_once(&mut self, regs: &mut Regs) -> Result<Exit, CpuError> {
        self.vm.ioctls.fetch_add(1, Ordering::Relaxed);
        let how = match self.fd.run() {
            Ok(VcpuExit::IoOut(port, data)) => Raw::Out(port, data.len()),
            Ok(VcpuExit::IoIn(port, _)) => Raw::In(port),
            Ok(VcpuExit::MmioRead(gpa, _)) => {
                Raw::Mmio(format!("a read of {gpa:#x}, which is not memory"))
            }
            Ok(VcpuExit::MmioWrite(gpa, _)) if self.vm.is_read_only(gpa) => Raw::Mmio(format!(
                "a write to {gpa:#x}, a template's memory, which its page tables should not allow"
            )),
            Ok(VcpuExit::MmioWrite(gpa, _)) => {
                Raw::Mmio(format!("a write to {gpa:#x}, which is not memory"))
            }
            Ok(VcpuExit::Intr) => Raw::Interrupted,
            Ok(other) => Raw::Other(format!("{other:?}")),
            Err(e) if e.errno() == libc::EINTR || e.errno() == libc::EAGAIN => Raw::Interrupted,
            Err(e) => return Err(cpu_error("program", "run")(e)),
        };
        let undelivered = match how {
            Raw::Out(..) | Raw::In(_) | Raw::Mmio(_) => None,
            Raw::Interrupted | Raw::Other(_) => self.take_exception(),
        };
        let mmio = matches!(how, Raw::Mmio(_));
        let exit = self.decode(how, regs);
        if exit == Exit::Forged || mmio {
            self.settle()?;
        }
        match undelivered {
            // A trap, not a fault: nothing raises it again.
            Some(DEBUG) if exit == Exit::Kicked && self.at == At::Ring3 => Ok(Exit::Trap(Trap {
                vector: DEBUG,
                error: 0,
                address: 0,
            })),
            _ => Ok(exit),
        }
    }

    /// Takes back an exception KVM has queued but not delivered, because a kick came between: it
    /// belongs to the thread that ran, and would hit whoever runs here next, or the monitor. A fault
    /// is raised again when that thread goes on.
    ///
    /// Events are set even if none is reported: KVM keeps quiet about the exceptions of `INT3` and
    /// `INTO`, whose instruction will be executed again, and setting events drops them all the same. They travel as
    /// registers do, with the next run.
    fn take_exception(&mut self) -> Option<u8> {
        let exception = std::mem::take(&mut self.fd.sync_regs_mut().events.exception);
        self.fd.set_sync_dirty_reg(SyncReg::VcpuEvents);
        let queued = exception.injected != 0 || exception.pending != 0;
        queued.then_some(exception.nr)
    }

    /// Has the next run find an exception queued, and a kick before it is delivered.
    #[cfg(test)]
    pub(in crate::hv) fn queue_fault_and_kick(&mut self, vector: u8) {
        let mut events = self.fd.get_vcpu_events().unwrap();
        events.exception.injected = 1;
        events.exception.nr = vector;
        events.exception.has_error_code = monitor::has_error_code(vector).into();
        events.exception.error_code = 6;
        self.fd.set_vcpu_events(&events).unwrap();
        self.fd.set_kvm_immediate_exit(1);
    }

    /// Ends what [`Self::queue_fault_and_kick`] began.
    #[cfg(test)]
    pub(in crate::hv) fn end_kick(&mut self) {
        self.fd.set_kvm_immediate_exit(0);
    }

    /// Has KVM finish an access to a port, or to what is not memory, that will not be answered: otherwise it would
    /// do so when it next enters a thread, with what it remembers of this one. One instruction may be several accesses.
    fn settle(&mut self) -> Result<(), CpuError> {
        self.at = At::Elsewhere;
        self.fd.set_kvm_immediate_exit(1);
        let mut left = Ok(());
        for _ in 0..MAX_ACCESSES {
            self.vm.ioctls.fetch_add(1, Ordering::Relaxed);
            left = self.fd.run().map(|_| ()).map_err(|e| e.errno());
            if left.is_err() {
                break;
            }
        }
        self.fd.set_kvm_immediate_exit(0);
        match left {
            Ok(()) | Err(libc::EINTR | libc::EAGAIN) => Ok(()),
            Err(errno) => Err(cpu_error("program", "run")(kvm_ioctls::Error::new(errno))),
        }
    }

    /// What an exit means, by where the processor is.
    fn decode(&mut self, how: Raw, regs: &mut Regs) -> Exit {
        let s = self.fd.sync_regs_mut();
        let (gp, sregs) = (s.regs, s.sregs);
        self.bases = (sregs.fs.base, sregs.gs.base);
        if sregs.cs.selector & 3 == 3 {
            self.at = At::Ring3;
            return self.decode_ring3(how, &gp, regs);
        }
        self.at = At::Monitor;
        if gp.rip.wrapping_sub(SYSCALL_STUB_VA) < monitor::STUB_OUT_BYTES
            || (gp.rip == SYSCALL_STUB_VA + monitor::STUB_OUT_BYTES
                && how == Raw::Out(abi::PORT_SYSCALL, 1))
        {
            // Before its `out` if a kick came first: the call is as good as made.
            take_regs(&gp, self.bases, regs);
            regs.rip = gp.rcx;
            regs.rflags = user_flags(gp.r11);
            if let Raw::Other(what) | Raw::Mmio(what) = how {
                return Exit::Broken(what);
            }
            self.at = if how == Raw::Interrupted {
                At::Elsewhere
            } else {
                At::SyscallStub
            };
            return Exit::Syscall;
        }
        let offset = gp.rip.wrapping_sub(MONITOR_CODE_VA);
        if let Some(vector) = monitor::vector_at(offset) {
            if let Raw::Other(what) | Raw::Mmio(what) = how {
                return Exit::Broken(what);
            }
            return self.decode_exception(vector, &gp, sregs.cr2, regs);
        }
        match how {
            Raw::Out(abi::PORT_DONE, _) => Exit::MonitorDone,
            // Before its first ring-3 instruction: the record already says what it should be.
            Raw::Interrupted => Exit::Kicked,
            Raw::In(port) | Raw::Out(port, _) => {
                Exit::Broken(format!("ring 0 at {:#x} used port {port:#x}", gp.rip))
            }
            Raw::Other(what) | Raw::Mmio(what) => {
                Exit::Broken(format!("ring 0 at {:#x}: {what}", gp.rip))
            }
        }
    }

    fn decode_ring3(&self, how: Raw, gp: &kvm_bindings::kvm_regs, regs: &mut Regs) -> Exit {
        take_regs(gp, self.bases, regs);
        match how {
            Raw::Interrupted => Exit::Kicked,
            Raw::Out(abi::PORT_SYSCALL, 1) => {
                let at = gp.rip.wrapping_sub(SYSCALL_STUB_VA);
                let genuine = self.syscall == SyscallRing::Three && at <= monitor::STUB_OUT_BYTES;
                if !genuine || !user_address(gp.rcx) {
                    return Exit::Forged;
                }
                regs.rip = gp.rcx;
                regs.rflags = user_flags(gp.r11);
                Exit::Syscall
            }
            Raw::Out(..) | Raw::In(_) => Exit::Forged,
            Raw::Other(what) | Raw::Mmio(what) => Exit::Broken(what),
        }
    }

    /// An exception: its frame is on the stack of the virtual CPU's area.
    fn decode_exception(
        &mut self,
        vector: u8,
        gp: &kvm_bindings::kvm_regs,
        cr2: u64,
        regs: &mut Regs,
    ) -> Exit {
        let top = self.area.va() + abi::AREA_STACK_TOP;
        let with_code = monitor::has_error_code(vector);
        let length = if with_code { 48 } else { 40 };
        if gp.rsp != top - length {
            return Exit::Broken(format!("exception {vector} in ring 0, RSP {:#x}", gp.rsp));
        }
        let at = abi::AREA_STACK_TOP - length;
        let error = if with_code {
            self.area.read_words::<1>(at)[0]
        } else {
            0
        };
        let [rip, cs, rflags, rsp, _ss] = self.area.read_words::<5>(abi::AREA_STACK_TOP - 40);
        if cs & 3 != 3 {
            return Exit::Broken(format!("exception {vector} in ring 0 at {rip:#x}"));
        }
        take_regs(gp, self.bases, regs);
        (regs.rip, regs.rflags, regs.rsp) = (rip, user_flags(rflags), rsp);
        self.at = At::Elsewhere;
        Exit::Trap(Trap {
            vector,
            error,
            address: cr2,
        })
    }

    /// Whether it was stopped in ring 0.
    #[must_use]
    pub fn stopped_in_ring_zero(&self) -> bool {
        self.at != At::Ring3
    }

    /// Whether flushes may leave the monitor by IRET.
    pub fn set_iret(&mut self, iret: IretWorks) {
        self.iret = iret;
    }

    /// Who loads FPU states.
    pub fn set_fpu_loader(&mut self, fpu: FpuLoader) {
        self.fpu = fpu;
    }

    /// Sets what RDTSCP returns.
    ///
    /// # Errors
    /// KVM refused.
    pub fn set_tsc_aux(&self, value: u32) -> Result<(), CpuError> {
        let entry = kvm_msr_entry {
            index: super::regs::MSR_TSC_AUX,
            data: u64::from(value),
            ..Default::default()
        };
        let msrs = Msrs::from_entries(&[entry]).expect("one entry");
        match self
            .fd
            .set_msrs(&msrs)
            .map_err(cpu_error("TSC_AUX", "set"))?
        {
            1 => Ok(()),
            _ => Err(cpu_error("TSC_AUX", "set")(kvm_ioctls::Error::new(
                libc::EINVAL,
            ))),
        }
    }

    /// Lets `signal` interrupt the guest, though the thread blocks it: pending or arriving, it makes
    /// [`Vcpu::run`] return [`Exit::Kicked`].
    ///
    /// # Errors
    /// KVM refused.
    pub fn set_kick_signal(&self, signal: i32) -> Result<(), CpuError> {
        super::ioctls::allow_signal(&self.fd, signal).map_err(|source| CpuError {
            what: "signal mask",
            verb: "set",
            source,
        })
    }
}

/// Most accesses of one instruction that KVM tells of one by one: those of a 64-byte store, twice over.
const MAX_ACCESSES: usize = 16;

/// Vector of the debug exception.
const DEBUG: u8 = 1;

/// An exit as KVM tells it, without borrows.
#[derive(Debug, PartialEq, Eq)]
enum Raw {
    Out(u16, usize),
    In(u16),
    Interrupted,
    /// An access to what is not memory, or not to be stored to.
    Mmio(String),
    Other(String),
}
