//! Guests in the process that starts them: the library's API. Each case is this program again, in a process of its own, so
//! that it can count what it has.

use std::collections::BTreeSet;
use std::error::Error;
use std::io::{BufRead, BufReader, Seek, Write};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use tests::case::{Case, Checked, PASSED};
use tests::context::Context;
use tests::host::emulated;
use tests::process::{self, Limits};
use vmm::{FreezeError, Guest, SpawnError, Stdio, Template, WaitError};

use super::snapshot::ONLY_VMM;

#[expect(unreachable_pub, reason = "there it is a program")]
#[path = "../../../vmm/examples/per_request.rs"]
mod per_request;

type Done = Result<(), Box<dyn Error>>;

/// How this program is told that it is the child.
const AS: &str = "--as-embedder=";

/// A case: its name, what it is, and the programs it needs.
type Known = (&'static str, fn() -> Done, &'static [&'static str]);

const CASES: [Known; 11] = [
    ("api/example", per_request::main, &["python3"]),
    ("api/standard_io", standard_io, &["busybox"]),
    ("api/ends", ends, &["busybox"]),
    ("api/refused", refused, &["busybox"]),
    ("api/frozen_and_forked", frozen_and_forked, &["busybox"]),
    ("api/several_at_once", several_at_once, &["busybox"]),
    ("api/warm_machines", warm_machines, &["busybox"]),
    ("api/reset", reset, &["busybox"]),
    ("api/shared_machine", shared_machine, &["busybox"]),
    (
        "api/gives_everything_back",
        gives_everything_back,
        &["busybox"],
    ),
    ("api/cycles", cycles, &["busybox"]),
];

/// Is a case, if this process was started to be one.
pub(crate) fn embedder() -> Option<ExitCode> {
    let arg = std::env::args().nth(1)?;
    let name = arg.strip_prefix(AS)?;
    let (_, body, _) = CASES.iter().find(|(known, _, _)| *known == name)?;
    Some(match body() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error} ({error:?})");
            ExitCode::FAILURE
        }
    })
}

fn child(context: &Context, name: &str, input: &str) -> Result<String, String> {
    let limits = Limits {
        timeout: context.timeout,
        signal: None,
    };
    let own = std::env::current_exe().map_err(|e| e.to_string())?;
    let mut command = Command::new(own);
    command
        .arg(format!("{AS}{name}"))
        .current_dir(context.work());
    let output = process::run(&mut command, input.as_bytes(), &limits);
    let output = output.map_err(|e| e.to_string())?;
    match output.status {
        0 => Ok(output.out()),
        status => Err(format!("{status}: {} {}", output.out(), output.err())),
    }
}

macro_rules! bodies {
    ($($name:ident => $case:literal),*) => {
        $(fn $name(context: &Context) -> Checked {
            child(context, $case, "").map(|_| PASSED)
        })*
    };
}

bodies!(
    run_standard_io => "api/standard_io",
    run_ends => "api/ends",
    run_refused => "api/refused",
    run_frozen_and_forked => "api/frozen_and_forked",
    run_several_at_once => "api/several_at_once",
    run_warm_machines => "api/warm_machines",
    run_reset => "api/reset",
    run_shared_machine => "api/shared_machine",
    run_gives_everything_back => "api/gives_everything_back",
    run_cycles => "api/cycles"
);

fn run_example(context: &Context) -> Checked {
    let requests = "2 ** 100\nprimes.clear()\nlen(primes)\n1/0\n";
    let answers =
        "1267650600228229401496703205376\nNone\n2262\nZeroDivisionError: division by zero\n";
    match child(context, "api/example", requests)? {
        printed if printed == answers => Ok(PASSED),
        printed => Err(printed),
    }
}

pub(crate) fn cases() -> Vec<Case> {
    let bodies: [fn(&Context) -> Checked; 11] = [
        run_example,
        run_standard_io,
        run_ends,
        run_refused,
        run_frozen_and_forked,
        run_several_at_once,
        run_warm_machines,
        run_reset,
        run_shared_machine,
        run_gives_everything_back,
        run_cycles,
    ];
    CASES
        .iter()
        .zip(bodies)
        .map(|((name, _, needs), body)| {
            let case = Case::function(name, body).not_native(ONLY_VMM);
            case.needs(needs)
                .seconds(if *name == "api/cycles" { 7200 } else { 120 })
        })
        .collect()
}

