//! `madvise`, `msync`, `mincore`, and the locking calls.

use shadow_mm::{Access, DiscardError, MapKind, Sharing, VadAdvice, VpnRange};

use super::{
    RLIMIT_MEMLOCK, TAG_SHARED, VadInfo, for_each_vad, limit, mapped_pages, pages, require_mapped,
    whole_pages,
};
use crate::linux::Errno;
use crate::linux::call::{Args, Ctx, SysResult};
use crate::linux::exec::{PAGE, USER_END, page_down};

/// What advice asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Advice {
    /// Taken note of; nothing here would be done differently.
    Ignored,
    /// Content is dropped: zeroes, or the file's content, come back.
    Drop,
    /// As `Drop`, for anonymous memory only.
    DropAnonymous,
    /// A hole in the file, or in shared memory.
    Remove,
    /// What a fork does with the range.
    Fork(VadAdvice),
    /// Wipe on fork, for anonymous memory only.
    Wipe,
    /// Touch every page.
    Populate(Access),
}

impl Advice {
    /// By the number of `madvise(2)`; `None` for what Linux does not know, or this machine not have.
    fn new(advice: i32) -> Option<Self> {
        Some(match advice {
            // NORMAL, RANDOM, SEQUENTIAL, WILLNEED, (UN)MERGEABLE, (NO)HUGEPAGE, DONTDUMP, DODUMP,
            // COLD, PAGEOUT
            0..=3 | 12..=17 | 20 | 21 => Self::Ignored,
            4 => Self::Drop,
            8 => Self::DropAnonymous,
            9 => Self::Remove,
            10 => Self::Fork(VadAdvice::DontFork),
            11 => Self::Fork(VadAdvice::DoFork),
            18 => Self::Wipe,
            19 => Self::Fork(VadAdvice::KeepOnFork),
            22 => Self::Populate(Access::Read),
            23 => Self::Populate(Access::Write),
            _ => return None,
        })
    }
}

/// `madvise(2)`. Ranges with holes: the mapped parts are advised, then `ENOMEM`.
pub(super) fn sys_madvise(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let (start, len) = (a.u64(0), a.u64(1));
    let advice = Advice::new(a.i32(2)).ok_or(Errno::INVAL)?;
    let Some(range) = advised(start, len)? else {
        return Ok(0);
    };
    let mut parts = Vec::new();
    let mapped = for_each_vad(c, range, |vad, part| {
        check_kind(advice, vad)?;
        parts.push(part);
        Ok::<(), Errno>(())
    })?;
    for part in parts {
        apply(c, advice, part)?;
    }
    if mapped == range.count() {
        Ok(0)
    } else {
        Err(Errno::NOMEM.into())
    }
}

/// The range of an advice or a synchronisation; `None` if it is empty.
fn advised(start: u64, len: u64) -> Result<Option<VpnRange>, Errno> {
    if !start.is_multiple_of(PAGE) {
        return Err(Errno::INVAL);
    }
    let len = whole_pages(len).ok_or(Errno::INVAL)?;
    if start.checked_add(len).is_none() {
        return Err(Errno::INVAL);
    }
    if len == 0 {
        Ok(None)
    } else {
        pages(start, len).ok_or(Errno::NOMEM).map(Some)
    }
}

fn check_kind(advice: Advice, vad: &VadInfo) -> Result<(), Errno> {
    match (advice, &vad.kind) {
        (Advice::DropAnonymous | Advice::Wipe, MapKind::View { .. })
        | (Advice::Remove, MapKind::Anonymous) => Err(Errno::INVAL),
        (Advice::Remove, MapKind::View { sharing, .. })
            if *sharing == Sharing::Private || vad.tag == TAG_SHARED =>
        {
            Err(Errno::ACCESS)
        }
        _ => Ok(()),
    }
}

