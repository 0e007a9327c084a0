//! What this host's KVM does, found by running a throw-away guest of a few pages: about a
//! millisecond. Nothing is decided by a host's name.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use guest::abi;
use guest::descriptors::{self, SyscallPort};
use guest::monitor;
use kvm_ioctls::Kvm;
use vm_memory::{Bytes, MmapRegion, VolatileMemory};

use super::kvm::area::CpuArea;
use super::kvm::regs::{CR4_FSGSBASE, CR4_OSXSAVE, CR4_SMEP, CR4_UMIP};
use super::kvm::vcpu::{CpuSetup, Vcpu};
use super::kvm::vm::{Slot, Vm, VmError};
use super::{CpuError, Exit, Flush, FpuLoader, IretWorks, SyscallRing};
use crate::linux::thread::Regs;

/// Who walks the guest's page tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Paging {
    /// The processor: an edit shows after a flush of the TLB.
    Hardware,
    /// KVM, which keeps shadow tables of its own: an edit that takes rights away shows after the
    /// monitor has written to the table, and a flush.
    Shadow,
}

/// What was found.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct HostProfile {
    /// Where SYSCALL of ring 3 ends up.
    pub syscall: SyscallRing,
    /// Who walks the guest's page tables.
    pub paging: Paging,
    /// Whether the monitor can return to ring 3.
    pub iret: IretWorks,
    /// Who loads a thread's FPU state.
    pub fpu: FpuLoader,
    /// The guest's time stamp counter equals the host's.
    pub tsc_is_hosts: bool,
    /// RDTSCP returns what the VMM set for the virtual CPU.
    pub tsc_aux_works: bool,
    /// CR4 bits the guest runs with beyond the necessary ones.
    #[serde(skip)]
    pub cr4: u64,
    /// XCR0 the guest runs with; 0 without XSAVE.
    pub xcr0: u64,
    /// Components (bits as in XCR0) a thread's extended state may have. With XSAVE these are XCR0's;
    /// a software KVM may hide the instruction and keep the state all the same.
    pub state_components: u64,
}

