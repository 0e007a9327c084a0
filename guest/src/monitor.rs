//! The monitor's code, as position-independent bytes the VMM copies into guest memory.
//!
//! * 32 exception stubs, 16 bytes apart: the processor has pushed the frame (and for some vectors
//!   an error code); `out` tells the VMM, which reads the frame and never returns here.
//! * `enter`: RSP points at a list of addresses; each gets a locked write that changes nothing.
//!   On a host where KVM shadows, that write is how KVM learns that a page table has changed: a
//!   write of eight bytes makes it drop that entry's shadow, a write of two bytes
//!   the whole table's, since no one writes an entry in such pieces. Then
//!   CR3 is loaded from RAX, which is the flush everywhere else; RAX and RDX are popped and
//!   IRET goes to ring 3. There are as many pairs of a pop and a write as a list may have addresses, and who enters
//!   begins with as many of them as he needs ([`run_of`]): no loop, as a software KVM takes microseconds for each instruction.
//! * `enter_out`: the same, but ends with `out` for hosts whose ring 0 cannot IRET to ring 3, and for
//!   probing.
//! * `restore`: XRSTOR of the components in RAX from the XSAVE area at RCX, before one of the above: RAX and RCX are
//!   popped, and then the address of what follows. The VMM puts nothing there that XRSTOR would refuse; if it did, the
//!   fault would be one of ring 0, which ends the thread. Before that an x87 instruction of the monitor's own: some of AMD's
//!   processors load the addresses of the last one only with a pending exception, and would show the thread another one's.
//! * the SYSCALL stub, a page of its own: `out` (one byte wide, so that one port is all the
//!   TSS ever opens to ring 3; the VMM reads the number from RAX), then SYSRET.
#![expect(unsafe_code, reason = "global_asm! and the symbols it defines")]

use std::arch::global_asm;

use crate::abi::{MONITOR_CODE_VA, PORT_DONE, PORT_EXCEPTION, PORT_SYSCALL};

/// Bytes from one exception stub to the next.
pub const STUB_STRIDE: u64 = 16;
/// Exception vectors with a stub.
pub const VECTORS: u64 = 32;
/// Entries that one run touches at most.
pub const MAX_ENTRIES: usize = 64;
/// Tables that one run touches at most.
pub const MAX_TABLES: usize = 192;
/// Bytes of a pop and a write.
const TOUCH_BYTES: usize = 6;

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
    ".globl vmm_monitor_entries",
    ".hidden vmm_monitor_entries",
    ".rept {entries}",
    "pop rdx",
    "lock or qword ptr [rdx], 0",
    ".endr",
    "vmm_monitor_entries:",
    "pop rdx",
    "jmp rdx",
    ".globl vmm_monitor_enter",
    ".hidden vmm_monitor_enter",
    ".rept {tables}",
    "pop rdx",
    "lock or word ptr [rdx], 0",
    ".endr",
    "vmm_monitor_enter:",
    "mov cr3, rax",
    "pop rax",
    "pop rdx",
    "iretq",
    ".globl vmm_monitor_enter_entries",
    ".hidden vmm_monitor_enter_entries",
    ".rept {entries}",
    "pop rdx",
    "lock or qword ptr [rdx], 0",
    ".endr",
    "vmm_monitor_enter_entries:",
    "mov cr3, rax",
    "pop rax",
    "pop rdx",
    "iretq",
    ".globl vmm_monitor_enter_out",
    ".hidden vmm_monitor_enter_out",
    ".rept {tables}",
    "pop rdx",
    "lock or word ptr [rdx], 0",
    ".endr",
    "vmm_monitor_enter_out:",
    "mov cr3, rax",
    "out {done}, al",
    "7: jmp 7b",
    ".globl vmm_monitor_restore",
    ".hidden vmm_monitor_restore",
    "vmm_monitor_restore:",
    "fnclex",
    "emms",
    "fild dword ptr [rcx]",
    "xrstor64 [rcx]",
    "pop rax",
    "pop rcx",
    "pop rdx",
    "jmp rdx",
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
    entries = const MAX_ENTRIES,
    tables = const MAX_TABLES,
    exception = const PORT_EXCEPTION,
    done = const PORT_DONE,
    syscall = const PORT_SYSCALL,
);

unsafe extern "C" {
    static vmm_monitor_start: u8;
    static vmm_monitor_entries: u8;
    static vmm_monitor_enter: u8;
    static vmm_monitor_enter_entries: u8;
    static vmm_monitor_enter_out: u8;
    static vmm_monitor_restore: u8;
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

/// How a run of the monitor ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// In ring 3 (`enter`): the list is followed by RAX, RDX and the frame IRET takes.
    Ring3,
    /// With an exit (`enter_out`).
    Out,
}

