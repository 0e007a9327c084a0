//! What `vmm fork` and the processes that run its clones, workers or a pool, say to each other: one JSON object a line, and
//! descriptors that come with it (`docs/control.md`).
//!
//! A pool is spoken to by other programs too. A line is bounded, and so are the descriptors that come with it: whoever says
//! something else hears so, and is hung up on.

use std::io::{self, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::io::{Errno, IoSlice, IoSliceMut};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recv, recvmsg, sendmsg,
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// Most bytes of a line: as many as a command line has.
const MOST: usize = 4 << 20;
/// Bytes that are looked at at a time.
const PIECE: usize = 4096;
/// A longer time is as good as none.
const LONG: u64 = u32::MAX as u64 * 1000;
/// Most descriptors that come with one.
const DESCRIPTORS: usize = 3;

/// What a process that runs clones is told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "lowercase")]
pub(super) enum Order {
    /// First: what is the same for all clones. The template comes with it, if it goes to a worker; a pool has its own.
    Serve(Lot),
    /// Start a clone. Those of its descriptors that come do so with it, in order.
    Start(One),
}

/// What is the same for all clones.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Lot {
    /// The name of the guest that was frozen, as clones read it from /dev/vmm.
    #[serde(default)]
    pub(super) template: Option<String>,
    /// How many clones there will be, in all processes; 0 if nobody knows.
    #[serde(default)]
    pub(super) of: u32,
    /// Processors of each machine, if that was said.
    #[serde(default)]
    pub(super) cpus: Option<u8>,
    /// Each ends after this long.
    #[serde(default)]
    pub(super) timeout_ms: Option<u64>,
}

impl Lot {
    /// Whether the template's name can be read from /dev/vmm as one word.
    pub(super) fn has_good_name(&self) -> bool {
        let good = |name: &String| {
            let graphic = name.bytes().all(|byte| byte.is_ascii_graphic());
            graphic && (1..=256).contains(&name.len())
        };
        self.template.as_ref().is_none_or(good)
    }

    /// Each ends after this long.
    pub(super) fn timeout(&self) -> Option<Duration> {
        self.timeout_ms
            .map(|ms| Duration::from_millis(ms.min(LONG)))
    }
}

/// One of them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct One {
    /// Which.
    pub(super) number: u32,
    /// What it is called, if it was given a name.
    #[serde(default)]
    pub(super) name: Option<String>,
    /// What it reads from /dev/vmm.
    #[serde(default)]
    pub(super) env: Vec<String>,
    /// Its descriptors 0 to 2.
    pub(super) stdio: [End; 3],
}

/// Where a standard descriptor of a clone comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum End {
    /// It comes with the order.
    Given,
    /// It is that of the process that runs the clone.
    Own,
    /// Nothing to read, and what is written is gone.
    Null,
    /// It is not open, as it was not for who ordered the clone; standard input has nothing to read.
    Nothing,
}

