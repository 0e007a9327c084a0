//! Guests of one template in one machine. Skipped, aloud, without a usable `/dev/kvm`.

use std::path::Path;
use std::time::Instant;

use super::*;
use crate::config::{Commit, ForkMode};
use crate::machine::testing::{config, usable, wait_for};
use crate::snapshot::guest::{MachineData, open_guest, save_guest};
use crate::snapshot::read::Trust;
use crate::snapshot::records::Role;
use crate::snapshot::write::Writer;

const MEMORY: u64 = 64 << 20;
/// Memory of a machine for many of it.
const ROOMY: u64 = 1 << 30;
/// How long a guest may take until it is ready.
const PATIENCE: Duration = Duration::from_secs(60);

/// Runs a program in `host` until it has made `ready` there, freezes it, ends it, and makes a machine for many of it.
fn frozen(program: &[&str], host: &Path, memory: u64) -> Arc<SharedMachine> {
    let machine = {
        let host_side = HostSide {
            stdio: Given::inherited().expect("descriptors"),
            signals: ProcessSignals::LeftAlone,
        };
        Machine::build(&config(program, host, MEMORY), host_side).expect("a machine")
    };
    let kernel = machine.kernel();
    let runs = std::thread::spawn(move || machine.run(Some(Duration::from_secs(60))));
    wait_for(&host.join("ready"), PATIENCE);
    std::thread::sleep(Duration::from_millis(50));
    let data = MachineData {
        version: String::new(),
        command: Vec::new(),
        memory: MEMORY,
        page_file: 0,
        overcommit: true,
        process_memory: None,
    };
    let writer = Writer::in_memory("template").expect("memory");
    let saved = save_guest(&kernel, &data, writer, None, &mut |_| ()).expect("a template");
    kernel.sched.end();
    runs.join().expect("no panic").expect("an end");
    let file = saved.written.file;
    let snapshot = crate::snapshot::read::Snapshot::from_file(
        file,
        "the template".to_owned(),
        Trust::Sealed,
        None,
    );
    let snapshot = Arc::new(snapshot.expect("a snapshot"));
    let (_, records) = open_guest(&snapshot).expect("a guest");
    let wanted = Wanted {
        memory,
        page_file: None,
        commit: Commit::Over,
        process_memory: None,
        fork: ForkMode::Shared,
        cpus: 2,
        strace: false,
    };
    let image = Arc::new(Image::read(&snapshot).expect("an image"));
    SharedMachine::start(&wanted, &image, records).expect("a machine of many")
}

fn nothing() -> Ends {
    let null = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/null");
    let end = stdio::HostEnd::new(null.expect("a device").into()).expect("an end");
    let end = Some(Arc::new(end));
    Ends([end.clone(), end.clone(), end])
}

fn wish(number: u32, ends: &Ends) -> Wish {
    Wish {
        identity: Identity {
            role: Role::Clone {
                number,
                of: 100,
                template: "warm".to_owned(),
            },
            settings: Vec::new(),
        },
        ends: ends.clone(),
        timeout: Some(Duration::from_secs(120)),
    }
}

/// Waits in a loop with a process of its own for `go`; then each writes down who it is, and a pattern of its own
/// over what it shared.
const SCRIPT: &str = "x=$(head -c 3000 /dev/zero | tr '\\0' a); echo first >/tmp/file; : >ready; \
    while [ ! -e go ]; do sleep 0.05; done; read role number rest </dev/vmm; \
    x=$(echo \"$x\" | tr a $((number % 10))); echo $number >>/tmp/file; \
    { echo $role $number; echo $x | cksum; cat /tmp/file; } >out.$number; exit $((number % 3))";

#[test]
fn shared_machine_can_be_used_by_several_threads() {
    fn is_sync<T: Send + Sync>() {}
    is_sync::<SharedMachine>();
    is_sync::<Tenant>();
}

