//! Answers on a guest's socket. One thread waits at the sockets of all guests of the process (`porter.rs`); a client has
//! a thread of its own.
//!
//! At a guest's socket one client at a time, at one that many guests have together a few; one that says nothing for a few
//! seconds is hung up on, so that the next gets its turn. A client's thread ends as soon as the machine does, whatever the client does.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::porter::Door;
use super::protocol::{REQUEST_MAX, Reply, Request, Response};
use super::rundir::RunDir;

/// Clients that are served at a time where many guests have one socket: what one asks of one guest may take long.
const SEVERAL: usize = 16;

/// How long a client may keep the others waiting.
const PATIENCE: Duration = Duration::from_secs(5);

/// Answers a question; may tell its progress before.
pub type Answer = Arc<dyn Fn(&Request, &mut dyn FnMut(Response)) -> Reply + Send + Sync>;

/// Who answers. Dropping it ends that, and removes the run directory.
#[derive(Debug)]
pub struct Server {
    stop: Option<UnixStream>,
    /// Dropped after `stop`: it waits for the client that is served.
    _door: Door,
    _dir: RunDir,
}

impl Server {
    /// Starts to answer for one guest.
    ///
    /// # Errors
    /// The host has no socket or thread for it.
    pub fn start(dir: RunDir, answer: Answer) -> io::Result<Self> {
        Self::start_for(dir, answer, 1)
    }

    /// Starts to answer for many guests.
    ///
    /// # Errors
    /// The host has no socket or thread for it.
    pub fn start_for_many(dir: RunDir, answer: Answer) -> io::Result<Self> {
        Self::start_for(dir, answer, SEVERAL)
    }

    fn start_for(dir: RunDir, answer: Answer, clients: usize) -> io::Result<Self> {
        let listener = UnixListener::bind(dir.socket())?;
        let (stop, stopped) = UnixStream::pair()?;
        let serve = move |stream| {
            let client = Client {
                stream,
                stopped: &stopped,
            };
            if let Err(error) = client.talk(&answer) {
                tracing::debug!(%error, "a client of the socket is gone");
            }
        };
        Ok(Self {
            stop: Some(stop),
            _door: Door::open(listener, Box::new(serve), clients)?,
            _dir: dir,
        })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.stop.take());
    }
}

