//! Signals that are read from a descriptor (signalfd(2)).
//!
//! Who reads or polls is shown the signals that are pending for its own process and thread, whoever made the descriptor.
//! A signal that is not blocked goes to its handler as ever.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

use super::UNBLOCKABLE;
use super::info::{dequeue, peek};
use crate::linux::Errno;
use crate::linux::call::{Arg, Args, Ctx, Entry, SysResult, Wait, WaitKey};
use crate::linux::fd::eventfd::anonymous_stat;
use crate::linux::fd::table::O_CLOEXEC;
use crate::linux::fd::vector::GuestBuf;
use crate::linux::fd::would_block;
use crate::linux::file::{Description, File, O_NONBLOCK, Ready, Stat, Viewer};
use crate::linux::kernel::Kernel;
use crate::linux::process::{SigFields, SigInfo};
use crate::linux::saved::{Refused, SavedFile, Saver};
use crate::linux::sched::Sched;

/// The calls of this file.
pub const TABLE: &[Entry] = &[
    Entry {
        nr: 282,
        name: "signalfd",
        args: &[Arg::Fd, Arg::Hex, Arg::Int],
        handler: sys_signalfd,
    },
    Entry {
        nr: 289,
        name: "signalfd4",
        args: &[Arg::Fd, Arg::Hex, Arg::Int, Arg::Hex],
        handler: sys_signalfd4,
    },
];

/// Bytes of a `struct signalfd_siginfo`.
const RECORD: usize = 128;

/// What signalfd(2) makes.
#[derive(Debug)]
pub struct SignalFd {
    /// The signals that are read from it.
    set: AtomicU64,
    sched: Arc<Sched>,
    /// Woken when the set changes.
    key: WaitKey,
    edges: AtomicU64,
}

/// It as data.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SavedSignals {
    set: u64,
    edges: u64,
}

impl SavedSignals {
    pub(in crate::linux) fn load(self, sched: &Arc<Sched>) -> Arc<SignalFd> {
        let signals = SignalFd::new(sched, self.set);
        signals.edges.store(self.edges, Ordering::Relaxed);
        Arc::new(signals)
    }
}

impl SignalFd {
    fn new(sched: &Arc<Sched>, set: u64) -> Self {
        Self {
            set: AtomicU64::new(set & !UNBLOCKABLE),
            key: sched.new_key(),
            sched: Arc::clone(sched),
            edges: AtomicU64::new(0),
        }
    }

    fn set(&self) -> u64 {
        self.set.load(Ordering::Relaxed)
    }

    /// Another set from now on.
    fn change(&self, set: u64) {
        self.set.store(set & !UNBLOCKABLE, Ordering::Relaxed);
        self.edges.fetch_add(1, Ordering::Relaxed);
        self.sched.wake(self.key);
    }

    /// Takes as many signals as there are and fit into `buf`.
    ///
    /// # Errors
    /// `EINVAL` if not even one fits, `EFAULT`, `EAGAIN`, or a stop.
    pub(in crate::linux) fn read(&self, c: &Ctx<'_>, d: &Description, buf: &GuestBuf) -> SysResult {
        if buf.len() < RECORD {
            return Err(Errno::INVAL.into());
        }
        let tid = c.t.tid;
        let mut done = 0;
        while buf.len() - done >= RECORD {
            // A signal that was taken cannot be put back.
            let fits = buf.accessible(c.mem(), done, RECORD, shadow_mm::Access::Write);
            if fits < RECORD {
                return if done > 0 {
                    Ok(done as u64)
                } else {
                    Err(Errno::FAULT.into())
                };
            }
            let Some(info) = c.with_process(|p| dequeue(p, tid, self.set())) else {
                break;
            };
            self.edges.fetch_add(1, Ordering::Relaxed);
            done += buf.store(c.mem(), done, &encode(&info));
        }
        if done > 0 {
            return Ok(done as u64);
        }
        Err(would_block(c, d, Ready::IN))
    }
}

impl File for SignalFd {
    fn stat(&self, _: &Kernel) -> Result<Stat, Errno> {
        Ok(anonymous_stat())
    }

    fn ready(&self, by: Viewer<'_>) -> Ready {
        let state = by.k.state();
        let process = state.procs.get(&by.pid);
        if process.is_some_and(|p| peek(p, by.tid, self.set()).is_some()) {
            Ready::IN | Ready::RDNORM
        } else {
            Ready::empty()
        }
    }

