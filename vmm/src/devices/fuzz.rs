//! What fuzz targets (`tests/fuzz`) call, and a short deterministic run of the same in the unit tests:
//! bytes become what a hostile driver does. Whatever it is, a device answers or asks for a reset, comes
//! to an end, and can be saved and restored.

use std::io;
use std::sync::Arc;

use vm_device::bus::{MmioAddress, PioAddress};
use vm_device::{DeviceMmio, DevicePio};

use super::keyboard::{Keyboard, ScreenSize};
use super::serial::{self, Serial};
use super::virtio::block::{Access, Block};
use super::virtio::console::{Console, Port};
use super::virtio::harness::Driver;
use super::virtio::mmio::Transport;
use super::virtio::mmio::flight::Flight;
use super::virtio::rng::Rng;
use super::virtio::{VirtioDevice, worker};
use crate::hv::kvm::board;

/// Most accesses of one run.
const MOST: usize = 512;
/// Descriptors of one run.
const DESCRIPTORS: u16 = 16;

/// Bytes, then zeros.
struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn bytes<const N: usize>(&mut self) -> [u8; N] {
        let mut all = [0; N];
        let count = N.min(self.0.len());
        let (now, later) = self.0.split_at(count);
        all[..count].copy_from_slice(now);
        self.0 = later;
        all
    }

    fn byte(&mut self) -> u8 {
        self.bytes::<1>()[0]
    }

    fn word(&mut self) -> u16 {
        u16::from_le_bytes(self.bytes())
    }

    fn long(&mut self) -> u64 {
        u64::from_le_bytes(self.bytes())
    }
}

fn device(choice: u8) -> Box<dyn VirtioDevice> {
    match choice % 3 {
        0 => Box::new(Block::in_memory(64, Access::ReadWrite)),
        1 => {
            let size = (choice & 4 != 0).then(ScreenSize::default);
            let port = Port::new(size);
            port.input(b"typed");
            Box::new(Console::new(&port, Box::new(io::sink())))
        }
        _ => Box::new(Rng),
    }
}

/// Accesses of any width, anywhere in a device's registers.
pub fn registers(data: &[u8]) {
    let mut input = Input(data);
    let driver = Driver::new(device(input.byte()));
    for _ in 0..MOST {
        if input.0.is_empty() {
            break;
        }
        let how = input.byte();
        let (width, offset) = (usize::from(how % 8) + 1, u64::from(input.word() % 0x180));
        let mut data = input.long().to_le_bytes();
        if how & 0x80 == 0 {
            let data = &mut data[..width];
            driver.transport.mmio_read(MmioAddress(0), offset, data);
        } else {
            let data = &data[..width];
            driver.transport.mmio_write(MmioAddress(0), offset, data);
        }
        let _ = driver.transport.serve(usize::from(how >> 3 & 1));
    }
    let saved = driver.transport.save();
    driver.transport.restore(&saved).expect("it was saved");
}

/// Without indirect descriptors, notification by index, or flushes.
fn leave_out(choice: u8) -> u64 {
    let all = [28, 29, 9].into_iter().zip([1, 2, 4]);
    all.filter(|(_, bit)| choice & bit != 0)
        .fold(0, |all, (feature, _)| all | 1 << feature)
}

/// Where descriptors point to.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Reach {
    Anywhere,
    /// Memory that is not the queue's.
    Data,
}

/// Writes descriptors.
fn describe(input: &mut Input<'_>, driver: &Driver, reach: Reach) {
    for index in 0..DESCRIPTORS {
        let (place, wild) = (input.word(), input.byte());
        let (length, flags, next) = (input.word(), input.byte(), input.byte());
        let (address, length) = match reach {
            Reach::Data => (
                0x8000 + u64::from(place) % 0x4000,
                u32::from(length % 0x1000),
            ),
            Reach::Anywhere => {
                let far = if wild >= 0xf0 {
                    u64::from(wild) << 56
                } else {
                    0
                };
                let longer = u32::from(wild & 1) << 20;
                (u64::from(place) | far, u32::from(length) | longer)
            }
        };
        driver.descriptor(index, address, length, flags.into(), next.into());
    }
}

/// Any descriptors, in any order, in the queue of a device that was set up properly.
pub fn queues(data: &[u8]) {
    let mut input = Input(data);
    let (choice, features) = (input.byte(), input.byte());
    let mut driver = Driver::new(device(choice));
    driver.queue = u32::from(choice >> 7 & u8::from(choice % 3 == 1));
    let mut driver = driver.start(leave_out(features));
    describe(&mut input, &driver, Reach::Anywhere);
    driver.fill(0x8000, input.0.get(..1024).unwrap_or(input.0));
    for _ in 0..DESCRIPTORS {
        driver.offer(u16::from(input.byte() % 20));
        let _ = driver.transport.serve(driver.queue as usize);
    }
    driver.available = driver.available.wrapping_add(input.word());
    driver.offer(0);
    let _ = driver.transport.serve(driver.queue as usize);
    let saved = driver.transport.save();
    driver.transport.restore(&saved).expect("it was saved");
}

/// Lets all land that fly, the first first.
fn land_all(flying: &mut Vec<Flight<'_>>) {
    flying.drain(..).for_each(Flight::finish);
}

