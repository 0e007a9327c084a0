//! Asks a running guest's VMM.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use rustix::process::Pid;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::protocol::{Progress, Request, Response};
use super::rundir::{self, RunDirError, SOCKET};

/// How long an answer may take: others may be asked before.
const PATIENCE: Duration = Duration::from_secs(30);
/// Most bytes of an answer.
const RESPONSE_MAX: u64 = 256 << 20;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// No such guest.
    #[error("no guest `{0}` is running (vmm ps lists those that are)")]
    NoGuest(String),
    /// It has ended, or is just ending, and has not answered.
    #[error("guest `{0}` has ended")]
    Ended(String),
    /// Somebody else may answer there, or it cannot be looked at.
    #[error(transparent)]
    Folder(#[from] RunDirError),
    /// The connection failed.
    #[error("guest `{id}` does not answer")]
    Connection {
        /// Which.
        id: String,
        /// The reason.
        #[source]
        source: io::Error,
    },
    /// Its process is stopped (`SIGSTOP`, Ctrl-Z), and says nothing until it goes on.
    #[error(
        "guest `{id}` does not answer: its vmm is stopped; `kill -CONT {process}` has it go on"
    )]
    Stopped {
        /// Which.
        id: String,
        /// The process.
        process: i32,
    },
    /// The answer is not one: another version of the VMM, perhaps.
    #[error(
        "guest `{id}` answers in a way this vmm does not understand; its vmm may be of another version"
    )]
    Nonsense {
        /// Which.
        id: String,
        /// The reason.
        #[source]
        source: serde_json::Error,
    },
    /// It refuses.
    #[error("guest `{id}`: {error}")]
    Refused {
        /// Which.
        id: String,
        /// What it says.
        error: String,
    },
}

/// Asks the guest `id` of the run directories in `folder`.
///
/// # Errors
/// There is no such guest, or no sensible answer.
pub fn ask(folder: &Path, id: &str, request: &Request) -> Result<Response, AskError> {
    Ok(converse(folder, id, request, &mut |_| {})?.0)
}

/// Asks for what may take long, and hears how far it is. Gives back the file that came with the answer, if
/// one did.
///
/// # Errors
/// As [`ask`].
pub fn converse(
    folder: &Path,
    id: &str,
    request: &Request,
    progress: &mut dyn FnMut(Progress),
) -> Result<(Response, Option<File>), AskError> {
    let connection = |source: io::Error| match source.kind() {
        // Whoever answers hangs up on who waits for his answer only then.
        io::ErrorKind::ConnectionReset
        | io::ErrorKind::BrokenPipe
        | io::ErrorKind::UnexpectedEof => AskError::Ended(id.to_owned()),
        _ => AskError::Connection {
            id: id.to_owned(),
            source,
        },
    };
    let (mut stream, mut line) = reach(folder, id, request)?;
    line.push(b'\n');
    let patience = match request {
        // How long it takes nobody knows, and that the other side lives the connection shows.
        Request::Snapshot { .. } | Request::Freeze | Request::Reset => None,
        Request::Hello
        | Request::Inspect { .. }
        | Request::Kill { .. }
        | Request::Template
        | Request::Clones { .. }
        | Request::Clone { .. } => Some(PATIENCE),
    };
    let said = stream
        .set_read_timeout(patience)
        .and_then(|()| stream.set_write_timeout(Some(PATIENCE)))
        .and_then(|()| stream.write_all(&line));
    said.map_err(connection)?;
    let mut heard = Heard::default();
    loop {
        let text = heard.line(&stream).map_err(connection)?;
        match serde_json::from_slice(&text) {
            Ok(Response::Progress { progress: far, .. }) => progress(far),
            Ok(Response::Failed { gone: true, .. }) => {
                return Err(AskError::NoGuest(id.to_owned()));
            }
            Ok(Response::Failed { error, .. }) => {
                return Err(AskError::Refused {
                    id: id.to_owned(),
                    error,
                });
            }
            Ok(response) => return Ok((response, heard.file)),
            Err(source) => {
                return Err(AskError::Nonsense {
                    id: id.to_owned(),
                    source,
                });
            }
        }
    }
}

/// Connects to who answers for guest `id`, and says what he is to be asked: the guest's own socket, or that of the machine
/// that it shares with others and where it is known by its number.
fn reach(folder: &Path, id: &str, request: &Request) -> Result<(UnixStream, Vec<u8>), AskError> {
    let connection = |source: serde_json::Error| AskError::Connection {
        id: id.to_owned(),
        source: source.into(),
    };
    let (stream, line) = match (connect(folder, id, SOCKET), of_a_process(id)) {
        (Err(AskError::NoGuest(_)), Some((process, number))) => {
            let stream = connect(folder, process, SOCKET).map_err(|error| match error {
                AskError::NoGuest(_) => AskError::NoGuest(id.to_owned()),
                error => error,
            })?;
            let ask = Box::new(request.clone());
            (stream, serde_json::to_vec(&Request::Clone { number, ask }))
        }
        (stream, _) => (stream?, serde_json::to_vec(request)),
    };
    Ok((stream, line.map_err(connection)?))
}

/// The process and the number of a clone without a name, `4711.3`.
fn of_a_process(id: &str) -> Option<(&str, u32)> {
    let (process, number) = id.split_once('.')?;
    let digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    (digits(process) && digits(number)).then_some(())?;
    Some((process, number.parse().ok()?))
}

