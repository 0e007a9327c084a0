//! The options of `vmm run`.

use std::time::Duration;

use rustix::process::Signal;
use tests::case::{Case, Checked, Expect, Launch, PASSED, Verdict, check};
use tests::context::Context;
use tests::process::{self, Limits};

const ONLY_VMM: &str = "it is about an option of vmm";

fn exactly(name: &str, launch: Launch, status: i32, out: &str) -> Case {
    Case::new(
        &format!("options/{name}"),
        launch,
        Expect::Exactly(status, out.to_owned()),
    )
    .not_native(ONLY_VMM)
}

fn status(name: &str, launch: Launch, status: i32) -> Case {
    Case::new(&format!("options/{name}"), launch, Expect::Status(status)).not_native(ONLY_VMM)
}

fn busybox(args: &[&str], options: &[&str]) -> Launch {
    Launch::new("busybox", args).options(options)
}

/// What is written under --rw is there afterwards, with the names and modes it was given.
/// Needs more page tables than there are, while there are pages.
fn sparse(how: &str) -> Launch {
    let small = ["--memory", "32M", "--overcommit"];
    Launch::new("{programs}/sparse", &[how]).options(&small)
}

fn writes_arrive(context: &Context) -> Checked {
    context.write("data/old", "old\n", 0o600)?;
    let line = "cd /data && cat old && echo new > new && mkdir -p a/b && mv old a/b/moved && chmod 750 a && ln -s new link && ls";
    let launch = busybox(&["sh", "-c", line], &["--rw", "{work}/data:/data"]);
    let output = context.run(&launch)?;
    check(
        &Expect::Exactly(0, "old\na\nlink\nnew\n".to_owned()),
        &output,
    )?;
    let data = context.work().join("data");
    let read =
        |name: &str| std::fs::read_to_string(data.join(name)).map_err(|e| format!("{name}: {e}"));
    if read("new")? != "new\n" || read("a/b/moved")? != "old\n" || data.join("old").exists() {
        return Err("the folder does not have what was written".to_owned());
    }
    let link = std::fs::read_link(data.join("link")).map_err(|e| e.to_string())?;
    if link.as_os_str() != "new" {
        return Err(format!("the link goes to {}", link.display()));
    }
    Ok(PASSED)
}

/// Nothing under --root can be changed. The root is the case's own, and so are the names: a VMM that
/// does not confine must not be able to do harm here.
fn root_is_read_only(context: &Context) -> Checked {
    let file = context.write("vmm-test-root/vmm-test-file", "kept\n", 0o644)?;
    let line = "echo x > /vmm-test-new; echo $?; rm -f /vmm-test-file; echo $?; mkdir /vmm-test-dir; echo $?; \
        mv /vmm-test-file /vmm-test-moved; echo $?; echo x >> /vmm-test-file; echo $?; chmod 700 /vmm-test-file; echo $?";
    let busybox = context.find("busybox")?;
    let copy = context.work().join("vmm-test-root/busybox");
    std::fs::copy(busybox, copy).map_err(|e| e.to_string())?;
    let launch =
        Launch::new("/busybox", &["sh", "-c", line]).options(&["--root", "{work}/vmm-test-root"]);
    let output = context.run(&launch)?;
    check(&Expect::Exactly(0, "1\n".repeat(6)), &output)?;
    let names = std::fs::read_dir(context.work().join("vmm-test-root"))
        .map_err(|e| e.to_string())?
        .count();
    match std::fs::read_to_string(&file) {
        Ok(text) if text == "kept\n" && names == 2 => Ok(PASSED),
        other => Err(format!("changed: {other:?}, {names} names")),
    }
}

/// `--strace` shows calls on standard error and changes nothing else.
fn strace(context: &Context) -> Checked {
    let output = context.run(&busybox(&["echo", "traced"], &["--strace"]))?;
    check(&Expect::Exactly(0, "traced\n".to_owned()), &output)?;
    let err = output.err();
    match ["write(1", "exit_group(0"]
        .iter()
        .find(|call| !err.contains(**call))
    {
        None => Ok(PASSED),
        Some(call) => Err(format!("no `{call}` in\n{err}")),
    }
}

/// The statistics count what was done.
fn statistics(context: &Context) -> Checked {
    let mut words = context.prefix(&["--stats=json".to_owned()]);
    words.extend(["busybox", "sh", "-c", "(exit 1); (exit 2); echo hi"].map(str::to_owned));
    let limits = tests::process::Limits {
        timeout: context.timeout,
        signal: None,
    };
    let output = tests::process::run(&mut context.command(&words), b"", &limits)
        .map_err(|e| e.to_string())?;
    let err = output.err();
    let line = err.lines().last().unwrap_or_default();
    let value: serde_json::Value =
        serde_json::from_str(line).map_err(|e| format!("{e}: {line}"))?;
    let number = |path: &str| value.pointer(path).and_then(serde_json::Value::as_u64);
    let forks = number("/memory/forks");
    let (calls, in_use) = (number("/exits/syscalls"), number("/memory/frames_in_use"));
    if forks == Some(2) && calls.is_some_and(|n| n > 10) && in_use == Some(0) {
        return Ok(PASSED);
    }
    Err(format!(
        "forks {forks:?}, calls {calls:?}, in use {in_use:?}: {line}"
    ))
}

