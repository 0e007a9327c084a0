//! What the memory calls do differently with guards.

use shadow_mm::{
    MapError, MapKind, MapRequest, Mapped, Placement, Prot, UnmapError, VadFlags, VadTag, Vpn,
    VpnRange,
};

use super::slack::View;
use super::{Allocation, Freed, GuardHeap, Slack, TAG_FREED, TAG_GUARD};
use crate::linux::Errno;
use crate::linux::call::Ctx;
use crate::linux::exec::{PAGE, page_up};
use crate::linux::mm::for_each_vad;
use crate::locks::{MutexGuard, rank};
use crate::memory::{Backing, GuardCounters};

type Locked<'a> = MutexGuard<'a, rank::Guards, GuardHeap>;

/// The calling process's guards, if it has any, locked.
fn heap<'a>(c: &'a Ctx<'_>) -> Option<(Locked<'a>, &'a GuardCounters)> {
    let counters = c.k.memory.guard.get()?;
    let mut heap = c.t.mm.guards.as_ref()?.lock();
    heap.pid = c.t.pid;
    Some((heap, counters))
}

fn view<'a>(c: &'a Ctx<'_>) -> View<'a> {
    View {
        memory: &c.k.memory,
        space: &c.t.mm.space,
    }
}

/// Maps `request`; `bytes` is the length the guest asked for.
pub(in super::super) fn map(
    c: &Ctx<'_>,
    request: MapRequest<Backing>,
    bytes: u64,
) -> Result<Mapped, MapError> {
    let Some((mut heap, counters)) = heap(c) else {
        return c.k.memory.manager.map(&c.t.mm.space, request);
    };
    if let Placement::Fixed(at) = request.placement {
        if let Some(range) = VpnRange::new(at, request.count) {
            check(c, &heap, range);
            heap.take(range.start().get(), range.end());
        }
        return c.k.memory.manager.map(&c.t.mm.space, request);
    }
    let anywhere = matches!(request.placement, Placement::Anywhere { .. });
    if !anywhere || request.kind != MapKind::Anonymous {
        return c.k.memory.manager.map(&c.t.mm.space, request);
    }
    if c.k.memory.manager.frames_short() {
        GuardCounters::say(&counters.refused);
        return c.k.memory.manager.map(&c.t.mm.space, request);
    }
    let start = reserve_between(c, request.placement, request.count)?;
    let fixed = MapRequest {
        placement: Placement::Fixed(start),
        ..request
    };
    let writable = fixed.prot.contains(Prot::WRITE);
    let pages = fixed.count;
    let mapped = c.k.memory.manager.map(&c.t.mm.space, fixed);
    if mapped.is_err() {
        release(c, start.get() - 1, start.get() + pages + 1);
    } else {
        let patterned = writable && view(c).pattern(Slack::new(start.va().get(), bytes));
        remember(&mut heap, start, pages, bytes, patterned);
        GuardCounters::say(&counters.guarded);
    }
    mapped
}

fn remember(heap: &mut GuardHeap, start: Vpn, pages: u64, bytes: u64, patterned: bool) {
    let allocation = Allocation {
        pages,
        bytes,
        guards: (true, true),
        patterned,
    };
    heap.live.insert(start.get(), allocation);
}

/// Finds a place for `count` pages between two guard pages, and reserves all of it.
fn reserve_between(c: &Ctx<'_>, placement: Placement, count: u64) -> Result<Vpn, MapError> {
    let placement = match placement {
        Placement::Anywhere { hint, below } => Placement::Anywhere {
            hint: hint.and_then(|hint| Vpn::new(hint.get().checked_sub(1)?)),
            below,
        },
        Placement::Fixed(_) | Placement::FixedNoReplace(_) => placement,
    };
    let request = inaccessible(placement, count + 2, TAG_GUARD);
    let mapped = c.k.memory.manager.map(&c.t.mm.space, request)?;
    c.k.memory.submit(mapped.flush);
    let first = mapped.range.start().checked_add(1);
    first.ok_or(MapError::NoSpace { count })
}

