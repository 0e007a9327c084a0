//! `mremap`.

use shadow_mm::{
    MapKind, MapRequest, Placement, Prot, RemapError, RemapRequest, Sharing, VadFlags, VadTag, Vpn,
    VpnRange,
};

use super::{VadInfo, check_address_space, check_data, guard, pages, whole_pages};
use crate::linux::Errno;
use crate::linux::call::{Args, Ctx, SysResult};
use crate::linux::exec::{MIN_VA, PAGE, USER_END, map_errno, remap_errno};

const MREMAP_MAYMOVE: u32 = 1;
const MREMAP_FIXED: u32 = 2;
const MREMAP_DONTUNMAP: u32 = 4;

/// `mremap(2)`.
pub(super) fn sys_mremap(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let (addr, flags, target) = (a.u64(0), a.u32(3), a.u64(4));
    let may_move = flags & MREMAP_MAYMOVE != 0;
    let fixed = flags & MREMAP_FIXED != 0;
    let keep = flags & MREMAP_DONTUNMAP != 0;
    if flags & !(MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP) != 0
        || ((fixed || keep) && !may_move)
        || (keep && a.u64(1) != a.u64(2))
        || !addr.is_multiple_of(PAGE)
    {
        return Err(Errno::INVAL.into());
    }
    let old_len = whole_pages(a.u64(1)).ok_or(Errno::INVAL)?;
    let new_len = whole_pages(a.u64(2))
        .filter(|&len| len != 0)
        .ok_or(Errno::INVAL)?;
    if old_len == 0 {
        return duplicate(c, addr, new_len, (may_move, fixed.then_some(target)));
    }
    let old = pages(addr, old_len).ok_or(Errno::FAULT)?;
    let vad = c.k.memory.manager.query(&c.t.mm.space, old.start());
    let vad = vad
        .filter(|vad| vad.range.contains(old.start()))
        .ok_or(Errno::FAULT)?;
    let fixed = if fixed {
        Some(check_target(addr, old_len, target, new_len)?)
    } else {
        None
    };
    guard::moving(c, old);
    let request = Wanted {
        old,
        new_len,
        may_move,
        fixed,
        keep,
    };
    let done = resize(c, &vad, request);
    match &done {
        Ok(_) if keep => guard::kept(c, old),
        Ok(start) => guard::moved(c, old, *start, a.u64(2)),
        Err(_) => guard::discarded(c, old),
    }
    done
}

/// A call whose arguments make sense.
#[derive(Clone, Copy)]
struct Wanted {
    old: VpnRange,
    new_len: u64,
    may_move: bool,
    fixed: Option<Vpn>,
    keep: bool,
}

fn resize(c: &Ctx<'_>, vad: &VadInfo, wanted: Wanted) -> SysResult {
    let Wanted {
        old,
        new_len,
        may_move,
        fixed,
        keep,
    } = wanted;
    let old_len = old.count() * PAGE;
    if fixed.is_none() && !keep && new_len <= old_len {
        return shrink(c, old, new_len);
    }
    if old.end() > vad.range.end() && new_len >= old_len {
        return Err(Errno::FAULT.into());
    }
    if new_len > old_len || keep {
        let more = new_len / PAGE - if keep { 0 } else { old_len / PAGE };
        check_address_space(c, more)?;
        if vad.prot.contains(Prot::WRITE) {
            check_data(c, more)?;
        }
    }
    if keep {
        return move_and_keep(c, vad, old, fixed);
    }
    let new_count = new_len / PAGE;
    match remap(
        c,
        RemapRequest {
            old,
            new_count,
            may_move: false,
            fixed,
        },
    ) {
        Err(RemapError::CannotGrow { .. }) if may_move => {
            let to = reserve(c, new_count)?;
            move_to(c, old, new_count, to)
        }
        other => Ok(other.map_err(remap_errno)?),
    }
}

