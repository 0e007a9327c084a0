//! `vmm inspect`, run directories, and `--report`.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use tests::case::{Case, Checked, PASSED, Verdict};
use tests::context::Context;
use tests::process::{self, Limits, Output};

const ONLY_VMM: &str = "it is about vmm inspect";

/// A command with run directories of the case's own.
fn command(context: &Context, words: &[String]) -> Command {
    let mut command = context.command(words);
    command.env("XDG_RUNTIME_DIR", context.work());
    command
}

fn inspect(context: &Context, args: &[&str]) -> Result<Output, String> {
    // What starts `vmm run`, and its other subcommand.
    let mut words = context.prefix(&[]);
    let run = words.iter().position(|word| word == "run");
    words.truncate(run.ok_or("no run in the command")?);
    words.push("inspect".to_owned());
    words.extend(args.iter().map(|&arg| arg.to_owned()));
    let limits = Limits {
        timeout: Duration::from_secs(60),
        signal: None,
    };
    process::run(&mut command(context, &words), b"", &limits).map_err(|e| e.to_string())
}

fn json(output: &Output) -> Result<serde_json::Value, String> {
    serde_json::from_slice(&output.stdout).map_err(|e| format!("{e}: {}", output.err()))
}

/// A running guest is listed and shown, as text, JSON and HTML; its name is taken while it runs.
fn running(context: &Context) -> Checked {
    let mut words = context.prefix(&["--name".to_owned(), "looked-at".to_owned()]);
    words.extend(["busybox", "sh", "-c", "sleep 60 & read line"].map(str::to_owned));
    let mut guest = command(context, &words)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .map_err(|e| e.to_string())?;
    let looked = while_it_runs(context, &words);
    // Its input ends, and so it does.
    drop(guest.stdin.take());
    let ended = process::wait_within(&mut guest, Duration::from_secs(60));
    looked?;
    ended?;
    let after = inspect(context, &["looked-at"])?;
    if after.status != 125 || after.err().lines().count() != 1 {
        return Err(format!("after its end: {} {}", after.status, after.err()));
    }
    if context.work().join("vmm/looked-at").exists() {
        return Err("the run directory stays".to_owned());
    }
    Ok(PASSED)
}

fn while_it_runs(context: &Context, again: &[String]) -> Checked {
    let start = Instant::now();
    let names = |value: &serde_json::Value| {
        let processes = value["processes"].as_array().cloned().unwrap_or_default();
        processes
            .iter()
            .filter(|p| p["name"] == "busybox" || p["name"] == "sleep")
            .count()
    };
    let seen = loop {
        let output = inspect(context, &["looked-at", "--json"])?;
        match json(&output) {
            Ok(value) if names(&value) == 2 => break value,
            other if start.elapsed() > Duration::from_secs(20) => {
                return Err(format!("not seen: {other:?}, {}", output.err()));
            }
            Ok(_) | Err(_) => std::thread::sleep(Duration::from_millis(50)),
        }
    };
    for zone in seen["zones"].as_array().ok_or("no zones")? {
        let sum = |value: &serde_json::Value| value.as_u64().unwrap_or(0);
        let states: u64 = zone["states"]
            .as_object()
            .ok_or("no states")?
            .values()
            .map(sum)
            .sum();
        let runs = zone["runs"].as_array().ok_or("no runs")?;
        let frames: u64 = runs.iter().map(|run| sum(&run[0])).sum();
        if zone["frames"] != states || zone["frames"] != frames {
            return Err(format!(
                "{states} frames in states, {frames} in runs of {zone}"
            ));
        }
    }
    let list = inspect(context, &[])?;
    if !list.out().contains("looked-at") {
        return Err(format!("not listed: {}", list.out()));
    }
    let text = inspect(context, &["looked-at", "--maps"])?;
    if text.status != 0 || !text.out().contains("[heap]") || text.out().contains('\x1b') {
        return Err(format!("text: {}{}", text.out(), text.err()));
    }
    let page = context.work().join("page.html");
    inspect(context, &["looked-at", "--html", &page.to_string_lossy()])?;
    let page = std::fs::read_to_string(page).map_err(|e| e.to_string())?;
    if !page.contains("\"looked-at\"") {
        return Err("the page does not have the guest".to_owned());
    }
    let limits = Limits {
        timeout: Duration::from_secs(30),
        signal: None,
    };
    let second =
        process::run(&mut command(context, again), b"", &limits).map_err(|e| e.to_string())?;
    if second.status != 125 || !second.err().contains("a guest with this name is running") {
        return Err(format!("a second one: {} {}", second.status, second.err()));
    }
    Ok(PASSED)
}

/// `--report` keeps the memory as the program's end found it.
fn finished(context: &Context) -> Checked {
    let file = context.work().join("end.json");
    let file = file.to_string_lossy().into_owned();
    let mut words = context.prefix(&["--report".to_owned(), file.clone()]);
    words.extend(["busybox", "sh", "-c", "exit 7"].map(str::to_owned));
    let limits = Limits {
        timeout: Duration::from_secs(60),
        signal: None,
    };
    let ran =
        process::run(&mut command(context, &words), b"", &limits).map_err(|e| e.to_string())?;
    let seen = json(&inspect(context, &[&file, "--json"])?)?;
    let resident = seen["processes"][0]["resident"].as_u64().unwrap_or(0);
    let in_use = seen.pointer("/counters/memory/frames_in_use");
    if ran.status != 7 || seen["status"] != 7 || resident == 0 || in_use != Some(&0.into()) {
        return Err(format!("{}: {seen}", ran.status));
    }
    let text = inspect(context, &[&file])?;
    if !text.out().contains("ended with status 7") {
        return Err(text.out());
    }
    Ok(PASSED)
}

/// What is no guest and no report is refused in one line.
fn refusals(context: &Context) -> Checked {
    let junk = context.write("junk", "{\"format\":1}", 0o644)?;
    let future = context.write("future", "{\"format\":99}", 0o644)?;
    let (junk, future) = (junk.to_string_lossy(), future.to_string_lossy());
    for (args, word) in [
        (vec!["nobody"], "no guest `nobody`"),
        (vec!["../x"], "no guest"),
        (vec![&*junk], "not a report"),
        (vec![&*future], "format 99"),
        (vec!["--maps"], "GUEST"),
        (vec!["x", "--json", "--maps"], "cannot be used with"),
    ] {
        let output = inspect(context, &args)?;
        let one_line = output.err().lines().count() == 1;
        if output.status != 125 || !one_line || !output.err().contains(word) {
            return Err(format!("{args:?}: {} {}", output.status, output.err()));
        }
    }
    Ok(Verdict::Passed(Vec::new()))
}

pub(crate) fn cases() -> Vec<Case> {
    let all = [
        ("running", running as fn(&Context) -> Checked),
        ("finished", finished),
        ("refusals", refusals),
    ];
    all.into_iter()
        .map(|(name, body)| {
            let case = Case::function(&format!("inspect/{name}"), body);
            case.not_native(ONLY_VMM).needs(&["busybox"])
        })
        .collect()
}
