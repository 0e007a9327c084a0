//! `vmm boot`: our own flat kernel (`guest/kernels/flat.c`) on every host, and Debian's kernel where the
//! processor's ring 0 is not emulated: in the rig, which brings it along.

use std::time::Duration;

use rustix::process::Signal;
use tests::case::{Case, Checked, Launch, PASSED, Verdict};
use tests::context::{Context, shorten};
use tests::process::Output;
use tests::terminal::Terminal;

const ONLY_VMM: &str = "it is about vmm boot";
/// What vmm gives for each way to end.
const RESET: i32 = 120;
const PANIC: i32 = 121;
const TRIPLE_FAULT: i32 = 122;
const TIMEOUT: i32 = 124;

fn flat<'a>(line: &'a str, options: &[&'a str]) -> Vec<&'a str> {
    let mut all = vec!["--kernel", "{programs}/kernels/flat", "--memory", "16M"];
    all.extend(["--cmdline", line]);
    all.extend(options);
    all
}

fn linux<'a>(line: &'a str, options: &[&'a str]) -> Vec<&'a str> {
    let mut all = vec!["--kernel", "{guest}/vmlinuz", "--initrd", "{guest}/initrd"];
    all.extend(["--memory", "256M", "--timeout", "150", "--cmdline", line]);
    all.extend(options);
    all
}

/// Why a whole Linux cannot be booted here, if it cannot.
fn no_linux(context: &Context) -> Option<Verdict> {
    if std::env::var_os("VMM_TEST_GUEST").is_some() {
        return None;
    }
    Some(Verdict::Skipped(if context.setup.host.in_rig() {
        "VMM_TEST_GUEST names no kernel".to_owned()
    } else {
        "whole kernels are booted in the rig: /dev/kvm may emulate ring 0".to_owned()
    }))
}

fn expect(output: &Output, status: i32, text: &str) -> Result<(), String> {
    if output.status == status && output.out().contains(text) {
        return Ok(());
    }
    Err(format!(
        "status {}, want {status} and {text:?}; stdout:\n{}\nstderr:\n{}",
        output.status,
        shorten(&output.out(), 25),
        shorten(&output.err(), 10)
    ))
}

fn run(context: &Context, options: &[&str], status: i32, text: &str) -> Result<Output, String> {
    let output = context.boot(options, &Launch::default())?;
    expect(&output, status, text)?;
    Ok(output)
}

/// Each way a guest can end its machine has its status.
fn ways_to_end(context: &Context) -> Checked {
    for (line, status) in [
        ("hello", 0),
        ("reset", RESET),
        ("keyboard", RESET),
        ("panic", PANIC),
        ("triple", TRIPLE_FAULT),
    ] {
        run(context, &flat(line, &[]), status, "").map_err(|why| format!("{line}: {why}"))?;
    }
    Ok(PASSED)
}

/// A processor that never stops, and one that waits for ever, end when the time is up.
fn never_ends(context: &Context) -> Checked {
    for line in ["spin", "halt", "flood"] {
        let launch = Launch::default();
        let output = context.boot(&flat(line, &["--timeout", "1", "--cpus", "2"]), &launch)?;
        expect(&output, TIMEOUT, "").map_err(|why| format!("{line}: {why}"))?;
        if output.elapsed > Duration::from_secs(30) {
            return Err(format!("{line}: took {:?}", output.elapsed));
        }
    }
    Ok(PASSED)
}

fn command_line(context: &Context) -> Checked {
    run(
        context,
        &flat("line a  b=\"c\"", &[]),
        0,
        "line a  b=\"c\"\ndone\n",
    )?;
    Ok(PASSED)
}

/// More input than the port holds, through a pipe; and what comes back.
fn pipe(context: &Context) -> Checked {
    let mut input: Vec<u8> = (0..20_000_u32).map(|i| b'a' + (i % 10) as u8).collect();
    let expected = String::from_utf8_lossy(&input).into_owned() + "done\n";
    input.push(b'q');
    let output = context.boot(&flat("echo", &[]), &Launch::default().stdin(input))?;
    if output.status != 0 || output.out() != expected {
        let got = output.stdout.len();
        return Err(format!("status {}, {got} bytes came back", output.status));
    }
    Ok(PASSED)
}

/// The console in a file; standard output stays empty.
fn console_in_a_file(context: &Context) -> Checked {
    let output = run(context, &flat("hello", &["--console", "{work}/log"]), 0, "")?;
    let log = std::fs::read_to_string(context.work().join("log")).map_err(|e| e.to_string())?;
    if log != "hello\ndone\n" || !output.stdout.is_empty() {
        return Err(format!(
            "the file has {log:?}, standard output {:?}",
            output.out()
        ));
    }
    Ok(PASSED)
}

fn hostile(context: &Context) -> Checked {
    for line in ["ports", "addresses", "msrs"] {
        let options = flat(line, &["--timeout", "60", "--stats"]);
        run(context, &options, 0, "done\n").map_err(|why| format!("{line}: {why}"))?;
    }
    Ok(PASSED)
}

/// A driver that fills a disk's and a random source's queue with anything, while their threads look. The
/// devices write where it told them, which may be its own code: any end but one of ours is fine.
fn hostile_queues(context: &Context) -> Checked {
    let disk = context.write("disk", vec![0; 64 * 512], 0o644)?;
    let options = flat("queues", &["--timeout", "60", "--disk", "{work}/disk"]);
    let output = context.boot(&options, &Launch::default())?;
    if !matches!(output.status, 0 | 120..=124) {
        return expect(&output, 0, "").map(|()| PASSED);
    }
    if output.status == 0 {
        expect(&output, 0, "some were answered")?;
    }
    let length = std::fs::metadata(disk).map_err(|e| e.to_string())?.len();
    if length != 64 * 512 {
        return Err(format!("the disk has {length} bytes now"));
    }
    Ok(PASSED)
}

/// A kernel with a PVH note is entered that way.
fn pvh(context: &Context) -> Checked {
    let mut options = flat("by PVH", &[]);
    options[1] = "{programs}/kernels/pvh";
    run(context, &options, 0, "by PVH")?;
    Ok(PASSED)
}

/// What a person's `kill` does.
fn signal(context: &Context) -> Checked {
    for (signal, status) in [(Signal::TERM, 143), (Signal::INT, 130), (Signal::HUP, 129)] {
        let launch = Launch::default().signal(Duration::from_millis(500), signal);
        let output = context.boot(&flat("spin", &[]), &launch)?;
        expect(&output, status, "").map_err(|why| format!("{signal:?}: {why}"))?;
    }
    Ok(PASSED)
}

/// On a terminal: keys arrive one by one, the escape sequence ends it, and the terminal is as before.
fn terminal(context: &Context) -> Checked {
    let words = context.boot_words(&flat("echo", &[]));
    let quoted: Vec<String> = words.iter().map(|w| format!("'{w}'")).collect();
    let line = format!(
        "stty -a > before; {}; echo status=$?; stty -a > after; cmp before after && echo restored",
        quoted.join(" ")
    );
    let shell = ["/bin/sh", "-c", &line].map(str::to_owned);
    let mut t = Terminal::start(context, &shell)?;
    t.expect("Ctrl-A x")?;
    // Ctrl-C is a key like others.
    t.until("\x03z", "\x03z")?;
    t.send("\x01\x01y")?;
    t.expect("\x01y")?;
    t.send("\x01x")?;
    t.expect("status=130")?;
    t.expect("restored")?;
    t.ends_with(0)?;
    Ok(PASSED)
}

/// The terminal is restored when a signal ends the VMM, even one of its own mistakes.
fn terminal_after_a_crash(context: &Context) -> Checked {
    for (signal, status) in [("TERM", 143), ("SEGV", 139)] {
        let words = context.boot_words(&flat("echo", &["--console", "stdio"]));
        let quoted: Vec<String> = words.iter().map(|w| format!("'{w}'")).collect();
        let line = format!(
            "ulimit -c 0; stty -a > before; (sleep 2; kill -{signal} $(cat pid)) & \
             sh -c 'echo $$ > pid; exec {}'; echo status=$?; stty -a > after; cmp before after && echo restored",
            quoted.join(" ").replace('\'', "\"")
        );
        let shell = ["/bin/sh", "-c", &line].map(str::to_owned);
        let mut t = Terminal::start(context, &shell)?;
        t.expect(&format!("status={status}"))?;
        t.expect("restored")?;
        t.ends_with(0)?;
    }
    Ok(PASSED)
}

fn debian(context: &Context, cpus: &'static str) -> Checked {
    if let Some(skip) = no_linux(context) {
        return Ok(skip);
    }
    let line = "console=ttyS0 panic=-1 quiet do=smp";
    let output = run(context, &linux(line, &["--cpus", cpus]), 0, "Power down")?;
    let text = output.out();
    for wanted in [format!(" {cpus} processors"), line.to_owned()] {
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

fn linux_ends(context: &Context) -> Checked {
    if let Some(skip) = no_linux(context) {
        return Ok(skip);
    }
    for (action, status) in [("reset", RESET), ("panic", PANIC)] {
        let line = format!("console=ttyS0 panic=-1 quiet do={action}");
        run(context, &linux(&line, &[]), status, "user space: ")
            .map_err(|why| format!("{action}: {why}"))?;
    }
    Ok(PASSED)
}

/// A shell in the initramfs, told what to do through a pipe.
fn linux_shell(context: &Context) -> Checked {
    if let Some(skip) = no_linux(context) {
        return Ok(skip);
    }
    let input = "echo $((6 * 7)) of $(uname -s); head -c 100000 /dev/zero | wc -c; poweroff -f\n";
    let launch = Launch::default().stdin(input);
    let output = context.boot(&linux("console=ttyS0 panic=-1 quiet", &[]), &launch)?;
    expect(&output, 0, "42 of Linux")?;
    expect(&output, 0, "100000")?;
    Ok(PASSED)
}

/// A disk is written, flushed and partly zeroed, another only read; the host looks at the files.
fn linux_disks(context: &Context) -> Checked {
    if let Some(skip) = no_linux(context) {
        return Ok(skip);
    }
    const BYTES: usize = 4 << 20;
    let source: Vec<u8> = (0..BYTES as u32)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect();
    let target = context.write("target", vec![0xee; 2 * BYTES], 0o644)?;
    let copied_from = context.write("source", &source, 0o644)?;
    let input = "dd if=/dev/vdb of=/dev/vda bs=4096 seek=1 && sync && \
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
    let output = context.boot(&linux("console=ttyS0 panic=-1 quiet", &disks), &launch)?;
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

pub(crate) fn cases() -> Vec<Case> {
    let flat = [
        Case::function("boot/flat/ways_to_end", ways_to_end),
        Case::function("boot/flat/never_ends", never_ends),
        Case::function("boot/flat/command_line", command_line),
        Case::function("boot/flat/pipe", pipe),
        Case::function("boot/flat/console_in_a_file", console_in_a_file),
        Case::function("boot/flat/hostile", hostile).seconds(180),
        Case::function("boot/flat/hostile_queues", hostile_queues).seconds(180),
        Case::function("boot/flat/pvh", pvh),
        Case::function("boot/flat/signal", signal),
        Case::function("boot/flat/terminal", terminal).needs(&["stty", "cmp"]),
        Case::function("boot/flat/terminal_after_a_crash", terminal_after_a_crash)
            .needs(&["stty", "cmp"]),
    ];
    let linux = [
        Case::function("boot/linux/1_cpu", |context| debian(context, "1")),
        Case::function("boot/linux/2_cpus", |context| debian(context, "2")),
        Case::function("boot/linux/4_cpus", |context| debian(context, "4")),
        Case::function("boot/linux/reset_and_panic", linux_ends),
        Case::function("boot/linux/shell", linux_shell),
        Case::function("boot/linux/disks", linux_disks),
    ];
    let linux = linux.map(|case| case.seconds(120));
    let all = flat.into_iter().chain(linux);
    all.map(|case| case.not_native(ONLY_VMM)).collect()
}
