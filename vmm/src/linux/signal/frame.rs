//! The signal frame on the guest's stack, exactly as x86-64 Linux lays it out (`struct
//! rt_sigframe`, `asm/sigcontext.h`, `asm/ucontext.h`).

use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

use super::info::SIGINFO_SIZE;
use super::{sa, xsave};
use crate::hv::CpuError;
use crate::linux::call::Ctx;
use crate::linux::process::{SigAction, SigInfo};
use crate::linux::thread::{AltStack, Fpu, Regs, Thread};

/// First address no user register may hold (`TASK_SIZE_MAX`).
pub const USER_END: u64 = 0x7fff_ffff_f000;

/// `SS_ONSTACK`.
pub const SS_ONSTACK: u32 = 1;
/// `SS_DISABLE`.
pub const SS_DISABLE: u32 = 2;
/// `SS_AUTODISARM`.
pub const SS_AUTODISARM: u32 = 1 << 31;

/// Bytes below the stack pointer that belong to the interrupted function (System V ABI).
const RED_ZONE: u64 = 128;

/// `UC_FP_XSTATE | UC_SIGCONTEXT_SS | UC_STRICT_RESTORE_SS`.
const UC_FLAGS: u64 = 1 | 2 | 4;

const USER_CS: u16 = 0x33;
const USER_SS: u16 = 0x2b;

/// The flags user code can change and `rt_sigreturn` therefore takes: AC, OF, DF, SF, ZF, AF, PF,
/// CF. Linux takes RF and TF as well.
const USER_FLAGS: u64 = 0x4_0cd5;
/// IF and the bit that is always one: set in every thread's RFLAGS.
const FIXED_FLAGS: u64 = 0x202;
/// ID: the guest can change it, but not by a frame.
const ID_FLAG: u64 = 0x20_0000;
/// DF, RF, TF: clear when a handler starts.
const CLEARED_FLAGS: u64 = 0x1_0500;

/// `struct sigcontext_64`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[expect(missing_docs, reason = "the names are the ABI's")]
pub struct SigContext {
    pub r8: u64,
    pub r9: u64,
    pub r10: u64,
    pub r11: u64,
    pub r12: u64,
    pub r13: u64,
    pub r14: u64,
    pub r15: u64,
    pub di: u64,
    pub si: u64,
    pub bp: u64,
    pub bx: u64,
    pub dx: u64,
    pub ax: u64,
    pub cx: u64,
    pub sp: u64,
    pub ip: u64,
    pub flags: u64,
    pub cs: u16,
    pub gs: u16,
    pub fs: u16,
    pub ss: u16,
    pub err: u64,
    pub trapno: u64,
    pub oldmask: u64,
    pub cr2: u64,
    pub fpstate: u64,
    pub reserved1: [u64; 8],
}

/// `stack_t`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[expect(missing_docs, reason = "the names are the ABI's")]
pub struct StackT {
    pub sp: u64,
    pub flags: u32,
    pub pad: u32,
    pub size: u64,
}

/// `struct ucontext`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[expect(missing_docs, reason = "the names are the ABI's")]
pub struct UContext {
    pub flags: u64,
    pub link: u64,
    pub stack: StackT,
    pub mcontext: SigContext,
    pub sigmask: u64,
}

/// `struct rt_sigframe`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[expect(missing_docs, reason = "the names are the ABI's")]
pub struct RtSigframe {
    pub pretcode: u64,
    pub uc: UContext,
    pub info: [u8; SIGINFO_SIZE],
}

const _: () = assert!(size_of::<SigContext>() == 256);
const _: () = assert!(size_of::<UContext>() == 304);
const _: () = assert!(size_of::<RtSigframe>() == 440);

/// Offset of the `ucontext` in the frame.
pub const UC_OFFSET: u64 = 8;
/// Offset of the `siginfo_t` in the frame.
pub const INFO_OFFSET: u64 = 312;