#[test]
fn tenants_do_what_is_theirs() {
    if !usable() {
        return;
    }
    let host = tempfile::tempdir().expect("a directory");
    let machine = frozen(&["sh", "-c", SCRIPT], host.path(), ROOMY);
    assert!(machine.forks());
    let ends = nothing();
    let fork = |n| machine.fork(wish(n, &ends)).expect("a tenant");
    let tenants: Vec<Tenant> = (1..=20).map(fork).collect();
    std::thread::sleep(Duration::from_millis(100));
    assert!(tenants.iter().all(|tenant| !tenant.has_ended()));
    std::fs::write(host.path().join("go"), b"").expect("a file");
    let mut seen = std::collections::BTreeSet::new();
    for (number, tenant) in (1..).zip(tenants) {
        assert_eq!(
            u32::from(tenant.wait().status()),
            number % 3,
            "number {number}"
        );
        let out = std::fs::read_to_string(host.path().join(format!("out.{number}")));
        let out = out.expect("what it wrote");
        let lines: Vec<&str> = out.lines().collect();
        let own = [lines[0], lines[2], lines[3]];
        let number = number.to_string();
        assert_eq!(own, [&format!("clone {number}"), "first", &number]);
        seen.insert(lines[1].to_owned());
    }
    assert_eq!(seen.len(), 10, "patterns are mixed up: {seen:?}");
}

/// Threads and descriptors of this process, whatever other tests do meanwhile being small.
fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count)
}

#[test]
fn ended_tenants_give_everything_back() {
    if !usable() {
        return;
    }
    let host = tempfile::tempdir().expect("a directory");
    // The first ones read all files that a later one may come to.
    let script = "read line </dev/vmm; : >ready; said=$(cat /dev/vmm); \
        case $said in clone\\ ?\\ *|clone\\ ??\\ *) sleep 0;; esac; \
        case $said in clone*[02468]\\ 100*) exit 5;; *) while :; do sleep 1; done;; esac";
    let script = &format!(
        ": >ready; echo freeze >/dev/vmm; while [ ! -e go ]; do sleep 0.01; done; {script}"
    );
    let machine = frozen(&["sh", "-c", script], host.path(), ROOMY);
    std::fs::write(host.path().join("go"), b"").expect("a file");
    let ends = nothing();
    let manager = &machine.seed().memory.manager;
    let counts = || {
        machine.seed().memory.finish_flushes();
        // A virtual CPU that the host does not let run has not acknowledged its part yet.
        let until = Instant::now() + PATIENCE;
        let held = || manager.stats().data.in_flight + manager.stats().tables.in_flight;
        while held() > 0 && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(5));
            machine.seed().memory.finish_flushes();
        }
        let stats = manager.stats();
        let frames = |zone: shadow_mm::ZoneStats| zone.active + zone.in_flight;
        (
            manager.spaces().len(),
            frames(stats.tables),
            frames(stats.data),
            stats.commit_charged,
            stats.clone_blocks + stats.forked_pages,
            stats.sections,
        )
    };
    let rounds = |from: u32, to: u32| {
        for number in from..to {
            let tenant = machine.fork(wish(number, &ends)).expect("a tenant");
            match number % 2 {
                0 => assert_eq!(tenant.wait().status(), 5, "number {number}"),
                // While it is wherever it is.
                _ => drop(tenant),
            }
        }
    };
    // What the first ones read of the image and the libraries stays.
    rounds(1, 41);
    let (before, open) = (counts(), descriptors());
    rounds(41, 1041);
    let after = counts();
    assert_eq!(before, after);
    let more = descriptors().saturating_sub(open);
    assert!(more < 50, "{more} descriptors more");
}

/// One tenant takes all memory of the machine, and then nobody but its own process ends.
#[test]
fn who_takes_all_memory_is_who_ends() {
    if !usable() {
        return;
    }
    let host = tempfile::tempdir().expect("a directory");
    let script = "while [ ! -e go ]; do sleep 0.05; done; read role number rest </dev/vmm; \
        if [ $number = 1 ]; then head -c 999999999 /dev/zero | tail -c 999999999 >/dev/null; code=$?; : >done; exit $code; fi; \
        while [ ! -e done ]; do x=$(head -c 300000 /dev/zero | tr '\\0' a); done; exit 7";
    let script = format!(": >ready; {script}");
    let machine = frozen(&["sh", "-c", &script], host.path(), MEMORY);
    let ends = nothing();
    let fork = |n| machine.fork(wish(n, &ends)).expect("a tenant");
    let tenants: Vec<Tenant> = (1..=4).map(fork).collect();
    std::fs::write(host.path().join("go"), b"").expect("a file");
    let ended: Vec<u8> = tenants
        .into_iter()
        .map(|tenant| tenant.wait().status())
        .collect();
    assert_eq!(ended, [137, 7, 7, 7]);
}
