//! The terminal as data: what the guest wants of it.

use serde::{Deserialize, Serialize};

use super::Tty;
use super::host::Termios;
use crate::linux::saved::error::Damaged;

/// The terminal.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SavedTty {
    /// `struct termios2`, if the guest has set anything.
    wanted: Option<Vec<u8>>,
}

impl Tty {
    pub(in crate::linux) fn saved(&self) -> SavedTty {
        let wanted = *self.wanted.lock();
        SavedTty {
            wanted: wanted.map(|termios| termios.0.to_vec()),
        }
    }
}

impl SavedTty {
    /// Sets what the guest wants on another terminal.
    pub(in crate::linux) fn load(&self, tty: &Tty) -> Result<(), Damaged> {
        let Some(wanted) = &self.wanted else {
            return Ok(());
        };
        let bytes = wanted.as_slice().try_into();
        let termios = Termios(bytes.map_err(|_| Damaged("a terminal's settings"))?);
        *tty.wanted.lock() = Some(termios);
        tty.reapply();
        Ok(())
    }
}