fn shell(script: &str) -> vmm::Builder {
    let mut builder = Guest::builder("busybox");
    builder.args(["sh", "-c", script]).memory(32 << 20).cpus(1);
    builder.timeout(Duration::from_secs(100));
    builder
}

fn check(right: bool, what: impl std::fmt::Debug) -> Done {
    match right {
        true => Ok(()),
        false => Err(format!("{what:?}").into()),
    }
}

/// Every kind of standard input, output and error.
fn standard_io() -> Done {
    let output = shell("echo out; echo err >&2; cat; exit 3").output()?;
    let said = (&output.stdout[..], &output.stderr[..]);
    check(
        said == (b"out\n", b"err\n") && output.status.code() == Some(3),
        &output,
    )?;

    let mut guest = shell("while read line; do echo \"<$line>\"; done; echo end")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let mut answers = BufReader::new(guest.stdout.take().ok_or("no pipe")?);
    let mut requests = guest.stdin.take().ok_or("no pipe")?;
    for n in 0..20 {
        let mut answer = String::new();
        writeln!(requests, "line {n}")?;
        answers.read_line(&mut answer)?;
        check(answer == format!("<line {n}>\n"), answer)?;
    }
    drop(requests);
    let mut rest = String::new();
    answers.read_line(&mut rest)?;
    check(rest == "end\n" && guest.wait()?.success(), rest)?;

    // A file is shared, bytes are not.
    std::fs::write("in", "a\nb\n")?;
    let mut one_line = shell("read line; echo $line");
    one_line.stdin(std::fs::File::open("in")?);
    let lines = [one_line.output()?.stdout, one_line.output()?.stdout];
    check(lines.concat() == b"a\nb\n", lines)?;
    one_line.stdin(Stdio::bytes(*b"c\nd\n"));
    let lines = [one_line.output()?.stdout, one_line.output()?.stdout];
    check(lines.concat() == b"c\nc\n", lines)?;
    let file = std::fs::File::create("out")?;
    let status = shell("echo written").stdout(file).spawn()?.wait()?;
    let written = std::fs::read_to_string("out")?;
    check(status.success() && written == "written\n", written)
}

/// Every way to end.
fn ends() -> Done {
    let mut guest = shell("sleep 1000 & sleep 1000")
        .stdin(Stdio::null())
        .spawn()?;
    check(guest.try_wait()?.is_none(), "it has ended")?;
    guest.kill();
    let status = guest.wait()?;
    check(status.signal() == Some(9), status)?;
    check(
        guest.wait()? == status && guest.try_wait()? == Some(status),
        "another status",
    )?;
    check(guest.report().ioctls > 0, guest.report())?;

    let guest = shell("trap 'echo told; exit 5' TERM; echo ready; while :; do sleep 0.01; done")
        .ready_line("ready")
        .stdout(Stdio::piped())
        .spawn()?;
    guest.wait_until_ready()?;
    guest.signal(15)?;
    check(guest.signal(65).is_err(), "65 was sent")?;
    let output = guest.wait_with_output()?;
    check(
        output.status.code() == Some(5) && output.stdout == b"ready\ntold\n",
        output,
    )?;

    let started = Instant::now();
    let late = shell("sleep 1000")
        .timeout(Duration::from_millis(200))
        .output();
    let late = late.err().map(|error| error.to_string());
    let time = started.elapsed();
    let wanted = WaitError::TimedOut.to_string();
    check(
        late == Some(wanted) && time < Duration::from_secs(60),
        (late, time),
    )?;

    // Nobody reads: an error for the guest, not the end of this process.
    let mut guest = shell("trap '' PIPE; sleep 0.1; echo x || exit 4")
        .stdout(Stdio::piped())
        .spawn()?;
    drop(guest.stdout.take());
    let status = guest.wait()?;
    check(status.code() == Some(4), status)
}

