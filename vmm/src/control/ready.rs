//! Whether a guest is ready: it has printed the line it was to print (`vmm run --ready-line`), or has frozen itself
//! (`--ready-freeze`).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::locks::{Mutex, rank};

/// What a guest does when it is ready.
#[derive(Clone, Debug)]
pub enum Ready {
    /// It prints a line.
    Line(Arc<ReadyLine>),
    /// It asks to be frozen.
    Freeze,
}

/// Looks for a line in what a guest prints.
#[derive(Debug)]
pub struct ReadyLine {
    wanted: Vec<u8>,
    /// The line being printed, no longer than it takes to know that it is another one.
    line: Mutex<rank::ReadyLine, Vec<u8>>,
    seen: AtomicBool,
}

impl ReadyLine {
    /// Looks for the line `wanted`, given without its end.
    #[must_use]
    pub fn new(wanted: &[u8]) -> Self {
        Self {
            wanted: wanted.to_owned(),
            line: Mutex::default(),
            seen: AtomicBool::new(false),
        }
    }

    /// Whether it was printed.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.seen.load(Ordering::Acquire)
    }

    /// Takes what was printed.
    pub fn feed(&self, bytes: &[u8]) {
        if self.is_ready() {
            return;
        }
        let mut line = self.line.lock();
        for byte in bytes {
            if *byte == b'\n' {
                let found = line.strip_suffix(b"\r").unwrap_or(&line) == self.wanted;
                line.clear();
                if found {
                    self.seen.store(true, Ordering::Release);
                    return;
                }
            } else if line.len() < self.wanted.len() + 2 {
                line.push(*byte);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_line_in_any_pieces_is_seen() {
        for pieces in [
            &[&b"READY\n"[..]][..],
            &[b"a\nREA", b"DY", b"\nb"],
            &[b"\n\nREADY\r\n"],
        ] {
            let line = ReadyLine::new(b"READY");
            pieces.iter().for_each(|piece| line.feed(piece));
            assert!(line.is_ready(), "{pieces:?}");
        }
    }

    #[test]
    fn part_of_a_line_is_not_the_line() {
        let line = ReadyLine::new(b"READY");
        line.feed(b"READY?\nnot READY\nREADY\t\nREADYREADY\n\nREAD\nY\nREADY");
        assert!(!line.is_ready());
    }
}