/// What a driver may do while requests are in flight, and has to wait for them.
fn ground(transport: &Transport, what: u8) {
    let write = |register: u64, value: u32| {
        transport.mmio_write(MmioAddress(0), register, &value.to_le_bytes());
    };
    match what % 3 {
        0 => write(0x70, 0),
        1 => {
            write(0x44, 0);
            write(0x44, 1);
        }
        _ => {
            let saved = transport.save();
            transport.restore(&saved).expect("it was saved");
        }
    }
}

/// Requests of a disk in flight, which land in any order, while the driver announces more, changes what it has
/// announced, and resets the device. Where descriptors do not point to the queue, each answer is there once.
pub fn flights(data: &[u8]) {
    let mut input = Input(data);
    let choice = input.byte();
    let reach = if choice & 8 == 0 {
        Reach::Data
    } else {
        Reach::Anywhere
    };
    let mut driver = Driver::new(device(0)).start(leave_out(choice));
    describe(&mut input, &driver, reach);
    driver.fill(0x8000, &input.bytes::<256>());
    let transport = Arc::clone(&driver.transport);
    let mut taken = 0;
    std::thread::scope(|scope| {
        let mut flying = Vec::new();
        for _ in 0..MOST {
            if input.0.is_empty() {
                break;
            }
            let what = input.byte();
            match what & 7 {
                0 | 1 => driver.offer(u16::from(what >> 3) % 20),
                2 | 3 if flying.len() < worker::HANDS => {
                    let flight = transport.take(0);
                    taken += u16::from(flight.is_some());
                    flying.extend(flight);
                }
                2..=5 if flying.is_empty() => {}
                2 | 3 => flying.remove(0).finish(),
                4 | 5 => {
                    // A flush waits for those before it.
                    let flight = flying.remove(usize::from(what >> 3) % flying.len());
                    scope.spawn(|| flight.finish());
                }
                6 => driver.fill(
                    0x8000 + u64::from(input.word() % 0x1000),
                    &input.bytes::<8>(),
                ),
                _ => {
                    let transport = &*transport;
                    let grounds = scope.spawn(move || ground(transport, what >> 3));
                    land_all(&mut flying);
                    grounds.join().expect("it ends");
                    if (what >> 3).is_multiple_of(3) {
                        driver.set_up(leave_out(choice));
                        taken = 0;
                    }
                }
            }
        }
        land_all(&mut flying);
    });
    if let (Reach::Data, Some(used)) = (reach, driver.used()) {
        assert_eq!(used, taken, "answers of what was taken");
    }
}

/// Accesses of any width to the serial port, while somebody types.
pub fn serial(data: &[u8]) {
    let mut input = Input(data);
    let event = || board::event().expect("a descriptor");
    let port = Serial::new(event(), Box::new(io::sink()));
    for _ in 0..MOST {
        if input.0.is_empty() {
            break;
        }
        let how = input.byte();
        let (width, offset) = (usize::from(how & 3) + 1, u16::from(how >> 2 & 7));
        let mut data = u32::to_le_bytes(u32::from(input.word()));
        match how >> 5 {
            0..3 => port.pio_read(PioAddress(serial::COM1), offset, &mut data[..width]),
            3..6 => port.pio_write(PioAddress(serial::COM1), offset, &data[..width]),
            _ => {
                port.input(&data);
                let _ = port.feed();
            }
        }
    }
    let saved = port.save();
    let again = Serial::restore(&saved, event(), Box::new(io::sink())).expect("it was saved");
    assert_eq!(again.save(), saved);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    type Target = fn(&[u8]);
    const TARGETS: [(&str, Target); 4] = [
        ("registers", registers),
        ("queues", queues),
        ("flights", flights),
        ("serial", serial),
    ];

    fn corpus(name: &str) -> Vec<Vec<u8>> {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fuzz/corpus");
        let files = std::fs::read_dir(format!("{folder}/{name}")).unwrap();
        let mut paths: Vec<_> = files.map(|file| file.unwrap().path()).collect();
        paths.sort();
        paths
            .iter()
            .map(|path| std::fs::read(path).unwrap())
            .collect()
    }

    #[test]
    fn corpus_is_answered() {
        for (name, target) in TARGETS {
            let inputs = corpus(name);
            assert!(!inputs.is_empty(), "{name} has no corpus");
            inputs.iter().for_each(|input| target(input));
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(256))]

        #[test]
        fn any_bytes_are_answered(data in prop::collection::vec(any::<u8>(), 0..2048)) {
            for (_, target) in TARGETS {
                target(&data);
            }
        }

        /// What the corpus has, with some bytes changed, and the end of another input at its end.
        #[test]
        fn changed_corpus_is_answered(
            which in any::<[prop::sample::Index; 2]>(),
            changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8),
            cut in any::<prop::sample::Index>(),
        ) {
            for (name, target) in TARGETS {
                let inputs = corpus(name);
                let [first, second] = which.map(|index| index.get(&inputs));
                let mut data = first[..cut.index(first.len() + 1)].to_vec();
                data.extend(&second[cut.index(second.len() + 1)..]);
                for (at, byte) in &changes {
                    if !data.is_empty() {
                        let at = at.index(data.len());
                        data[at] = *byte;
                    }
                }
                target(&data);
            }
        }
    }
}