/// A length of zero: another view of what is mapped shared at an address.
fn duplicate(
    c: &Ctx<'_>,
    addr: u64,
    new_len: u64,
    (may_move, target): (bool, Option<u64>),
) -> SysResult {
    let page = pages(addr, PAGE).ok_or(Errno::INVAL)?;
    let vad = c.k.memory.manager.find_vad(&c.t.mm.space, page.start());
    let vad = vad.ok_or(Errno::FAULT)?;
    if vad.sharing() != Sharing::Shared || !may_move {
        return Err(Errno::INVAL.into());
    }
    check_address_space(c, new_len / PAGE)?;
    let placement = match target {
        Some(target) => Placement::Fixed(check_target(addr, 0, target, new_len)?),
        None => Placement::Fixed(reserve(c, new_len / PAGE)?),
    };
    let request = MapRequest {
        placement,
        count: new_len / PAGE,
        prot: vad.prot,
        kind: vad.kind_from(page.start()),
        flags: vad.flags,
        tag: vad.tag,
    };
    let mapped =
        c.k.memory
            .manager
            .map(&c.t.mm.space, request)
            .map_err(map_errno)?;
    c.k.memory.submit(mapped.flush);
    Ok(mapped.range.start().va().get())
}

/// The target of a fixed move.
fn check_target(addr: u64, old_len: u64, target: u64, new_len: u64) -> Result<Vpn, Errno> {
    if !target.is_multiple_of(PAGE) || new_len > USER_END || target > USER_END - new_len {
        return Err(Errno::INVAL);
    }
    if addr + old_len > target && target + new_len > addr {
        return Err(Errno::INVAL);
    }
    if target < MIN_VA {
        return Err(Errno::PERM);
    }
    Vpn::new(target / PAGE).ok_or(Errno::INVAL)
}

/// Unmaps what is beyond `new_len`; the range may be several mappings.
fn shrink(c: &Ctx<'_>, old: VpnRange, new_len: u64) -> SysResult {
    let start = old.start().va().get();
    if let Some(tail) = pages(start + new_len, old.count() * PAGE - new_len) {
        guard::unmap(c, tail).map_err(|_| Errno::NOMEM)?;
    }
    Ok(start)
}

fn remap(c: &Ctx<'_>, request: RemapRequest) -> Result<u64, RemapError> {
    let mapped = c.k.memory.manager.remap(&c.t.mm.space, request)?;
    c.k.memory.submit(mapped.flush);
    Ok(mapped.range.start().va().get())
}

/// Moves to a place that [`reserve`] found, which is free again if that fails.
fn move_to(c: &Ctx<'_>, old: VpnRange, new_count: u64, to: Vpn) -> SysResult {
    remap(
        c,
        RemapRequest {
            old,
            new_count,
            may_move: true,
            fixed: Some(to),
        },
    )
    .map_err(|error| {
        let reserved = VpnRange::new(to, new_count);
        let unmapped = reserved.map(|range| c.k.memory.manager.unmap(&c.t.mm.space, range));
        if let Some(Ok(flush)) = unmapped {
            c.k.memory.submit(flush);
        }
        remap_errno(error).into()
    })
}

/// A place below the other mappings, held by a mapping without rights.
fn reserve(c: &Ctx<'_>, count: u64) -> Result<Vpn, Errno> {
    let below = c.t.mm.layout.lock().mmap_top;
    let below = Vpn::new(below / PAGE).ok_or(Errno::NOMEM)?;
    if let Some(place) = guard::reserve(c, below, count) {
        return place;
    }
    let request = MapRequest {
        placement: Placement::Anywhere { hint: None, below },
        count,
        prot: Prot::empty(),
        kind: MapKind::Anonymous,
        flags: VadFlags::NO_RESERVE,
        tag: VadTag::default(),
    };
    let mapped =
        c.k.memory
            .manager
            .map(&c.t.mm.space, request)
            .map_err(map_errno)?;
    c.k.memory.submit(mapped.flush);
    Ok(mapped.range.start())
}

/// `MREMAP_DONTUNMAP`: moves the pages and leaves the old range mapped afresh.
fn move_and_keep(c: &Ctx<'_>, vad: &VadInfo, old: VpnRange, fixed: Option<Vpn>) -> SysResult {
    let to = match fixed {
        Some(to) => to,
        None => reserve(c, old.count())?,
    };
    let moved = move_to(c, old, old.count(), to)?;
    let afresh = MapRequest {
        placement: Placement::Fixed(old.start()),
        count: old.count(),
        prot: vad.prot,
        kind: vad.kind_from(old.start()),
        flags: vad.flags,
        tag: vad.tag,
    };
    let mapped =
        c.k.memory
            .manager
            .map(&c.t.mm.space, afresh)
            .map_err(map_errno)?;
    c.k.memory.submit(mapped.flush);
    Ok(moved)
}
