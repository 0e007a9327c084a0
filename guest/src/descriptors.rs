//! The tables the processor reads: GDT, IDT and TSS, as bytes to be copied into guest memory
//! (Intel SDM volume 3, sections 3.5, 6.14 and 8.7).

use crate::abi::{
    AREA_STACK_TOP, AREA_TSS, AREA_XSAVE, MAX_CPUS, MONITOR_CODE_VA, PORT_SYSCALL, selector,
};
use crate::monitor::{STUB_STRIDE, VECTORS};

/// Bytes of the TSS without its I/O bitmap.
const TSS_BYTES: usize = 104;
/// Ports the I/O bitmap covers: enough for the VMM's own; all others are beyond the TSS's limit,
/// which the processor treats as denied.
const BITMAP_PORTS: usize = 64;
/// Offset of the TSS's last byte: bitmap, then the byte of ones the processor wants after it.
pub const TSS_LIMIT: u32 = (TSS_BYTES + BITMAP_PORTS / 8) as u32;

const _: () = assert!(AREA_TSS + (TSS_LIMIT as u64) < AREA_XSAVE);

/// The GDT, with room for a TSS descriptor for every virtual CPU there may be.
#[must_use]
pub fn gdt() -> Vec<u8> {
    let mut entries = vec![0_u64; 8 + 2 * MAX_CPUS as usize];
    entries[usize::from(selector::KERNEL_CS / 8)] = 0x00af_9b00_0000_ffff;
    entries[usize::from(selector::KERNEL_DS / 8)] = 0x00cf_9300_0000_ffff;
    entries[usize::from(selector::USER_DS / 8)] = 0x00cf_f300_0000_ffff;
    entries[usize::from(selector::USER_CS / 8)] = 0x00af_fb00_0000_ffff;
    entries.iter().flat_map(|e| e.to_le_bytes()).collect()
}

/// The TSS descriptor of the virtual CPU whose area is at `area`.
#[must_use]
pub fn tss_descriptor(area: u64) -> [u8; 16] {
    let base = area + AREA_TSS;
    let low =
        u64::from(TSS_LIMIT) | (base & 0x00ff_ffff) << 16 | 0x8b << 40 | (base >> 24 & 0xff) << 56;
    (u128::from(base >> 32) << 64 | u128::from(low)).to_le_bytes()
}

/// Offset in the GDT of the TSS descriptor of virtual CPU `cpu`.
#[must_use]
pub const fn tss_descriptor_offset(cpu: u64) -> u64 {
    selector::TSS as u64 + 16 * cpu
}

/// The IDT: every exception to its stub in ring 0. `INT3` and `INTO` may be raised by ring 3, as on
/// Linux; other software interrupts give #GP.
#[must_use]
pub fn idt() -> Vec<u8> {
    let mut bytes = vec![0_u8; 4096];
    for vector in 0..VECTORS {
        let target = MONITOR_CODE_VA + vector * STUB_STRIDE;
        let dpl: u64 = if matches!(vector, 3 | 4) { 3 } else { 0 };
        let low = target & 0xffff
            | u64::from(selector::KERNEL_CS) << 16
            | (0x8e | dpl << 5) << 40
            | (target >> 16 & 0xffff) << 48;
        let at = vector as usize * 16;
        bytes[at..at + 8].copy_from_slice(&low.to_le_bytes());
        bytes[at + 8..at + 16].copy_from_slice(&(target >> 32).to_le_bytes());
    }
    bytes
}

/// Whether ring 3 may use the system call port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SyscallPort {
    /// SYSCALL enters ring 0: no port is open.
    Closed,
    /// SYSCALL stays in ring 3: its one port is open.
    Open,
}

/// The TSS of the virtual CPU whose area is at `area`, with its I/O bitmap.
#[must_use]
pub fn tss(area: u64, port: SyscallPort) -> Vec<u8> {
    let mut bytes = vec![0_u8; TSS_BYTES];
    let stack = area + AREA_STACK_TOP;
    bytes[4..12].copy_from_slice(&stack.to_le_bytes());
    bytes[102..104].copy_from_slice(&(TSS_BYTES as u16).to_le_bytes());
    bytes.extend(std::iter::repeat_n(0xff_u8, BITMAP_PORTS / 8 + 1));
    if port == SyscallPort::Open {
        bytes[TSS_BYTES + usize::from(PORT_SYSCALL / 8)] &= !(1 << (PORT_SYSCALL % 8));
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tss_closed_denies_every_port() {
        assert!(
            tss(0, SyscallPort::Closed)[TSS_BYTES..]
                .iter()
                .all(|&b| b == 0xff)
        );
    }

    #[test]
    fn tss_limit_is_the_offset_of_the_last_byte() {
        assert_eq!(tss(3, SyscallPort::Open).len(), TSS_LIMIT as usize + 1);
    }
}
