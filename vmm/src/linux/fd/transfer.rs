//! Moving bytes between a file and guest memory, in steps through a bounce buffer.

use std::cell::RefCell;

use shadow_mm::Access;

use super::super::Errno;
use super::super::call::{Ctx, Stop, SysResult};
use super::super::file::{Description, File, O_APPEND, O_NONBLOCK, Ready, SharedOffset};
use super::super::process::{SigFields, SigInfo};
use super::super::signal;
use super::vector::GuestBuf;
use super::{STEP, would_block};

/// Where a transfer happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum At {
    /// At the description's offset, which advances.
    Current,
    /// At this byte.
    Offset(u64),
}

const SIGPIPE: i32 = 13;
const SIGXFSZ: i32 = 25;
const RLIMIT_FSIZE: usize = 1;

/// What a write to a stream that nobody reads does besides giving `EPIPE`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Broken {
    /// `SIGPIPE` for the caller.
    Signal,
    /// Nothing (`MSG_NOSIGNAL`).
    Silent,
}

/// Runs `f` on a buffer of `len` (at most [`STEP`]) bytes with unspecified content, kept by the
/// host thread from call to call.
pub(super) fn with_bounce<R>(len: usize, f: impl FnOnce(&mut [u8]) -> R) -> R {
    thread_local! {
        static BOUNCE: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
    }
    let len = len.min(STEP);
    let mut buf = BOUNCE.take();
    if buf.len() < len {
        buf.resize(len.next_power_of_two().max(4096), 0);
    }
    let result = f(&mut buf[..len]);
    BOUNCE.set(buf);
    result
}

/// Reads into guest memory.
///
/// # Errors
/// `EBADF`, `ESPIPE`, `EFAULT`, `EAGAIN`, the file's, or a stop.
pub fn read(c: &mut Ctx<'_>, d: &Description, buf: &GuestBuf, at: At) -> SysResult {
    if !d.readable() {
        return Err(Errno::BADF.into());
    }
    d.file.admit(c, false)?;
    if let (At::Current, Some(signals)) = (at, d.file.signals()) {
        return signals.read(c, d, buf);
    }
    match (at, d.file.shared_offset()) {
        (At::Current, Some(shared)) => read_shared(c, shared, buf),
        _ if !d.file.seekable() => match at {
            At::Current => read_stream(c, d, buf),
            At::Offset(_) => Err(Errno::SPIPE.into()),
        },
        (At::Current, None) => {
            let mut offset = d.offset.lock();
            let n = read_at(c, &*d.file, buf, *offset)?;
            *offset += n;
            Ok(n)
        }
        (At::Offset(offset), _) => read_at(c, &*d.file, buf, offset),
    }
}

/// A file with content at offsets: the guest's buffer need not be looked at first.
fn read_at(c: &Ctx<'_>, file: &dyn File, buf: &GuestBuf, offset: u64) -> SysResult {
    let mut done = 0;
    loop {
        let want = (buf.len() - done).min(STEP);
        let (got, stored) = match with_bounce(want, |bounce| {
            let got = file.read(c.k, offset.saturating_add(done as u64), bounce)?;
            Ok::<_, Errno>((got, buf.store(c.mem(), done, &bounce[..got])))
        }) {
            Ok(pair) => pair,
            Err(errno) if done == 0 => return Err(errno.into()),
            Err(_) => return Ok(done as u64),
        };
        done += stored;
        if stored < got && done == 0 {
            return Err(Errno::FAULT.into());
        }
        if stored < got || got < want || done == buf.len() {
            return Ok(done as u64);
        }
    }
}

fn read_shared(c: &Ctx<'_>, file: &dyn SharedOffset, buf: &GuestBuf) -> SysResult {
    let mut done = 0;
    while done < buf.len() {
        let want = (buf.len() - done).min(STEP);
        let fits = buf.accessible(c.mem(), done, want, Access::Write);
        if fits == 0 {
            return if done > 0 {
                Ok(done as u64)
            } else {
                Err(Errno::FAULT.into())
            };
        }
        let got = with_bounce(fits, |bounce| {
            let got = file.read_next(bounce)?;
            Ok::<_, Errno>(buf.store(c.mem(), done, &bounce[..got]))
        });
        match got {
            Ok(n) => done += n,
            Err(errno) if done == 0 => return Err(errno.into()),
            Err(_) => break,
        }
        if got.is_ok_and(|n| n < want) {
            break;
        }
    }
    Ok(done as u64)
}

