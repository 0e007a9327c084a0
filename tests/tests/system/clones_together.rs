//! Clones that share a machine, asked for one by one: by name, and by number. (`together/frozen-again`, `together/reset` and
//! `together/tree` are the cases of the same names of `clones/`.)

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use tests::case::{Case, Checked, PASSED};
use tests::context::Context;
use tests::process;

use super::clones_reset::{Running, lines, start};
use super::clones_workers::{Forks, WAITS, warm};
use super::snapshot::{Guest, ONLY_VMM, command, expect, kills, refused, succeed, vmm_with};

const PROCESS: [&str; 2] = ["--isolation", "process"];

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// Names are those of one clone each: the others go on, whatever becomes of it.
fn names(context: &Context) -> Checked {
    let guest = warm(context, WAITS)?;
    let options = [&PROCESS[..], &["-n", "5"]].concat();
    let forks = Forks::of("warm", context, "t", &options)?;
    let listed = forks.wait_for_all(5)?;
    let pid = u64::from(forks.child.id());
    if listed.values().any(|of| *of != pid) {
        return Err(format!("not in {pid}: {listed:?}"));
    }
    let seen = succeed(context, &["inspect", "t-4"])?.out();
    if !seen.contains("t-4") || seen.contains("t-3") {
        return Err(format!("t-4: {seen}"));
    }
    let taken = ["fork", "warm", "--name", "t", "-n", "7"];
    let taken = [&taken[..], &PROCESS].concat();
    refused(context, &taken, "a guest with this name is running")?;
    let many = [
        &["fork", "warm", "--name", "m", "-n", "10001"],
        &PROCESS[..],
    ]
    .concat();
    refused(context, &many, "at most 10000")?;
    succeed(context, &["kill", "t-2"])?;
    let others = |listed: &BTreeMap<String, u64>| !listed.contains_key("t-2");
    let left = forks.wait_for("t-2 is left", others)?;
    if left.len() != 4 {
        return Err(format!("t-2 was killed, and left are {left:?}"));
    }
    refused(context, &["inspect", "t-2"], "no guest `t-2`")?;
    for n in 1..=5 {
        if forks.printed(n) != format!("clone {n}\n") {
            return Err(format!("clone {n}: {:?}", forks.printed(n)));
        }
    }
    match forks.finish()? {
        (Some(137), said) if said.is_empty() => {}
        ended => return Err(format!("{ended:?}")),
    }
    let gone = [&["fork", "warm", "--name", "t"], &PROCESS[..]].concat();
    expect(&vmm_with(context, &gone, b"")?, 0, "clone 1\n")?;
    guest.finish(context)?;
    Ok(PASSED)
}

/// Clones without names, which run until they are killed or their input ends.
struct Numbered {
    fork: Running,
    /// Both ends of their input.
    input: Option<fs::File>,
}

impl Numbered {
    fn fork(context: &Context, count: &str) -> Result<Self, String> {
        let fifo = context.work().join("numbered.in");
        rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, 0o600.into()).map_err(text)?;
        let input = fs::File::options().read(true).write(true).open(&fifo);
        let (fifo, output) = (
            fifo.to_string_lossy(),
            context.work().join("numbered.out.%i"),
        );
        let output = output.to_string_lossy();
        let words = ["fork", "warm", "-n", count, "--stdin", &fifo];
        let words = [&words[..], &["--stdout", &output], &PROCESS].concat();
        Ok(Self {
            input: Some(input.map_err(text)?),
            fork: start(context, &words, None)?,
        })
    }

    fn pid(&self) -> u32 {
        self.fork.0.id()
    }

    fn id(&self, number: u32) -> String {
        format!("{}.{number}", self.pid())
    }

    /// Ends their input, and waits for their end.
    fn finish(&mut self, context: &Context) -> Result<Option<i32>, String> {
        drop(self.input.take());
        let ended = process::wait_within(&mut self.fork.0, context.timeout / 3)?;
        Ok(ended.code())
    }
}

/// The numbers of the clones of `pid` that `vmm ps` lists, as it lists all others.
fn listed(context: &Context, pid: u32) -> Result<Vec<u32>, String> {
    let list = succeed(context, &["ps", "--json"])?;
    let list: serde_json::Value = serde_json::from_slice(&list.stdout).map_err(text)?;
    let start = format!("{pid}.");
    let mut numbers = Vec::new();
    for hello in list.as_array().into_iter().flatten() {
        let id = hello["guest"]["id"].as_str().unwrap_or_default();
        if id == pid.to_string() {
            return Err("the process is listed as a guest".to_owned());
        }
        let Some(number) = id.strip_prefix(&start) else {
            continue;
        };
        let whole = hello["guest"]["pid"] == pid
            && hello["guest"]["command"][0] == "busybox"
            && hello["uptime_ms"].is_u64();
        if !whole {
            return Err(format!("{hello}"));
        }
        numbers.push(number.parse().map_err(text)?);
    }
    Ok(numbers)
}

