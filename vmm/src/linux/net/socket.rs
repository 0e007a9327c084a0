//! A socket: idle, listening, or one side of a connection.

use std::collections::VecDeque;
use std::sync::{Arc, Weak};

use serde::{Deserialize, Serialize};

use super::address::{Address, Family};
use super::names::{Name, Names};
use super::options::Options;
use crate::linux::Errno;
use crate::linux::call::{Wait, WaitKey};
use crate::linux::fd::eventfd::ANON_DEV;
use crate::linux::fd::pipe::{End, Pipe, PipeRoom};
use crate::linux::file::{Description, File, Ready, Stat, Viewer};
use crate::linux::kernel::Kernel;
use crate::linux::process::Pid;
use crate::linux::saved::{Refused, SavedFile, Saver};
use crate::linux::sched::Sched;
use crate::locks::{Mutex, rank};

/// Most connections that wait to be accepted (`/proc/sys/net/core/somaxconn`).
pub(super) const MAX_BACKLOG: usize = 4096;

/// Who made a socket (`struct ucred`, `SO_PEERCRED`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Maker {
    pub(super) pid: Pid,
    pub(super) uid: u32,
    pub(super) gid: u32,
}

/// A stream socket.
#[derive(Debug)]
pub struct Socket {
    pub(super) family: Family,
    pub(super) id: u64,
    pub(super) maker: Maker,
    /// Woken when the state changes, and when a listener's queue does.
    pub(super) key: WaitKey,
    sched: Arc<Sched>,
    names: Arc<Names>,
    /// Itself, for its name.
    me: Weak<Self>,
    pub(super) state: Mutex<rank::SocketState, State>,
    pub(super) options: Mutex<rank::SocketOptions, Options>,
}

#[derive(Debug)]
pub(super) struct State {
    pub(super) local: Address,
    pub(super) name: Option<Name>,
    pub(super) kind: Kind,
    /// Counts what happened to the socket itself.
    pub(super) changes: u64,
}

#[derive(Debug)]
pub(super) enum Kind {
    Idle,
    Listening(Queue),
    Connected(Stream),
}

/// Connections that wait to be accepted.
#[derive(Debug)]
pub(super) struct Queue {
    pub(super) waiting: VecDeque<Arc<Socket>>,
    pub(super) limit: usize,
}

/// One side of a connection. Its ends are gone after shutdown(2).
#[derive(Clone, Debug)]
pub(super) struct Stream {
    pub(super) input: Option<Arc<End>>,
    pub(super) output: Option<Arc<End>>,
    pub(super) keys: [WaitKey; 2],
    pub(super) peer: Address,
    pub(super) peer_maker: Maker,
}

impl Stream {
    fn new(input: Arc<End>, output: Arc<End>, peer: Address, peer_maker: Maker) -> Self {
        let keys = [input.pipe().filled(), output.pipe().drained()];
        Self {
            input: Some(input),
            output: Some(output),
            keys,
            peer,
            peer_maker,
        }
    }

    fn ready(&self) -> Ready {
        let from = self
            .input
            .as_ref()
            .map_or(Ready::HUP, |end| end.pipe().read_ready());
        let to = self
            .output
            .as_ref()
            .map_or(Ready::ERR, |end| end.pipe().write_ready());
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

/// What sockets of a machine are made with.
#[derive(Clone, Debug)]
pub(super) struct World {
    pub(super) sched: Arc<Sched>,
    pub(super) room: Arc<PipeRoom>,
    pub(super) names: Arc<Names>,
}

impl World {
    pub(super) fn of(k: &Kernel) -> Self {
        Self {
            sched: Arc::clone(&k.sched),
            room: Arc::clone(&k.io.pipes),
            names: Arc::clone(&k.io.names),
        }
    }
}

/// What connect(2) came to.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Connect {
    Done,
    /// The listener's queue is full: woken when it is not.
    Full(WaitKey),
}

impl Socket {
    /// A socket that is not connected.
    pub(super) fn new(world: &World, family: Family, maker: Maker) -> Arc<Self> {
        Self::with(world, family, maker, Address::none(family), Kind::Idle)
    }

    fn with(world: &World, family: Family, maker: Maker, local: Address, kind: Kind) -> Arc<Self> {
        let key = world.sched.new_key();
        let WaitKey::Object(id) = key else {
            unreachable!("new keys are objects")
        };
        Self::again(world, family, maker, local, kind, (id, key, 0))
    }

    /// One that has a number, a key and a count of changes already.
    pub(super) fn again(
        world: &World,
        family: Family,
        maker: Maker,
        local: Address,
        kind: Kind,
        (id, key, changes): (u64, WaitKey, u64),
    ) -> Arc<Self> {
        Arc::new_cyclic(|me| Self {
            me: Weak::clone(me),
            family,
            id,
            maker,
            key,
            sched: Arc::clone(&world.sched),
            names: Arc::clone(&world.names),
            state: Mutex::new(State {
                local,
                name: None,
                kind,
                changes,
            }),
            options: Mutex::default(),
        })
    }

