//! `stat`, `statm`, `status` and `limits` of a process (proc(5)).

use std::fmt::Write as _;
use std::sync::atomic::Ordering;

use rustix::io::Errno;
use shadow_mm::SpaceUsage;

use super::super::Caller;
use crate::linux::process::{Life, Pid, Process, SIGNALS};
use crate::linux::thread::Tid;

/// Clock ticks are hundredths of a second.
const TICK_NS: u64 = 10_000_000;
const PAGE: u64 = 4096;

/// What thread `tid` used, or for the leader's id the whole process.
fn cpu_ns(p: &Process, tid: Tid) -> u64 {
    match p.threads.get(&tid) {
        Some(thread) if tid != p.pid => thread.cpu_time.load(Ordering::Relaxed),
        _ => p.cpu_ns(),
    }
}

/// What the files need, copied from under the state lock.
struct Facts {
    usage: SpaceUsage,
    layout: crate::linux::process::MmLayout,
    boot: u64,
    tty: Option<Pid>,
}

fn with<R>(c: &Caller<'_>, pid: Pid, f: impl FnOnce(&Process, &Facts) -> R) -> Result<R, Errno> {
    let mm = super::process::space(c, pid)?;
    let usage = mm
        .as_ref()
        .map(|mm| c.k.memory.manager.usage(&mm.space))
        .unwrap_or_default();
    let layout = mm
        .as_ref()
        .map(|mm| mm.layout.lock().clone())
        .unwrap_or_default();
    let state = c.k.state();
    let p = state.procs.get(&pid).ok_or(Errno::NOENT)?;
    let boot = super::global::boot(&state);
    let tty = state
        .tty
        .session
        .filter(|&session| session == p.sid)
        .map(|_| state.tty.foreground);
    Ok(f(
        p,
        &Facts {
            usage,
            layout,
            boot,
            tty,
        },
    ))
}

fn letter(c: &Caller<'_>, p: &Process, tid: Tid) -> char {
    match p.life {
        // A leader that has ended before the others; `init` never has a thread.
        Life::Running | Life::Stopped(_)
            if !p.threads.is_empty() && !p.threads.contains_key(&tid) =>
        {
            'Z'
        }
        Life::Zombie(_) => 'Z',
        Life::Stopped(_) => 'T',
        Life::Running if tid == c.tid => 'R',
        Life::Running => 'S',
    }
}

/// Pending, blocked, ignored and caught signals.
fn signals(p: &Process, tid: Tid) -> [u64; 4] {
    let mask = p.thread_masks.get(&tid).copied().unwrap_or(0);
    let (mut ignored, mut caught) = (0, 0);
    for (n, action) in p.actions.iter().enumerate().take(SIGNALS) {
        match action.handler {
            0 => {}
            1 => ignored |= 1_u64 << n,
            _ => caught |= 1_u64 << n,
        }
    }
    [p.pending.set, mask, ignored, caught]
}

/// `/proc/PID/stat`.
pub(super) fn stat(c: &Caller<'_>, (pid, tid): (Pid, Tid)) -> Result<Vec<u8>, Errno> {
    with(c, pid, |p, facts| {
        let ticks = |ns: u64| ns / TICK_NS;
        let [pending, blocked, ignored, caught] = signals(p, tid);
        let l = &facts.layout;
        let (tty, foreground) = facts.tty.map_or((0, -1), |group| (0x8800, group));
        let head = format!(
            "{tid} ({}) {}",
            String::from_utf8_lossy(p.name_of(tid)),
            letter(c, p, tid)
        );
        let fields: [i128; 49] = [
            p.ppid.into(),
            p.pgid.into(),
            p.sid.into(),
            tty,
            foreground.into(),
            0x40_0000,
            p.usage.minor_faults.into(),
            p.children_usage.minor_faults.into(),
            p.usage.major_faults.into(),
            p.children_usage.major_faults.into(),
            ticks(cpu_ns(p, tid)).into(),
            0,
            ticks(p.children_usage.cpu_ns).into(),
            0,
            (20 + p.nice).into(),
            p.nice.into(),
            p.threads.len().max(1) as i128,
            0,
            ticks(p.started.saturating_sub(facts.boot)).into(),
            (facts.usage.virtual_pages * PAGE).into(),
            facts.usage.resident.into(),
            i128::from(u64::MAX),
            0,
            0,
            l.stack.1.into(),
            0,
            0,
            pending.into(),
            blocked.into(),
            ignored.into(),
            caught.into(),
            0,
            0,
            0,
            p.exit_signal.into(),
            0,
            0,
            0,
            0,
            0,
            0,
            0,
            0,
            l.brk_start.into(),
            l.args.0.into(),
            l.args.1.into(),
            l.envs.0.into(),
            l.envs.1.into(),
            match p.life {
                Life::Zombie(status) => status.into(),
                Life::Running | Life::Stopped(_) => 0,
            },
        ];
        let mut out = head;
        for field in fields {
            let _ = write!(out, " {field}");
        }
        out.push('\n');
        out.into_bytes()
    })
}