/// Makes holes where the range's mappings show files or shared memory.
fn remove(c: &Ctx<'_>, range: VpnRange) -> Result<(), Errno> {
    let mut holes = Vec::new();
    for_each_vad(c, range, |vad, part| {
        if let MapKind::View {
            section, offset, ..
        } = &vad.kind
        {
            let start = offset + (part.start().get() - vad.range.start().get()) * PAGE;
            holes.push((section.clone(), start, part.count() * PAGE));
        }
        Ok::<(), Errno>(())
    })?;
    for (section, start, length) in holes {
        if let Some(file) = section.file() {
            let punched = file.0.punch(start, length);
            punched.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
            continue;
        }
        let pages = start / PAGE..(start + length) / PAGE;
        c.k.memory.punch_section(&section, pages);
    }
    Ok(())
}

fn apply(c: &Ctx<'_>, advice: Advice, part: VpnRange) -> Result<(), Errno> {
    let memory = &c.k.memory;
    let space = &c.t.mm.space;
    match advice {
        Advice::Ignored => {}
        Advice::Drop | Advice::DropAnonymous => {
            let discarded = memory.manager.discard(space, part);
            memory.submit(discarded.flush);
            super::guard::discarded(c, part);
            discarded.result.map_err(|error| match error {
                DiscardError::NotMapped { .. } => Errno::NOMEM,
                DiscardError::TooManyPieces { .. } | DiscardError::NoMemory => Errno::AGAIN,
            })?;
        }
        Advice::Remove => remove(c, part)?,
        Advice::Fork(what) => memory
            .manager
            .advise(space, part, what)
            .map_err(|_| Errno::NOMEM)?,
        Advice::Wipe => {
            memory
                .manager
                .advise(space, part, VadAdvice::WipeOnFork)
                .map_err(|_| Errno::NOMEM)?;
        }
        Advice::Populate(access) => {
            for_each_vad(c, part, |vad, _| {
                // Not `EFAULT`: madvise(2) tells a mapping that forbids it from a page that fails.
                if vad.prot.allows(access) {
                    Ok(())
                } else {
                    Err(Errno::INVAL)
                }
            })?;
            let bytes = (part.count() * PAGE) as usize;
            if c.mem().accessible(part.start().va().get(), bytes, access) != bytes {
                return Err(Errno::FAULT);
            }
        }
    }
    Ok(())
}

/// `msync(2)`: writes what was stored through shared mappings of files to them. `MS_ASYNC` leaves that
/// to the writer that runs once a second, as Linux does.
pub(super) fn sys_msync(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    const MS_ASYNC: u32 = 1;
    const MS_INVALIDATE: u32 = 2;
    const MS_SYNC: u32 = 4;
    let flags = a.u32(2);
    if flags & !(MS_ASYNC | MS_INVALIDATE | MS_SYNC) != 0
        || flags & (MS_ASYNC | MS_SYNC) == MS_ASYNC | MS_SYNC
        || !a.u64(0).is_multiple_of(PAGE)
    {
        return Err(Errno::INVAL.into());
    }
    // A length that wraps when it is rounded up is none, as on Linux.
    let len = whole_pages(a.u64(1)).unwrap_or(0);
    let Some(range) = advised(a.u64(0), len).map_err(|_| Errno::NOMEM)? else {
        return Ok(0);
    };
    let mut parts = Vec::new();
    let mapped = for_each_vad(c, range, |vad, part| {
        if let (
            MapKind::View {
                section, offset, ..
            },
            Sharing::Shared,
        ) = (&vad.kind, vad.sharing())
        {
            let ahead = part.start().get() - vad.range.start().get();
            let start = offset + ahead * PAGE;
            parts.push((section.clone(), start..start + part.count() * PAGE));
        }
        Ok::<(), Errno>(())
    })?;
    let files = parts.into_iter().filter(|_| flags & MS_SYNC != 0);
    for (section, bytes) in files {
        let Some(file) = c.k.memory.sections.of(&section) else {
            continue;
        };
        file.write_back(&c.k.memory, bytes)
            .and_then(|()| file.sync())
            .map_err(|_| Errno::IO)?;
    }
    if mapped == range.count() {
        Ok(0)
    } else {
        Err(Errno::NOMEM.into())
    }
}

