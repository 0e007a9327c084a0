//! A virtual machine: its descriptor and its memory slots.
#![expect(
    unsafe_code,
    reason = "KVM_SET_USER_MEMORY_REGION takes a host address"
)]

use std::any::Any;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::{Cap, Kvm, VmFd};

use super::ioctls;

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

/// A slot that KVM has.
struct Shown {
    gpas: std::ops::Range<u64>,
    rights: Rights,
    /// Held as long as the machine lives.
    _owner: Arc<dyn Any + Send + Sync>,
}

/// A virtual machine.
pub struct Vm {
    pub(super) fd: VmFd,
    pub(super) cpuid: CpuId,
    /// Bytes of an XSAVE area.
    pub(super) xsave_bytes: usize,
    slots: AtomicU32,
    owners: crate::locks::Mutex<crate::locks::rank::VmOwners, Vec<Shown>>,
    /// ioctls made, `KVM_RUN` included.
    pub ioctls: AtomicU64,
}

impl std::fmt::Debug for Vm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Vm")
            .field("slots", &self.slots)
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
        Ok(Self {
            fd,
            cpuid,
            xsave_bytes,
            slots: AtomicU32::new(0),
            owners: crate::locks::Mutex::default(),
            ioctls: AtomicU64::new(2),
        })
    }

    /// Adds a memory slot.
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
        let shown = self.owners.lock();
        let mut read_only = shown.iter().filter(|slot| slot.rights == Rights::Load);
        read_only.any(|slot| slot.gpas.contains(&gpa))
    }

    fn add(&self, slot: Slot, rights: Rights) -> Result<(), VmError> {
        let region = kvm_userspace_memory_region {
            slot: self.slots.fetch_add(1, Ordering::Relaxed),
            flags: match rights {
                Rights::All => 0,
                Rights::Load => KVM_MEM_READONLY,
            },
            guest_phys_addr: slot.gpa,
            memory_size: slot.bytes,
            userspace_addr: slot.host,
        };
        self.owners.lock().push(Shown {
            gpas: slot.gpa..slot.gpa.saturating_add(slot.bytes),
            rights,
            _owner: slot.owner,
        });
        self.ioctls.fetch_add(1, Ordering::Relaxed);
        // SAFETY: `owner`, kept above for as long as the machine, keeps the range mapped, and all
        // access to it on our side is volatile or atomic.
        unsafe { self.fd.set_user_memory_region(region) }.map_err(refused("a memory slot"))
    }

    /// Lets KVM keep `pages` shadow pages: its default, about 2 % of the slots, thrashes with a
    /// small pool. Has no effect where the hardware walks both levels.
    ///
    /// # Errors
    /// KVM refused.
    pub fn set_shadow_pages(&self, pages: u64) -> Result<(), VmError> {
        self.ioctls.fetch_add(1, Ordering::Relaxed);
        ioctls::set_nr_mmu_pages(&self.fd, pages).map_err(|source| VmError::Refused {
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
