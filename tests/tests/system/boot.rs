//! `vmm boot`: our own flat kernel (`guest/kernels/flat.c`) on every host. Debian's: [`super::boot_linux`].

use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use tests::case::{Case, Checked, Launch, PASSED, Verdict};
use tests::context::{Context, shorten};
use tests::process::Output;
use tests::terminal::Terminal;

pub(crate) const ONLY_VMM: &str = "it is about vmm boot";
/// What vmm gives for each way to end.
pub(crate) const RESET: i32 = 120;
pub(crate) const PANIC: i32 = 121;
const TRIPLE_FAULT: i32 = 122;
const TIMEOUT: i32 = 124;

fn flat<'a>(line: &'a str, options: &[&'a str]) -> Vec<&'a str> {
    let mut all = vec!["--kernel", "{programs}/kernels/flat", "--memory", "16M"];
    all.extend(["--cmdline", line]);
    all.extend(options);
    all
}

pub(crate) fn expect(output: &Output, status: i32, text: &str) -> Result<(), String> {
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

pub(crate) fn run(
    context: &Context,
    options: &[&str],
    status: i32,
    text: &str,
) -> Result<Output, String> {
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
    let bytes = context.amount(20_000_u32, 6_000);
    let mut input: Vec<u8> = (0..bytes).map(|i| b'a' + (i % 10) as u8).collect();
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

/// Registers that are not in the machine's table are refused to read and to write, others are not.
fn denied_msrs(context: &Context) -> Checked {
    let output = run(
        context,
        &flat("denied", &[]),
        0,
        "the others are answered\ndone\n",
    )?;
    if output.err().contains("filters no MSRs") {
        return Ok(Verdict::Skipped("this KVM filters no MSRs".to_owned()));
    }
    if output.out() != "the others are answered\ndone\n" {
        return Err(format!("hidden registers are answered:\n{}", output.out()));
    }
    Ok(PASSED)
}

/// The console is a new pseudo-terminal, which is said and can be opened by its name.
fn pseudo_terminal(context: &Context) -> Checked {
    let words = context.boot_words(&flat("echo", &["--console", "pty"]));
    let quoted: Vec<String> = words.iter().map(|w| format!("'{w}'")).collect();
    let line = format!(
        "{} 2> said & for i in $(seq 100); do name=$(grep -o '/dev/pts/[0-9]*' said) && break; sleep 0.1; done; \
         exec 3<> $name; printf abcabcab >&3; head -c 8 <&3; echo; printf q >&3; wait $!; echo status=$?",
        quoted.join(" ")
    );
    let shell = ["/bin/sh", "-c", &line].map(str::to_owned);
    let mut t = Terminal::start(context, &shell)?;
    t.expect("abcabcab")?;
    t.expect("status=0")?;
    t.ends_with(0)?;
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

/// The unit tests that save a processor and a board and go on in another machine, on this kind of KVM too.
fn board_state(context: &Context) -> Checked {
    let Some(units) = std::env::var_os("VMM_TEST_UNITS") else {
        return Ok(Verdict::Skipped(if context.setup.host.in_rig() {
            "VMM_TEST_UNITS names no unit tests".to_owned()
        } else {
            "`cargo test -p vmm` has run it here".to_owned()
        }));
    };
    let output = context.native(&Launch::new(
        &units.to_string_lossy(),
        &["board_state", "fpu_state"],
    ))?;
    expect(&output, 0, "test result: ok. 4 passed")?;
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

/// The terminal is restored when a signal ends the VMM, even one of its own mistakes, or one that it does not expect.
fn terminal_after_a_crash(context: &Context) -> Checked {
    for (signal, status) in [
        (Signal::TERM, 143),
        (Signal::SEGV, 139),
        (Signal::USR1, 138),
        (Signal::ALARM, 142),
    ] {
        let words = context.boot_words(&flat("echo", &["--console", "stdio"]));
        let quoted: Vec<String> = words.iter().map(|w| format!("'{w}'")).collect();
        let line = format!(
            "ulimit -c 0; stty -a > before; \
             sh -c 'echo $$ > pid; exec {}'; echo status=$?; stty -a > after; cmp before after && echo restored",
            quoted.join(" ").replace('\'', "\"")
        );
        let shell = ["/bin/sh", "-c", &line].map(str::to_owned);
        let mut t = Terminal::start(context, &shell)?;
        // The guest has it: a terminal that is as before would say ^A.
        t.until("\x01\x01y", "\x01y")?;
        let pid = std::fs::read_to_string(context.work().join("pid")).map_err(|e| e.to_string())?;
        let pid = pid.trim().parse().ok().and_then(Pid::from_raw);
        kill_process(pid.ok_or("no process")?, signal).map_err(|e| e.to_string())?;
        t.expect(&format!("status={status}"))?;
        t.expect("restored")?;
        t.ends_with(0)?;
    }
    Ok(PASSED)
}

pub(crate) fn cases() -> Vec<Case> {
    let flat = [
        Case::function("boot/flat/ways_to_end", ways_to_end),
        Case::function("boot/flat/never_ends", never_ends).any_paging(),
        Case::function("boot/flat/command_line", command_line).any_paging(),
        Case::function("boot/flat/pipe", pipe).any_paging(),
        Case::function("boot/flat/console_in_a_file", console_in_a_file).any_paging(),
        Case::function("boot/flat/hostile", hostile).seconds(180),
        Case::function("boot/flat/denied_msrs", denied_msrs),
        Case::function("boot/flat/pseudo_terminal", pseudo_terminal)
            .needs(&["grep", "head"])
            .any_paging(),
        Case::function("boot/flat/hostile_queues", hostile_queues).seconds(180),
        Case::function("boot/flat/pvh", pvh),
        Case::function("boot/board_state", board_state),
        Case::function("boot/flat/signal", signal).any_paging(),
        Case::function("boot/flat/terminal", terminal)
            .needs(&["stty", "cmp"])
            .any_paging(),
        Case::function("boot/flat/terminal_after_a_crash", terminal_after_a_crash)
            .needs(&["stty", "cmp"])
            .any_paging(),
    ];
    flat.map(|case| case.not_native(ONLY_VMM)).into()
}
