//! The monitor's code, as position-independent bytes the VMM copies into guest memory.
//!
//! * 32 exception stubs, 16 bytes apart: the processor has pushed the frame (and for some vectors
//!   an error code); `out` tells the VMM, which reads the frame and never returns here.
//! * `enter`: RSI points at a list of EDI addresses; each gets a locked write that changes nothing.
//!   On a host where KVM shadows, that write is how KVM learns that a page table has changed: a
//!   write of eight bytes (address even) makes it drop that entry's shadow, a write of two bytes
//!   (address + 1) the whole table's, since no one writes an entry in such pieces. Then
//!   CR3 is loaded from RAX, which is the flush everywhere else; RAX, RDX, RSI and RDI are popped and
//!   IRET goes to ring 3.
//! * `enter_out`: the same, but ends with `out` for hosts whose ring 0 cannot IRET to ring 3, and for
//!   probing.
//! * the SYSCALL stub, a page of its own: `out` (one byte wide, so that one port is all the
//!   TSS ever opens to ring 3; the VMM reads the number from RAX), then SYSRET.
#![expect(unsafe_code, reason = "global_asm! and the symbols it defines")]

use std::arch::global_asm;

use crate::abi::{PORT_DONE, PORT_EXCEPTION, PORT_SYSCALL};

/// Bytes from one exception stub to the next.
pub const STUB_STRIDE: u64 = 16;
/// Exception vectors with a stub.
pub const VECTORS: u64 = 32;

global_asm!(
    ".pushsection .rodata.vmm_monitor, \"a\", @progbits",
    ".balign 16",
    ".globl vmm_monitor_start",
    ".hidden vmm_monitor_start",
    "vmm_monitor_start:",
    ".rept 32",
    ".balign 16",
    "out {exception}, al",
    "2: jmp 2b",
    ".endr",
    ".balign 16",
    ".globl vmm_monitor_enter",
    ".hidden vmm_monitor_enter",
    "vmm_monitor_enter:",
    "20: test edi, edi",
    "jz 23f",
    "mov rdx, [rsi]",
    "test dl, 1",
    "jnz 21f",
    "lock or qword ptr [rdx], 0",
    "jmp 22f",
    "21: lock or word ptr [rdx - 1], 0",
    "22: add rsi, 8",
    "dec edi",
    "jmp 20b",
    "23: mov cr3, rax",
    "pop rax",
    "pop rdx",
    "pop rsi",
    "pop rdi",
    "iretq",
    ".balign 16",
    ".globl vmm_monitor_enter_out",
    ".hidden vmm_monitor_enter_out",
    "vmm_monitor_enter_out:",
    "30: test edi, edi",
    "jz 33f",
    "mov rdx, [rsi]",
    "test dl, 1",
    "jnz 31f",
    "lock or qword ptr [rdx], 0",
    "jmp 32f",
    "31: lock or word ptr [rdx - 1], 0",
    "32: add rsi, 8",
    "dec edi",
    "jmp 30b",
    "33: mov cr3, rax",
    "out {done}, al",
    "7: jmp 7b",
    ".globl vmm_monitor_end",
    ".hidden vmm_monitor_end",
    "vmm_monitor_end:",
    ".balign 16",
    ".globl vmm_stub_start",
    ".hidden vmm_stub_start",
    "vmm_stub_start:",
    "out {syscall}, al",
    "sysretq",
    ".globl vmm_stub_end",
    ".hidden vmm_stub_end",
    "vmm_stub_end:",
    ".popsection",
    exception = const PORT_EXCEPTION,
    done = const PORT_DONE,
    syscall = const PORT_SYSCALL,
);

unsafe extern "C" {
    static vmm_monitor_start: u8;
    static vmm_monitor_enter: u8;
    static vmm_monitor_enter_out: u8;
    static vmm_monitor_end: u8;
    static vmm_stub_start: u8;
    static vmm_stub_end: u8;
}

/// Bytes of the `out` at the SYSCALL stub's start: the VMM resumes right after it.
pub const STUB_OUT_BYTES: u64 = 2;

fn between(start: *const u8, end: *const u8) -> &'static [u8] {
    let length = end.addr() - start.addr();
    // SAFETY: both symbols delimit one run of read-only data of this program, which lives for ever.
    unsafe { std::slice::from_raw_parts(start, length) }
}

/// The monitor's code page.
#[must_use]
pub fn image() -> &'static [u8] {
    between(&raw const vmm_monitor_start, &raw const vmm_monitor_end)
}

/// The SYSCALL stub's page.
#[must_use]
pub fn syscall_stub() -> &'static [u8] {
    between(&raw const vmm_stub_start, &raw const vmm_stub_end)
}

/// Offset of `enter` in [`image`].
#[must_use]
pub fn enter_offset() -> u64 {
    ((&raw const vmm_monitor_enter).addr() - (&raw const vmm_monitor_start).addr()) as u64
}

/// Offset of `enter_out` in [`image`].
#[must_use]
pub fn enter_out_offset() -> u64 {
    ((&raw const vmm_monitor_enter_out).addr() - (&raw const vmm_monitor_start).addr()) as u64
}

/// The vector whose stub contains `offset` of [`image`], if one does.
#[must_use]
pub fn vector_at(offset: u64) -> Option<u8> {
    (offset < VECTORS * STUB_STRIDE).then_some((offset / STUB_STRIDE) as u8)
}

/// Whether the processor pushes an error code for `vector` (Intel SDM volume 3, table 6-1).
#[must_use]
pub const fn has_error_code(vector: u8) -> bool {
    matches!(vector, 8 | 10..=14 | 17 | 21 | 29 | 30)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn image_fits_a_page_and_stubs_are_where_vectors_say() {
        assert!(image().len() <= 4096);
        for vector in 0..VECTORS {
            let at = (vector * STUB_STRIDE) as usize;
            assert_eq!(
                &image()[at..at + 2],
                &[0xe6, PORT_EXCEPTION as u8],
                "out imm8, al"
            );
        }
        assert_eq!(vector_at(14 * STUB_STRIDE + 2), Some(14));
        assert_eq!(vector_at(enter_offset()), None);
    }

    #[test]
    fn syscall_stub_is_out_then_sysret() {
        assert_eq!(
            syscall_stub(),
            &[0xe6, PORT_SYSCALL as u8, 0x48, 0x0f, 0x07]
        );
    }
}
