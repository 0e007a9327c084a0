//! A virtual machine: its descriptor and its memory slots.
//!
//! KVM keeps much for a virtual machine that does nothing: tables for each page of its slots, pages for shadow pages to come, the
//! virtual CPUs. So one may *rest*: when the last of its virtual CPUs is dropped ([`super::vcpu::Vcpu`]), what KVM has of it is
//! given back. What it is stays here (its slots, its settings), and the first virtual CPU that is made again makes it again.
//! KVM cannot give back one virtual CPU of several: whoever makes one that was dropped waits until the others are too.
#![expect(
    unsafe_code,
    reason = "KVM_SET_USER_MEMORY_REGION takes a host address"
)]

use std::any::Any;
use std::collections::BTreeSet;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use parking_lot::Condvar;

use super::ioctls;
use crate::locks::{WaitMutex, rank};

/// Why a virtual machine could not be made.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// `/dev/kvm` could not be opened.
    #[error("cannot open /dev/kvm")]
    Open(#[source] io::Error),
    /// A KVM ioctl was refused.
    #[error("KVM refused {what}")]
    Refused {
        /// What was asked.
        what: &'static str,
        /// The host's reason.
        #[source]
        source: io::Error,
    },
    /// This KVM is not the one everybody has.
    #[error("KVM speaks API version {0}, not 12")]
    Version(i32),
    /// This KVM lacks something that kernel guests need.
    #[error("this KVM cannot run kernel guests: it has not {0}")]
    Lacks(&'static str),
    /// A model-specific register was not taken.
    #[error("KVM refused {data:#x} for MSR {index:#x}")]
    Msr {
        /// Its number.
        index: u32,
        /// The value.
        data: u64,
    },
}

pub(super) fn refused(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> VmError {
    move |e| VmError::Refused {
        what,
        source: io::Error::from_raw_os_error(e.errno()),
    }
}

/// A piece of host memory shown to the guest.
pub struct Slot {
    /// Guest-physical address; page aligned.
    pub gpa: u64,
    /// Host address; page aligned.
    pub host: u64,
    /// Length; a multiple of the page.
    pub bytes: u64,
    /// What keeps the host memory mapped. Held as long as the machine lives.
    pub owner: Arc<dyn Any + Send + Sync>,
}

/// What a guest may do with a slot's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rights {
    /// All.
    All,
    /// Load, but not store: a store exits, whatever the guest's page tables say.
    Load,
}

/// A slot that the guest has. Its number is its place in the list.
struct Shown {
    gpas: std::ops::Range<u64>,
    host: u64,
    rights: Rights,
    /// Held as long as the machine lives.
    _owner: Arc<dyn Any + Send + Sync>,
}

/// What becomes of a virtual machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// KVM is about to have it again: its virtual CPUs will know nothing of before.
    Wakes,
    /// KVM has it no more, and no translation of it.
    Rests,
}

/// Is told of a turn, with the machine's lock held.
pub type OnTurn = Box<dyn Fn(Turn) + Send + Sync>;

/// What KVM has of a machine.
#[derive(Default)]
struct Life {
    /// None while it rests.
    fd: Option<Arc<VmFd>>,
    /// Virtual CPUs there are.
    cpus: usize,
    /// Those that were made since it has the descriptor.
    made: BTreeSet<u64>,
    shown: Vec<Shown>,
    /// What KVM was told of [`Vm::set_shadow_pages`].
    shadow_pages: Option<u64>,
}

/// A virtual machine.
pub struct Vm {
    pub(super) cpuid: CpuId,
    /// Bytes of an XSAVE area.
    pub(super) xsave_bytes: usize,
    life: WaitMutex<rank::VmLife, Life>,
    /// Signalled when it begins to rest.
    rests: Condvar,
    on_turn: OnceLock<OnTurn>,
    /// ioctls made, `KVM_RUN` included.
    pub ioctls: AtomicU64,
}

impl std::fmt::Debug for Vm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Vm")
            .field("ioctls", &self.ioctls)
            .finish_non_exhaustive()
    }
}

/// Opens `/dev/kvm` and checks that it speaks the API everybody has.
///
/// # Errors
/// It cannot be opened, or its version is another.
pub fn open() -> Result<Kvm, VmError> {
    let kvm = Kvm::new().map_err(|e| VmError::Open(io::Error::from_raw_os_error(e.errno())))?;
    match kvm.get_api_version() {
        12 => Ok(kvm),
        other => Err(VmError::Version(other)),
    }
}

impl Vm {
    /// A machine without memory or virtual CPUs.
    ///
    /// # Errors
    /// KVM refused.
    pub fn new(kvm: &Kvm) -> Result<Self, VmError> {
        let cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(refused("the list of CPUID leaves"))?;
        let fd = kvm.create_vm().map_err(refused("a virtual machine"))?;
        let xsave_bytes = fd.check_extension_int(Cap::Xsave2).max(4096) as usize;
        let life = Life {
            fd: Some(Arc::new(fd)),
            ..Life::default()
        };
        Ok(Self {
            cpuid,
            xsave_bytes,
            life: WaitMutex::new(life),
            rests: Condvar::new(),
            on_turn: OnceLock::new(),
            ioctls: AtomicU64::new(2),
        })
    }

    /// Who is told when it rests, and before it wakes. Once, before its first virtual CPU.
    pub fn set_on_turn(&self, on_turn: OnTurn) {
        let first = self.on_turn.set(on_turn).is_ok();
        debug_assert!(first, "somebody is told already");
    }

    /// Whether it rests.
    #[must_use]
    pub fn rests(&self) -> bool {
        self.life.lock().fd.is_none()
    }

