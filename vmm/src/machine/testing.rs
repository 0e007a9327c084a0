//! What the tests of machines share.

use std::path::Path;
use std::time::{Duration, Instant};

use crate::config::{Commit, Mount, RunConfig};

/// Whether there is a `/dev/kvm`; says so if not.
pub(super) fn usable() -> bool {
    let options = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm");
    if options.is_err() {
        println!("skipped: /dev/kvm is not usable");
    }
    options.is_ok()
}

/// A program on this host's files, with `host` at `/mnt` and a `/tmp` of its own, in so many bytes of memory.
pub(super) fn config(program: &[&str], host: &Path, memory: u64) -> RunConfig {
    let words = |words: &[&str]| words.iter().map(|&word| word.into()).collect();
    RunConfig {
        memory,
        commit: Commit::Over,
        root: Some("/".into()),
        mounts: vec![
            Mount::ReadWrite {
                host: host.into(),
                guest: b"/mnt".to_vec(),
            },
            Mount::Tmpfs {
                guest: b"/tmp".to_vec(),
            },
        ],
        workdir: b"/mnt".to_vec(),
        max_procs: 16,
        cpus: 2,
        ..RunConfig::new(program[0].into(), words(&program[1..]))
    }
}

/// Waits until the guest has made a file of that name, so long at most.
pub(super) fn wait_for(path: &Path, patience: Duration) {
    let until = Instant::now() + patience;
    while !path.exists() {
        assert!(Instant::now() < until, "{} does not come", path.display());
        std::thread::sleep(Duration::from_millis(5));
    }
}