/// A place that a moving mapping may have, and its guard pages; `None` without guards.
pub(in super::super) fn reserve(c: &Ctx<'_>, below: Vpn, count: u64) -> Option<Result<Vpn, Errno>> {
    c.t.mm.guards.as_ref()?;
    let anywhere = Placement::Anywhere { hint: None, below };
    Some(reserve_between(c, anywhere, count).map_err(crate::linux::exec::map_errno))
}

fn inaccessible(placement: Placement, count: u64, tag: VadTag) -> MapRequest<Backing> {
    MapRequest {
        placement,
        count,
        prot: Prot::empty(),
        kind: MapKind::Anonymous,
        flags: VadFlags::NO_RESERVE,
        tag,
    }
}

/// Checks the patterns that end in a range.
fn check(c: &Ctx<'_>, heap: &GuardHeap, range: VpnRange) {
    for slack in heap.slacks(Some(range)) {
        view(c).check(slack, heap.pid);
    }
}

/// Unmaps a range; the guarded parts of it go into quarantine.
pub(in super::super) fn unmap(c: &Ctx<'_>, range: VpnRange) -> Result<(), UnmapError> {
    let Some((mut heap, counters)) = heap(c) else {
        let flush = c.k.memory.manager.unmap(&c.t.mm.space, range)?;
        c.k.memory.submit(flush);
        return Ok(());
    };
    check(c, &heap, range);
    let parts = heap.take(range.start().get(), range.end());
    let mut from = range.start().get();
    for part in &parts {
        unmap_others(c, from, part.data.0)?;
        from = part.data.1;
    }
    unmap_others(c, from, range.end())?;
    for part in parts {
        quarantine(c, &mut heap, counters, part);
    }
    Ok(())
}

/// Unmaps what is neither a guard page nor in quarantine.
fn unmap_others(c: &Ctx<'_>, from: u64, end: u64) -> Result<(), UnmapError> {
    unmap_where(c, from, end, |tag| tag != TAG_GUARD && tag != TAG_FREED)
}

/// Gives guard pages and ranges in quarantine back.
fn release(c: &Ctx<'_>, from: u64, end: u64) {
    let released = unmap_where(c, from, end, |tag| tag == TAG_GUARD || tag == TAG_FREED);
    debug_assert!(released.is_ok(), "{released:?}");
}

fn unmap_where(
    c: &Ctx<'_>,
    from: u64,
    end: u64,
    which: impl Fn(VadTag) -> bool,
) -> Result<(), UnmapError> {
    let Some(range) = Vpn::new(from).and_then(|from| VpnRange::between(from, end)) else {
        return Ok(());
    };
    let mut parts = Vec::new();
    let _pages = for_each_vad(c, range, |vad, part| {
        if which(vad.tag) {
            parts.push(part);
        }
        Ok::<(), Errno>(())
    });
    for part in parts {
        let flush = c.k.memory.manager.unmap(&c.t.mm.space, part)?;
        c.k.memory.submit(flush);
    }
    Ok(())
}

/// Makes a part of an allocation inaccessible for as long as there is room for it.
fn quarantine(c: &Ctx<'_>, heap: &mut GuardHeap, counters: &GuardCounters, part: Freed) {
    let (from, end) = part.data;
    let placement = Vpn::new(from).map(Placement::Fixed);
    let kept = placement.map(|at| {
        let request = inaccessible(at, end - from, TAG_FREED);
        c.k.memory.manager.map(&c.t.mm.space, request)
    });
    match kept {
        Some(Ok(mapped)) => c.k.memory.submit(mapped.flush),
        Some(Err(_)) | None => {
            // No further range may be mapped: it goes for good.
            let _ = unmap_where(c, from, end, |_| true);
            release(c, part.whole.0, part.whole.1);
            return;
        }
    }
    GuardCounters::say(&counters.quarantined);
    heap.freed.push(part, part.whole.1 - part.whole.0);
    while let Some(oldest) = heap.freed.evict() {
        GuardCounters::say(&counters.released);
        release(c, oldest.whole.0, oldest.whole.1);
    }
}