/// `/proc/PID/statm`.
pub(super) fn statm(c: &Caller<'_>, pid: Pid) -> Result<Vec<u8>, Errno> {
    with(c, pid, |_, facts| {
        let u = &facts.usage;
        let shared = u.resident.saturating_sub(u.private);
        format!(
            "{} {} {shared} 0 0 {} 0\n",
            u.virtual_pages, u.resident, u.virtual_pages
        )
        .into_bytes()
    })
}

/// `/proc/PID/status`.
pub(super) fn status(c: &Caller<'_>, (pid, tid): (Pid, Tid)) -> Result<Vec<u8>, Errno> {
    with(c, pid, |p, facts| {
        let u = &facts.usage;
        let kib = |pages: u64| pages * 4;
        let long = match letter(c, p, tid) {
            'R' => "R (running)",
            'T' => "T (stopped)",
            'Z' => "Z (zombie)",
            _ => "S (sleeping)",
        };
        let [pending, blocked, ignored, caught] = signals(p, tid);
        let groups: String = p.cred.groups.iter().map(|g| format!("{g} ")).collect();
        let ids = |[real, effective, saved]: [u32; 3]| {
            format!("{real}\t{effective}\t{saved}\t{effective}")
        };
        let capabilities = if p.cred.uid[1] == 0 {
            "000001ffffffffff"
        } else {
            "0000000000000000"
        };
        let mut out = format!(
            "Name:\t{}\nUmask:\t{:04o}\nState:\t{long}\n",
            String::from_utf8_lossy(p.name_of(tid)),
            p.umask
        );
        let _ = write!(
            out,
            "Tgid:\t{0}\nNgid:\t0\nPid:\t{0}\nPPid:\t{1}\nTracerPid:\t0\n",
            p.pid, p.ppid
        );
        let _ = write!(
            out,
            "Uid:\t{}\nGid:\t{}\n",
            ids(p.cred.uid),
            ids(p.cred.gid)
        );
        let _ = write!(
            out,
            "FDSize:\t{}\nGroups:\t{groups}\n",
            p.files.fds.len().next_multiple_of(64).max(64)
        );
        if p.mm.is_some() {
            let _ = write!(
                out,
                "VmPeak:\t{:8} kB\nVmSize:\t{:8} kB\n",
                kib(u.peak_virtual_pages),
                kib(u.virtual_pages)
            );
            let _ = write!(
                out,
                "VmHWM:\t{:8} kB\nVmRSS:\t{:8} kB\n",
                kib(u.peak_resident),
                kib(u.resident)
            );
            let _ = write!(out, "VmPTE:\t{:8} kB\nVmSwap:\t{:8} kB\n", kib(u.tables), 0);
        }
        let _ = write!(
            out,
            "Threads:\t{}\nSigQ:\t{}/1024\n",
            p.threads.len().max(1),
            p.pending.queue.len()
        );
        let _ = write!(
            out,
            "SigPnd:\t{:016x}\nShdPnd:\t{pending:016x}\nSigBlk:\t{blocked:016x}\n",
            0
        );
        let _ = write!(out, "SigIgn:\t{ignored:016x}\nSigCgt:\t{caught:016x}\n");
        for name in ["CapPrm", "CapEff", "CapBnd"] {
            let _ = writeln!(out, "{name}:\t{capabilities}");
        }
        let cpus = c.k.limits.cpus.clamp(1, 64);
        let mask = u64::MAX >> (64 - cpus);
        let _ = write!(
            out,
            "Seccomp:\t0\nCpus_allowed:\t{mask:x}\nCpus_allowed_list:\t0-{}\n",
            cpus - 1
        );
        out.push_str("voluntary_ctxt_switches:\t0\nnonvoluntary_ctxt_switches:\t0\n");
        out.into_bytes()
    })
}

/// `/proc/PID/limits`.
pub(super) fn limits(p: &Process) -> String {
    const NAMES: [(&str, &str); 16] = [
        ("Max cpu time", "seconds"),
        ("Max file size", "bytes"),
        ("Max data size", "bytes"),
        ("Max stack size", "bytes"),
        ("Max core file size", "bytes"),
        ("Max resident set", "bytes"),
        ("Max processes", "processes"),
        ("Max open files", "files"),
        ("Max locked memory", "bytes"),
        ("Max address space", "bytes"),
        ("Max file locks", "locks"),
        ("Max pending signals", "signals"),
        ("Max msgqueue size", "bytes"),
        ("Max nice priority", ""),
        ("Max realtime priority", ""),
        ("Max realtime timeout", "us"),
    ];
    let text = |limit: u64| {
        if limit == u64::MAX {
            "unlimited".to_owned()
        } else {
            limit.to_string()
        }
    };
    let mut out = format!(
        "{:<25} {:<20} {:<20} {:<10}\n",
        "Limit", "Soft Limit", "Hard Limit", "Units"
    );
    for ((name, unit), (soft, hard)) in NAMES.iter().zip(p.rlimits) {
        let _ = writeln!(
            out,
            "{name:<25} {:<20} {:<20} {unit:<10}",
            text(soft),
            text(hard)
        );
    }
    out
}