    fn wait_key(&self) -> Option<WaitKey> {
        Some(self.key)
    }

    fn watch(&self, by: Viewer<'_>, _: Ready, wait: &mut Wait) {
        wait.keys.extend([self.key, WaitKey::Signal(by.pid)]);
    }

    fn edges(&self) -> u64 {
        self.edges.load(Ordering::Relaxed)
    }

    fn signals(&self) -> Option<&SignalFd> {
        Some(self)
    }

    fn name(&self, _: &Kernel) -> Vec<u8> {
        b"anon_inode:[signalfd]".to_vec()
    }

    fn saved(&self, _: &mut Saver<'_>) -> Result<SavedFile, Refused> {
        Ok(SavedFile::Signals(SavedSignals {
            set: self.set(),
            edges: self.edges(),
        }))
    }

    fn as_any(&self) -> &dyn std::any::Any {
        self
    }
}

/// A `struct signalfd_siginfo`.
fn encode(info: &SigInfo) -> [u8; RECORD] {
    let mut out = [0; RECORD];
    let mut put = |at: usize, bytes: &[u8]| out[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &info.signo.to_le_bytes());
    put(4, &info.errno.to_le_bytes());
    put(8, &info.code.to_le_bytes());
    match info.fields {
        SigFields::Sender { pid, uid, value } => {
            put(12, &pid.to_le_bytes());
            put(16, &uid.to_le_bytes());
            // `ssi_int` is the lower half of `ssi_ptr`.
            put(44, &(value as u32).to_le_bytes());
            put(48, &value.to_le_bytes());
        }
        SigFields::Timer { id, overrun, value } => {
            put(24, &id.to_le_bytes());
            put(32, &overrun.to_le_bytes());
            put(44, &(value as u32).to_le_bytes());
            put(48, &value.to_le_bytes());
        }
        SigFields::Fault { addr } => put(72, &addr.to_le_bytes()),
        SigFields::Child { pid, uid, status } => {
            put(12, &pid.to_le_bytes());
            put(16, &uid.to_le_bytes());
            put(40, &status.to_le_bytes());
        }
        SigFields::None => {}
    }
    out
}

fn sys_signalfd(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    make(c, a, 0)
}

fn sys_signalfd4(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    make(c, a, a.u32(3))
}

fn make(c: &Ctx<'_>, a: &Args, flags: u32) -> SysResult {
    if a.u64(2) != 8 || flags & !(O_NONBLOCK | O_CLOEXEC) != 0 {
        return Err(Errno::INVAL.into());
    }
    let set: u64 = c.mem().read_obj(a.u64(1))?;
    if a.i32(0) == -1 {
        let signals = Arc::new(SignalFd::new(&c.k.sched, set));
        let description = Description::new(signals, 2 | flags & O_NONBLOCK);
        return Ok(c.add_fd(description, flags & O_CLOEXEC != 0)? as u64);
    }
    let known = c.file(a.i32(0))?;
    known.file.signals().ok_or(Errno::INVAL)?.change(set);
    Ok(a.i32(0) as u64)
}

#[cfg(test)]
mod tests {
    use super::super::bit;
    use super::*;

    #[test]
    fn record_has_the_abi_offsets() {
        let value = 0x1_0000_0007;
        let fields = SigFields::Sender {
            pid: 5,
            uid: 6,
            value,
        };
        let info = SigInfo {
            signo: 40,
            code: -1,
            errno: 0,
            fields,
        };
        let bytes = encode(&info);
        assert_eq!((bytes[0], bytes[12], bytes[16]), (40, 5, 6));
        assert_eq!(bytes[8..12], (-1_i32).to_le_bytes());
        assert_eq!(bytes[44..48], 7_u32.to_le_bytes());
        assert_eq!(bytes[48..56], value.to_le_bytes());
    }

    #[test]
    fn what_cannot_be_blocked_is_not_read() {
        let sched = Arc::new(Sched::default());
        let signals = SignalFd::new(&sched, bit(libc::SIGKILL) | bit(libc::SIGUSR1));
        assert_eq!(signals.set(), bit(libc::SIGUSR1));
        signals.change(UNBLOCKABLE);
        assert_eq!((signals.set(), signals.edges()), (0, 1));
    }
}
