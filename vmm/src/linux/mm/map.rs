//! `mmap`, `munmap`, `mprotect`.

use shadow_mm::{
    Access, Charge, MapKind, MapRequest, Placement, Prot, Sharing, VadFlags, VadTag, Vpn, VpnRange,
};

use super::{
    PROT_BITS, TAG_SHARED, check_address_space, check_data, for_each_vad, mapped_pages, pages,
    protection, section, whole_pages,
};
use crate::linux::Errno;
use crate::linux::call::{Args, Ctx, SysResult};
use crate::linux::exec::{MIN_VA, PAGE, USER_END, map_errno};
use crate::linux::fs::Seals;
use crate::memory::{Backing, Intent};

const MAP_SHARED: u32 = 0x01;
const MAP_PRIVATE: u32 = 0x02;
const MAP_SHARED_VALIDATE: u32 = 0x03;
const MAP_TYPE: u32 = 0x0f;
const MAP_FIXED: u32 = 0x10;
const MAP_ANONYMOUS: u32 = 0x20;
const MAP_32BIT: u32 = 0x40;
const MAP_GROWSDOWN: u32 = 0x0100;
const MAP_LOCKED: u32 = 0x2000;
const MAP_NORESERVE: u32 = 0x4000;
const MAP_POPULATE: u32 = 0x8000;
const MAP_HUGETLB: u32 = 0x4_0000;
const MAP_FIXED_NOREPLACE: u32 = 0x10_0000;
/// The flags of before `MAP_SHARED_VALIDATE`, which refuses all others (`LEGACY_MAP_MASK`).
const LEGACY_FLAGS: u32 = MAP_SHARED
    | MAP_PRIVATE
    | MAP_FIXED
    | MAP_ANONYMOUS
    | 0x0800 // MAP_DENYWRITE
    | 0x1000 // MAP_EXECUTABLE
    | 0x400_0000 // MAP_UNINITIALIZED
    | MAP_GROWSDOWN
    | MAP_LOCKED
    | MAP_NORESERVE
    | MAP_POPULATE
    | 0x1_0000 // MAP_NONBLOCK
    | 0x2_0000 // MAP_STACK
    | MAP_HUGETLB
    | MAP_32BIT;

/// End of what `MAP_32BIT` gives.
const END_32BIT: u64 = 1 << 31;

/// Most bytes `MAP_POPULATE` touches in one call; the rest is touched by the guest itself.
const POPULATE_MAX: u64 = 16 << 20;

const PROT_SEM: u64 = 8;
const PROT_GROWSDOWN: u64 = 0x0100_0000;
const PROT_GROWSUP: u64 = 0x0200_0000;

/// What a mapping shows, and the tag it gets.
struct Source {
    kind: MapKind<Backing>,
    tag: VadTag,
}

/// `mmap(2)`.
pub(super) fn sys_mmap(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let (addr, len, prot) = (a.u64(0), a.u64(1), a.u64(2));
    let (flags, offset) = (a.u32(3), a.u64(5));
    if !offset.is_multiple_of(PAGE) {
        return Err(Errno::INVAL.into());
    }
    let file = if flags & MAP_ANONYMOUS == 0 {
        Some(c.file(a.i32(4))?)
    } else {
        None
    };
    if file
        .as_ref()
        .is_some_and(|f| f.flags() & crate::linux::file::O_PATH != 0)
    {
        return Err(Errno::BADF.into());
    }
    if len == 0 {
        return Err(Errno::INVAL.into());
    }
    let len = whole_pages(len)
        .filter(|&len| len <= USER_END)
        .ok_or(Errno::NOMEM)?;
    if offset.checked_add(len).is_none() {
        return Err(Errno::OVERFLOW.into());
    }
    let placement = placement(c, addr, len, flags)?;
    let prot = protection(prot);
    let source = match &file {
        Some(file) => file_source(c, file, offset, prot, flags)?,
        None => anonymous_source(c, len, flags)?,
    };
    let more = len / PAGE - replaced_pages(c, &placement, len);
    check_address_space(c, more)?;
    if prot.contains(Prot::WRITE) && source.tag != TAG_SHARED {
        check_data(c, more)?;
    }
    let storable = source.tag != TAG_SHARED && flags & MAP_TYPE != MAP_PRIVATE;
    let request = MapRequest {
        placement,
        count: len / PAGE,
        prot,
        kind: source.kind,
        flags: vad_flags(flags),
        tag: source.tag,
    };
    let mapped = super::guard::map(c, request, a.u64(1)).map_err(map_errno)?;
    c.k.memory.submit(mapped.flush);
    if storable && file.is_some_and(|file| is_sealed(&file)) {
        // Sealed while it was mapped, by who did not see the mapping yet.
        super::guard::unmap(c, mapped.range).map_err(|_| Errno::NOMEM)?;
        return Err(Errno::PERM.into());
    }
    let start = mapped.range.start().va().get();
    if flags & (MAP_POPULATE | MAP_LOCKED) != 0 && !prot.is_empty() {
        let access = if prot.contains(Prot::WRITE) {
            Access::Write
        } else {
            Access::Read
        };
        let _touched = c
            .mem()
            .accessible(start, len.min(POPULATE_MAX) as usize, access);
    }
    Ok(start)
}

