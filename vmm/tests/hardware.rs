//! The virtual machine, the memory manager and the flushes between them, with a guest of a few
//! instructions: no Linux layer. Skipped, aloud, without a usable `/dev/kvm`.

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
const DATA: u64 = 0x50_0000;
const PAGES: u64 = 1024;
/// `mov rax, [rdi]; syscall`, then at 16 `mov [rdi], rsi; syscall`.
const LOAD: &[u8] = &[0x48, 0x8b, 0x07, 0x0f, 0x05];
const STORE: &[u8] = &[0x48, 0x89, 0x37, 0x0f, 0x05];
const STORE_AT: u64 = 16;

struct Guest {
    hardware: Hardware,
    cpu: Vcpu,
}

fn va(address: u64) -> GuestVa {
    GuestVa::new(address).expect("a user address")
}

impl Guest {
    fn new() -> Option<Self> {
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
        Some(Self { hardware, cpu })
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
    fn space(&self) -> Arc<Space<VmmPlatform>> {
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
                .run(&mut regs, space.root().gpa(), flush)
                .expect("KVM runs");
            assert!(done, "nothing kicks here");
            memory.acknowledge(memory.flushes.leave(0, &work, done));
            match exit {
                Exit::Syscall => return Ok(regs.rax),
                Exit::Trap(trap) if trap.vector == 14 => {
                    let access = if trap.error & 2 != 0 {
                        Access::Write
                    } else {
                        Access::Read
                    };
                    match memory.manager.fault(space, va(trap.address), access) {
                        FaultOutcome::Resolved(r) => memory.submit(r.flush),
                        FaultOutcome::Denied(_) => return Err(trap.address),
                        other => panic!("unexpected: {other:?}"),
                    }
                }
                other => panic!("unexpected exit {other:?}"),
            }
        }
    }

    fn load(&mut self, space: &Arc<Space<VmmPlatform>>, at: u64) -> Result<u64, u64> {
        self.run(
            space,
            Regs {
                rip: CODE,
                rdi: at,
                ..Regs::default()
            },
        )
    }

    fn store(&mut self, space: &Arc<Space<VmmPlatform>>, at: u64, value: u64) -> Result<u64, u64> {
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

    fn end(self, spaces: &[Arc<Space<VmmPlatform>>]) {
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

#[test]
fn fork_separates_parent_and_child() {
    let Some(mut g) = Guest::new() else { return };
    let parent = g.space();
    for page in 0..PAGES {
        g.store(&parent, DATA + page * 4096, page)
            .expect("writable");
    }
    let forked = g.hardware.memory.manager.fork(&parent).expect("memory");
    g.hardware.memory.submit(forked.flush);
    let child = forked.child;
    for page in 0..PAGES {
        let at = DATA + page * 4096;
        // The parent first on even pages, the child first on odd ones.
        if page % 2 == 0 {
            g.store(&parent, at, page + 10_000).expect("writable");
            g.store(&child, at, page + 20_000).expect("writable");
        } else {
            g.store(&child, at, page + 20_000).expect("writable");
            g.store(&parent, at, page + 10_000).expect("writable");
        }
        assert_eq!(g.load(&parent, at), Ok(page + 10_000));
        assert_eq!(g.load(&child, at), Ok(page + 20_000));
    }
    g.end(&[parent, child]);
}

#[test]
fn rights_taken_away_are_gone_at_once() {
    let Some(mut g) = Guest::new() else { return };
    let space = g.space();
    for page in 0..64 {
        g.store(&space, DATA + page * 4096, 7).expect("writable");
    }
    let memory = Arc::clone(&g.hardware.memory);
    let range = |at: u64, pages| shadow_mm::VpnRange::new(va(at).vpn(), pages).expect("a range");
    let protected = memory.manager.protect(&space, range(DATA, 32), Prot::READ);
    memory.submit(protected.flush);
    for page in 0..32 {
        let at = DATA + page * 4096;
        assert_eq!(g.load(&space, at), Ok(7));
        assert_eq!(g.store(&space, at, 8), Err(at));
    }
    let flush = memory
        .manager
        .unmap(&space, range(DATA + 32 * 4096, 32))
        .expect("unmapped");
    memory.submit(flush);
    for page in 32..64 {
        let at = DATA + page * 4096;
        assert_eq!(g.load(&space, at), Err(at));
    }
    g.end(&[space]);
}

#[test]
fn recycled_tables_show_no_old_translations() {
    let Some(mut g) = Guest::new() else { return };
    for round in 0..40_u64 {
        let space = g.space();
        for page in 0..32 {
            let at = DATA + page * 4096;
            assert_eq!(g.load(&space, at), Ok(0), "round {round}: not zero");
            g.store(&space, at, round * 1000 + page).expect("writable");
        }
        g.hardware.memory.delete_space(&space);
    }
    g.end(&[]);
}
