//! A guest thread: a record that borrows a virtual CPU while it runs.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

use shadow_mm::{Access, GuestVa, PAGE_SIZE};

use super::call::CallRecord;
use super::proc::Image;
use super::process::{AddressSpace, Pid};
use crate::memory::Memory;

/// Thread id; the leader's equals its process's id.
pub type Tid = i32;

/// The general registers of a thread in ring 3, named as in the Intel SDM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the names are the architecture's")]
pub struct Regs {
    pub rax: u64,
    pub rbx: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rsi: u64,
    pub rdi: u64,
    pub rsp: u64,
    pub rbp: u64,
    pub r8: u64,
    pub r9: u64,
    pub r10: u64,
    pub r11: u64,
    pub r12: u64,
    pub r13: u64,
    pub r14: u64,
    pub r15: u64,
    pub rip: u64,
    pub rflags: u64,
    pub fs_base: u64,
    pub gs_base: u64,
}

/// An XSAVE area (Intel SDM volume 1, section 13.4) in the *standard* format, as
/// `KVM_GET_XSAVE2` gives it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct XsaveArea(pub Vec<u8>);

/// FPU and vector state that a thread has left in a virtual CPU.
pub trait LeftFpu: std::fmt::Debug + Send + Sync {
    /// Copies it.
    ///
    /// # Errors
    /// The host refused.
    fn get(&self) -> Result<XsaveArea, crate::hv::CpuError>;

    /// Whether nobody has copied it yet.
    fn is_only_there(&self) -> bool;
}

/// Where a thread's FPU and vector state is.
#[derive(Clone, Debug)]
pub enum Fpu {
    /// The state a fresh program starts with.
    Initial,
    /// In the virtual CPU that runs the thread.
    Live,
    /// The thread does not run, and left it in the virtual CPU that ran it last. Whoever runs it next on that one, before
    /// any other, finds it there; anybody can have a copy.
    Left(Arc<dyn LeftFpu>),
    /// Here; loaded before the thread runs again.
    Saved(XsaveArea),
}

/// What a handler may ask of the virtual CPU its thread was stopped on.
pub trait Cpu {
    /// Moves the thread's FPU state into its record and returns it: after this `t.fpu` is
    /// [`Fpu::Saved`] and may be changed.
    ///
    /// # Errors
    /// The host refused; the machine ends with the error.
    fn save_fpu<'t>(&mut self, fpu: &'t mut Fpu) -> Result<&'t mut XsaveArea, crate::hv::CpuError>;

    /// A copy of the thread's FPU state, which stays where it is.
    ///
    /// # Errors
    /// As [`Self::save_fpu`].
    fn copy_fpu(&mut self, fpu: &Fpu) -> Result<Fpu, crate::hv::CpuError> {
        let mut copy = fpu.clone();
        self.save_fpu(&mut copy)?;
        Ok(copy)
    }

    /// Bytes of an XSAVE area on this machine, and the XCR0 the guest runs with.
    fn xsave_layout(&self) -> (usize, u64);
}

/// The alternate signal stack (sigaltstack(2)).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AltStack {
    /// Lowest address.
    pub base: u64,
    /// Bytes.
    pub size: u64,
    /// `SS_DISABLE` (2), `SS_AUTODISARM` (1 << 31) or 0.
    pub flags: u32,
}

impl Default for AltStack {
    fn default() -> Self {
        Self {
            base: 0,
            size: 0,
            flags: 2,
        }
    }
}

/// The part of a thread that others may look at while it runs.
#[derive(Debug, Default)]
pub struct ThreadShared {
    /// Something (a signal, a stop, the end) needs looking at before the thread returns to ring 3.
    /// Set by others after changing the state under its lock, cleared by the thread under that lock.
    pub attention: AtomicBool,
    /// Nanoseconds spent on a virtual CPU, the VMM's work for it included.
    pub cpu_time: AtomicU64,
}

