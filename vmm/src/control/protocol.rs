//! What is said on the socket: one JSON object a line, a question and then its answer.

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
    /// To what was not understood or could not be done.
    Failed {
        /// False.
        ok: bool,
        /// Why, in words.
        error: String,
    },
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
}

impl Response {
    /// An answer that says why not.
    #[must_use]
    pub fn failed(error: impl Into<String>) -> Self {
        Self::Failed {
            ok: false,
            error: error.into(),
        }
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
        for response in [inspect, Response::failed("no")] {
            let text = serde_json::to_string(&response).unwrap();
            assert_eq!(serde_json::from_str::<Response>(&text).unwrap(), response);
        }
    }

    #[test]
    fn question_without_detail_asks_for_all() {
        let request: Request = serde_json::from_str("{\"op\":\"inspect\"}").unwrap();
        assert_eq!(request, Request::Inspect { summary: false });
    }
}
