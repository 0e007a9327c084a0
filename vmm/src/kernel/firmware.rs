//! The one thing of a PC's firmware that a kernel may call: the reset vector.
//!
//! On a hardware-reduced platform without EFI, Linux resets by going back to real mode and jumping to
//! F000:FFF0. Without something there it would run through zeros for ever.

use super::memory::Memory;
use super::params::write;
use super::{BootError, layout};
use crate::devices::power;

/// Real-mode code: tells the reset register, then halts.
const RESET: [u8; 9] = {
    let port = power::RESET.to_le_bytes();
    [
        0xba,
        port[0],
        port[1], // mov dx, RESET
        0xb0,
        power::RESET_VALUE, // mov al, RESET_VALUE
        0xee,               // out dx, al
        0xf4,               // hlt
        0xeb,
        0xfd, // jmp to the hlt
    ]
};

/// Puts it where the processor looks.
///
/// # Errors
/// That is not memory.
pub fn write_reset_vector(memory: &Memory) -> Result<(), BootError> {
    write(memory, layout::RESET_VECTOR, &RESET)
}