    /// Two sockets connected to each other.
    ///
    /// # Errors
    /// `ENFILE` when the machine has no pipes left.
    pub(super) fn pair(world: &World, maker: Maker) -> Result<[Arc<Self>; 2], Errno> {
        let (a_in, b_out) = Pipe::pair(&world.sched, &world.room)?;
        let (b_in, a_out) = Pipe::pair(&world.sched, &world.room)?;
        let make = |input, output| {
            let stream = Stream::new(input, output, Address::Unnamed, maker);
            let kind = Kind::Connected(stream);
            Self::with(world, Family::Unix, maker, Address::Unnamed, kind)
        };
        Ok([make(a_in, a_out), make(b_in, b_out)])
    }

    /// Runs `bind` to get a name, unless it has one.
    ///
    /// # Errors
    /// `EINVAL` if it is bound or connected, and those of `bind`.
    pub(super) fn bind(
        &self,
        bind: impl FnOnce() -> Result<(Name, Address), Errno>,
    ) -> Result<(), Errno> {
        if self.is_bound() {
            return Err(Errno::INVAL);
        }
        let (name, local) = bind()?;
        let mut state = self.state.lock();
        state.name = Some(name);
        state.local = local;
        Ok(())
    }

    pub(super) fn is_bound(&self) -> bool {
        let state = self.state.lock();
        state.name.is_some() || matches!(state.kind, Kind::Connected(_))
    }

    /// listen(2).
    ///
    /// # Errors
    /// `EINVAL` if it is connected or, for `AF_UNIX`, has no name.
    pub(super) fn listen(&self, backlog: usize) -> Result<(), Errno> {
        let limit = backlog.clamp(1, MAX_BACKLOG);
        let mut state = self.state.lock();
        if self.family == Family::Unix && state.name.is_none() {
            return Err(Errno::INVAL);
        }
        match &mut state.kind {
            Kind::Idle => {
                state.kind = Kind::Listening(Queue {
                    waiting: VecDeque::new(),
                    limit,
                });
            }
            Kind::Listening(queue) => queue.limit = limit,
            Kind::Connected(_) => return Err(Errno::INVAL),
        }
        Ok(())
    }

    /// Connects to a listener.
    ///
    /// # Errors
    /// `EISCONN`, `EINVAL` if this listens, `ECONNREFUSED` if the other does not, `ENFILE`.
    pub(super) fn connect(
        &self,
        world: &World,
        to: &Self,
        peer: Address,
    ) -> Result<Connect, Errno> {
        // Never two sockets' locks at once: what is seen here is looked at again below.
        let local = {
            let state = self.state.lock();
            match state.kind {
                Kind::Idle => state.local.clone(),
                Kind::Listening(_) => return Err(Errno::INVAL),
                Kind::Connected(_) => return Err(Errno::ISCONN),
            }
        };
        let (our_in, their_out) = Pipe::pair(&world.sched, &world.room)?;
        let (their_in, our_out) = Pipe::pair(&world.sched, &world.room)?;
        let theirs = Stream::new(their_in, their_out, local, self.maker);
        let accepted = Self::with(
            world,
            to.family,
            to.maker,
            peer.clone(),
            Kind::Connected(theirs),
        );
        {
            let mut state = to.state.lock();
            let Kind::Listening(queue) = &mut state.kind else {
                return Err(Errno::CONNREFUSED);
            };
            if queue.waiting.len() >= queue.limit {
                return Ok(Connect::Full(to.key));
            }
            queue.waiting.push_back(accepted);
            state.changes += 1;
        }
        world.sched.wake(to.key);
        let mut state = self.state.lock();
        if !matches!(state.kind, Kind::Idle) {
            return Err(Errno::ISCONN);
        }
        state.kind = Kind::Connected(Stream::new(our_in, our_out, peer, to.maker));
        state.changes += 1;
        drop(state);
        world.sched.wake(self.key);
        Ok(Connect::Done)
    }

    /// The oldest connection that waits.
    ///
    /// # Errors
    /// `EINVAL` if it does not listen, `EAGAIN` if none waits.
    pub(super) fn accept(&self) -> Result<Arc<Self>, Errno> {
        let mut state = self.state.lock();
        let Kind::Listening(queue) = &mut state.kind else {
            return Err(Errno::INVAL);
        };
        let accepted = queue.waiting.pop_front().ok_or(Errno::AGAIN)?;
        drop(state);
        self.sched.wake(self.key);
        Ok(accepted)
    }

