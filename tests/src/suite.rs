//! Runs the table of cases on the host we are on, and counts.
//!
//! Arguments: parts of names (only those cases run), `--list`, `--prepare` (only build); what `cargo test` may pass besides
//! is ignored. Environment: `VMM_TEST_HOST` (see [`crate::host`]), `VMM_BIN` (the vmm to test),
//! `VMM_TEST_PROGRAMS` (built guest programs), `VMM_TEST_JOBS` (cases at once),
//! `VMM_TEST_REQUIRE_KVM` (no usable `/dev/kvm` is a failure), `VMM_TEST_TIME` (seconds for all cases; those that
//! run when they are over are named and fail), `VMM_TEST_AGAIN` (cases that fail are tried once more, alone, at the end; one
//! that passes then is named as flaky, with what it printed when it failed), `VMM_TEST_PART` (`1/2`: every other case,
//! `2/2`: those between), `VMM_TEST_BOTH` (set: both kinds of emulated machine are tested, and each has half of the cases
//! that are [about no paging](Case::any_paging)), `RIG_BEFORE` (a file with what a run printed whose machine fell silent: this one goes on with the
//! cases that are not done, first those that ran then, each alone).

use std::collections::BTreeSet;
use std::io::Write;
use std::process::ExitCode;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use kvm_ioctls::{Kvm, VcpuFd, VmFd};

use crate::case::{Case, Verdict};
use crate::context::{Context, Setup};
use crate::host::{Host, kvm_usable};
use crate::programs;
use crate::report::{self, Before, Done};

#[derive(Default)]
struct Tally {
    passed: usize,
    failed: Vec<String>,
    /// Those of them that failed alone too, in a machine that fell silent later.
    failed_alone: Vec<String>,
    /// Failed first and passed alone.
    flaky: Vec<String>,
    skipped: usize,
    /// Cases that run, and since when.
    running: Vec<(String, Instant)>,
}

impl Tally {
    /// Of the cases that are done already.
    fn of(before: &Before) -> Self {
        let mut tally = Self::default();
        for (name, done) in &before.done {
            match *done {
                Done::Passed { without } | Done::Flaky { without } => {
                    tally.passed += 1;
                    tally.skipped += without;
                }
                Done::Failed | Done::FailedAlone => tally.failed.push(name.clone()),
            }
            match done {
                Done::Flaky { .. } => tally.flaky.push(name.clone()),
                Done::FailedAlone => tally.failed_alone.push(name.clone()),
                Done::Passed { .. } | Done::Failed => {}
            }
        }
        tally
    }
}

/// How long a case may take before the whole run is given up: what it starts has time limits of its own, far below
/// this, so the case itself waits for something that does not come.
const HANGS: Duration = Duration::from_secs(600);

/// Runs the cases; the closing line is `N passed, N failed, N skipped`.
#[must_use]
pub fn main(cases: Vec<Case>) -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let filters: Vec<&String> = args.iter().filter(|a| !a.starts_with('-')).collect();
    let elsewhere = elsewhere(&cases);
    let chosen: Vec<Case> = cases
        .into_iter()
        .filter(|c| filters.is_empty() || filters.iter().any(|f| c.name.contains(f.as_str())))
        .collect();
    if args.iter().any(|a| a == "--list") {
        for case in &chosen {
            println!("{}: test", case.name);
        }
        return ExitCode::SUCCESS;
    }
    if args.iter().any(|a| a == "--prepare") {
        return prepare();
    }
    let result = Host::from_env().and_then(|host| {
        println!("host: {host}");
        let (mine, others): (Vec<Case>, Vec<Case>) =
            chosen.into_iter().partition(|c| c.is_for(host));
        if !others.is_empty() {
            println!("      {} cases are about other kinds of host", others.len());
        }
        let all = mine.len();
        let mine: Vec<Case> = mine
            .into_iter()
            .filter(|case| !elsewhere.contains(&case.name))
            .collect();
        if mine.len() < all {
            println!(
                "      {} cases are about no paging and run on the other emulated host",
                all - mine.len()
            );
        }
        run(host, &part(mine)?)
    });
    match result {
        Ok(tally) => close(&tally),
        Err(why) => {
            eprintln!("the tests cannot run: {why}");
            ExitCode::FAILURE
        }
    }
}

