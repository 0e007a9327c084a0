//! Damaged records are refused: nothing panics, whatever was changed.

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

use super::kinds::busy;
use super::*;
use crate::linux::call::{Args, CallRecord};
use crate::linux::proc::timers_due;

/// A change of encoded records.
#[derive(Clone, Debug)]
enum Damage {
    Set(prop::sample::Index, u8),
    Flip(prop::sample::Index, u8),
    Cut(prop::sample::Index),
    /// A stretch is put over another one: numbers that are right elsewhere.
    Copy(prop::sample::Index, prop::sample::Index, usize),
}

fn damage() -> impl Strategy<Value = Damage> {
    let at = any::<prop::sample::Index>;
    prop_oneof![
        4 => (at(), any::<u8>()).prop_map(|(at, byte)| Damage::Set(at, byte)),
        4 => (at(), 0..8_u8).prop_map(|(at, bit)| Damage::Flip(at, bit)),
        1 => at().prop_map(Damage::Cut),
        2 => (at(), at(), 1..32_usize).prop_map(|(from, to, n)| Damage::Copy(from, to, n)),
    ]
}

fn apply(bytes: &mut Vec<u8>, damage: &Damage) {
    match damage {
        Damage::Set(at, byte) => {
            let at = at.index(bytes.len());
            bytes[at] = *byte;
        }
        Damage::Flip(at, bit) => {
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
        }
        Damage::Cut(at) => bytes.truncate(at.index(bytes.len()).max(1)),
        Damage::Copy(from, to, n) => {
            let (from, to) = (from.index(bytes.len()), to.index(bytes.len()));
            let n = (*n).min(bytes.len() - from).min(bytes.len() - to);
            bytes.copy_within(from..from + n, to);
        }
    }
}

/// What a machine does with a guest before any of it runs, another save, and what the guest may do: each
/// thread goes on with its call and its signals, makes some calls, and ends with its process.
fn live(m: &Machine) {
    timers_due(&m.k);
    m.k.sched.stop();
    let _ = save(&m.k, &mut Image::new(&m.k.memory));
    let mut threads = m.k.sched.drain();
    m.k.sched.go_on();
    threads.retain_mut(|t| !matches!(m.rounds(t, 50), Some(Turn::Exited)));
    for t in &mut threads {
        t.call = None;
        for (nr, args) in [
            (libc::SYS_getppid, [0; 3]),
            (libc::SYS_brk, [0; 3]),
            (libc::SYS_getcwd, [BUF, 100, 0]),
            (libc::SYS_kill, [0, 0, 0]),
            (libc::SYS_getitimer, [0, BUF, 0]),
            (libc::SYS_wait4, [u64::MAX, BUF, 1]),
        ] {
            start(m, t, nr, args);
        }
    }
    for t in &mut threads {
        start(m, t, libc::SYS_exit_group, [3, 0, 0]);
        m.rounds(t, 50);
    }
}

fn start(m: &Machine, t: &mut Thread, nr: i64, args: [u64; 3]) {
    let mut all = [0; 6];
    all[..3].copy_from_slice(&args);
    t.call = Some(CallRecord {
        nr: nr as u64,
        args: Args(all),
        ..CallRecord::default()
    });
    m.rounds(t, 50);
}

#[test]
fn damaged_records_are_refused_or_harmless() {
    let (g, others) = busy();
    let mut saved = g.save(others);
    let good = postcard::to_stdvec(&saved.records).unwrap();
    let config = Config {
        cases: 400,
        failure_persistence: None,
        ..Config::default()
    };
    let (mut undecodable, mut refused, mut made) = (0, 0, 0);
    let image = std::cell::RefCell::new(&mut saved.image);
    let mut count = |bytes: &[u8]| match postcard::from_bytes::<Records>(bytes) {
        Err(_) => undecodable += 1,
        Ok(records) => match again(&records, &mut image.borrow_mut()) {
            Err(_) => refused += 1,
            Ok(m) => {
                made += 1;
                live(&m);
            }
        },
    };
    let count = std::cell::RefCell::new(&mut count);
    TestRunner::new(config)
        .run(&prop::collection::vec(damage(), 1..4), |damages| {
            let mut bytes = good.clone();
            damages.iter().for_each(|damage| apply(&mut bytes, damage));
            (count.borrow_mut())(&bytes);
            Ok(())
        })
        .unwrap();
    println!("{undecodable} undecodable, {refused} refused, {made} made");
    assert!(refused > 0 && made > 0);
}
