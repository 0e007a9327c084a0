//! The machine-wide files of `/proc`.

use std::fmt::Write as _;

use super::super::Caller;
use super::super::synth::Row;
use crate::linux::proc::info::{HOSTNAME, RELEASE, VERSION};
use crate::linux::process::{Life, State};

const fn row(path: &'static str, content: fn(&Caller<'_>) -> String) -> Row {
    Row {
        path,
        mode: 0o444,
        content,
    }
}

/// The files.
pub(super) const ROWS: &[Row] = &[
    row("meminfo", meminfo),
    row("cpuinfo", cpuinfo),
    row("uptime", uptime),
    row("loadavg", loadavg),
    row("stat", stat),
    row("version", |_| {
        format!("Linux version {RELEASE} (vmm) {VERSION}\n")
    }),
    row("filesystems", |_| {
        "nodev\tsysfs\nnodev\ttmpfs\nnodev\tproc\nnodev\tdevtmpfs\n\thostfs\n".to_owned()
    }),
    row("cmdline", |_| "\n".to_owned()),
    row("swaps", |_| {
        "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n".to_owned()
    }),
    row("vmstat", vmstat),
    row("sys/kernel/pid_max", |_| "4194304\n".to_owned()),
    row("sys/kernel/threads-max", |c| {
        format!("{}\n", c.k.limits.max_threads)
    }),
    row("sys/kernel/osrelease", |_| format!("{RELEASE}\n")),
    row("sys/kernel/ostype", |_| "Linux\n".to_owned()),
    row("sys/kernel/version", |_| format!("{VERSION}\n")),
    row("sys/kernel/hostname", |_| format!("{HOSTNAME}\n")),
    row("sys/kernel/domainname", |_| "(none)\n".to_owned()),
    row("sys/kernel/overflowuid", |_| "65534\n".to_owned()),
    row("sys/kernel/overflowgid", |_| "65534\n".to_owned()),
    row("sys/kernel/ngroups_max", |_| "65536\n".to_owned()),
    row("sys/kernel/cap_last_cap", |_| "40\n".to_owned()),
    row("sys/kernel/randomize_va_space", |_| "2\n".to_owned()),
    row("sys/kernel/random/uuid", |_| format!("{}\n", uuid())),
    row("sys/kernel/random/boot_id", |c| {
        format!("{}\n", c.k.boot_id.get_or_init(uuid))
    }),
    row("sys/kernel/random/entropy_avail", |_| "256\n".to_owned()),
    row("sys/vm/overcommit_memory", |_| "1\n".to_owned()),
    row("sys/vm/max_map_count", |_| {
        format!("{}\n", shadow_mm::MAX_MAPPINGS)
    }),
    row("sys/vm/mmap_min_addr", |_| "65536\n".to_owned()),
    row("sys/fs/pipe-max-size", |_| "1048576\n".to_owned()),
    row("sys/fs/file-max", |_| "1048576\n".to_owned()),
    row("sys/fs/nr_open", |_| "65536\n".to_owned()),
];

fn meminfo(c: &Caller<'_>) -> String {
    let stats = c.k.memory.manager.stats();
    let kib = |pages: u64| pages * 4;
    let (limit, used) = c.k.vfs.budget().usage();
    let data = stats.data;
    let rows = [
        ("MemTotal", kib(data.total)),
        ("MemFree", kib(data.available())),
        ("MemAvailable", kib(data.available())),
        ("Buffers", 0),
        ("Cached", 0),
        ("SwapCached", 0),
        ("Active", kib(data.active)),
        ("Inactive", 0),
        ("SwapTotal", 0),
        ("SwapFree", 0),
        ("Dirty", 0),
        ("AnonPages", kib(data.active)),
        ("Mapped", 0),
        ("Shmem", used / 1024),
        ("Slab", 0),
        ("SReclaimable", 0),
        ("PageTables", kib(stats.tables.active)),
        ("CommitLimit", kib(data.total) + limit / 1024),
        ("Committed_AS", kib(data.active)),
    ];
    let mut out = String::new();
    for (name, value) in rows {
        let _ = writeln!(out, "{:<15} {value:>8} kB", format!("{name}:"));
    }
    out
}

