//! Programs that ask to be frozen, and learn which clone they are: `/dev/vmm`, `vmm fork --env`.

use std::fs;
use std::process::Stdio;
use std::time::{Duration, Instant};

use tests::case::{Case, Checked, Expect, Launch, PASSED};
use tests::context::Context;

use super::snapshot::{Guest, ONLY_VMM, command, expect, kills, snapshot, succeed, vmm_with};

/// Freezes itself, says who it is, and a line for each line of its input.
const SHELL: &str = "x=warm; echo freeze > /dev/vmm; \
    { read -r role n of name; while IFS= read -r set; do export \"$set\"; done; } < /dev/vmm; \
    echo $role $n $of $name $x ${WHO-nobody}; while read line; do echo $line; done";

/// The same in Python, with what it has in memory.
const PYTHON: &str = "import sys
squares = {n: n * n for n in range(5000)}
with open('/dev/vmm', 'w') as vmm:
    vmm.write('freeze\\n')
with open('/dev/vmm') as vmm:
    role, number, of, name = vmm.readline().split()
    env = dict(line.rstrip('\\n').split('=', 1) for line in vmm)
print(role, number, of, name, squares[int(env.get('N', 3))], flush=True)
sys.stdin.read()
";

/// The same in Lua.
const LUA: &str = "squares = {} for n = 1, 5000 do squares[n] = n * n end
local vmm = assert(io.open('/dev/vmm', 'w')) vmm:write('freeze\\n') vmm:close()
local lines = {} for line in io.lines('/dev/vmm') do lines[#lines + 1] = line end
local n = lines[2] and tonumber(lines[2]:match('^N=(.*)')) or 3
io.write(lines[1], ' ', squares[n], '\\n') io.flush() io.read('a')
";

/// Memory that processes share, before and after: clones each have their own.
const SHARED: &str = "import mmap, os, sys, time
size = int(sys.argv[1])
shared = mmap.mmap(-1, size)
shared[:4] = b'warm'
file = os.open('/dev/shm/file', os.O_RDWR | os.O_CREAT)
os.write(file, b'warm')
mapped = mmap.mmap(file, 4)
with open('/dev/vmm', 'w') as vmm:
    vmm.write('freeze\\n')
number = open('/dev/vmm').readline().split()[1]
before = shared[:4] + mapped[:4]
mine = (number * 4).encode()
if os.fork() == 0:
    shared[:4] = mapped[:4] = mine
    os._exit(0)
os.wait()
time.sleep(0.3)
same = shared[:4] == mine == os.pread(file, 4, 0)
print(number, before.decode(), same, shared[:] == mine + bytes(size - 4), flush=True)
sys.stdin.read()
";

/// What keeps clones apart.
const ISOLATIONS: [&str; 2] = ["vm", "process"];

/// Starts some clones, and some more in one machine, and compares what each prints with `line`, in which `%i` is its
/// number and `%n` how many they are.
fn some(context: &Context, env: &str, line: &str) -> Result<(), String> {
    ISOLATIONS
        .into_iter()
        .try_for_each(|isolation| some_apart_by(context, isolation, env, line))
}

fn some_apart_by(context: &Context, isolation: &str, env: &str, line: &str) -> Result<(), String> {
    let output = context.work().join("out.%i");
    let output = output.to_string_lossy();
    let count = context.amount(5, 2);
    let of = count.to_string();
    let words = ["fork", "warm", "-n", &of, "--env", env, "--stdout", &output];
    succeed(context, &[&words[..], &["--isolation", isolation]].concat())?;
    for n in 1..=count {
        let number = n.to_string();
        let path = output.replace("%i", &number);
        let printed = fs::read_to_string(path).map_err(|e| e.to_string())?;
        let wanted = line.replace("%i", &number).replace("%n", &of);
        if printed != wanted {
            return Err(format!(
                "clone {n} ({isolation}): {printed:?}, not {wanted:?}"
            ));
        }
    }
    Ok(())
}

/// Memory that a guest's processes share is not shared between guests.
fn memory(context: &Context) -> Checked {
    let file = context.write("shared.py", SHARED, 0o644)?;
    let file = file.to_string_lossy().into_owned();
    let guest = Guest::launch(
        context,
        &["--ready-freeze", "--root", "/"],
        &[
            "python3",
            "-S",
            "-E",
            &file,
            context.amount("1048576", "196608"),
        ],
    )?;
    some(context, "N=1", "%i warmwarm True True\n")?;
    match guest.finish(context)? {
        printed if printed == "0 warmwarm True True\n" => Ok(PASSED),
        printed => Err(format!("the original: {printed:?}")),
    }
}

/// Clones in machines of their own, and in one: a few at once, each with an input and an end of its own, one of them by its
/// time.
fn ends(context: &Context) -> Checked {
    let line = "echo freeze > /dev/vmm; read -r role n rest < /dev/vmm; \
                while read -r l; do echo $l; done; [ $role = clone ] || exit 0; \
                [ $n = 5 ] && while :; do :; done; [ $n = 7 ] && kill -9 $$; [ $n != 6 ] || exit 9";
    let guest = Guest::launch(context, &["--ready-freeze"], &["busybox", "sh", "-c", line])?;
    let work = context.work();
    let path = |name: &str| work.join(name).to_string_lossy().into_owned();
    for n in 1..=8 {
        context.write(&format!("in.{n}"), format!("line {n}\n"), 0o644)?;
    }
    let (input, output) = (path("in.%i"), path("out.%i"));
    let words = |isolation, count| {
        let words = ["fork", "warm", "--isolation", isolation, "-n", count];
        let streams = ["-j", "3", "--stdin", &input, "--stdout", &output];
        [&words[..], &streams[..], &["--timeout", "3"]].concat()
    };
    for isolation in ISOLATIONS {
        for (count, status) in [("4", 0), ("8", 124)] {
            let ended = vmm_with(context, &words(isolation, count), b"")?;
            expect(&ended, status, "")?;
        }
        for n in 1..=8 {
            let path = path(&format!("out.{n}"));
            let printed = fs::read_to_string(&path).map_err(|e| e.to_string())?;
            if printed != format!("line {n}\n") {
                return Err(format!("clone {n} ({isolation}): {printed:?}"));
            }
            fs::remove_file(path).map_err(|e| e.to_string())?;
        }
    }
    guest.finish(context)?;
    Ok(PASSED)
}

/// The point is where the program says, and each clone knows which one it is; the original goes on.
fn shell(context: &Context) -> Checked {
    let guest = Guest::launch(
        context,
        &["--ready-freeze"],
        &["busybox", "sh", "-c", SHELL],
    )?;
    some(
        context,
        "WHO=the  %ith = one",
        "clone %i %n warm warm the %ith = one\n",
    )?;
    // A snapshot is of now: the program has read who it was.
    let path = snapshot(context)?;
    let again = vmm_with(context, &["restore", &path], b"line\n")?;
    expect(&again, 0, "line\n")?;
    match guest.finish(context)? {
        printed if printed == "original 0 0 warm warm nobody\n" => Ok(PASSED),
        printed => Err(format!("the original: {printed:?}")),
    }
}

fn warmed(context: &Context, interpreter: &[&str], file: &str, program: &str) -> Checked {
    let file = context.write(file, program, 0o644)?;
    let file = file.to_string_lossy().into_owned();
    let options = ["--ready-freeze", "--root", "/"];
    let guest = Guest::launch(context, &options, &[interpreter, &[&file]].concat())?;
    for squares in context.amount(&["N=70", "N=9"][..], &["N=9"]) {
        let square = if *squares == "N=9" { 81 } else { 4900 };
        some(context, squares, &format!("clone %i %n warm {square}\n"))?;
    }
    match guest.finish(context)? {
        printed if printed == "original 0 0 warm 9\n" => Ok(PASSED),
        printed => Err(format!("the original: {printed:?}")),
    }
}

fn python(context: &Context) -> Checked {
    warmed(context, &["python3", "-S", "-E"], "warm.py", PYTHON)
}

fn lua(context: &Context) -> Checked {
    warmed(context, &["lua5.4"], "warm.lua", LUA)
}

/// Several processes ask at once, while others run: each gets its answer, in the original and in the clones.
fn together(context: &Context) -> Checked {
    let line = "for n in 1 2 3 4; do (i=0; while [ $i -lt 5 ]; do echo freeze > /dev/vmm || exit 1; \
                i=$((i+1)); done; read role n < /dev/vmm; echo $role done) & done; wait; \
                echo all; while read line; do :; done";
    let guest = Guest::launch(context, &["--ready-freeze"], &["busybox", "sh", "-c", line])?;
    let output = context.work().join("out.%i");
    let output = output.to_string_lossy();
    succeed(context, &["fork", "warm", "-n", "3", "--stdout", &output])?;
    for n in 1..=3 {
        let path = output.replace("%i", &n.to_string());
        let printed = fs::read_to_string(path).map_err(|e| e.to_string())?;
        // Who had read before the template was made was somebody else.
        if printed.lines().count() > 5 || !printed.ends_with("all\n") {
            return Err(format!("clone {n}: {printed:?}"));
        }
    }
    match guest.finish(context)? {
        printed if printed == "original done\n".repeat(4) + "all\n" => Ok(PASSED),
        printed => Err(format!("the original: {printed:?}")),
    }
}

/// A clone with a name can be frozen, and its clones say whose they are.
fn layers(context: &Context) -> Checked {
    let line = "echo freeze > /dev/vmm; read -r role n of name < /dev/vmm; \
                if [ $role = clone ]; then echo freeze > /dev/vmm; cat /dev/vmm; sleep 2; fi; \
                while read line; do :; done";
    let guest = Guest::launch(context, &["--ready-freeze"], &["busybox", "sh", "-c", line])?;
    let work = context.work();
    let path = |name: &str| work.join(name).to_string_lossy().into_owned();
    let out = path("first");
    std::thread::scope(|scope| {
        let first = ["fork", "warm", "--name", "second", "--stdout", &out];
        let first = scope.spawn(move || succeed(context, &first).map(drop));
        // It is there once it has printed; then its template is there too.
        while fs::read_to_string(path("first"))
            .unwrap_or_default()
            .is_empty()
        {
            if first.is_finished() {
                break;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let words = ["fork", "second-1", "-n", "2", "--stdout", &path("deep.%i")];
        succeed(context, &words)?;
        first.join().map_err(|_| "a thread panicked".to_owned())?
    })?;
    for (name, wanted) in [
        ("first", "clone 1 1 warm\n"),
        ("deep.1", "clone 1 2 second-1\n"),
        ("deep.2", "clone 2 2 second-1\n"),
    ] {
        let printed = fs::read_to_string(path(name)).map_err(|e| e.to_string())?;
        if printed != wanted {
            return Err(format!("{name}: {printed:?}, not {wanted:?}"));
        }
    }
    guest.finish(context)?;
    Ok(PASSED)
}

/// Frames a clone may take for what it has besides, the pages of its program among them.
const SMALL: u64 = 512;

/// Clones store to all they have and see nothing of each other; one that only reads takes no frames for it. What the
/// original has, and what a later clone finds, is as it was.
fn frozen(context: &Context) -> Checked {
    let program = context.setup.programs.join("frozen");
    let program = program.to_string_lossy();
    // Many more than a clone takes for what it has besides, where all is emulated too.
    let mebibytes: u64 = context.amount(16, 4);
    let words = [&*program, &mebibytes.to_string()];
    let guest = Guest::launch(context, &["--ready-freeze"], &words)?;
    let output = context.work().join("out.%i");
    let output = output.to_string_lossy();
    let words = [
        "fork",
        "warm",
        "-n",
        "3",
        "--env",
        "MODE=write",
        "--stdout",
        &output,
    ];
    succeed(context, &words)?;
    for n in 1..=3 {
        let path = output.replace("%i", &n.to_string());
        let printed = fs::read_to_string(path).map_err(|e| e.to_string())?;
        if printed != format!("written {n}\n") {
            return Err(format!("clone {n}: {printed:?}"));
        }
    }
    lies_on_the_template(&while_it_reads(context)?, mebibytes)?;
    // And so does the guest that was frozen.
    let original = succeed(context, &["inspect", "warm", "--json"])?.stdout;
    let original = serde_json::from_slice(&original).map_err(|e| e.to_string())?;
    lies_on_the_template(&original, mebibytes).map_err(|why| format!("the original: {why}"))?;
    guest.finish(context)?;
    Ok(PASSED)
}

/// All of a guest's memory but a few pages is its template's.
fn lies_on_the_template(seen: &serde_json::Value, mebibytes: u64) -> Result<(), String> {
    let sum = |name: &str| {
        let processes = seen["processes"].as_array().into_iter().flatten();
        processes.filter_map(|p| p[name].as_u64()).sum::<u64>()
    };
    let copied = seen["counters"]["memory"]["pages_copied"].as_u64();
    let active = seen["zones"][0]["states"]["active"].as_u64();
    let few = |n: Option<u64>| n.is_some_and(|n| n < SMALL);
    if sum("frozen") < mebibytes << 8 || sum("resident") > SMALL || !few(copied) || !few(active) {
        return Err(format!("{copied:?} copied, {active:?} active: {seen}"));
    }
    Ok(())
}

/// What a clone looks like that has read all it has.
fn while_it_reads(context: &Context) -> Result<serde_json::Value, String> {
    let path = context.work().join("reader");
    let output = path.to_string_lossy().into_owned();
    let words = [
        "fork",
        "warm",
        "--name",
        "reader",
        "--env",
        "MODE=read",
        "--stdout",
        &output,
    ];
    let mut fork = command(context, &words)
        .spawn()
        .map_err(|e| e.to_string())?;
    let until = Instant::now() + context.timeout / 2;
    while fs::read_to_string(&path).unwrap_or_default() != "read\n" && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(20));
    }
    let seen = succeed(context, &["inspect", "reader-1", "--json"]);
    let killed = succeed(context, &["kill", "reader-1"]);
    let ended = fork.kill().and_then(|()| fork.wait());
    let seen = seen?.stdout;
    killed?;
    ended.map_err(|e| e.to_string())?;
    serde_json::from_slice(&seen).map_err(|e| e.to_string())
}

/// Clones do not outlive the command that made them.
fn orphans(context: &Context) -> Checked {
    let line =
        "echo freeze > /dev/vmm; read -r role n < /dev/vmm; echo $role; while :; do sleep 1; done";
    let guest = Guest::launch(context, &["--ready-freeze"], &["busybox", "sh", "-c", line])?;
    let output = context.work().join("out.%i");
    let output = output.to_string_lossy();
    let words = [
        "fork", "warm", "-n", "3", "--name", "lost", "--stdout", &output,
    ];
    let mut fork = command(context, &words)
        .spawn()
        .map_err(|e| e.to_string())?;
    let until = Instant::now() + context.timeout / 2;
    let last = output.replace("%i", "3");
    while fs::read_to_string(&last).unwrap_or_default().is_empty() && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(20));
    }
    let there = succeed(context, &["ps"])?;
    fork.kill()
        .and_then(|()| fork.wait())
        .map_err(|e| e.to_string())?;
    if !there.out().contains("lost-3") {
        return Err(format!("the clones never ran: {}", there.out()));
    }
    while succeed(context, &["ps"])?.out().contains("lost-") {
        if Instant::now() > until {
            return Err("clones are left".to_owned());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    drop(guest);
    Ok(PASSED)
}

/// Processes whose command line has all of these words.
fn processes(words: &[&str]) -> Result<usize, String> {
    let all = fs::read_dir("/proc").map_err(|e| e.to_string())?;
    let lines = all
        .flatten()
        .filter_map(|entry| fs::read(entry.path().join("cmdline")).ok());
    let matches = |line: &Vec<u8>| {
        let line = String::from_utf8_lossy(line);
        words
            .iter()
            .all(|word| line.split('\0').any(|other| other == *word))
    };
    Ok(lines.filter(matches).count())
}

/// Nor if it is killed while it starts them, at whatever moment; nor if it had gone before one of them could see that.
fn abandoned(context: &Context) -> Checked {
    let line = "echo freeze > /dev/vmm; while :; do sleep 1; done";
    let guest = Guest::launch(context, &["--ready-freeze"], &["busybox", "sh", "-c", line])?;
    for round in 0..kills(context, 10) {
        let words = ["fork", "warm", "-n", "8", "--per-process", "3"];
        let mut fork = command(context, &words);
        let fork = fork.stderr(Stdio::null()).spawn();
        let mut fork = fork.map_err(|e| e.to_string())?;
        std::thread::sleep(Duration::from_micros(u64::from(round * 7919 % 61) * 1000));
        fork.kill()
            .and_then(|()| fork.wait())
            .map_err(|e| e.to_string())?;
        let until = Instant::now() + context.timeout / 4;
        let parent = fork.id().to_string();
        while processes(&["run-clones", "--parent", &parent])? != 0 {
            if Instant::now() > until {
                return Err(format!("round {round}: clones are left"));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
    let vmm = context.setup.vmm.to_string_lossy();
    let parent = (std::process::id() + 1).to_string();
    let line = format!("exec {vmm} run-clones --parent {parent}");
    let alone = context.native(&Launch::new("/bin/sh", &["-c", &line]))?;
    if alone.status != 125 || !alone.err().contains("has ended") || alone.err().lines().count() != 1
    {
        return Err(format!(
            "without a parent: {} {}",
            alone.status,
            alone.err()
        ));
    }
    drop(guest);
    Ok(PASSED)
}

/// What a program sees that nobody forks, and one that asks too often.
fn alone() -> [Case; 2] {
    let line = "echo freeze > /dev/vmm && cat /dev/vmm; echo thaw > /dev/vmm || echo refused; \
                ls -l /dev/vmm | cut -c 1-10";
    let unnamed = Launch::new("busybox", &["sh", "-c", line]);
    let printed = "original 0 0 -\nrefused\ncrw-rw-rw-\n".to_owned();
    let often = "i=0; while echo freeze > /dev/vmm; do i=$((i+1)); done; echo $i";
    let often = Launch::new("busybox", &["sh", "-c", often]).options(&["--name", "often"]);
    [
        Case::new("clones/unnamed", unnamed, Expect::Exactly(0, printed)),
        Case::new("clones/limit", often, Expect::Exactly(0, "64\n".to_owned())),
    ]
}

pub(crate) fn cases() -> Vec<Case> {
    let mut cases: Vec<_> = [
        ("clones/shell", shell as fn(&Context) -> Checked, "busybox"),
        ("clones/ends", ends, "busybox"),
        ("clones/shared-memory", memory, "python3"),
        ("clones/together", together, "busybox"),
        ("clones/layers", layers, "busybox"),
        ("clones/orphans", orphans, "busybox"),
        ("clones/abandoned", abandoned, "busybox"),
        ("clones/python", python, "python3"),
        ("clones/lua", lua, "lua5.4"),
    ]
    .into_iter()
    .map(|(name, body, program)| Case::function(name, body).needs(&[program]))
    .collect();
    cases.push(Case::function("clones/frozen", frozen));
    cases.extend(alone().map(|case| case.needs(&["busybox"])));
    let all = cases.into_iter();
    all.map(|case| case.not_native(ONLY_VMM).seconds(120))
        .collect()
}