fn wait_until(
    context: &Context,
    what: &str,
    mut seen: impl FnMut() -> Result<bool, String>,
) -> Result<(), String> {
    let until = Instant::now() + context.timeout / 3;
    while !seen()? {
        if Instant::now() > until {
            return Err(what.to_owned());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// Clones without names are known by the number of their process and their own, have one run directory together, and are
/// reached one by one.
fn numbers(context: &Context) -> Checked {
    let guest = warm(context, WAITS)?;
    // More than one answer tells of.
    let count = context.amount(1203, 40);
    let mut forks = Numbered::fork(context, &count.to_string())?;
    let pid = forks.pid();
    wait_until(context, "not all are listed", || {
        Ok(listed(context, pid)? == (1..=count).collect::<Vec<_>>())
    })?;
    let folder = fs::read_dir(context.work().join("vmm")).map_err(text)?;
    let names = folder.flatten().map(|entry| entry.file_name());
    let names = names.map(|name| name.to_string_lossy().into_owned());
    let mut names: Vec<_> = names.collect();
    names.sort();
    let mut wanted = [".lock".to_owned(), "warm".to_owned(), pid.to_string()];
    wanted.sort();
    if names != wanted {
        return Err(format!("run directories: {names:?}"));
    }
    let (second, third) = (forks.id(2), forks.id(3));
    lines(context, &context.work().join("numbered.out.3"), 1)?;
    succeed(context, &["kill", &second])?;
    wait_until(context, "it is not killed", || {
        Ok(!listed(context, pid)?.contains(&2))
    })?;
    for verb in ["kill", "inspect", "reset", "freeze"] {
        refused(context, &[verb, &second], &format!("no guest `{second}`"))?;
    }
    let nobody = forks.id(999_999);
    refused(context, &["kill", &nobody], "no guest")?;
    // The process is no guest, and one that is a guest has no clones.
    let process = pid.to_string();
    for verb in ["kill", "inspect", "reset", "freeze", "fork"] {
        refused(context, &[verb, &process], "a machine that clones share")?;
    }
    // Written down, frozen, forked.
    let file = context.work().join("third.snap");
    let file = file.to_string_lossy();
    succeed(context, &["snapshot", &third, &file])?;
    expect(&vmm_with(context, &["restore", &file], b"x\n")?, 0, "x\n")?;
    succeed(context, &["freeze", &third])?;
    let input = context.write("in", "deep\nend\n", 0o644)?;
    let input = input.to_string_lossy();
    let words = ["fork", &third, "--stdin", &input];
    for isolation in ["vm", "process"] {
        let words = [&words[..], &["--isolation", isolation]].concat();
        expect(&vmm_with(context, &words, b"")?, 0, "deep\n")?;
    }
    succeed(context, &["reset", &third])?;
    let said = lines(context, &context.work().join("numbered.out.3"), 2)?;
    if said != ["clone 3", "clone 3"] {
        return Err(format!("the third: {said:?}"));
    }
    if listed(context, pid)?.len() != count as usize - 1 {
        return Err("not all others go on".to_owned());
    }
    match forks.finish(context)? {
        Some(137) => {}
        status => return Err(format!("{status:?}")),
    }
    guest.finish(context)?;
    Ok(PASSED)
}

/// A clone with a name freezes itself; one without goes on.
fn freezes_itself(context: &Context) -> Checked {
    let line = "echo freeze > /dev/vmm; read -r role n rest < /dev/vmm; [ $role = clone ] || { read -r end; exit 0; }; \
                x=mine-$n; echo freeze > /dev/vmm; read -r role n of whom < /dev/vmm; echo $role $n $whom $x; \
                while read -r line; do :; done";
    let guest = warm(context, line)?;
    let options = [&PROCESS[..], &["-n", "3"]].concat();
    let forks = Forks::of("warm", context, "own", &options)?;
    forks.wait_for_all(3)?;
    for n in 1..=3 {
        let printed = forks.printed(n);
        if printed != format!("clone {n} warm mine-{n}\n") {
            return Err(format!("clone {n}: {printed:?}"));
        }
    }
    for isolation in ["vm", "process"] {
        let words = ["fork", "own-2", "--isolation", isolation];
        expect(
            &vmm_with(context, &words, b"")?,
            0,
            "clone 1 own-2 mine-2\n",
        )?;
    }
    expect(
        &vmm_with(context, &[&["fork", "warm"], &PROCESS[..]].concat(), b"")?,
        0,
        "clone 1 warm mine-1\n",
    )?;
    match forks.finish()? {
        (Some(0), said) if said.is_empty() => {}
        ended => return Err(format!("{ended:?}")),
    }
    guest.finish(context)?;
    Ok(PASSED)
}

/// A clone may have more memory than the guest had that it is made of; what is made of it then has as much.
fn grown(context: &Context) -> Checked {
    let program = "BEGIN { print \"freeze\" > \"/dev/vmm\"; close(\"/dev/vmm\"); getline role < \"/dev/vmm\"; \
                   if (role ~ /clone/) s = sprintf(\"%10000000s\", \"\"); print \"has\", length(s); fflush(); \
                   getline line; print length(s) }";
    let options = ["--ready-freeze", "--memory", "8M"];
    let guest = Guest::launch(context, &options, &["busybox", "awk", program])?;
    let more = [&PROCESS[..], &["--memory", "40M"]].concat();
    let forks = Forks::of("warm", context, "g", &more)?;
    forks.wait_for_all(1)?;
    if forks.printed(1) != "has 10000000\n" {
        return Err(forks.printed(1));
    }
    let file = context.work().join("grown.snap");
    let file = file.to_string_lossy();
    succeed(context, &["snapshot", "g-1", &file])?;
    for words in [
        &["restore", &file][..],
        &["fork", "g-1"],
        &["fork", "g-1", "--isolation", "process"],
    ] {
        expect(&vmm_with(context, words, b"")?, 0, "10000000\n")?;
    }
    match forks.finish()? {
        (Some(0), said) if said.is_empty() => {}
        ended => return Err(format!("{ended:?}")),
    }
    guest.finish(context)?;
    Ok(PASSED)
}

/// One answer of the socket of a process; none if that has ended.
fn ask(path: &PathBuf, question: &str) -> Option<serde_json::Value> {
    let mut stream = UnixStream::connect(path).ok()?;
    stream
        .set_read_timeout(Some(Duration::from_secs(60)))
        .ok()?;
    stream.write_all(format!("{question}\n").as_bytes()).ok()?;
    let mut heard = BufReader::new(stream);
    loop {
        let mut line = String::new();
        heard.read_line(&mut line).ok().filter(|n| *n > 0)?;
        // The byte that a descriptor comes with is a space.
        let answer: serde_json::Value = serde_json::from_str(&line).ok()?;
        if answer.get("progress").is_none() {
            return Some(answer);
        }
    }
}

/// Whatever is asked of clones that end at any moment, there is an answer, and the others do what they were to do.
fn hammered(context: &Context) -> Checked {
    // Each works for a moment, in a process of its own.
    let line = "echo freeze > /dev/vmm; read -r role n rest < /dev/vmm; [ $role = clone ] || { read -r end; exit 0; }; \
                i=0; while [ $i -lt MOMENT ]; do x=$(echo $n | sed s/^/n/); i=$((i+1)); done; \
                [ $n = 0 ] || [ $x = n$n ] || exit 3; exit 5";
    let guest = warm(context, &line.replace("MOMENT", context.amount("8", "3")))?;
    let (count, turns) = context.amount((60, 60), (20, 20));
    let number = count.to_string();
    let words = ["fork", "warm", "-n", &number, "-j", "10"];
    let said = context.work().join("said");
    let mut fork = command(context, &[&words[..], &PROCESS].concat());
    let fork = fork.stderr(fs::File::create(&said).map_err(text)?).spawn();
    let mut fork = Running(fork.map_err(text)?);
    let socket = context.work().join(format!("vmm/{}/socket", fork.0.id()));
    // There is a moment between its name and its being listened to.
    let answers = || Ok(UnixStream::connect(&socket).is_ok());
    wait_until(context, "nobody answers", answers)?;
    let asks = [
        r#"{"op":"hello"}"#,
        r#"{"op":"inspect","summary":true}"#,
        r#"{"op":"freeze"}"#,
        r#"{"op":"template"}"#,
        r#"{"op":"reset"}"#,
        r#"{"op":"kill","signal":17}"#,
        r#"{"op":"kill","signal":-1}"#,
        r#"{"op":"clone","number":1,"ask":{"op":"hello"}}"#,
        r#"{"op":"clones"}"#,
    ];
    let nonsense = [
        r#"{"op":"clone"}"#,
        r#"{"op":"clone","number":-1,"ask":{"op":"hello"}}"#,
        r#"{"op":"clone","number":99999999999,"ask":{"op":"hello"}}"#,
        r#"{"op":"clone","number":1,"ask":[]}"#,
        r#"{"op":"clones","after":"x"}"#,
        "[[[[[",
    ];
    let deep = "{\"op\":\"clone\",\"number\":1,\"ask\":".repeat(200);
    let counts = std::thread::scope(|scope| {
        let hammers: Vec<_> = (0..6_u32)
            .map(|hammer| {
                let (socket, deep) = (&socket, &deep);
                scope.spawn(move || {
                    let mut answers = BTreeMap::new();
                    // Not for ever: clones that go back begin anew.
                    for turn in hammer..hammer + turns {
                        // Those that run now are among the latest.
                        let clones = format!("{{\"op\":\"clones\",\"after\":{}}}", turn % 7);
                        let Some(clones) = ask(socket, &clones) else {
                            return answers;
                        };
                        let running = clones["clones"].as_array().cloned().unwrap_or_default();
                        let picked = running.get(turn as usize % running.len().max(1));
                        let id = picked.and_then(|hello| hello["guest"]["id"].as_str());
                        let number = id.and_then(|id| id.split_once('.')?.1.parse().ok());
                        let number: u32 = number.unwrap_or(turn);
                        let what = asks[turn as usize % asks.len()];
                        let question =
                            format!("{{\"op\":\"clone\",\"number\":{number},\"ask\":{what}}}");
                        let bad = match turn % 13 {
                            0 => deep,
                            n => nonsense[n as usize % nonsense.len()],
                        };
                        for (question, good) in [(&*question, true), (bad, false)] {
                            let Some(answer) = ask(socket, question) else {
                                return answers;
                            };
                            let ok = answer["ok"] == true;
                            *answers.entry((good, ok)).or_insert(0_u32) += 1;
                        }
                    }
                    answers
                })
            })
            .collect();
        let ended = process::wait_within(&mut fork.0, context.timeout / 2);
        let counts: Result<Vec<_>, _> = hammers.into_iter().map(|hammer| hammer.join()).collect();
        Ok::<_, String>((ended?, counts.map_err(|_| "a thread panicked")?))
    })?;
    let (ended, counts) = counts;
    let sum = |key| -> u32 { counts.iter().filter_map(|count| count.get(&key)).sum() };
    let said = fs::read_to_string(said).map_err(text)?;
    // SIGCHLD is ignored.
    if ended.code() != Some(5) || !said.is_empty() {
        return Err(format!("{ended}: {said}"));
    }
    if sum((true, true)) == 0 || sum((false, true)) > 0 || sum((false, false)) == 0 {
        return Err(format!("answers: {counts:?}"));
    }
    guest.finish(context)?;
    Ok(PASSED)
}

/// The process of all is killed while some of its clones are frozen, written down, or go back: who asked hears of it, and
/// nothing is left that the next one would stumble over.
fn killed(context: &Context) -> Checked {
    let guest = warm(context, WAITS)?;
    let file = context.work().join("killed.snap");
    let file = file.to_string_lossy();
    let rounds = kills(context, 10);
    for round in 0..rounds {
        let name = format!("k{round}");
        let options = [&PROCESS[..], &["-n", "3"]].concat();
        let forks = Forks::of("warm", context, &name, &options)?;
        forks.wait_for_all(3)?;
        let first = format!("{name}-1");
        let verbs: [&[&str]; 3] = [
            &["freeze", &first],
            &["snapshot", &first, &file],
            &["reset", &first],
        ];
        let mut asks = start(context, verbs[round as usize % 3], None)?;
        std::thread::sleep(Duration::from_micros(u64::from(round * 7919 % 61) * 500));
        // Kills it.
        drop(forks);
        let ended = process::wait_within(&mut asks.0, context.timeout / 3)?;
        if !matches!(ended.code(), Some(0 | 125)) {
            return Err(format!("round {round}: {ended}"));
        }
        let again = [&["fork", "warm", "--name", &name], &PROCESS[..]].concat();
        expect(&vmm_with(context, &again, b"")?, 0, "clone 1\n")?;
    }
    let left = fs::read_dir(context.work().join("vmm")).map_err(text)?;
    let left: Vec<_> = left.flatten().map(|entry| entry.file_name()).collect();
    if left.len() != 2 {
        return Err(format!("left: {left:?}"));
    }
    guest.finish(context)?;
    Ok(PASSED)
}

pub(crate) fn cases() -> Vec<Case> {
    [
        ("together/names", names as fn(&Context) -> Checked),
        ("together/numbers", numbers),
        ("together/freezes-itself", freezes_itself),
        ("together/grown", grown),
        ("together/hammered", hammered),
        ("together/killed", killed),
    ]
    .into_iter()
    .map(|(name, body)| Case::function(name, body).needs(&["busybox"]))
    .map(|case| case.not_native(ONLY_VMM).seconds(300))
    .collect()
}