/// A stream: what it gives cannot be put back, so the guest's buffer is checked first. Streams
/// that can make a reader wait give what they have; others (`/dev/zero`) fill the buffer.
fn read_stream(c: &mut Ctx<'_>, d: &Description, buf: &GuestBuf) -> SysResult {
    let file = &*d.file;
    let endless = file.wait_key().is_none();
    let mut done = 0;
    loop {
        let want = (buf.len() - done).min(STEP);
        // What comes into an empty one meanwhile is read as a whole: a record, or a datagram, is not cut.
        let there = file.readable_bytes().filter(|&n| n > 0);
        let want = there.map_or(want, |n| want.min(n));
        let fits = buf.accessible(c.mem(), done, want, Access::Write);
        if fits == 0 && want > 0 {
            return if done > 0 {
                Ok(done as u64)
            } else {
                Err(Errno::FAULT.into())
            };
        }
        let got = with_bounce(fits, |bounce| {
            let got = file.read(c.k, 0, bounce)?;
            Ok::<_, Errno>(buf.store(c.mem(), done, &bounce[..got]))
        });
        match got {
            Ok(n) => done += n,
            Err(_) if done > 0 => return Ok(done as u64),
            Err(Errno::AGAIN) => return wait_to_read(c, d),
            Err(errno) => return Err(errno.into()),
        }
        if !endless || done == buf.len() || got.is_ok_and(|n| n < want) {
            return Ok(done as u64);
        }
    }
}

/// There is nothing to read: waits, unless the file gives 0 bytes after some time.
fn wait_to_read(c: &mut Ctx<'_>, d: &Description) -> SysResult {
    let stop = would_block(c, d, Ready::IN);
    let (Stop::Block(mut wait), Some(ns)) = (stop, d.file.read_timeout()) else {
        return Err(would_block(c, d, Ready::IN));
    };
    let now = c.k.clock.monotonic();
    let deadline = c.deadline(|| Some(now.saturating_add(ns)));
    if deadline.is_some_and(|at| now >= at) {
        return Ok(0);
    }
    wait.deadline = deadline;
    Err(Stop::Block(wait))
}

/// Writes from guest memory.
///
/// # Errors
/// `EBADF`, `ESPIPE`, `EFAULT`, `EAGAIN`, `EPIPE`, `EFBIG`, the file's, or a stop.
pub fn write(c: &mut Ctx<'_>, d: &Description, buf: &GuestBuf, at: At) -> SysResult {
    if !d.writable() {
        return Err(Errno::BADF.into());
    }
    d.file.admit(c, true)?;
    match (at, d.file.shared_offset()) {
        (At::Current, Some(shared)) => write_steps(c, buf, 0, |c, _, bytes| {
            let n = shared.write_next(bytes)?;
            printed(c.k, &*d.file, &bytes[..n]);
            Ok(n)
        }),
        _ if !d.file.seekable() => match at {
            At::Current => send(c, d, buf, Broken::Signal),
            At::Offset(_) => Err(Errno::SPIPE.into()),
        },
        (At::Current, None) => write_current(c, d, buf),
        (At::Offset(offset), _) => write_at(c, d, buf, offset),
    }
}

fn write_current(c: &mut Ctx<'_>, d: &Description, buf: &GuestBuf) -> SysResult {
    let mut offset = d.offset.lock();
    let append = d.flags() & O_APPEND != 0;
    if append {
        *offset = d.file.stat(c.k)?.size;
    }
    let n = write_at(c, d, buf, *offset)?;
    *offset = if append {
        d.file.stat(c.k)?.size
    } else {
        *offset + n
    };
    Ok(n)
}

/// Whether the calling process may make a file `size` bytes long that is shorter (getrlimit(2), `RLIMIT_FSIZE`).
///
/// # Errors
/// `EFBIG`, with a SIGXFSZ; or the host's.
pub(crate) fn may_grow(c: &Ctx<'_>, file: &dyn File, size: u64) -> Result<(), Errno> {
    let limit = c.with_process(|p| p.rlimits[RLIMIT_FSIZE].0);
    if size > limit && size > file.stat(c.k)?.size {
        signal_self(c, SIGXFSZ);
        return Err(Errno::FBIG);
    }
    Ok(())
}