/// Why the host cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// KVM refused a virtual machine or a part of one.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// KVM refused to run it.
    #[error(transparent)]
    Cpu(#[from] CpuError),
    /// No host memory for the probe.
    #[error("no memory for a probe of 4 MiB")]
    Memory(#[source] vm_memory::mmap::MmapRegionError),
    /// The probe's guest did what no known KVM makes it do.
    #[error("this KVM cannot run the guest: {step} ended with {got}")]
    Unknown {
        /// Which step.
        step: &'static str,
        /// What happened.
        got: String,
    },
}

const BYTES: usize = 4 << 20;
const CODE: u64 = 0x40_0000;
const DATA: u64 = 0x10_0000_0000;
const PRESENT: u64 = 1;
const WRITE: u64 = 2;
const USER: u64 = 4;
const FRAME_MASK: u64 = 0x000f_ffff_ffff_f000;

/// `mov [rdi], rsi; mov rax, [rdi]; syscall`
const STORE: &[u8] = &[0x48, 0x89, 0x37, 0x48, 0x8b, 0x07, 0x0f, 0x05];
/// `rdtsc; syscall`
const RDTSC: &[u8] = &[0x0f, 0x31, 0x0f, 0x05];
/// `rdtscp; mov rsi, rcx; syscall`
const RDTSCP: &[u8] = &[0x0f, 0x01, 0xf9, 0x48, 0x89, 0xce, 0x0f, 0x05];
/// `movq rsi, xmm0; syscall`
const XMM: &[u8] = &[0x66, 0x48, 0x0f, 0x7e, 0xc6, 0x0f, 0x05];
const STORE_AT: u64 = 0;
const RDTSC_AT: u64 = 0x40;
const RDTSCP_AT: u64 = 0x80;
const XMM_AT: u64 = 0xc0;
/// Where a state has XMM0, and which components it has (Intel SDM volume 1, sections 10.5.1 and 13.4.2).
const XMM0: usize = 160;
const XSTATE_BV: usize = 512;
const SSE: u8 = 2;

/// The probe's memory, with page tables written by hand: it must make edits on purpose that the
/// memory manager never makes.
struct Memory {
    region: Arc<MmapRegion>,
    next: u64,
}

impl Memory {
    fn word(&self, gpa: u64) -> &AtomicU64 {
        self.region
            .get_atomic_ref(gpa as usize)
            .expect("inside the probe's memory")
    }

    fn put(&self, gpa: u64, bytes: &[u8]) {
        self.region.write_slice_at(gpa, bytes);
    }

    fn frame(&mut self) -> u64 {
        self.next += 4096;
        self.next - 4096
    }

    /// Address of the entry that maps `va`, making the tables on the way.
    fn entry(&mut self, root: u64, va: u64) -> u64 {
        let mut table = root;
        for level in (1..4).rev() {
            let at = table + (va >> (12 + 9 * level) & 511) * 8;
            let found = self.word(at).load(Ordering::SeqCst);
            table = if found & PRESENT == 0 {
                let new = self.frame();
                self.word(at)
                    .store(new | PRESENT | WRITE | USER, Ordering::SeqCst);
                new
            } else {
                found & FRAME_MASK
            };
        }
        table + (va >> 12 & 511) * 8
    }

    fn map(&mut self, root: u64, va: u64, entry: u64) -> u64 {
        let at = self.entry(root, va);
        self.word(at).store(entry, Ordering::SeqCst);
        at
    }
}

trait WriteAt {
    fn write_slice_at(&self, gpa: u64, bytes: &[u8]);
}

impl WriteAt for MmapRegion {
    fn write_slice_at(&self, gpa: u64, bytes: &[u8]) {
        let to = self
            .get_slice(gpa as usize, bytes.len())
            .expect("inside the probe's memory");
        to.write_slice(bytes, 0).expect("the same length");
    }
}

/// The throw-away guest.
struct Probe {
    memory: Memory,
    root: u64,
    cpu: Vcpu,
}

/// What this processor and KVM offer the guest.
#[derive(Clone, Copy, Debug)]
struct Features {
    /// CR4 bits.
    cr4: u64,
    /// 0 without XSAVE.
    xcr0: u64,
    /// See [`HostProfile::state_components`].
    state_components: u64,
}

fn features(vm: &Vm) -> Features {
    let (ebx7, ecx7) = (vm.cpuid(7, 0, 1), vm.cpuid(7, 0, 2));
    let mut cr4 = 0;
    if ebx7 & 1 != 0 {
        cr4 |= CR4_FSGSBASE;
    }
    if ebx7 & 1 << 7 != 0 {
        cr4 |= CR4_SMEP;
    }
    if ecx7 & 1 << 2 != 0 {
        cr4 |= CR4_UMIP;
    }
    // x87, SSE, AVX and AVX-512: states whose size every program may assume; no AMX, no PKRU.
    let avx512 = 0xe0;
    let mut offered = u64::from(vm.cpuid(0xd, 0, 0)) & 0xe7 | 3;
    if offered & avx512 != avx512 {
        offered &= !avx512;
    }
    let mut xcr0 = 0;
    if vm.cpuid(1, 0, 2) & 1 << 26 != 0 {
        cr4 |= CR4_OSXSAVE;
        xcr0 = offered;
    }
    Features {
        cr4,
        xcr0,
        state_components: offered,
    }
}

impl Probe {
    fn new(kvm: &Kvm) -> Result<(Self, Features), ProbeError> {
        let vm = Arc::new(Vm::new(kvm)?);
        let region = Arc::new(MmapRegion::new(BYTES).map_err(ProbeError::Memory)?);
        vm.add_slot(Slot {
            gpa: 0,
            host: region.as_ptr() as u64,
            bytes: BYTES as u64,
            owner: Arc::clone(&region) as _,
        })?;
        let features = features(&vm);
        let mut memory = Memory {
            region: Arc::clone(&region),
            next: abi::frame::ZONE * 4096,
        };
        let root = memory.frame();
        map_monitor(&mut memory, root);
        map_program(&mut memory, root);
        let va = abi::pool_page(0);
        let area = CpuArea::new(region, (abi::frame::POOL * 4096) as usize, va);
        area.write_tss(&descriptors::tss(va, SyscallPort::Open));
        let cpu = Vcpu::new(
            &vm,
            CpuSetup {
                index: 0,
                area,
                root,
                cr4: features.cr4 & !CR4_SMEP,
                xcr0: features.xcr0,
                syscall: SyscallRing::Three,
                iret: IretWorks::No,
                fpu: FpuLoader::Kvm,
            },
        )?;
        Ok((Self { memory, root, cpu }, features))
    }

    fn call(&mut self, at: u64, value: u64, flush: Flush<'_>) -> Result<(Exit, Regs), CpuError> {
        let mut regs = Regs {
            rip: CODE + at,
            rdi: DATA,
            rsi: value,
            ..Regs::default()
        };
        let (exit, _) = self.cpu.run(&mut regs, self.root, flush)?;
        Ok((exit, regs))
    }

    fn expect_syscall(
        &mut self,
        step: &'static str,
        at: u64,
        flush: Flush<'_>,
    ) -> Result<Regs, ProbeError> {
        match self.call(at, 0x55, flush)? {
            (Exit::Syscall, regs) => Ok(regs),
            (other, _) => Err(ProbeError::Unknown {
                step,
                got: format!("{other:?}"),
            }),
        }
    }

    /// Takes the write permission from a page the guest has written to, and has it write again.
    fn paging(&mut self) -> Result<Paging, ProbeError> {
        let entry = self.memory.entry(self.root, DATA);
        self.memory.word(entry).fetch_and(!WRITE, Ordering::SeqCst);
        let word = abi::TABLES_VA + entry;
        for (paging, touches) in [(Paging::Hardware, &[][..]), (Paging::Shadow, &[word][..])] {
            match self.call(STORE_AT, 1, Flush::All { touches })? {
                (Exit::Trap(trap), _) if trap.vector == 14 && trap.address == DATA => {
                    return Ok(paging);
                }
                (Exit::Syscall, _) => {}
                (other, _) => {
                    return Err(ProbeError::Unknown {
                        step: "taking a right away",
                        got: format!("{other:?}"),
                    });
                }
            }
        }
        let got = "the right still there".to_owned();
        Err(ProbeError::Unknown {
            step: "taking a right away",
            got,
        })
    }

    fn tsc_is_hosts(&mut self) -> Result<bool, ProbeError> {
        let before = super::host_tsc();
        let regs = self.expect_syscall("reading the time stamp counter", RDTSC_AT, Flush::None)?;
        let after = super::host_tsc();
        let guest = regs.rdx << 32 | regs.rax & 0xffff_ffff;
        Ok((before..=after).contains(&guest))
    }

    fn tsc_aux_works(&mut self) -> Result<bool, ProbeError> {
        const MARK: u32 = 0x0abc;
        if self.cpu.set_tsc_aux(MARK).is_err() {
            return Ok(false);
        }
        // Without RDTSCP the guest gets #UD: then it does not work either.
        Ok(
            matches!(self.call(RDTSCP_AT, 0, Flush::None)?, (Exit::Syscall, regs) if regs.rsi == u64::from(MARK)),
        )
    }

    /// Has the monitor load a state, if that is the guest's to have; the last step, as it may end the guest.
    fn fpu(&mut self, iret: IretWorks, xcr0: u64) -> Result<FpuLoader, ProbeError> {
        const MARK: u64 = 0x0123_4567_89ab_cdef;
        if iret == IretWorks::No || xcr0 == 0 {
            return Ok(FpuLoader::Kvm);
        }
        let mut state = self.cpu.fpu()?;
        state.0[XMM0..XMM0 + 8].copy_from_slice(&MARK.to_le_bytes());
        state.0[XSTATE_BV] |= SSE;
        self.cpu.set_fpu_loader(FpuLoader::Monitor);
        let by = self.cpu.set_fpu(state)?.by;
        match self.call(XMM_AT, 0, Flush::None) {
            Ok((Exit::Syscall, regs)) if regs.rsi == MARK => Ok(by),
            Ok(_) | Err(_) => Ok(FpuLoader::Kvm),
        }
    }
}

fn map_monitor(memory: &mut Memory, root: u64) {
    use abi::frame;
    for (at, bytes) in [
        (frame::MONITOR_CODE, monitor::image()),
        (frame::IDT, &descriptors::idt()),
        (frame::GDT, &descriptors::gdt()),
        (frame::SYSCALL_STUB, monitor::syscall_stub()),
    ] {
        memory.put(at * 4096, bytes);
    }
    memory.map(
        root,
        abi::MONITOR_CODE_VA,
        (frame::MONITOR_CODE * 4096) | PRESENT,
    );
    memory.map(root, abi::IDT_VA, (frame::IDT * 4096) | PRESENT);
    memory.map(root, abi::GDT_VA, (frame::GDT * 4096) | PRESENT | WRITE);
    memory.map(
        root,
        abi::SYSCALL_STUB_VA,
        (frame::SYSCALL_STUB * 4096) | PRESENT | USER,
    );
    let tss = descriptors::tss_descriptor(abi::pool_page(0));
    memory.put(
        frame::GDT * 4096 + descriptors::tss_descriptor_offset(0),
        &tss,
    );
    for page in 0..abi::CPU_AREA_PAGES {
        let at = (frame::POOL + page) * 4096;
        memory.map(root, abi::pool_page(page), at | PRESENT | WRITE);
    }
}

fn map_program(memory: &mut Memory, root: u64) {
    let code = memory.frame();
    for (at, bytes) in [
        (STORE_AT, STORE),
        (RDTSC_AT, RDTSC),
        (RDTSCP_AT, RDTSCP),
        (XMM_AT, XMM),
    ] {
        memory.put(code + at, bytes);
    }
    memory.map(root, CODE, code | PRESENT | USER);
    let data = memory.frame();
    let entry = memory.map(root, DATA, data | PRESENT | WRITE | USER);
    // The monitor's view of the one table the probe edits.
    memory.map(
        root,
        abi::TABLES_VA + (entry & FRAME_MASK),
        entry & FRAME_MASK | PRESENT | WRITE,
    );
}

/// What was found the first time in this process: a host does not change, and the throw-away guest is a virtual machine more for
/// each machine.
///
/// # Errors
/// As [`probe`]; it is tried again the next time.
pub fn once(kvm: &Kvm) -> Result<HostProfile, ProbeError> {
    static FOUND: OnceLock<HostProfile> = OnceLock::new();
    match FOUND.get() {
        Some(found) => Ok(found.clone()),
        None => {
            let found = probe(kvm)?;
            Ok(FOUND.get_or_init(|| found).clone())
        }
    }
}

/// Probes the host.
///
/// # Errors
/// KVM refused something, or behaves in a way none of the known hosts does.
pub fn probe(kvm: &Kvm) -> Result<HostProfile, ProbeError> {
    let (mut probe, features) = Probe::new(kvm)?;
    let Features {
        cr4,
        xcr0,
        state_components,
    } = features;
    probe.expect_syscall("the first system call", STORE_AT, Flush::None)?;
    let syscall = if probe.cpu.stopped_in_ring_zero() {
        SyscallRing::Zero
    } else {
        SyscallRing::Three
    };
    let paging = probe.paging()?;
    probe.cpu.set_iret(IretWorks::Yes);
    let iret = match probe.call(RDTSC_AT, 0, Flush::All { touches: &[] })? {
        (Exit::Syscall, _) => IretWorks::Yes,
        _ => IretWorks::No,
    };
    probe.cpu.set_iret(iret);
    let tsc_is_hosts = probe.tsc_is_hosts()?;
    let tsc_aux_works = probe.tsc_aux_works()?;
    let fpu = probe.fpu(iret, xcr0)?;
    // SMEP is for hosts where the stub page is the supervisor's; where ring 3 runs it, it must be off.
    let cr4 = if syscall == SyscallRing::Zero {
        cr4
    } else {
        cr4 & !CR4_SMEP
    };
    Ok(HostProfile {
        state_components,
        syscall,
        paging,
        iret,
        fpu,
        tsc_is_hosts,
        tsc_aux_works,
        cr4,
        xcr0,
    })
}

#[cfg(test)]
mod tests;
