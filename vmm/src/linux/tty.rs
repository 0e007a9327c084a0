//! The guest's terminal: the host's, when standard input is one.

/// The terminal.
#[derive(Debug)]
pub struct Tty;