/// Where the mapping may go.
fn placement(c: &Ctx<'_>, addr: u64, len: u64, flags: u32) -> Result<Placement, Errno> {
    if flags & (MAP_FIXED | MAP_FIXED_NOREPLACE) != 0 {
        if addr > USER_END - len {
            return Err(Errno::NOMEM);
        }
        if !addr.is_multiple_of(PAGE) {
            return Err(Errno::INVAL);
        }
        if addr < MIN_VA {
            return Err(Errno::PERM);
        }
        let at = Vpn::new(addr / PAGE).ok_or(Errno::NOMEM)?;
        if flags & MAP_FIXED_NOREPLACE != 0 {
            return Ok(Placement::FixedNoReplace(at));
        }
        return Ok(Placement::Fixed(at));
    }
    let hint = addr
        .checked_next_multiple_of(PAGE)
        .filter(|&at| addr != 0 && at <= USER_END - len);
    let below = if flags & MAP_32BIT != 0 {
        END_32BIT
    } else {
        c.t.mm.layout.lock().mmap_top
    };
    let hint = hint
        .map(|at| at.max(MIN_VA))
        .filter(|&at| flags & MAP_32BIT == 0 || at + len <= END_32BIT);
    Ok(Placement::Anywhere {
        hint: hint.and_then(|at| Vpn::new(at / PAGE)),
        below: Vpn::new(below / PAGE).ok_or(Errno::NOMEM)?,
    })
}

/// Pages that a fixed mapping replaces.
fn replaced_pages(c: &Ctx<'_>, placement: &Placement, len: u64) -> u64 {
    match placement {
        Placement::Fixed(at) => {
            VpnRange::new(*at, len / PAGE).map_or(0, |range| mapped_pages(c, range))
        }
        Placement::FixedNoReplace(_) | Placement::Anywhere { .. } => 0,
    }
}

fn vad_flags(flags: u32) -> VadFlags {
    [
        (MAP_NORESERVE, VadFlags::NO_RESERVE),
        (MAP_GROWSDOWN, VadFlags::GROWS_DOWN),
    ]
    .into_iter()
    .filter(|&(bit, _)| flags & bit != 0)
    .fold(VadFlags::empty(), |all, (_, flag)| all | flag)
}

fn anonymous_source(c: &Ctx<'_>, len: u64, flags: u32) -> Result<Source, Errno> {
    if flags & MAP_HUGETLB != 0 {
        // As with an empty pool of huge pages.
        return Err(Errno::NOMEM);
    }
    let charge = if flags & MAP_NORESERVE == 0 {
        Charge::Charged
    } else {
        Charge::Uncharged
    };
    let kind = match flags & MAP_TYPE {
        MAP_PRIVATE => MapKind::Anonymous,
        MAP_SHARED => MapKind::View {
            section: c
                .k
                .memory
                .manager
                .create_shared_memory(len, charge)
                .map_err(|_| Errno::NOMEM)?,
            offset: 0,
            sharing: Sharing::Shared,
        },
        _ => return Err(Errno::INVAL),
    };
    Ok(Source {
        kind,
        tag: VadTag::default(),
    })
}

