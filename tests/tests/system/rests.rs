//! Machines that rest while their guests wait, and a host that refuses them when they are to go on: the VMM's process
//! may open nothing more (its limit is changed from outside).

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};
use tests::case::{Case, Checked, PASSED};
use tests::context::Context;
use tests::process::wait_within;

use super::clones_reset::Running;
use super::clones_workers::{WAITS, warm};
use super::snapshot::{ONLY_VMM, command, succeed};

/// What is said when a machine ends because its virtual machine cannot be made again.
const ENDS: &str = "virtual machine could not be made again";
/// What is noted at the first refusal.
const WAITS_FOR_HOST: &str = "cannot go on yet";

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// A process that has machines.
struct Host<'a> {
    context: &'a Context,
    pid: Pid,
    /// Its standard error.
    said: PathBuf,
}

/// Takes the limit back.
struct Starved(Pid, Rlimit);

impl Drop for Starved {
    fn drop(&mut self) {
        // It may have ended.
        let _ = prlimit(Some(self.0), Resource::Nofile, self.1);
    }
}

impl<'a> Host<'a> {
    fn new(context: &'a Context, pid: u64, said: &Path) -> Result<Self, String> {
        let pid = Pid::from_raw(i32::try_from(pid).map_err(text)?);
        Ok(Self {
            context,
            pid: pid.ok_or("no process")?,
            said: said.into(),
        })
    }

    fn said(&self) -> String {
        fs::read_to_string(&self.said).unwrap_or_default()
    }

