//! What `vmm fork` and the processes that run its clones, workers or a pool, say to each other: a number of bytes, that
//! many, and descriptors that come with the first of them.
//!
//! Both sides are the same program and trust each other. A message is bounded all the same, so that whoever is
//! spoken to by something else says so and does not fill the memory.

use std::io::{self, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::io::{Errno, IoSlice, IoSliceMut};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// Most bytes of a message: as many as a command line has.
const MOST: usize = 4 << 20;
/// Most descriptors that come with one.
const DESCRIPTORS: usize = 3;

/// What a process that runs clones is told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Order {
    /// First: what is the same for all clones. The template comes with it, if it goes to a worker; a pool has its own.
    Serve(Lot),
    /// Start a clone. Those of its descriptors that come do so with it, in order.
    Start(One),
}

/// What is the same for all clones.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Lot {
    /// The name of the guest that was frozen.
    pub(super) template: String,
    /// How many clones there will be, in all processes.
    pub(super) of: u32,
    /// Processors of each machine, if that was said.
    pub(super) cpus: Option<u8>,
    /// Each ends after this long.
    pub(super) timeout: Option<Duration>,
}

/// One of them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct One {
    /// Which.
    pub(super) number: u32,
    /// What it is called, if it was given a name.
    pub(super) name: Option<String>,
    /// What it reads from /dev/vmm.
    pub(super) settings: Vec<String>,
    /// Its descriptors 0 to 2.
    pub(super) stdio: [End; 3],
}

/// Where a standard descriptor of a clone comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum End {
    /// With the order.
    Comes,
    /// It is that of the process that runs the clone.
    Own,
    /// There is none; nothing to read, if it is standard input.
    Nothing,
}

/// What a process that runs clones tells.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum News {
    /// First, by a pool: so many clones may run.
    Room(u32),
    /// A clone runs.
    Runs(u32),
    /// It has ended.
    Ended {
        /// Which.
        number: u32,
        /// Its exit status.
        status: u8,
    },
    /// It could not be made, or its machine failed.
    Failed {
        /// Which.
        number: u32,
        /// Why, in words.
        why: String,
    },
}

/// One side of the conversation.
#[derive(Debug)]
pub(super) struct Line(UnixStream);

impl Line {
    /// Both.
    ///
    /// # Errors
    /// The host has no socket.
    pub(super) fn pair() -> io::Result<(Self, OwnedFd)> {
        let (ours, theirs) = UnixStream::pair()?;
        Ok((Self(ours), theirs.into()))
    }

    /// The side that a process was given.
    ///
    /// # Errors
    /// It is no socket.
    pub(super) fn of(fd: OwnedFd) -> io::Result<Self> {
        rustix::net::sockopt::socket_type(&fd)?;
        Ok(Self(fd.into()))
    }

    /// The side that speaks first to a pool, or is spoken to by one.
    pub(super) fn over(stream: UnixStream) -> Self {
        Self(stream)
    }

    /// Nothing more is said or heard.
    pub(super) fn hang_up(&self) {
        // Whoever has gone has done it.
        let _ = self.0.shutdown(std::net::Shutdown::Both);
    }

    /// Says something, and gives descriptors with it.
    ///
    /// # Errors
    /// Nobody listens.
    pub(super) fn say<T: Serialize>(&self, what: &T, with: &[BorrowedFd<'_>]) -> io::Result<()> {
        let text = postcard::to_stdvec(what).map_err(io::Error::other)?;
        if text.len() > MOST {
            return Err(Errno::MSGSIZE.into());
        }
        let length = u32::try_from(text.len()).map_err(io::Error::other)?;
        let all = [&length.to_le_bytes()[..], &text].concat();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
        let mut given = SendAncillaryBuffer::new(&mut space);
        if !with.is_empty() && !given.push(SendAncillaryMessage::ScmRights(with)) {
            return Err(Errno::INVAL.into());
        }
        let first = rustix::io::retry_on_intr(|| {
            sendmsg(
                &self.0,
                &[IoSlice::new(&all)],
                &mut given,
                SendFlags::NOSIGNAL,
            )
        })?;
        (&self.0).write_all(&all[first..])
    }

    /// Waits for what the other side says; `None` if there is no other side any more.
    ///
    /// # Errors
    /// The connection broke, or it is not one of these messages.
    pub(super) fn hear<T: DeserializeOwned>(&self) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
        let mut length = [0; 4];
        let (heard, with) = self.first(&mut length)?;
        if heard == 0 {
            return Ok(None);
        }
        let mut rest = &self.0;
        rest.read_exact(&mut length[heard..])?;
        let length = u32::from_le_bytes(length) as usize;
        if length > MOST {
            return Err(Errno::MSGSIZE.into());
        }
        let mut text = vec![0; length];
        rest.read_exact(&mut text)?;
        let what = postcard::from_bytes(&text).map_err(io::Error::other)?;
        Ok(Some((what, with)))
    }

    /// The first bytes of a message, and the descriptors.
    fn first(&self, bytes: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
        let mut given = RecvAncillaryBuffer::new(&mut space);
        let heard = rustix::io::retry_on_intr(|| {
            let mut parts = [IoSliceMut::new(bytes)];
            recvmsg(&self.0, &mut parts, &mut given, RecvFlags::CMSG_CLOEXEC)
        });
        let heard = match heard {
            Err(Errno::CONNRESET) => return Ok((0, Vec::new())),
            heard => heard?,
        };
        let mut with = Vec::new();
        for message in given.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                with.extend(fds);
            }
        }
        // This process has no room for them.
        match heard.flags.contains(ReturnFlags::CTRUNC) {
            true => Err(Errno::MFILE.into()),
            false => Ok((heard.bytes, with)),
        }
    }
}

impl AsFd for Line {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    fn one(number: u32, text: &str) -> Order {
        Order::Start(One {
            number,
            name: None,
            settings: vec![text.to_owned()],
            stdio: [End::Nothing, End::Comes, End::Own],
        })
    }

    #[test]
    fn messages_come_one_by_one_each_with_its_descriptors() {
        let (ours, theirs) = Line::pair().unwrap();
        let theirs = Line::of(theirs).unwrap();
        let null = File::open("/dev/null").unwrap();
        // More than a socket takes at once.
        let long = "x".repeat(1 << 20);
        let orders = [one(1, "A=1"), one(2, &long), one(3, "")];
        let said = orders.clone();
        let speaker = std::thread::spawn(move || {
            for (n, order) in said.iter().enumerate() {
                ours.say(order, &[null.as_fd(), null.as_fd()][..n]).unwrap();
            }
        });
        for (n, order) in orders.iter().enumerate() {
            let (heard, with) = theirs.hear::<Order>().unwrap().unwrap();
            assert_eq!((&heard, with.len()), (order, n));
        }
        speaker.join().unwrap();
        assert!(theirs.hear::<Order>().unwrap().is_none());
    }

    #[test]
    fn what_is_no_message_is_an_error() {
        let (ours, theirs) = Line::pair().unwrap();
        let mut raw = UnixStream::from(theirs);
        raw.write_all(&[0xff; 4]).unwrap();
        assert!(ours.hear::<News>().is_err());
        raw.write_all(&[2, 0, 0, 0, 9, 9]).unwrap();
        assert!(ours.hear::<News>().is_err());
        raw.write_all(&[1, 0]).unwrap();
        drop(raw);
        assert!(ours.hear::<News>().is_err());
        let file = File::open("/dev/null").unwrap();
        assert!(Line::of(file.into()).is_err());
    }
}
