//! Stopping a live guest: how long it takes, what it costs, and that the guest goes on. Skipped, aloud,
//! without a usable `/dev/kvm`.

use std::sync::Arc;
use std::time::{Duration, Instant};

use vmm::config::{Commit, RunConfig};
use vmm::linux::kernel::Kernel;
use vmm::linux::stop::Stopped;
use vmm::machine::{Ended, HostSide, Machine};

const ROUNDS: usize = 40;
/// How long a guest may take to go on.
const PATIENCE: Duration = Duration::from_secs(10);

fn config(program: &str, args: &[&str]) -> Option<RunConfig> {
    let usable = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .is_ok();
    if !usable {
        println!("skipped: /dev/kvm is not usable");
        return None;
    }
    let args = args.iter().map(|&arg| arg.into()).collect();
    Some(RunConfig {
        memory: 64 << 20,
        commit: Commit::Over,
        root: Some("/".into()),
        timeout: Some(Duration::from_secs(60)),
        max_procs: 16,
        cpus: 2,
        ..RunConfig::new(program.into(), args)
    })
}

/// Runs a program, and `f` beside it once it has started; then ends it with `SIGTERM`.
fn beside(config: &RunConfig, f: impl FnOnce(&Arc<Kernel>)) -> Ended {
    let host = HostSide::whole_process().expect("descriptors");
    let machine = Machine::build(config, host).expect("a machine");
    let kernel = machine.kernel();
    let runs = std::thread::spawn(move || machine.run(config_timeout()));
    std::thread::sleep(Duration::from_millis(300));
    f(&kernel);
    kernel.sched.end();
    runs.join().expect("no panic").expect("a machine that ends")
}

fn config_timeout() -> Option<Duration> {
    Some(Duration::from_secs(60))
}

/// CPU time of all threads, and how many would run.
fn cpu_time(stopped: &Stopped) -> (u64, usize) {
    let state = stopped.kernel().state();
    let time = state.procs.values().map(|p| p.cpu_ns()).sum();
    drop(state);
    let mut runnable = 0;
    let sched = &stopped.kernel().sched;
    sched.each_resting(|rest| runnable += usize::from(rest.wait.is_none()));
    (time, runnable)
}

/// Stops and lets go on, many times. `look` says whether the guest has gone on since the last time: it has, some time after
/// every stop, whoever else has the host's processors.
fn rounds(
    kernel: &Arc<Kernel>,
    mut look: impl FnMut(&Stopped) -> bool,
) -> (Duration, Duration, usize) {
    let mut took = Vec::new();
    let mut kicked = 0;
    for _ in 0..ROUNDS {
        let stopped = kernel.stop();
        assert!(!stopped.has_ended());
        took.push(stopped.took());
        kicked += stopped.kicked();
        let mut went_on = look(&stopped);
        stopped.resume();
        let since = Instant::now();
        while !went_on && since.elapsed() < PATIENCE {
            std::thread::sleep(Duration::from_millis(5));
            let stopped = kernel.stop();
            went_on = look(&stopped);
            stopped.resume();
        }
        assert!(went_on, "it did not go on");
        std::thread::sleep(Duration::from_millis(5));
    }
    took.sort_unstable();
    (took[took.len() / 2], took[took.len() - 1], kicked)
}

#[test]
fn idle_guest_is_stopped_without_a_kick() {
    let Some(config) = config("sleep", &["60"]) else {
        return;
    };
    beside(&config, |kernel| {
        let (median, worst, kicked) = rounds(kernel, |stopped| {
            assert_eq!(cpu_time(stopped).1, 0);
            true
        });
        println!("idle: median {median:?}, worst {worst:?}, {kicked} threads kicked in {ROUNDS}");
        assert_eq!(kicked, 0);
    });
}

#[test]
fn spinning_guest_is_stopped_with_one_kick_a_thread_and_goes_on() {
    let Some(config) = config("sh", &["-c", "while :; do :; done & while :; do :; done"]) else {
        return;
    };
    let mut before = 0;
    let ended = beside(&config, |kernel| {
        let (median, worst, kicked) = rounds(kernel, |stopped| {
            let (time, runnable) = cpu_time(stopped);
            std::thread::sleep(Duration::from_millis(2));
            assert_eq!(cpu_time(stopped), (time, runnable), "it runs while stopped");
            assert_eq!(runnable, 2);
            std::mem::replace(&mut before, time) < time
        });
        println!(
            "spinning: median {median:?}, worst {worst:?}, {kicked} threads kicked in {ROUNDS}"
        );
        assert!(kicked <= 2 * ROUNDS);
    });
    println!("exits: {:?}", ended.report.exits);
}