fn vmstat(c: &Caller<'_>) -> String {
    let data = c.k.memory.manager.stats().data;
    format!(
        "nr_free_pages {}\nnr_anon_pages {}\npgfault 0\npgmajfault 0\n",
        data.available(),
        data.active
    )
}

fn cpuinfo(c: &Caller<'_>) -> String {
    let one = |n: usize| {
        format!(
            "processor\t: {n}\nvendor_id\t: GenuineIntel\nmodel name\t: vmm virtual processor\n\
             physical id\t: 0\nsiblings\t: {0}\ncore id\t\t: {n}\ncpu cores\t: {0}\n\
             fpu\t\t: yes\nflags\t\t: fpu tsc cx8 cmov mmx fxsr sse sse2 syscall lm constant_tsc\n\n",
            c.k.limits.cpus.max(1)
        )
    };
    (0..c.k.limits.cpus.max(1)).map(one).collect()
}

/// When the first program started, nanoseconds of the machine's clock.
pub(super) fn boot(state: &State) -> u64 {
    state.procs.get(&state.main).map_or(0, |p| p.started)
}

/// Nanoseconds that all processes of the machine have used.
fn cpu_time(state: &State) -> u64 {
    let running = |p: &crate::linux::process::Process| p.cpu_ns() + p.children_usage.cpu_ns;
    state.procs.values().map(|p| running(p)).sum()
}

fn uptime(c: &Caller<'_>) -> String {
    let now = c.k.clock.monotonic();
    let state = c.k.state();
    let up = now.saturating_sub(boot(&state));
    let idle = (up * c.k.limits.cpus.max(1) as u64).saturating_sub(cpu_time(&state));
    let seconds = |ns: u64| format!("{}.{:02}", ns / 1_000_000_000, ns / 10_000_000 % 100);
    format!("{} {}\n", seconds(up), seconds(idle))
}

fn loadavg(c: &Caller<'_>) -> String {
    let state = c.k.state();
    let all = state.procs.len();
    let alive = state
        .procs
        .values()
        .filter(|p| p.life == Life::Running)
        .count();
    let last = state.procs.keys().next_back().copied().unwrap_or(0);
    format!(
        "0.00 0.00 0.00 {}/{all} {last}\n",
        alive.min(c.k.limits.cpus.max(1))
    )
}

fn stat(c: &Caller<'_>) -> String {
    let (now, real) = (c.k.clock.monotonic(), c.k.clock.realtime());
    let state = c.k.state();
    let cpus = c.k.limits.cpus.max(1) as u64;
    let up = now.saturating_sub(boot(&state));
    let busy = cpu_time(&state);
    let ticks = |ns: u64| ns / 10_000_000;
    let idle = (up * cpus).saturating_sub(busy);
    let mut out = format!("cpu  {} 0 0 {} 0 0 0 0 0 0\n", ticks(busy), ticks(idle));
    for n in 0..cpus {
        let _ = writeln!(
            out,
            "cpu{n} {} 0 0 {} 0 0 0 0 0 0",
            ticks(busy / cpus),
            ticks(idle / cpus)
        );
    }
    let running = state
        .procs
        .values()
        .filter(|p| p.life == Life::Running)
        .count();
    let _ = write!(
        out,
        "intr 0\nctxt 0\nbtime {}\nprocesses {}\nprocs_running {running}\nprocs_blocked 0\n",
        real.saturating_sub(up) / 1_000_000_000,
        state.next_pid.max(1) - 1,
    );
    out
}

/// A random UUID (RFC 9562, version 4).
fn uuid() -> String {
    let mut b = [0_u8; 16];
    // 16 bytes are given whole or, before the host has any entropy at all, waited for.
    let _ = rustix::rand::getrandom(&mut b, rustix::rand::GetRandomFlags::empty());
    b[6] = (b[6] & 0x0f) | 0x40;
    b[8] = (b[8] & 0x3f) | 0x80;
    let hex: String = b.iter().map(|byte| format!("{byte:02x}")).collect();
    [
        &hex[..8],
        &hex[8..12],
        &hex[12..16],
        &hex[16..20],
        &hex[20..],
    ]
    .join("-")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uuid_has_its_shape_and_version() {
        let id = uuid();
        assert_eq!(id.len(), 36);
        assert_eq!(&id[14..15], "4");
        assert_ne!(id, uuid());
    }
}
