//! Memory that processes share, and files in memory, out of a snapshot on a disk: read when somebody wants them.

use std::fs;
use std::io::Write;
use std::process::{ChildStdin, Stdio};

use tests::case::{Case, Checked, PASSED};
use tests::context::Context;
use tests::process;

use super::clones_shared;
use super::snapshot::{Guest, ONLY_VMM, command, expect, snapshot, succeed, vmm_with};

/// Pages of the file in memory, which nobody maps.
const PAGES: usize = 128;
/// Their bytes.
const BYTES: &str = "524288";
/// Fills it; says what is in it for each line of its input.
const PROGRAM: &str = "busybox yes 0123456789abcde | busybox head -c $0 > /dev/shm/file; echo READY
    while read line; do busybox md5sum < /dev/shm/file; done; echo end";
/// Pages of a shell that may have changed.
const SMALL: u64 = PAGES as u64 / 2;
/// What each of the file's pages begins with.
const LINE: &[u8] = b"0123456789abcde\n";
const PAGE: usize = 4096;

/// Two processes have all that they shared, by mappings and by descriptors, and store to it.
fn stores(context: &Context) -> Checked {
    let guest = clones_shared::launch(context, 80)?;
    let path = snapshot(context)?;
    clones_shared::end(context, guest)?;
    let words = ["restore", &path, "--env", "MODE=write"];
    expect(&vmm_with(context, &words, b"")?, 0, "written 7\nok\n")?;
    expect(
        &vmm_with(context, &["restore", &path], b"")?,
        0,
        "as it was\n",
    )?;
    Ok(PASSED)
}

/// A file in memory is not read before somebody wants it, neither for the guest nor for a snapshot that builds on the one it is in.
fn lazily(context: &Context) -> Checked {
    let guest = Guest::start(context, &["busybox", "sh", "-c", PROGRAM, BYTES])?;
    let path = snapshot(context)?;
    let printed = guest.finish_with(context, b"x\n")?;
    let sum = printed.lines().nth(1).unwrap_or_default().to_owned();
    // Of nothing it would be this.
    if sum.len() < 32 || sum.starts_with("d41d8cd98f00b204") {
        return Err(format!("the original: {printed:?}"));
    }
    let expected = format!("{sum}\nend\n");
    let place = |name: &str| context.work().join(name).to_string_lossy().into_owned();
    let (difference, output) = (place("difference"), place("again"));
    let mut again = command(context, &["restore", &path, "--name", "again"]);
    let file = fs::File::create(&output).map_err(|e| e.to_string())?;
    let again = again.stdin(Stdio::piped()).stdout(file).spawn();
    let mut again = again.map_err(|e| e.to_string())?;
    let words = ["snapshot", "again", &difference, "--base", &path];
    let written = succeed(context, &words).and_then(|_| length(&difference));
    again.stdin.take().map_or(Ok(()), go_on)?;
    process::wait_within(&mut again, context.timeout)?;
    let written = written? / PAGE as u64;
    if written > SMALL {
        return Err(format!("{written} pages written"));
    }
    let printed = fs::read_to_string(&output).map_err(|e| e.to_string())?;
    if printed != expected {
        return Err(format!("{printed:?}, not {expected:?}"));
    }
    let words = ["restore", &difference, "--base", &path];
    expect(&vmm_with(context, &words, b"x\n")?, 0, &expected)?;
    damage(&path)?;
    let output = vmm_with(context, &["restore", &path], b"x\n")?;
    let said = output.err();
    let lines = said.lines().filter(|line| line.starts_with("vmm: "));
    let lines: Vec<_> = lines.collect();
    let damaged = lines.len() == 1 && lines[0].contains("damaged");
    if output.status != 125 || !damaged || output.out().contains(&sum) {
        return Err(format!("{} {} {said}", output.status, output.out()));
    }
    Ok(PASSED)
}

/// Its input, and the end of that.
fn go_on(mut input: ChildStdin) -> Result<(), String> {
    input.write_all(b"x\n").map_err(|e| e.to_string())
}

fn length(path: &str) -> Result<u64, String> {
    Ok(fs::metadata(path).map_err(|e| e.to_string())?.len())
}

/// Flips a bit in each page of the file in memory, as a disk might: the snapshot's time is what it was.
fn damage(path: &str) -> Result<(), String> {
    let text = |error: std::io::Error| error.to_string();
    let mut bytes = fs::read(path).map_err(text)?;
    let time = fs::metadata(path).and_then(|found| found.modified());
    let pages = bytes.chunks_mut(PAGE).filter(|page| page.starts_with(LINE));
    let damaged = pages.map(|page| page[100] ^= 4).count();
    if damaged < PAGES {
        return Err(format!("{damaged} pages of the file in the snapshot"));
    }
    fs::write(path, &bytes).map_err(text)?;
    let file = fs::File::options().write(true).open(path);
    let set = file.and_then(|file| file.set_modified(time?));
    set.map_err(text)
}

pub(crate) fn cases() -> Vec<Case> {
    [
        Case::function("snapshot/shared-stores", stores),
        Case::function("snapshot/shared-lazily", lazily).needs(&["busybox"]),
    ]
    .map(|case| case.not_native(ONLY_VMM).seconds(120))
    .into()
}
