//! The memory calls. Policy about pages is shadow-mm's; here are the rules of the Linux ABI:
//! which argument is refused with which error, in which order, and the process's limits.
//!
//! Known holes: `MAP_GROWSDOWN`
//! and the stack do not grow: the stack is reserved at its full size. Locking checks the limit and
//! pins nothing, since nothing is paged out.

use shadow_mm::{Prot, Section, VadTag, Vpn, VpnRange};

use super::Errno;
use super::call::{Arg, Ctx, Entry};
use super::exec::{PAGE, USER_END};
use super::kernel::Kernel;
use crate::memory::{Backing, Intent};

mod advise;
mod brk;
pub mod guard;
mod map;
mod remap;

/// Tag of the heap's range.
pub const TAG_HEAP: VadTag = VadTag(1);
/// Tag of the main stack's range.
pub const TAG_STACK: VadTag = VadTag(2);
/// Tag of a shared mapping of a file that may not be made writable.
pub const TAG_SHARED: VadTag = VadTag(3);

/// Index of `RLIMIT_DATA`.
const RLIMIT_DATA: usize = 2;
/// Index of `RLIMIT_MEMLOCK`.
const RLIMIT_MEMLOCK: usize = 8;
/// Index of `RLIMIT_AS`.
const RLIMIT_AS: usize = 9;

/// `PROT_READ | PROT_WRITE | PROT_EXEC`.
const PROT_BITS: u64 = 7;

/// The section of a file that is to be mapped.
///
/// # Errors
/// The host's; `ENOMEM`.
pub fn section(k: &Kernel, backing: &Backing, intent: Intent) -> Result<Section<Backing>, Errno> {
    k.memory
        .sections
        .open(&k.memory, backing, intent)
        .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::NOMEM))
}

/// A range's description, as the memory manager tells it.
type VadInfo = shadow_mm::VadInfo<Backing>;

/// The memory calls.
pub const TABLE: &[Entry] = &[
    Entry {
        nr: 9,
        name: "mmap",
        args: &[Arg::Hex, Arg::Int, Arg::Hex, Arg::Hex, Arg::Fd, Arg::Hex],
        handler: map::sys_mmap,
    },
    Entry {
        nr: 10,
        name: "mprotect",
        args: &[Arg::Hex, Arg::Int, Arg::Hex],
        handler: map::sys_mprotect,
    },
    Entry {
        nr: 11,
        name: "munmap",
        args: &[Arg::Hex, Arg::Int],
        handler: map::sys_munmap,
    },
    Entry {
        nr: 12,
        name: "brk",
        args: &[Arg::Hex],
        handler: brk::sys_brk,
    },
    Entry {
        nr: 25,
        name: "mremap",
        args: &[Arg::Hex, Arg::Int, Arg::Int, Arg::Hex, Arg::Hex],
        handler: remap::sys_mremap,
    },
    Entry {
        nr: 26,
        name: "msync",
        args: &[Arg::Hex, Arg::Int, Arg::Hex],
        handler: advise::sys_msync,
    },
    Entry {
        nr: 27,
        name: "mincore",
        args: &[Arg::Hex, Arg::Int, Arg::Hex],
        handler: advise::sys_mincore,
    },
    Entry {
        nr: 28,
        name: "madvise",
        args: &[Arg::Hex, Arg::Int, Arg::Int],
        handler: advise::sys_madvise,
    },
    Entry {
        nr: 149,
        name: "mlock",
        args: &[Arg::Hex, Arg::Int],
        handler: advise::sys_mlock,
    },
    Entry {
        nr: 150,
        name: "munlock",
        args: &[Arg::Hex, Arg::Int],
        handler: advise::sys_munlock,
    },
    Entry {
        nr: 151,
        name: "mlockall",
        args: &[Arg::Hex],
        handler: advise::sys_mlockall,
    },
    Entry {
        nr: 152,
        name: "munlockall",
        args: &[],
        handler: advise::sys_munlockall,
    },
    Entry {
        nr: 325,
        name: "mlock2",
        args: &[Arg::Hex, Arg::Int, Arg::Hex],
        handler: advise::sys_mlock2,
    },
];

