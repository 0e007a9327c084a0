//! Asks a running guest's VMM.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use super::protocol::{Request, Response};
use super::rundir::SOCKET;

/// How long an answer may take: others may be asked before.
const PATIENCE: Duration = Duration::from_secs(30);
/// Most bytes of an answer.
const RESPONSE_MAX: u64 = 256 << 20;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// No such guest.
    #[error("no guest `{0}` is running (vmm inspect lists those that are)")]
    NoGuest(String),
    /// The connection failed.
    #[error("guest `{id}` does not answer")]
    Connection {
        /// Which.
        id: String,
        /// The reason.
        #[source]
        source: io::Error,
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
    let connection = |source| AskError::Connection {
        id: id.to_owned(),
        source,
    };
    // A path is no id.
    let named = !id.is_empty() && !id.contains('/') && !id.starts_with('.');
    let stream = named.then(|| UnixStream::connect(folder.join(id).join(SOCKET)));
    let mut stream = match stream {
        None => return Err(AskError::NoGuest(id.to_owned())),
        Some(Ok(stream)) => stream,
        Some(Err(error)) => {
            return Err(match error.kind() {
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
                    AskError::NoGuest(id.to_owned())
                }
                _ => connection(error),
            });
        }
    };
    let mut line = serde_json::to_vec(request).map_err(|e| connection(e.into()))?;
    line.push(b'\n');
    let mut text = Vec::new();
    let said = stream
        .set_read_timeout(Some(PATIENCE))
        .and_then(|()| stream.set_write_timeout(Some(PATIENCE)))
        .and_then(|()| stream.write_all(&line))
        .and_then(|()| {
            let mut answer = BufReader::new(stream.take(RESPONSE_MAX));
            answer.read_until(b'\n', &mut text)
        });
    if said.map_err(connection)? == 0 {
        return Err(connection(io::ErrorKind::UnexpectedEof.into()));
    }
    match serde_json::from_slice(&text) {
        Ok(Response::Failed { error, .. }) => Err(AskError::Refused {
            id: id.to_owned(),
            error,
        }),
        Ok(response) => Ok(response),
        Err(source) => Err(AskError::Nonsense {
            id: id.to_owned(),
            source,
        }),
    }
}
