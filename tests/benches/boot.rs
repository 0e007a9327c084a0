//! The benchmark of kernel guests: Debian's cloud kernel to its first line of user space, under `vmm boot` and under QEMU's
//! `microvm` on the same KVM, times beside exits.
//!
//! `cargo bench -p tests --bench boot` runs it in the emulated machine (`tests/rig`), which has the kernels, an initramfs, and
//! QEMU as this machine has it. Where KVM can boot a kernel, `VMM_TEST_GUEST=FOLDER` runs it right there, as root: the folder has
//! a `vmlinuz` and an `initrd` whose first process prints `user space: `.
//!
//! Both VMMs are looked at from outside, and alike: the clock runs from the start of the process to the line on its standard
//! output, and the counters are KVM's own for that process (`/sys/kernel/debug/kvm`), read while the guest then sleeps.
//! Environment: `VMM_BIN`, `VMM_BENCH_ROUNDS` (default 5), `VMM_BENCH_HOST` (`npt`, the default, or `shadow`).

mod shared;

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use shared::FOLDER;

const LINE: &str = "console=ttyS0 quiet panic=-1 do=sleep";
const FIRST_LINE: &str = "user space: ";
const COUNTERS: &str = "/sys/kernel/debug/kvm";
/// For one boot.
const PATIENCE: Duration = Duration::from_secs(120);
/// What QEMU needs besides its program, in `/usr/share`, where it is there.
const FIRMWARE: [&str; 5] = [
    "qemu/bios-microvm.bin",
    "qemu/qboot.rom",
    "qemu/linuxboot_dma.bin",
    "qemu/pvh.bin",
    "seabios/bios-microvm.bin",
];

/// What is printed of a run: a heading, and the name of KVM's counter.
const COLUMNS: [(&str, &str); 6] = [
    ("exits", "exits"),
    // A virtual processor's FPU state is loaded once for each KVM_RUN.
    ("to VMM", "fpu_reload"),
    ("port", "io_exits"),
    ("MMIO", "mmio_exits"),
    ("faults", "pf_taken"),
    ("interrupts", "irq_exits"),
];

/// One way to boot.
#[derive(Clone, Copy)]
enum Monitor {
    Vmm,
    /// With what `-M` says after `microvm`.
    Qemu(&'static str),
}

const MONITORS: [Monitor; 4] = [
    Monitor::Vmm,
    Monitor::Qemu(""),
    // What its manual says for the shortest boot.
    Monitor::Qemu(",x-option-roms=off,pit=off,pic=off,rtc=off"),
    // With the clock that Debian's kernels look for 20,000 times otherwise.
    Monitor::Qemu(",x-option-roms=off,pit=off,pic=off,rtc=on"),
];

/// A kernel and its initramfs.
struct Guest {
    name: &'static str,
    kernel: PathBuf,
    initrd: PathBuf,
}

/// What came of one boot.
struct Boot {
    time: Duration,
    counts: [u64; COLUMNS.len()],
}

impl Monitor {
    fn name(self) -> String {
        match self {
            Self::Vmm => "vmm boot".to_owned(),
            Self::Qemu(options) => format!("microvm{options}"),
        }
    }

    /// One processor, 256 MiB, a serial port, a source of random bytes.
    fn command(self, vmm: &Path, guest: &Guest) -> Command {
        let files = |command: &mut Command, names: [&str; 2]| {
            command.arg(names[0]).arg(&guest.kernel);
            command.arg(names[1]).arg(&guest.initrd);
        };
        match self {
            Self::Vmm => {
                let mut command = Command::new(vmm);
                command.args(["boot", "--memory", "256M", "--cmdline", LINE]);
                files(&mut command, ["--kernel", "--initrd"]);
                command
            }
            Self::Qemu(options) => {
                let mut command = Command::new("qemu-system-x86_64");
                command.args(["-M", &format!("microvm{options}")]);
                command.args(["-enable-kvm", "-cpu", "host", "-smp", "1", "-m", "256"]);
                command.args(["-nodefaults", "-no-user-config", "-no-reboot"]);
                command.args(["-display", "none", "-serial", "stdio", "-append", LINE]);
                command.args(["-device", "virtio-rng-device"]);
                files(&mut command, ["-kernel", "-initrd"]);
                command
            }
        }
    }

    fn boot(self, vmm: &Path, guest: &Guest) -> Result<Boot, String> {
        let mut command = self.command(vmm, guest);
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        let errors = tempfile::NamedTempFile::new().map_err(|e| e.to_string())?;
        command.stderr(errors.reopen().map_err(|e| e.to_string())?);
        let start = Instant::now();
        let child = command.spawn();
        let mut child = child.map_err(|e| format!("cannot start {}: {e}", self.name()))?;
        let booted = until_first_line(&mut child).map(|()| start.elapsed());
        let counts = booted.as_ref().ok().map(|_| counters(child.id()));
        let _ = child.kill();
        let _ = child.wait();
        let said = fs::read_to_string(errors.path()).unwrap_or_default();
        let time = booted.map_err(|why| format!("{}: {why}\n{said}", self.name()))?;
        let counts = counts.unwrap_or_else(|| Err("not booted".to_owned()))?;
        Ok(Boot { time, counts })
    }
}

/// Reads what the guest prints until its first line of user space is whole.
fn until_first_line(child: &mut Child) -> Result<(), String> {
    let mut output = child.stdout.take().expect("it is a pipe");
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        let mut part = [0; 4096];
        while let Ok(count @ 1..) = output.read(&mut part) {
            if sender.send(part[..count].to_vec()).is_err() {
                return;
            }
        }
    });
    let deadline = Instant::now() + PATIENCE;
    let mut text = String::new();
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let part = receiver.recv_timeout(left);
        let part = part.map_err(|_| format!("no line of user space after\n{text}"))?;
        text += &String::from_utf8_lossy(&part);
        let line = text.split_once(FIRST_LINE);
        if line.is_some_and(|(_, rest)| rest.contains('\n')) {
            return Ok(());
        }
    }
}

