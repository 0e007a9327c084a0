//! The first serial port (16550A, COM1), on `vm-superio`.
//!
//! What the guest sends goes to a writer, which may wait for room; typing does not wait then. What is typed is kept here, a
//! bounded amount, and reaches the guest as its FIFO has room.
//!
//! Accesses wider than a byte are split into bytes, as the bus of a PC does.

use std::collections::VecDeque;
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use vm_device::DevicePio;
use vm_device::bus::{PioAddress, PioAddressOffset};
use vm_superio::serial::NoEvents;
use vm_superio::{SerialState, Trigger};
use vmm_sys_util::eventfd::EventFd;

use super::keyboard::{Keyboard, ScreenSize};

/// The first port.
pub const COM1: u16 = 0x3f8;
/// Its number of ports.
pub const PORTS: u16 = 8;
/// Its interrupt.
pub const IRQ: u32 = 4;
/// Bytes kept that the guest has not taken yet.
const WAITING: usize = 4096;
/// Interrupt enable register: received data.
const RECEIVE: u8 = 1;
/// The line status register.
const LINE_STATUS: u16 = 5;
/// The interrupt enable register.
const INTERRUPT_ENABLE: u16 = 1;
/// How long reception has been enabled before it is believed.
const MEANT: Duration = Duration::from_millis(5);
/// A guest that reads the line status this often and does nothing else waits for input by polling.
const POLLS: u32 = 16;

/// The interrupt line.
struct Line(EventFd);

impl Trigger for Line {
    type E = std::io::Error;
    fn trigger(&self) -> std::io::Result<()> {
        self.0.write(1)
    }
}

type Port = vm_superio::Serial<Line, NoEvents, Box<dyn Write + Send>>;

/// The port.
pub struct Serial {
    /// May be held for long: writing can wait. Before `waiting`.
    port: Mutex<Port>,
    /// Typed, not in the FIFO yet. Never held for long.
    waiting: Mutex<VecDeque<u8>>,
    /// How often the line status was read since anything else was done.
    polls: AtomicU32,
    /// When the interrupt enable register was last written.
    enabled: Mutex<Instant>,
}

/// On what occasion the guest may be given what waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Occasion {
    /// It reads the data, what interrupts, or the line status.
    Read,
    /// Anything else it does: a driver tries out the interrupt enable register when it looks what kind
    /// of port this is, and then empties the port.
    Other,
    /// It does nothing.
    Quiet,
}

impl std::fmt::Debug for Serial {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Serial").finish_non_exhaustive()
    }
}

/// Everything a serial port remembers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the registers' names")]
pub struct SerialSaved {
    pub baud_divisor: [u8; 2],
    pub interrupt_enable: u8,
    pub interrupt_identification: u8,
    pub line_control: u8,
    pub line_status: u8,
    pub modem_control: u8,
    pub modem_status: u8,
    pub scratch: u8,
    pub fifo: Vec<u8>,
    /// Typed, but not in the FIFO yet.
    pub waiting: Vec<u8>,
}

impl Serial {
    /// A port that interrupts through `interrupt` and writes to `output`.
    #[must_use]
    pub fn new(interrupt: EventFd, output: Box<dyn Write + Send>) -> Arc<Self> {
        Arc::new(Self {
            port: Mutex::new(Port::new(Line(interrupt), output)),
            waiting: Mutex::default(),
            polls: AtomicU32::new(0),
            enabled: Mutex::new(Instant::now()),
        })
    }

    /// Whether the guest waits for input. Until it does, what is typed is kept from it.
    fn listening(&self, port: &Port, occasion: Occasion) -> bool {
        let receives = port.state().interrupt_enable & RECEIVE != 0;
        match occasion {
            Occasion::Read => receives || self.polls.load(Ordering::Relaxed) >= POLLS,
            Occasion::Other => false,
            Occasion::Quiet => receives && self.enabled.lock().elapsed() >= MEANT,
        }
    }

