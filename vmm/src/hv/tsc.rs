//! The host's time stamp counter.
#![expect(unsafe_code, reason = "the instructions have no safe wrapper")]

/// The host's time stamp counter, not read before what comes before it.
#[must_use]
pub fn host_tsc() -> u64 {
    // SAFETY: LFENCE is part of SSE2, which every x86-64 processor has, and only orders loads.
    unsafe { core::arch::x86_64::_mm_lfence() };
    // SAFETY: RDTSC exists on every x86-64 processor and, with CR4.TSD clear as Linux keeps it for
    // programs, has no effect but to read the counter.
    unsafe { core::arch::x86_64::_rdtsc() }
}
