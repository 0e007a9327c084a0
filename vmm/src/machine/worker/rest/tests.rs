//! Skipped, aloud, without a usable `/dev/kvm`.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::machine::testing::{config, usable, wait_for};
use crate::machine::{HostSide, Machine};

const MEMORY: u64 = 64 << 20;
const PATIENCE: Duration = Duration::from_secs(30);

#[test]
fn guest_that_waits_has_no_virtual_machine_and_goes_on_with_one() {
    if !usable() {
        return;
    }
    let host = tempfile::tempdir().expect("a directory");
    // Two processors, processes with memory of their own that is copied on writing, registers that are in use.
    let script = "a=1; (sleep 6; echo $((a + 41)) >>out) & for i in 1 2 3; do a=$((a * 3)); done; \
        : >ready; wait; awk 'BEGIN { for (i = 0; i < 1000; i++) s += sqrt(i); printf \"%.6f\\n\", s }' >>out; \
        echo $a >>out";
    let config = config(&["sh", "-c", script], host.path(), MEMORY);
    let machine = Machine::build(&config, HostSide::whole_process().expect("descriptors"));
    let machine = machine.expect("a machine");
    let (vm, kernel) = (Arc::clone(&machine.bare.hardware.vm), machine.kernel());
    let runs = std::thread::spawn(move || machine.run(Some(PATIENCE * 2)).expect("a machine"));
    wait_for(&host.path().join("ready"), PATIENCE);
    let until = Instant::now() + PATIENCE;
    while !vm.rests() {
        assert!(Instant::now() < until, "it does not come to rest");
        std::thread::sleep(Duration::from_millis(5));
    }
    // What others do with its memory meanwhile needs no virtual machine.
    drop(kernel.stop());
    assert!(!kernel.memory.flushes.errand_waits());
    let ended = runs.join().expect("no panic");
    assert_eq!(ended.status(), 0);
    let out = std::fs::read_to_string(host.path().join("out")).expect("it has written");
    assert_eq!(out, "42\n21065.833111\n27\n");
}
