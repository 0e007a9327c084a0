//! The model-specific registers a guest may touch: a table, like that of CPUID. What is not in it is
//! `#GP` in the guest, whatever this KVM would answer, as far as KVM can filter (`KVM_X86_SET_MSR_FILTER`,
//! Linux 5.10; x2APIC registers are never filtered). What is in it, KVM answers as for the CPUID leaves
//! that [`super::cpuid`] leaves over: a register of a feature that a guest has not is `#GP` too.

/// What a guest may do with a register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Only read it.
    Read,
    /// Read and write it.
    Full,
}

/// Who keeps what is in a register when a machine is saved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kept {
    /// The list of MSRs.
    Here,
    /// Nobody: it says what the host is, or has an effect and no content.
    Nowhere,
    /// The system registers have it.
    Elsewhere,
}

/// Some registers.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    /// The first.
    pub first: u32,
    /// The last.
    pub last: u32,
    /// What may be done.
    pub access: Access,
    /// Who keeps it.
    pub kept: Kept,
}

const fn one(index: u32, access: Access, kept: Kept) -> Row {
    many(index, index, access, kept)
}

const fn many(first: u32, last: u32, access: Access, kept: Kept) -> Row {
    Row {
        first,
        last,
        access,
        kept,
    }
}

/// The time stamp counter's deadline; set last, when the counter and the local APIC are there.
const TSC_DEADLINE: u32 = 0x6e0;

use Access::{Full, Read};
use Kept::{Elsewhere, Here, Nowhere};

/// All of them, by number.
pub const TABLE: &[Row] = &[
    // IA32_TIME_STAMP_COUNTER
    one(0x10, Full, Here),
    // IA32_PLATFORM_ID, IA32_APIC_BASE
    one(0x17, Read, Nowhere),
    one(0x1b, Full, Elsewhere),
    // IA32_FEATURE_CONTROL: locked, nothing on. IA32_TSC_ADJUST
    one(0x3a, Read, Nowhere),
    one(0x3b, Full, Here),
    // IA32_SPEC_CTRL; IA32_PRED_CMD
    one(0x48, Full, Here),
    one(0x49, Full, Nowhere),
    // IA32_BIOS_SIGN_ID: Linux writes 0 and reads the microcode's revision.
    one(0x8b, Full, Nowhere),
    // Clock rates: MSR_FSB_FREQ, MSR_PLATFORM_INFO
    many(0xcd, 0xce, Read, Nowhere),
    // IA32_UMWAIT_CONTROL
    one(0xe1, Full, Here),
    // IA32_MTRRCAP
    one(0xfe, Read, Nowhere),
    // IA32_ARCH_CAPABILITIES, IA32_FLUSH_CMD
    many(0x10a, 0x10b, Full, Nowhere),
    // IA32_TSX_CTRL, MISC_FEATURES_ENABLES
    one(0x122, Full, Here),
    one(0x140, Full, Here),
    // SYSENTER
    many(0x174, 0x176, Full, Here),
    // IA32_PERF_STATUS
    one(0x198, Read, Nowhere),
    // IA32_MISC_ENABLE
    one(0x1a0, Full, Here),
    // IA32_DEBUGCTL, and the last branch and interrupt
    one(0x1d9, Full, Here),
    many(0x1db, 0x1de, Read, Nowhere),
    // MTRRs and IA32_PAT
    many(0x200, 0x20f, Full, Here),
    one(0x250, Full, Here),
    many(0x258, 0x259, Full, Here),
    many(0x268, 0x26f, Full, Here),
    one(0x277, Full, Here),
    one(0x2ff, Full, Here),
    one(TSC_DEADLINE, Full, Here),
    // IA32_XSS
    one(0xda0, Full, Here),
    // KVM: wall clock, clock; end of interrupt, polling. No asynchronous page faults, no steal clock but
    // with remote flushes.
    many(0x4b56_4d00, 0x4b56_4d01, Full, Here),
    many(0x4b56_4d03, 0x4b56_4d05, Full, Here),
    // IA32_EFER; SYSCALL
    one(0xc000_0080, Full, Elsewhere),
    many(0xc000_0081, 0xc000_0084, Full, Here),
    // FS.BASE, GS.BASE; the kernel's GS.BASE, TSC_AUX
    many(0xc000_0100, 0xc000_0101, Full, Elsewhere),
    many(0xc000_0102, 0xc000_0103, Full, Here),
    // AMD: SYSCFG, HWCR, top of memory, northbridge, interrupts pending, MMIO configuration
    one(0xc001_0010, Read, Nowhere),
    one(0xc001_0015, Full, Here),
    one(0xc001_001a, Read, Nowhere),
    one(0xc001_001d, Read, Nowhere),
    one(0xc001_001f, Read, Nowhere),
    one(0xc001_0055, Read, Nowhere),
    one(0xc001_0058, Read, Nowhere),
    // AMD: VM_CR, OS-visible workarounds, VIRT_SPEC_CTRL
    one(0xc001_0114, Read, Nowhere),
    many(0xc001_0140, 0xc001_0141, Read, Nowhere),
    one(0xc001_011f, Full, Here),
    // AMD: LS_CFG, IC_CFG, DC_CFG, DE_CFG, BU_CFG2
    many(0xc001_1020, 0xc001_1022, Read, Nowhere),
    one(0xc001_1029, Full, Here),
    one(0xc001_102a, Read, Nowhere),
];

/// What the VMM sets before a processor starts, besides what KVM gives after a reset.
pub const AT_START: [(u32, u64); 2] = [
    // IA32_MTRR_DEF_TYPE: on, write-back, no ranges.
    (0x2ff, 1 << 11 | 6),
    // IA32_MISC_ENABLE: fast strings.
    (0x1a0, 1),
];

/// What a machine is saved with, in the order in which it is to be set.
#[must_use]
pub fn saved() -> Vec<u32> {
    let here = TABLE.iter().filter(|row| row.kept == Here);
    let (mut list, last): (Vec<u32>, Vec<u32>) = here
        .flat_map(|row| row.first..=row.last)
        .partition(|&index| index != TSC_DEADLINE);
    list.extend(last);
    list
}

/// Whether a guest may read a register.
#[must_use]
pub fn may_read(index: u32) -> bool {
    row(index).is_some()
}

/// Whether a guest may write a register.
#[must_use]
pub fn may_write(index: u32) -> bool {
    row(index).is_some_and(|row| row.access == Full)
}

fn row(index: u32) -> Option<&'static Row> {
    TABLE
        .iter()
        .find(|row| (row.first..=row.last).contains(&index))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hv::kvm::msr_filter::in_a_window;

    #[test]
    fn rows_do_not_overlap_and_cover_what_every_kernel_needs() {
        for (i, a) in TABLE.iter().enumerate() {
            assert!(a.first <= a.last);
            assert!(in_a_window(a.first) && in_a_window(a.last), "{a:x?}");
            for b in &TABLE[i + 1..] {
                assert!(a.last < b.first || b.last < a.first, "{a:x?} {b:x?}");
            }
        }
        for index in [0x10, 0x277, 0xc000_0082, 0xc000_0102, 0x4b56_4d01] {
            assert!(may_read(index) && may_write(index) && saved().contains(&index));
        }
        // Machine checks, performance counters, SVM, VMX.
        for index in [0x179, 0x400, 0xc1, 0x186, 0xc001_0000, 0xc001_0117, 0x480] {
            assert!(!may_read(index) && !may_write(index), "{index:#x}");
        }
        assert!(may_read(0xfe) && !may_write(0xfe));
        assert_eq!(saved().last(), Some(&TSC_DEADLINE));
    }
}
