//! The processes that `vmm fork` runs its clones in: how many share one, what is left when one of them dies, and that clones
//! in one process have names and ends of their own.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::process::Child;
use std::time::{Duration, Instant};

use tests::case::{Case, Checked, PASSED};
use tests::context::Context;
use tests::process;

use super::snapshot::{Guest, ONLY_VMM, command, expect, succeed, vmm_with};

/// Freezes itself, says which clone it is, and goes on until its input ends or says `end`.
pub(crate) const WAITS: &str = "echo freeze > /dev/vmm; read -r role n rest < /dev/vmm; echo $role $n; \
    while read -r line && [ \"$line\" != end ]; do echo $line; done";

/// The same, and a clone's clones say so.
const AGAIN: &str = "echo freeze > /dev/vmm; read -r role n rest < /dev/vmm; \
    while read -r line && [ \"$line\" != end ]; do :; done; cat /dev/vmm";

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

pub(crate) fn warm(context: &Context, line: &str) -> Result<Guest, String> {
    Guest::launch(context, &["--ready-freeze"], &["busybox", "sh", "-c", line])
}

/// A `vmm fork` that runs, its clones' input open until this is dropped.
pub(crate) struct Forks<'a> {
    context: &'a Context,
    pub(crate) child: Child,
    name: &'a str,
    /// Both ends of the clones' input.
    input: Option<fs::File>,
}

impl<'a> Forks<'a> {
    /// Forks `warm`; the clones are called `name`.
    fn start(context: &'a Context, name: &'a str, more: &[&str]) -> Result<Self, String> {
        Self::of("warm", context, name, more)
    }

