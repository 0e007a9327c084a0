//! The first processor's registers, and what they refer to: GDT and first page tables.

use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};

use super::image::Entry;
use super::memory::Memory;
use super::params::write;
use super::{BootError, layout};
use crate::hv::kvm::board_cpu::BoardCpu;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// Present, writable.
const TABLE: u64 = 0b11;
/// Present, writable, 2 MiB.
const LARGE: u64 = 0b1000_0011;

/// Selectors, as the 64-bit boot protocol wants them.
const CODE: u16 = 0x10;
const DATA: u16 = 0x18;
const TASK: u16 = 0x20;

const CODE_64: u8 = 0b1011;
const DATA_RW: u8 = 0b0011;
const TASK_BUSY: u8 = 0b1011;

/// How wide the code segment is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Mode {
    Bits32,
    Bits64,
}

fn flat(selector: u16, kind: u8, mode: Mode) -> kvm_segment {
    let long = selector == CODE && mode == Mode::Bits64;
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_: kind,
        present: 1,
        s: 1,
        l: u8::from(long),
        db: u8::from(!long),
        g: 1,
        ..Default::default()
    }
}

/// A segment's descriptor (Intel SDM volume 3, 3.4.5).
fn descriptor(segment: &kvm_segment) -> u64 {
    let limit = u64::from(segment.limit >> if segment.g == 1 { 12 } else { 0 });
    let access = u64::from(segment.type_)
        | u64::from(segment.s) << 4
        | u64::from(segment.dpl) << 5
        | u64::from(segment.present) << 7;
    let flags = u64::from(segment.l) << 1 | u64::from(segment.db) << 2 | u64::from(segment.g) << 3;
    (limit & 0xffff)
        | (segment.base & 0xff_ffff) << 16
        | access << 40
        | (limit >> 16 & 0xf) << 48
        | flags << 52
        | (segment.base >> 24 & 0xff) << 56
}

/// Sets the first processor's registers for `entry`.
///
/// # Errors
/// KVM refused, or there is no memory where the tables go.
pub fn prepare(cpu: &BoardCpu, memory: &Memory, entry: Entry) -> Result<(), BootError> {
    let mode = match entry {
        Entry::Linux64(_) => Mode::Bits64,
        Entry::Pvh(_) => Mode::Bits32,
    };
    let code = flat(CODE, CODE_64, mode);
    let data = flat(DATA, DATA_RW, mode);
    let task = kvm_segment {
        limit: 0x67,
        selector: TASK,
        type_: TASK_BUSY,
        present: 1,
        ..Default::default()
    };
    let table = [
        0,
        0,
        descriptor(&code),
        descriptor(&data),
        descriptor(&task),
        0,
    ];
    write(memory, layout::GDT, &words(&table))?;
    if mode == Mode::Bits64 {
        write_page_tables(memory)?;
    }
    cpu.set_start(&registers(entry), |sregs| {
        set_segments(sregs, code, data, task);
        sregs.gdt = kvm_dtable {
            base: layout::GDT,
            limit: u16::try_from(table.len() * 8 - 1).expect("small"),
            ..Default::default()
        };
        sregs.idt = kvm_dtable::default();
        match mode {
            Mode::Bits32 => {
                sregs.cr0 = CR0_PE | CR0_ET;
                sregs.cr4 = 0;
                sregs.efer = 0;
            }
            Mode::Bits64 => {
                sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
                sregs.cr3 = layout::PAGE_TABLES;
                sregs.cr4 = CR4_PAE;
                sregs.efer = EFER_LME | EFER_LMA;
            }
        }
    })?;
    cpu.set_local_interrupts()?;
    Ok(())
}

fn set_segments(sregs: &mut kvm_sregs, code: kvm_segment, data: kvm_segment, task: kvm_segment) {
    sregs.cs = code;
    for register in [
        &mut sregs.ds,
        &mut sregs.es,
        &mut sregs.fs,
        &mut sregs.gs,
        &mut sregs.ss,
    ] {
        *register = data;
    }
    sregs.tr = task;
}

fn registers(entry: Entry) -> kvm_regs {
    let common = kvm_regs {
        rflags: 2,
        ..Default::default()
    };
    match entry {
        Entry::Linux64(rip) => kvm_regs {
            rip,
            rsi: layout::ZERO_PAGE,
            rsp: layout::STACK_TOP,
            rbp: layout::STACK_TOP,
            ..common
        },
        Entry::Pvh(rip) => kvm_regs {
            rip,
            rbx: layout::PVH_INFO,
            ..common
        },
    }
}

/// Maps the first 4 GiB to themselves.
fn write_page_tables(memory: &Memory) -> Result<(), BootError> {
    const PAGE: u64 = 4096;
    let pointers = layout::PAGE_TABLES + PAGE;
    let directories = pointers + PAGE;
    write(memory, layout::PAGE_TABLES, &words(&[pointers | TABLE]))?;
    let four: Vec<u64> = (0..4).map(|i| (directories + i * PAGE) | TABLE).collect();
    write(memory, pointers, &words(&four))?;
    let pages: Vec<u64> = (0..4 * 512).map(|i| i << 21 | LARGE).collect();
    write(memory, directories, &words(&pages))
}

fn words(list: &[u64]) -> Vec<u8> {
    list.iter().flat_map(|word| word.to_le_bytes()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_those_of_every_boot_loader() {
        let d = |s, k, m| descriptor(&flat(s, k, m));
        assert_eq!(d(CODE, CODE_64, Mode::Bits64), 0x00af_9b00_0000_ffff);
        assert_eq!(d(CODE, CODE_64, Mode::Bits32), 0x00cf_9b00_0000_ffff);
        assert_eq!(d(DATA, DATA_RW, Mode::Bits64), 0x00cf_9300_0000_ffff);
    }
}