/// What a process that runs clones tells.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
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
    /// What was said is no order, and nothing more is heard; why, in words.
    Error(String),
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
        let mut text = serde_json::to_vec(what)?;
        text.push(b'\n');
        if text.len() > MOST {
            return Err(Errno::MSGSIZE.into());
        }
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
        let mut given = SendAncillaryBuffer::new(&mut space);
        if !with.is_empty() && !given.push(SendAncillaryMessage::ScmRights(with)) {
            return Err(Errno::INVAL.into());
        }
        let first = rustix::io::retry_on_intr(|| {
            sendmsg(
                &self.0,
                &[IoSlice::new(&text)],
                &mut given,
                SendFlags::NOSIGNAL,
            )
        })?;
        (&self.0).write_all(&text[first..])
    }

    /// Waits for what the other side says; `None` if there is no other side any more. Nothing is read of what comes after it, so
    /// that who waits at the socket hears of that.
    ///
    /// # Errors
    /// The connection broke, or it is not one of these messages.
    pub(super) fn hear<T: DeserializeOwned>(&self) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
        let (mut text, mut with) = (Vec::new(), Vec::new());
        while text.last() != Some(&b'\n') {
            let ahead = match self.ahead() {
                Ok(0) | Err(Errno::CONNRESET) if text.is_empty() => return Ok(None),
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                ahead => ahead?,
            };
            if text.len() + ahead > MOST {
                return Err(Errno::MSGSIZE.into());
            }
            self.read(ahead, &mut text, &mut with)?;
            if with.len() > DESCRIPTORS {
                return Err(Errno::TOOMANYREFS.into());
            }
        }
        Ok(Some((serde_json::from_slice(&text)?, with)))
    }

    /// How many bytes there are, up to the line's end if that is among them.
    fn ahead(&self) -> Result<usize, Errno> {
        let mut piece = [0; PIECE];
        let there = rustix::io::retry_on_intr(|| recv(&self.0, &mut piece[..], RecvFlags::PEEK))?.0;
        let line = piece[..there].iter().position(|byte| *byte == b'\n');
        Ok(line.map_or(there, |at| at + 1))
    }

    /// Reads so many bytes at most, and the descriptors that come with them.
    fn read(&self, most: usize, text: &mut Vec<u8>, with: &mut Vec<OwnedFd>) -> io::Result<()> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
        let mut given = RecvAncillaryBuffer::new(&mut space);
        let mut piece = [0; PIECE];
        let heard = rustix::io::retry_on_intr(|| {
            let mut parts = [IoSliceMut::new(&mut piece[..most])];
            recvmsg(&self.0, &mut parts, &mut given, RecvFlags::CMSG_CLOEXEC)
        })?;
        for message in given.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                with.extend(fds);
            }
        }
        text.extend_from_slice(&piece[..heard.bytes]);
        // More came than belong to a line, or this process has no room for them.
        match heard.flags.contains(ReturnFlags::CTRUNC) {
            true => Err(Errno::MFILE.into()),
            false => Ok(()),
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
            env: vec![text.to_owned()],
            stdio: [End::Nothing, End::Given, End::Own],
        })
    }

    #[test]
    fn messages_come_one_by_one_each_with_its_descriptors() {
        let (ours, theirs) = Line::pair().unwrap();
        let theirs = Line::of(theirs).unwrap();
        let null = File::open("/dev/null").unwrap();
        // More than a socket takes at once, and a line's end that does not end it.
        let long = "x".repeat(1 << 20);
        let orders = [one(1, "A=1"), one(2, &long), one(3, "\n"), one(4, "")];
        let said = orders.clone();
        let speaker = std::thread::spawn(move || {
            let with = [null.as_fd(); 3];
            for (n, order) in said.iter().enumerate() {
                ours.say(order, &with[..n]).unwrap();
            }
        });
        // So that several lines are there at once.
        std::thread::sleep(Duration::from_millis(50));
        for (n, order) in orders.iter().enumerate() {
            let (heard, with) = theirs.hear::<Order>().unwrap().unwrap();
            assert_eq!((&heard, with.len()), (order, n));
        }
        speaker.join().unwrap();
        assert!(theirs.hear::<Order>().unwrap().is_none());
    }

    #[test]
    fn what_others_leave_out_has_a_meaning() {
        let serve: Order = serde_json::from_str("{\"op\":\"serve\"}").unwrap();
        let lot = Lot {
            template: None,
            of: 0,
            cpus: None,
            timeout_ms: None,
        };
        assert_eq!(serve, Order::Serve(lot.clone()));
        let text = r#"{"op":"start","number":1,"stdio":["null","given","own"]}"#;
        let Order::Start(start) = serde_json::from_str(text).unwrap() else {
            panic!("not a start");
        };
        assert_eq!((start.name, start.env), (None, Vec::<String>::new()));
        assert_eq!(start.stdio, [End::Null, End::Given, End::Own]);
        for (name, good) in [
            ("warm", true),
            ("", false),
            ("a b", false),
            ("a\nb=1", false),
        ] {
            let template = Some(name.to_owned());
            let lot = Lot {
                template,
                ..lot.clone()
            };
            assert_eq!(lot.has_good_name(), good, "{name:?}");
        }
        let ended = News::Ended {
            number: 1,
            status: 7,
        };
        let text = serde_json::to_string(&[News::Room(3), News::Runs(1), ended]).unwrap();
        assert_eq!(
            text,
            r#"[{"room":3},{"runs":1},{"ended":{"number":1,"status":7}}]"#
        );
        let long = Lot {
            timeout_ms: Some(u64::MAX),
            ..lot
        };
        assert!(long.timeout().unwrap().as_nanos() < u128::from(u64::MAX));
    }

    #[test]
    fn what_is_no_message_is_an_error() {
        let (ours, theirs) = Line::pair().unwrap();
        let mut raw = UnixStream::from(theirs);
        for nonsense in ["\n", "[]\n", "{\"runs\":-1}\n", "{\"runs\":1} {}\n"] {
            raw.write_all(nonsense.as_bytes()).unwrap();
            assert!(ours.hear::<News>().is_err(), "{nonsense}");
        }
        // What comes after it is heard.
        raw.write_all(b"{\"runs\":1}\n{\"ru").unwrap();
        assert_eq!(ours.hear::<News>().unwrap().unwrap().0, News::Runs(1));
        drop(raw);
        assert!(ours.hear::<News>().is_err());
        let file = File::open("/dev/null").unwrap();
        assert!(Line::of(file.into()).is_err());
    }

    #[test]
    fn line_without_an_end_and_too_many_descriptors_are_errors() {
        let (ours, theirs) = Line::pair().unwrap();
        let mut raw = UnixStream::from(theirs);
        let speaker = std::thread::spawn(move || {
            // Until nobody listens.
            while raw.write_all(&[b'x'; 1 << 16]).is_ok() {}
        });
        assert!(ours.hear::<News>().is_err());
        drop(ours);
        speaker.join().unwrap();
        let (ours, theirs) = Line::pair().unwrap();
        let null = File::open("/dev/null").unwrap();
        for byte in [b"{", b" "] {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
            let mut given = SendAncillaryBuffer::new(&mut space);
            let with = [null.as_fd(); 2];
            assert!(given.push(SendAncillaryMessage::ScmRights(&with)));
            sendmsg(
                &theirs,
                &[IoSlice::new(byte)],
                &mut given,
                SendFlags::NOSIGNAL,
            )
            .unwrap();
        }
        assert!(ours.hear::<News>().is_err());
    }
}
