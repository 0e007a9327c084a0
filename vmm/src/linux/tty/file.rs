//! The terminal as an open file.

use std::sync::Arc;

use super::super::Errno;
use super::super::call::{Ctx, Stop, SysResult, Wait, WaitKey};
use super::super::file::{File, Ready, Stat};
use super::super::kernel::Kernel;
use super::super::stdio::HostStream;
use super::super::proc::groups::{TtyUse, tty_check};
use super::{Tty, control};

/// Device number of the terminal: the first of the host's kind of pseudo terminals.
const RDEV: u64 = 136 << 8;
/// Device number and inode of the file system such terminals are on.
const DEVPTS: (u64, u64) = (0x18, 3);

/// A standard descriptor that is a terminal.
#[derive(Debug)]
pub struct Terminal {
    io: HostStream,
    tty: Arc<Tty>,
}

impl Terminal {
    /// The host's stream `io` to the terminal `tty`.
    pub(in super::super) fn new(io: HostStream, tty: Arc<Tty>) -> Self {
        Self { io, tty }
    }

    /// The terminal.
    #[must_use]
    pub fn tty(&self) -> &Arc<Tty> {
        &self.tty
    }

    /// The host's descriptor.
    pub(super) fn fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.io.fd()
    }
}

impl File for Terminal {
    fn read(&self, _: &Kernel, _: u64, buf: &mut [u8]) -> Result<usize, Errno> {
        self.io.read_some(buf)
    }

    fn write(&self, _: &Kernel, _: u64, buf: &[u8]) -> Result<usize, Errno> {
        self.io.write_some(buf)
    }

    fn stat(&self, _: &Kernel) -> Result<Stat, Errno> {
        let host = super::super::stdio::host_stat(self.io.fd())?;
        let (dev, ino) = DEVPTS;
        Ok(Stat { dev, ino, mode: 0o020_620, rdev: RDEV, nlink: 1, size: 0, ..host })
    }

    fn ready(&self, _: &Kernel) -> Ready {
        self.io.ready_now()
    }

    fn wait_key(&self) -> Option<WaitKey> {
        Some(self.io.key())
    }

    fn watch(&self, _: &Kernel, interest: Ready, wait: &mut Wait) {
        self.io.arm(interest, wait);
    }

    fn edges(&self) -> u64 {
        self.io.transfers()
    }

    fn readable_bytes(&self) -> Option<usize> {
        self.io.unread()
    }

    fn read_timeout(&self) -> Option<u64> {
        self.tty.termios().ok()?.read_timeout()
    }

    fn admit(&self, c: &mut Ctx<'_>, writing: bool) -> Result<(), Stop> {
        if writing {
            if self.tty.termios()?.stops_writers() {
                tty_check(c, TtyUse::Write)?;
            }
            Ok(())
        } else {
            tty_check(c, TtyUse::Read)
        }
    }

    fn ioctl(&self, c: &mut Ctx<'_>, request: u32, arg: u64) -> SysResult {
        control::ioctl(self, c, request, arg)
    }

    fn name(&self, _: &Kernel) -> Vec<u8> {
        b"/dev/tty".to_vec()
    }

    fn as_any(&self) -> &dyn std::any::Any {
        self
    }
}
