//! The guest's own test programs: each prints TAP lines and passes on Linux itself.

use tests::case::{Case, Expect, Launch};

fn tap(name: &str, args: &[&str]) -> Case {
    let launch = Launch::new(&format!("{{programs}}/{name}"), args);
    Case::new(&format!("programs/{name}"), launch, Expect::Tap)
}

/// Processes that have four times the memory of the machine, and more once they fork.
fn thrash() -> Case {
    let launch = Launch::new("{programs}/thrash", &["8", "6144", "4"])
        .in_rig(&["5", "3072", "2"])
        .options(&["--memory", "16M", "--page-file", "256M"])
        .options_in_rig(&["--memory", "8M", "--page-file", "256M"]);
    Case::new("programs/thrash", launch, Expect::Tap).seconds(240)
}

fn hog() -> Case {
    let launch = Launch::new("{programs}/hog", &[]).options(&["--memory", "32M", "--overcommit"]);
    Case::new("programs/hog", launch, Expect::Tap).not_native("it is about an option of vmm")
}

fn quota() -> Case {
    let launch = Launch::new("{programs}/quota", &[]).options(&["--process-memory", "16M"]);
    Case::new("programs/quota", launch, Expect::Tap).not_native("it is about an option of vmm")
}

pub(crate) fn cases() -> Vec<Case> {
    let mut mmap = tap("mmap", &["{work}"]);
    let mut fds = tap("fds", &["{work}"]);
    let mut mm_errors = tap("mm_errors", &[]);
    for case in [&mut mmap, &mut fds, &mut mm_errors] {
        if let tests::case::Body::Launch(launch, _) = &mut case.body {
            launch
                .options
                .extend(["--rw", "{work}", "--workdir", "{work}"].map(str::to_owned));
        }
    }
    // More virtual processors than some of the hosts have: threads are then taken off them anywhere.
    let threads = |name: &str, args: [&str; 2], in_rig: &str, cpus: &str| {
        let launch = Launch::new(&format!("{{programs}}/{}", args[0]), &args[1..]);
        let launch = launch.in_rig(&[in_rig]).options(&["--cpus", cpus]);
        Case::new(&format!("programs/{name}"), launch, Expect::Tap).seconds(180)
    };
    let on_tmpfs = Launch::new("{programs}/fds", &["/var/tmp"]).options(&["--tmpfs", "/var/tmp"]);
    let sockets =
        Launch::new("{programs}/sockets", &["/var/tmp"]).options(&["--tmpfs", "/var/tmp"]);
    vec![
        tap("fork_tree", &["200"]).seconds(120),
        Case::new(
            "programs/cow_storm",
            Launch::new("{programs}/cow_storm", &["500"]).in_rig(&["24"]),
            Expect::Tap,
        )
        .seconds(120),
        tap("vfork_exec", &[]),
        tap("signals", &[]).seconds(120),
        tap("timers", &[]).seconds(120),
        mmap,
        mm_errors,
        tap("pipes", &[]),
        tap("clocks", &[]),
        fds,
        Case::new("programs/sockets", sockets, Expect::Tap),
        Case::new("programs/fds_on_tmpfs", on_tmpfs, Expect::Tap),
        threads("threads", ["threads", "1000"], "100", "2"),
        threads("threads_on_one_cpu", ["threads", "100"], "50", "1"),
        threads("thread_storm", ["thread_storm", "200"], "12", "4"),
        threads("fpu", ["fpu", "20"], "10", "2"),
        threads("fpu_on_one_cpu", ["fpu", "20"], "10", "1"),
        threads("shootdown", ["shootdown", "200"], "40", "2"),
        thrash(),
        quota(),
        hog(),
        tap("waits", &[]),
        tap("misbehave", &[]).seconds(120),
    ]
}