fn file_source(
    c: &Ctx<'_>,
    file: &crate::linux::file::Description,
    offset: u64,
    prot: Prot,
    flags: u32,
) -> Result<Source, Errno> {
    let shared = match flags & MAP_TYPE {
        MAP_SHARED_VALIDATE if flags & !(LEGACY_FLAGS | MAP_FIXED_NOREPLACE) != 0 => {
            return Err(Errno::OPNOTSUPP);
        }
        MAP_SHARED | MAP_SHARED_VALIDATE => true,
        MAP_PRIVATE => false,
        _ => return Err(Errno::INVAL),
    };
    if !file.readable() || (shared && prot.contains(Prot::WRITE) && !file.writable()) {
        return Err(Errno::ACCESS);
    }
    if flags & MAP_HUGETLB != 0 {
        return Err(Errno::INVAL);
    }
    let backing = file.file.mapping(c.k)?;
    let sealed = shared && is_sealed(file);
    if sealed && prot.contains(Prot::WRITE) {
        return Err(Errno::PERM);
    }
    let (sharing, tag, intent) = match (shared, file.writable() && !sealed) {
        (true, true) => (Sharing::Shared, VadTag::default(), Intent::Write),
        (true, false) => (Sharing::Shared, TAG_SHARED, Intent::Read),
        (false, _) => (Sharing::Private, VadTag::default(), Intent::Read),
    };
    Ok(Source {
        kind: MapKind::View {
            section: section(c.k, &backing, intent)?,
            offset,
            sharing,
        },
        tag,
    })
}

/// Whether nobody may begin to store to the file.
fn is_sealed(file: &crate::linux::file::Description) -> bool {
    file.file.seals().is_ok_and(Seals::keep_content)
}

/// `munmap(2)`.
pub(super) fn sys_munmap(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let (addr, len) = (a.u64(0), a.u64(1));
    if !addr.is_multiple_of(PAGE) || len == 0 {
        return Err(Errno::INVAL.into());
    }
    let range = whole_pages(len)
        .and_then(|len| pages(addr, len))
        .ok_or(Errno::INVAL)?;
    super::guard::unmap(c, range).map_err(|_| Errno::NOMEM)?;
    if c.k.memory.sections.untidy() {
        c.k.memory.views_changed();
    }
    Ok(0)
}

/// `mprotect(2)`.
pub(super) fn sys_mprotect(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let (mut start, len, prot) = (a.u64(0), a.u64(1), a.u64(2));
    let grows = prot & (PROT_GROWSDOWN | PROT_GROWSUP);
    if grows == PROT_GROWSDOWN | PROT_GROWSUP || !start.is_multiple_of(PAGE) {
        return Err(Errno::INVAL.into());
    }
    if len == 0 {
        return Ok(0);
    }
    let end = whole_pages(len)
        .and_then(|len| start.checked_add(len))
        .ok_or(Errno::NOMEM)?;
    if prot & !(PROT_BITS | PROT_SEM | grows) != 0 {
        return Err(Errno::INVAL.into());
    }
    let mut range = pages(start, end - start).ok_or(Errno::NOMEM)?;
    if grows != 0 {
        start = grown_start(c, range, grows)?;
        range = pages(start, end - start).ok_or(Errno::NOMEM)?;
    }
    let prot = protection(prot);
    if prot.contains(Prot::WRITE) {
        for_each_vad(c, range, |vad, _| {
            if vad.tag == TAG_SHARED {
                Err(Errno::ACCESS)
            } else {
                Ok(())
            }
        })?;
    }
    let protected = c.k.memory.manager.protect(&c.t.mm.space, range, prot);
    c.k.memory.submit(protected.flush);
    protected.result.map_err(|_| Errno::NOMEM)?;
    Ok(0)
}

/// Where a change that reaches to the end of a growing range starts.
fn grown_start(c: &Ctx<'_>, range: VpnRange, grows: u64) -> Result<u64, Errno> {
    let vad =
        c.k.memory
            .manager
            .query(&c.t.mm.space, range.start())
            .ok_or(Errno::NOMEM)?;
    if vad.range.start().get() >= range.end() {
        return Err(Errno::NOMEM);
    }
    if grows == PROT_GROWSUP || !vad.flags.contains(VadFlags::GROWS_DOWN) {
        return Err(Errno::INVAL);
    }
    Ok(vad.range.start().va().get())
}