/// KVM's counters for the machine of a process.
fn counters(pid: u32) -> Result<[u64; COLUMNS.len()], String> {
    let prefix = format!("{pid}-");
    let machines = fs::read_dir(COUNTERS).map_err(|e| format!("{COUNTERS}: {e}"))?;
    let machine = machines
        .flatten()
        .find(|entry| entry.file_name().to_string_lossy().starts_with(&prefix))
        .ok_or("KVM counts nothing for this process")?;
    let mut counts = [0; COLUMNS.len()];
    for (count, (_, name)) in counts.iter_mut().zip(COLUMNS) {
        let path = machine.path().join(name);
        let text = fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        *count = text.trim().parse().map_err(|_| format!("{name}: {text}"))?;
    }
    Ok(counts)
}

fn median<T: Ord + Copy>(mut values: Vec<T>) -> T {
    values.sort();
    values[values.len() / 2]
}

fn row(monitor: Monitor, boots: &[Boot]) {
    let milliseconds = |boot: &Boot| boot.time.as_millis();
    let least = boots.iter().map(milliseconds).min().unwrap_or(0);
    let middle = median(boots.iter().map(milliseconds).collect());
    print!("{:<52} {least:>8} {middle:>8}", monitor.name());
    for (column, (heading, _)) in COLUMNS.iter().enumerate() {
        let width = heading.len().max(7);
        let count = median(boots.iter().map(|boot| boot.counts[column]).collect());
        print!(" {count:>width$}");
    }
    println!();
}

/// One kernel under each monitor, in turns, so that what disturbs the machine disturbs all of them.
fn compare(vmm: &Path, guest: &Guest, rounds: usize) -> Result<(), String> {
    let mut boots: [Vec<Boot>; MONITORS.len()] = Default::default();
    for _ in 0..rounds {
        for (monitor, boots) in MONITORS.into_iter().zip(&mut boots) {
            boots.push(monitor.boot(vmm, guest)?);
        }
    }
    print!("{:<52} {:>8} {:>8}", guest.name, "min ms", "ms");
    for (heading, _) in COLUMNS {
        print!(" {heading:>7}");
    }
    println!();
    for (monitor, boots) in MONITORS.into_iter().zip(&boots) {
        row(monitor, boots);
    }
    Ok(())
}

fn here(folder: &Path, vmm: &Path) -> Result<(), String> {
    if !Path::new(COUNTERS).exists() {
        let mounted = Command::new("mount")
            .args(["-t", "debugfs", "debug", "/sys/kernel/debug"])
            .status();
        if !mounted.is_ok_and(|status| status.success()) || !Path::new(COUNTERS).exists() {
            return Err(format!("no {COUNTERS}: only root sees KVM's counters"));
        }
    }
    let rounds = std::env::var("VMM_BENCH_ROUNDS").map_or(Ok(5), |n| n.parse());
    let rounds = rounds.map_err(|_| "VMM_BENCH_ROUNDS: not a number")?.max(1);
    println!(
        "Debian's cloud kernel to its first line of user space; medians of {rounds} boots each"
    );
    for (name, suffix) in [("vmlinuz", ""), ("vmlinuz-6.12", "-6.12")] {
        let file = |base: &str| folder.join(format!("{base}{suffix}"));
        let (kernel, initrd) = (file("vmlinuz"), file("initrd"));
        if kernel.exists() {
            let guest = Guest {
                name,
                kernel,
                initrd,
            };
            compare(vmm, &guest, rounds)?;
        }
    }
    Ok(())
}

/// This program again, in the emulated machine.
fn in_rig(vmm: &Path) -> Result<(), String> {
    let this = std::env::current_exe().map_err(|e| e.to_string())?;
    let host = std::env::var("VMM_BENCH_HOST");
    let mut command = shared::rig(host.as_deref().unwrap_or("npt"), vmm)?;
    let guest = format!("{FOLDER}/guest");
    command.args(["--guest", &guest]);
    command.args(["--env", &format!("VMM_TEST_GUEST={guest}")]);
    if let Ok(rounds) = std::env::var("VMM_BENCH_ROUNDS") {
        command.args(["--env", &format!("VMM_BENCH_ROUNDS={rounds}")]);
    }
    command.args(["--add", "/usr/bin/qemu-system-x86_64"]);
    for file in FIRMWARE.map(|name| format!("/usr/share/{name}")) {
        if Path::new(&file).exists() {
            command.args(["--add", &file]);
        }
    }
    shared::run(command.arg("--").arg(this))
}

fn bench() -> Result<(), String> {
    let vmm = shared::vmm()?;
    match std::env::var_os("VMM_TEST_GUEST") {
        Some(folder) => here(Path::new(&folder), &vmm),
        None => in_rig(&vmm),
    }
}

fn main() -> ExitCode {
    shared::end(bench())
}