impl ThreadShared {
    /// Asks the thread to look at the state before it returns to ring 3.
    pub fn call_attention(&self) {
        self.attention.store(true, Ordering::SeqCst);
    }
}

/// How often in a row a thread has found no memory for one page.
#[derive(Clone, Copy, Debug, Default)]
pub struct Starved {
    page: u64,
    times: u32,
}

impl Starved {
    /// Once more, for the page of this address; how often in a row.
    pub fn again(&mut self, address: u64) -> u32 {
        let page = address / PAGE_SIZE as u64;
        if page != self.page {
            *self = Self { page, times: 0 };
        }
        self.times = self.times.saturating_add(1);
        self.times
    }

    /// The page of this address is there.
    pub fn resolved(&mut self, address: u64) {
        if address / PAGE_SIZE as u64 == self.page {
            *self = Self::default();
        }
    }
}

/// A guest thread. Owned by the worker that runs it, by the scheduler's queues otherwise.
#[derive(Debug)]
pub struct Thread {
    /// Thread id.
    pub tid: Tid,
    /// The process it belongs to.
    pub pid: Pid,
    /// Registers, complete while the thread is not inside the virtual CPU.
    pub regs: Regs,
    /// FPU and vector state.
    pub fpu: Fpu,
    /// The virtual CPU the FPU state was last live in.
    pub last_cpu: Option<usize>,
    /// A blocked call that will be made again.
    pub call: Option<CallRecord>,
    /// Blocked signals (bit N-1 for signal N).
    pub mask: u64,
    /// The mask to go back to after `rt_sigsuspend`, `ppoll` or `pselect6`: used by the next
    /// signal frame, or restored when the call ends without one.
    pub saved_mask: Option<u64>,
    /// The alternate signal stack.
    pub altstack: AltStack,
    /// `set_tid_address(2)`, `CLONE_CHILD_CLEARTID`; 0 for none.
    pub clear_child_tid: u64,
    /// `set_robust_list(2)`: head address and length as given.
    pub robust_list: (u64, u64),
    /// `rseq(2)` is not offered; kept for completeness of the record.
    pub personality: u32,
    /// Address space it runs in.
    pub mm: Arc<AddressSpace>,
    /// The last fault: vector, error code and CR2, for a signal frame's context.
    pub last_trap: (u64, u64, u64),
    /// Whether it gets no memory.
    pub starved: Starved,
    /// A program that `execve` has loaded, while it waits for the other threads to end.
    pub image: Option<Box<Image>>,
    /// It gives its processor to others that wait for one, once (sched_yield(2)).
    pub yields: bool,
    /// How much it has run, in nanoseconds: for whose turn it is, so it is now and then changed to stay near
    /// that of the others.
    pub account: u64,
    /// What others may see while it runs.
    pub shared: Arc<ThreadShared>,
}

impl Thread {
    /// Resolves what it is about to fault on, because its address space was made again, or copied: its next instruction,
    /// and a store below its stack pointer. Done ahead it takes no exits. What cannot be resolved is for the fault to say.
    /// No lock may be held.
    pub fn foresee(&self, memory: &Memory) {
        let next = (self.regs.rip, Access::Execute);
        let top = (self.regs.rsp.wrapping_sub(8), Access::Write);
        for (address, access) in [next, top] {
            if let Some(va) = GuestVa::new(address) {
                let _ = memory.fault(&self.mm.space, va, access);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn starving_is_for_one_page_in_a_row() {
        let mut starved = Starved::default();
        assert_eq!(
            [0x5000, 0x5008, 0x5fff].map(|at| starved.again(at)),
            [1, 2, 3]
        );
        starved.resolved(0x7000);
        assert_eq!(starved.again(0x5000), 4);
        assert_eq!(starved.again(0x7000), 1);
        starved.resolved(0x7abc);
        assert_eq!(starved.again(0x7000), 1);
    }
}