/// What cannot be is told, and nothing is left of it.
fn refused() -> Done {
    let before = counted()?;
    for (wrong, told) in [
        (Guest::builder("no-such-program").spawn(), "not found"),
        (shell("true").memory(1).spawn(), "a machine has 8M"),
        (shell("true").cpus(0).spawn(), "1 to 64"),
        (shell("true").env("A=B", "").spawn(), "cannot be given"),
        (shell("a\0b").spawn(), "cannot be given"),
        (shell("true").name("a b").spawn(), "a b"),
        (shell("true").current_dir("/nowhere").spawn(), "/nowhere"),
    ] {
        let mut said = String::new();
        let error = wrong.err().ok_or_else(|| format!("not refused: {told}"))?;
        let mut cause: Option<&dyn Error> = Some(&error);
        while let Some(error) = cause {
            said += &format!("{error}: ");
            cause = error.source();
        }
        check(said.contains(told), said)?;
    }
    let never = shell("true").ready_line("never").spawn()?;
    check(
        matches!(never.freeze(), Err(FreezeError::Ended)),
        "it was frozen",
    )?;
    drop(never);
    let warm = shell("read line").stdin(Stdio::piped()).spawn()?;
    let template = warm.freeze()?;
    let setting = template.fork().env("A", "b\nc").spawn();
    check(matches!(setting, Err(SpawnError::Setting(_))), setting)?;
    let none = Template::from_file(std::fs::File::open("/etc/passwd")?);
    check(none.is_err(), none)?;
    drop((warm, template));
    settle(before)
}

/// A template outlives its guest and is another process's too; a clone can be one again.
fn frozen_and_forked() -> Done {
    let script = "x=warm; echo freeze > /dev/vmm; { read -r role n of name; read -r given; } < /dev/vmm; \
        echo $role $n $of $name $x $given; read line; x=$line; echo freeze > /dev/vmm; read y; echo $x $y";
    let warm = shell(script)
        .name("warm")
        .ready_freeze()
        .stdin(Stdio::bytes(*b"one\ntwo\n"))
        .stdout(Stdio::piped())
        .spawn()?;
    let template = warm.freeze()?;
    // It waits to be frozen again.
    let second = warm.freeze()?;
    let rest = warm.wait_with_output()?.stdout;
    check(
        rest == b"original 0 0 warm warm\none two\n",
        String::from_utf8_lossy(&rest),
    )?;
    let after = second.fork().stdin(Stdio::bytes(*b"2\n")).output()?.stdout;
    check(after == b"one 2\n", String::from_utf8_lossy(&after))?;

    let mut fork = template.fork();
    fork.env("N", "first").stdin(Stdio::bytes(*b"a\nb\n"));
    let output = fork.output()?;
    check(
        output.stdout == b"clone 1 0 warm warm N=first\na b\n",
        &output,
    )?;
    let output = fork.number(7, 9).output()?;
    check(
        output.stdout == b"clone 7 9 warm warm N=first\na b\n",
        &output,
    )?;

    let copy = Template::from_file(template.file().try_clone()?)?;
    let layer = copy
        .fork()
        .ready_freeze()
        .stdin(Stdio::bytes(*b"c\n"))
        .stdout(Stdio::null())
        .spawn()?;
    // Once where it was frozen first, and once where it asks for it.
    let layer = layer.freeze()?;
    check(layer.pages() > 0 && layer.pause().is_some(), &layer)?;
    let output = layer.fork().stdin(Stdio::bytes(*b"d\n")).output()?;
    check(output.stdout == b"c d\n", output)
}