    fn fill(&self, port: &mut Port, occasion: Occasion) {
        let mut waiting = self.waiting.lock();
        let count = port.fifo_capacity().min(waiting.len());
        if count == 0 || !self.listening(port, occasion) {
            return;
        }
        let bytes: Vec<u8> = waiting.range(..count).copied().collect();
        // In loop-back mode the line is cut and nothing is taken.
        if let Ok(taken) = port.enqueue_raw_bytes(&bytes) {
            waiting.drain(..taken);
        }
    }

    /// What must be known to go on elsewhere.
    #[must_use]
    pub fn save(&self) -> SerialSaved {
        let port = self.port.lock();
        let s = port.state();
        SerialSaved {
            baud_divisor: [s.baud_divisor_low, s.baud_divisor_high],
            interrupt_enable: s.interrupt_enable,
            interrupt_identification: s.interrupt_identification,
            line_control: s.line_control,
            line_status: s.line_status,
            modem_control: s.modem_control,
            modem_status: s.modem_status,
            scratch: s.scratch,
            fifo: s.in_buffer,
            waiting: self.waiting.lock().iter().copied().collect(),
        }
    }

    /// A port that goes on from `saved`.
    ///
    /// # Errors
    /// It holds more than a port can.
    pub fn restore(
        saved: &SerialSaved,
        interrupt: EventFd,
        output: Box<dyn Write + Send>,
    ) -> Result<Arc<Self>, RestoreError> {
        if saved.waiting.len() > WAITING {
            return Err(RestoreError);
        }
        let state = SerialState {
            baud_divisor_low: saved.baud_divisor[0],
            baud_divisor_high: saved.baud_divisor[1],
            interrupt_enable: saved.interrupt_enable,
            interrupt_identification: saved.interrupt_identification,
            line_control: saved.line_control,
            line_status: saved.line_status,
            modem_control: saved.modem_control,
            modem_status: saved.modem_status,
            scratch: saved.scratch,
            in_buffer: saved.fifo.clone(),
        };
        let port = Port::from_state(&state, Line(interrupt), NoEvents, output)
            .map_err(|_| RestoreError)?;
        Ok(Arc::new(Self {
            port: Mutex::new(port),
            waiting: Mutex::new(saved.waiting.iter().copied().collect()),
            polls: AtomicU32::new(0),
            enabled: Mutex::new(Instant::now()),
        }))
    }
}

/// A saved serial port that cannot be one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the saved serial port holds more than a port can")]
pub struct RestoreError;

impl Keyboard for Serial {
    fn room(&self) -> usize {
        WAITING - self.waiting.lock().len()
    }

    fn input(&self, bytes: &[u8]) -> usize {
        let mut waiting = self.waiting.lock();
        let count = bytes.len().min(WAITING - waiting.len());
        waiting.extend(&bytes[..count]);
        count
    }

    fn feed(&self) -> bool {
        if let Some(mut port) = self.port.try_lock() {
            self.fill(&mut port, Occasion::Quiet);
            // With a full FIFO, it comes for more by itself.
            if port.fifo_capacity() == 0 {
                return true;
            }
        }
        self.waiting.lock().is_empty()
    }

    /// A serial line does not carry it.
    fn resize(&self, _size: ScreenSize) {}
}

impl DevicePio for Serial {
    fn pio_read(&self, _base: PioAddress, offset: PioAddressOffset, data: &mut [u8]) {
        let mut port = self.port.lock();
        if offset == LINE_STATUS && data.len() == 1 {
            self.polls.fetch_add(1, Ordering::Relaxed);
        } else if offset != 0 {
            self.polls.store(0, Ordering::Relaxed);
        }
        for (register, byte) in (offset..).zip(data) {
            *byte = u8::try_from(register).map_or(0xff, |register| port.read(register));
        }
        let occasion = match offset {
            0 | 2 | LINE_STATUS => Occasion::Read,
            _ => Occasion::Other,
        };
        self.fill(&mut port, occasion);
    }