/// `mincore(2)`.
pub(super) fn sys_mincore(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    const STEP: usize = 4096;
    let (start, len, vec) = (a.u64(0), a.u64(1), a.u64(2));
    if !start.is_multiple_of(PAGE) {
        return Err(Errno::INVAL.into());
    }
    let len = whole_pages(len).ok_or(Errno::NOMEM)?;
    if len == 0 {
        return Ok(0);
    }
    let range = pages(start, len).ok_or(Errno::NOMEM)?;
    require_mapped(c, range)?;
    let mut done = 0;
    while done < range.count() {
        let n = (range.count() - done).min(STEP as u64);
        let at = vec.checked_add(done).ok_or(Errno::FAULT)?;
        let mut resident = [0_u8; STEP];
        let step = pages(start + done * PAGE, n * PAGE).ok_or(Errno::NOMEM)?;
        c.k.memory
            .manager
            .resident_pages(&c.t.mm.space, step, |vpn, _| {
                resident[(vpn.get() - step.start().get()) as usize] = 1;
            });
        c.mem().write(at, &resident[..n as usize])?;
        done += n;
    }
    Ok(0)
}

/// `mlock(2)`.
pub(super) fn sys_mlock(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    lock(c, a.u64(0), a.u64(1))
}

/// `mlock2(2)`.
pub(super) fn sys_mlock2(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    const MLOCK_ONFAULT: u32 = 1;
    if a.u32(2) & !MLOCK_ONFAULT != 0 {
        return Err(Errno::INVAL.into());
    }
    lock(c, a.u64(0), a.u64(1))
}

fn lock(c: &Ctx<'_>, start: u64, len: u64) -> SysResult {
    let range = locked(start, len)?;
    check_locked(c, range.map_or(0, VpnRange::count))?;
    if let Some(range) = range {
        require_mapped(c, range)?;
    }
    Ok(0)
}

/// `munlock(2)`.
pub(super) fn sys_munlock(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    if let Some(range) = locked(a.u64(0), a.u64(1))? {
        require_mapped(c, range)?;
    }
    Ok(0)
}

/// The pages that hold any byte of the range; `None` if it is empty, also because its length wraps
/// when it is rounded up, as on Linux.
fn locked(start: u64, len: u64) -> Result<Option<VpnRange>, Errno> {
    let first = page_down(start);
    let bytes = len.wrapping_add(start - first);
    let len = whole_pages(bytes).unwrap_or(0);
    if first.checked_add(len).is_none() {
        return Err(Errno::INVAL);
    }
    if len == 0 {
        Ok(None)
    } else {
        pages(first, len).ok_or(Errno::NOMEM).map(Some)
    }
}

/// Whether `count` pages may be locked. Root may lock all.
fn check_locked(c: &Ctx<'_>, count: u64) -> Result<(), Errno> {
    let limit = limit(c, RLIMIT_MEMLOCK);
    if limit == u64::MAX || c.with_process(|p| p.cred.uid[1] == 0) {
        return Ok(());
    }
    if limit == 0 {
        return Err(Errno::PERM);
    }
    if count > limit / PAGE {
        Err(Errno::NOMEM)
    } else {
        Ok(())
    }
}

/// `mlockall(2)`.
pub(super) fn sys_mlockall(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    const MCL_CURRENT: u32 = 1;
    const MCL_FUTURE: u32 = 2;
    const MCL_ONFAULT: u32 = 4;
    let flags = a.u32(0);
    if flags & (MCL_CURRENT | MCL_FUTURE) == 0
        || flags & !(MCL_CURRENT | MCL_FUTURE | MCL_ONFAULT) != 0
    {
        return Err(Errno::INVAL.into());
    }
    let all = VpnRange::new(shadow_mm::Vpn::new(0).ok_or(Errno::NOMEM)?, USER_END / PAGE);
    let count = if flags & MCL_CURRENT != 0 {
        all.map_or(0, |all| mapped_pages(c, all))
    } else {
        0
    };
    check_locked(c, count)?;
    Ok(0)
}

/// `munlockall(2)`.
pub(super) fn sys_munlockall(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let _ = (c, a);
    Ok(0)
}
