//! The terminal as an open file.

use std::sync::Arc;

use super::super::Errno;
use super::super::call::{Ctx, Stop, SysResult, Wait, WaitKey};
use super::super::file::{File, Ready, Stat, Viewer};
use super::super::fs::Caller;
use super::super::kernel::Kernel;
use super::super::proc::groups::{TtyUse, tty_check};
use super::super::saved::{Refused, SavedFile, Saver};
use super::super::stdio::HostStream;
use super::{Tty, control};

/// Its name in the guest.
const NAME: &[u8] = b"/dev/tty";
/// Its device number where the guest's tree has no such name.
const RDEV: u64 = 5 << 8;

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

    fn standard(&self) -> Option<i32> {
        self.io.standard()
    }

    /// As its name in the tree tells, so that ttyname(3) finds it.
    fn stat(&self, k: &Kernel) -> Result<Stat, Errno> {
        let own = Stat {
            mode: 0o020_620,
            rdev: RDEV,
            nlink: 1,
            ..Stat::default()
        };
        let named = k.vfs.find(&Caller::machine(k), &k.vfs.root(), NAME);
        Ok(named.map_or(own, |(_, stat)| stat))
    }

    fn ready(&self, _: Viewer<'_>) -> Ready {
        self.io.ready_now()
    }

    fn wait_key(&self) -> Option<WaitKey> {
        Some(self.io.key())
    }

    fn watch(&self, _: Viewer<'_>, interest: Ready, wait: &mut Wait) {
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
        NAME.to_vec()
    }

    fn saved(&self, _: &mut Saver<'_>) -> Result<SavedFile, Refused> {
        Ok(SavedFile::Stdio(self.io.number()))
    }

    fn as_any(&self) -> &dyn std::any::Any {
        self
    }
}
