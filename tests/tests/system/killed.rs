//! What is left when somebody kills a VMM, or a command that asks it for something, at a random moment: nothing, and a snapshot's
//! file is as it was. `VMM_KILLS` sets how often. (While a snapshot is written: `snapshot/killed`; while clones start: `clones/abandoned`.)

use std::fs;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use tests::case::{Case, Checked, PASSED};
use tests::context::Context;
use tests::process;

use super::snapshot::{ONLY_VMM, Sums, command, expect, kills, snapshot, succeed, vmm_with};

/// Another moment every time, from none to 30 ms.
fn moment(round: u32) -> Duration {
    Duration::from_micros(u64::from(round * 7919 % 61) * 500)
}

fn spawn(context: &Context, words: &[&str]) -> Result<Child, String> {
    let mut command = command(context, words);
    let quiet = command.stdin(Stdio::null()).stdout(Stdio::null());
    quiet
        .stderr(Stdio::null())
        .spawn()
        .map_err(|e| e.to_string())
}

fn kill(child: &mut Child) -> Result<(), String> {
    let killed = child.kill().and_then(|()| child.wait());
    killed.map(drop).map_err(|e| e.to_string())
}

/// Nobody is running, and no run directory is left once somebody has looked.
fn nobody(context: &Context) -> Result<(), String> {
    let until = Instant::now() + context.timeout / 8;
    let list = loop {
        let list = succeed(context, &["ps"])?.out();
        if list.lines().count() <= 1 || Instant::now() > until {
            break list;
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    let names = fs::read_dir(context.work().join("vmm")).map_err(|e| e.to_string())?;
    let names = names.flatten().map(|entry| entry.file_name());
    let left: Vec<_> = names.filter(|name| name != ".lock").collect();
    match (list.lines().count(), left.is_empty()) {
        (0 | 1, true) => Ok(()),
        _ => Err(format!("left: {left:?}; {list}")),
    }
}

/// A VMM that is killed while it is frozen: who asked hears of it, and nothing is left.
fn freeze(context: &Context) -> Checked {
    let sums = Sums::of_lines(context);
    for round in 0..kills(context, 15) {
        let mut guest = sums.start(context)?;
        let verb = ["freeze", "fork"][round as usize % 2];
        let mut asks = spawn(context, &[verb, "warm"])?;
        std::thread::sleep(moment(round));
        guest.kill()?;
        process::wait_within(&mut asks, context.timeout)?;
        nobody(context).map_err(|why| format!("round {round}: {why}"))?;
    }
    Ok(PASSED)
}

/// A VMM that is killed while it makes a guest of a file: the file is the same, and can be used again.
fn restore(context: &Context) -> Checked {
    let sums = Sums::of_lines(context);
    let path = {
        let _guest = sums.start(context)?;
        snapshot(context)?
    };
    let before = fs::read(&path).map_err(|e| e.to_string())?;
    for round in 0..kills(context, 15) {
        let mut restores = spawn(context, &["restore", &path, "--name", "again"])?;
        std::thread::sleep(moment(round));
        kill(&mut restores)?;
        nobody(context).map_err(|why| format!("round {round}: {why}"))?;
    }
    if fs::read(&path).map_err(|e| e.to_string())? != before {
        return Err("the file has changed".to_owned());
    }
    let again = vmm_with(context, &["restore", "--verify", &path], b"sum\n")?;
    expect(&again, 0, &sums.printed)?;
    Ok(PASSED)
}

/// A command that is killed while it waits for its answer: the guest goes on, and the next command is answered.
fn asks(context: &Context) -> Checked {
    let sums = Sums::of_lines(context);
    let guest = sums.start(context)?;
    let path = snapshot(context)?;
    for round in 0..kills(context, 15) {
        let words: &[&str] = match round % 3 {
            0 => &["freeze", "warm"],
            1 => &["snapshot", "warm", &path],
            _ => &["fork", "warm", "--anew", "-n", "2"],
        };
        let mut asks = spawn(context, words)?;
        std::thread::sleep(moment(round));
        kill(&mut asks)?;
    }
    let again = vmm_with(context, &["restore", "--verify", &path], b"sum\n")?;
    expect(&again, 0, &sums.printed)?;
    succeed(context, &["snapshot", "warm", &path])?;
    let again = vmm_with(context, &["restore", "--verify", &path], b"sum\n")?;
    expect(&again, 0, &sums.printed)?;
    let printed = guest.finish(context)?;
    match printed.as_str() {
        "READY\n" => Ok(PASSED),
        _ => Err(format!("the original: {printed:?}")),
    }
}

pub(crate) fn cases() -> Vec<Case> {
    [
        ("killed/freeze", freeze as fn(&Context) -> Checked),
        ("killed/restore", restore),
        ("killed/asks", asks),
    ]
    .map(|(name, body)| Case::function(name, body).seconds(900))
    .map(|case| case.not_native(ONLY_VMM).needs(&["busybox"]))
    .into()
}
