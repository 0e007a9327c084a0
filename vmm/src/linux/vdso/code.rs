//! The vDSO's machine code. It never runs here: it is bytes that [`super::image`] wraps into a
//! shared object for the guest.
//!
//! The section starts with a table of (offset, size) pairs, so that nothing but the two ends has to
//! be known to the linker. The code is position independent and uses caller-saved registers only.

#![expect(unsafe_code, reason = "assembly, and the bytes between its two labels")]

use std::mem::offset_of;

use super::data::VdsoData;

/// Where the code is in the image.
pub(super) const TEXT_OFFSET: u64 = 0x1000;

/// The functions, in the order of the table.
pub(super) const NAMES: [&str; 5] = [
    "clock_gettime",
    "gettimeofday",
    "time",
    "getcpu",
    "clock_getres",
];

std::arch::global_asm!(
    r#"
    .pushsection .rodata.vmm_vdso, "a", @progbits
    .balign 64
    .globl vmm_vdso_start
    .hidden vmm_vdso_start
    .globl vmm_vdso_end
    .hidden vmm_vdso_end
vmm_vdso_start:
    .long .Lvmm_vdso_clock_gettime - vmm_vdso_start, .Lvmm_vdso_gettimeofday - .Lvmm_vdso_clock_gettime
    .long .Lvmm_vdso_gettimeofday - vmm_vdso_start, .Lvmm_vdso_time - .Lvmm_vdso_gettimeofday
    .long .Lvmm_vdso_time - vmm_vdso_start, .Lvmm_vdso_getcpu - .Lvmm_vdso_time
    .long .Lvmm_vdso_getcpu - vmm_vdso_start, .Lvmm_vdso_clock_getres - .Lvmm_vdso_getcpu
    .long .Lvmm_vdso_clock_getres - vmm_vdso_start, vmm_vdso_end - .Lvmm_vdso_clock_getres

    # In: r8d = 0 for the real-time clock. Out: carry set if the counter must not be used, else the
    # clock in nanoseconds in rax. Keeps rdi, rsi, r8.
    .balign 16
.Lvmm_vdso_read:
    lea     r9, [rip + vmm_vdso_start + {distance}]
2:  mov     r10d, dword ptr [r9 + {seq}]
    test    r10d, 1
    jnz     5f
    cmp     dword ptr [r9 + {mode}], 0
    jne     6f
    lfence
    rdtsc
    shl     rdx, 32
    or      rax, rdx
    sub     rax, qword ptr [r9 + {tsc_base}]
    jae     3f
    xor     eax, eax
3:  mul     qword ptr [r9 + {mult}]
    mov     ecx, dword ptr [r9 + {shift}]
    shrd    rax, rdx, cl
    add     rax, qword ptr [r9 + {mono_base_ns}]
    test    r8d, r8d
    jnz     4f
    add     rax, qword ptr [r9 + {real_offset_ns}]
4:  cmp     r10d, dword ptr [r9 + {seq}]
    jne     2b
    clc
    ret
5:  pause
    jmp     2b
6:  stc
    ret

    # int clock_gettime(clockid_t edi, struct timespec *rsi)
    # REALTIME 0, MONOTONIC 1, REALTIME_COARSE 5, MONOTONIC_COARSE 6
    .balign 16
.Lvmm_vdso_clock_gettime:
    endbr64
    cmp     edi, 6
    ja      2f
    mov     eax, 0x63
    bt      eax, edi
    jnc     2f
    xor     r8d, r8d
    mov     eax, 0x42
    bt      eax, edi
    setc    r8b
    call    .Lvmm_vdso_read
    jc      2f
    xor     edx, edx
    mov     ecx, 1000000000
    div     rcx
    mov     qword ptr [rsi], rax
    mov     qword ptr [rsi + 8], rdx
    xor     eax, eax
    ret
2:  mov     eax, 228
    syscall
    ret

    # int gettimeofday(struct timeval *rdi, struct timezone *rsi)
    .balign 16
.Lvmm_vdso_gettimeofday:
    endbr64
    test    rdi, rdi
    jz      2f
    xor     r8d, r8d
    call    .Lvmm_vdso_read
    jc      4f
    xor     edx, edx
    mov     ecx, 1000000000
    div     rcx
    mov     qword ptr [rdi], rax
    mov     eax, edx
    xor     edx, edx
    mov     ecx, 1000
    div     ecx
    mov     qword ptr [rdi + 8], rax
2:  test    rsi, rsi
    jz      3f
    mov     qword ptr [rsi], 0
3:  xor     eax, eax
    ret
4:  mov     eax, 96
    syscall
    ret

    # time_t time(time_t *rdi)
    .balign 16
.Lvmm_vdso_time:
    endbr64
    xor     r8d, r8d
    call    .Lvmm_vdso_read
    jc      3f
    xor     edx, edx
    mov     ecx, 1000000000
    div     rcx
    test    rdi, rdi
    jz      2f
    mov     qword ptr [rdi], rax
2:  ret
3:  mov     eax, 201
    syscall
    ret

    # int getcpu(unsigned *rdi, unsigned *rsi, void *)
    .balign 16
.Lvmm_vdso_getcpu:
    endbr64
    xor     ecx, ecx
    mov     eax, dword ptr [rip + vmm_vdso_start + {distance} + {getcpu_mode}]
    test    eax, eax
    jz      2f
    cmp     eax, 1
    jne     5f
    rdtscp
2:  mov     eax, ecx
    and     eax, 0xfff
    shr     ecx, 12
    test    rdi, rdi
    jz      3f
    mov     dword ptr [rdi], eax
3:  test    rsi, rsi
    jz      4f
    mov     dword ptr [rsi], ecx
4:  xor     eax, eax
    ret
5:  mov     eax, 309
    syscall
    ret

    # int clock_getres(clockid_t edi, struct timespec *rsi)
    .balign 16
.Lvmm_vdso_clock_getres:
    endbr64
    cmp     edi, 1
    ja      3f
    cmp     dword ptr [rip + vmm_vdso_start + {distance} + {mode}], 0
    jne     3f
    test    rsi, rsi
    jz      2f
    mov     qword ptr [rsi], 0
    mov     qword ptr [rsi + 8], 1
2:  xor     eax, eax
    ret
3:  mov     eax, 229
    syscall
    ret
vmm_vdso_end:
    .popsection
    "#,
    distance = const guest::abi::VDSO_DATA_VA - guest::abi::VDSO_CODE_VA - TEXT_OFFSET,
    seq = const offset_of!(VdsoData, seq),
    mode = const offset_of!(VdsoData, mode),
    mult = const offset_of!(VdsoData, mult),
    shift = const offset_of!(VdsoData, shift),
    tsc_base = const offset_of!(VdsoData, tsc_base),
    mono_base_ns = const offset_of!(VdsoData, mono_base_ns),
    real_offset_ns = const offset_of!(VdsoData, real_offset_ns),
    getcpu_mode = const offset_of!(VdsoData, getcpu_mode),
);

unsafe extern "C" {
    #[link_name = "vmm_vdso_start"]
    static START: u8;
    #[link_name = "vmm_vdso_end"]
    static END: u8;
}

/// The bytes: table and code.
pub(super) fn bytes() -> &'static [u8] {
    let start = &raw const START;
    let length = (&raw const END).addr() - start.addr();
    // SAFETY: the two labels bound one read-only section of this binary, written only by the
    // assembly above; it is initialised, never changes, and lives as long as the program.
    unsafe { std::slice::from_raw_parts(start, length) }
}

/// Offset in [`bytes`] and size of every function of [`NAMES`].
pub(super) fn functions() -> impl Iterator<Item = (&'static str, u64, u64)> {
    let half = |at: &[u8]| {
        at.first_chunk()
            .map_or(0, |&bytes| u64::from(u32::from_le_bytes(bytes)))
    };
    NAMES
        .iter()
        .zip(bytes().chunks_exact(8))
        .map(move |(&name, row)| (name, half(row), half(&row[4..])))
}
