//! `vmm boot` with Debian's kernels, where the processor's ring 0 is not emulated: in the rig, which
//! brings them along. A boot takes ten seconds there, so each looks at several things.

use std::path::Path;

use tests::case::{Case, Checked, Launch, PASSED, Verdict};
use tests::context::{Context, shorten};
use tests::terminal::Terminal;

use super::boot::{ONLY_VMM, PANIC, RESET, expect, run};

/// Debian's cloud kernels.
#[derive(Clone, Copy)]
enum Kernel {
    /// Of the stable distribution.
    V6_1,
    /// Its newer one, as Debian has it.
    V6_12,
    /// The same as an ELF file. It is entered by its PVH note, and need not unpack itself.
    Unpacked6_12,
}

impl Kernel {
    /// The kernel's file and its initramfs.
    fn files(self) -> [&'static str; 2] {
        match self {
            Self::V6_1 => ["{guest}/vmlinuz", "{guest}/initrd"],
            Self::V6_12 => ["{guest}/vmlinuz-6.12", "{guest}/initrd-6.12"],
            Self::Unpacked6_12 => ["{guest}/vmlinux-6.12", "{guest}/initrd-6.12"],
        }
    }

    fn options<'a>(self, line: &'a str, options: &[&'a str]) -> Vec<&'a str> {
        let [kernel, initrd] = self.files();
        let mut all = vec!["--kernel", kernel, "--initrd", initrd];
        all.extend(["--memory", "256M", "--timeout", "150", "--cmdline", line]);
        all.extend(options);
        all
    }

    /// Why it cannot be booted here, if it cannot.
    fn missing(self, context: &Context) -> Option<Verdict> {
        let Some(folder) = std::env::var_os("VMM_TEST_GUEST") else {
            return Some(Verdict::Skipped(if context.setup.host.in_rig() {
                "VMM_TEST_GUEST names no kernel".to_owned()
            } else {
                "whole kernels are booted in the rig: /dev/kvm may emulate ring 0".to_owned()
            }));
        };
        let name = self.files()[0].replace("{guest}/", "");
        let there = Path::new(&folder).join(&name).exists();
        (!there).then(|| Verdict::Skipped(format!("no {name}: the rig's Debian has none")))
    }
}

/// Each processor works; then the guest ends its machine in the way of that name, which has this status.
fn cpus(
    context: &Context,
    kernel: Kernel,
    cpus: &'static str,
    (end, status): (&str, i32),
) -> Checked {
    if let Some(skip) = kernel.missing(context) {
        return Ok(skip);
    }
    let line = format!("console=ttyS0 panic=-1 quiet do=smp end={end}");
    let options = kernel.options(&line, &["--cpus", cpus]);
    let output = run(context, &options, status, "user space: ")?;
    let text = output.out();
    for wanted in [format!(" {cpus} processors"), line.clone()] {
        if !text.contains(&wanted) {
            return Err(format!("no {wanted:?} in\n{}", shorten(&text, 20)));
        }
    }
    let count: usize = cpus.parse().map_err(|_| "a number")?;
    match text.matches(": 2000").count() {
        n if n == count => Ok(PASSED),
        n => Err(format!("{n} workers of {count}:\n{}", shorten(&text, 20))),
    }
}

/// A shell in the initramfs, told what to do through a pipe: on each of two processors; a disk is written, flushed
/// and partly zeroed, another only read, and the host looks at the files.
fn disks(context: &Context, kernel: Kernel) -> Checked {
    if let Some(skip) = kernel.missing(context) {
        return Ok(skip);
    }
    const BYTES: usize = 4 << 20;
    let source: Vec<u8> = (0..BYTES as u32)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect();
    let target = context.write("target", vec![0xee; 2 * BYTES], 0o644)?;
    let copied_from = context.write("source", &source, 0o644)?;
    let input = "echo $((6 * 7)) of $(uname -s); head -c 100000 /dev/zero | wc -c; \
        for i in 1 2; do taskset $i sh -c 'echo \"on $(taskset -p $$)\"'; done; \
        dd if=/dev/vdb of=/dev/vda bs=4096 seek=1 && sync && \
        blkdiscard -z -o 0 -l 4096 /dev/vda 2> /dev/null || dd if=/dev/zero of=/dev/vda bs=4096 count=1; \
        (echo no > /dev/vdb) 2> /dev/null || echo it is read-only; \
        head -c 64 /dev/hwrng | wc -c; sync; poweroff -f\n"
        .replace("        ", "");
    let launch = Launch::default().stdin(input.replace("\\\n", ""));
    let disks = [
        "--disk",
        "{work}/target",
        "--disk",
        "{work}/source:ro",
        "--cpus",
        "2",
    ];
    let output = context.boot(
        &kernel.options("console=ttyS0 panic=-1 quiet", &disks),
        &launch,
    )?;
    expect(&output, 0, "42 of Linux")?;
    expect(&output, 0, "100000")?;
    expect(&output, 0, "affinity mask: 1\r\n")?;
    expect(&output, 0, "affinity mask: 2\r\n")?;
    expect(&output, 0, "Power down")?;
    expect(&output, 0, "it is read-only")?;
    expect(&output, 0, "64")?;
    let read = |path: &std::path::Path| std::fs::read(path).map_err(|e| e.to_string());
    let written = read(&target)?;
    let (first, rest) = written.split_at(4096);
    let (copied, untouched) = rest.split_at(BYTES);
    if first.iter().any(|&b| b != 0) || copied != source || untouched.iter().any(|&b| b != 0xee) {
        return Err("the disk does not have what was written".to_owned());
    }
    if read(&copied_from)? != source {
        return Err("a read-only disk has changed".to_owned());
    }
    Ok(PASSED)
}

/// When a guest's `fsync` returns, the host's file has what was written before it, byte for byte; what
/// was not flushed comes with the next one. On a terminal, as below.
fn flushes(context: &Context, kernel: Kernel) -> Checked {
    if let Some(skip) = kernel.missing(context) {
        return Ok(skip);
    }
    const BLOCK: usize = 4096;
    let disk = context.write("disk", vec![0xee; 64 * BLOCK], 0o644)?;
    let mut t = on_a_terminal(context, kernel, &["--disk", "{work}/disk"])?;
    // Nothing is written but what somebody asks for.
    t.until(
        "echo 0 > /proc/sys/vm/dirty_writeback_centisecs && echo it\\ is so\r",
        "it is so",
    )?;
    t.send("put() { yes $1 | head -c 12288 > /x; dd if=/x of=/dev/vda bs=4096 seek=$2 conv=$3 2> /dev/null; }\r")?;
    let content = || std::fs::read(&disk).map_err(|e| e.to_string());
    let pattern = |letter: u8| -> Vec<u8> { [letter, b'\n'].repeat(3 * BLOCK / 2) };
    let old = vec![0xee; 3 * BLOCK];
    for (round, letter) in (0..).zip(*b"abc") {
        let name = char::from(letter);
        let (first, second) = (round * 8, round * 8 + 4);
        t.send(&format!(
            "put {name} {first} notrunc,fsync; echo flushed\\ {name}\r"
        ))?;
        t.expect(&format!("flushed {name}"))?;
        let now = content()?;
        if now[first * BLOCK..][..3 * BLOCK] != pattern(letter) {
            return Err(format!("{name} was flushed, and is not in the file"));
        }
        if now[second * BLOCK..][..3 * BLOCK] != old {
            return Err(format!("the file has what {name}'s guest has not written"));
        }
        t.send(&format!(
            "put {name} {second} notrunc; sync; echo synced\\ {name}\r"
        ))?;
        t.expect(&format!("synced {name}"))?;
        if content()?[second * BLOCK..][..3 * BLOCK] != pattern(letter) {
            return Err(format!("{name} was synced, and is not in the file"));
        }
    }
    ends_on_a_terminal(context, t)?;
    let now = content()?;
    if now.len() != 64 * BLOCK || now[24 * BLOCK..].iter().any(|&b| b != 0xee) {
        return Err("something else was written".to_owned());
    }
    Ok(PASSED)
}

/// The virtio console on a terminal: the shell there knows its size, and hears of a new one. The serial
/// port's output goes to a file meanwhile.
fn virtio_console(context: &Context, kernel: Kernel) -> Checked {
    if let Some(skip) = kernel.missing(context) {
        return Ok(skip);
    }
    let t = on_a_terminal(context, kernel, &[])?;
    ends_on_a_terminal(context, t)?;
    Ok(PASSED)
}

/// A guest with its shell there, which has been resized.
fn on_a_terminal(context: &Context, kernel: Kernel, options: &[&str]) -> Result<Terminal, String> {
    let line = "console=ttyS0 console=hvc0 panic=-1 quiet";
    let mut all = vec!["--console", "virtio:stdio", "--console", "{work}/log"];
    all.extend(options);
    let words = context.boot_words(&kernel.options(line, &all));
    let mut t = Terminal::start(context, &words)?;
    t.expect("user space: ")?;
    t.until("stty size\r", "30 100")?;
    // Not the shell's own line editor, which catches the signal itself.
    t.send(
        "sh -c 'trap \"stty size; exit\" WINCH; echo wait\"\"ing; while :; do sleep 1; done'\r",
    )?;
    t.expect("waiting")?;
    t.resize(41, 133)?;
    t.expect("41 133")?;
    Ok(t)
}

fn ends_on_a_terminal(context: &Context, mut t: Terminal) -> Result<(), String> {
    t.send("tty; poweroff -f\r")?;
    t.expect("/dev/hvc0")?;
    t.ends_with(0)?;
    let log = std::fs::read_to_string(context.work().join("log")).map_err(|e| e.to_string())?;
    if log.contains("Power down") {
        return Ok(());
    }
    Err(format!("the serial port's file:\n{}", shorten(&log, 10)))
}

/// The virtio console in pipes: a shell takes what comes in, more than the device keeps.
fn virtio_console_in_pipes(context: &Context, kernel: Kernel) -> Checked {
    if let Some(skip) = kernel.missing(context) {
        return Ok(skip);
    }
    let mut input = "stty -echo\n".to_owned();
    for i in 0..300 {
        input += &format!("echo line {i} of many\n");
    }
    input += "head -c 100000 /dev/zero | tr '\\0' x | fold -w 100 | grep -c x; poweroff -f\n";
    let launch = Launch::default().stdin(input);
    let options = kernel.options(
        "console=hvc0 panic=-1 quiet",
        &["--console", "virtio:stdio"],
    );
    let output = context.boot(&options, &launch)?;
    expect(&output, 0, "line 299 of many")?;
    expect(&output, 0, "1000")?;
    match output.out().matches(" of many\r\n").count() {
        300.. => Ok(PASSED),
        n => Err(format!("{n} lines of 300")),
    }
}

pub(crate) fn cases() -> Vec<Case> {
    use Kernel::{Unpacked6_12, V6_1, V6_12};
    const RESETS: (&str, i32) = ("reset", RESET);
    const PANICS: (&str, i32) = ("panic", PANIC);
    let cases = [
        Case::function("boot/linux/1_cpu", |c| cpus(c, V6_1, "1", RESETS)),
        Case::function("boot/linux/4_cpus", |c| cpus(c, V6_1, "4", PANICS)),
        Case::function("boot/linux/disks", |c| disks(c, V6_1)),
        Case::function("boot/linux/flushes", |c| flushes(c, V6_1)),
        Case::function("boot/linux/virtio_console_in_pipes", |c| {
            virtio_console_in_pipes(c, V6_1)
        }),
        Case::function("boot/linux_6.12/1_cpu", |c| cpus(c, V6_12, "1", RESETS)),
        Case::function("boot/linux_6.12/4_cpus", |c| {
            cpus(c, Unpacked6_12, "4", PANICS)
        }),
        Case::function("boot/linux_6.12/disks", |c| disks(c, Unpacked6_12)),
        Case::function("boot/linux_6.12/virtio_console", |c| {
            virtio_console(c, Unpacked6_12)
        }),
    ];
    let cases = cases.map(|case| case.seconds(120));
    cases.map(|case| case.not_native(ONLY_VMM)).into()
}
