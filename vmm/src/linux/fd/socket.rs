//! Pairs of connected stream sockets (socketpair(2)): two pipes in opposite directions. There is
//! no network and no socket with a name.

use std::sync::Arc;

use super::super::Errno;
use super::super::call::{Arg, Args, Ctx, Entry, SysResult, Wait, WaitKey};
use super::super::file::{Description, File, O_NONBLOCK, Ready, Stat};
use super::super::kernel::Kernel;
use super::super::sched::Sched;
use super::eventfd::ANON_DEV;
use super::pipe::{End, Pipe, PipeRoom, store_pair};
use super::table::O_CLOEXEC;
use super::transfer::{self, At};
use super::vector::GuestBuf;
use crate::locks::{Mutex, rank};

const MESSAGE: &[Arg] = &[Arg::Fd, Arg::Hex, Arg::Int, Arg::Hex, Arg::Hex, Arg::Hex];

/// The calls of this file.
pub const TABLE: &[Entry] = &[
    Entry {
        nr: 41,
        name: "socket",
        args: &[Arg::Int, Arg::Hex, Arg::Int],
        handler: sys_socket,
    },
    Entry {
        nr: 44,
        name: "sendto",
        args: MESSAGE,
        handler: sys_sendto,
    },
    Entry {
        nr: 45,
        name: "recvfrom",
        args: MESSAGE,
        handler: sys_recvfrom,
    },
    Entry {
        nr: 48,
        name: "shutdown",
        args: &[Arg::Fd, Arg::Int],
        handler: sys_shutdown,
    },
    Entry {
        nr: 53,
        name: "socketpair",
        args: &[Arg::Int, Arg::Hex, Arg::Int, Arg::Hex],
        handler: sys_socketpair,
    },
];

const AF_UNIX: i32 = 1;
const SOCK_STREAM: u32 = 1;

/// One of two connected sockets. Its ends are gone after shutdown(2).
#[derive(Debug)]
pub struct Socket {
    input: Mutex<rank::SocketInput, Option<Arc<End>>>,
    output: Mutex<rank::SocketOutput, Option<Arc<End>>>,
    keys: [WaitKey; 2],
    id: u64,
}

impl Socket {
    fn pair(sched: &Arc<Sched>, room: &Arc<PipeRoom>) -> Result<[Arc<Self>; 2], Errno> {
        let (a_in, b_out) = Pipe::pair(sched, room)?;
        let (b_in, a_out) = Pipe::pair(sched, room)?;
        Ok([Self::new(a_in, a_out), Self::new(b_in, b_out)])
    }

    fn new(input: Arc<End>, output: Arc<End>) -> Arc<Self> {
        let keys = [input.pipe().filled(), output.pipe().drained()];
        let id = input.pipe().id();
        let (input, output) = (Mutex::new(Some(input)), Mutex::new(Some(output)));
        Arc::new(Self {
            input,
            output,
            keys,
            id,
        })
    }

    fn ready_now(&self) -> Ready {
        let input = self.input.lock().clone();
        let output = self.output.lock().clone();
        let from = input.map_or(Ready::HUP, |end| end.pipe().read_ready());
        let to = output.map_or(Ready::ERR, |end| end.pipe().write_ready());
        let (no_writer, no_reader) = (from.contains(Ready::HUP), to.contains(Ready::ERR));
        let mut ready = (from | to) - (Ready::HUP | Ready::ERR);
        ready.set(
            Ready::IN | Ready::RDNORM | Ready::RDHUP,
            no_writer || ready.contains(Ready::IN),
        );
        ready.set(Ready::RDHUP, no_writer);
        ready.set(
            Ready::OUT | Ready::WRNORM,
            no_reader || ready.contains(Ready::OUT),
        );
        ready.set(Ready::HUP, no_writer && no_reader);
        ready
    }
}

impl File for Socket {
    fn read(&self, _: &Kernel, _: u64, buf: &mut [u8]) -> Result<usize, Errno> {
        let input = self.input.lock().clone();
        input.map_or(Ok(0), |end| end.pipe().read_some(buf))
    }

    fn write(&self, _: &Kernel, _: u64, buf: &[u8]) -> Result<usize, Errno> {
        let output = self.output.lock().clone();
        output.ok_or(Errno::PIPE)?.pipe().write_some(buf)
    }

    fn stat(&self, _: &Kernel) -> Result<Stat, Errno> {
        let blksize = 4096;
        Ok(Stat {
            dev: ANON_DEV,
            ino: self.id,
            nlink: 1,
            mode: 0o140_777,
            blksize,
            ..Stat::default()
        })
    }

    fn ready(&self, _: &Kernel) -> Ready {
        self.ready_now()
    }

    fn wait_key(&self) -> Option<WaitKey> {
        Some(self.keys[0])
    }

    fn watch(&self, _: &Kernel, _: Ready, wait: &mut Wait) {
        wait.keys.extend(self.keys);
    }