/// Waits until `what` is ready. Fails when the machine ends, but for an answer that can be given at once, or after
/// `patience`.
fn wait(
    what: &impl AsFd,
    ready: PollFlags,
    stopped: &UnixStream,
    patience: Option<Duration>,
) -> io::Result<()> {
    let timeout = patience.map(|time| Timespec {
        tv_sec: time.as_secs() as i64,
        tv_nsec: i64::from(time.subsec_nanos()),
    });
    loop {
        let mut fds = [
            PollFd::new(what, ready),
            PollFd::new(stopped, PollFlags::IN),
        ];
        match poll(&mut fds, timeout.as_ref()) {
            Ok(0) => return Err(io::ErrorKind::TimedOut.into()),
            Ok(_) if ready == PollFlags::OUT && fds[0].revents() == PollFlags::OUT => return Ok(()),
            Ok(_) if !fds[1].revents().is_empty() => {
                return Err(io::ErrorKind::ConnectionAborted.into());
            }
            Ok(_) => return Ok(()),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

struct Client<'a> {
    stream: UnixStream,
    stopped: &'a UnixStream,
}

impl Client<'_> {
    fn talk(mut self, answer: &Answer) -> io::Result<()> {
        self.stream.set_nonblocking(true)?;
        let mut heard = Vec::new();
        let mut piece = [0; 4096];
        loop {
            while let Some(end) = heard.iter().position(|byte| *byte == b'\n') {
                let line: Vec<_> = heard.drain(..=end).collect();
                let reply = match serde_json::from_slice::<Request>(&line) {
                    // Who asked may have lost interest; the answer will show it.
                    Ok(request) => answer(&request, &mut |progress| drop(self.tell(&progress))),
                    Err(error) => Response::failed(format!("not understood: {error}")).into(),
                };
                if let Some(file) = &reply.file {
                    // The byte that the descriptor travels with is the answer's first.
                    wait(&self.stream, PollFlags::OUT, self.stopped, Some(PATIENCE))?;
                    self.stream.send_with_fd(&b" "[..], file.as_raw_fd())?;
                }
                self.tell(&reply.response)?;
            }
            if heard.len() > REQUEST_MAX {
                return self.say(b"{\"ok\":false,\"error\":\"the request is too long\"}\n");
            }
            wait(&self.stream, PollFlags::IN, self.stopped, Some(PATIENCE))?;
            match self.stream.read(&mut piece) {
                Ok(0) => return Ok(()),
                Ok(n) => heard.extend_from_slice(&piece[..n]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn tell(&mut self, response: &Response) -> io::Result<()> {
        let mut text = serde_json::to_vec(response)?;
        text.push(b'\n');
        self.say(&text)
    }

    fn say(&mut self, mut text: &[u8]) -> io::Result<()> {
        while !text.is_empty() {
            match self.stream.write(text) {
                Ok(n) => text = &text[n..],
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    wait(&self.stream, PollFlags::OUT, self.stopped, Some(PATIENCE))?;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::sync::mpsc::{Sender, channel};
    use std::time::Instant;

    use super::super::rundir::Called;
    use super::*;

    fn server(folder: &std::path::Path) -> (Server, std::path::PathBuf) {
        let dir = RunDir::create(folder, Called::Name("test")).unwrap();
        let socket = dir.socket();
        let answer: Answer = Arc::new(|request, _| Response::failed(format!("{request:?}")).into());
        (Server::start(dir, answer).unwrap(), socket)
    }

    #[test]
    fn every_line_gets_an_answer() {
        let tmp = tempfile::tempdir().unwrap();
        let (server, socket) = server(&tmp.path().join("vmm"));
        let mut client = UnixStream::connect(&socket).unwrap();
        client
            .write_all(b"{\"op\":\"hello\"}\nnonsense\n{\"op\":\"inspect\"}\n")
            .unwrap();
        let mut lines = BufReader::new(client.try_clone().unwrap()).lines();
        for part in ["Hello", "not understood", "Inspect { summary: false }"] {
            let line = lines.next().unwrap().unwrap();
            assert!(line.contains(part), "{line}");
        }
        drop((client, lines));
        drop(server);
        assert!(!socket.exists());
    }

    /// Answers when it is told to.
    fn slow(folder: &std::path::Path, name: &str) -> (Server, UnixStream, Sender<()>) {
        let dir = RunDir::create(folder, Called::Name(name)).unwrap();
        let socket = dir.socket();
        let (sender, receiver) = channel();
        let receiver = std::sync::Mutex::new(receiver);
        let answer: Answer = Arc::new(move |_, _| {
            receiver.lock().unwrap().recv().unwrap();
            Response::failed("late").into()
        });
        let server = Server::start(dir, answer).unwrap();
        let mut client = UnixStream::connect(&socket).unwrap();
        client.write_all(b"{\"op\":\"hello\"}\n").unwrap();
        (server, client, sender)
    }

    #[test]
    fn guest_that_takes_its_time_holds_up_nobody_but_its_own() {
        let tmp = tempfile::tempdir().unwrap();
        let folder = tmp.path().join("vmm");
        let (slow, client, go) = slow(&folder, "slow");
        let (quick, socket) = server(&folder);
        for _ in 0..3 {
            let mut client = UnixStream::connect(&socket).unwrap();
            client.write_all(b"{\"op\":\"hello\"}\n").unwrap();
            let mut line = String::new();
            BufReader::new(client).read_line(&mut line).unwrap();
            assert!(line.contains("Hello"), "{line}");
        }
        drop(quick);
        go.send(()).unwrap();
        let mut line = String::new();
        BufReader::new(client).read_line(&mut line).unwrap();
        assert!(line.contains("late"), "{line}");
        drop(slow);
    }

    #[test]
    fn socket_of_many_guests_serves_others_beside_one_that_takes_its_time() {
        let tmp = tempfile::tempdir().unwrap();
        let dir = RunDir::create(&tmp.path().join("vmm"), Called::Name("many")).unwrap();
        let socket = dir.socket();
        let (go, wait) = channel::<()>();
        let wait = std::sync::Mutex::new(wait);
        let answer: Answer = Arc::new(move |request, _| {
            if *request == Request::Freeze {
                wait.lock().unwrap().recv().unwrap();
            }
            Response::failed(format!("{request:?}")).into()
        });
        let server = Server::start_for_many(dir, answer).unwrap();
        let ask = |op: &str| {
            let mut client = UnixStream::connect(&socket).unwrap();
            writeln!(client, "{{\"op\":\"{op}\"}}").unwrap();
            client
        };
        let heard = |client: UnixStream| {
            let mut line = String::new();
            BufReader::new(client).read_line(&mut line).unwrap();
            line
        };
        let slow = ask("freeze");
        // More than are served at a time, one after the other.
        for _ in 0..2 * SEVERAL {
            assert!(heard(ask("hello")).contains("Hello"));
        }
        // So many say nothing; the next one is served when one of them has gone.
        let mut idle: Vec<_> = (1..SEVERAL)
            .map(|_| UnixStream::connect(&socket).unwrap())
            .collect();
        let waits = ask("hello");
        std::thread::sleep(Duration::from_millis(50));
        waits.set_nonblocking(true).unwrap();
        let early = (&waits).read(&mut [0]).map_err(|error| error.kind());
        assert_eq!(early, Err(io::ErrorKind::WouldBlock));
        waits.set_nonblocking(false).unwrap();
        idle.pop();
        assert!(heard(waits).contains("Hello"));
        go.send(()).unwrap();
        assert!(heard(slow).contains("Freeze"));
        drop(server);
    }

    #[test]
    fn end_waits_for_an_answer_that_is_under_way() {
        let tmp = tempfile::tempdir().unwrap();
        let (server, client, go) = slow(&tmp.path().join("vmm"), "slow");
        // Until it is asked.
        std::thread::sleep(Duration::from_millis(100));
        let ended = std::thread::spawn(move || drop(server));
        std::thread::sleep(Duration::from_millis(50));
        assert!(!ended.is_finished());
        go.send(()).unwrap();
        ended.join().unwrap();
        drop(client);
    }

    #[test]
    fn endless_line_is_refused_and_the_end_does_not_wait_for_clients() {
        let tmp = tempfile::tempdir().unwrap();
        let (server, socket) = server(&tmp.path().join("vmm"));
        let mut client = UnixStream::connect(&socket).unwrap();
        let _ = client.write_all(&[b'x'; REQUEST_MAX + 4096]);
        let mut line = String::new();
        BufReader::new(client).read_line(&mut line).unwrap();
        assert!(line.contains("too long"), "{line}");
        // This one says nothing and stays.
        let _idle = UnixStream::connect(&socket).unwrap();
        std::thread::sleep(Duration::from_millis(50));
        let before = Instant::now();
        drop(server);
        assert!(before.elapsed() < PATIENCE / 2);
    }
}
