//! From an exception in ring 3 to what the guest gets: a page, or a signal.

use shadow_mm::{Access, Denied, FaultKind, GuestVa};

use crate::hv::Trap;
use crate::linux::process::{SigFields, SigInfo};
use crate::linux::thread::Thread;
use crate::memory::{Fault, Memory};

/// What a page fault came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Faulted {
    /// The page is there: go on.
    Resolved(FaultKind),
    /// The page was read from its file: go on.
    ReadFile,
    /// The guest gets this signal.
    Signal(SigInfo),
    /// No frame is left for it.
    NoMemory,
}

/// Page fault error code bits (Intel SDM volume 3, section 4.7).
const WRITE: u64 = 1 << 1;
const FETCH: u64 = 1 << 4;

const SI_KERNEL: i32 = 0x80;
const SIGILL: i32 = 4;
const SIGTRAP: i32 = 5;
const SIGBUS: i32 = 7;
const SIGFPE: i32 = 8;
const SIGSEGV: i32 = 11;

fn signal(signo: i32, code: i32, addr: u64) -> SigInfo {
    SigInfo {
        signo,
        code,
        errno: 0,
        fields: SigFields::Fault { addr },
    }
}

/// A general protection fault's signal.
#[must_use]
pub fn general_protection() -> SigInfo {
    signal(SIGSEGV, SI_KERNEL, 0)
}

/// The signal Linux sends for an exception that is not a page fault; `rip` is where it happened.
#[must_use]
pub fn exception_signal(trap: Trap, rip: u64, mxcsr: u32) -> SigInfo {
    match trap.vector {
        0 => signal(SIGFPE, 1, rip),
        1 => signal(SIGTRAP, 2, rip),
        3 => signal(SIGTRAP, SI_KERNEL, 0),
        6 => signal(SIGILL, 2, rip),
        11 | 12 => signal(SIGBUS, SI_KERNEL, 0),
        16 => signal(SIGFPE, 0, rip),
        17 => signal(SIGBUS, 1, 0),
        19 => signal(SIGFPE, simd_code(mxcsr), rip),
        _ => general_protection(),
    }
}

/// `si_code` of a SIMD floating-point exception, from the unmasked flags of MXCSR (Intel SDM volume
/// 1, section 10.2.3).
fn simd_code(mxcsr: u32) -> i32 {
    let raised = mxcsr & !(mxcsr >> 7) & 0x3f;
    match raised {
        r if r & 0x01 != 0 => 7,
        r if r & 0x04 != 0 => 3,
        r if r & 0x08 != 0 => 4,
        r if r & 0x12 != 0 => 5,
        r if r & 0x20 != 0 => 6,
        _ => 0,
    }
}

/// Bytes of the longest instruction (Intel SDM volume 2, section 2.3.11).
pub const LONGEST_INSTRUCTION: usize = 15;

/// Whether the instruction `bytes` begin with changes the code segment or raises an interrupt by
/// software: `int imm8`, a far call or jump through memory, a far return, `iret`. To ring 3 these
/// are privileged where they are valid, a general protection fault; a KVM that has to emulate them
/// and cannot says "invalid opcode".
#[must_use]
pub fn is_control_transfer(bytes: &[u8]) -> bool {
    let prefix =
        |&b: &u8| matches!(b, 0x26 | 0x2e | 0x36 | 0x3e | 0x40..=0x4f | 0x64..=0x67 | 0xf2 | 0xf3);
    let at = bytes.iter().position(|b| !prefix(b)).unwrap_or(bytes.len());
    match bytes[at..] {
        [0xca | 0xcb | 0xcd | 0xcf, ..] => true,
        [0xff, modrm, ..] => matches!(modrm >> 3 & 7, 3 | 5) && modrm < 0xc0,
        _ => false,
    }
}

/// Resolves a page fault.
pub fn page_fault(memory: &Memory, t: &Thread, trap: Trap) -> Faulted {
    let access = match trap.error {
        e if e & FETCH != 0 => Access::Execute,
        e if e & WRITE != 0 => Access::Write,
        _ => Access::Read,
    };
    let Some(va) = GuestVa::new(trap.address) else {
        return Faulted::Signal(signal(SIGSEGV, 1, trap.address));
    };
    match memory.fault(&t.mm.space, va, access) {
        Fault::Resolved(kind) => Faulted::Resolved(kind),
        Fault::Read => Faulted::ReadFile,
        Fault::Denied(denied) => Faulted::Signal(denied_signal(denied, trap.address)),
        Fault::NoMemory => Faulted::NoMemory,
    }
}

fn denied_signal(denied: Denied, addr: u64) -> SigInfo {
    match denied {
        Denied::NotMapped => signal(SIGSEGV, 1, addr),
        Denied::Protection => signal(SIGSEGV, 2, addr),
        Denied::BeyondEnd | Denied::IoError | Denied::NoSpace => signal(SIGBUS, 2, addr),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn simd_divide_by_zero_unmasked_is_fltdiv() {
        assert_eq!(simd_code(0x1f80 & !(1 << 9) | 1 << 2), 3);
    }

    #[test]
    fn control_transfers_are_told_from_invalid_opcodes() {
        for transfer in [
            &[0xcd, 0x0d][..],
            &[0x48, 0xcf],
            &[0xff, 0x2d, 0, 0, 0, 0],
            &[0x66, 0xff, 0x1c, 0x24],
            &[0xcb],
        ] {
            assert!(is_control_transfer(transfer), "{transfer:x?}");
        }
        for other in [
            &[0x0f, 0x0b][..],
            &[0xff, 0xe8],
            &[0xff, 0x10],
            &[0x48],
            &[],
            &[0xff],
        ] {
            assert!(!is_control_transfer(other), "{other:x?}");
        }
    }

    #[test]
    fn privileged_instruction_is_segv_from_the_kernel() {
        let info = exception_signal(
            Trap {
                vector: 13,
                error: 0,
                address: 0,
            },
            0x1000,
            0,
        );
        assert_eq!((info.signo, info.code), (SIGSEGV, SI_KERNEL));
    }
}
