//! `siginfo_t`: made, queued, taken, and as 128 bytes in guest memory.

use super::{SYNCHRONOUS, bit};
use crate::linux::process::{Pending, Process, SigFields, SigInfo};
use crate::linux::thread::Tid;

/// Bytes of a `siginfo_t`.
pub const SIGINFO_SIZE: usize = 128;

/// First real-time signal, as the kernel counts.
pub const FIRST_REAL_TIME: i32 = 32;

/// Sent by kill(2).
pub const SI_USER: i32 = 0;
/// Sent by the kernel.
pub const SI_KERNEL: i32 = 0x80;
/// Sent by tkill(2) or tgkill(2).
pub const SI_TKILL: i32 = -6;

/// The codes of `SIGCHLD`.
pub mod cld {
    /// It called exit(2).
    pub const EXITED: i32 = 1;
    /// A signal ended it.
    pub const KILLED: i32 = 2;
    /// It stopped.
    pub const STOPPED: i32 = 5;
    /// It goes on.
    pub const CONTINUED: i32 = 6;
}

impl SigInfo {
    /// A signal from the kernel itself.
    #[must_use]
    pub fn kernel(signo: i32) -> Self {
        Self {
            signo,
            code: SI_KERNEL,
            errno: 0,
            fields: SigFields::None,
        }
    }

    /// A fault: `si_addr` and a code such as `SEGV_MAPERR`.
    #[must_use]
    pub fn fault(signo: i32, code: i32, addr: u64) -> Self {
        Self {
            signo,
            code,
            errno: 0,
            fields: SigFields::Fault { addr },
        }
    }

    /// Whether it tells of a timer of timer_create(2).
    #[must_use]
    pub fn is_timers(&self) -> bool {
        matches!(self.fields, SigFields::Timer { .. })
    }

    /// The union's bytes in the x86-64 layout, from byte 16 of the structure on.
    #[must_use]
    pub fn encode(&self) -> [u8; SIGINFO_SIZE] {
        let mut out = [0; SIGINFO_SIZE];
        let mut put = |at: usize, bytes: &[u8]| out[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &self.signo.to_le_bytes());
        put(4, &self.errno.to_le_bytes());
        put(8, &self.code.to_le_bytes());
        match self.fields {
            SigFields::Sender { pid, uid, value } => {
                put(16, &pid.to_le_bytes());
                put(20, &uid.to_le_bytes());
                put(24, &value.to_le_bytes());
            }
            SigFields::Fault { addr } => put(16, &addr.to_le_bytes()),
            SigFields::Child { pid, uid, status } => {
                put(16, &pid.to_le_bytes());
                put(20, &uid.to_le_bytes());
                put(24, &status.to_le_bytes());
            }
            SigFields::Timer { id, overrun, value } => {
                put(16, &id.to_le_bytes());
                put(20, &overrun.to_le_bytes());
                put(24, &value.to_le_bytes());
            }
            SigFields::None => {}
        }
        out
    }

    /// What `rt_sigqueueinfo` was given; the number is the call's argument, not the structure's.
    #[must_use]
    pub fn decode(signo: i32, bytes: &[u8; SIGINFO_SIZE]) -> Self {
        let int = |at: usize| i32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
        let value = u64::from_le_bytes(bytes[24..32].try_into().expect("eight bytes"));
        let fields = SigFields::Sender {
            pid: int(16),
            uid: int(20) as u32,
            value,
        };
        Self {
            signo,
            errno: int(4),
            code: int(8),
            fields,
        }
    }
}

/// A signal `p` sends: `si_pid` and `si_uid` are its own.
#[must_use]
pub fn own(p: &Process, signo: i32, code: i32) -> SigInfo {
    let fields = SigFields::Sender {
        pid: p.pid,
        uid: p.cred.uid[0],
        value: 0,
    };
    SigInfo {
        signo,
        code,
        errno: 0,
        fields,
    }
}

impl Pending {
    /// Queues a signal. A standard one that is already pending is lost, as POSIX allows, unless it is a timer's:
    /// of these each has one queued at most.
    pub fn push(&mut self, info: SigInfo) {
        let standard = info.signo < FIRST_REAL_TIME && !info.is_timers();
        if standard && self.has(info.signo) {
            return;
        }
        self.set |= bit(info.signo);
        self.queue.push(info);
    }

