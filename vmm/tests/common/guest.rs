//! A guest of a few instructions: no Linux layer.
#![allow(dead_code, reason = "no test uses all of it")]

use std::sync::Arc;

use shadow_mm::{
    Access, FaultOutcome, GuestVa, MapKind, MapRequest, Placement, Prot, Space, VadFlags, VadTag,
};
use vmm::hv::kvm::vcpu::Vcpu;
use vmm::hv::{Exit, Flush};
use vmm::linux::thread::Regs;
use vmm::machine::hardware::Hardware;
use vmm::memory::VmmPlatform;

const CODE: u64 = 0x40_0000;
pub(crate) const DATA: u64 = 0x50_0000;
pub(crate) const PAGES: u64 = 1024;
/// `mov rax, [rdi]; syscall`, then at 16 `mov [rdi], rsi; syscall`.
const LOAD: &[u8] = &[0x48, 0x8b, 0x07, 0x0f, 0x05];
const STORE: &[u8] = &[0x48, 0x89, 0x37, 0x0f, 0x05];
const STORE_AT: u64 = 16;

pub(crate) struct Guest {
    pub(crate) hardware: Hardware,
    cpu: Vcpu,
    /// Page faults that were resolved.
    pub(crate) faults: u64,
}

pub(crate) fn va(address: u64) -> GuestVa {
    GuestVa::new(address).expect("a user address")
}

impl Guest {
    pub(crate) fn new() -> Option<Self> {
        if std::fs::File::options()
            .read(true)
            .write(true)
            .open("/dev/kvm")
            .is_err()
        {
            println!("skipped: /dev/kvm is not usable");
            return None;
        }
        let hardware = Hardware::new(64 << 20, 1).expect("a machine");
        let cpu = hardware.vcpu(0).expect("a virtual CPU");
        Some(Self {
            hardware,
            cpu,
            faults: 0,
        })
    }

    fn map(&self, space: &Arc<Space<VmmPlatform>>, at: u64, pages: u64, prot: Prot) {
        let mapped = self.hardware.memory.manager.map(
            space,
            MapRequest {
                placement: Placement::Fixed(va(at).vpn()),
                count: pages,
                prot,
                kind: MapKind::Anonymous,
                flags: VadFlags::empty(),
                tag: VadTag(0),
            },
        );
        self.hardware.memory.submit(mapped.expect("room").flush);
    }

    /// A space with the program and its data.
    pub(crate) fn space(&self) -> Arc<Space<VmmPlatform>> {
        let memory = &self.hardware.memory;
        let space = memory.manager.create_space().expect("a frame");
        self.map(&space, CODE, 1, Prot::READ | Prot::WRITE | Prot::EXEC);
        self.map(&space, DATA, PAGES, Prot::READ | Prot::WRITE);
        memory
            .with_page(&space, va(CODE), Access::Write, |pool, frame| {
                shadow_mm::FrameStore::write(pool, frame, 0, LOAD);
                shadow_mm::FrameStore::write(pool, frame, STORE_AT as usize, STORE);
            })
            .expect("a frame");
        space
    }

    /// Runs until a system call, resolving faults; `Err` is the address of one that is denied.
    fn run(&mut self, space: &Arc<Space<VmmPlatform>>, mut regs: Regs) -> Result<u64, u64> {
        match self.run_to_exit(space, &mut regs)? {
            Exit::Syscall => Ok(regs.rax),
            other => panic!("unexpected exit {other:?}"),
        }
    }

    /// Runs until something else than a page fault that can be resolved.
    fn run_to_exit(
        &mut self,
        space: &Arc<Space<VmmPlatform>>,
        regs: &mut Regs,
    ) -> Result<Exit, u64> {
        let memory = Arc::clone(&self.hardware.memory);
        loop {
            let work = memory.flushes.enter(0, space);
            let flush = if work.needed {
                Flush::All {
                    touches: &work.touches,
                }
            } else {
                Flush::None
            };
            let (exit, done) = self
                .cpu
                .run(regs, space.root().gpa(), flush)
                .expect("KVM runs");
            assert!(done, "nothing kicks here");
            memory.acknowledge(memory.flushes.leave(0, &work, done));
            let Exit::Trap(trap) = exit else {
                return Ok(exit);
            };
            if trap.vector != 14 {
                return Ok(exit);
            }
            let access = if trap.error & 2 != 0 {
                Access::Write
            } else {
                Access::Read
            };
            self.faults += 1;
            match memory.manager.fault(space, va(trap.address), access) {
                FaultOutcome::Resolved(r) => memory.submit(r.flush),
                FaultOutcome::Denied(_) => return Err(trap.address),
                other => panic!("unexpected: {other:?}"),
            }
        }
    }

    /// How a store ends.
    pub(crate) fn exit_of_store(
        &mut self,
        space: &Arc<Space<VmmPlatform>>,
        at: u64,
        value: u64,
    ) -> Exit {
        let mut regs = Regs {
            rip: CODE + STORE_AT,
            rdi: at,
            rsi: value,
            ..Regs::default()
        };
        self.run_to_exit(space, &mut regs).expect("no fault")
    }

    pub(crate) fn load(&mut self, space: &Arc<Space<VmmPlatform>>, at: u64) -> Result<u64, u64> {
        self.run(
            space,
            Regs {
                rip: CODE,
                rdi: at,
                ..Regs::default()
            },
        )
    }

    pub(crate) fn store(
        &mut self,
        space: &Arc<Space<VmmPlatform>>,
        at: u64,
        value: u64,
    ) -> Result<u64, u64> {
        self.run(
            space,
            Regs {
                rip: CODE + STORE_AT,
                rdi: at,
                rsi: value,
                ..Regs::default()
            },
        )
    }

    pub(crate) fn end(self, spaces: &[Arc<Space<VmmPlatform>>]) {
        let memory = &self.hardware.memory;
        let idle = [Arc::clone(&self.hardware.idle)];
        let all = [spaces, &idle].concat();
        memory.manager.check(&all).expect("the invariants hold");
        for space in spaces {
            memory.delete_space(space);
        }
        memory.acknowledge(memory.flushes.drain());
        memory
            .manager
            .check(&idle)
            .expect("the invariants hold at the end");
        let stats = memory.manager.stats();
        assert_eq!(
            stats.data.active + stats.data.in_flight,
            0,
            "a frame leaked"
        );
    }
}
