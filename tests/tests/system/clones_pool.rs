//! `vmm pool`: a template that outlives its guest, with machines that wait for clones.

use std::time::{Duration, Instant};

use tests::case::{Case, Checked, PASSED};
use tests::context::Context;

use super::clones_reset::{Running, start};
use super::clones_workers::{Forks, WAITS, warm};
use super::snapshot::{ONLY_VMM, refused, succeed, vmm_with};

/// A pool of `warm` that is ready, of so many machines.
fn pool(context: &Context, machines: &str) -> Result<Running, String> {
    let pool = start(context, &["pool", "warm", "--machines", machines], None)?;
    wait_for(context, |pool| pool["ready"] == true)?;
    Ok(pool)
}

/// Waits until the pool says of itself what it should.
fn wait_for(context: &Context, seen: impl Fn(&serde_json::Value) -> bool) -> Result<(), String> {
    let until = Instant::now() + context.timeout / 3;
    loop {
        let listed = succeed(context, &["ps", "--json"])?;
        let listed: serde_json::Value =
            serde_json::from_slice(&listed.stdout).map_err(|e| e.to_string())?;
        let guests = listed.as_array().into_iter().flatten();
        let mut pools = guests.filter(|hello| hello["pool"].is_object());
        if pools.next().is_some_and(&seen) {
            return Ok(());
        }
        if Instant::now() > until {
            return Err(format!("the pool: {listed}"));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Clones one after the other, after the guest has ended: each finds what it was given, and leaves its machine.
fn serves(context: &Context) -> Checked {
    let guest = warm(context, WAITS)?;
    let pool = pool(context, "2")?;
    guest.finish(context)?;
    refused(context, &["fork", "warm"], "no guest `warm`")?;
    for n in 1..=6 {
        let input = context.write("in", format!("line {n}\nend\n"), 0o644)?;
        let input = input.to_string_lossy();
        let fork = ["fork", "warm-pool", "--stdin", &input];
        let ended = vmm_with(context, &fork, b"")?;
        if (ended.status, ended.out()) != (0, format!("clone 1\nline {n}\n")) {
            return Err(format!(
                "{n}: {} {} {}",
                ended.status,
                ended.out(),
                ended.err()
            ));
        }
    }
    wait_for(context, |pool| {
        pool["pool"]["machines"] == 2 && pool["pool"]["copies"] == 0
    })?;
    // More than wait, at once; nothing to read.
    let ended = vmm_with(context, &["fork", "warm-pool", "-n", "5"], b"")?;
    let mut lines: Vec<_> = ended.out().lines().map(str::to_owned).collect();
    lines.sort();
    let all: Vec<_> = (1..=5).map(|n| format!("clone {n}")).collect();
    if (ended.status, &lines) != (0, &all) {
        return Err(format!("{} {lines:?} {}", ended.status, ended.err()));
    }
    // Other machines than the pool has, and one machine for all.
    for more in [
        &["--cpus", "2"][..],
        &["--isolation", "process"],
        &["--per-process", "1"],
    ] {
        let ended = vmm_with(context, &[&["fork", "warm-pool"], more].concat(), b"")?;
        if (ended.status, ended.out().as_str()) != (0, "clone 1\n") {
            return Err(format!("{more:?}: {} {}", ended.status, ended.err()));
        }
    }
    ends(context, pool)
}

/// The pool ends when it is told to, and leaves nothing.
fn ends(context: &Context, mut pool: Running) -> Checked {
    succeed(context, &["kill", "warm-pool"])?;
    let status = tests::process::wait_within(&mut pool.0, context.timeout / 3)?;
    if !status.success() {
        return Err(format!("the pool ended with {status}"));
    }
    let left = std::fs::read_dir(context.work().join("vmm")).map_err(|e| e.to_string())?;
    let left = left.flatten().map(|entry| entry.file_name());
    let left: Vec<_> = left
        .filter(|name| name != ".lock" && name != "warm")
        .collect();
    match left.is_empty() {
        true => Ok(PASSED),
        false => Err(format!("run directories are left: {left:?}")),
    }
}

/// Two forks at once; one is killed, and its clones with it; then the pool, and the other's.
fn dies(context: &Context) -> Checked {
    let guest = warm(context, WAITS)?;
    let pool = pool(context, "3")?;
    let first = Forks::of("warm-pool", context, "a", &["-n", "2"])?;
    let second = Forks::of("warm-pool", context, "b", &["-n", "3"])?;
    first.wait_for_all(2)?;
    second.wait_for_all(3)?;
    wait_for(context, |pool| pool["pool"]["copies"] == 5)?;
    drop(first);
    second.wait_for("the others go on", |listed| listed.len() == 3)?;
    wait_for(context, |pool| pool["pool"]["copies"] == 3)?;
    succeed(context, &["kill", "b-2"])?;
    wait_for(context, |pool| pool["pool"]["copies"] == 2)?;
    let over = ends(context, pool)?;
    match second.finish()? {
        (Some(125 | 137), said) if said.lines().count() <= 1 => {}
        ended => return Err(format!("{ended:?}")),
    }
    guest.finish(context)?;
    Ok(over)
}

/// What a pool is not.
fn refuses(context: &Context) -> Checked {
    refused(context, &["pool", "nobody"], "no guest `nobody`")?;
    let guest = warm(context, WAITS)?;
    let pool = pool(context, "1")?;
    let taken = ["pool", "warm", "--name", "warm-pool"];
    refused(context, &taken, "a guest with this name is running")?;
    refused(context, &["pool", "warm", "--name", "../x"], "--name ../x")?;
    refused(context, &["pool", "warm", "--machines", "101"], "101")?;
    for verb in ["inspect", "freeze", "reset"] {
        refused(context, &[verb, "warm-pool"], "this is a pool, not a guest")?;
    }
    refused(context, &["fork", "warm-pool", "--anew"], "this is a pool")?;
    refused(context, &["kill", "-s", "STOP", "warm-pool"], "ended only")?;
    guest.finish(context)?;
    ends(context, pool)
}

pub(crate) fn cases() -> Vec<Case> {
    [
        ("pool/serves", serves as fn(&Context) -> Checked),
        ("pool/dies", dies),
        ("pool/refuses", refuses),
    ]
    .into_iter()
    .map(|(name, body)| Case::function(name, body).needs(&["busybox"]))
    .map(|case| case.not_native(ONLY_VMM).seconds(120))
    .collect()
}
