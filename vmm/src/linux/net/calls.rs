//! socket(2) and its relatives.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use super::address::{self, Address, Family};
use super::names::Name;
use super::socket::{Connect, Maker, Socket, World};
use super::{message, options};
use crate::linux::Errno;
use crate::linux::call::{Arg, Args, Ctx, Entry, Stop, SysResult, Wait};
use crate::linux::fd::pipe::store_pair;
use crate::linux::fd::table::O_CLOEXEC;
use crate::linux::fd::would_block;
use crate::linux::file::{Description, O_NONBLOCK, Ready};
use crate::linux::fs::{Caller, Follow, Node, S_IFMT, S_IFSOCK};

const SOCK_STREAM: u32 = 1;
/// `AF_NETLINK` and others have types this one does not.
const TYPES: std::ops::RangeInclusive<u32> = 1..=5;
const READ_WRITE: u32 = 2;

const NAMED: &[Arg] = &[Arg::Fd, Arg::Hex, Arg::Int];
const ASKED: &[Arg] = &[Arg::Fd, Arg::Hex, Arg::Hex];
const MESSAGE: &[Arg] = &[Arg::Fd, Arg::Hex, Arg::Int, Arg::Hex, Arg::Hex, Arg::Hex];
const OPTION: &[Arg] = &[Arg::Fd, Arg::Int, Arg::Int, Arg::Hex, Arg::Hex];

/// The calls of sockets.
pub const TABLE: &[Entry] = &[
    Entry::new(41, "socket", &[Arg::Int, Arg::Hex, Arg::Int], sys_socket),
    Entry::new(42, "connect", NAMED, sys_connect),
    Entry::new(43, "accept", ASKED, sys_accept),
    Entry::new(44, "sendto", MESSAGE, message::sys_sendto),
    Entry::new(45, "recvfrom", MESSAGE, message::sys_recvfrom),
    Entry::new(46, "sendmsg", ASKED, message::sys_sendmsg),
    Entry::new(47, "recvmsg", ASKED, message::sys_recvmsg),
    Entry::new(48, "shutdown", &[Arg::Fd, Arg::Int], sys_shutdown),
    Entry::new(49, "bind", NAMED, sys_bind),
    Entry::new(50, "listen", &[Arg::Fd, Arg::Int], sys_listen),
    Entry::new(51, "getsockname", ASKED, sys_getsockname),
    Entry::new(52, "getpeername", ASKED, sys_getpeername),
    Entry::new(
        53,
        "socketpair",
        &[Arg::Int, Arg::Hex, Arg::Int, Arg::Hex],
        sys_socketpair,
    ),
    Entry::new(54, "setsockopt", OPTION, options::sys_setsockopt),
    Entry::new(55, "getsockopt", OPTION, options::sys_getsockopt),
    Entry::new(
        288,
        "accept4",
        &[Arg::Fd, Arg::Hex, Arg::Hex, Arg::Hex],
        sys_accept4,
    ),
];

/// The description of a socket.
pub(super) fn socket_of(c: &Ctx<'_>, fd: i32) -> Result<Arc<Description>, Errno> {
    let d = c.file(fd)?;
    if d.file.as_any().is::<Socket>() {
        Ok(d)
    } else {
        Err(Errno::NOTSOCK)
    }
}

fn maker(c: &Ctx<'_>) -> Maker {
    let pid = c.t.pid;
    c.with_process(|p| Maker {
        pid,
        uid: p.cred.uid[1],
        gid: p.cred.gid[1],
    })
}

/// The family and flags of what socket(2) and socketpair(2) are asked for.
fn wanted(domain: i32, kind: u32, protocol: i32) -> Result<(Family, u32), Errno> {
    let flags = kind & (O_NONBLOCK | O_CLOEXEC);
    let kind = kind & !flags;
    if !TYPES.contains(&kind) {
        return Err(Errno::INVAL);
    }
    let family = Family::new(domain)?;
    if kind != SOCK_STREAM {
        return Err(Errno::SOCKTNOSUPPORT);
    }
    let fits = match family {
        Family::Unix => matches!(protocol, 0 | 1),
        Family::Inet | Family::Inet6 => matches!(protocol, 0 | libc::IPPROTO_TCP),
    };
    if fits {
        Ok((family, flags))
    } else {
        Err(Errno::PROTONOSUPPORT)
    }
}