/// Where a run begins, as an offset in [`image`], that touches `entries` one by one and the shadows of `tables` as a whole,
/// and the words its stack begins with.
///
/// # Panics
/// If there are more than [`MAX_ENTRIES`] or [`MAX_TABLES`].
#[must_use]
pub fn run_of(ending: Ending, entries: &[u64], tables: &[u64]) -> (u64, Vec<u64>) {
    assert!(entries.len() <= MAX_ENTRIES && tables.len() <= MAX_TABLES);
    let before =
        |end: *const u8, touches: &[u64]| offset(end) - (touches.len() * TOUCH_BYTES) as u64;
    let end = match ending {
        Ending::Ring3 => &raw const vmm_monitor_enter,
        Ending::Out => &raw const vmm_monitor_enter_out,
    };
    let then = before(end, tables);
    if entries.is_empty() {
        return (then, tables.to_vec());
    }
    if tables.is_empty() && ending == Ending::Ring3 {
        // What most flushes are: nothing to jump to.
        let start = before(&raw const vmm_monitor_enter_entries, entries);
        return (start, entries.to_vec());
    }
    let words = [entries, &[MONITOR_CODE_VA + then], tables].concat();
    (before(&raw const vmm_monitor_entries, entries), words)
}

fn offset(at: *const u8) -> u64 {
    (at.addr() - (&raw const vmm_monitor_start).addr()) as u64
}

/// The same run after `restore`, which leaves RAX and RCX as said: where it begins, and its stack.
///
/// `restore` wants the components in EDX:EAX, and the area's address in RCX.
#[must_use]
pub fn restore_first((start, words): (u64, &[u64]), rax: u64, rcx: u64) -> (u64, Vec<u64>) {
    let first = [rax, rcx, MONITOR_CODE_VA + start];
    let words = [&first, words].concat();
    (offset(&raw const vmm_monitor_restore), words)
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
    }

    #[test]
    fn runs_begin_with_as_many_touches_as_they_have_addresses() {
        const POP: u8 = 0x5a;
        for ending in [Ending::Ring3, Ending::Out] {
            let (most, words) = run_of(ending, &[], &[1; MAX_TABLES]);
            assert_eq!(words.len(), MAX_TABLES);
            assert_eq!(vector_at(most), None);
            let (none, words) = run_of(ending, &[], &[]);
            assert_eq!(none - most, (MAX_TABLES * TOUCH_BYTES) as u64);
            assert!(words.is_empty());
            assert_eq!(&image()[none as usize..][..3], &[0x0f, 0x22, 0xd8]);
            let (at, words) = run_of(ending, &[7; MAX_ENTRIES], &[8]);
            assert_eq!(vector_at(at), None);
            let then = none - TOUCH_BYTES as u64;
            assert_eq!(words[MAX_ENTRIES..], [MONITOR_CODE_VA + then, 8]);
            let (last, _) = run_of(ending, &[7], &[8]);
            for touch in [most, then, at, last] {
                assert_eq!(image()[touch as usize], POP);
                assert_eq!(image()[touch as usize + TOUCH_BYTES - 2..][..2], [0x0a, 0]);
            }
            // `jmp rdx`
            let jump = last as usize + TOUCH_BYTES;
            assert_eq!(image()[jump..][..3], [POP, 0xff, 0xe2]);
        }
        let (one, words) = run_of(Ending::Ring3, &[7], &[]);
        assert_eq!(words, [7]);
        assert_eq!(image()[one as usize], POP);
        assert_eq!(
            image()[one as usize + TOUCH_BYTES..][..3],
            [0x0f, 0x22, 0xd8]
        );
        assert_eq!(run_of(Ending::Out, &[7], &[]).1.len(), 2);
    }

    #[test]
    fn restore_goes_on_where_the_run_begins() {
        let (start, words) = run_of(Ending::Ring3, &[7], &[]);
        let (at, stack) = restore_first((start, &words), 1, 2);
        assert_eq!(vector_at(at), None);
        assert_eq!(stack, [1, 2, MONITOR_CODE_VA + start, 7]);
        // `fnclex`, `emms`, `fild dword ptr [rcx]`; `xrstor64 [rcx]`, pops of RAX, RCX and RDX, `jmp rdx`
        let x87 = [0xdb, 0xe2, 0x0f, 0x77, 0xdb, 0x01];
        assert_eq!(image()[at as usize..][..6], x87);
        let code = [0x48, 0x0f, 0xae, 0x29, 0x58, 0x59, 0x5a, 0xff, 0xe2];
        assert_eq!(image()[at as usize + 6..][..9], code);
    }

    #[test]
    fn syscall_stub_is_out_then_sysret() {
        assert_eq!(
            syscall_stub(),
            &[0xe6, PORT_SYSCALL as u8, 0x48, 0x0f, 0x07]
        );
    }
}
