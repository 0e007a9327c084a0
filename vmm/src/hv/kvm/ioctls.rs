//! The few KVM ioctls that `kvm-ioctls` does not have.
#![expect(unsafe_code, reason = "raw ioctls")]

use std::io;

use kvm_bindings::{
    KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, KVMIO, kvm_device_attr, kvm_signal_mask,
};
use kvm_ioctls::{VcpuFd, VmFd};
use vmm_sys_util::ioctl::{ioctl_with_ref, ioctl_with_val};
use vmm_sys_util::{ioctl_io_nr, ioctl_iow_nr};

ioctl_io_nr!(KVM_SET_NR_MMU_PAGES, KVMIO, 0x44);

/// Sets how many shadow pages KVM may keep for `vm` (KVM API, `KVM_SET_NR_MMU_PAGES`).
pub(super) fn set_nr_mmu_pages(vm: &VmFd, pages: u64) -> io::Result<()> {
    // SAFETY: the descriptor is a VM's, and this ioctl takes a plain number.
    match unsafe { ioctl_with_val(vm, KVM_SET_NR_MMU_PAGES(), pages) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

ioctl_iow_nr!(KVM_SET_SIGNAL_MASK, KVMIO, 0x8b, kvm_signal_mask);

/// `struct kvm_signal_mask` with the kernel's 64-bit set behind it.
#[repr(C)]
struct SignalMask {
    length: u32,
    set: [u8; 8],
}

/// Blocks every signal but `signal` while the virtual CPU runs (KVM API, `KVM_SET_SIGNAL_MASK`).
pub(super) fn allow_signal(cpu: &VcpuFd, signal: i32) -> io::Result<()> {
    let allowed = 1_u64 << (signal - 1);
    let mask = SignalMask {
        length: 8,
        set: (!allowed).to_ne_bytes(),
    };
    // SAFETY: the descriptor is a virtual CPU's, and `mask` is laid out as the ioctl reads it.
    match unsafe { ioctl_with_ref(cpu, KVM_SET_SIGNAL_MASK(), &mask) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);

/// Sets the offset between the host's time stamp counter and the guest's to zero, which KVM offers
/// since Linux 5.16 (KVM API, `KVM_VCPU_TSC_OFFSET`).
pub(super) fn clear_tsc_offset(cpu: &VcpuFd) -> io::Result<()> {
    let offset = 0_u64;
    let attr = kvm_device_attr {
        group: KVM_VCPU_TSC_CTRL,
        attr: u64::from(KVM_VCPU_TSC_OFFSET),
        addr: (&raw const offset).addr() as u64,
        flags: 0,
    };
    // SAFETY: the descriptor is a virtual CPU's; `attr` points at a u64 that outlives the call.
    match unsafe { ioctl_with_ref(cpu, KVM_SET_DEVICE_ATTR(), &attr) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