    fn turn(&self, turn: Turn) {
        if let Some(on_turn) = self.on_turn.get() {
            on_turn(turn);
        }
    }

    /// Its descriptor, made again if it rests.
    ///
    /// # Errors
    /// KVM refused.
    pub(super) fn fd(&self) -> Result<Arc<VmFd>, VmError> {
        self.wake(&mut self.life.lock())
    }

    fn wake(&self, life: &mut Life) -> Result<Arc<VmFd>, VmError> {
        if let Some(fd) = &life.fd {
            return Ok(Arc::clone(fd));
        }
        let fd = open()?.create_vm();
        let fd = Arc::new(fd.map_err(refused("a virtual machine"))?);
        self.ioctls.fetch_add(2, Ordering::Relaxed);
        if let Some(pages) = life.shadow_pages {
            self.limit_shadow_pages(&fd, pages)?;
        }
        for (number, shown) in (0..).zip(&life.shown) {
            self.show(&fd, number, shown)?;
        }
        self.turn(Turn::Wakes);
        Ok(Arc::clone(life.fd.insert(fd)))
    }

    /// Makes virtual CPU `index`, waiting until it is not there any more if it was.
    pub(super) fn create_cpu(&self, index: u64) -> Result<VcpuFd, VmError> {
        let mut life = self.life.lock();
        while life.made.contains(&index) {
            life.wait(&self.rests);
        }
        let fd = self.wake(&mut life)?;
        let cpu = fd.create_vcpu(index).map_err(refused("a virtual CPU"))?;
        life.made.insert(index);
        life.cpus += 1;
        Ok(cpu)
    }

    /// A virtual CPU that [`Self::create_cpu`] made goes: the machine rests after the last.
    pub(super) fn cpu_goes(&self) {
        let mut life = self.life.lock();
        life.cpus -= 1;
        if life.cpus > 0 {
            return;
        }
        life.made.clear();
        let fd = life.fd.take();
        self.turn(Turn::Rests);
        drop(life);
        self.rests.notify_all();
        // The last look at it, but for the virtual CPU's own descriptor.
        drop(fd);
    }

    /// Adds a memory slot. While the machine rests, KVM is asked for it when it wakes.
    ///
    /// # Errors
    /// KVM refused it: an address beyond the guest's physical width, or no memory.
    pub fn add_slot(&self, slot: Slot) -> Result<(), VmError> {
        self.add(slot, Rights::All)
    }

    /// Adds a slot that the guest cannot store to: a store that its page tables allow exits as one to something that is
    /// not memory. Page tables must not lie there: the processor's walks store to them.
    ///
    /// # Errors
    /// As [`Self::add_slot`].
    pub fn add_read_only_slot(&self, slot: Slot) -> Result<(), VmError> {
        self.add(slot, Rights::Load)
    }

    /// Whether an address lies in memory that the guest may load from and not store to.
    #[must_use]
    pub fn is_read_only(&self, gpa: u64) -> bool {
        let life = self.life.lock();
        let mut read_only = life.shown.iter().filter(|slot| slot.rights == Rights::Load);
        read_only.any(|slot| slot.gpas.contains(&gpa))
    }

    fn add(&self, slot: Slot, rights: Rights) -> Result<(), VmError> {
        let shown = Shown {
            gpas: slot.gpa..slot.gpa.saturating_add(slot.bytes),
            host: slot.host,
            rights,
            _owner: slot.owner,
        };
        let mut life = self.life.lock();
        if let Some(fd) = &life.fd {
            self.show(fd, life.shown.len() as u32, &shown)?;
        }
        life.shown.push(shown);
        Ok(())
    }

    fn show(&self, fd: &VmFd, number: u32, shown: &Shown) -> Result<(), VmError> {
        let region = kvm_userspace_memory_region {
            slot: number,
            flags: match shown.rights {
                Rights::All => 0,
                Rights::Load => KVM_MEM_READONLY,
            },
            guest_phys_addr: shown.gpas.start,
            memory_size: shown.gpas.end - shown.gpas.start,
            userspace_addr: shown.host,
        };
        self.ioctls.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the slot's owner, which is kept for as long as the machine, keeps the range mapped, and all
        // access to it on our side is volatile or atomic.
        unsafe { fd.set_user_memory_region(region) }.map_err(refused("a memory slot"))
    }

    /// Lets KVM keep `pages` shadow pages: its default, about 2 % of the slots, thrashes with a
    /// small pool. Has no effect where the hardware walks both levels.
    ///
    /// # Errors
    /// KVM refused.
    pub fn set_shadow_pages(&self, pages: u64) -> Result<(), VmError> {
        let mut life = self.life.lock();
        life.shadow_pages = Some(pages);
        match &life.fd {
            Some(fd) => self.limit_shadow_pages(fd, pages),
            None => Ok(()),
        }
    }

    fn limit_shadow_pages(&self, fd: &VmFd, pages: u64) -> Result<(), VmError> {
        self.ioctls.fetch_add(1, Ordering::Relaxed);
        ioctls::set_nr_mmu_pages(fd, pages).map_err(|source| VmError::Refused {
            what: "a number of shadow pages",
            source,
        })
    }

    /// One register (EAX, EBX, ECX, EDX by 0 to 3) of a CPUID leaf the guest will see.
    #[must_use]
    pub fn cpuid(&self, leaf: u32, subleaf: u32, register: usize) -> u32 {
        self.cpuid
            .as_slice()
            .iter()
            .find(|e| e.function == leaf && (e.index == subleaf || e.flags & 1 == 0))
            .map_or(0, |e| [e.eax, e.ebx, e.ecx, e.edx][register])
    }
}