/// Guests of one process are nothing to each other.
fn several_at_once() -> Done {
    let script = "x=$(head -c 8 /dev/urandom | md5sum); echo $x; echo freeze > /dev/vmm; read n; \
        i=0; while [ $i -lt 200 ]; do i=$((i+1)); done; (echo $n $i; echo $x) | cat";
    let warm = |_| {
        let mut builder = shell(script);
        builder
            .ready_freeze()
            .stdout(Stdio::piped())
            .stdin(Stdio::null());
        builder.spawn()
    };
    let warm: Vec<_> = (0..2).map(warm).collect::<Result<_, _>>()?;
    let templates: Vec<_> = warm.iter().map(Guest::freeze).collect::<Result<_, _>>()?;
    let mut known = Vec::new();
    for guest in warm {
        let printed = String::from_utf8(guest.wait_with_output()?.stdout)?;
        known.push(printed.lines().next().unwrap_or_default().to_owned());
    }
    check(known[0] != known[1], &known)?;
    let clones: Vec<_> = (0..8)
        .map(|n| {
            let input = Stdio::bytes(format!("{n}\n").into_bytes());
            let mut fork = templates[n % 2].fork();
            fork.stdin(input).stdout(Stdio::piped()).spawn()
        })
        .collect::<Result<_, _>>()?;
    for (n, clone) in clones.into_iter().enumerate() {
        let printed = String::from_utf8(clone.wait_with_output()?.stdout)?;
        check(printed == format!("{n} 200\n{}\n", known[n % 2]), printed)?;
    }
    Ok(())
}

/// What a clone does to what it has: files in memory, memory, processes, a pipe, a timer.
const CHANGES: &str = "echo warm > /tmp/file; x=warm; echo freeze > /dev/vmm; \
    cat /tmp/file; echo $x; x=cold; echo $x > /tmp/file; echo 1 > /tmp/other; ls /tmp | wc -l; \
    (sleep 1000 | cat) & read line; echo $line; kill %1; exit 3";
const CHANGED: &str = "warm\nwarm\n2\n";