    /// shutdown(2).
    ///
    /// # Errors
    /// `ENOTCONN`.
    pub(super) fn shut_down(&self, reading: bool, writing: bool) -> Result<(), Errno> {
        let mut state = self.state.lock();
        let Kind::Connected(stream) = &mut state.kind else {
            return Err(Errno::NOTCONN);
        };
        let input = reading.then(|| stream.input.take());
        let output = writing.then(|| stream.output.take());
        let keys = stream.keys;
        state.changes += 1;
        drop(state);
        drop((input, output));
        keys.into_iter()
            .chain([self.key])
            .for_each(|key| self.sched.wake(key));
        Ok(())
    }

    /// This side of its connection.
    ///
    /// # Errors
    /// `ENOTCONN`.
    pub(super) fn stream(&self) -> Result<Stream, Errno> {
        match &self.state.lock().kind {
            Kind::Connected(stream) => Ok(stream.clone()),
            Kind::Idle | Kind::Listening(_) => Err(Errno::NOTCONN),
        }
    }

    /// The same for a read, which for `AF_UNIX` fails otherwise.
    ///
    /// # Errors
    /// `EINVAL`, `ENOTCONN`.
    pub(super) fn stream_to_read(&self) -> Result<Stream, Errno> {
        self.stream().map_err(|errno| match self.family {
            Family::Unix => Errno::INVAL,
            Family::Inet | Family::Inet6 => errno,
        })
    }

    pub(super) fn local(&self) -> Address {
        self.state.lock().local.clone()
    }

    pub(super) fn listens(&self) -> bool {
        matches!(self.state.lock().kind, Kind::Listening(_))
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        if let Some(name) = &self.state.get_mut().name {
            self.names.forget(name);
        }
        // Whoever waits for room in the queue learns that nobody listens any more.
        self.sched.wake(self.key);
    }
}

impl File for Socket {
    fn read(&self, _: &Kernel, _: u64, buf: &mut [u8]) -> Result<usize, Errno> {
        let input = self.stream_to_read()?.input;
        input.map_or(Ok(0), |end| end.pipe().read_some(buf))
    }

    fn write(&self, _: &Kernel, _: u64, buf: &[u8]) -> Result<usize, Errno> {
        let output = self.stream()?.output;
        output.ok_or(Errno::PIPE)?.pipe().write_some(buf)
    }

    fn stat(&self, _: &Kernel) -> Result<Stat, Errno> {
        Ok(Stat {
            dev: ANON_DEV,
            ino: self.id,
            nlink: 1,
            mode: 0o140_777,
            blksize: 4096,
            ..Stat::default()
        })
    }

    fn ready(&self, _: Viewer<'_>) -> Ready {
        self.readiness()
    }

    fn wait_key(&self) -> Option<WaitKey> {
        Some(self.key)
    }

    fn watch(&self, _: Viewer<'_>, _: Ready, wait: &mut Wait) {
        wait.keys.push(self.key);
        if let Ok(stream) = self.stream() {
            wait.keys.extend(stream.keys);
        }
    }

    fn edges(&self) -> u64 {
        let state = self.state.lock();
        let mut edges = state.changes;
        if let Kind::Connected(stream) = &state.kind {
            for end in stream.input.iter().chain(&stream.output) {
                edges = edges.wrapping_add(end.edges());
            }
        }
        edges
    }

    fn readable_bytes(&self) -> Option<usize> {
        let input = self.stream().ok().and_then(|stream| stream.input);
        Some(input.map_or(0, |end| end.pipe().len()))
    }

    fn name(&self, _: &Kernel) -> Vec<u8> {
        format!("socket:[{}]", self.id).into_bytes()
    }

    fn saved(&self, s: &mut Saver<'_>) -> Result<SavedFile, Refused> {
        let me = self.me.upgrade().expect("it is alive");
        Ok(SavedFile::Socket(s.socket(&me)))
    }

    fn as_any(&self) -> &dyn std::any::Any {
        self
    }
}

impl Socket {
    pub(super) fn readiness(&self) -> Ready {
        match &self.state.lock().kind {
            Kind::Idle => Ready::OUT | Ready::WRNORM | Ready::HUP,
            Kind::Listening(queue) if queue.waiting.is_empty() => Ready::empty(),
            Kind::Listening(_) => Ready::IN | Ready::RDNORM,
            Kind::Connected(stream) => stream.ready(),
        }
    }

    /// The socket that a description is of.
    ///
    /// # Errors
    /// `ENOTSOCK`.
    pub(super) fn of(description: &Description) -> Result<Arc<Self>, Errno> {
        let socket = description.file.as_any().downcast_ref::<Self>();
        socket
            .and_then(|socket| socket.me.upgrade())
            .ok_or(Errno::NOTSOCK)
    }
}
