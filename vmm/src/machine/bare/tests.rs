//! Programs that are stopped, written down, and go on in another machine. Skipped, aloud, without a usable
//! `/dev/kvm`.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::*;
use crate::config::ForkMode;
use crate::linux::kernel::Kernel;
use crate::linux::saved::tests::image::Image;
use crate::machine::Ended;
use crate::machine::testing::{config, usable, wait_for};
use crate::snapshot::records::save;

const MEMORY: u64 = 192 << 20;
/// How long a guest may take until it is ready.
const PATIENCE: Duration = Duration::from_secs(30);

fn run(machine: Machine) -> (Arc<Kernel>, std::thread::JoinHandle<Ended>) {
    let kernel = machine.kernel();
    let limit = Some(Duration::from_secs(60));
    let runs = std::thread::spawn(move || machine.run(limit).expect("a machine that ends"));
    (kernel, runs)
}

fn host_side() -> HostSide {
    HostSide::whole_process().expect("descriptors")
}

/// Runs a program until it has made `/mnt/ready`, writes it down, ends that machine, and lets the program go on in
/// another one to its end: its status, and what it wrote to `/mnt/out`.
fn carry_over(program: &[&str]) -> Option<(u8, String)> {
    carry_over_with(program, Some("/".into()))
}

/// The same with another root, or only the program and its libraries.
fn carry_over_with(program: &[&str], root: Option<std::path::PathBuf>) -> Option<(u8, String)> {
    if !usable() {
        return None;
    }
    let host = tempfile::tempdir().expect("a directory");
    let mut config = config(program, host.path(), MEMORY);
    config.root = root;
    let machine = Machine::build(&config, host_side()).expect("a machine");
    let (kernel, runs) = run(machine);
    wait_for(&host.path().join("ready"), PATIENCE);
    std::thread::sleep(Duration::from_millis(50));
    let stopped = kernel.stop();
    let mut image = Image::new(&kernel.memory);
    let records = save(&kernel, &mut image).expect("a guest that can be saved");
    // It does not run again: what it would write now is the other one's to write.
    kernel.sched.end();
    drop(stopped);
    runs.join().expect("no panic");
    let wanted = Wanted {
        memory: MEMORY,
        page_file: None,
        commit: Commit::Over,
        process_memory: None,
        fork: ForkMode::Shared,
        cpus: records.cpus(),
        strace: false,
    };
    let load = |hardware: &Hardware| {
        image.load_into(&hardware.memory);
        Ok(image)
    };
    let machine = Machine::restore(&wanted, &records, Identity::default(), host_side(), load);
    let (_, runs) = run(machine.expect("a machine made again"));
    std::fs::write(host.path().join("go"), b"").expect("a file");
    let ended = runs.join().expect("no panic");
    let out = std::fs::read_to_string(host.path().join("out")).unwrap_or_default();
    Some((ended.status(), out))
}

#[test]
fn shell_and_its_pipeline_go_on() {
    let script = "i=0; exec >out; (while :; do echo line $i; i=$((i+1)); [ $i = 3 ] && : >ready; \
        [ $i -gt 3 ] && [ -e go ] && break; done) | (read a; read b; echo $a; echo $b; n=0; \
        while read -r l; do last=$l; n=$((n+1)); done; \
        [ \"$last\" = \"line $((n+1))\" ] && echo good; exit 7); echo $?";
    if let Some((status, out)) = carry_over(&["sh", "-c", script]) {
        assert_eq!((status, out.as_str()), (0, "line 0\nline 1\ngood\n7\n"));
    }
}

#[test]
fn program_without_a_root_goes_on() {
    let script = ": >ready; while [ ! -e go ]; do :; done; echo went on >out";
    if let Some((status, out)) = carry_over_with(&["sh", "-c", script], None) {
        assert_eq!((status, out.as_str()), (0, "went on\n"));
    }
}

#[test]
fn sleeping_program_sleeps_what_is_left() {
    let script = ": >ready; sleep 1; echo slept >out";
    let from = Instant::now();
    if let Some((status, out)) = carry_over(&["sh", "-c", script]) {
        assert_eq!((status, out.as_str()), (0, "slept\n"));
        assert!(from.elapsed() >= Duration::from_secs(1));
    }
}

#[test]
fn interpreter_goes_on_where_it_was() {
    let script = "import os, time, threading, random\n\
        random.seed(5); rows = [random.random() for _ in range(50000)]\n\
        done = []\n\
        def work(n):\n\
        \x20   total = 0\n\
        \x20   while not os.path.exists('go'):\n\
        \x20       total += 1\n\
        \x20   done.append(n)\n\
        t = [threading.Thread(target=work, args=(n,)) for n in range(3)]\n\
        [x.start() for x in t]\n\
        before = time.monotonic()\n\
        open('ready', 'w').close()\n\
        [x.join() for x in t]\n\
        passed = time.monotonic() - before\n\
        random.seed(5); same = rows == [random.random() for _ in range(50000)]\n\
        print(sorted(done), same, 0 <= passed < 30, file=open('out', 'w'))\n";
    if !Path::new("/usr/bin/python3").exists() {
        println!("skipped: no python3");
        return;
    }
    if let Some((status, out)) = carry_over(&["python3", "-c", script]) {
        assert_eq!((status, out.as_str()), (0, "[0, 1, 2] True True\n"));
    }
}

#[test]
fn database_finishes_its_transaction() {
    let script = "import os, sqlite3, time\n\
        db = sqlite3.connect('test.db', isolation_level=None)\n\
        db.execute('create table t (n integer)')\n\
        db.execute('begin')\n\
        db.executemany('insert into t values (?)', ((n,) for n in range(2000)))\n\
        open('ready', 'w').close()\n\
        while not os.path.exists('go'): time.sleep(0.01)\n\
        db.executemany('insert into t values (?)', ((n,) for n in range(2000, 4000)))\n\
        db.execute('commit')\n\
        db = sqlite3.connect('test.db')\n\
        print(db.execute('select count(*), sum(n) from t').fetchone(), \
        db.execute('pragma integrity_check').fetchone()[0], file=open('out', 'w'))\n";
    if !Path::new("/usr/bin/python3").exists() {
        println!("skipped: no python3");
        return;
    }
    if let Some((status, out)) = carry_over(&["python3", "-c", script]) {
        assert_eq!((status, out.as_str()), (0, "(4000, 7998000) ok\n"));
    }
}
