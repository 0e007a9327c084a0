//! Running guests written down, made again, and forked: `vmm snapshot`, `restore`, `freeze`, `fork`, `ps`, `kill`.
//!
//! `VMM_KILLS` sets how often the VMM is killed in the cases that kill it at random moments.

use std::fs;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tests::case::{Case, Checked, PASSED, Verdict};
use tests::context::Context;
use tests::process::{self, Limits, Output};
use vmm::Template;
use vmm::control::client;
use vmm::control::protocol::{Request, Response};

pub(crate) const ONLY_VMM: &str = "it is about snapshots";
/// How often the VMM is killed where `VMM_KILLS` does not say: less often where all is emulated.
pub(crate) fn kills(context: &Context, otherwise: u32) -> u32 {
    let kills = std::env::var("VMM_KILLS").ok().and_then(|n| n.parse().ok());
    kills.unwrap_or(context.amount(otherwise, otherwise / 4))
}

/// A guest that fills an array, and prints a line of its input and the sum of all.
pub(crate) struct Sums {
    pub(crate) program: String,
    /// What it prints for `sum`.
    pub(crate) printed: String,
}

impl Sums {
    /// For each line.
    pub(crate) fn of_lines(context: &Context) -> Self {
        Self::new(context, "while (getline line)")
    }

    /// For the first line, or none if there is none.
    pub(crate) fn of_one_line(context: &Context) -> Self {
        Self::new(context, "getline line;")
    }

    fn new(context: &Context, reads: &str) -> Self {
        let count: u64 = context.amount(60_000, 4_000);
        let program = format!(
            "BEGIN {{ for (i = 0; i < {count}; i++) a[i] = i * 7; print \"READY\"; fflush(); \
             {reads} {{ s = 0; for (i = 0; i < {count}; i++) s += a[i]; print line, s / 1000 }} }}"
        );
        let sum = 7 * count * (count - 1) / 2 / 1000;
        Self {
            program,
            printed: format!("sum {sum}\n"),
        }
    }

    pub(crate) fn start(&self, context: &Context) -> Result<Guest, String> {
        Guest::start(context, &["busybox", "awk", &self.program])
    }
}

/// Prints a line for each line of its input, with what it found out before it was ready.
const WARM: &str = "x=warm; echo READY; while read line; do echo $x $line $$; done; echo end";

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// A command with run directories of the case's own.
pub(crate) fn command(context: &Context, words: &[&str]) -> Command {
    let mut command = Command::new(&context.setup.vmm);
    command.args(words).env("XDG_RUNTIME_DIR", context.work());
    command
}

fn vmm(context: &Context, words: &[&str]) -> Result<Output, String> {
    vmm_with(context, words, b"")
}

pub(crate) fn vmm_with(context: &Context, words: &[&str], stdin: &[u8]) -> Result<Output, String> {
    let limits = Limits {
        timeout: context.timeout,
        signal: None,
    };
    process::run(&mut command(context, words), stdin, &limits).map_err(text)
}

pub(crate) fn succeed(context: &Context, words: &[&str]) -> Result<Output, String> {
    let output = vmm(context, words)?;
    match output.status {
        0 => Ok(output),
        status => Err(format!("{words:?}: {status} {}", output.err())),
    }
}

/// A guest that runs, ended when it is dropped.
pub(crate) struct Guest {
    child: Child,
    output: PathBuf,
}

impl Guest {
    /// Starts `program` under the name `warm`, with its output in a file; it is to print READY.
    pub(crate) fn start(context: &Context, program: &[&str]) -> Result<Self, String> {
        Self::start_in(context, &[], program)
    }

    /// The same, with more options.
    pub(crate) fn start_in(
        context: &Context,
        more: &[&str],
        program: &[&str],
    ) -> Result<Self, String> {
        let options = [&["--ready-line", "READY"], more].concat();
        Self::launch(context, &options, program)
    }

    /// Starts `program` with these options, which say when it is ready.
    pub(crate) fn launch(
        context: &Context,
        more: &[&str],
        program: &[&str],
    ) -> Result<Self, String> {
        Self::spawn(context, Self::command(context, more, program))
    }

