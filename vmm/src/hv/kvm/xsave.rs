//! FPU and vector state of a virtual CPU, as an XSAVE area of any size.
#![expect(
    unsafe_code,
    reason = "the size of the area KVM writes is not in its type"
)]

use kvm_bindings::{Xsave, kvm_xsave2};
use kvm_ioctls::VcpuFd;

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

pub(super) fn get(fd: &VcpuFd, bytes: usize) -> Result<XsaveArea, kvm_ioctls::Error> {
    let mut xsave = empty(bytes)?;
    // SAFETY: the allocation is as large as KVM said the area is (KVM_CAP_XSAVE2).
    unsafe { fd.get_xsave2(&mut xsave) }?;
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
