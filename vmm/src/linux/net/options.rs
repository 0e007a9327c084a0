//! Socket options (socket(7), tcp(7), ipv6(7)).
//!
//! What has no effect here because a connection is a pipe (`TCP_NODELAY`, `SO_KEEPALIVE`, ...) is
//! kept and given back. What would have one and has not is refused.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use zerocopy::{Immutable, IntoBytes};

use super::address::Family;
use super::calls::socket_of;
use super::socket::{Maker, Socket};
use crate::linux::Errno;
use crate::linux::call::{Args, Ctx, SysResult};

/// `struct linger` is the longest value that is set.
const MAX_VALUE: usize = 8;
/// Bytes of a send or receive buffer: what a pipe holds.
const BUFFER: i32 = crate::linux::fd::pipe::DEFAULT_CAPACITY as i32;

/// Values that were set, by level and option.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Options {
    set: BTreeMap<(i32, i32), [i32; 2]>,
}

/// `struct ucred`.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct Ucred {
    pid: i32,
    uid: u32,
    gid: u32,
}

impl From<Maker> for Ucred {
    fn from(maker: Maker) -> Self {
        Self {
            pid: maker.pid,
            uid: maker.uid,
            gid: maker.gid,
        }
    }
}

/// Whether a program may set an option of a socket of this family.
fn settable(family: Family, level: i32, option: i32) -> bool {
    let inet = family != Family::Unix;
    match level {
        libc::SOL_SOCKET => matches!(
            option,
            libc::SO_REUSEADDR
                | libc::SO_REUSEPORT
                | libc::SO_KEEPALIVE
                | libc::SO_SNDBUF
                | libc::SO_RCVBUF
                | libc::SO_OOBINLINE
                | libc::SO_BROADCAST
                | libc::SO_LINGER
                | libc::SO_PRIORITY
        ),
        libc::IPPROTO_TCP if inet => matches!(
            option,
            libc::TCP_NODELAY
                | libc::TCP_CORK
                | libc::TCP_KEEPIDLE
                | libc::TCP_KEEPINTVL
                | libc::TCP_KEEPCNT
                | libc::TCP_USER_TIMEOUT
                | libc::TCP_QUICKACK
                | libc::TCP_DEFER_ACCEPT
        ),
        libc::IPPROTO_IPV6 => family == Family::Inet6 && option == libc::IPV6_V6ONLY,
        libc::IPPROTO_IP => inet && matches!(option, libc::IP_TOS | libc::IP_TTL),
        _ => false,
    }
}

/// setsockopt(2).
pub(super) fn sys_setsockopt(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let d = socket_of(c, a.i32(0))?;
    let socket = Socket::of(&d)?;
    let (level, option) = (a.i32(1), a.i32(2));
    if !settable(socket.family, level, option) {
        return Err(Errno::NOPROTOOPT.into());
    }
    let wanted = if (level, option) == (libc::SOL_SOCKET, libc::SO_LINGER) {
        MAX_VALUE
    } else {
        size_of::<i32>()
    };
    if a.i32(4) < wanted as i32 {
        return Err(Errno::INVAL.into());
    }
    let mut raw = [0; MAX_VALUE];
    c.mem().read(a.u64(3), &mut raw[..wanted])?;
    let [p, q, r, s, t, u, v, w] = raw;
    let value = [
        i32::from_ne_bytes([p, q, r, s]),
        i32::from_ne_bytes([t, u, v, w]),
    ];
    socket.options.lock().set.insert((level, option), value);
    Ok(0)
}

/// getsockopt(2).
pub(super) fn sys_getsockopt(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let d = socket_of(c, a.i32(0))?;
    let socket = Socket::of(&d)?;
    let value = value_of(&socket, a.i32(1), a.i32(2))?;
    let room: i32 = c.mem().read_obj(a.u64(4))?;
    let room = usize::try_from(room).map_err(|_| Errno::INVAL)?;
    let n = value.len().min(room);
    c.mem().write(a.u64(3), &value[..n])?;
    c.mem().write_obj(a.u64(4), &(n as i32))?;
    Ok(0)
}

fn value_of(socket: &Socket, level: i32, option: i32) -> Result<Vec<u8>, Errno> {
    let number = |n: i32| Ok(n.to_ne_bytes().to_vec());
    let inet = socket.family != Family::Unix;
    match (level, option) {
        (libc::SOL_SOCKET, libc::SO_TYPE) => number(libc::SOCK_STREAM),
        (libc::SOL_SOCKET, libc::SO_ERROR) => number(0),
        (libc::SOL_SOCKET, libc::SO_DOMAIN) => number(socket.family.number().into()),
        (libc::SOL_SOCKET, libc::SO_PROTOCOL) => number(if inet { libc::IPPROTO_TCP } else { 0 }),
        (libc::SOL_SOCKET, libc::SO_ACCEPTCONN) => number(socket.listens().into()),
        (libc::SOL_SOCKET, libc::SO_SNDBUF | libc::SO_RCVBUF) => number(BUFFER),
        (libc::SOL_SOCKET, libc::SO_PEERCRED) => {
            let peer = socket.stream().map(|stream| stream.peer_maker);
            let nobody = Maker {
                pid: 0,
                uid: u32::MAX,
                gid: u32::MAX,
            };
            Ok(Ucred::from(peer.unwrap_or(nobody)).as_bytes().to_vec())
        }
        _ if settable(socket.family, level, option) => {
            let set = socket.options.lock().set.get(&(level, option)).copied();
            let value = set.unwrap_or_default();
            if option == libc::SO_LINGER && level == libc::SOL_SOCKET {
                return Ok(value.as_bytes().to_vec());
            }
            number(value[0])
        }
        _ => Err(Errno::NOPROTOOPT),
    }
}
