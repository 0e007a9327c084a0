//! The pattern in the slack: written, checked, taken back.

use std::sync::Arc;

use shadow_mm::{Access, FrameStore, GuestVa, SLACK_BYTE, Space, VadFlags, slack_damage};

use super::{GuardHeap, Slack};
use crate::linux::exec::PAGE;
use crate::memory::{GuardCounters, Memory, VmmPlatform};

type Bytes = [u8; PAGE as usize];

/// One address space's memory.
#[derive(Clone, Copy)]
pub(super) struct View<'a> {
    pub(super) memory: &'a Memory,
    pub(super) space: &'a Arc<Space<VmmPlatform>>,
}

impl View<'_> {
    /// Fills slack with `byte`; false if it cannot be written.
    pub(super) fn fill(self, slack: Slack, byte: u8) -> bool {
        let bytes: Bytes = [byte; PAGE as usize];
        let Some(at) = GuestVa::new(slack.at()).filter(|_| slack.length() > 0) else {
            return false;
        };
        let filled = self
            .memory
            .with_page(self.space, at, Access::Write, |store, frame| {
                store.write(frame, at.offset(), &bytes[..slack.length()]);
            });
        filled.is_ok()
    }

    /// Fills slack with the pattern; false if there is none, or it cannot be written.
    pub(super) fn pattern(self, slack: Slack) -> bool {
        self.fill(slack, SLACK_BYTE)
    }

    /// Checks slack, and says and counts what is wrong with it.
    pub(super) fn check(self, slack: Slack, pid: i32) {
        let Some(counters) = self.memory.guard.get() else {
            return;
        };
        let vad = GuestVa::new(slack.start)
            .and_then(|at| self.memory.manager.find_vad(self.space, at.vpn()));
        if vad.is_none_or(|vad| vad.flags.contains(VadFlags::WIPE_ON_FORK)) {
            return;
        }
        let mut bytes: Bytes = [0; PAGE as usize];
        let bytes = &mut bytes[..slack.length()];
        let Some(at) = GuestVa::new(slack.at()).filter(|_| !bytes.is_empty()) else {
            return;
        };
        let read = self
            .memory
            .with_page(self.space, at, Access::Read, |store, frame| {
                store.read(frame, at.offset(), bytes);
            });
        let damage = read.ok().and_then(|()| slack_damage(bytes));
        if let Some(first) = damage
            && GuardCounters::say(&counters.damaged)
        {
            let Slack {
                start,
                bytes: length,
            } = slack;
            tracing::error!(
                pid,
                "guard-alloc: {first} bytes behind the end of the {length} bytes mapped at {start:#x} there is a {:#04x} that was stored",
                bytes[first]
            );
        }
    }
}

/// Checks all slack of an address space that is about to go.
pub fn check_all(
    memory: &Memory,
    space: &Arc<Space<VmmPlatform>>,
    heap: &GuardHeap,
    brk: (u64, u64),
) {
    let view = View { memory, space };
    for slack in heap.slacks(None) {
        view.check(slack, heap.pid);
    }
    if heap.brk_patterned {
        view.check(Slack::new(brk.0, brk.1 - brk.0), heap.pid);
    }
}
