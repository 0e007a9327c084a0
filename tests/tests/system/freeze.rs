//! Guests that are frozen and written down while they run: what is made of it is of one moment, and nobody pays with
//! more than time.

use std::fs;
use std::process::Stdio;
use std::time::Duration;

use tests::case::{Case, Checked, PASSED};
use tests::context::Context;
use tests::process;

use super::snapshot::{Guest, ONLY_VMM, Sums, command, expect, kills, succeed, vmm_with};

/// The program whose threads store to all of their memory all the time, with so many pages for each.
fn busy(context: &Context, more: &[&str], pages: &str) -> Result<Guest, String> {
    let program = context.setup.programs.join("freeze_cut");
    let options = [&["--ready-line", "READY"], more].concat();
    Guest::launch(context, &options, &[&program.to_string_lossy(), pages])
}

/// Nothing was copied while it stood still, what its processes share included.
fn all_was_kept(said: &str) -> Result<(), String> {
    match said.contains("stood still for") && !said.contains("were copied") {
        true => Ok(()),
        false => Err(format!("it said: {said}")),
    }
}

/// Freezes it, and has clones of the template look at themselves. Gives back what was said of the freeze.
fn freeze_and_look(context: &Context, isolation: &str, clones: &str) -> Result<String, String> {
    let input = context.write("input", "x", 0o644)?;
    let input = input.to_string_lossy();
    let output = context.work().join("out.%i");
    let output = output.to_string_lossy();
    let said = succeed(context, &["freeze", "warm"])?.err();
    let words = ["fork", "warm", "-n", clones, "--isolation", isolation];
    let ends = ["--stdin", &input, "--stdout", &output];
    succeed(context, &[&words[..], &ends].concat())?;
    for n in 1..=clones.parse().unwrap_or(1) {
        let printed = fs::read_to_string(output.replace("%i", &format!("{n}")));
        let printed = printed.map_err(|error| error.to_string())?;
        if printed != "ok\n" {
            return Err(format!("clone {n}: {printed}"));
        }
    }
    Ok(said)
}

/// The guest itself has noticed nothing.
fn end(context: &Context, guest: Guest) -> Checked {
    match guest.finish(context)? {
        printed if printed == "READY\nok\n" => Ok(PASSED),
        printed => Err(format!("the original: {printed:?}")),
    }
}

/// Processes, threads, pipes, memory of their own and memory that they share, all of one moment.
fn cut(context: &Context) -> Checked {
    let guest = busy(context, &[], context.amount("300", "100"))?;
    for round in 0..context.amount(8, 2) {
        let isolation = ["vm", "process"][round % 2];
        let looked = freeze_and_look(context, isolation, "2");
        let kept = looked.and_then(|said| all_was_kept(&said));
        kept.map_err(|why| format!("{round}: {why}"))?;
    }
    end(context, guest)
}

/// With nearly all of the machine's memory in use, stores wait for the copy's end, and nobody is killed.
fn tight(context: &Context) -> Checked {
    // Less than half of it is left for copies, of less memory where all is emulated.
    let (memory, pages) = context.amount(("128M", "2200"), ("32M", "480"));
    let guest = busy(context, &["--overcommit", "--memory", memory], pages)?;
    for _ in 0..context.amount(6, 2) {
        succeed(context, &["freeze", "warm"])?;
    }
    freeze_and_look(context, "vm", "1")?;
    end(context, guest)
}

/// The same through a file.
fn written(context: &Context) -> Checked {
    let guest = busy(context, &[], context.amount("300", "100"))?;
    let path = context.work().join("guest.snap");
    let path = path.to_string_lossy();
    for _ in 0..context.amount(4, 2) {
        let said = succeed(context, &["snapshot", "warm", &path])?.err();
        all_was_kept(&said)?;
        let again = vmm_with(context, &["restore", &path], b"x")?;
        expect(&again, 0, "ok\n")?;
    }
    end(context, guest)
}

/// A guest that ends while it is written down: the file has all of it, or is the one that was there.
fn ends(context: &Context) -> Checked {
    let sums = Sums::of_one_line(context);
    let path = context.work().join("guest.snap");
    let path = path.to_string_lossy();
    succeed_and_drop(context, sums.start(context)?, &path)?;
    for round in 0..kills(context, 12) {
        let guest = sums.start(context)?;
        let mut asks = command(context, &["snapshot", "warm", &path]);
        let asks = asks.stdout(Stdio::null()).stderr(Stdio::piped()).spawn();
        let mut asks = asks.map_err(|error| error.to_string())?;
        std::thread::sleep(Duration::from_micros(u64::from(round * 7919 % 61) * 400));
        guest.finish(context)?;
        let ended = process::wait_within(&mut asks, context.timeout)?;
        let mut said = String::new();
        if let Some(stderr) = &mut asks.stderr {
            let read = std::io::Read::read_to_string(stderr, &mut said);
            read.map_err(|error| error.to_string())?;
        }
        let refused = ["has ended", "no guest", "does not answer"].map(|part| said.contains(part));
        if !ended.success() && !refused.contains(&true) {
            return Err(format!("round {round}: {ended} {said}"));
        }
        let again = vmm_with(context, &["restore", "--verify", &path], b"sum\n")?;
        // It may have seen the end of its input before it was written down.
        expect(&again, 0, &sums.printed)
            .or_else(|_| expect(&again, 0, sums.printed.trim_start_matches("sum")))
            .map_err(|why| format!("round {round}: {why}"))?;
    }
    Ok(PASSED)
}

fn succeed_and_drop(context: &Context, guest: Guest, path: &str) -> Result<(), String> {
    succeed(context, &["snapshot", "warm", path])?;
    drop(guest);
    Ok(())
}

pub(crate) fn cases() -> Vec<Case> {
    let ends = Case::function("freeze/ends", ends).needs(&["busybox"]);
    let busy = [
        ("freeze/cut", cut as fn(&Context) -> Checked),
        ("freeze/tight", tight),
        ("freeze/written", written),
    ];
    let busy = busy.map(|(name, body)| Case::function(name, body));
    let all = busy.into_iter().chain([ends]);
    all.map(|case| case.not_native(ONLY_VMM).seconds(300))
        .collect()
}