/// Much more than the machine has: the program is told, and the VMM goes on.
fn memory_runs_out(context: &Context) -> Checked {
    // sort and tr hold all their input, and either may be the one that ends; the line does not fit into the memory.
    let (memory, line) = context.amount(("24M", 64 << 20), ("8M", 16 << 20));
    let line = format!(
        "set -o pipefail; head -c {line} /dev/zero | tr '\\0' x | sort > /dev/null; echo status $?; echo still here"
    );
    let launch = busybox(&["sh", "-c", &line], &["--memory", memory]);
    let output = context.run(&launch)?;
    if output.status == 0
        && output.out().ends_with("still here\n")
        && !output.out().contains("status 0")
    {
        return Ok(PASSED);
    }
    Err(format!(
        "status {}: {}{}",
        output.status,
        output.out(),
        output.err()
    ))
}

/// Started where its parent's session began outside the PID namespace, as in a container: the
/// session's number is 0 there.
fn session_from_outside(context: &Context) -> Checked {
    if !context.is_root() {
        return Ok(Verdict::Skipped(
            "only root can make a PID namespace".to_owned(),
        ));
    }
    let mut words = context.prefix(&[]);
    words.extend(["busybox", "echo", "started"].map(str::to_owned));
    // Something after it, or the shell would become the VMM and be process 1 itself.
    let line = "\"$@\"; exit $?";
    let mut outer = ["unshare", "--pid", "--fork", "sh", "-c", line, "sh"]
        .map(str::to_owned)
        .to_vec();
    outer.extend(words);
    let limits = Limits {
        timeout: Duration::from_secs(60),
        signal: None,
    };
    let output = process::run(&mut context.command(&outer), b"", &limits)
        .map_err(|e| format!("unshare: {e}"))?;
    check(&Expect::Exactly(0, "started\n".to_owned()), &output)
}

pub(crate) fn cases() -> Vec<Case> {
    let sleeps = |options: &[&str]| busybox(&["sleep", "60"], options);
    let spins = "while :; do :; done";
    let stop = |signal| sleeps(&[]).signal(Duration::from_secs(2), signal);
    let all = vec![
        status("tables_run_out", sparse("touch"), 137),
        status("tables_run_out_in_a_call", sparse("read"), 137),
        status("timeout_of_a_sleeper", sleeps(&["--timeout", "1"]), 124),
        status(
            "timeout_of_a_spinner",
            busybox(&["sh", "-c", spins], &["--timeout", "1"]),
            124,
        ),
        status(
            "timeout_of_a_family",
            busybox(
                &["sh", "-c", "sleep 60 | cat & sleep 60 & wait"],
                &["--timeout", "1"],
            ),
            124,
        ),
        exactly(
            "timeout_that_is_not_reached",
            busybox(&["echo", "in time"], &["--timeout", "50"]),
            0,
            "in time\n",
        ),
        status("terminated", stop(Signal::TERM), 143),
        status("interrupted", stop(Signal::INT), 130),
        status("hung_up", stop(Signal::HUP), 129),
        exactly(
            "interrupt_is_caught",
            busybox(
                &[
                    "sh",
                    "-c",
                    "trap 'echo caught; exit 9' INT; while :; do sleep 1; done",
                ],
                &[],
            )
            .signal(Duration::from_secs(2), Signal::INT),
            9,
            "caught\n",
        ),
        exactly(
            "environment",
            busybox(
                &["sh", "-c", "echo \"$A|$B\""],
                &["--env", "A=one two", "-e", "B=x=y"],
            ),
            0,
            "one two|x=y\n",
        ),
        exactly(
            "workdir",
            busybox(&["pwd"], &["--root", "/", "--workdir", "/usr/bin"]),
            0,
            "/usr/bin\n",
        ),
        exactly(
            "tmpfs",
            busybox(
                &[
                    "sh",
                    "-c",
                    "cd /t && echo a > f && mkdir d && mv f d/g && cat d/g && ls -R && rm -r d && ls | wc -l",
                ],
                &["--tmpfs", "/t"],
            ),
            0,
            "a\n.:\nd\n\n./d:\ng\n0\n",
        ),
        exactly(
            "arguments_that_look_like_options",
            busybox(&["echo", "--memory", "-x", "--"], &[]),
            0,
            "--memory -x --\n",
        ),
        Case::function("options/rw_writes_arrive", writes_arrive),
        Case::function("options/root_is_read_only", root_is_read_only),
        Case::function("options/strace", strace),
        Case::function("options/session_from_outside", session_from_outside).needs(&["unshare"]),
        Case::function("options/statistics", statistics),
        Case::function("options/memory_runs_out", memory_runs_out).seconds(120),
    ];
    let paging = |case: &Case| case.name.contains("memory");
    let all = all.into_iter().map(|case| case.needs(&["busybox"]));
    all.map(|case| {
        if paging(&case) {
            case
        } else {
            case.any_paging()
        }
    })
    .collect()
}