    /// The same without transparent huge pages: how much memory its VMM takes can be told to the page.
    pub(crate) fn launch_small(
        context: &Context,
        more: &[&str],
        program: &[&str],
    ) -> Result<Self, String> {
        let command = Self::command(context, more, program);
        Self::spawn(context, process::with_small_pages(&command).map_err(text)?)
    }

    fn command(context: &Context, more: &[&str], program: &[&str]) -> Command {
        let mut words = context.prefix(&[]);
        let at = words.len() - 1;
        let memory = ["--memory", "128M"];
        let memory = memory.iter().filter(|_| !more.contains(&memory[0]));
        let options = ["--name", "warm"].iter().chain(memory).chain(more);
        words.splice(at..at, options.map(|&word| word.to_owned()));
        words.extend(program.iter().map(|&word| word.to_owned()));
        let mut command = context.command(&words);
        command.env("XDG_RUNTIME_DIR", context.work());
        command
    }

    fn spawn(context: &Context, mut command: Command) -> Result<Self, String> {
        let output = context.work().join("output");
        let file = fs::File::create(&output).map_err(text)?;
        let child = command
            .stdin(Stdio::piped())
            .stdout(file)
            .spawn()
            .map_err(text)?;
        let guest = Self { child, output };
        guest.wait_ready(context)?;
        Ok(guest)
    }

    /// The number of its VMM's process.
    pub(crate) fn number(&self) -> u32 {
        self.child.id()
    }

    /// Kills its VMM.
    pub(crate) fn kill(&mut self) -> Result<(), String> {
        let killed = self.child.kill().and_then(|()| self.child.wait());
        killed.map(drop).map_err(text)
    }

    /// Ends its input, and waits for its end: what it printed.
    pub(crate) fn finish(self, context: &Context) -> Result<String, String> {
        self.finish_with(context, b"")
    }

    /// The same, after more input.
    pub(crate) fn finish_with(mut self, context: &Context, more: &[u8]) -> Result<String, String> {
        let input = self.child.stdin.take();
        input
            .map_or(Ok(()), |mut input| input.write_all(more))
            .map_err(text)?;
        let ended = process::wait_within(&mut self.child, context.timeout)?;
        if !ended.success() {
            return Err(format!("the original: {ended}"));
        }
        fs::read_to_string(&self.output).map_err(text)
    }