/// A frame could not be made.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The guest's fault: no stack there, or no restorer.
    #[error("the frame cannot be written")]
    Unwritable,
    /// The FPU state could not be read.
    #[error("no FPU state for the frame")]
    Host(#[from] CpuError),
}

/// Registers for a handler or back from one were refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadFrame;

/// Where a frame goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Address of the `rt_sigframe`: the handler's stack pointer.
    pub frame: u64,
    /// Address of the XSAVE area, a multiple of 64.
    pub fpstate: u64,
}

impl AltStack {
    /// Whether `sp` is on it (`on_sig_stack`).
    #[must_use]
    pub fn contains(&self, sp: u64) -> bool {
        self.flags & SS_AUTODISARM == 0 && self.spans(sp)
    }

    fn spans(&self, sp: u64) -> bool {
        sp > self.base && sp - self.base <= self.size
    }
}

/// Where the frame of a handler with `flags` goes, for a thread with stack pointer `sp` and an
/// XSAVE area that takes `fp_size` bytes in the frame.
///
/// # Errors
/// It would leave the alternate stack, or the address space.
pub fn place(sp: u64, alt: &AltStack, flags: u64, fp_size: u64) -> Result<Place, BadFrame> {
    // A wild stack pointer is no harm if the handler has a stack of its own.
    let mut at = sp.wrapping_sub(RED_ZONE);
    let nested = alt.contains(sp);
    let entering = flags & sa::ONSTACK != 0 && alt.size != 0 && !alt.contains(at);
    if entering {
        at = alt.base.checked_add(alt.size).ok_or(BadFrame)?;
    }
    let fpstate = at.checked_sub(fp_size).ok_or(BadFrame)? & !63;
    let frame = fpstate
        .checked_sub(size_of::<RtSigframe>() as u64)
        .ok_or(BadFrame)?
        & !15;
    let frame = frame.checked_sub(8).ok_or(BadFrame)?;
    if (nested || entering) && !alt.spans(frame) {
        return Err(BadFrame);
    }
    if at > USER_END {
        return Err(BadFrame);
    }
    Ok(Place { frame, fpstate })
}

/// Bytes a handler's frame takes at most, for `AT_MINSIGSTKSZ`; the arguments as
/// [`crate::linux::thread::Cpu::xsave_layout`] gives them.
#[must_use]
pub fn largest_frame((whole, xcr0): (usize, u64)) -> u64 {
    let fp = xsave::size_of_components(xcr0, whole) + xsave::MAGIC2_SIZE;
    let padding = RED_ZONE + 63 + 15 + 8;
    (size_of::<RtSigframe>() as u64 + fp as u64 + padding).next_multiple_of(16)
}

/// The registers as the frame has them.
#[must_use]
pub fn save_registers(t: &Thread, oldmask: u64, fpstate: u64) -> SigContext {
    let r = &t.regs;
    let (trapno, err, cr2) = t.last_trap;
    SigContext {
        r8: r.r8,
        r9: r.r9,
        r10: r.r10,
        r11: r.r11,
        r12: r.r12,
        r13: r.r13,
        r14: r.r14,
        r15: r.r15,
        di: r.rdi,
        si: r.rsi,
        bp: r.rbp,
        bx: r.rbx,
        dx: r.rdx,
        ax: r.rax,
        cx: r.rcx,
        sp: r.rsp,
        ip: r.rip,
        flags: r.rflags,
        cs: USER_CS,
        gs: 0,
        fs: 0,
        ss: USER_SS,
        err,
        trapno,
        oldmask,
        cr2,
        fpstate,
        reserved1: [0; 8],
    }
}

