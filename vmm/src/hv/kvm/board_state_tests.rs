//! A processor that counts its timer's interrupts is saved in the middle and goes on in another machine.
//! On whatever KVM `/dev/kvm` is; without one, nothing is tested, and that is said.

use std::sync::atomic::{AtomicU32, Ordering};

use kvm_bindings::CpuId;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::hv::kvm::board_cpu::{Bus, Stop};
use crate::hv::kvm::vm;
use crate::kernel::cpuid::{self, Shape};
use crate::kernel::image::Entry;
use crate::kernel::memory::{self, Memory};
use crate::kernel::{msrs, start};

/// Where the program is.
const PROGRAM: u64 = 0x10_0000;

/// ```text
///   cli
///   lea handler(%rip), %rax; mov $0x3400, %edi           // gate 0x40 of an IDT at 0x3000
///   mov %ax, (%rdi); movw $0x10, 2(%rdi); movw $0x8e00, 4(%rdi)
///   shr $16, %rax; mov %ax, 6(%rdi); shr $16, %rax; mov %eax, 8(%rdi)
///   lidt idtr(%rip)
///   mov $0xfee00000, %esi
///   movl $0x1ff, 0xf0(%rsi)                              // local APIC on
///   movl $0xb, 0x3e0(%rsi); movl $0x20040, 0x320(%rsi)   // timer: periodic, vector 0x40
///   movl $5000000, 0x380(%rsi)                           // every 5 ms
///   sti
/// 1: hlt; jmp 1b
/// handler:
///   inc %rbx; mov %ebx, %eax; out %eax, $0x10
///   movl $0, 0xb0(%rsi); iretq                           // end of interrupt
/// idtr: .word 0xfff; .quad 0x3000
/// ```
const COUNTER: [u8; 126] = [
    0xfa, 0x48, 0x8d, 0x05, 0x5b, 0x00, 0x00, 0x00, 0xbf, 0x00, 0x34, 0x00, 0x00, 0x66, 0x89, 0x07,
    0x66, 0xc7, 0x47, 0x02, 0x10, 0x00, 0x66, 0xc7, 0x47, 0x04, 0x00, 0x8e, 0x48, 0xc1, 0xe8, 0x10,
    0x66, 0x89, 0x47, 0x06, 0x48, 0xc1, 0xe8, 0x10, 0x89, 0x47, 0x08, 0x0f, 0x01, 0x1d, 0x44, 0x00,
    0x00, 0x00, 0xbe, 0x00, 0x00, 0xe0, 0xfe, 0xc7, 0x86, 0xf0, 0x00, 0x00, 0x00, 0xff, 0x01, 0x00,
    0x00, 0xc7, 0x86, 0xe0, 0x03, 0x00, 0x00, 0x0b, 0x00, 0x00, 0x00, 0xc7, 0x86, 0x20, 0x03, 0x00,
    0x00, 0x40, 0x00, 0x02, 0x00, 0xc7, 0x86, 0x80, 0x03, 0x00, 0x00, 0x40, 0x4b, 0x4c, 0x00, 0xfb,
    0xf4, 0xeb, 0xfd, 0x48, 0xff, 0xc3, 0x89, 0xd8, 0xe7, 0x10, 0xc7, 0x86, 0xb0, 0x00, 0x00, 0x00,
    0x00, 0x00, 0x00, 0x00, 0x48, 0xcf, 0xff, 0x0f, 0x00, 0x30, 0x00, 0x00, 0x00, 0x00,
];

/// Remembers what the program says.
#[derive(Default)]
struct Heard(AtomicU32);

