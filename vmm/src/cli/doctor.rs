//! `vmm doctor`: can this host run guests, and if not, what to do.

use std::fmt::Write as _;
use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::process::ExitCode;

use kvm_ioctls::Cap;
use serde::Serialize;

use super::{STATUS_FAILURE, Size, complain};
use crate::hv::kvm::vm::{self, VmError};
use crate::hv::probe::{self, HostProfile, Paging};
use crate::hv::{FpuLoader, IretWorks, SyscallRing};

/// Tell whether this host can run guests, and if not, what to do
#[derive(Debug, clap::Args)]
pub(super) struct DoctorArgs {
    /// Print one JSON object instead of text
    #[arg(long)]
    json: bool,
}

/// What was found.
#[derive(Debug, Serialize)]
struct Report {
    /// Guests can run.
    usable: bool,
    /// What is wrong, with its causes.
    problem: Option<String>,
    /// What a person can do about it.
    advice: Vec<String>,
    host: Host,
    kvm: Option<Offer>,
    probe: Option<HostProfile>,
    /// How long the probe took, in microseconds.
    probe_us: Option<u128>,
}

#[derive(Debug, Serialize)]
struct Host {
    kernel: String,
    /// `svm` or `vmx`, if the processor shows it.
    virtualization: Option<&'static str>,
    under_hypervisor: bool,
    kvm_modules: Vec<String>,
    cpus: usize,
    memory_bytes: u64,
    memory_available_bytes: u64,
}

/// What KVM says it offers.
#[derive(Debug, Serialize)]
struct Offer {
    api_version: i32,
    max_vcpus: usize,
    memory_slots: usize,
    sync_regs: bool,
    read_only_memory: bool,
    immediate_exit: bool,
    xsave_bytes: i32,
}

fn meminfo(field: &str) -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text
        .lines()
        .find_map(|l| l.strip_prefix(field))
        .unwrap_or_default();
    let kib = line
        .trim_start_matches(':')
        .split_whitespace()
        .next()
        .and_then(|n| n.parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}

fn host() -> Host {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flags = cpuinfo
        .lines()
        .find(|l| l.starts_with("flags"))
        .unwrap_or_default();
    let has = |flag: &str| flags.split_whitespace().any(|f| f == flag);
    let modules = fs::read_to_string("/proc/modules").unwrap_or_default();
    Host {
        kernel: rustix::system::uname()
            .release()
            .to_string_lossy()
            .into_owned(),
        virtualization: if has("svm") {
            Some("svm")
        } else if has("vmx") {
            Some("vmx")
        } else {
            None
        },
        under_hypervisor: has("hypervisor"),
        kvm_modules: modules
            .lines()
            .filter_map(|l| l.split_whitespace().next())
            .filter(|m| m.starts_with("kvm"))
            .map(str::to_owned)
            .collect(),
        cpus: std::thread::available_parallelism().map_or(1, usize::from),
        memory_bytes: meminfo("MemTotal"),
        memory_available_bytes: meminfo("MemAvailable"),
    }
}

/// What to do when `/dev/kvm` cannot be opened.
fn advice(error: &io::Error, host: &Host) -> Vec<String> {
    let mut advice = Vec::new();
    match error.kind() {
        io::ErrorKind::PermissionDenied => {
            let found = fs::metadata("/dev/kvm");
            let (mode, gid) = found.map_or((0o660, 1), |meta| (meta.mode(), meta.gid()));
            advice.push(permission(mode, gid).into());
        }
        io::ErrorKind::NotFound => missing_device(host, &mut advice),
        _ => match fs::metadata("/dev/kvm") {
            Ok(meta) if !meta.file_type().is_char_device() => {
                advice.push("/dev/kvm is not a device: remove it and load the kvm module".into());
            }
            _ => missing_device(host, &mut advice),
        },
    }
    advice.push("without KVM, run tests/vmm of the source tree instead: the same in an emulated machine, slower".into());
    advice
}

/// How somebody may come to use a `/dev/kvm` of that mode and group.
fn permission(mode: u32, gid: u32) -> &'static str {
    if mode & 0o060 == 0o060 && gid != 0 {
        "join the group that owns it: sudo usermod -aG \"$(stat -c %G /dev/kvm)\" $USER, then log in again"
    } else {
        "only root may use it: sudo groupadd -f kvm; sudo chgrp kvm /dev/kvm; sudo chmod 660 /dev/kvm; \
         sudo usermod -aG kvm $USER, then log in again"
    }
}