    fn pio_write(&self, _base: PioAddress, offset: PioAddressOffset, data: &[u8]) {
        let mut port = self.port.lock();
        self.polls.store(0, Ordering::Relaxed);
        if offset == INTERRUPT_ENABLE {
            *self.enabled.lock() = Instant::now();
        }
        for (register, &byte) in (offset..).zip(data) {
            let Ok(register) = u8::try_from(register) else {
                return;
            };
            if let Err(error) = port.write(register, byte) {
                tracing::debug!(%error, "the serial port");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;
    use crate::hv::kvm::board;

    struct Sink(mpsc::Sender<u8>);

    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            for &byte in bytes {
                self.0.send(byte).unwrap();
            }
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    fn port() -> (Arc<Serial>, EventFd, mpsc::Receiver<u8>) {
        let (sender, receiver) = mpsc::channel();
        let interrupt = board::event().unwrap();
        let copy = interrupt.try_clone().unwrap();
        let serial = Serial::new(copy, Box::new(Sink(sender)));
        (serial, interrupt, receiver)
    }

    fn read(serial: &Serial, offset: u16) -> u8 {
        let mut data = [0];
        serial.pio_read(PioAddress(COM1), offset, &mut data);
        data[0]
    }

    #[test]
    fn what_is_typed_arrives_in_order_however_much_it_is() {
        let (serial, interrupt, _out) = port();
        serial.pio_write(PioAddress(COM1), 1, &[1]);
        let typed: Vec<u8> = (0..WAITING + 64).map(|i| i as u8).collect();
        let mut at = 0;
        let mut got = Vec::new();
        while got.len() < typed.len() {
            at += serial.input(&typed[at..]);
            std::thread::sleep(MEANT);
            let _ = serial.feed();
            assert!(interrupt.read().is_ok(), "no interrupt for new data");
            while read(&serial, 5) & 1 != 0 {
                got.push(read(&serial, 0));
            }
        }
        assert_eq!(got, typed);
        assert_eq!(serial.room(), WAITING);
    }

    #[test]
    fn what_is_typed_waits_until_the_guest_listens() {
        let (serial, ..) = port();
        serial.input(b"hello");
        // A driver that looks and starts: it tries out a register, and reads everything once.
        serial.pio_write(PioAddress(COM1), 1, &[0x0f]);
        read(&serial, 1);
        serial.pio_write(PioAddress(COM1), 1, &[0]);
        for register in 0..8 {
            read(&serial, register);
        }
        assert_eq!(read(&serial, 5) & 1, 0);
        serial.pio_write(PioAddress(COM1), 1, &[1]);
        assert!(!serial.feed());
        std::thread::sleep(MEANT);
        assert!(serial.feed());
        assert_eq!([read(&serial, 0), read(&serial, 0)], *b"he");
        // Another polls.
        let (serial, ..) = port();
        serial.input(b"x");
        assert!((0..2 * POLLS).any(|_| read(&serial, 5) & 1 != 0));
        assert_eq!(read(&serial, 0), b'x');
    }

    #[test]
    fn what_is_sent_is_written_and_wide_accesses_are_split() {
        let (serial, _interrupt, out) = port();
        serial.pio_write(PioAddress(COM1), 0, b"a");
        serial.pio_write(PioAddress(COM1), 0, b"b\0");
        assert_eq!(out.try_iter().collect::<Vec<_>>(), b"ab");
        let mut wide = [0; 4];
        serial.pio_read(PioAddress(COM1), 5, &mut wide);
        assert_eq!(wide[0] & 0x60, 0x60);
    }

    #[test]
    fn saved_and_restored_port_is_the_same() {
        let (serial, ..) = port();
        serial.pio_write(PioAddress(COM1), 7, &[0x5a]);
        serial.input(&[7; 100]);
        let saved = serial.save();
        let text = serde_json::to_string(&saved).unwrap();
        let back: SerialSaved = serde_json::from_str(&text).unwrap();
        let event = || board::event().unwrap();
        let again = Serial::restore(&back, event(), Box::new(std::io::sink())).unwrap();
        assert_eq!(again.save(), saved);
        assert_eq!(read(&again, 7), 0x5a);
        let impossible = SerialSaved {
            fifo: vec![0; 65],
            ..saved
        };
        assert!(Serial::restore(&impossible, event(), Box::new(std::io::sink())).is_err());
    }
}
