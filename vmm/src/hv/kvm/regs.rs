//! What a virtual CPU starts with: control registers, segments and MSRs.

use guest::abi::{AREA_TSS, GDT_VA, IDT_VA, SYSCALL_STUB_VA, selector};
use guest::descriptors::TSS_LIMIT;
use kvm_bindings::{kvm_dtable, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs};

use crate::linux::thread::Regs;

/// RFLAGS bits ring 3 may change: CF PF AF ZF SF TF DF OF RF AC ID (Intel SDM volume 1, 3.4.3).
pub const USER_FLAGS: u64 = 0x0025_0dd5;
/// RFLAGS bits that are always set in ring 3 here: the reserved bit 1 and IF.
pub const FIXED_FLAGS: u64 = 0x202;

const CR0: u64 = 1 | 1 << 1 | 1 << 4 | 1 << 5 | 1 << 16 | 1 << 18 | 1 << 31; // PE MP ET NE WP AM PG
const EFER: u64 = 1 | 1 << 8 | 1 << 10 | 1 << 11; // SCE LME LMA NXE
const CR4_PAE: u64 = 1 << 5;
const CR4_OSFXSR: u64 = 1 << 9;
const CR4_OSXMMEXCPT: u64 = 1 << 10;
/// SGDT and its like fault in ring 3.
pub const CR4_UMIP: u64 = 1 << 11;
/// RDFSBASE and its like work in ring 3.
pub const CR4_FSGSBASE: u64 = 1 << 16;
/// XGETBV and XSAVE work.
pub const CR4_OSXSAVE: u64 = 1 << 18;
/// Ring 0 cannot execute user pages.
pub const CR4_SMEP: u64 = 1 << 20;

const MSR_STAR: u32 = 0xc000_0081;
const MSR_LSTAR: u32 = 0xc000_0082;
const MSR_FMASK: u32 = 0xc000_0084;
/// `IA32_TSC_AUX`: what RDTSCP and RDPID return.
pub const MSR_TSC_AUX: u32 = 0xc000_0103;

/// A flat code or data segment with this selector.
#[must_use]
pub fn segment(sel: u16) -> kvm_segment {
    let code = matches!(sel, selector::KERNEL_CS | selector::USER_CS);
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector: sel,
        type_: if code { 11 } else { 3 },
        present: 1,
        dpl: (sel & 3) as u8,
        db: u8::from(!code),
        s: 1,
        l: u8::from(code),
        g: 1,
        ..Default::default()
    }
}

/// Fills `sregs` for virtual CPU `index`, whose area is at `area`: 64-bit mode on `root`, ring 3.
pub fn initial_sregs(
    sregs: &mut kvm_sregs,
    (index, area): (u64, u64),
    root: u64,
    cr4_features: u64,
) {
    sregs.cr0 = CR0;
    sregs.cr3 = root;
    sregs.cr4 = CR4_PAE | CR4_OSFXSR | CR4_OSXMMEXCPT | cr4_features;
    sregs.efer = EFER;
    sregs.cs = segment(selector::USER_CS);
    sregs.ss = segment(selector::USER_DS);
    for data in [&mut sregs.ds, &mut sregs.es, &mut sregs.fs, &mut sregs.gs] {
        *data = kvm_segment {
            unusable: 1,
            ..Default::default()
        };
    }
    sregs.gdt = kvm_dtable {
        base: GDT_VA,
        limit: 0xfff,
        ..Default::default()
    };
    sregs.idt = kvm_dtable {
        base: IDT_VA,
        limit: 0xfff,
        ..Default::default()
    };
    sregs.ldt = kvm_segment {
        unusable: 1,
        ..Default::default()
    };
    sregs.tr = kvm_segment {
        base: area + AREA_TSS,
        limit: TSS_LIMIT,
        selector: selector::TSS + 16 * index as u16,
        type_: 11,
        present: 1,
        ..Default::default()
    };
}

/// The MSRs of a virtual CPU.
#[must_use]
pub fn msrs(index: u64) -> Vec<kvm_msr_entry> {
    let star = u64::from(selector::USER_DS - 8) << 48 | u64::from(selector::KERNEL_CS) << 32;
    // All flags the kernel would clear, TF first of all: the stub must not be single-stepped.
    let fmask = 0x0025_7fd5;
    [
        (MSR_STAR, star),
        (MSR_LSTAR, SYSCALL_STUB_VA),
        (MSR_FMASK, fmask),
        (MSR_TSC_AUX, index),
    ]
    .into_iter()
    .map(|(index, data)| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    })
    .collect()
}

/// RFLAGS as ring 3 may have it.
pub(super) fn user_flags(flags: u64) -> u64 {
    flags & USER_FLAGS | FIXED_FLAGS
}

/// Whether ring 3 may be resumed at `va`: Linux's limit, below the non-canonical hole, where SYSRET
/// would fault in ring 0.
pub(super) fn user_address(va: u64) -> bool {
    va < 0x7fff_ffff_f000
}

/// Puts the processor into the ring of `cs`, with these FS and GS bases.
pub(super) fn set_segments(sregs: &mut kvm_sregs, cs: u16, ss: u16, bases: (u64, u64)) {
    sregs.cs = segment(cs);
    sregs.ss = segment(ss);
    sregs.fs.base = bases.0;
    sregs.gs.base = bases.1;
}

/// A record of registers with those that KVM's record and a thread's both have.
macro_rules! with_common_regs {
    ($record:ident, $from:expr, $($rest:tt)*) => {
        $record {
            rax: $from.rax,
            rbx: $from.rbx,
            rcx: $from.rcx,
            rdx: $from.rdx,
            rsi: $from.rsi,
            rdi: $from.rdi,
            rsp: $from.rsp,
            rbp: $from.rbp,
            r8: $from.r8,
            r9: $from.r9,
            r10: $from.r10,
            r11: $from.r11,
            r12: $from.r12,
            r13: $from.r13,
            r14: $from.r14,
            r15: $from.r15,
            rip: $from.rip,
            $($rest)*
        }
    };
}

/// The thread's registers, as KVM takes them.
pub(super) fn put_regs(to: &mut kvm_regs, from: &Regs) {
    *to = with_common_regs!(kvm_regs, from, rflags: from.rflags);
}

/// KVM's registers and the FS and GS bases, as the thread's record has them.
pub(super) fn take_regs(from: &kvm_regs, bases: (u64, u64), to: &mut Regs) {
    *to = with_common_regs!(
        Regs, from,
        rflags: user_flags(from.rflags),
        fs_base: bases.0,
        gs_base: bases.1
    );
}