/// The registers a frame holds; what the guest may not choose comes from `old`.
///
/// # Errors
/// RIP or RSP is no user address.
pub fn restore_registers(old: &Regs, from: &SigContext) -> Result<Regs, BadFrame> {
    if from.ip >= USER_END || from.sp >= USER_END {
        return Err(BadFrame);
    }
    Ok(Regs {
        rax: from.ax,
        rbx: from.bx,
        rcx: from.cx,
        rdx: from.dx,
        rsi: from.si,
        rdi: from.di,
        rsp: from.sp,
        rbp: from.bp,
        r8: from.r8,
        r9: from.r9,
        r10: from.r10,
        r11: from.r11,
        r12: from.r12,
        r13: from.r13,
        r14: from.r14,
        r15: from.r15,
        rip: from.ip,
        rflags: (old.rflags & ID_FLAG) | (from.flags & USER_FLAGS) | FIXED_FLAGS,
        fs_base: old.fs_base,
        gs_base: old.gs_base,
    })
}

/// Writes the frame of `info` onto the guest's stack and points the thread at the handler. The
/// handler starts with a fresh FPU, as on Linux.
///
/// # Errors
/// The guest's stack or its handler cannot be used, or the host gave no FPU state.
pub fn push(c: &mut Ctx<'_>, action: &SigAction, info: &SigInfo) -> Result<(), FrameError> {
    if action.flags & sa::RESTORER == 0 || action.handler >= USER_END {
        return Err(FrameError::Unwritable);
    }
    let (whole, xcr0) = c.cpu.xsave_layout();
    let size = xsave::size_of_components(xcr0, whole);
    let fp = xsave::export(&c.cpu.save_fpu(&mut c.t.fpu)?.0, size, xcr0);
    let place = place(c.t.regs.rsp, &c.t.altstack, action.flags, fp.len() as u64)
        .map_err(|BadFrame| FrameError::Unwritable)?;
    let frame = compose(c.t, action, info, place);
    let mem = c.mem();
    mem.write(place.fpstate, &fp)
        .map_err(|_| FrameError::Unwritable)?;
    mem.write(place.frame, frame.as_bytes())
        .map_err(|_| FrameError::Unwritable)?;
    c.t.saved_mask = None;
    if c.t.altstack.flags & SS_AUTODISARM != 0 {
        c.t.altstack = AltStack::default();
    }
    c.t.fpu = Fpu::Initial;
    enter(&mut c.t.regs, action, info.signo, place.frame);
    Ok(())
}

/// The frame's content.
#[must_use]
pub fn compose(t: &Thread, action: &SigAction, info: &SigInfo, place: Place) -> RtSigframe {
    let oldmask = t.saved_mask.unwrap_or(t.mask);
    let mut frame = RtSigframe::new_zeroed();
    frame.pretcode = action.restorer;
    frame.uc.flags = UC_FLAGS;
    frame.uc.stack = StackT {
        sp: t.altstack.base,
        flags: t.altstack.flags,
        pad: 0,
        size: t.altstack.size,
    };
    frame.uc.mcontext = save_registers(t, oldmask, place.fpstate);
    frame.uc.sigmask = oldmask;
    frame.info = info.encode();
    frame
}

/// The registers a handler starts with.
fn enter(regs: &mut Regs, action: &SigAction, signo: i32, frame: u64) {
    regs.rdi = signo as u64;
    regs.rsi = frame + INFO_OFFSET;
    regs.rdx = frame + UC_OFFSET;
    regs.rax = 0;
    regs.rsp = frame;
    regs.rip = action.handler;
    regs.rflags = (regs.rflags & !CLEARED_FLAGS) | FIXED_FLAGS;
}

#[cfg(test)]
mod tests {
    use super::*;

    const NONE: AltStack = AltStack {
        base: 0,
        size: 0,
        flags: SS_DISABLE,
    };
    const ALT: AltStack = AltStack {
        base: 0x10_0000,
        size: 0x4000,
        flags: 0,
    };

    fn context(ip: u64, sp: u64, flags: u64) -> SigContext {
        SigContext {
            ip,
            sp,
            flags,
            ..SigContext::new_zeroed()
        }
    }

