//! `rt_sigreturn`: back from a handler. Everything in the frame is the guest's and is checked.

use super::calls::set_altstack;
use super::deliver::force;
use super::frame::{self, RtSigframe, UC_OFFSET, UContext};
use super::{set_mask, xsave};
use crate::linux::call::{Args, Ctx, Stop, SysResult};
use crate::linux::process::SigInfo;
use crate::linux::thread::{Fpu, Regs, XsaveArea};

/// What a frame says, checked.
struct Restored {
    regs: Regs,
    fpu: Fpu,
    uc: UContext,
}

/// `rt_sigreturn()`.
///
/// # Errors
/// Always [`Stop::Replaced`]: a bad frame is a `SIGSEGV`.
pub fn sys_rt_sigreturn(c: &mut Ctx<'_>, _a: &Args) -> SysResult {
    match read(c) {
        Some(restored) => apply(c, restored),
        None => {
            let mut state = c.k.state();
            force(&c.k.sched, &mut state, c.t, SigInfo::kernel(libc::SIGSEGV));
        }
    }
    Err(Stop::Replaced)
}

/// Reads and checks the frame. The handler's `ret` has taken the return address.
fn read(c: &mut Ctx<'_>) -> Option<Restored> {
    let frame = c.t.regs.rsp.checked_sub(size_of_val(&0_u64) as u64)?;
    let uc: UContext = c.mem().read_obj(frame.checked_add(UC_OFFSET)?).ok()?;
    debug_assert!(size_of::<UContext>() < size_of::<RtSigframe>());
    let regs = frame::restore_registers(&c.t.regs, &uc.mcontext).ok()?;
    let fpu = read_fpu(c, uc.mcontext.fpstate)?;
    Some(Restored { regs, fpu, uc })
}

/// The FPU state of a frame. No pointer: the initial state.
fn read_fpu(c: &mut Ctx<'_>, at: u64) -> Option<Fpu> {
    if at == 0 {
        return Some(Fpu::Initial);
    }
    if !at.is_multiple_of(64) {
        return None;
    }
    let (whole, xcr0) = c.cpu.xsave_layout();
    let size = xsave::size_of_components(xcr0, whole);
    let mut legacy = [0; xsave::LEGACY];
    c.mem().read(at, &mut legacy).ok()?;
    let area = if xsave::is_extended(&legacy, size) && ends_well(c, at.checked_add(size as u64)?) {
        let mut area = vec![0; size];
        c.mem().read(at, &mut area).ok()?;
        area.resize(whole.max(size), 0);
        area
    } else {
        xsave::from_legacy(&legacy, whole)
    };
    let current = match c.cpu.save_fpu(&mut c.t.fpu) {
        Ok(area) => &area.0,
        Err(error) => {
            tracing::error!(pid = c.t.pid, %error, "no FPU state to check a frame against");
            return None;
        }
    };
    xsave::import(area, xcr0, current)
        .ok()
        .map(|area| Fpu::Saved(XsaveArea(area)))
}

fn ends_well(c: &Ctx<'_>, at: u64) -> bool {
    let mut magic = [0; xsave::MAGIC2_SIZE];
    c.mem().read(at, &mut magic).is_ok() && xsave::is_magic2(magic)
}

fn apply(c: &mut Ctx<'_>, restored: Restored) {
    let Restored { regs, fpu, uc } = restored;
    c.t.regs = regs;
    c.t.fpu = fpu;
    // As Linux: a bad stack in the frame is not worth a signal.
    let _ = set_altstack(c.t, &uc.stack);
    let mut state = c.k.state();
    set_mask(&c.k.sched, &mut state, c.t, uc.sigmask);
}
