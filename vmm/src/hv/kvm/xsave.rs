//! FPU and vector state of a virtual CPU, as an XSAVE area of any size.
#![expect(
    unsafe_code,
    reason = "the size of the area KVM writes is not in its type"
)]

use std::os::fd::AsRawFd;

use kvm_bindings::{KVMIO, Xsave, kvm_xsave, kvm_xsave2};
use kvm_ioctls::VcpuFd;
use vmm_sys_util::ioctl::ioctl_with_mut_ref;
use vmm_sys_util::ioctl_ior_nr;

use crate::linux::thread::XsaveArea;

/// Bytes of the fixed part of `struct kvm_xsave`.
const FIXED: usize = 4096;

fn empty(bytes: usize) -> Result<Xsave, kvm_ioctls::Error> {
    let extra = bytes.saturating_sub(FIXED).div_ceil(4);
    let mut xsave = Xsave::new(extra).map_err(|_| kvm_ioctls::Error::new(libc::ENOMEM))?;
    // SAFETY: the number of extra words stays what the allocation was made with.
    let fixed: &mut kvm_xsave2 = unsafe { xsave.as_mut_fam_struct() };
    fixed.len = extra;
    Ok(xsave)
}

ioctl_ior_nr!(KVM_GET_XSAVE2, KVMIO, 0xcf, kvm_xsave);

/// The state of the virtual CPU with this descriptor (KVM API, `KVM_GET_XSAVE2`). Not by its [`VcpuFd`]: whoever wants it may
/// be another than the one who runs it.
pub(super) fn get(fd: &impl AsRawFd, bytes: usize) -> Result<XsaveArea, kvm_ioctls::Error> {
    let mut xsave = empty(bytes)?;
    // SAFETY: the number of extra words is not touched.
    let area = unsafe { xsave.as_mut_fam_struct() };
    // SAFETY: the allocation is as large as KVM said the area is (KVM_CAP_XSAVE2).
    if unsafe { ioctl_with_mut_ref(fd, KVM_GET_XSAVE2(), &mut area.xsave) } != 0 {
        return Err(kvm_ioctls::Error::last());
    }
    let fixed = &xsave.as_fam_struct_ref().xsave.region;
    let words = fixed.iter().chain(xsave.as_slice());
    let mut area: Vec<u8> = words.flat_map(|w| w.to_le_bytes()).collect();
    area.truncate(bytes);
    Ok(XsaveArea(area))
}

pub(super) fn set(fd: &VcpuFd, area: &XsaveArea) -> Result<(), kvm_ioctls::Error> {
    let mut xsave = empty(area.0.len())?;
    let mut words = area
        .0
        .chunks_exact(4)
        .map(|w| u32::from_le_bytes([w[0], w[1], w[2], w[3]]));
    // SAFETY: the number of extra words is not touched.
    let fixed = unsafe { xsave.as_mut_fam_struct() };
    for word in &mut fixed.xsave.region {
        *word = words.next().unwrap_or(0);
    }
    for word in xsave.as_mut_slice() {
        *word = words.next().unwrap_or(0);
    }
    // SAFETY: the allocation is at least as large as the area KVM reads.
    unsafe { fd.set_xsave2(&xsave) }
}
