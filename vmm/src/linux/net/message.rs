//! send(2), recv(2), and messages in pieces (sendmsg(2), recvmsg(2)).

use std::sync::Arc;

use shadow_mm::Access;
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::calls::socket_of;
use super::socket::Socket;
use crate::linux::Errno;
use crate::linux::call::{Args, Ctx, Stop, SysResult};
use crate::linux::fd::STEP;
use crate::linux::fd::transfer::{self, At, Broken};
use crate::linux::fd::vector::GuestBuf;
use crate::linux::fd::would_block;
use crate::linux::file::{Description, Ready};

const PEEK: u32 = libc::MSG_PEEK as u32;
const DONTWAIT: u32 = libc::MSG_DONTWAIT as u32;
const NOSIGNAL: u32 = libc::MSG_NOSIGNAL as u32;
const CMSG_CLOEXEC: u32 = libc::MSG_CMSG_CLOEXEC as u32;
/// More follows: nothing to wait for here.
const MORE: u32 = libc::MSG_MORE as u32;

/// `struct msghdr`.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct Header {
    name: u64,
    name_length: u32,
    _pad: u32,
    pieces: u64,
    piece_count: u64,
    control: u64,
    control_length: u64,
    flags: u32,
    _pad2: u32,
}

const NAME_LENGTH_AT: u64 = 8;
const CONTROL_LENGTH_AT: u64 = 40;
const FLAGS_AT: u64 = 48;

fn send(c: &mut Ctx<'_>, d: &Arc<Description>, buf: &GuestBuf, flags: u32) -> SysResult {
    if flags & !(NOSIGNAL | DONTWAIT | MORE) != 0 {
        return Err(Errno::OPNOTSUPP.into());
    }
    Socket::of(d)?.stream()?;
    let broken = if flags & NOSIGNAL != 0 {
        Broken::Silent
    } else {
        Broken::Signal
    };
    let sent = transfer::send(c, d, buf, broken);
    match sent {
        Err(Stop::Block(_)) if flags & DONTWAIT != 0 => match c.call.progress {
            0 => Err(Errno::AGAIN.into()),
            n => Ok(n),
        },
        other => other,
    }
}

fn receive(c: &mut Ctx<'_>, d: &Arc<Description>, buf: &GuestBuf, flags: u32) -> SysResult {
    if flags & !(PEEK | DONTWAIT | CMSG_CLOEXEC) != 0 {
        return Err(Errno::OPNOTSUPP.into());
    }
    let got = if flags & PEEK != 0 {
        peek(c, d, buf)
    } else {
        transfer::read(c, d, buf, At::Current)
    };
    match got {
        Err(Stop::Block(_)) if flags & DONTWAIT != 0 => Err(Errno::AGAIN.into()),
        other => other,
    }
}

/// What would be read, left where it is.
fn peek(c: &Ctx<'_>, d: &Arc<Description>, buf: &GuestBuf) -> SysResult {
    let stream = Socket::of(d)?.stream_to_read()?;
    let Some(end) = stream.input else {
        return Ok(0);
    };
    let fits = buf.accessible(c.mem(), 0, buf.len().min(STEP), Access::Write);
    if fits == 0 && !buf.is_empty() {
        return Err(Errno::FAULT.into());
    }
    let mut bytes = vec![0; fits.min(end.pipe().len().max(1))];
    match end.pipe().peek(&mut bytes) {
        Ok(n) => Ok(buf.store(c.mem(), 0, &bytes[..n]) as u64),
        Err(Errno::AGAIN) => Err(would_block(c, d, Ready::IN)),
        Err(errno) => Err(errno.into()),
    }
}

pub(super) fn sys_sendto(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let d = socket_of(c, a.i32(0))?;
    if a.u64(4) != 0 {
        return Err(Errno::ISCONN.into());
    }
    send(c, &d, &GuestBuf::new(a.u64(1), a.u64(2)), a.u32(3))
}

pub(super) fn sys_recvfrom(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let d = socket_of(c, a.i32(0))?;
    let n = receive(c, &d, &GuestBuf::new(a.u64(1), a.u64(2)), a.u32(3))?;
    if a.u64(4) != 0 && a.u64(5) != 0 {
        // A stream's bytes have no sender.
        c.mem().write_obj(a.u64(5), &0_u32)?;
    }
    Ok(n)
}

pub(super) fn sys_sendmsg(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let d = socket_of(c, a.i32(0))?;
    let header: Header = c.mem().read_obj(a.u64(1))?;
    if header.name != 0 && header.name_length != 0 {
        return Err(Errno::ISCONN.into());
    }
    if header.control_length != 0 {
        return Err(Errno::OPNOTSUPP.into());
    }
    let buf = GuestBuf::from_iovec(c.mem(), header.pieces, header.piece_count)?;
    send(c, &d, &buf, a.u32(2))
}

pub(super) fn sys_recvmsg(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let d = socket_of(c, a.i32(0))?;
    let at = a.u64(1);
    let header: Header = c.mem().read_obj(at)?;
    let buf = GuestBuf::from_iovec(c.mem(), header.pieces, header.piece_count)?;
    let n = receive(c, &d, &buf, a.u32(2))?;
    if header.name != 0 {
        c.mem().write_obj(at.wrapping_add(NAME_LENGTH_AT), &0_u32)?;
    }
    c.mem()
        .write_obj(at.wrapping_add(CONTROL_LENGTH_AT), &0_u64)?;
    c.mem().write_obj(at.wrapping_add(FLAGS_AT), &0_u32)?;
    Ok(n)
}
