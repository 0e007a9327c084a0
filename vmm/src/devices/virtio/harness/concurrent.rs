//! Several requests of a disk in flight, on the device's own threads.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use virtio_bindings::bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::super::block::{Access, Block};
use super::super::disk_file::Storage;
use super::super::queue::Left;
use super::super::worker::{self, HANDS};
use super::disk::{FLUSH, PUT, READ, header};
use super::{DATA, Driver, NEXT, USED, WRITE};
use crate::hv::kvm::board;

const PATIENCE: Duration = Duration::from_secs(20);
/// Reads and writes from here on take until the gate opens.
const SLOW: u64 = 32;

/// Keeps nothing. What is slow waits for the gate.
#[derive(Clone, Debug, Default)]
struct Gate(Arc<(Mutex<State>, Condvar)>);

#[derive(Debug, Default)]
struct State {
    open: bool,
    /// How many wait, and how many did at most.
    inside: usize,
    most: usize,
    log: Vec<&'static str>,
}

impl Gate {
    fn pass(&self, at: u64, what: &'static str) {
        let (state, changed) = &*self.0;
        let mut state = state.lock();
        if at >= SLOW * 512 {
            state.inside += 1;
            state.most = state.most.max(state.inside);
            while !state.open {
                changed.wait(&mut state);
            }
            state.inside -= 1;
        }
        state.log.push(what);
    }

    fn open(&self) {
        self.0.0.lock().open = true;
        self.0.1.notify_all();
    }
}

impl Storage for Gate {
    fn read_at(&self, to: &mut [u8], at: u64) -> io::Result<()> {
        self.pass(at, "read");
        to.fill(1);
        Ok(())
    }

    fn write_at(&self, _from: &[u8], at: u64) -> io::Result<()> {
        self.pass(at, "write");
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        self.pass(0, "flush");
        Ok(())
    }

    fn punch(&self, at: u64, _bytes: u64) -> io::Result<()> {
        self.pass(at, "punch");
        Ok(())
    }
}

/// A disk with its threads; they end with it.
struct Machine {
    driver: Driver,
    gate: Gate,
    doorbell: EventFd,
    stop: EventFd,
    requests: u16,
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.gate.open();
        let _ = self.stop.write(1);
    }
}

impl Machine {
    fn new() -> Self {
        Self::without(0).started()
    }

    /// One without threads, with a driver that does not know these features.
    fn without(features: u64) -> Self {
        let gate = Gate::default();
        let block = Block::new(Box::new(gate.clone()), 64, Access::ReadWrite, "x");
        Self {
            driver: Driver::new(Box::new(block)).start(features),
            gate,
            doorbell: board::event().unwrap(),
            stop: board::event().unwrap(),
            requests: 0,
        }
    }

    fn started(self) -> Self {
        let bells = vec![self.doorbell.try_clone().unwrap()];
        let ends = self.stop.try_clone().unwrap();
        worker::start("disk", &self.driver.transport, bells, ends, || {}).unwrap();
        self
    }

    /// Puts a request of a sector into the queue; returns its first descriptor.
    fn put(&mut self, kind: u32, sector: u64) -> u16 {
        let (head, at) = (self.requests * 3, DATA + u64::from(self.requests) * 0x1000);
        self.requests += 1;
        self.driver.fill(at, &header(kind, sector));
        let second = if kind == FLUSH { head + 2 } else { head + 1 };
        self.driver.descriptor(head, at, 16, NEXT, second);
        let flags = if kind == READ { NEXT | WRITE } else { NEXT };
        self.driver
            .descriptor(head + 1, at + 16, 512, flags, head + 2);
        self.driver.descriptor(head + 2, at + 1024, 1, WRITE, 0);
        self.driver.offer(head);
        head
    }

    fn ring(&self) {
        self.doorbell.write(1).unwrap();
    }

    /// Waits until so many were answered; their first descriptors.
    fn answered(&self, count: u16) -> Vec<u16> {
        let memory = &self.driver.memory;
        let until = Instant::now() + PATIENCE;
        while memory.read_obj::<u16>(GuestAddress(USED + 2)).unwrap() < count {
            assert!(Instant::now() < until, "not answered");
            std::thread::yield_now();
        }
        let head = |i: u64| memory.read_obj::<u32>(GuestAddress(USED + 4 + i * 8));
        (0..count.into()).map(|i| head(i).unwrap() as u16).collect()
    }

    /// Waits for an interrupt.
    fn interrupted(&self) {
        let until = Instant::now() + PATIENCE;
        while self.driver.interrupt.read().is_err() {
            assert!(Instant::now() < until, "no interrupt");
            std::thread::yield_now();
        }
    }

