//! Memory that processes share, in clones: the template's pages until they are stored to (`guest/programs/frozen_shared.c`).

use std::fs;
use std::time::{Duration, Instant};

use tests::case::{Case, Checked, PASSED};
use tests::context::Context;

use super::clones_reset::{lines, start};
use super::snapshot::{Guest, ONLY_VMM, succeed};

/// Pages of each kind of memory; fewer where all is emulated, but several runs of those that are kept together.
fn pages(context: &Context) -> u64 {
    context.amount(8 << 8, 80)
}

/// The same where it is to be seen that clones take no frames for them: many more than [`SMALL`].
fn many_pages(context: &Context) -> u64 {
    context.amount(8 << 8, 1 << 8)
}

/// Frames a clone may take for what it has besides.
const SMALL: u64 = 512;

pub(crate) fn launch(context: &Context, pages: u64) -> Result<Guest, String> {
    let program = context.program("frozen_shared");
    let words = [&*program.to_string_lossy(), &pages.to_string()];
    Guest::launch(context, &["--ready-freeze"], &words)
}

pub(crate) fn end(context: &Context, guest: Guest) -> Checked {
    match guest.finish(context)? {
        printed if printed == "original\nas it was\n" => Ok(PASSED),
        printed => Err(format!("the original: {printed:?}")),
    }
}

fn wants(context: &Context, name: &str, wanted: &str) -> Result<(), String> {
    let printed = fs::read_to_string(context.work().join(name)).map_err(|e| e.to_string())?;
    match printed == wanted {
        true => Ok(()),
        false => Err(format!("{name}: {printed:?}, not {wanted:?}")),
    }
}

/// Two processes of each clone store to all that they share, by mappings and by descriptors, cut it and make holes in it. The original and
/// clones that come later have what was there.
fn stores(context: &Context) -> Checked {
    let guest = launch(context, pages(context))?;
    let output = context.work().join("out.%i");
    let output = output.to_string_lossy();
    let clones = context.amount(3, 2);
    for isolation in ["vm", "process"] {
        let words = [
            "fork",
            "warm",
            "-n",
            &clones.to_string(),
            "--env",
            "MODE=write",
        ];
        let how = ["--isolation", isolation, "--stdout", &output];
        succeed(context, &[&words[..], &how].concat())?;
        for n in 1..=clones {
            wants(context, &format!("out.{n}"), &format!("written {n}\nok\n"))?;
        }
    }
    end(context, guest)
}

/// A clone that stored to all of it is a template too, and its clones have what it stored.
fn deeper(context: &Context) -> Checked {
    let guest = launch(context, pages(context))?;
    let path = |name: &str| context.work().join(name).to_string_lossy().into_owned();
    let env = ["--env", "MODE=write", "--env", "WAIT=1"];
    let output = path("first");
    let words = ["fork", "warm", "--name", "second", "--stdout", &output];
    let words = [&words[..], &env].concat();
    let mut first = start(context, &words, None)?;
    lines(context, &context.work().join("first"), 2)?;
    let words = ["fork", "second-1", "-n", "2", "--env", "DEEPER=1"];
    succeed(
        context,
        &[&words[..], &["--stdout", &path("deep.%i")]].concat(),
    )?;
    for n in 1..=2 {
        wants(
            context,
            &format!("deep.{n}"),
            &format!("deeper {n} of 1\nok\n"),
        )?;
    }
    let status = first.0.wait().map_err(|e| e.to_string())?;
    if !status.success() {
        return Err(format!("the first clone: {status}"));
    }
    wants(context, "first", "written 1\nrests\nok\n")?;
    end(context, guest)
}

/// A clone that reads all of it, mapped and by descriptor, takes no frames for it.
fn reads(context: &Context) -> Checked {
    let guest = launch(context, many_pages(context))?;
    let path = context.work().join("reader");
    let output = path.to_string_lossy();
    let words = ["fork", "warm", "--name", "reader", "--env", "MODE=read"];
    let fork = start(
        context,
        &[&words[..], &["--stdout", &output]].concat(),
        None,
    )?;
    lines(context, &path, 1)?;
    let seen = succeed(context, &["inspect", "reader-1", "--json"])?.stdout;
    succeed(context, &["kill", "reader-1"])?;
    drop(fork);
    let seen: serde_json::Value = serde_json::from_slice(&seen).map_err(|e| e.to_string())?;
    let processes = seen["processes"].as_array().into_iter().flatten();
    let frozen = processes.filter_map(|p| p["frozen"].as_u64()).sum::<u64>();
    let zone = &seen["zones"][0]["states"];
    let states = ["active", "standby", "modified"].map(|state| zone[state].as_u64());
    let few = states.iter().all(|n| n.is_some_and(|n| n < SMALL));
    // Each process maps all of it: three kinds.
    let shared = 3 * many_pages(context);
    if frozen < 2 * shared || !few {
        return Err(format!("{frozen} frozen, {states:?}: {seen}"));
    }
    end(context, guest)
}

/// A clone that stores to all of it, and is reset, finds it as it was, again and again.
fn again(context: &Context) -> Checked {
    let guest = launch(context, pages(context))?;
    let path = context.work().join("again");
    let output = path.to_string_lossy();
    let words = ["fork", "warm", "--name", "again", "--env", "MODE=again"];
    let fork = start(
        context,
        &[&words[..], &["--stdout", &output]].concat(),
        None,
    )?;
    let until = Instant::now() + context.timeout / 2;
    for round in 1..=4 {
        while lines(context, &path, round)? != vec!["changed"; round] {
            if Instant::now() > until {
                return Err(format!("{:?}", fs::read_to_string(&path)));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        succeed(context, &["reset", "again-1"])?;
    }
    succeed(context, &["kill", "again-1"])?;
    drop(fork);
    end(context, guest)
}

pub(crate) fn cases() -> Vec<Case> {
    [
        Case::function("clones/shared-stores", stores),
        Case::function("clones/shared-deeper", deeper),
        Case::function("clones/shared-reads", reads),
        Case::function("clones/shared-reset", again),
    ]
    .map(|case| case.not_native(ONLY_VMM).seconds(120))
    .into()
}
