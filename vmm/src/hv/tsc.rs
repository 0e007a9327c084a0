//! The host's time stamp counter.
#![expect(unsafe_code, reason = "RDTSC is an intrinsic")]

/// The host's time stamp counter.
#[must_use]
pub fn host_tsc() -> u64 {
    // SAFETY: every x86-64 processor has RDTSC, and the VMM does not set CR4.TSD.
    unsafe { core::arch::x86_64::_rdtsc() }
}
