//! A console: what is typed waits for buffers and buffers wait for it; the screen's size.

use std::io::Write;
use std::sync::mpsc;

use vm_memory::{Bytes, GuestAddress};

use super::super::console::{Console, Port};
use super::super::queue::Left;
use super::{AVAILABLE, Buffer, DATA, Driver, SIZE, USED, WRITE};
use crate::devices::keyboard::{Keyboard, ScreenSize};
use crate::hv::kvm::board;

const SMALL: ScreenSize = ScreenSize {
    columns: 80,
    rows: 25,
};
const LARGE: ScreenSize = ScreenSize {
    columns: 200,
    rows: 50,
};

struct Sink(mpsc::Sender<Vec<u8>>);

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.send(bytes.to_vec()).unwrap();
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn console(size: Option<ScreenSize>) -> (Driver, std::sync::Arc<Port>, mpsc::Receiver<Vec<u8>>) {
    let (sender, receiver) = mpsc::channel();
    let port = Port::new(size);
    let driver = Driver::new(Box::new(Console::new(&port, Box::new(Sink(sender)))));
    let bells = vec![board::event().unwrap(), board::event().unwrap()];
    driver.transport.connect(bells);
    (driver, port, receiver)
}

/// Lets the time pass after which a driver has started.
fn started() {
    std::thread::sleep(std::time::Duration::from_millis(260));
}

fn used(driver: &Driver) -> u16 {
    driver.memory.read_obj(GuestAddress(USED + 2)).unwrap()
}

#[test]
fn what_is_typed_waits_for_a_buffer_and_a_buffer_for_it() {
    let (driver, port, _out) = console(None);
    let mut driver = driver.start(0);
    port.input(b"one");
    // It has only just started.
    assert!(!port.feed());
    assert_eq!(driver.transport.serve(0), Left::Nothing);
    started();
    assert_eq!(
        driver.request(&[Buffer::In(2)]),
        (b"on".to_vec(), 2),
        "what fits"
    );
    assert_eq!(driver.request(&[Buffer::In(8)]).1, 1);
    // Two buffers wait: nothing comes back until something is typed, and then only one.
    for index in 0..2 {
        driver.descriptor(index, DATA + u64::from(index) * 64, 64, WRITE, 0);
        assert_eq!(driver.announce(index), Left::Nothing);
    }
    assert_eq!(used(&driver), 2);
    assert!(port.feed());
    port.input(b"two");
    assert!(!port.feed());
    assert_eq!(driver.transport.serve(0), Left::Nothing);
    assert!(port.feed());
    assert_eq!(used(&driver), 3);
    let mut got = [0; 3];
    driver
        .memory
        .read_slice(&mut got, GuestAddress(DATA))
        .unwrap();
    assert_eq!(&got, b"two");
    let entries = u64::from(SIZE) * 2;
    assert!(AVAILABLE + 4 + entries < USED, "the rings do not meet");
}

#[test]
fn no_more_is_kept_than_there_is_room_for() {
    let (_driver, port, _out) = console(None);
    let room = port.room();
    assert_eq!(port.input(&vec![b'x'; room + 10]), room);
    assert_eq!((port.room(), port.input(b"y")), (0, 0));
}

#[test]
fn what_the_guest_writes_arrives() {
    let (mut driver, _port, out) = console(None);
    driver.queue = 1;
    let mut driver = driver.start(0);
    let long = vec![b'l'; 9000];
    let (_, length) = driver.request(&[Buffer::Out(b"hello "), Buffer::Out(&long)]);
    assert_eq!(length, 0);
    let all: Vec<u8> = out.try_iter().flatten().collect();
    assert_eq!(all, [b"hello ".to_vec(), long].concat());
}

#[test]
fn screen_s_size_is_told_at_the_start_and_when_it_changes() {
    let (driver, port, _out) = console(Some(SMALL));
    let size = |driver: &Driver| {
        let raw = driver.get(0x100);
        (raw as u16, (raw >> 16) as u16)
    };
    port.resize(LARGE);
    assert_eq!(driver.get(0x60), 0, "nobody is there to hear it");
    let driver = driver.start(0);
    assert_eq!(driver.get(0x60), 2);
    assert_eq!(size(&driver), (200, 50));
    driver.set(0x64, 2);
    let generation = driver.get(0xfc);
    port.resize(LARGE);
    assert_eq!((driver.get(0x60), driver.get(0xfc)), (0, generation));
    port.resize(SMALL);
    assert_eq!((driver.get(0x60), size(&driver)), (2, (80, 25)));
    assert_ne!(driver.get(0xfc), generation);
    // Without a screen, there is no size.
    let (driver, port, _out) = console(None);
    let driver = driver.start(0);
    port.resize(LARGE);
    assert_eq!((driver.get(0x60), driver.get(0x100)), (0, 0));
}

#[test]
fn saved_and_restored_console_goes_on() {
    let (driver, port, _out) = console(Some(LARGE));
    let driver = driver.start(0);
    port.input(b"typed");
    let (saved, of_port) = (driver.transport.save(), port.save());
    let (mut again, new_port, _out) = console(Some(SMALL));
    new_port
        .restore(&serde_json::from_str(&serde_json::to_string(&of_port).unwrap()).unwrap())
        .unwrap();
    again.memory = driver.memory.clone();
    let (sender, _out) = mpsc::channel();
    let device = Console::new(&new_port, Box::new(Sink(sender)));
    let line = again.interrupt.try_clone().unwrap();
    again.transport = super::super::mmio::Transport::new(Box::new(device), &driver.memory, line);
    again.transport.restore(&saved).unwrap();
    assert_eq!(again.transport.save(), saved);
    assert_eq!(new_port.save(), of_port);
    assert_eq!(again.get(0x100) as u16, 200);
    started();
    assert_eq!(again.request(&[Buffer::In(5)]), (b"typed".to_vec(), 5));
    let none = Port::new(None);
    assert!(none.restore(&of_port).is_err());
}