impl Bus for Heard {
    fn port_read(&self, _port: u16, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn port_write(&self, _port: u16, data: &[u8]) {
        if let Ok(value) = data.try_into() {
            self.0.store(u32::from_le_bytes(value), Ordering::Relaxed);
        }
    }
    fn memory_read(&self, _gpa: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn memory_write(&self, _gpa: u64, _data: &[u8]) {}
}

/// A machine with a board and two processors; None without KVM.
fn machine(memory: &Memory) -> Option<(std::sync::Arc<Vm>, BoardCpu, BoardCpu)> {
    let Ok(kvm) = vm::open() else {
        eprintln!("skipped: no /dev/kvm");
        return None;
    };
    let vm = std::sync::Arc::new(Vm::new(&kvm).unwrap());
    vm.create_board().unwrap();
    memory::add_slots(&vm, memory).unwrap();
    let shape = Shape {
        cpus: 2,
        tsc_deadline: vm.has_tsc_deadline(),
    };
    let cpu = |id| {
        let leaves = cpuid::leaves(vm.supported_cpuid(), shape, id);
        BoardCpu::new(&vm, id, &CpuId::from_entries(&leaves).unwrap()).unwrap()
    };
    let (first, second) = (cpu(0), cpu(1));
    Some((vm, first, second))
}

/// Runs until the program has said `want`; what it said, in order.
fn run_until(cpu: &mut BoardCpu, want: u32) -> Vec<u32> {
    let heard = Heard::default();
    let mut all = Vec::new();
    while all.last() != Some(&want) {
        match cpu.run(&heard).unwrap() {
            Stop::Access(_) => all.push(heard.0.load(Ordering::Relaxed)),
            Stop::Kicked => {}
            other => panic!("{other:?} after {all:?}"),
        }
    }
    all
}

/// Without what goes on while nobody runs.
fn still(saved: &CpuSaved) -> CpuSaved {
    let mut saved = saved.clone();
    saved.msrs.retain(|msr| msr.index != 0x10);
    // The timer's current count, and a priority that follows from others when it is needed.
    saved.lapic.regs[0x390..0x394].fill(0);
    saved.lapic.regs[0xa0..0xa4].fill(0);
    forget_use(&mut saved.xsave);
    saved
}

/// Clears the bits of XSTATE_BV whose components are as RESET leaves them: the processor itself may say of such a one
/// that it is in use or not (XINUSE, SDM vol. 1, 13.6), and does so differently after the host has switched threads.
fn forget_use(area: &mut [u8]) {
    let mut in_use = u64::from_le_bytes(area[512..520].try_into().unwrap());
    for component in 0..63 {
        let is_initial = match component {
            0 => area[..2] == [0x7f, 0x03] && is_zero(&area[2..24]) && is_zero(&area[32..160]),
            1 => is_zero(&area[160..416]),
            _ => {
                let leaf = std::arch::x86_64::__cpuid_count(0xd, component);
                let start = leaf.ebx as usize;
                area.get(start..start + leaf.eax as usize)
                    .is_some_and(is_zero)
            }
        };
        if is_initial {
            in_use &= !(1 << component);
        }
    }
    area[512..520].copy_from_slice(&in_use.to_le_bytes());
}

fn is_zero(bytes: &[u8]) -> bool {
    bytes.iter().all(|&b| b == 0)
}

#[test]
fn counter_goes_on_in_another_machine() {
    let memory = memory::create(16 << 20).unwrap();
    let Some((vm, mut first, mut second)) = machine(&memory) else {
        return;
    };
    memory.write_slice(&COUNTER, GuestAddress(PROGRAM)).unwrap();
    first.set_msrs(&msrs::AT_START).unwrap();
    start::prepare(&first, &memory, Entry::Linux64(PROGRAM)).unwrap();
    assert_eq!(run_until(&mut first, 5), [1, 2, 3, 4, 5]);

    let list = msrs::saved();
    let saved = [first.save(&list).unwrap(), second.save(&list).unwrap()];
    let board = vm.save_board().unwrap();
    let text = serde_json::to_string(&(&saved, &board)).unwrap();
    drop((vm, first, second));

    let (saved, board): ([CpuSaved; 2], BoardSaved) = serde_json::from_str(&text).unwrap();
    let (vm, mut first, mut second) = machine(&memory).unwrap();
    first.restore(&saved[0]).unwrap();
    second.restore(&saved[1]).unwrap();
    vm.restore_board(&board).unwrap();
    let again = [first.save(&list).unwrap(), second.save(&list).unwrap()];
    for (before, after) in saved.iter().zip(&again) {
        let (before, after) = (still(before), still(after));
        assert_eq!(before.regs, after.regs);
        assert_eq!(before.sregs, after.sregs);
        assert_eq!(before.events, after.events);
        assert!(before.lapic == after.lapic, "the local APIC");
        let differs = |&i: &usize| before.xsave[i] != after.xsave[i];
        let bytes: Vec<_> = (0..before.xsave.len()).filter(differs).collect();
        assert!(bytes.is_empty(), "the XSAVE area differs at {bytes:?}");
        assert_eq!(before.msrs, after.msrs);
        assert!(before == after);
    }
    assert_eq!(vm.save_board().unwrap().chips, board.chips);
    assert_eq!(run_until(&mut first, 10), [6, 7, 8, 9, 10]);
}

/// What a guest can set is what is restored, and the clocks go on from where they were.
#[test]
fn registers_and_clocks_are_kept() {
    let memory = memory::create(16 << 20).unwrap();
    let Some((vm, mut cpu, _)) = machine(&memory) else {
        return;
    };
    start::prepare(&cpu, &memory, Entry::Linux64(PROGRAM)).unwrap();
    let values = [
        (0x10, 1 << 40),
        (0x174, 0x10),
        (0x277, 0x0007_0406_0007_0406),
        (0xc000_0082, 0xffff_ffff_8100_0000),
        (0xc000_0102, 0x1234_5678),
    ];
    cpu.set_msrs(&values).unwrap();
    let mut saved = cpu.save(&msrs::saved()).unwrap();
    for (index, value) in &values[1..] {
        let kept = saved.msrs.iter().find(|msr| msr.index == *index).unwrap();
        assert_eq!(kept.data, *value, "{index:#x}");
    }
    // XMM0 in the area, and that it is in use.
    saved.xsave[160..176].copy_from_slice(b"0123456789abcdef");
    saved.xsave[512] |= 0b11;
    saved.regs.r15 = 0xfeed;
    let mut board = vm.save_board().unwrap();
    board.clock += 1_000_000_000_000;
    let (new, mut other, _) = machine(&memory).unwrap();
    other.restore(&saved).unwrap();
    new.restore_board(&board).unwrap();
    let again = other.save(&msrs::saved()).unwrap();
    assert_eq!(again.regs, saved.regs);
    assert_eq!(again.xsave[160..176], saved.xsave[160..176]);
    let tsc = |saved: &CpuSaved| saved.msrs.iter().find(|m| m.index == 0x10).unwrap().data;
    assert!(tsc(&again) >= tsc(&saved) && tsc(&again) - tsc(&saved) < 1 << 38);
    let clock = new.save_board().unwrap().clock;
    assert!(clock >= board.clock && clock - board.clock < 60_000_000_000);
}

#[test]
fn what_is_no_board_is_refused() {
    let memory = memory::create(16 << 20).unwrap();
    let Some((vm, mut cpu, _)) = machine(&memory) else {
        return;
    };
    let mut board = vm.save_board().unwrap();
    board.chips[1].pop();
    assert!(vm.restore_board(&board).is_err());
    let mut saved = cpu.save(&[]).unwrap();
    saved.xsave.resize(1 << 20, 0);
    assert!(cpu.restore(&saved).is_err());
}