fn missing_device(host: &Host, advice: &mut Vec<String>) {
    match host.virtualization {
        Some("svm") => advice.push("load KVM: sudo modprobe kvm_amd".into()),
        Some(_) => advice.push("load KVM: sudo modprobe kvm_intel".into()),
        None if host.under_hypervisor => advice.push(
            "this is a virtual machine without nested virtualisation: switch it on for the machine in \
             its hypervisor (kvm_amd or kvm_intel nested=1 and a host CPU model; an instance type with \
             nested virtualisation in a cloud)"
                .into(),
        ),
        None => advice.push("switch virtualisation (SVM or VT-x) on in the firmware set-up".into()),
    }
    advice.push("in a container, pass the device in: --device /dev/kvm".into());
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

fn examine() -> Report {
    let host = host();
    let mut report = Report {
        usable: false,
        problem: None,
        advice: Vec::new(),
        host,
        kvm: None,
        probe: None,
        probe_us: None,
    };
    let kvm = match vm::open() {
        Ok(kvm) => kvm,
        Err(error) => {
            report.problem = Some(chain(&error));
            if let VmError::Open(cause) = &error {
                report.advice = advice(cause, &report.host);
            }
            return report;
        }
    };
    report.kvm = Some(Offer {
        api_version: kvm.get_api_version(),
        max_vcpus: kvm.get_max_vcpus(),
        memory_slots: kvm.get_nr_memslots(),
        sync_regs: kvm.check_extension(Cap::SyncRegs),
        read_only_memory: kvm.check_extension(Cap::ReadonlyMem),
        immediate_exit: kvm.check_extension(Cap::ImmediateExit),
        xsave_bytes: kvm.check_extension_int(Cap::Xsave2),
    });
    let start = std::time::Instant::now();
    match probe::probe(&kvm) {
        Ok(profile) => {
            report.usable = true;
            report.probe = Some(profile);
            report.probe_us = Some(start.elapsed().as_micros());
        }
        Err(error) => report.problem = Some(chain(&error)),
    }
    report
}

/// Adds a line to a `String`, which cannot fail.
macro_rules! line {
    ($out:expr, $($format:tt)*) => {{
        let _ = writeln!($out, $($format)*);
    }};
}

fn yes(flag: bool) -> &'static str {
    if flag { "yes" } else { "no" }
}

fn print_probe(out: &mut String, p: &HostProfile, us: u128) {
    line!(
        out,
        "probe          ran a guest in {:.1} ms",
        us as f64 / 1000.0
    );
    line!(
        out,
        "  page tables  {}",
        match p.paging {
            Paging::Hardware =>
                "walked by the processor (TDP): a flush of the TLB makes an edit visible",
            Paging::Shadow =>
                "shadowed by KVM: the monitor touches edited tables so that KVM looks again",
        }
    );
    line!(
        out,
        "  SYSCALL      {}",
        match p.syscall {
            SyscallRing::Zero => "enters ring 0: the stub is the supervisor's, SMEP on",
            SyscallRing::Three => "stays in ring 3: the stub is a user page with one port open",
        }
    );
    line!(
        out,
        "  IRET         {}",
        match p.iret {
            IretWorks::Yes => "works in the monitor: a flush costs no exit",
            IretWorks::No => "does not work in the monitor: a flush costs one exit",
        }
    );
    line!(
        out,
        "  FPU state    {}",
        match p.fpu {
            FpuLoader::Monitor =>
                "loaded by the monitor: a switch of threads takes no ioctl for it",
            FpuLoader::Kvm => "loaded by KVM: one ioctl",
        }
    );
    line!(
        out,
        "  TSC          is the host's: {} (vDSO clock without exits)",
        yes(p.tsc_is_hosts)
    );
    line!(
        out,
        "  TSC_AUX      settable: {} (vDSO getcpu)",
        yes(p.tsc_aux_works)
    );
    line!(out, "  XCR0         {:#x}", p.xcr0);
}

fn text(report: &Report) -> String {
    let mut shown = String::new();
    let out = &mut shown;
    let h = &report.host;
    line!(out, "kernel         {}", h.kernel);
    line!(
        out,
        "processor      {} CPUs, virtualisation {}{}",
        h.cpus,
        h.virtualization.unwrap_or("not shown"),
        if h.under_hypervisor {
            ", inside a virtual machine"
        } else {
            ""
        }
    );
    line!(
        out,
        "memory         {}, {} available",
        Size(h.memory_bytes.max(1)),
        Size(h.memory_available_bytes.max(1))
    );
    if let Some(k) = &report.kvm {
        line!(out, "/dev/kvm       usable, API version {}", k.api_version);
        line!(
            out,
            "  limits       {} virtual CPUs and {} memory slots a machine",
            k.max_vcpus,
            k.memory_slots
        );
        line!(
            out,
            "  offers       sync regs: {}, read-only memory: {}, immediate exit: {}, XSAVE area: {} bytes",
            yes(k.sync_regs),
            yes(k.read_only_memory),
            yes(k.immediate_exit),
            k.xsave_bytes
        );
    }
    if let (Some(p), Some(us)) = (&report.probe, report.probe_us) {
        print_probe(out, p, us);
    }
    match &report.problem {
        None => line!(out, "verdict        guests can run here"),
        Some(problem) => {
            line!(out, "verdict        guests cannot run here: {problem}");
            for line in &report.advice {
                line!(out, "  try          {line}");
            }
        }
    }
    shown
}

/// Writes to standard output; a reader that has gone away has seen enough.
fn show(text: &str) {
    let _ = writeln!(io::stdout(), "{}", text.trim_end());
}

pub(super) fn main(args: &DoctorArgs) -> ExitCode {
    let report = examine();
    if args.json {
        match serde_json::to_string_pretty(&report) {
            Ok(text) => show(&text),
            Err(error) => complain(&error),
        }
    } else {
        show(&text(&report));
    }
    if report.usable {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(STATUS_FAILURE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn group_is_joined_only_if_it_may_use_the_device_and_is_not_roots() {
        assert!(permission(0o20660, 104).starts_with("join the group"));
        for (mode, gid) in [(0o20600, 104), (0o20600, 0), (0o20660, 0), (0o20640, 104)] {
            assert!(
                permission(mode, gid).contains("chgrp kvm"),
                "{mode:o} {gid}"
            );
        }
    }
}
