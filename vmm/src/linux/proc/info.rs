//! What a process can ask about the machine and itself: uname(2), sysinfo(2), getrusage(2),
//! times(2), getrandom(2), and the addresses libc registers for its threads.

use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

use super::population;
use super::timeval::{Pair, SECOND};
use crate::linux::Errno;
use crate::linux::call::{Arg, Args, Ctx, Entry, SysResult};
use crate::linux::process::Usage;
use crate::memory::FRAME;

use Arg::{Hex, Int};

/// The family's calls.
pub const TABLE: &[Entry] = &[
    Entry {
        nr: 63,
        name: "uname",
        args: &[Hex],
        handler: sys_uname,
    },
    Entry {
        nr: 98,
        name: "getrusage",
        args: &[Int, Hex],
        handler: sys_getrusage,
    },
    Entry {
        nr: 99,
        name: "sysinfo",
        args: &[Hex],
        handler: sys_sysinfo,
    },
    Entry {
        nr: 100,
        name: "times",
        args: &[Hex],
        handler: sys_times,
    },
    Entry {
        nr: 218,
        name: "set_tid_address",
        args: &[Hex],
        handler: sys_set_tid_address,
    },
    Entry {
        nr: 273,
        name: "set_robust_list",
        args: &[Hex, Int],
        handler: sys_set_robust_list,
    },
    Entry {
        nr: 274,
        name: "get_robust_list",
        args: &[Int, Hex, Hex],
        handler: sys_get_robust_list,
    },
    Entry {
        nr: 318,
        name: "getrandom",
        args: &[Hex, Int, Hex],
        handler: sys_getrandom,
    },
];

/// `uname -r`.
pub const RELEASE: &str = "6.1.0-vmm";
/// `uname -v`.
pub const VERSION: &str = "#1 SMP vmm";
/// `uname -n`.
pub const HOSTNAME: &str = "vmm";

/// Nanoseconds of a clock tick (`sysconf(_SC_CLK_TCK)` is 100).
const TICK: u64 = SECOND / 100;

/// Bytes of randomness fetched at once.
const RANDOM_STEP: usize = 64 << 10;
/// Most bytes one call gives.
const RANDOM_MAX: u64 = i32::MAX as u64;

const GRND_FLAGS: u32 = 7;
const GRND_RANDOM_AND_INSECURE: u32 = 2 | 4;

/// `struct rusage`.
#[repr(C)]
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Rusage {
    user: Pair,
    system: Pair,
    max_rss_kib: i64,
    shared: [i64; 3],
    minor_faults: i64,
    major_faults: i64,
    rest: [i64; 8],
}

impl Rusage {
    /// All CPU time counts as user time: the VMM does not tell them apart.
    #[must_use]
    pub fn of(usage: &Usage) -> Self {
        Self {
            user: Pair::timeval(usage.cpu_ns),
            max_rss_kib: (usage.peak_pages.saturating_mul(4)) as i64,
            minor_faults: usage.minor_faults as i64,
            major_faults: usage.major_faults as i64,
            ..Self::new_zeroed()
        }
    }
}

/// `struct sysinfo`.
#[repr(C)]
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
struct SysInfo {
    uptime: i64,
    loads: [u64; 3],
    total_ram: u64,
    free_ram: u64,
    shared_ram: u64,
    buffer_ram: u64,
    total_swap: u64,
    free_swap: u64,
    procs: u16,
    pad: [u16; 3],
    total_high: u64,
    free_high: u64,
    mem_unit: u32,
    tail: u32,
}

fn sys_uname(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let fields = ["Linux", HOSTNAME, RELEASE, VERSION, "x86_64", "(none)"];
    let mut bytes = [0; 6 * 65];
    for (field, text) in bytes.chunks_exact_mut(65).zip(fields) {
        field[..text.len()].copy_from_slice(text.as_bytes());
    }
    c.mem().write(a.u64(0), &bytes)?;
    Ok(0)
}