fn sys_socket(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let (family, flags) = wanted(a.i32(0), a.u32(1), a.i32(2))?;
    let socket = Socket::new(&World::of(c.k), family, maker(c));
    let d = Description::new(socket, READ_WRITE | flags & O_NONBLOCK);
    Ok(c.add_fd(d, flags & O_CLOEXEC != 0)? as u64)
}

fn sys_socketpair(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let (family, flags) = wanted(a.i32(0), a.u32(1), a.i32(2))?;
    if family != Family::Unix {
        return Err(Errno::OPNOTSUPP.into());
    }
    let pair = Socket::pair(&World::of(c.k), maker(c))?
        .map(|socket| Description::new(socket, READ_WRITE | flags & O_NONBLOCK));
    let fds = c.add_fd_pair(pair, flags & O_CLOEXEC != 0)?;
    store_pair(c, a.u64(3), fds)
}

/// Reads an address argument.
fn given(c: &Ctx<'_>, at: u64, len: i32) -> Result<Vec<u8>, Errno> {
    let len = usize::try_from(len).map_err(|_| Errno::INVAL)?;
    if len > address::MAX {
        return Err(Errno::INVAL);
    }
    let mut raw = vec![0; len];
    c.mem().read(at, &mut raw)?;
    Ok(raw)
}

/// Stores an address where the guest wants one, cut to the room it has.
pub(super) fn give(c: &Ctx<'_>, at: u64, length_at: u64, raw: &[u8]) -> Result<(), Errno> {
    let room: i32 = c.mem().read_obj(length_at)?;
    let room = usize::try_from(room).map_err(|_| Errno::INVAL)?;
    c.mem().write(at, &raw[..raw.len().min(room)])?;
    c.mem().write_obj(length_at, &(raw.len() as u32))
}

fn sys_bind(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let d = socket_of(c, a.i32(0))?;
    let socket = Socket::of(&d)?;
    let to = Address::parse(socket.family, &given(c, a.u64(1), a.i32(2))?)?;
    socket.bind(|| bind(c, &socket, &to))?;
    Ok(0)
}

fn bind(c: &Ctx<'_>, socket: &Arc<Socket>, to: &Address) -> Result<(Name, Address), Errno> {
    let names = &c.k.io.names;
    match to {
        Address::Unnamed => {
            let name = names.bind_any_abstract(socket)?;
            Ok((Name::Abstract(name.clone()), Address::Abstract(name)))
        }
        Address::Abstract(name) => {
            let name = Name::Abstract(name.clone());
            names.bind(name.clone(), socket)?;
            Ok((name, to.clone()))
        }
        Address::Path(path) => {
            let name = make_inode(c, path)?;
            names.bind(name.clone(), socket)?;
            Ok((name, to.clone()))
        }
        Address::Inet(ip, port) => {
            if !is_here(*ip) && !ip.is_unspecified() {
                return Err(Errno::ADDRNOTAVAIL);
            }
            let port = bind_port(c, socket, *ip, *port)?;
            Ok((Name::Tcp(*ip, port), Address::Inet(*ip, port)))
        }
    }
}

fn bind_port(c: &Ctx<'_>, socket: &Arc<Socket>, ip: IpAddr, port: u16) -> Result<u16, Errno> {
    if port == 0 {
        return c.k.io.names.bind_any_port(ip, socket);
    }
    c.k.io.names.bind(Name::Tcp(ip, port), socket)?;
    Ok(port)
}

/// Whether an address is one of the machine's own.
fn is_here(ip: IpAddr) -> bool {
    ip.is_loopback()
}

/// Makes the inode that names a socket.
fn make_inode(c: &Ctx<'_>, path: &[u8]) -> Result<Name, Errno> {
    let caller = Caller::of(c);
    let (cwd, mode) = c.with_process(|p| (p.cwd.clone(), 0o777 & !p.umask));
    let base = if path.first() == Some(&b'/') {
        c.k.vfs.root()
    } else {
        cwd
    };
    c.k.vfs
        .mknod(&caller, &base, path, (Node::Socket, mode))
        .map_err(|errno| match errno {
            Errno::EXIST => Errno::ADDRINUSE,
            other => other,
        })?;
    let found = c.k.vfs.walk(&caller, &base, path, Follow::Not)?;
    let stat = found.existing()?;
    Ok(Name::Inode(stat.dev, stat.ino))
}

fn sys_listen(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let d = socket_of(c, a.i32(0))?;
    let socket = Socket::of(&d)?;
    if socket.family != Family::Unix && !socket.is_bound() {
        let to = Address::none(socket.family);
        socket.bind(|| bind(c, &socket, &to))?;
    }
    // A negative number is a large one, as on Linux.
    socket.listen(a.u32(1) as usize)?;
    Ok(0)
}

