//! Skipped, aloud, without a usable `/dev/kvm`.

use super::*;
use crate::linux::thread::{Fpu, LeftFpu, XsaveArea};

fn throw_away() -> Option<Probe> {
    let Ok(kvm) = Kvm::new() else {
        println!("skipped: /dev/kvm is not usable");
        return None;
    };
    Some(Probe::new(&kvm).unwrap().0)
}

#[test]
fn fault_queued_when_a_kick_came_does_not_hit_the_next_thread() {
    let Some(mut probe) = throw_away() else {
        return;
    };
    probe
        .expect_syscall("the first system call", STORE_AT, Flush::None)
        .unwrap();
    // A page fault; and INT3's, which KVM does not report among a virtual CPU's events.
    for vector in [14, 3] {
        probe.cpu.queue_fault_and_kick(vector);
        let (exit, _) = probe.call(STORE_AT, 1, Flush::None).unwrap();
        assert_eq!(exit, Exit::Kicked);
        probe.cpu.end_kick();
        probe
            .expect_syscall("after the kick", STORE_AT, Flush::All { touches: &[] })
            .unwrap();
    }
}

/// XMM0 of a state.
fn mark(state: &XsaveArea) -> u64 {
    u64::from_le_bytes(state.0[XMM0..XMM0 + 8].try_into().unwrap())
}

impl Probe {
    fn set_mark(&mut self, mark: u64) -> crate::hv::kvm::vcpu::Loaded {
        let mut state = self.cpu.fpu().unwrap();
        state.0[XMM0..XMM0 + 8].copy_from_slice(&mark.to_le_bytes());
        state.0[XSTATE_BV] |= SSE;
        self.cpu.set_fpu(state).unwrap()
    }

    /// What the guest finds in XMM0.
    fn seen(&mut self) -> u64 {
        let regs = self.expect_syscall("a look at XMM0", XMM_AT, Flush::None);
        regs.unwrap().rsi
    }

    fn leave(&mut self) -> Arc<dyn LeftFpu> {
        match self.cpu.leave_fpu() {
            Fpu::Left(left) => left,
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn fpu_state_that_is_left_is_copied_for_who_wants_it() {
    let Some(probe) = throw_away() else {
        return;
    };
    drop(probe);
    let found = super::probe(&Kvm::new().unwrap()).unwrap();
    for loader in [FpuLoader::Kvm, found.fpu] {
        let Some(mut probe) = throw_away() else {
            return;
        };
        probe.cpu.set_iret(found.iret);
        probe.cpu.set_fpu_loader(loader);
        assert_eq!(probe.set_mark(1).by, loader);
        assert_eq!(mark(&probe.cpu.fpu().unwrap()), 1, "before it is loaded");
        assert_eq!(probe.seen(), 1);
        assert_eq!(mark(&probe.cpu.fpu().unwrap()), 1);

        // The thread comes back.
        let left = probe.leave();
        assert!(probe.cpu.finds_left(&left).unwrap());
        assert!(left.is_only_there(), "it was not copied");
        assert_eq!(probe.seen(), 1);
        assert!(!probe.cpu.finds_left(&left).unwrap(), "once");

        // Another one comes while somebody wants it, and while nobody does.
        let left = probe.leave();
        assert!(probe.set_mark(2).copied_out && !left.is_only_there());
        assert_eq!((probe.seen(), mark(&left.get().unwrap())), (2, 1));
        assert!(!probe.cpu.finds_left(&left).unwrap());
        drop(probe.leave());
        assert!(!probe.set_mark(3).copied_out);
        assert_eq!(probe.seen(), 3);

        // Another thread of the host wants it, and goes on with it elsewhere.
        let left = probe.leave();
        std::thread::scope(|s| {
            let elsewhere = s.spawn(|| mark(&left.get().unwrap()));
            assert_eq!(elsewhere.join().unwrap(), 3);
        });
        assert!(probe.cpu.finds_left(&left).unwrap(), "it is here as well");

        // One that was never loaded is what it was; one whose virtual CPU goes is kept.
        probe.set_mark(4);
        let never = probe.cpu.leave_fpu();
        assert!(
            matches!((loader, &never), (FpuLoader::Monitor, Fpu::Saved(state)) if mark(state) == 4)
                || matches!((loader, &never), (FpuLoader::Kvm, Fpu::Left(_)))
        );
        drop(never);
        probe.set_mark(5);
        assert_eq!(probe.seen(), 5);
        let left = probe.leave();
        drop(probe);
        assert_eq!(mark(&left.get().unwrap()), 5);
    }
}
