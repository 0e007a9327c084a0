//! Sockets as data. A connection is two pipes inside the machine, so all of it is kept: what was sent and not
//! yet read, and the connections that wait to be accepted.

use std::collections::VecDeque;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::address::{Address, Family};
use super::names::Name;
use super::options::Options;
use super::socket::{Kind, MAX_BACKLOG, Maker, Queue, Socket, Stream, World};
use crate::linux::call::WaitKey;
use crate::linux::fd::pipe::{End, Side};
use crate::linux::saved::error::{Damaged, require};
use crate::linux::saved::tables::{PipeIx, SocketIx};
use crate::linux::saved::{Loader, Saver};

/// A socket.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SavedSocket {
    family: Family,
    id: u64,
    maker: Maker,
    local: Address,
    name: Option<Name>,
    kind: SavedKind,
    changes: u64,
    options: Options,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
enum SavedKind {
    Idle,
    Listening {
        waiting: Vec<SocketIx>,
        limit: usize,
    },
    Connected {
        input: Option<PipeIx>,
        output: Option<PipeIx>,
        peer: Address,
        peer_maker: Maker,
    },
}

impl Socket {
    pub(in crate::linux) fn saved_socket(&self, s: &mut Saver<'_>) -> SavedSocket {
        let state = self.state.lock();
        let kind = match &state.kind {
            Kind::Idle => SavedKind::Idle,
            Kind::Listening(queue) => SavedKind::Listening {
                waiting: queue
                    .waiting
                    .iter()
                    .map(|socket| s.socket(socket))
                    .collect(),
                limit: queue.limit,
            },
            Kind::Connected(stream) => {
                let mut pipe = |end: &Option<Arc<End>>| end.as_ref().map(|end| s.pipe(end.pipe()));
                SavedKind::Connected {
                    input: pipe(&stream.input),
                    output: pipe(&stream.output),
                    peer: stream.peer.clone(),
                    peer_maker: stream.peer_maker,
                }
            }
        };
        let (local, name, changes) = (state.local.clone(), state.name.clone(), state.changes);
        drop(state);
        SavedSocket {
            family: self.family,
            id: self.id,
            maker: self.maker,
            local,
            name,
            kind,
            changes,
            options: self.options.lock().clone(),
        }
    }
}

impl SavedSocket {
    /// Makes it again, a listener's queue still empty.
    pub(in crate::linux) fn load(&self, l: &Loader<'_>) -> Result<Arc<Socket>, Damaged> {
        let world = World::of(l.k);
        let key = world.sched.new_key();
        let kind = match &self.kind {
            SavedKind::Idle => Kind::Idle,
            SavedKind::Listening { limit, .. } => {
                require((1..=MAX_BACKLOG).contains(limit), "a listener's limit")?;
                Kind::Listening(Queue {
                    waiting: VecDeque::new(),
                    limit: *limit,
                })
            }
            SavedKind::Connected { .. } => Kind::Connected(self.stream(l, key)?),
        };
        let known = (self.id, key, self.changes);
        let socket = Socket::again(
            &world,
            self.family,
            self.maker,
            self.local.clone(),
            kind,
            known,
        );
        *socket.options.lock() = self.options.clone();
        if let Some(name) = &self.name {
            let bound = world.names.bind(name.clone(), &socket);
            bound.map_err(|_| Damaged("a name of two sockets"))?;
            socket.state.lock().name = Some(name.clone());
        }
        Ok(socket)
    }

    fn stream(&self, l: &Loader<'_>, key: WaitKey) -> Result<Stream, Damaged> {
        let SavedKind::Connected {
            input,
            output,
            peer,
            peer_maker,
        } = &self.kind
        else {
            return Err(Damaged("a connection that is none"));
        };
        let end = |pipe: &Option<PipeIx>, side| {
            let pipe = pipe.map(|pipe| l.pipe(pipe)).transpose()?;
            Ok::<_, Damaged>(pipe.map(|pipe| match side {
                Side::Read => pipe.reader(),
                Side::Write => pipe.writer(),
            }))
        };
        let (input, output) = (end(input, Side::Read)?, end(output, Side::Write)?);
        let keys = [
            input.as_ref().map_or(key, |end| end.pipe().filled()),
            output.as_ref().map_or(key, |end| end.pipe().drained()),
        ];
        Ok(Stream {
            input,
            output,
            keys,
            peer: peer.clone(),
            peer_maker: *peer_maker,
        })
    }

    /// Gives a listener the connections that wait, once all sockets are there.
    pub(in crate::linux) fn fill(&self, l: &Loader<'_>, socket: &Socket) -> Result<(), Damaged> {
        let SavedKind::Listening { waiting, limit } = &self.kind else {
            return Ok(());
        };
        require(waiting.len() <= *limit, "a listener's queue")?;
        let mut all = VecDeque::new();
        for waiting in waiting {
            let waiting = l.socket(*waiting)?;
            require(waiting.stream().is_ok(), "a connection that is none waits")?;
            all.push_back(Arc::clone(waiting));
        }
        if let Kind::Listening(queue) = &mut socket.state.lock().kind {
            queue.waiting = all;
        }
        Ok(())
    }
}