fn sys_connect(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let d = socket_of(c, a.i32(0))?;
    let socket = Socket::of(&d)?;
    let raw = given(c, a.u64(1), a.i32(2))?;
    if raw.first_chunk::<2>() == Some(&address::AF_UNSPEC.to_ne_bytes()) {
        return Err(Errno::OPNOTSUPP.into());
    }
    let to = Address::parse(socket.family, &raw)?;
    let (name, peer) = target(c, to)?;
    let listener = c.k.io.names.find(&name).ok_or(Errno::CONNREFUSED)?;
    if let (Address::Inet(ip, _), false) = (&peer, socket.is_bound()) {
        let here = Address::Inet(*ip, 0);
        socket.bind(|| bind(c, &socket, &here))?;
    }
    match socket.connect(&World::of(c.k), &listener, peer)? {
        Connect::Done => Ok(0),
        Connect::Full(_) if d.flags() & O_NONBLOCK != 0 => Err(Errno::AGAIN.into()),
        Connect::Full(key) => Err(Stop::Block(Wait::on(key))),
    }
}

/// The name to look for, and the address the other side has.
fn target(c: &Ctx<'_>, to: Address) -> Result<(Name, Address), Errno> {
    match to {
        Address::Unnamed => Err(Errno::INVAL),
        Address::Abstract(name) => Ok((Name::Abstract(name.clone()), Address::Abstract(name))),
        Address::Path(path) => {
            let caller = Caller::of(c);
            let base = if path.first() == Some(&b'/') {
                c.k.vfs.root()
            } else {
                c.with_process(|p| p.cwd.clone())
            };
            let found = c.k.vfs.walk(&caller, &base, &path, Follow::Last)?;
            let stat = *found.existing()?;
            if !caller.permitted(&stat, 2) {
                return Err(Errno::ACCESS);
            }
            if stat.mode & S_IFMT != S_IFSOCK {
                return Err(Errno::CONNREFUSED);
            }
            Ok((Name::Inode(stat.dev, stat.ino), Address::Path(path)))
        }
        Address::Inet(ip, port) => {
            // The address that stands for all is, as a target, this machine.
            let ip = match ip {
                IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
                IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
                ip => ip,
            };
            if !is_here(ip) {
                return Err(Errno::NETUNREACH);
            }
            Ok((Name::Tcp(ip, port), Address::Inet(ip, port)))
        }
    }
}

fn sys_accept(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    accept(c, a, 0)
}

fn sys_accept4(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let flags = a.u32(3);
    if flags & !(O_NONBLOCK | O_CLOEXEC) != 0 {
        return Err(Errno::INVAL.into());
    }
    accept(c, a, flags)
}

fn accept(c: &mut Ctx<'_>, a: &Args, flags: u32) -> SysResult {
    let d = socket_of(c, a.i32(0))?;
    let listener = Socket::of(&d)?;
    let socket = match listener.accept() {
        Ok(socket) => socket,
        Err(Errno::AGAIN) => return Err(would_block(c, &d, Ready::IN)),
        Err(errno) => return Err(errno.into()),
    };
    if a.u64(1) != 0 {
        let peer = socket.stream()?.peer.bytes(listener.family);
        give(c, a.u64(1), a.u64(2), &peer)?;
    }
    let d = Description::new(socket, READ_WRITE | flags & O_NONBLOCK);
    Ok(c.add_fd(d, flags & O_CLOEXEC != 0)? as u64)
}

fn sys_getsockname(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let d = socket_of(c, a.i32(0))?;
    let socket = Socket::of(&d)?;
    give(c, a.u64(1), a.u64(2), &socket.local().bytes(socket.family))?;
    Ok(0)
}

fn sys_getpeername(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let d = socket_of(c, a.i32(0))?;
    let socket = Socket::of(&d)?;
    give(
        c,
        a.u64(1),
        a.u64(2),
        &socket.stream()?.peer.bytes(socket.family),
    )?;
    Ok(0)
}

fn sys_shutdown(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let d = socket_of(c, a.i32(0))?;
    let socket = Socket::of(&d)?;
    match a.i32(1) {
        libc::SHUT_RD => socket.shut_down(true, false)?,
        libc::SHUT_WR => socket.shut_down(false, true)?,
        libc::SHUT_RDWR => socket.shut_down(true, true)?,
        _ => return Err(Errno::INVAL.into()),
    }
    Ok(0)
}
