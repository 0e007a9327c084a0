//! The host's terminal attributes, as the bytes of `struct termios2` (ioctl_tty(2)): the guest's
//! layout is the same.
#![expect(
    unsafe_code,
    reason = "the ioctls have no wrapper that keeps every bit"
)]

use std::os::fd::{AsFd, AsRawFd};

use vmm_sys_util::signal::{block_signal, get_blocked_signals, unblock_signal};

use super::super::Errno;

/// Bytes of `struct termios`, the first part of `struct termios2`.
pub(super) const OLD_SIZE: usize = 36;

/// Offset of the local modes and of the control characters.
const LFLAG: usize = 12;
const CC: usize = 17;
const VTIME: usize = CC + 5;
const VMIN: usize = CC + 6;

const ICANON: u32 = 0o2;
const TOSTOP: u32 = 0o400;

/// `struct termios2`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Termios(pub(super) [u8; 44]);

impl Termios {
    fn local(&self) -> u32 {
        let [a, b, c, d] = [0, 1, 2, 3].map(|i| self.0[LFLAG + i]);
        u32::from_ne_bytes([a, b, c, d])
    }

    /// Whether background writes stop.
    pub(super) fn stops_writers(&self) -> bool {
        self.local() & TOSTOP != 0
    }

    /// Nanoseconds after which a read gives nothing (`VMIN` 0); `None` if it waits.
    pub(super) fn read_timeout(&self) -> Option<u64> {
        let raw = self.local() & ICANON == 0;
        (raw && self.0[VMIN] == 0).then(|| u64::from(self.0[VTIME]) * 100_000_000)
    }
}

/// When new attributes take effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum When {
    /// At once (`TCSANOW`).
    Now,
    /// After what was written is out (`TCSADRAIN`).
    Drained,
    /// And what was not read is discarded (`TCSAFLUSH`).
    Flushed,
}

const TCGETS2: libc::c_ulong = 0x802c_542a;
const TCSETS2: libc::c_ulong = 0x402c_542b;

/// Reads the attributes.
pub(super) fn get(fd: impl AsFd) -> Result<Termios, Errno> {
    let mut termios = Termios([0; 44]);
    let at = termios.0.as_mut_ptr();
    // SAFETY: the descriptor is borrowed for the call, and `at` points to the 44 bytes that
    // TCGETS2 writes.
    let result = unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), TCGETS2, at) };
    check(result).map(|()| termios)
}

/// Sets the attributes. In the background of the host's terminal this would stop the VMM, so the
/// signal that does it is blocked meanwhile.
pub(super) fn set(fd: impl AsFd, when: When, termios: &Termios) -> Result<(), Errno> {
    let request = TCSETS2 + when as libc::c_ulong;
    let at = termios.0.as_ptr();
    without_sigttou(|| {
        // SAFETY: the descriptor is borrowed for the call, and `at` points to the 44 bytes that
        // TCSETS2 and its relatives read.
        let result = unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), request, at) };
        check(result)
    })
}

/// Runs `f` with `SIGTTOU` blocked in this thread.
pub(super) fn without_sigttou<R>(f: impl FnOnce() -> R) -> R {
    let blocked = get_blocked_signals().is_ok_and(|set| set.contains(&libc::SIGTTOU));
    let ours = !blocked && block_signal(libc::SIGTTOU).is_ok();
    let result = f();
    if ours && let Err(error) = unblock_signal(libc::SIGTTOU) {
        tracing::warn!(?error, "cannot unblock SIGTTOU");
    }
    result
}

fn check(result: libc::c_int) -> Result<(), Errno> {
    if result == 0 {
        return Ok(());
    }
    let error = std::io::Error::last_os_error();
    Err(Errno::from_io_error(&error).unwrap_or(Errno::IO))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn raw_mode_without_minimum_has_a_timeout() {
        let mut t = Termios([0; 44]);
        t.0[VTIME] = 3;
        assert_eq!(t.read_timeout(), Some(300_000_000));
        t.0[VMIN] = 1;
        assert_eq!(t.read_timeout(), None);
        t.0[VMIN] = 0;
        t.0[LFLAG] = ICANON as u8;
        assert_eq!(t.read_timeout(), None);
    }

    #[test]
    fn no_terminal_gives_enotty() {
        let file = tempfile::tempfile().unwrap();
        assert_eq!(get(&file), Err(Errno::NOTTY));
    }
}