fn sys_sysinfo(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let frames = c.k.memory.manager.stats();
    let page = FRAME as u64;
    let state = c.k.state();
    let procs = population(&state);
    drop(state);
    let info = SysInfo {
        uptime: (c.k.clock.monotonic() / SECOND) as i64,
        total_ram: (frames.data.total + frames.tables.total) * page,
        free_ram: (frames.data.available() + frames.tables.available()) * page,
        procs: u16::try_from(procs).unwrap_or(u16::MAX),
        mem_unit: 1,
        ..SysInfo::new_zeroed()
    };
    c.mem().write_obj(a.u64(0), &info)?;
    Ok(0)
}

fn sys_getrusage(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let usage = match a.i32(0) {
        libc::RUSAGE_THREAD => {
            let mut usage = Usage {
                cpu_ns: c
                    .t
                    .shared
                    .cpu_time
                    .load(std::sync::atomic::Ordering::Relaxed),
                ..Usage::default()
            };
            usage.note_peak(&c.t.mm);
            usage
        }
        libc::RUSAGE_SELF => {
            let mut usage = c.with_process(|p| Usage {
                cpu_ns: p.cpu_ns(),
                ..p.usage
            });
            usage.note_peak(&c.t.mm);
            usage
        }
        libc::RUSAGE_CHILDREN => c.with_process(|p| p.children_usage),
        _ => return Err(Errno::INVAL.into()),
    };
    c.mem().write_obj(a.u64(1), &Rusage::of(&usage))?;
    Ok(0)
}

/// `struct tms`: own user and system time, then the children's.
fn sys_times(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let (own, children) = c.with_process(|p| (p.cpu_ns(), p.children_usage.cpu_ns));
    if a.u64(0) != 0 {
        c.mem()
            .write_obj(a.u64(0), &[own / TICK, 0, children / TICK, 0])?;
    }
    Ok(c.k.clock.monotonic() / TICK)
}

fn sys_set_tid_address(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    c.t.clear_child_tid = a.u64(0);
    Ok(c.t.tid as u64)
}

/// `sizeof(struct robust_list_head)`.
const ROBUST_LIST_HEAD: u64 = 24;

fn sys_set_robust_list(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    if a.u64(1) != ROBUST_LIST_HEAD {
        return Err(Errno::INVAL.into());
    }
    c.t.robust_list = (a.u64(0), a.u64(1));
    Ok(0)
}

/// Only the caller's own: the list is in a record that another worker may own.
fn sys_get_robust_list(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let tid = a.i32(0);
    if tid != 0 && tid != c.t.tid {
        c.k.state().owner_of(tid).ok_or(Errno::SRCH)?;
        return Err(Errno::PERM.into());
    }
    let (head, _) = c.t.robust_list;
    c.mem().write_obj(a.u64(2), &ROBUST_LIST_HEAD)?;
    c.mem().write_obj(a.u64(1), &head)?;
    Ok(0)
}

/// The host's randomness. A large request ends early when something needs attention, as on Linux.
fn sys_getrandom(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let flags = a.u32(2);
    let both = flags & GRND_RANDOM_AND_INSECURE == GRND_RANDOM_AND_INSECURE;
    if flags & !GRND_FLAGS != 0 || both {
        return Err(Errno::INVAL.into());
    }
    let total = a.u64(1).min(RANDOM_MAX);
    let mut buf = vec![0; (total as usize).min(RANDOM_STEP)];
    let mut done = 0;
    while done < total {
        let step = buf.len().min((total - done) as usize);
        fill_random(&mut buf[..step])?;
        let va = a.u64(0).checked_add(done).ok_or(Errno::FAULT)?;
        if let Err(errno) = c.mem().write(va, &buf[..step]) {
            return if done == 0 {
                Err(errno.into())
            } else {
                Ok(done)
            };
        }
        done += step as u64;
        if c.t
            .shared
            .attention
            .load(std::sync::atomic::Ordering::SeqCst)
        {
            break;
        }
    }
    Ok(done)
}

fn fill_random(mut buf: &mut [u8]) -> Result<(), Errno> {
    while !buf.is_empty() {
        match rustix::rand::getrandom(&mut *buf, rustix::rand::GetRandomFlags::empty()) {
            Ok(n) => buf = &mut buf[n..],
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

const _: () = assert!(size_of::<Rusage>() == 144);
const _: () = assert!(size_of::<SysInfo>() == 112);
