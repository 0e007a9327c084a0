//! How a guest ends its machine: ACPI's sleep and reset registers, the reset pulse of the keyboard
//! controller, and the port where it tells that it has panicked (`pvpanic`).
//!
//! It has no state: what it hears goes to whoever runs the machine.

use vm_device::DevicePio;
use vm_device::bus::{PioAddress, PioAddressOffset};

use super::{BusError, Devices};

/// ACPI's sleep control register; the status register is the next port (ACPI 6.5, 4.8.3.7).
pub const SLEEP_CONTROL: u16 = 0x600;
/// The reset register, where PCs have it too.
pub const RESET: u16 = 0xcf9;
/// What is written there to reset.
pub const RESET_VALUE: u8 = 0x06;
/// The keyboard controller's command port.
pub const KEYBOARD_COMMAND: u16 = 0x64;
/// QEMU's panic port (`QEMU0001`).
pub const PANIC: u16 = 0x505;
/// The sleep type of "off", as the `_S5_` object says.
pub const SLEEP_TYPE_OFF: u8 = 5;

const SLEEP_ENABLE: u8 = 1 << 5;
const SLEEP_TYPE: u8 = 0b111 << 2;
const OFF: u8 = SLEEP_ENABLE | SLEEP_TYPE_OFF << 2;
const PULSE_RESET: u8 = 0xfe;
const PANICKED: u8 = 1;

/// What the guest asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PowerEvent {
    /// Turn the machine off.
    Off,
    /// Start it again.
    Reset,
    /// Its kernel has panicked.
    Panicked,
}

/// The ports.
pub struct Power {
    tell: Box<dyn Fn(PowerEvent) + Send + Sync>,
}

impl std::fmt::Debug for Power {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Power").finish_non_exhaustive()
    }
}

impl Power {
    /// Tells `tell` what the guest asks for.
    pub fn new(tell: impl Fn(PowerEvent) + Send + Sync + 'static) -> Self {
        Self {
            tell: Box::new(tell),
        }
    }

    /// Gives it its ports.
    ///
    /// # Errors
    /// Another device has one of them.
    pub fn add_to(self, devices: &mut Devices) -> Result<(), BusError> {
        let power = std::sync::Arc::new(self);
        for (first, count) in [
            (SLEEP_CONTROL, 2),
            (RESET, 1),
            (KEYBOARD_COMMAND, 1),
            (PANIC, 1),
        ] {
            devices.add_ports(first, count, power.clone())?;
        }
        Ok(())
    }
}

impl DevicePio for Power {
    fn pio_read(&self, base: PioAddress, _offset: PioAddressOffset, data: &mut [u8]) {
        // The panic port tells which events it takes; the others read as idle.
        data.fill(if base.0 == PANIC { PANICKED } else { 0 });
    }

    fn pio_write(&self, base: PioAddress, offset: PioAddressOffset, data: &[u8]) {
        let Some(&value) = data.first() else { return };
        match (base.0, offset) {
            (SLEEP_CONTROL, 0) if value & (SLEEP_ENABLE | SLEEP_TYPE) == OFF => {
                (self.tell)(PowerEvent::Off);
            }
            // Bit 2 resets; bit 1 alone only chooses how.
            (RESET, 0) if value & 1 << 2 != 0 => (self.tell)(PowerEvent::Reset),
            (KEYBOARD_COMMAND, 0) if value == PULSE_RESET => (self.tell)(PowerEvent::Reset),
            (PANIC, 0) if value & PANICKED != 0 => (self.tell)(PowerEvent::Panicked),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;
    use crate::hv::kvm::board_cpu::Bus;

    #[test]
    fn each_register_tells_its_event_and_nothing_else_does() {
        let told = Arc::new(Mutex::new(Vec::new()));
        let mut devices = Devices::default();
        let sink = Arc::clone(&told);
        Power::new(move |event| sink.lock().unwrap().push(event))
            .add_to(&mut devices)
            .unwrap();
        for port in [SLEEP_CONTROL, SLEEP_CONTROL + 1, RESET, PANIC, 0x64, 0x60] {
            for value in [0, 2, 0x18, 0x20, 0xf0] {
                devices.port_write(port, &[value]);
            }
        }
        assert_eq!(told.lock().unwrap().as_slice(), []);
        devices.port_write(SLEEP_CONTROL, &[OFF]);
        devices.port_write(RESET, &[RESET_VALUE]);
        devices.port_write(KEYBOARD_COMMAND, &[PULSE_RESET]);
        devices.port_write(PANIC, &[PANICKED]);
        use PowerEvent::{Off, Panicked, Reset};
        assert_eq!(
            told.lock().unwrap().as_slice(),
            [Off, Reset, Reset, Panicked]
        );
    }
}