    fn log(&self) -> Vec<&'static str> {
        self.gate.0.0.lock().log.clone()
    }

    /// Waits until so many requests wait at the gate.
    fn waiting(&self, count: usize) {
        let until = Instant::now() + PATIENCE;
        while self.gate.0.0.lock().inside != count {
            assert!(Instant::now() < until, "they do not come");
            std::thread::yield_now();
        }
    }
}

#[test]
fn slow_request_does_not_hold_up_others() {
    let mut machine = Machine::new();
    let slow = machine.put(READ, SLOW);
    machine.ring();
    machine.waiting(1);
    let fast = [machine.put(READ, 0), machine.put(PUT, 1)];
    machine.ring();
    let mut answered = machine.answered(2);
    answered.sort_unstable();
    assert_eq!(answered, fast);
    machine.interrupted();
    machine.gate.open();
    assert_eq!(machine.answered(3)[2], slow);
}

#[test]
fn flush_waits_for_what_was_announced_before_it_and_for_nothing_else() {
    let mut machine = Machine::new();
    let slow = machine.put(PUT, SLOW);
    let flush = machine.put(FLUSH, 0);
    let later = machine.put(PUT, 1);
    machine.ring();
    assert_eq!(machine.answered(1), [later]);
    machine.waiting(1);
    assert_eq!(machine.log(), ["write"]);
    machine.gate.open();
    assert_eq!(machine.answered(3), [later, slow, flush]);
    assert_eq!(machine.log(), ["write", "write", "flush"]);
}

#[test]
fn no_more_are_in_flight_than_there_are_threads() {
    let mut machine = Machine::new();
    for _ in 0..=HANDS {
        machine.put(READ, SLOW);
    }
    machine.ring();
    machine.waiting(HANDS);
    machine.gate.open();
    machine.answered(HANDS as u16 + 1);
    assert_eq!(machine.gate.0.0.lock().most, HANDS);
}

/// A driver that resets the device, takes its queue away, or a state that is saved: nothing is in flight then.
#[test]
fn reset_and_save_wait_for_what_is_in_flight() {
    type Act = fn(&Driver);
    let acts: [Act; 3] = [
        |driver| driver.set(0x70, 0),
        |driver| driver.set(0x44, 0),
        |driver| drop(driver.transport.save()),
    ];
    for act in acts {
        let mut machine = Machine::new();
        machine.put(READ, SLOW);
        machine.ring();
        machine.waiting(1);
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| act(&machine.driver));
            std::thread::sleep(Duration::from_millis(30));
            assert!(!waits.is_finished());
            machine.gate.open();
            waits.join().unwrap();
            machine.answered(1);
        });
    }
}

/// What was announced while a state was saved is answered afterwards.
#[test]
fn what_comes_while_it_is_saved_is_not_lost() {
    let mut machine = Machine::new();
    machine.put(READ, SLOW);
    machine.ring();
    machine.waiting(1);
    let transport = Arc::clone(&machine.driver.transport);
    let saves = std::thread::spawn(move || transport.save());
    std::thread::sleep(Duration::from_millis(30));
    machine.put(READ, 0);
    machine.ring();
    std::thread::sleep(Duration::from_millis(10));
    machine.gate.open();
    saves.join().unwrap();
    machine.answered(2);
}

/// The driver wants an interrupt for every answer, and gets one for all that were there together.
#[test]
fn one_interrupt_does_for_all_that_were_announced_together() {
    let mut machine = Machine::without(1 << VIRTIO_RING_F_EVENT_IDX);
    for sector in 0..5 {
        machine.put(READ, sector);
    }
    assert_eq!(machine.driver.transport.serve(0), Left::Nothing);
    machine.answered(5);
    assert_eq!(machine.driver.interrupt.read().unwrap(), 1);
}

/// However many threads are left to look for more.
#[test]
fn interrupt_does_not_wait_for_a_slow_request() {
    for slow in 1..=HANDS {
        let mut machine = Machine::without(1 << VIRTIO_RING_F_EVENT_IDX).started();
        machine.put(READ, 0);
        for _ in 0..slow {
            machine.put(READ, SLOW);
        }
        machine.ring();
        machine.interrupted();
        machine.waiting(slow);
        machine.gate.open();
        machine.answered(slow as u16 + 1);
        machine.interrupted();
    }
}

#[test]
fn what_is_saved_has_the_interrupt_of_each_answer() {
    let mut machine = Machine::without(1 << VIRTIO_RING_F_EVENT_IDX);
    machine.put(READ, 0);
    machine.put(READ, 1);
    let transport = Arc::clone(&machine.driver.transport);
    transport.take(0).unwrap().finish();
    assert_eq!(machine.driver.get(0x60), 0);
    drop(transport.save());
    assert_eq!(machine.driver.get(0x60), 1);
}
