//! What is said on the socket: one JSON object a line, a question and then its answer.

use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::inspect::{About, Inspection};

/// The protocol's number; it grows with changes that old clients cannot read.
pub const PROTOCOL: u32 = 1;

/// Most bytes of a question.
pub const REQUEST_MAX: usize = 64 << 10;

/// A question.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "lowercase")]
pub enum Request {
    /// Who is there?
    Hello,
    /// What does the memory look like?
    Inspect {
        /// Leave the maps of frames and of processes out.
        #[serde(default)]
        summary: bool,
    },
    /// Send the first program a signal.
    Kill {
        /// Its number.
        #[serde(default = "sigkill")]
        signal: i32,
    },
    /// Write the guest to a file. Tells its progress in between.
    Snapshot {
        /// An absolute path.
        path: PathBuf,
        /// Only what is not in the snapshot with this number, which the guest was restored from.
        #[serde(default)]
        base: Option<String>,
    },
    /// Make a template of the guest: the answer comes with a descriptor of it. Tells its progress in between.
    Freeze,
    /// The template that was made last: the answer comes with a descriptor of it.
    Template,
    /// Have the guest go back to the template or the snapshot that it was made of.
    Reset,
    /// Of a machine that clones share: the next of its clones that have no name, and so no socket of their own.
    Clones {
        /// Only those with larger numbers.
        #[serde(default)]
        after: u32,
    },
    /// The same machine is asked something about one of its clones; the answer is that of a guest.
    Clone {
        /// Which.
        number: u32,
        /// What.
        ask: Box<Request>,
    },
}

fn sigkill() -> i32 {
    libc::SIGKILL
}

/// An answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Response {
    /// To [`Request::Hello`].
    Hello {
        /// True.
        ok: bool,
        /// Who.
        hello: Hello,
    },
    /// To [`Request::Inspect`].
    Inspect {
        /// True.
        ok: bool,
        /// The memory.
        inspect: Box<Inspection>,
    },
    /// Before the answer to [`Request::Snapshot`] or [`Request::Freeze`], any number of times.
    Progress {
        /// True.
        ok: bool,
        /// How far it is.
        progress: Progress,
    },
    /// To [`Request::Snapshot`].
    Written {
        /// True.
        ok: bool,
        /// What.
        written: Written,
    },
    /// To [`Request::Freeze`] and [`Request::Template`].
    Frozen {
        /// True.
        ok: bool,
        /// What.
        frozen: Frozen,
    },
    /// To [`Request::Clones`].
    Clones {
        /// True.
        ok: bool,
        /// Some, in the order of their numbers.
        clones: Vec<Hello>,
        /// What to ask for the others with: the number of the last; `None` if there are no others.
        next: Option<u32>,
    },
    /// To what was not understood or could not be done.
    Failed {
        /// False.
        ok: bool,
        /// Why, in words.
        error: String,
        /// There is no such clone ([`Request::Clone`]).
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        gone: bool,
    },
    /// To [`Request::Kill`] and [`Request::Reset`]. Last: nothing else is left of it.
    Done {
        /// True.
        ok: bool,
    },
}

/// How far a snapshot is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// Pages written.
    pub pages: u64,
    /// Pages there may be; those that are zeroes or shared are counted and not written.
    pub of: u64,
}

/// A snapshot that was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Written {
    /// Pages in it.
    pub pages: u64,
    /// Bytes of the file.
    pub bytes: u64,
    /// How long the guest stood still.
    pub pause_us: u64,
    /// Pages that were copied in that time; the others were when it had gone on.
    #[serde(default)]
    pub pause_pages: u64,
}

/// A guest that was frozen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Frozen {
    /// Pages of the template.
    pub pages: u64,
    /// Its bytes.
    pub bytes: u64,
    /// How long the guest stood still.
    pub pause_us: u64,
    /// Pages that were copied in that time; the others were when it had gone on.
    #[serde(default)]
    pub pause_pages: u64,
}

/// Who is there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// [`PROTOCOL`].
    pub protocol: u32,
    /// The guest.
    pub guest: About,
    /// How long it has run.
    pub uptime_ms: u64,
    /// Whether it has printed the line it was to print; `None` if it was not told to.
    #[serde(default)]
    pub ready: Option<bool>,
    /// It is no guest but a pool of machines for copies of one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pool: Option<Pool>,
    /// It is no guest but a machine that so many clones share.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clones: Option<u32>,
}

/// A pool of machines (`vmm pool`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pool {
    /// Machines that wait.
    pub machines: u32,
    /// Copies that run in others.
    pub copies: u32,
}

impl Response {
    /// An answer that says why not.
    #[must_use]
    pub fn failed(error: impl Into<String>) -> Self {
        Self::Failed {
            ok: false,
            error: error.into(),
            gone: false,
        }
    }

    /// The answer to [`Request::Clone`] if there is no such one.
    #[must_use]
    pub fn gone() -> Self {
        Self::Failed {
            ok: false,
            error: "there is no such clone here".to_owned(),
            gone: true,
        }
    }
}

/// An answer, and what comes with it.
#[derive(Clone, Debug)]
pub struct Reply {
    /// The answer.
    pub response: Response,
    /// A file that the asker gets a descriptor of.
    pub file: Option<Arc<File>>,
}

impl Reply {
    /// An answer that comes with a file.
    #[must_use]
    pub fn with_file(response: Response, file: Arc<File>) -> Self {
        let file = Some(file);
        Self { response, file }
    }
}

impl From<Response> for Reply {
    fn from(response: Response) -> Self {
        let file = None;
        Self { response, file }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_come_back_as_they_were() {
        let inspect = Response::Inspect {
            ok: true,
            inspect: Box::new(crate::inspect::tests::example()),
        };
        let clones = Response::Clones {
            ok: true,
            clones: Vec::new(),
            next: Some(7),
        };
        for response in [inspect, clones, Response::failed("no"), Response::gone()] {
            let text = serde_json::to_string(&response).unwrap();
            assert_eq!(serde_json::from_str::<Response>(&text).unwrap(), response);
        }
    }

    #[test]
    fn question_without_detail_asks_for_all() {
        let request: Request = serde_json::from_str("{\"op\":\"inspect\"}").unwrap();
        assert_eq!(request, Request::Inspect { summary: false });
        let text = "{\"op\":\"clone\",\"number\":3,\"ask\":{\"op\":\"kill\"}}";
        let request: Request = serde_json::from_str(text).unwrap();
        let ask = Box::new(Request::Kill { signal: 9 });
        assert_eq!(request, Request::Clone { number: 3, ask });
    }
}