/// Names of the cases that the other kind of emulated machine has, if there is one.
fn elsewhere(cases: &[Case]) -> BTreeSet<String> {
    let rest = match Host::from_env() {
        Ok(Host::Npt) => 1,
        Ok(Host::Shadow) => 0,
        _ => return BTreeSet::new(),
    };
    if std::env::var_os("VMM_TEST_BOTH").is_none() {
        return BTreeSet::new();
    }
    let about_none = cases.iter().filter(|case| case.any_paging);
    let others = about_none.skip(rest).step_by(2);
    others.map(|case| case.name.clone()).collect()
}

/// The cases of this part, if they are shared out: neighbours take about as long, so they are in different parts.
fn part(cases: Vec<Case>) -> Result<Vec<Case>, String> {
    let Ok(text) = std::env::var("VMM_TEST_PART") else {
        return Ok(cases);
    };
    let numbers = text.split_once('/').and_then(|(part, parts)| {
        let (part, parts) = (part.parse().ok()?, parts.parse().ok()?);
        (1..=parts).contains(&part).then_some((part, parts))
    });
    let Some((part, parts)): Option<(usize, usize)> = numbers else {
        return Err(format!("VMM_TEST_PART={text}: use 1/2 or 2/2"));
    };
    let mine = cases.into_iter().skip(part - 1).step_by(parts);
    Ok(mine.collect())
}

/// Builds what the cases need and says where it is, as assignments for a shell.
fn prepare() -> ExitCode {
    match programs::vmm().and_then(|vmm| Ok((vmm, programs::folder()?))) {
        Ok((vmm, folder)) => {
            println!(
                "VMM_BIN='{}'\nVMM_TEST_PROGRAMS='{}'",
                vmm.display(),
                folder.display()
            );
            ExitCode::SUCCESS
        }
        Err(why) => {
            eprintln!("{why}");
            ExitCode::FAILURE
        }
    }
}

fn run(host: Host, cases: &[Case]) -> Result<Tally, String> {
    if !matches!(host, Host::Native | Host::NoKvm)
        && let Err(why) = kvm_usable()
    {
        return without_kvm(cases, &why);
    }
    let _held = hold_cpu(host)?;
    let setup = Setup {
        host,
        vmm: if host == Host::Native {
            "vmm".into()
        } else {
            programs::vmm()?
        },
        programs: programs::folder()?,
    };
    let jobs = std::env::var("VMM_TEST_JOBS")
        .ok()
        .and_then(|n| n.parse().ok());
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let jobs = jobs.unwrap_or(cores).max(1);
    let before = before(cases)?;
    let (next, tally) = (
        AtomicUsize::new(0),
        Arc::new(Mutex::new(Tally::of(&before))),
    );
    let watched = Arc::clone(&tally);
    let limit = std::env::var("VMM_TEST_TIME").ok();
    let limit = limit.and_then(|n| n.parse().ok());
    let until = limit.map(|seconds| Instant::now() + Duration::from_secs(seconds));
    std::thread::spawn(move || watch(&watched, until));
    let silent = before.silent_in(cases.iter().map(|case| case.name.as_str()), jobs);
    for name in &silent {
        print!("{}", report::silent(name));
    }
    let left = cases
        .iter()
        .filter(|case| !before.done.contains_key(&case.name));
    let (alone, together): (Vec<&Case>, Vec<&Case>) =
        left.partition(|case| silent.contains(&case.name.as_str()));
    for case in alone {
        one(case, &setup, &tally);
    }
    std::thread::scope(|scope| {
        for _ in 0..jobs {
            scope.spawn(|| {
                while let Some(case) = together.get(next.fetch_add(1, Ordering::Relaxed)) {
                    one(case, &setup, &tally);
                }
            });
        }
    });
    if std::env::var_os("VMM_TEST_AGAIN").is_some() {
        again(cases, &setup, &tally);
    }
    let mut tally = tally.lock().map_err(|_| "a case panicked".to_owned())?;
    Ok(std::mem::take(&mut *tally))
}

/// A virtual CPU that lives as long as the run, where all is emulated: Linux changes its own code when the first one without a
/// local APIC is made and when the last one goes, which is a twentieth of what the emulated machine does for a small guest.
fn hold_cpu(host: Host) -> Result<Option<(VcpuFd, VmFd)>, String> {
    if !matches!(host, Host::Npt | Host::Shadow) {
        return Ok(None);
    }
    let made = Kvm::new().and_then(|kvm| kvm.create_vm());
    let made = made.and_then(|vm| Ok((vm.create_vcpu(0)?, vm)));
    made.map(Some)
        .map_err(|e| format!("no virtual CPU to hold: {e}"))
}