    /// Forgets every signal in `set`.
    pub fn discard(&mut self, set: u64) {
        if self.set & set != 0 {
            self.set &= !set;
            self.queue.retain(|i| bit(i.signo) & set == 0);
        }
    }

    /// Takes the first record of signal `signo`.
    pub fn take(&mut self, signo: i32) -> Option<SigInfo> {
        let at = self.queue.iter().position(|i| i.signo == signo)?;
        let info = self.queue.remove(at);
        if !self.queue.iter().any(|i| i.signo == signo) {
            self.set &= !bit(signo);
        }
        Some(info)
    }
}

/// The signal of `set` to take first: `SIGKILL`, then those of faults, then the lowest number.
#[must_use]
pub fn first_of(set: u64) -> Option<i32> {
    let kill = set & bit(libc::SIGKILL);
    let faults = set & SYNCHRONOUS;
    let from = [kill, faults, set].into_iter().find(|&s| s != 0)?;
    Some(from.trailing_zeros() as i32 + 1)
}

/// The next signal of `set` pending for `tid`: the thread's own before the process's.
#[must_use]
pub fn peek(p: &Process, tid: Tid, set: u64) -> Option<i32> {
    let own = p.thread_pending.get(&tid).map_or(0, |q| q.set) & set;
    first_of(own).or_else(|| first_of(p.pending.set & set))
}

/// Takes the signal [`peek`] finds.
pub fn dequeue(p: &mut Process, tid: Tid, set: u64) -> Option<SigInfo> {
    let signo = peek(p, tid, set)?;
    let taken = match p.thread_pending.get_mut(&tid) {
        Some(own) if own.has(signo) => own.take(signo),
        _ => p.pending.take(signo),
    };
    if let Some(info) = &taken {
        p.posix_timers.taken(info);
    }
    taken
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn standard_signal_sent_twice_is_pending_once() {
        let mut q = Pending::default();
        q.push(SigInfo::kernel(libc::SIGUSR1));
        q.push(SigInfo::kernel(libc::SIGUSR1));
        assert!(q.take(libc::SIGUSR1).is_some());
        assert!(!q.has(libc::SIGUSR1));
        assert!(q.take(libc::SIGUSR1).is_none());
    }

    #[test]
    fn real_time_signals_queue_in_order() {
        let mut q = Pending::default();
        for code in 0..3 {
            q.push(SigInfo {
                code,
                ..SigInfo::kernel(40)
            });
        }
        let codes: Vec<_> = std::iter::from_fn(|| q.take(40)).map(|i| i.code).collect();
        assert_eq!(codes, [0, 1, 2]);
        assert_eq!(q.set, 0);
    }

    #[test]
    fn kill_and_faults_come_first() {
        let set = bit(libc::SIGHUP) | bit(libc::SIGSEGV);
        assert_eq!(first_of(set), Some(libc::SIGSEGV));
        assert_eq!(first_of(set | bit(libc::SIGKILL)), Some(libc::SIGKILL));
        assert_eq!(first_of(bit(64)), Some(64));
        assert_eq!(first_of(0), None);
    }

    #[test]
    fn child_siginfo_has_the_abi_offsets() {
        let fields = SigFields::Child {
            pid: 7,
            uid: 1000,
            status: 3,
        };
        let bytes = SigInfo {
            signo: 17,
            code: 1,
            errno: 0,
            fields,
        }
        .encode();
        assert_eq!(bytes[0], 17);
        assert_eq!(bytes[8], 1);
        assert_eq!(bytes[16], 7);
        assert_eq!(bytes[20..24], 1000_u32.to_le_bytes());
        assert_eq!(bytes[24], 3);
    }

    #[test]
    fn queued_value_survives_the_round_trip() {
        let fields = SigFields::Sender {
            pid: 5,
            uid: 6,
            value: 0xdead_beef_0000_0001,
        };
        let info = SigInfo {
            signo: 35,
            code: -1,
            errno: 2,
            fields,
        };
        assert_eq!(SigInfo::decode(35, &info.encode()), info);
    }
}
