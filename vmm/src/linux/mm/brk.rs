//! `brk`.

use shadow_mm::{MapKind, MapRequest, Placement, Prot, VadFlags, Vpn};

use super::{RLIMIT_DATA, TAG_HEAP, check_address_space, limit, pages};
use crate::linux::call::{Args, Ctx, SysResult};
use crate::linux::exec::{PAGE, USER_END, page_up};

/// `brk(2)`: the new break, or the old one if it could not be moved.
pub(super) fn sys_brk(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let wanted = a.u64(0);
    let limit = limit(c, RLIMIT_DATA);
    let mm = std::sync::Arc::clone(&c.t.mm);
    let mut layout = mm.layout.lock();
    let (start, old) = (layout.brk_start, layout.brk);
    if wanted < start || wanted > USER_END || wanted - start > limit {
        return Ok(old);
    }
    super::guard::before_brk(c, start, old);
    let (old_end, new_end) = (page_up(old), page_up(wanted));
    let moved = if new_end < old_end {
        shrink(c, new_end, old_end - new_end)
    } else {
        new_end == old_end || grow(c, old_end, new_end - old_end)
    };
    if moved {
        layout.brk = wanted;
    }
    super::guard::after_brk(c, start, layout.brk);
    Ok(layout.brk)
}

fn shrink(c: &Ctx<'_>, from: u64, bytes: u64) -> bool {
    let Some(range) = pages(from, bytes) else {
        return false;
    };
    match c.k.memory.manager.unmap(&c.t.mm.space, range) {
        Ok(flush) => {
            c.k.memory.submit(flush);
            true
        }
        Err(_) => false,
    }
}

fn grow(c: &Ctx<'_>, from: u64, bytes: u64) -> bool {
    let Some(at) = Vpn::new(from / PAGE) else {
        return false;
    };
    if check_address_space(c, bytes / PAGE).is_err() {
        return false;
    }
    let request = MapRequest {
        placement: Placement::FixedNoReplace(at),
        count: bytes / PAGE,
        prot: Prot::READ | Prot::WRITE,
        kind: MapKind::Anonymous,
        flags: VadFlags::empty(),
        tag: TAG_HEAP,
    };
    match c.k.memory.manager.map(&c.t.mm.space, request) {
        Ok(mapped) => {
            c.k.memory.submit(mapped.flush);
            true
        }
        Err(_) => false,
    }
}