/// What the run printed whose machine fell silent, if there was one.
fn before(cases: &[Case]) -> Result<Before, String> {
    let Some(path) = std::env::var_os("RIG_BEFORE") else {
        return Ok(Before::default());
    };
    let text = std::fs::read(&path).map_err(|e| format!("{}: {e}", path.display()))?;
    let known = cases.iter().map(|case| case.name.as_str());
    Ok(report::read(
        &String::from_utf8_lossy(&text),
        &known.collect(),
    ))
}

/// More failures than this have one cause.
const FEW: usize = 5;

/// Tries the cases that failed once more, when nothing else runs.
fn again(cases: &[Case], setup: &Setup, tally: &Mutex<Tally>) {
    let first = match tally.lock() {
        Ok(mut tally) if tally.failed.len() + tally.flaky.len() <= FEW => {
            let failed_alone = std::mem::take(&mut tally.failed_alone);
            std::mem::replace(&mut tally.failed, failed_alone)
        }
        Ok(_) | Err(_) => return,
    };
    for case in cases.iter().filter(|case| first.contains(&case.name)) {
        print!("{}", report::again(&case.name));
        one(case, setup, tally);
        if let Ok(mut tally) = tally.lock()
            && !tally.failed.contains(&case.name)
        {
            tally.flaky.push(case.name.clone());
        }
    }
}

/// Ends the run when a case hangs or the time is over, so that somebody learns which cases are to blame.
fn watch(tally: &Mutex<Tally>, until: Option<Instant>) {
    loop {
        std::thread::sleep(Duration::from_secs(1));
        let Ok(mut tally) = tally.lock() else { return };
        let over = until.is_some_and(|until| Instant::now() >= until);
        let hanging = |(_, since): &&(String, Instant)| over || since.elapsed() > HANGS;
        let hanging: Vec<_> = tally.running.iter().filter(hanging).cloned().collect();
        if hanging.is_empty() && !over {
            continue;
        }
        let why = if over { "the time is over" } else { "hangs" };
        for (name, since) in hanging {
            let seconds = since.elapsed().as_secs();
            println!("FAIL  {name} ({seconds} s): {why}; the cases after it are not run");
            tally.failed.push(name);
        }
        let _ = close(&tally);
        let _ = std::io::stdout().flush();
        std::process::exit(1);
    }
}

fn one(case: &Case, setup: &Setup, tally: &Mutex<Tally>) {
    let started = Instant::now();
    if let Ok(mut tally) = tally.lock() {
        tally.running.push((case.name.clone(), started));
    }
    let verdict = case.skip_on(setup.host).map_or_else(
        || match Context::new(setup, case.timeout) {
            Ok(context) => case.run(&context),
            Err(why) => Verdict::Failed(why),
        },
        Verdict::Skipped,
    );
    let seconds = started.elapsed().as_secs_f32();
    let Ok(mut tally) = tally.lock() else { return };
    let name = &case.name;
    tally.running.retain(|(running, _)| running != name);
    print!("{}", report::of(name, seconds, &verdict));
    match verdict {
        Verdict::Passed(without) => {
            tally.passed += 1;
            tally.skipped += without.len();
        }
        Verdict::Skipped(_) => tally.skipped += 1,
        Verdict::Failed(_) => tally.failed.push(name.clone()),
    }
    let _ = std::io::stdout().flush();
}

fn without_kvm(cases: &[Case], why: &str) -> Result<Tally, String> {
    if std::env::var_os("VMM_TEST_REQUIRE_KVM").is_some() {
        return Err(why.to_owned());
    }
    println!(
        "skip  all {} cases: {why} (tests/run runs them in an emulated machine)",
        cases.len()
    );
    Ok(Tally {
        skipped: cases.len(),
        ..Tally::default()
    })
}

fn close(tally: &Tally) -> ExitCode {
    for name in &tally.failed {
        println!("failed: {name}");
    }
    for name in &tally.flaky {
        println!("flaky: {name}: failed, and passed alone");
    }
    println!(
        "{} passed, {} failed, {} skipped",
        tally.passed,
        tally.failed.len(),
        tally.skipped
    );
    if tally.failed.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