    /// Waits until a file has this content.
    fn wait_for(&self, path: &Path, seen: impl Fn(&str) -> bool) -> Result<(), String> {
        let until = Instant::now() + self.context.timeout / 3;
        loop {
            let content = fs::read_to_string(path).unwrap_or_default();
            if seen(&content) {
                return Ok(());
            }
            if Instant::now() > until {
                let path = path.display();
                return Err(format!("{path} has {content:?}; {}", self.said()));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Waits until KVM has no virtual machine for it.
    fn wait_for_rest(&self) -> Result<(), String> {
        let until = Instant::now() + self.context.timeout / 3;
        let folder = format!("/proc/{}/fd", self.pid.as_raw_nonzero());
        loop {
            let open = fs::read_dir(&folder).map_err(text)?.flatten();
            let mut open = open.filter_map(|fd| fs::read_link(fd.path()).ok());
            if !open.any(|to| to == Path::new("anon_inode:kvm-vm")) {
                return Ok(());
            }
            if Instant::now() > until {
                return Err("it does not come to rest".to_owned());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// It can open nothing until the result is dropped. What it has open it can still watch: poll(2) takes no more descriptors
    /// than the limit.
    fn starve(&self) -> Result<Starved, String> {
        let folder = format!("/proc/{}/fd", self.pid.as_raw_nonzero());
        let free = (0..).find(|number| !Path::new(&folder).join(number.to_string()).is_symlink());
        let none = Rlimit {
            current: free,
            ..getrlimit(Resource::Nofile)
        };
        let before = prlimit(Some(self.pid), Resource::Nofile, none);
        Ok(Starved(self.pid, before.map_err(text)?))
    }
}

/// A guest that says the lines of its input, in a machine that rests.
fn resting<'a>(
    context: &'a Context,
    log: &str,
) -> Result<(Running, ChildStdin, Host<'a>, PathBuf), String> {
    let (output, said) = (context.work().join("out"), context.work().join("said"));
    let line = "echo begun; while read -r line; do echo $line; done";
    let mut command = command(context, &["run", "--", "busybox", "sh", "-c", line]);
    command
        .env("VMM_LOG", log)
        .stdin(Stdio::piped())
        .stdout(fs::File::create(&output).map_err(text)?)
        .stderr(fs::File::create(&said).map_err(text)?);
    let mut vmm = Running(command.spawn().map_err(text)?);
    let input = vmm.0.stdin.take().ok_or("no standard input")?;
    let host = Host::new(context, u64::from(vmm.0.id()), &said)?;
    host.wait_for(&output, |said| said == "begun\n")?;
    host.wait_for_rest()?;
    Ok((vmm, input, host, output))
}

/// KVM refuses the machine, and then does not: the guest goes on where it was.
fn refused_for_a_while(context: &Context) -> Checked {
    let (mut vmm, mut input, host, output) = resting(context, "info")?;
    let starved = host.starve()?;
    input.write_all(b"one\n").map_err(text)?;
    host.wait_for(&host.said, |said| said.contains(WAITS_FOR_HOST))?;
    drop(starved);
    host.wait_for(&output, |said| said == "begun\none\n")?;
    drop(input);
    let ended = wait_within(&mut vmm.0, context.timeout / 3)?;
    match (ended.code(), host.said().matches(WAITS_FOR_HOST).count()) {
        (Some(0), 1) => Ok(PASSED),
        _ => Err(format!("{ended}: {}", host.said())),
    }
}

/// KVM goes on refusing: the guest ends with 125, and one line says why.
fn refused_for_good(context: &Context) -> Checked {
    let (mut vmm, mut input, host, output) = resting(context, "warn")?;
    let _starved = host.starve()?;
    input.write_all(b"one\n").map_err(text)?;
    let ended = wait_within(&mut vmm.0, context.timeout / 3)?;
    let said = host.said();
    let one_line = said.lines().count() == 1 && said.contains(ENDS);
    let output = fs::read_to_string(&output).map_err(text)?;
    match (ended.code(), one_line, output.as_str()) {
        (Some(125), true, "begun\n") => Ok(PASSED),
        _ => Err(format!("{ended}: {said:?}, printed {output:?}")),
    }
}

/// Two clones of one process, one of which is refused its machine for good: the other one goes on.
fn refused_beside_another(context: &Context) -> Checked {
    let guest = warm(context, WAITS)?;
    let path = |name: &str| context.work().join(name);
    let mut inputs = Vec::new();
    for n in 1..=2 {
        let fifo = path(&format!("in.{n}"));
        rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, 0o600.into()).map_err(text)?;
        let both = fs::File::options().read(true).write(true).open(&fifo);
        inputs.push(both.map_err(text)?);
    }
    let (input, output, said) = (path("in.%i"), path("out.%i"), path("said"));
    let (input, output) = (input.to_string_lossy(), output.to_string_lossy());
    let words = ["fork", "warm", "-n", "2", "--name", "w", "--stdin", &input];
    let mut command = command(context, &[&words[..], &["--stdout", &output]].concat());
    let error = fs::File::create(&said).map_err(text)?;
    let mut forks = Running(command.stderr(error).spawn().map_err(text)?);
    let any = Host::new(context, u64::from(forks.0.id()), &said)?;
    for n in 1..=2 {
        let line = format!("clone {n}\n");
        any.wait_for(&path(&format!("out.{n}")), |said| said == line)?;
    }
    let list = succeed(context, &["ps", "--json"])?;
    let list: serde_json::Value = serde_json::from_slice(&list.stdout).map_err(text)?;
    let guests = list.as_array().into_iter().flatten();
    let mut guests = guests.map(|hello| &hello["guest"]);
    let clone = guests.find(|guest| guest["id"] == "w-1");
    let pid = clone.and_then(|clone| clone["pid"].as_u64());
    let host = Host::new(context, pid.ok_or("w-1 is not listed")?, &said)?;
    host.wait_for_rest()?;
    let starved = host.starve()?;
    inputs[0].write_all(b"one\n").map_err(text)?;
    host.wait_for(&said, |said| said.contains(ENDS))?;
    drop(starved);
    inputs[1].write_all(b"two\nend\n").map_err(text)?;
    let ended = wait_within(&mut forks.0, context.timeout / 3)?;
    let printed = [1, 2].map(|n| fs::read_to_string(path(&format!("out.{n}"))).unwrap_or_default());
    guest.finish(context)?;
    let one_line = host.said().lines().count() == 1;
    match (
        ended.code(),
        one_line,
        printed.each_ref().map(String::as_str),
    ) {
        (Some(125), true, ["clone 1\n", "clone 2\ntwo\n"]) => Ok(PASSED),
        _ => Err(format!("{ended}: {:?}, printed {printed:?}", host.said())),
    }
}

pub(crate) fn cases() -> Vec<Case> {
    [
        Case::function("rests/refused-for-a-while", refused_for_a_while),
        Case::function("rests/refused-for-good", refused_for_good),
        Case::function("rests/refused-beside-another", refused_beside_another),
    ]
    .map(|case| case.needs(&["busybox"]).not_native(ONLY_VMM).seconds(120))
    .into()
}