    #[test]
    fn frame_leaves_the_red_zone_and_is_aligned_like_a_call() {
        let sp = 0x7000_0000_0123;
        let p = place(sp, &NONE, 0, 836).unwrap();
        assert!(p.fpstate + 836 <= sp - 128);
        assert_eq!(p.fpstate % 64, 0);
        assert_eq!(p.frame % 16, 8);
        assert!(p.frame + 440 <= p.fpstate);
    }

    #[test]
    fn handler_on_the_alternate_stack_starts_at_its_top() {
        let p = place(0x7000_0000_0000, &ALT, sa::ONSTACK, 836).unwrap();
        assert!(p.frame > ALT.base && p.fpstate + 836 <= ALT.base + ALT.size);
    }

    #[test]
    fn wild_stack_pointer_is_no_harm_to_the_alternate_stack() {
        for sp in [0, 100, u64::MAX] {
            assert!(place(sp, &ALT, sa::ONSTACK, 836).is_ok());
        }
    }

    #[test]
    fn nested_handler_goes_on_below_on_the_alternate_stack() {
        let sp = ALT.base + 0x3000;
        let p = place(sp, &ALT, sa::ONSTACK, 836).unwrap();
        assert!(p.fpstate + 836 <= sp - 128);
    }

    #[test]
    fn overflow_of_the_alternate_stack_is_refused() {
        assert_eq!(
            place(ALT.base + 0x300, &ALT, sa::ONSTACK, 836),
            Err(BadFrame)
        );
        let small = AltStack { size: 1024, ..ALT };
        assert_eq!(
            place(0x7000_0000_0000, &small, sa::ONSTACK, 836),
            Err(BadFrame)
        );
    }

    #[test]
    fn tiny_or_kernel_stack_pointer_is_refused() {
        for sp in [0, 64, 500, u64::MAX, 0xffff_8000_0000_0000] {
            assert_eq!(place(sp, &NONE, 0, 836), Err(BadFrame), "{sp:x}");
        }
        let wrapping = AltStack {
            base: u64::MAX - 10,
            size: 0x4000,
            flags: 0,
        };
        assert_eq!(
            place(0x7000_0000_0000, &wrapping, sa::ONSTACK, 836),
            Err(BadFrame)
        );
    }

    #[test]
    fn registers_come_back_as_the_handler_left_them() {
        let old = Regs {
            rflags: 0x202,
            fs_base: 5,
            gs_base: 6,
            ..Regs::default()
        };
        let from = SigContext {
            cx: 1,
            r11: 2,
            ax: 3,
            ..context(0x40_0000, 0x7000_0000_0000, 0x246)
        };
        let regs = restore_registers(&old, &from).unwrap();
        assert_eq!((regs.rcx, regs.r11, regs.rax, regs.fs_base), (1, 2, 3, 5));
        assert_eq!((regs.rip, regs.rflags), (0x40_0000, 0x246));
    }

    #[test]
    fn privileged_flags_are_not_taken() {
        let old = Regs {
            rflags: 0x202,
            ..Regs::default()
        };
        let regs = restore_registers(&old, &context(0, 0, u64::MAX)).unwrap();
        assert_eq!(regs.rflags, USER_FLAGS | FIXED_FLAGS);
        assert_eq!(regs.rflags & 0x1_7100, 0, "no RF, NT, IOPL, TF");
        let regs = restore_registers(&old, &context(0, 0, 0)).unwrap();
        assert_eq!(regs.rflags, FIXED_FLAGS);
    }

    #[test]
    fn kernel_and_non_canonical_addresses_are_refused() {
        let old = Regs::default();
        for bad in [USER_END, 1 << 47, 1 << 63, u64::MAX] {
            assert_eq!(restore_registers(&old, &context(bad, 0, 0)), Err(BadFrame));
            assert_eq!(restore_registers(&old, &context(0, bad, 0)), Err(BadFrame));
        }
    }
}