fn write_at(c: &mut Ctx<'_>, d: &Description, buf: &GuestBuf, offset: u64) -> SysResult {
    let limit = c.with_process(|p| p.rlimits[RLIMIT_FSIZE].0);
    if offset >= limit && !buf.is_empty() {
        signal_self(c, SIGXFSZ);
        return Err(Errno::FBIG.into());
    }
    write_steps(c, buf, offset, |c, offset, bytes| {
        let room = usize::try_from(limit.saturating_sub(offset)).unwrap_or(usize::MAX);
        let fits = &bytes[..bytes.len().min(room)];
        if fits.len() < bytes.len() && fits.is_empty() {
            Ok(0)
        } else {
            d.file.write(c.k, offset, fits)
        }
    })
}

/// Writes all of `buf` to something that does not block, with `put` at rising offsets.
fn write_steps(
    c: &Ctx<'_>,
    buf: &GuestBuf,
    offset: u64,
    mut put: impl FnMut(&Ctx<'_>, u64, &[u8]) -> Result<usize, Errno>,
) -> SysResult {
    let mut done = 0;
    loop {
        let want = (buf.len() - done).min(STEP);
        let put = with_bounce(want, |bounce| {
            let n = buf.load(c.mem(), done, bounce);
            if n == 0 && want > 0 {
                return Err(Errno::FAULT);
            }
            put(c, offset.saturating_add(done as u64), &bounce[..n])
        });
        match put {
            Ok(n) => done += n,
            Err(errno) if done == 0 => return Err(errno.into()),
            Err(_) => return Ok(done as u64),
        }
        if done == buf.len() || put.is_ok_and(|n| n < want) {
            return Ok(done as u64);
        }
    }
}

/// Writes to a stream.
///
/// # Errors
/// `EFAULT`, `EAGAIN`, `EPIPE`, the file's, or a stop.
pub fn send(c: &mut Ctx<'_>, d: &Description, buf: &GuestBuf, broken: Broken) -> SysResult {
    loop {
        let done = (c.call.progress as usize).min(buf.len());
        let want = (buf.len() - done).min(STEP);
        if want == 0 && done > 0 {
            return Ok(done as u64);
        }
        let put = with_bounce(want, |bounce| {
            let n = buf.load(c.mem(), done, bounce);
            if n == 0 && want > 0 {
                return Err(Errno::FAULT);
            }
            let n = d.file.write(c.k, 0, &bounce[..n])?;
            printed(c.k, &*d.file, &bounce[..n]);
            Ok(n)
        });
        match put {
            Ok(0) => return Ok(done as u64),
            Ok(n) => c.call.progress += n as u64,
            Err(Errno::AGAIN) => {
                let short = c.interrupted || d.flags() & O_NONBLOCK != 0;
                return if short && done > 0 {
                    Ok(done as u64)
                } else {
                    Err(would_block(c, d, Ready::OUT))
                };
            }
            Err(errno) => {
                if errno == Errno::PIPE && broken == Broken::Signal {
                    signal_self(c, SIGPIPE);
                }
                return if done > 0 {
                    Ok(done as u64)
                } else {
                    Err(errno.into())
                };
            }
        }
    }
}

/// Shows what was written to whoever reads along.
fn printed(k: &crate::linux::kernel::Kernel, file: &dyn File, bytes: &[u8]) {
    if let Some(printed) = k.printed.get()
        && file.standard() == Some(1)
    {
        printed(bytes);
    }
}

/// Sends the calling thread a signal about its own call.
pub(super) fn signal_self(c: &Ctx<'_>, signo: i32) {
    let mut state = c.k.state();
    let Ok(process) = state.process(c.t.pid) else {
        return;
    };
    let uid = process.cred.uid[0];
    let fields = SigFields::Sender {
        pid: c.t.pid,
        uid,
        value: 0,
    };
    let info = SigInfo {
        signo,
        code: 0,
        errno: 0,
        fields,
    };
    // The calling thread exists and a standard signal cannot find its queue full.
    let _ = signal::send_to_thread(c.k, &mut state, c.t.tid, info);
}