    fn wait_ready(&self, context: &Context) -> Result<(), String> {
        let start = Instant::now();
        let folder = context.work().join("vmm");
        loop {
            // Not a `vmm ps` each time, which would take the guest its processor where there is one.
            let answer = client::ask(&folder, "warm", &Request::Hello);
            if let Ok(Response::Hello { hello, .. }) = &answer
                && hello.ready == Some(true)
            {
                return Ok(());
            }
            if start.elapsed() > context.timeout / 2 {
                let printed = fs::read_to_string(&self.output).unwrap_or_default();
                return Err(format!("not ready: {answer:?} {printed}"));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub(crate) fn snapshot(context: &Context) -> Result<String, String> {
    let path = context.work().join("guest.snap");
    let path = path.to_string_lossy().into_owned();
    succeed(context, &["snapshot", "warm", &path])?;
    Ok(path)
}

pub(crate) fn expect(output: &Output, status: i32, out: &str) -> Result<(), String> {
    if output.status == status && output.out() == out {
        return Ok(());
    }
    Err(format!(
        "status {}, output {:?}, not {out:?}; {}",
        output.status,
        output.out(),
        output.err()
    ))
}

/// A shell goes on in another machine, as often as one likes, and the original goes on too.
fn shell(context: &Context) -> Checked {
    let guest = Guest::start(context, &["busybox", "sh", "-c", WARM])?;
    let path = snapshot(context)?;
    for input in ["a", "b"] {
        let again = vmm_with(
            context,
            &["restore", &path],
            format!("{input}\n").as_bytes(),
        )?;
        let first = again.out().starts_with(&format!("warm {input} "));
        if !first || !again.out().ends_with("end\n") || again.status != 0 {
            return Err(format!("{} {} {}", again.status, again.out(), again.err()));
        }
    }
    let printed = guest.finish(context)?;
    if printed != "READY\nend\n" {
        return Err(format!("the original: {printed:?}"));
    }
    Ok(PASSED)
}

/// Processes with a pipe between them, one of which sleeps, and what is in the pipe.
fn pipes(context: &Context) -> Checked {
    let line = "(i=0; while [ $i -lt 5 ]; do i=$((i+1)); echo n$i; sleep 0.3; done) | \
                (echo READY; sleep 0.5; while read line; do echo got $line; done); echo end";
    let guest = Guest::start(context, &["busybox", "sh", "-c", line])?;
    let path = snapshot(context)?;
    let before = fs::read_to_string(&guest.output).map_err(text)?;
    let again = succeed(context, &["restore", &path])?;
    let whole = "READY\ngot n1\ngot n2\ngot n3\ngot n4\ngot n5\nend\n";
    let seen = again.out();
    // What it had printed when it was written down it does not print again.
    if !whole.ends_with(&seen) || whole.len() > before.len() + seen.len() {
        return Err(format!("{before:?}, then {seen:?}"));
    }
    Ok(PASSED)
}

/// An interpreter with much on its heap.
fn python(context: &Context) -> Checked {
    let program = "import sys, os, hashlib\n\
                   d = {i: str(i) * 7 for i in range(20000)}\n\
                   print('READY', flush=True)\n\
                   for line in sys.stdin:\n\
                   \x20   h = hashlib.sha256(repr(sorted(d.items())).encode()).hexdigest()\n\
                   \x20   print(d[int(line)], h[:8], flush=True)\n";
    let file = context.write("warm.py", program, 0o644)?;
    let native = process::run(
        Command::new("python3").arg(&file),
        b"77\n",
        &Limits {
            timeout: context.timeout,
            signal: None,
        },
    );
    let native = native.map_err(text)?.out();
    let native = native.strip_prefix("READY\n").unwrap_or_default();
    let file = file.to_string_lossy().into_owned();
    let guest = Guest::start_in(context, &["--root", "/"], &["python3", &file])?;
    let path = snapshot(context)?;
    let again = vmm_with(context, &["restore", &path], b"77\n")?;
    expect(&again, 0, native)?;
    drop(guest);
    Ok(PASSED)
}

/// Ten copies with inputs of their own, and the original is as before.
fn fork(context: &Context) -> Checked {
    let guest = Guest::start(context, &["busybox", "sh", "-c", WARM])?;
    let work = context.work();
    for n in 1..=10 {
        fs::write(work.join(format!("in.{n}")), format!("input{n}\n")).map_err(text)?;
    }
    let pattern = |name: &str| work.join(name).to_string_lossy().into_owned();
    let (input, output) = (pattern("in.%i"), pattern("out.%i"));
    succeed(context, &["freeze", "warm"])?;
    let words = [
        "fork", "warm", "-n", "10", "--stdin", &input, "--stdout", &output,
    ];
    succeed(context, &words)?;
    for n in 1..=10 {
        let printed = fs::read_to_string(work.join(format!("out.{n}"))).map_err(text)?;
        let right = printed.starts_with(&format!("warm input{n} ")) && printed.ends_with("end\n");
        if !right || printed.lines().count() != 2 {
            return Err(format!("copy {n}: {printed:?}"));
        }
    }
    // Nobody is left, but the original.
    let list = succeed(context, &["ps"])?;
    if list.out().lines().count() != 2 || !list.out().contains("warm") {
        return Err(format!("ps: {}", list.out()));
    }
    succeed(context, &["kill", "warm", "--signal", "TERM"])?;
    let mut guest = guest;
    let ended = process::wait_within(&mut guest.child, context.timeout)?;
    if ended.code() != Some(128 + 15) {
        return Err(format!("killed: {ended}"));
    }
    Ok(PASSED)
}

/// A file that is not what was written is refused with one line, before anything runs.
fn damaged(context: &Context) -> Checked {
    let guest = Guest::start(context, &["busybox", "sh", "-c", WARM])?;
    let path = snapshot(context)?;
    drop(guest);
    let whole = fs::read(&path).map_err(text)?;
    // Each is opened here, as `vmm restore` does first of all, and some by that.
    let by_command = context.amount(4, 16);
    let refused = |n: usize| match n % by_command {
        0 => nothing_runs(context, &path, "vmm: "),
        _ => no_template(&path),
    };
    let lengths = (0..24).map(|n| whole.len() * n / 24);
    for (n, length) in lengths.chain([7, 4095, 4096, whole.len() - 1]).enumerate() {
        fs::write(&path, &whole[..length]).map_err(text)?;
        refused(n).map_err(|e| format!("{length} bytes: {e}"))?;
    }
    fs::write(&path, &whole).map_err(text)?;
    let file = fs::File::options().write(true).open(&path);
    let file = file.map_err(text)?;
    let put = |at: usize, byte: u8| file.write_all_at(&[byte], at as u64).map_err(text);
    // All over it: the pages, the tables behind them, the records, the header.
    let spread = (0..FLIPS).map(|n| (whole.len() - 1) * n / (FLIPS - 1));
    let header = (0..40).map(|n| n * 5);
    let tail = (1..60).map(|n| whole.len() - n * 31);
    let all = spread.chain(header).chain(tail);
    for (n, at) in all.enumerate().step_by(context.amount(1, 3)) {
        put(at, whole[at] ^ 1 << (n % 8))?;
        refused(n / context.amount(1, 3)).map_err(|e| format!("byte {at}: {e}"))?;
        put(at, whole[at])?;
    }
    put(8, 200)?;
    nothing_runs(context, &path, "newer vmm")?;
    put(8, whole[8])?;
    goes_on(context, &path, &[])
}

/// Places over all of a snapshot in which a bit is flipped.
const FLIPS: usize = 240;

/// A restore is refused with one line that has `word` in it, and nothing of the guest has run.
fn nothing_runs(context: &Context, path: &str, word: &str) -> Result<(), String> {
    let output = vmm_with(context, &["restore", path], b"x\n")?;
    let one_line = output.err().lines().count() == 1 && output.err().contains(word);
    if output.status == 125 && one_line && output.stdout.is_empty() {
        return Ok(());
    }
    let (out, err) = (output.out(), output.err());
    Err(format!("{} {out} {err}", output.status))
}

/// No template can be made of it, nor does trying that panic.
fn no_template(path: &str) -> Result<(), String> {
    let opened = std::panic::catch_unwind(|| Template::open(path));
    match opened.map_err(|_| "the VMM panicked")? {
        Err(_) => Ok(()),
        Ok(template) => Err(format!("it was opened: {template:?}")),
    }
}

/// A restore goes on as it should.
fn goes_on(context: &Context, path: &str, more: &[&str]) -> Checked {
    let words = [&["restore", path], more].concat();
    let again = vmm_with(context, &words, b"x\n")?;
    match again.status == 0 && again.out().starts_with("warm x ") {
        true => Ok(PASSED),
        false => Err(format!("{words:?}: {} {}", again.out(), again.err())),
    }
}

/// A copy goes on as what it is a copy of; a damaged base is refused like a damaged snapshot.
fn copied(context: &Context) -> Checked {
    let guest = Guest::start(context, &["busybox", "sh", "-c", WARM])?;
    let path = snapshot(context)?;
    drop(guest);
    let place = |name: &str| context.work().join(name).to_string_lossy().into_owned();
    let (copy, difference) = (place("copy"), place("difference"));
    fs::copy(&path, &copy).map_err(text)?;
    goes_on(context, &copy, &[])?;
    let mut again = command(context, &["restore", &path, "--name", "again"]);
    let again = again.stdin(Stdio::piped()).stdout(Stdio::null()).spawn();
    let mut again = again.map_err(text)?;
    let written = succeed(
        context,
        &["snapshot", "again", &difference, "--base", &path],
    );
    drop(again.stdin.take());
    process::wait_within(&mut again, context.timeout)?;
    written?;
    goes_on(context, &difference, &["--base", &copy])?;
    let mut bytes = fs::read(&copy).map_err(text)?;
    let middle = bytes.len() / 2;
    bytes[middle] ^= 32;
    fs::write(&copy, &bytes).map_err(text)?;
    let words = ["restore", &difference, "--base", &copy];
    refused(context, &words, "damaged")?;
    Ok(PASSED)
}

/// A page that the disk has lost while the guest runs ends it, and never shows wrong bytes.
fn damaged_page(context: &Context) -> Checked {
    let guest = Guest::start(context, &["busybox", "sh", "-c", WARM])?;
    let path = snapshot(context)?;
    drop(guest);
    let mut bytes = fs::read(&path).map_err(text)?;
    let time = fs::metadata(&path).and_then(|found| found.modified());
    // Every page, so that the first that is touched is one.
    let mut at = 4096;
    while at + 4096 < bytes.len() && at < bytes.len() * 3 / 4 {
        bytes[at + 100] ^= 4;
        at += 4096;
    }
    fs::write(&path, &bytes).map_err(text)?;
    nothing_runs(context, &path, "damaged")?;
    // A disk does not set the time.
    let file = fs::File::options().write(true).open(&path);
    let set = file.and_then(|file| file.set_modified(time?));
    set.map_err(text)?;
    let output = vmm_with(context, &["restore", &path], b"x\n")?;
    let said = output
        .err()
        .lines()
        .any(|line| line.starts_with("vmm: ") && line.contains("damaged"));
    if output.status != 125 || !said || output.out().contains("warm x") {
        let (out, err) = (output.out(), output.err());
        return Err(format!("{} {out} {err}", output.status));
    }
    refused(context, &["restore", "--verify", &path], "damaged")?;
    Ok(PASSED)
}

/// Whoever kills the VMM while it writes finds the old file, or the new one.
fn killed(context: &Context) -> Checked {
    let sums = Sums::of_one_line(context);
    let path = {
        let _guest = sums.start(context)?;
        snapshot(context)?
    };
    for n in 0..kills(context, 20) {
        let mut guest = sums.start(context)?;
        let mut asks = command(context, &["snapshot", "warm", &path]);
        let asks = asks.stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        let mut asks = asks.map_err(text)?;
        // Another moment every time, all over the time it takes and a little longer.
        std::thread::sleep(Duration::from_micros(u64::from(n * 7919 % 61) * 250));
        guest.kill()?;
        process::wait_within(&mut asks, context.timeout)?;
        let again = vmm_with(context, &["restore", "--verify", &path], b"sum\n")?;
        expect(&again, 0, &sums.printed)?;
        nothing_left(Path::new(&path))?;
    }
    Ok(PASSED)
}

/// Only what belongs there is beside a snapshot; a crash may leave one temporary name.
fn nothing_left(path: &Path) -> Result<(), String> {
    let known = ["guest.snap", ".guest.snap.vmm-new", "output", "vmm"];
    let dir = path.parent().ok_or("no directory")?;
    for entry in fs::read_dir(dir).map_err(text)? {
        let name = entry.map_err(text)?.file_name();
        if !known.iter().any(|known| name == *known) {
            return Err(format!("left behind: {}", name.display()));
        }
    }
    Ok(())
}

/// What cannot be done is said in one line.
fn refusals(context: &Context) -> Checked {
    let guest = Guest::start(context, &["busybox", "sh", "-c", WARM])?;
    let file = context.work().join("s");
    let file = file.to_string_lossy().into_owned();
    for (words, part) in [
        (vec!["snapshot", "nobody", &file], "no guest `nobody`"),
        (
            vec!["snapshot", "warm", "/no/such/place/x"],
            "cannot be written",
        ),
        (vec!["snapshot", "warm", "/"], "not the name of a file"),
        (
            vec!["snapshot", "warm", &file, "--base", "/dev/null"],
            "/dev/null",
        ),
        (vec!["restore", "/dev/null"], "not a regular file"),
        (vec!["restore", "/no/such/file"], "cannot be read"),
        (vec!["restore", "/etc/passwd"], "not a snapshot"),
        (vec!["restore"], "FILE"),
        (vec!["freeze", "nobody"], "no guest `nobody`"),
        (vec!["fork", "nobody", "-n", "2"], "no guest `nobody`"),
        (
            vec!["fork", "warm", "--stdin", "/no/such/file"],
            "/no/such/file",
        ),
        (vec!["fork", "warm", "-n", "0"], "0"),
        (vec!["kill", "nobody"], "no guest `nobody`"),
        (vec!["kill", "warm", "-s", "NOTHING"], "not a signal"),
    ] {
        let output = vmm(context, &words)?;
        let one_line = output.err().lines().count() == 1;
        if output.status != 125 || !one_line || !output.err().contains(part) {
            return Err(format!("{words:?}: {} {}", output.status, output.err()));
        }
    }
    if Path::new(&file).exists() {
        return Err("a snapshot that was refused is there".to_owned());
    }
    drop(guest);
    Ok(PASSED)
}

/// The command fails with this one line.
pub(crate) fn refused(context: &Context, words: &[&str], part: &str) -> Result<(), String> {
    let output = vmm(context, words)?;
    let one_line = output.err().lines().count() == 1;
    if output.status == 125 && one_line && output.err().contains(part) {
        return Ok(());
    }
    Err(format!("{words:?}: {} {}", output.status, output.err()))
}

/// A difference is written on what the guest came from and on nothing else, and read with that alone.
fn bases(context: &Context) -> Checked {
    let first = Guest::start(context, &["busybox", "sh", "-c", WARM])?;
    let path = snapshot(context)?;
    let place = |name: &str| context.work().join(name).to_string_lossy().into_owned();
    let (other, difference) = (place("other"), place("difference"));
    succeed(context, &["snapshot", "warm", &other])?;
    let mut again = command(context, &["restore", &path, "--name", "again"]);
    let again = again.stdin(Stdio::piped()).stdout(Stdio::null()).spawn();
    let mut again = again.map_err(text)?;
    let wrong = ["snapshot", "again", &difference, "--base", &other];
    let checked = refused(context, &wrong, "--base is not the snapshot")
        .and_then(|()| {
            let none = ["snapshot", "warm", &difference, "--base", &path];
            refused(context, &none, "was not restored from a snapshot")
        })
        .and_then(|()| {
            succeed(
                context,
                &["snapshot", "again", &difference, "--base", &path],
            )
            .map(drop)
        });
    drop(again.stdin.take());
    process::wait_within(&mut again, context.timeout)?;
    checked?;
    drop(first);
    refused(
        context,
        &["restore", &difference],
        "give that one with --base",
    )?;
    let wrong = ["restore", &difference, "--base", &other];
    refused(context, &wrong, "does not build on")?;
    let right = ["restore", &difference, "--base", &path];
    let again = vmm_with(context, &right, b"x\n")?;
    if again.status != 0 || !again.out().starts_with("warm x ") {
        return Err(format!("{} {}", again.out(), again.err()));
    }
    Ok(PASSED)
}

/// Who restores a snapshot learns what the guest will see of the host, and somebody else's gives it nothing unasked.
fn directories(context: &Context) -> Checked {
    let shared = context.work().join("shared");
    fs::create_dir(&shared).map_err(text)?;
    let shared = shared.to_string_lossy().into_owned();
    let options = ["--root", "/", "--rw", &shared];
    let guest = Guest::start_in(context, &options, &["/bin/sh", "-c", WARM])?;
    let path = snapshot(context)?;
    drop(guest);
    let told = |more: &[&str]| {
        let again = vmm_with(context, &[&["restore", &path], more].concat(), b"x\n")?;
        let wanted =
            format!("vmm: the guest sees /, read-only\nvmm: the guest sees {shared}, writable\n");
        if again.status == 0 && again.err() == wanted && again.out().starts_with("warm x ") {
            return Ok(());
        }
        Err(format!("{} {} {}", again.status, again.out(), again.err()))
    };
    told(&[])?;
    if let Err(error) = std::os::unix::fs::chown(&path, Some(12345), None) {
        let skipped = format!("somebody else's snapshot: {error}");
        return Ok(Verdict::Passed(vec![skipped]));
    }
    refused(context, &["restore", &path], "user 12345 made it")?;
    told(&["--allow-dirs"])?;
    Ok(PASSED)
}

pub(crate) fn cases() -> Vec<Case> {
    let all = [
        ("shell", shell as fn(&Context) -> Checked, 60),
        ("pipes", pipes, 60),
        ("fork", fork, 120),
        ("damaged", damaged, 300),
        ("copied", copied, 120),
        ("damaged-page", damaged_page, 60),
        ("killed", killed, 900),
        ("refusals", refusals, 60),
        ("bases", bases, 120),
        ("directories", directories, 120),
    ];
    let mut cases: Vec<_> = all
        .into_iter()
        .map(|(name, body, seconds)| {
            let case = Case::function(&format!("snapshot/{name}"), body);
            case.not_native(ONLY_VMM)
                .needs(&["busybox"])
                .seconds(seconds)
        })
        .collect();
    let python = Case::function("snapshot/python", python);
    cases.push(python.not_native(ONLY_VMM).needs(&["python3"]).seconds(120));
    cases
}