/// The pages of `[start, start + len)`, both of them multiples of a page and the range not empty;
/// `None` if it does not lie in the user's addresses.
fn pages(start: u64, len: u64) -> Option<VpnRange> {
    let end = start.checked_add(len).filter(|&end| end <= USER_END)?;
    debug_assert!(start.is_multiple_of(PAGE) && end.is_multiple_of(PAGE));
    VpnRange::new(Vpn::new(start / PAGE)?, len / PAGE)
}

/// `len` rounded up to pages; `None` if that overflows.
fn whole_pages(len: u64) -> Option<u64> {
    len.checked_next_multiple_of(PAGE)
}

/// The protection of a call's `prot` argument; bits without a meaning here are dropped.
fn protection(prot: u64) -> Prot {
    Prot::from_bits_truncate((prot & PROT_BITS) as u8)
}

/// Visits the ranges that overlap `range`, lowest first, until `visit` fails. Returns how many of
/// the pages are mapped.
fn for_each_vad<E>(
    c: &Ctx<'_>,
    range: VpnRange,
    mut visit: impl FnMut(&VadInfo, VpnRange) -> Result<(), E>,
) -> Result<u64, E> {
    let mut from = Some(range.start());
    let mut mapped = 0;
    while let Some(at) = from {
        let Some(vad) = c.k.memory.manager.query(&c.t.mm.space, at) else {
            break;
        };
        let Some(part) = vad.range.intersect(range) else {
            break;
        };
        mapped += part.count();
        visit(&vad, part)?;
        from = Vpn::new(vad.range.end()).filter(|&next| range.contains(next));
    }
    Ok(mapped)
}

/// How many pages of `range` are mapped.
fn mapped_pages(c: &Ctx<'_>, range: VpnRange) -> u64 {
    for_each_vad(c, range, |_, _| Ok::<(), Errno>(())).unwrap_or(0)
}

/// Fails unless every page of `range` is mapped.
fn require_mapped(c: &Ctx<'_>, range: VpnRange) -> Result<(), Errno> {
    if mapped_pages(c, range) == range.count() {
        Ok(())
    } else {
        Err(Errno::NOMEM)
    }
}

/// The soft limit of a resource.
fn limit(c: &Ctx<'_>, resource: usize) -> u64 {
    c.with_process(|p| p.rlimits[resource].0)
}

/// Fails if `more` further pages would exceed `RLIMIT_AS`.
fn check_address_space(c: &Ctx<'_>, more: u64) -> Result<(), Errno> {
    let limit = limit(c, RLIMIT_AS);
    if limit == u64::MAX {
        return Ok(());
    }
    let now = c.k.memory.manager.usage(&c.t.mm.space).virtual_pages;
    if now.saturating_add(more) > limit / PAGE {
        Err(Errno::NOMEM)
    } else {
        Ok(())
    }
}

/// Fails if `more` further pages of private writable memory would exceed `RLIMIT_DATA`. The stack's
/// do not count (getrlimit(2)).
fn check_data(c: &Ctx<'_>, more: u64) -> Result<(), Errno> {
    let limit = limit(c, RLIMIT_DATA);
    let all = Vpn::new(0).and_then(|first| VpnRange::between(first, USER_END / PAGE));
    let Some(all) = all.filter(|_| limit != u64::MAX) else {
        return Ok(());
    };
    let mut now = 0_u64;
    for_each_vad(c, all, |vad, part| {
        let counts = vad.prot.contains(Prot::WRITE) && ![TAG_STACK, TAG_SHARED].contains(&vad.tag);
        now += if counts { part.count() } else { 0 };
        Ok::<(), Errno>(())
    })?;
    if now.saturating_add(more) > limit / PAGE {
        Err(Errno::NOMEM)
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests;