/// Connects to a socket in the run directory of guest `id`.
///
/// # Errors
/// There is no such guest, or no such socket.
pub fn connect(folder: &Path, id: &str, socket: &str) -> Result<UnixStream, AskError> {
    // A path is no id.
    let named = !id.is_empty() && !id.contains('/') && !id.starts_with('.');
    if !named || !rundir::is_there(folder)? {
        return Err(AskError::NoGuest(id.to_owned()));
    }
    let path = folder.join(id).join(socket);
    let stream = UnixStream::connect(path).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
            AskError::NoGuest(id.to_owned())
        }
        _ => AskError::Connection {
            id: id.to_owned(),
            source: error,
        },
    })?;
    // Who listens, whether or not he has heard of this connection.
    let listener = rustix::net::sockopt::socket_peercred(&stream).map(|who| who.pid);
    match listener {
        Ok(process) if is_stopped(process) => Err(AskError::Stopped {
            id: id.to_owned(),
            process: process.as_raw_nonzero().get(),
        }),
        Ok(_) | Err(_) => Ok(stream),
    }
}

/// Whether a process has been stopped by a signal.
fn is_stopped(process: Pid) -> bool {
    let stat = std::fs::read(format!("/proc/{}/stat", process.as_raw_nonzero()));
    // `NUMBER (NAME) STATE ...`, where the name may have anything in it.
    let stat = stat.unwrap_or_default();
    let state = stat.rsplit(|byte| *byte == b')').next();
    state.is_some_and(|rest| rest.starts_with(b" T"))
}

/// Who is asked is busy with others, or cannot go on.
fn nothing() -> io::Error {
    let text = format!("nothing was heard for {} seconds", PATIENCE.as_secs());
    io::Error::new(io::ErrorKind::TimedOut, text)
}

/// What came so far.
#[derive(Default)]
struct Heard {
    text: Vec<u8>,
    file: Option<File>,
}

impl Heard {
    /// The next line.
    fn line(&mut self, stream: &UnixStream) -> io::Result<Vec<u8>> {
        let mut piece = vec![0; 64 << 10];
        let mut looked = 0;
        loop {
            if let Some(end) = self.text[looked..].iter().position(|byte| *byte == b'\n') {
                return Ok(self.text.drain(..=looked + end).collect());
            }
            looked = self.text.len();
            if looked as u64 > RESPONSE_MAX {
                return Err(io::Error::other("the answer is too long"));
            }
            let (n, file) = match stream.recv_with_fd(&mut piece) {
                Err(error) if error.errno() == libc::EINTR => continue,
                Err(error) if error.errno() == libc::EAGAIN => return Err(nothing()),
                // A file came that this process has no descriptor for: what brought it was cut.
                Err(error) if error.errno() == libc::ENOBUFS => {
                    return Err(io::Error::from_raw_os_error(libc::EMFILE));
                }
                received => received?,
            };
            self.file = file.or(self.file.take());
            match n {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                n => self.text.extend_from_slice(&piece[..n]),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::UnixListener;
    use std::process::Command;

    use rustix::process::{Signal, WaitOptions, kill_process, waitpid};

    use super::*;

    /// A run directory's folder with a guest in it that has not been asked anything yet.
    fn guest() -> (tempfile::TempDir, UnixListener) {
        let folder = tempfile::tempdir().unwrap();
        let private = std::fs::Permissions::from_mode(0o700);
        std::fs::set_permissions(folder.path(), private).unwrap();
        std::fs::create_dir(folder.path().join("guest")).unwrap();
        let socket = folder.path().join("guest").join(SOCKET);
        (folder, UnixListener::bind(socket).unwrap())
    }

    #[test]
    fn stopped_process_is_told_from_one_that_runs() {
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let pid = Pid::from_child(&child);
        assert!(!is_stopped(pid));
        kill_process(pid, Signal::STOP).unwrap();
        waitpid(Some(pid), WaitOptions::UNTRACED).unwrap();
        assert!(is_stopped(pid));
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!is_stopped(pid));
    }

    #[test]
    fn guest_that_ends_while_it_is_asked_has_ended() {
        let (folder, listener) = guest();
        let ends = std::thread::spawn(move || {
            // Once without having read the question, and once with half an answer.
            drop(listener.accept().unwrap());
            let (mut stream, _) = listener.accept().unwrap();
            stream.write_all(b"{\"ok\":").unwrap();
        });
        for _ in 0..2 {
            let answer = ask(folder.path(), "guest", &Request::Hello);
            assert!(matches!(answer, Err(AskError::Ended(_))), "{answer:?}");
        }
        ends.join().unwrap();
    }

    #[test]
    fn guest_whose_process_runs_is_reached() {
        let (folder, _listener) = guest();
        connect(folder.path(), "guest", SOCKET).unwrap();
        for id in ["other", "", "../guest", "./guest"] {
            let refused = connect(folder.path(), id, SOCKET);
            assert!(matches!(refused, Err(AskError::NoGuest(_))), "{refused:?}");
        }
    }

    /// It may be anybody's, and what he answers with is a guest to be forked.
    #[test]
    fn guest_in_a_folder_that_others_may_use_is_not_asked() {
        let (folder, _listener) = guest();
        let others = std::fs::Permissions::from_mode(0o755);
        std::fs::set_permissions(folder.path(), others).unwrap();
        let refused = connect(folder.path(), "guest", SOCKET);
        assert!(matches!(refused, Err(AskError::Folder(_))), "{refused:?}");
    }
}
