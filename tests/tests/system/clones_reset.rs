//! `vmm reset`: clones, and guests out of a snapshot, go back to where they began.

use std::fs;
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use tests::case::{Case, Checked, PASSED};
use tests::context::Context;

use super::snapshot::{Guest, ONLY_VMM, command, refused, snapshot, succeed};

/// A command that is ended with the case.
pub(crate) struct Running(pub(crate) Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub(crate) fn start(
    context: &Context,
    words: &[&str],
    output: Option<&Path>,
) -> Result<Running, String> {
    let mut command = command(context, words);
    if let Some(path) = output {
        command.stdout(fs::File::create(path).map_err(|e| e.to_string())?);
    }
    let child = command.stdin(Stdio::null()).spawn();
    Ok(Running(child.map_err(|e| e.to_string())?))
}

/// Waits until a file has so many lines, and gives them.
pub(crate) fn lines(context: &Context, path: &Path, count: usize) -> Result<Vec<String>, String> {
    let until = Instant::now() + context.timeout / 2;
    loop {
        let text = fs::read_to_string(path).unwrap_or_default();
        if text.matches('\n').count() >= count {
            return Ok(text.lines().map(str::to_owned).collect());
        }
        if Instant::now() > until {
            return Err(format!("{count} lines do not come: {text:?}"));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A clone that changes what it has is as it was made after each reset; the other one does not notice, and a guest that is
/// no clone is left alone.
fn clones(context: &Context, isolation: &str) -> Checked {
    let line = "x=warm; echo warm > /tmp/file; echo freeze > /dev/vmm; read -r role n rest < /dev/vmm; \
                echo $role $n $x $(cat /tmp/file) $(ls /tmp | wc -l); [ $role = clone ] || { read -r end; exit 0; }; \
                x=cold; echo cold > /tmp/file; echo 1 > /tmp/other; sleep 1000 & \
                echo changed; while :; do [ $n = 1 ] || sleep 1; done";
    let options = ["--ready-freeze", "--tmpfs", "/tmp"];
    let guest = Guest::launch(context, &options, &["busybox", "sh", "-c", line])?;
    refused(context, &["reset", "warm"], "not made of a template")?;
    let output = context.work().join("out.%i");
    let output = output.to_string_lossy();
    let words = ["fork", "warm", "--isolation", isolation, "-n", "2"];
    let names = ["--name", "again", "--stdout", &output];
    let mut fork = start(context, &[&words[..], &names[..]].concat(), None)?;
    let outputs = ["1", "2"].map(|n| context.work().join(output.replace("%i", n)));
    lines(context, &outputs[1], 2)?;
    for round in 1..=4 {
        let said = lines(context, &outputs[0], round * 2)?;
        if said != ["clone 1 warm warm 1", "changed"].repeat(round) {
            return Err(format!("{said:?}"));
        }
        succeed(context, &["reset", "again-1"])?;
    }
    let ps = succeed(context, &["ps"])?;
    if !ps.out().contains("again-1") || lines(context, &outputs[1], 2)?.len() != 2 {
        return Err(format!("the other clone, or the name: {}", ps.out()));
    }
    for name in ["again-1", "again-2"] {
        succeed(context, &["kill", name])?;
    }
    let status = fork.0.wait().map_err(|e| e.to_string())?;
    if status.code() != Some(137) {
        return Err(format!("the clones' end: {status}"));
    }
    refused(context, &["reset", "again-1"], "no guest `again-1`")?;
    refused(context, &["reset", "nobody"], "no guest `nobody`")?;
    refused(context, &["reset"], "GUEST")?;
    guest.finish(context)?;
    Ok(PASSED)
}

/// A guest out of a snapshot goes back to that.
fn restored(context: &Context) -> Checked {
    let line = "n=0; echo READY; while :; do echo tick $n; n=$((n+1)); sleep 0.1; done";
    let guest = Guest::start_in(context, &[], &["busybox", "sh", "-c", line])?;
    let file = snapshot(context)?;
    drop(guest);
    let output = context.work().join("restored");
    let words = ["restore", &file, "--name", "back"];
    let _restored = start(context, &words, Some(&output))?;
    let first = lines(context, &output, 3)?;
    succeed(context, &["reset", "back"])?;
    // As many as there may have been, and then some.
    let after = lines(context, &output, first.len() + 30)?;
    let again = after.iter().skip(1).filter(|line| **line == first[0]);
    match again.count() {
        1 => Ok(PASSED),
        times => Err(format!("{times} times: {after:?}")),
    }
}

/// Clones find the FPU and vector state of the template, and after a reset find it again; what they had meanwhile is gone.
fn fpu(context: &Context) -> Checked {
    let program = context.program("fpu").to_string_lossy().into_owned();
    let guest = Guest::launch(context, &["--ready-freeze"], &[&program, "held"])?;
    let output = context.work().join("out.%i").to_string_lossy().into_owned();
    let words = [
        "fork", "warm", "-n", "2", "--name", "again", "--stdout", &output,
    ];
    let _fork = start(context, &words, None)?;
    for round in 1..=4 {
        for number in ["1", "2"] {
            let said = lines(context, Path::new(&output.replace("%i", number)), round)?;
            if said != vec![format!("{number} same"); round] {
                return Err(format!("clone {number}: {said:?}"));
            }
            succeed(context, &["reset", &format!("again-{number}")])?;
        }
    }
    match guest.finish(context)?.as_str() {
        "0 same\n" => Ok(PASSED),
        said => Err(format!("the original: {said}")),
    }
}

pub(crate) fn cases() -> Vec<Case> {
    [
        Case::function("clones/reset", |context| clones(context, "vm")),
        Case::function("together/reset", |context| clones(context, "process")),
        Case::function("clones/reset-fpu", fpu),
        Case::function("clones/reset-restored", restored),
    ]
    .map(|case| case.needs(&["busybox"]).not_native(ONLY_VMM).seconds(120))
    .into()
}