    /// Forks `guest`.
    pub(crate) fn of(
        guest: &str,
        context: &'a Context,
        name: &'a str,
        more: &[&str],
    ) -> Result<Self, String> {
        let path = |kind: &str| context.work().join(format!("{name}.{kind}"));
        let fifo = path("in");
        rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, 0o600.into()).map_err(text)?;
        let input = fs::File::options().read(true).write(true).open(&fifo);
        let input = Some(input.map_err(text)?);
        let (fifo, output) = (fifo.to_string_lossy(), path("out.%i"));
        let output = output.to_string_lossy();
        let words = ["fork", guest, "--name", name, "--stdin", &fifo];
        let words = [&words[..], &["--stdout", &output], more].concat();
        let said = fs::File::create(path("said")).map_err(text)?;
        let child = command(context, &words).stderr(said).spawn();
        let child = child.map_err(text)?;
        Ok(Self {
            context,
            child,
            name,
            input,
        })
    }

    fn path(&self, kind: &str) -> PathBuf {
        let name = format!("{}.{kind}", self.name);
        self.context.work().join(name)
    }

    pub(crate) fn printed(&self, number: u32) -> String {
        fs::read_to_string(self.path(&format!("out.{number}"))).unwrap_or_default()
    }

    /// Its clones that are listed, and the process of each.
    pub(crate) fn listed(&self) -> Result<BTreeMap<String, u64>, String> {
        let list = succeed(self.context, &["ps", "--json"])?;
        let list: serde_json::Value = serde_json::from_slice(&list.stdout).map_err(text)?;
        let guests = list.as_array().into_iter().flatten();
        let guests = guests.map(|hello| &hello["guest"]);
        let guests =
            guests.filter_map(|g| Some((g["id"].as_str()?.to_owned(), g["pid"].as_u64()?)));
        let start = format!("{}-", self.name);
        Ok(guests.filter(|(id, _)| id.starts_with(&start)).collect())
    }

    /// Waits until those that run are as they should be.
    pub(crate) fn wait_for(
        &self,
        what: &str,
        seen: impl Fn(&BTreeMap<String, u64>) -> bool,
    ) -> Result<BTreeMap<String, u64>, String> {
        let until = Instant::now() + self.context.timeout / 3;
        loop {
            let listed = self.listed()?;
            if seen(&listed) {
                return Ok(listed);
            }
            if Instant::now() > until {
                return Err(format!("{what}: {listed:?}; {}", self.said()));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits until so many run and have said so.
    pub(crate) fn wait_for_all(&self, count: u32) -> Result<BTreeMap<String, u64>, String> {
        let all = |listed: &BTreeMap<String, u64>| {
            listed.len() == count as usize && (1..=count).all(|n| !self.printed(n).is_empty())
        };
        self.wait_for("not all run", all)
    }

    /// What it said on standard error.
    fn said(&self) -> String {
        fs::read_to_string(self.path("said")).unwrap_or_default()
    }

    /// Ends the clones' input, and waits for the end of all.
    pub(crate) fn finish(mut self) -> Result<(Option<i32>, String), String> {
        drop(self.input.take());
        let ended = process::wait_within(&mut self.child, self.context.timeout / 3)?;
        let left = self.listed()?;
        match left.is_empty() {
            true => Ok((ended.code(), self.said())),
            false => Err(format!("clones are left: {left:?}")),
        }
    }
}

impl Drop for Forks<'_> {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// How many of `listed` are in each process.
fn processes(listed: &BTreeMap<String, u64>) -> Vec<usize> {
    let mut counts = BTreeMap::new();
    for pid in listed.values() {
        *counts.entry(pid).or_insert(0) += 1;
    }
    counts.into_values().collect()
}

/// More clones than one process takes; one of them is killed, and the others go on.
fn several(context: &Context) -> Checked {
    let guest = warm(context, WAITS)?;
    let forks = Forks::start(context, "s", &["-n", "8", "--per-process", "3"])?;
    let listed = forks.wait_for_all(8)?;
    let counts = processes(&listed);
    if counts.len() != 3 || counts.iter().any(|count| *count > 3) {
        return Err(format!("in processes: {listed:?}"));
    }
    succeed(context, &["kill", "s-5"])?;
    let others = |listed: &BTreeMap<String, u64>| !listed.contains_key("s-5");
    let left = forks.wait_for("s-5 is left", others)?;
    if left.len() != 7 {
        return Err(format!("s-5 was killed, and left are {left:?}"));
    }
    succeed(context, &["inspect", "s-4"])?;
    for n in 1..=8 {
        if forks.printed(n) != format!("clone {n}\n") {
            return Err(format!("clone {n}: {:?}", forks.printed(n)));
        }
    }
    match forks.finish()? {
        (Some(137), said) if said.is_empty() => {}
        ended => return Err(format!("{ended:?}")),
    }
    guest.finish(context)?;
    Ok(PASSED)
}

/// A process of clones is killed: those in it are named in one line, the others and those that wait go on.
fn killed(context: &Context) -> Checked {
    let guest = warm(context, WAITS)?;
    let options = ["-n", "6", "-j", "4", "--per-process", "2"];
    let forks = Forks::start(context, "k", &options)?;
    let listed = forks.wait_for_all(4)?;
    let pid = listed["k-1"];
    let lost: Vec<_> = listed.iter().filter(|(_, of)| **of == pid).collect();
    let kill = rustix::process::Pid::from_raw(i32::try_from(pid).map_err(text)?);
    let kill = kill.ok_or("no process")?;
    rustix::process::kill_process(kill, rustix::process::Signal::KILL).map_err(text)?;
    // As many of those that waited are there in their place.
    let replaced = |now: &BTreeMap<String, u64>| {
        now.len() == 4 && !now.values().any(|of| *of == pid) && now.contains_key("k-6")
    };
    let now = forks.wait_for("no others in their place", replaced)?;
    let stayed = listed.iter().filter(|(_, of)| **of != pid);
    for (id, of) in stayed {
        if now.get(id) != Some(of) {
            return Err(format!("{id} did not go on: {now:?}"));
        }
    }
    let (status, said) = forks.finish()?;
    let numbers: Vec<_> = lost.iter().map(|(id, _)| id.replace("k-", "")).collect();
    let line = said.lines().next().unwrap_or_default();
    let named = numbers.iter().all(|number| line.contains(number.as_str()));
    if status != Some(125) || said.lines().count() != 1 || !line.contains("signal: 9") || !named {
        return Err(format!("{status:?} {said:?}, lost were {lost:?}"));
    }
    guest.finish(context)?;
    Ok(PASSED)
}

/// A few at a time, in one process, machines used again: each has its own number, input and output.
fn in_turn(context: &Context) -> Checked {
    let guest = warm(context, WAITS)?;
    for n in 1..=20 {
        context.write(&format!("in.{n}"), format!("line {n}\nend\nmore\n"), 0o644)?;
    }
    let path = |name: &str| context.work().join(name).to_string_lossy().into_owned();
    let (input, output) = (path("in.%i"), path("out.%i"));
    let words = ["fork", "warm", "-n", "20", "-j", "3", "--stdin", &input];
    let ended = vmm_with(context, &[&words[..], &["--stdout", &output]].concat(), b"")?;
    expect(&ended, 0, "")?;
    for n in 1..=20 {
        let printed = fs::read_to_string(path(&format!("out.{n}"))).map_err(text)?;
        if printed != format!("clone {n}\nline {n}\n") {
            return Err(format!("clone {n}: {printed:?}"));
        }
    }
    guest.finish(context)?;
    Ok(PASSED)
}

/// A clone is frozen while others of its process, or of its machine, go on, and is forked itself.
fn frozen_again(context: &Context, isolation: &str) -> Checked {
    let guest = warm(context, AGAIN)?;
    let options = ["-n", "3", "--isolation", isolation];
    let forks = Forks::start(context, "f", &options)?;
    let all = |listed: &BTreeMap<String, u64>| listed.len() == 3;
    let listed = forks.wait_for("not all run", all)?;
    succeed(context, &["freeze", "f-2"])?;
    let deep = context.work().join("deep.%i");
    let deep = deep.to_string_lossy();
    let words = ["fork", "f-2", "-n", "2", "--stdout", &deep];
    succeed(context, &[&words[..], &options[2..]].concat())?;
    for n in 1..=2 {
        let printed = fs::read_to_string(deep.replace("%i", &n.to_string())).map_err(text)?;
        // It had read who it was before it was frozen, and opens the device again.
        if printed != format!("clone {n} 2 f-2\n") {
            return Err(format!("clone {n} of f-2: {printed:?}"));
        }
    }
    if forks.listed()? != listed {
        return Err(format!("not those that ran: {:?}", forks.listed()?));
    }
    match forks.finish()? {
        (Some(0), said) if said.is_empty() => {}
        ended => return Err(format!("{ended:?}")),
    }
    guest.finish(context)?;
    Ok(PASSED)
}

pub(crate) fn cases() -> Vec<Case> {
    [
        ("clones/several", several as fn(&Context) -> Checked),
        ("clones/killed", killed),
        ("clones/in-turn", in_turn),
        ("clones/frozen-again", |context| frozen_again(context, "vm")),
        ("together/frozen-again", |context| {
            frozen_again(context, "process")
        }),
    ]
    .into_iter()
    .map(|(name, body)| Case::function(name, body).needs(&["busybox"]))
    .map(|case| case.not_native(ONLY_VMM).seconds(120))
    .collect()
}