    fn edges(&self) -> u64 {
        let input = self.input.lock().as_ref().map_or(0, |end| end.edges());
        let output = self.output.lock().as_ref().map_or(0, |end| end.edges());
        input.wrapping_add(output)
    }

    fn readable_bytes(&self) -> Option<usize> {
        Some(self.input.lock().as_ref().map_or(0, |end| end.pipe().len()))
    }

    fn name(&self, _: &Kernel) -> Vec<u8> {
        format!("socket:[{}]", self.id).into_bytes()
    }

    fn as_any(&self) -> &dyn std::any::Any {
        self
    }
}

fn sys_socket(_: &mut Ctx<'_>, _: &Args) -> SysResult {
    Err(Errno::AFNOSUPPORT.into())
}

fn sys_socketpair(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let flags = a.u32(1) & (O_NONBLOCK | O_CLOEXEC);
    if a.i32(0) != AF_UNIX {
        return Err(Errno::AFNOSUPPORT.into());
    }
    if a.u32(1) & !(O_NONBLOCK | O_CLOEXEC) != SOCK_STREAM || a.i32(2) > 1 {
        return Err(Errno::PROTONOSUPPORT.into());
    }
    let pair = Socket::pair(&c.k.sched, &c.k.io.pipes)?
        .map(|socket| Description::new(socket, 2 | flags & O_NONBLOCK));
    let fds = c.add_fd_pair(pair, flags & O_CLOEXEC != 0)?;
    store_pair(c, a.u64(3), fds)
}

/// The description of a socket.
fn socket_of(c: &Ctx<'_>, fd: i32) -> Result<Arc<Description>, Errno> {
    let d = c.file(fd)?;
    if d.file.as_any().is::<Socket>() {
        Ok(d)
    } else {
        Err(Errno::NOTSOCK)
    }
}

fn sys_sendto(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let d = socket_of(c, a.i32(0))?;
    if a.u32(3) & !(libc::MSG_NOSIGNAL as u32) != 0 {
        return Err(Errno::OPNOTSUPP.into());
    }
    if a.u64(4) != 0 {
        return Err(Errno::ISCONN.into());
    }
    transfer::write(c, &d, &GuestBuf::new(a.u64(1), a.u64(2)), At::Current)
}

fn sys_recvfrom(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let d = socket_of(c, a.i32(0))?;
    if a.u32(3) != 0 {
        return Err(Errno::OPNOTSUPP.into());
    }
    let n = transfer::read(c, &d, &GuestBuf::new(a.u64(1), a.u64(2)), At::Current)?;
    if a.u64(5) != 0 {
        // The other side has no address.
        c.mem().write_obj(a.u64(5), &0_u32)?;
    }
    Ok(n)
}

fn sys_shutdown(c: &mut Ctx<'_>, a: &Args) -> SysResult {
    let d = socket_of(c, a.i32(0))?;
    let socket = d
        .file
        .as_any()
        .downcast_ref::<Socket>()
        .ok_or(Errno::NOTSOCK)?;
    let how = a.i32(1);
    if !(0..=2).contains(&how) {
        return Err(Errno::INVAL.into());
    }
    let input = if how != 1 {
        socket.input.lock().take()
    } else {
        None
    };
    let output = if how != 0 {
        socket.output.lock().take()
    } else {
        None
    };
    drop((input, output));
    socket.keys.into_iter().for_each(|key| c.k.sched.wake(key));
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(socket: &Socket) -> Result<Vec<u8>, Errno> {
        let mut buf = [0; 16];
        let end = socket.input.lock().clone();
        let n = end.map_or(Ok(0), |end| end.pipe().read_some(&mut buf))?;
        Ok(buf[..n].to_vec())
    }

    fn put(socket: &Socket, bytes: &[u8]) -> Result<usize, Errno> {
        let end = socket.output.lock().clone();
        end.ok_or(Errno::PIPE)?.pipe().write_some(bytes)
    }

    #[test]
    fn both_directions_are_apart() {
        let [a, b] = Socket::pair(&Arc::new(Sched::default()), &Arc::default()).unwrap();
        assert_eq!((put(&a, b"to b"), put(&b, b"to a")), (Ok(4), Ok(4)));
        assert_eq!(
            (text(&a), text(&b)),
            (Ok(b"to a".to_vec()), Ok(b"to b".to_vec()))
        );
        assert_eq!(a.ready_now(), Ready::OUT | Ready::WRNORM);
    }

    #[test]
    fn closed_peer_gives_end_of_file_and_hangup() {
        let [a, b] = Socket::pair(&Arc::new(Sched::default()), &Arc::default()).unwrap();
        drop(b);
        assert_eq!(text(&a), Ok(Vec::new()));
        assert_eq!(put(&a, b"x"), Err(Errno::PIPE));
        assert!(
            a.ready_now()
                .contains(Ready::HUP | Ready::IN | Ready::RDHUP | Ready::OUT)
        );
    }
}