fn changing() -> Result<Template, Box<dyn Error>> {
    let warm = shell(CHANGES)
        .tmpfs("/tmp")
        .ready_freeze()
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()?;
    Ok(warm.freeze()?)
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// A machine is used again, and nothing of the guest it had is in it.
fn warm_machines() -> Done {
    let template = changing()?;
    // The template is mapped for its first clone, and stays so.
    drop(template.fork().stdin(Stdio::null()).output()?);
    let cold = counted()?;
    template.warm(2)?;
    // KVM gives a machine that runs a thread of its own.
    let both = [(); 2].map(|()| {
        template
            .fork()
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
    });
    for clone in both {
        let mut clone = clone?;
        check(clone.wait()?.code() == Some(3), "a status")?;
    }
    let warm = counted()?;
    check(warm[1] > cold[1], ("threads", cold, warm))?;
    let same = workers()?;
    for n in 0..if emulated() { 8 } else { 20 } {
        let line = format!("line {n}\n");
        let output = template
            .fork()
            .stdin(Stdio::bytes(line.clone().into_bytes()))
            .output()?;
        let right = output.stdout == (CHANGED.to_owned() + &line).as_bytes();
        check(
            right && output.status.code() == Some(3),
            (n, text(&output.stdout)),
        )?;
    }
    // Those that are killed in the middle, two at a time.
    for _ in 0..5 {
        let clone = || {
            template
                .fork()
                .stdin(Stdio::piped())
                .stdout(Stdio::null())
                .spawn()
        };
        let mut two = [clone()?, clone()?];
        two[0].kill();
        check(two[0].wait()?.signal() == Some(9), "it was not killed")?;
    }
    settle(warm)?;
    check(workers()? == same, "the machines are other ones")?;
    let one = counted()?;
    template.warm(0)?;
    settle(cold)?;
    check(one[1] > counted()?[1], ("threads", one))
}

/// A clone that was reset is as it was made, whatever it has done.
fn reset() -> Done {
    let template = changing()?;
    let mut fork = template.fork();
    fork.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut clone = fork.spawn()?;
    let mut before: Option<Counted> = None;
    for n in 0..20 {
        let mut printed = BufReader::new(clone.stdout.take().ok_or("no pipe")?);
        let mut first = String::new();
        for _ in 0..3 {
            printed.read_line(&mut first)?;
        }
        check(first == CHANGED, (n, first))?;
        match before {
            None => before = Some(counted()?),
            // It may read its input by now, which is watched: a thread and a descriptor.
            Some([fds, threads, maps]) => settle([fds + 1, threads + 1, maps])?,
        }
        if n % 3 == 0 {
            let mut requests = clone.stdin.take().ok_or("no pipe")?;
            writeln!(requests, "{n}")?;
            let status = clone.wait()?;
            check(status.code() == Some(3), status)?;
        }
        drop(printed);
        clone.reset()?;
    }
    clone.reset_as(
        template
            .fork()
            .stdin(Stdio::bytes(*b"other\n"))
            .stdout(Stdio::piped()),
    )?;
    let output = clone.wait_with_output()?;
    let wanted = CHANGED.to_owned() + "other\n";
    check(text(&output.stdout) == wanted, text(&output.stdout))
}

/// Clones in one machine: no thread for each, ends and streams of their own; one goes back, one is frozen, and the others go on.
fn shared_machine() -> Done {
    let template = changing()?;
    let machine = template.shared(1 << 30)?;
    let mut fork = machine.fork();
    fork.stdin(Stdio::piped()).stdout(Stdio::piped());
    let said = |clone: &mut vmm::Clone| -> Result<String, Box<dyn Error>> {
        let mut printed = BufReader::new(clone.stdout.as_mut().ok_or("no pipe")?);
        let mut first = String::new();
        for _ in 0..3 {
            printed.read_line(&mut first)?;
        }
        Ok(first)
    };
    let mut clones = vec![fork.spawn()?];
    check(said(&mut clones[0])? == CHANGED, "the first")?;
    let one = counted()?;
    let count = if emulated() { 12 } else { 30 };
    for n in 2..=count {
        clones.push(fork.spawn()?);
        check(said(&mut clones[n - 1])? == CHANGED, n)?;
    }
    let many = counted()?;
    check(many[1] == one[1], ("threads", one, many))?;
    // It goes back from wherever it is, also after its end.
    for n in 0..10 {
        if n % 3 == 0 {
            writeln!(clones[4].stdin.take().ok_or("no pipe")?, "{n}")?;
            let status = clones[4].wait()?;
            check(status.code() == Some(3), status)?;
        }
        clones[4].reset()?;
        check(said(&mut clones[4])? == CHANGED, n)?;
    }
    // Frozen while it waits for its line, and made in a machine of its own and in one with others.
    let later = clones[5].freeze()?;
    let again = later.shared(1 << 30)?;
    for mut fork in [later.fork(), again.fork()] {
        let output = fork.stdin(Stdio::bytes(*b"later\n")).output()?;
        let right = output.stdout == b"later\n" && output.status.code() == Some(3);
        check(right, output)?;
    }
    let refused = machine.fork().memory(64 << 20).spawn();
    check(
        matches!(refused, Err(SpawnError::SharedMachine)),
        "memory of its own",
    )?;
    let small = template.shared(1 << 20);
    check(matches!(small, Err(SpawnError::Machine(_))), "too small")?;
    let (mut from, mut onto) = (template.file().try_clone()?, std::fs::File::create("disk")?);
    from.rewind()?;
    std::io::copy(&mut from, &mut onto)?;
    let disk = Template::open("disk")?;
    let on_disk = disk.shared(1 << 30);
    check(matches!(on_disk, Err(SpawnError::OnDisk)), "on a disk")?;
    let mut fork = disk.fork();
    let loaded = fork.stdin(Stdio::piped()).stdout(Stdio::null()).spawn()?;
    let in_memory = loaded.freeze()?.shared(1 << 30)?;
    drop(loaded);
    let mut fork = in_memory.fork();
    fork.stdin(Stdio::bytes(*b"memory\n"));
    check(fork.output()?.stdout.ends_with(b"memory\n"), "of a disk's")?;
    let mut fork = machine.fork();
    fork.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut late = machine.fork();
    late.stdin(Stdio::piped()).stdout(Stdio::null());
    let mut late = late.timeout(Duration::from_millis(100)).spawn()?;
    let open = late.stdin.take();
    check(matches!(late.wait(), Err(WaitError::TimedOut)), "its time")?;
    drop(open);
    clones[6].kill();
    check(clones[6].wait()?.signal() == Some(9), "it was not killed")?;
    check(clones[7].signal(15).is_ok(), "a signal")?;
    check(clones[7].wait()?.signal() == Some(15), "SIGTERM")?;
    check(clones[7].signal(15).is_err(), "a signal after the end")?;
    // The machine goes on as long as one of its guests does.
    drop((machine, fork));
    for (n, mut clone) in clones.into_iter().enumerate().skip(8) {
        let mut input = clone.stdin.take().ok_or("no pipe")?;
        writeln!(input, "{n}")?;
        drop(input);
        let output = clone.wait_with_output()?;
        let right = text(&output.stdout) == format!("{n}\n");
        check(right && output.status.code() == Some(3), output)?;
    }
    Ok(())
}

/// Clones of one template that run and end, thousands of them (`VMM_CYCLES`): this process has nothing more afterwards, and no
/// more memory.
fn cycles() -> Done {
    // What this process has more can then be told to the page.
    rustix::thread::disable_transparent_huge_pages(true)?;
    let count = if emulated() { 20 } else { 100 };
    let count = std::env::var("VMM_CYCLES").map_or(Ok(count), |n| n.parse())?;
    let warm = shell("echo freeze > /dev/vmm; read line; echo $line")
        .ready_freeze()
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()?;
    let template = warm.freeze()?;
    let cycle = |n: u32| -> Done {
        let line = format!("{n}\n").into_bytes();
        let output = template.fork().stdin(Stdio::bytes(line.clone())).output()?;
        check(output.stdout == line, output)
    };
    // The allocator keeps what it had at most.
    (0..count / 4 + 8).try_for_each(cycle)?;
    let (before, memory) = (counted()?, resident()?);
    (0..count).try_for_each(cycle)?;
    settle(before)?;
    let more = resident()?.saturating_sub(memory);
    check(more < 1 << 20, (more, "bytes more"))?;
    drop((template, warm));
    Ok(())
}

/// Bytes of this process that are in memory.
fn resident() -> Result<u64, Box<dyn Error>> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"));
    let kib = line.and_then(|rest| rest.trim().strip_suffix(" kB"));
    Ok(kib.ok_or("no RssAnon")?.parse::<u64>()? * 1024)
}

