//! That clones see nothing of each other: `guest/programs/clone_tree.c`, forked again and again; and that thousands of them
//! leave nothing behind.
//!
//! `VMM_CYCLES` sets how many clones are started, run and ended in the case about that.

use std::fs;
use std::hash::{DefaultHasher, Hasher};
use std::io::{self, Read, Seek};
use std::path::Path;
use std::time::{Duration, Instant};

use tests::case::{Case, Checked, PASSED, Verdict};
use tests::context::{Context, shorten};

use super::snapshot::{Guest, ONLY_VMM, succeed};

/// One `vmm fork` of the tree: of whom, how many, the numbers of the clones, in which `%i` is 1, 2, ..., and what keeps them apart.
struct Branch<'a> {
    of: &'a str,
    count: usize,
    ids: &'a str,
    isolation: &'a str,
}

impl Branch<'_> {
    fn output(&self, context: &Context, id: &str) -> String {
        let path = context.work().join(format!("out.{id}"));
        path.to_string_lossy().into_owned()
    }

    /// Forks, waits until all have ended, and looks at what each has found.
    fn grow(&self, context: &Context, more: &[&str]) -> Result<(), String> {
        let (count, id) = (self.count.to_string(), format!("ID={}", self.ids));
        let output = self.output(context, self.ids);
        let words = ["fork", self.of, "-n", &count, "--env", &id];
        let apart = ["--isolation", self.isolation];
        let words = [&words[..], &apart, &["--stdout", &output], more].concat();
        succeed(context, &words)?;
        for number in 1..=self.count {
            let id = self.ids.replace("%i", &number.to_string());
            let printed = fs::read_to_string(self.output(context, &id)).map_err(text)?;
            let bad = printed.lines().any(|line| line.starts_with("not ok"));
            if bad || !printed.contains("\n1..") {
                return Err(format!("clone {id}:\n{}", shorten(&printed, 20)));
            }
        }
        Ok(())
    }

    /// Waits until the first has found what it was to find and has written its own.
    fn wait_until_written(&self, context: &Context) -> Result<(), String> {
        let path = self.output(context, &self.ids.replace("%i", "1"));
        let until = Instant::now() + context.timeout / 2;
        while fs::read_to_string(&path)
            .unwrap_or_default()
            .lines()
            .count()
            < 2
        {
            if Instant::now() > until {
                return Err(format!("{path}: nothing in time"));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// A sum of each template that a process has; a reason if nobody may look.
fn templates(pid: u32) -> Result<Vec<u64>, String> {
    let mut sums = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fd")).map_err(text)? {
        let path = entry.map_err(text)?.path();
        let name = fs::read_link(&path).unwrap_or_default();
        if !name.to_string_lossy().contains("vmm-template") {
            continue;
        }
        let mut file = fs::File::open(&path).map_err(text)?;
        file.rewind().map_err(text)?;
        let mut sum = DefaultHasher::new();
        let mut part = vec![0; 1 << 20];
        loop {
            match file.read(&mut part) {
                Ok(0) => break,
                Ok(count) => sum.write(&part[..count]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(text(error)),
            }
        }
        sums.push(sum.finish());
    }
    sums.sort_unstable();
    Ok(sums)
}

/// Clones, clones of two of them, and clones of a clone of one of these, while all that were frozen go on writing; and the first
/// template again at the end, which is the same.
fn tree(context: &Context, isolation: &str) -> Checked {
    let program = context.program("clone_tree");
    // A dozen machines share the emulated one's processor.
    let (pages, rest) = context.amount(("16", "0"), ("2", "400"));
    let words = [&*program.to_string_lossy(), pages, rest];
    let guest = Guest::launch(context, &["--ready-freeze"], &words)?;
    let template = templates(guest.number());
    // Open for as long as those that are frozen again are to write.
    let input = context.work().join("input");
    rustix::fs::mkfifoat(rustix::fs::CWD, &input, 0o600.into()).map_err(text)?;
    let open = fs::File::options().read(true).write(true).open(&input);
    let open = open.map_err(text)?;
    let input = input.to_string_lossy();
    let deeper = |name: &'static str| ["--env", "DEEPER=1", "--name", name, "--stdin", &input];
    let branch = |of, count, ids| Branch {
        of,
        count,
        ids,
        isolation,
    };
    let second = branch("warm", 2, "2%i");
    let third = branch("second-1", 1, "5%i");
    std::thread::scope(|scope| {
        let grows = [
            scope.spawn(|| second.grow(context, &deeper("second"))),
            scope.spawn(|| branch("warm", 3, "1%i").grow(context, &[])),
            scope.spawn(|| {
                second.wait_until_written(context)?;
                branch("second-1", 3, "3%i").grow(context, &[])
            }),
            scope.spawn(|| {
                second.wait_until_written(context)?;
                branch("second-2", 2, "4%i").grow(context, &[])
            }),
            scope.spawn(|| {
                second.wait_until_written(context)?;
                third.grow(context, &deeper("third"))
            }),
        ];
        let above = (|| {
            third.wait_until_written(context)?;
            branch("third-1", 2, "6%i").grow(context, &[])?;
            // Where it is now, and not where it asked for it.
            branch("second-1", 2, "7%i").grow(context, &["--anew"])
        })();
        // What is frozen sees the end of its input now.
        drop(open);
        let done = grows.map(|thread| thread.join());
        let mut done = done.into_iter();
        done.try_for_each(|one| one.map_err(|_| "a thread panicked")?)?;
        above
    })?;
    branch("warm", 3, "8%i").grow(context, &[])?;
    let changed = match (&template, templates(guest.number())) {
        (Ok(before), Ok(after)) => *before != after || before.is_empty(),
        _ => false,
    };
    if changed {
        return Err("the template has changed".to_owned());
    }
    let printed = guest.finish(context)?;
    if printed.contains("not ok") || !printed.contains("\n1..") {
        return Err(format!("the original:\n{}", shorten(&printed, 20)));
    }
    Ok(match template {
        Ok(_) => PASSED,
        Err(error) => Verdict::Passed(vec![format!("the template's own bytes: {error}")]),
    })
}

/// What there is of a process and of the run directories.
#[derive(Debug, PartialEq, Eq)]
struct Counted {
    descriptors: usize,
    threads: usize,
    /// Names in the folder of run directories.
    names: usize,
    /// Bytes of memory that is this process's own, or its guest's; not those of its program's file.
    resident: u64,
    /// Bytes of it that are in transparent huge pages: none, or it could not be told what is new.
    huge: u64,
}

fn count(pid: u32, folder: &Path) -> Result<Counted, String> {
    let entries = |path: &str| fs::read_dir(path).map(Iterator::count).map_err(text);
    let status = fs::read_to_string(format!("/proc/{pid}/status")).map_err(text)?;
    let maps = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).map_err(text)?;
    let huge = maps
        .lines()
        .find_map(|line| line.strip_prefix("AnonHugePages:"));
    let huge = huge.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
    let kib = |name: &str| -> Option<u64> {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line?.trim().strip_suffix(" kB")?.parse().ok()
    };
    let own = kib("RssAnon:").zip(kib("RssShmem:"));
    let (own, shared) = own.ok_or("no RssAnon")?;
    Ok(Counted {
        descriptors: entries(&format!("/proc/{pid}/fd"))?,
        threads: entries(&format!("/proc/{pid}/task"))?,
        names: entries(&folder.to_string_lossy())?,
        resident: (own + shared) * 1024,
        huge: huge.ok_or("no AnonHugePages")? * 1024,
    })
}

/// Clones that run and end, thousands of them: the guest they are made of has nothing more afterwards, and nothing of them is left.
fn cycles(context: &Context) -> Checked {
    let all = std::env::var("VMM_CYCLES").ok();
    let all = all.and_then(|n| n.parse::<u32>().ok());
    let all = all.unwrap_or(context.amount(100, 20));
    let line = "echo freeze > /dev/vmm; read -r role n < /dev/vmm; [ $role = clone ] && exit 0; while read line; do :; done";
    let program = ["busybox", "sh", "-c", line];
    let guest = Guest::launch_small(context, &["--ready-freeze"], &program)?;
    let folder = context.work().join("vmm");
    let rounds = |count: u32| -> Result<(), String> {
        let mut left = count;
        while left > 0 {
            let now = left.min(500);
            let number = now.to_string();
            // The first half has names, and so run directories that somebody knows.
            let named: &[&str] = if left > count / 2 {
                &["--name", "cycle"]
            } else {
                &[]
            };
            let words = ["fork", "warm", "-n", &number, "-j", "4"];
            succeed(context, &[&words[..], named].concat())?;
            left -= now;
        }
        Ok(())
    };
    rounds(8)?;
    let before = count(guest.number(), &folder)?;
    rounds(all)?;
    // Who asked on its socket has a thread there until he has gone. A guest that has come to rest has less than before.
    let until = Instant::now() + Duration::from_secs(10);
    let after = loop {
        let after = count(guest.number(), &folder)?;
        let fewer = after.descriptors <= before.descriptors && after.threads <= before.threads;
        if fewer || Instant::now() >= until {
            break after;
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    let memory = after.resident.saturating_sub(before.resident);
    let more = after.descriptors > before.descriptors || after.threads > before.threads;
    let huge = before.huge > 0 || after.huge > 0;
    if more || huge || after.names != before.names || memory > 1 << 20 {
        return Err(format!("{memory} bytes more; {before:?}, then {after:?}"));
    }
    let list = succeed(context, &["ps"])?;
    if list.out().lines().count() != 2 {
        return Err(format!("ps: {}", list.out()));
    }
    guest.finish(context)?;
    Ok(PASSED)
}

pub(crate) fn cases() -> Vec<Case> {
    [
        Case::function("clones/tree", |context| tree(context, "vm")).seconds(300),
        Case::function("together/tree", |context| tree(context, "process")).seconds(300),
        Case::function("clones/cycles", cycles)
            .needs(&["busybox"])
            .seconds(7200),
    ]
    .map(|case| case.not_native(ONLY_VMM))
    .into()
}
