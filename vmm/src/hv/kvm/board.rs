//! What a whole computer has besides memory and processors: interrupt controllers and a timer, all
//! inside KVM, and the descriptors through which device threads reach the guest without an exit.
//!
//! Only kernel guests use it; process guests have no interrupts.

use kvm_ioctls::{Cap, IoEventAddress};
use vmm_sys_util::eventfd::EventFd;

use super::vm::{Vm, VmError, refused};

/// Where KVM keeps three pages for processors that cannot run real mode (Intel without
/// "unrestricted guest"): between the I/O APIC and the end of 4 GiB, in no memory map.
const TSS_ADDRESS: usize = 0xfffb_d000;

/// What KVM must offer for a kernel guest, with the name the person is told.
const NEEDED: [(Cap, &str); 5] = [
    (Cap::Irqchip, "an interrupt controller (KVM_CAP_IRQCHIP)"),
    (Cap::Pit2, "a timer (KVM_CAP_PIT2)"),
    (Cap::Irqfd, "interrupts from descriptors (KVM_CAP_IRQFD)"),
    (
        Cap::Ioeventfd,
        "notifications to descriptors (KVM_CAP_IOEVENTFD)",
    ),
    (Cap::SetTssAddr, "a task segment (KVM_CAP_SET_TSS_ADDR)"),
];

impl Vm {
    /// Makes the interrupt controllers and the timer. Before the first virtual CPU.
    ///
    /// # Errors
    /// This KVM does not have them, or refused.
    pub fn create_board(&self) -> Result<(), VmError> {
        let fd = self.fd()?;
        for (cap, name) in NEEDED {
            if !fd.check_extension(cap) {
                return Err(VmError::Lacks(name));
            }
        }
        fd.set_tss_address(TSS_ADDRESS)
            .map_err(refused("an address for the task segment"))?;
        fd.create_irq_chip()
            .map_err(refused("an interrupt controller"))?;
        let pit = kvm_bindings::kvm_pit_config {
            flags: kvm_bindings::KVM_PIT_SPEAKER_DUMMY,
            ..Default::default()
        };
        fd.create_pit2(pit).map_err(refused("a timer"))
    }

    /// A descriptor that raises global interrupt `gsi`, as an edge, whenever it is written to.
    ///
    /// # Errors
    /// The host has no descriptor left, or KVM refused.
    pub fn interrupt(&self, gsi: u32) -> Result<EventFd, VmError> {
        let event = event()?;
        self.fd()?
            .register_irqfd(&event, gsi)
            .map_err(refused("an interrupt"))?;
        Ok(event)
    }

    /// A descriptor that becomes readable when the guest writes the 32-bit `value` to `gpa`; the
    /// write causes no exit.
    ///
    /// # Errors
    /// The host has no descriptor left, or KVM refused.
    pub fn doorbell(&self, gpa: u64, value: u32) -> Result<EventFd, VmError> {
        let event = event()?;
        self.fd()?
            .register_ioevent(&event, &IoEventAddress::Mmio(gpa), value)
            .map_err(refused("a notification"))?;
        Ok(event)
    }

    /// The CPUID leaves KVM can give a guest.
    #[must_use]
    pub fn supported_cpuid(&self) -> &kvm_bindings::CpuId {
        &self.cpuid
    }

    /// Whether the local APIC's timer can be set by a TSC deadline; CPUID does not tell.
    #[must_use]
    pub fn has_tsc_deadline(&self) -> bool {
        let fd = self.fd();
        fd.is_ok_and(|fd| fd.check_extension(Cap::TscDeadlineTimer))
    }

    /// Most virtual CPUs of a machine.
    #[must_use]
    pub fn max_cpus(&self) -> usize {
        let most = self.fd().map(|fd| fd.check_extension_int(Cap::MaxVcpus));
        most.ok()
            .and_then(|most| usize::try_from(most).ok())
            .unwrap_or(4)
            .max(1)
    }
}

/// A descriptor for events that never makes its reader wait.
///
/// # Errors
/// The host has none left.
pub fn event() -> Result<EventFd, VmError> {
    EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(|source| VmError::Refused {
        what: "an event descriptor",
        source,
    })
}