/// What a process has: descriptors, threads, mappings.
type Counted = [usize; 3];

fn counted() -> Result<Counted, Box<dyn Error>> {
    let entries = |path| Ok::<_, Box<dyn Error>>(std::fs::read_dir(path)?.count());
    // Neighbouring mappings of nothing come and go with the allocator's.
    let maps = std::fs::read_to_string("/proc/self/maps")?;
    let named: BTreeSet<_> = maps.lines().filter(|line| line.contains('/')).collect();
    Ok([
        entries("/proc/self/fd")?,
        entries("/proc/self/task")?,
        named.len(),
    ])
}

/// The numbers of this process's threads that are machines' workers. Others come and go as they are wanted.
fn workers() -> Result<BTreeSet<std::ffi::OsString>, Box<dyn Error>> {
    let mut workers = BTreeSet::new();
    for entry in std::fs::read_dir("/proc/self/task")? {
        let entry = entry?;
        // One that has ended meanwhile has no name.
        let name = std::fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
        if name.starts_with("vcpu") {
            workers.insert(entry.file_name());
        }
    }
    Ok(workers)
}

/// Waits until there is no more than there was.
fn settle(before: Counted) -> Done {
    let until = Instant::now() + Duration::from_secs(20);
    loop {
        let now = counted()?;
        if now.iter().zip(before).all(|(now, before)| *now <= before) {
            return Ok(());
        }
        // A thread's entry goes a moment after it is joined.
        check(Instant::now() < until, ("before, now", before, now))?;
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A hundred guests, dropped in every state, leave nothing.
fn gives_everything_back() -> Done {
    let rounds = if emulated() { 5 } else { 25 };
    let warm = shell("echo freeze > /dev/vmm; read line; echo $line")
        .ready_freeze()
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()?;
    let template = warm.freeze()?;
    drop(warm);
    let round = || -> Done {
        drop(shell("read line").stdin(Stdio::piped()).spawn()?);
        check(
            shell("sleep 0 | cat").output()?.status.success(),
            "a status",
        )?;
        drop(
            template
                .fork()
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()?,
        );
        let output = template.fork().stdin(Stdio::bytes(*b"x\n")).output()?;
        check(output.stdout == b"x\n", output)
    };
    // What is made once in a process.
    round()?;
    let before = counted()?;
    for _ in 0..rounds {
        round()?;
    }
    settle(before)
}