/// Content was dropped: the pattern too.
pub(in super::super) fn discarded(c: &Ctx<'_>, range: VpnRange) {
    if let Some((heap, _)) = heap(c) {
        for slack in heap.slacks(Some(range)) {
            view(c).pattern(slack);
        }
    }
}

/// A range is about to be moved or resized: its pattern is checked, and is zeroes again, as the guest
/// may soon see it.
pub(in super::super) fn moving(c: &Ctx<'_>, old: VpnRange) {
    if let Some((heap, _)) = heap(c) {
        check(c, &heap, old);
        for slack in heap.slacks(Some(old)) {
            view(c).fill(slack, 0);
        }
    }
}

/// A range was moved to `start` (or resized, if that is where it was), and now has `bytes`.
pub(in super::super) fn moved(c: &Ctx<'_>, old: VpnRange, start: u64, bytes: u64) {
    let Some((mut heap, counters)) = heap(c) else {
        return;
    };
    let pages = page_up(bytes) / PAGE;
    let known = heap.live.contains_key(&old.start().get());
    let in_place = start == old.start().va().get();
    if in_place {
        if let Some(a) = heap.live.get_mut(&old.start().get())
            && a.pages == pages
        {
            a.bytes = bytes;
            a.patterned = view(c).pattern(Slack::new(start, bytes));
        }
        return;
    }
    for part in heap.take(old.start().get(), old.end()) {
        quarantine(c, &mut heap, counters, part);
    }
    let guarded = |page| {
        let at = Vpn::new(page).and_then(|at| c.k.memory.manager.find_vad(&c.t.mm.space, at));
        at.is_some_and(|vad| vad.tag == TAG_GUARD)
    };
    let first = start / PAGE;
    if guarded(first - 1) && guarded(first + pages) {
        let patterned = known && view(c).pattern(Slack::new(start, bytes));
        if let Some(first) = Vpn::new(first) {
            remember(&mut heap, first, pages, bytes, patterned);
        }
    }
}

/// A range was moved and is mapped afresh where it was.
pub(in super::super) fn kept(c: &Ctx<'_>, old: VpnRange) {
    if let Some((mut heap, _)) = heap(c) {
        heap.take(old.start().get(), old.end());
    }
}

/// The break is about to be moved from `old`. The caller has the layout locked.
pub(in super::super) fn before_brk(c: &Ctx<'_>, start: u64, old: u64) {
    let Some((mut heap, _)) = heap(c) else {
        return;
    };
    if std::mem::take(&mut heap.brk_patterned) {
        let slack = Slack::new(start, old - start);
        view(c).check(slack, heap.pid);
        view(c).fill(slack, 0);
    }
    release(c, page_up(old) / PAGE, page_up(old) / PAGE + 1);
}

/// The break is now at `now`.
pub(in super::super) fn after_brk(c: &Ctx<'_>, start: u64, now: u64) {
    let Some((mut heap, _)) = heap(c) else {
        return;
    };
    for page in [(start / PAGE).checked_sub(1), Some(page_up(now) / PAGE)] {
        let Some(at) = page.and_then(Vpn::new) else {
            continue;
        };
        let request = inaccessible(Placement::FixedNoReplace(at), 1, TAG_GUARD);
        // What is there already guards nothing, and stays.
        if let Ok(mapped) = c.k.memory.manager.map(&c.t.mm.space, request) {
            c.k.memory.submit(mapped.flush);
        }
    }
    heap.brk_patterned = now > start && view(c).pattern(Slack::new(start, now - start));
}
