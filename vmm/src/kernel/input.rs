//! What somebody types on a console, on its way to the guest. On a terminal `Ctrl-A x` ends the
//! machine, and `Ctrl-A Ctrl-A` sends one `Ctrl-A`.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::console::Screen;
use super::end::{End, Ending, Watch};
use crate::devices::keyboard::Keyboard;

/// The input thread's.
#[derive(Debug)]
pub(super) struct Input {
    fd: OwnedFd,
    escape: Option<Escape>,
    keyboard: Arc<dyn Keyboard>,
    screen: Option<Screen>,
}

/// Starts the thread that brings input to the guest.
///
/// # Errors
/// No thread.
pub(super) fn start(input: Input, ending: &Arc<Ending>) -> io::Result<()> {
    let ending = Arc::clone(ending);
    std::thread::Builder::new()
        .name("console-input".to_owned())
        .spawn(move || {
            let _watch = Watch {
                ending: &ending,
                thread: "console input",
            };
            input.run(&ending);
        })
        .map(drop)
}

impl Input {
    /// What comes from `fd` goes to `keyboard`; with `escape`, but for the escape sequence.
    pub(super) fn new(
        fd: OwnedFd,
        escape: Option<Escape>,
        keyboard: Arc<dyn Keyboard>,
        screen: Option<Screen>,
    ) -> Self {
        Self {
            fd,
            escape,
            keyboard,
            screen,
        }
    }

    fn run(mut self, ending: &Ending) {
        // The guest has been given what there is.
        let mut fed = true;
        let mut open = true;
        while !ending.has_come() && (open || !fed) {
            let room = self.keyboard.room();
            if open && room > 0 {
                match self.read(room, if fed { None } else { Some(10) }) {
                    Got::Bytes(bytes) => {
                        // Nobody tells of a pseudo-terminal's size; but now somebody is there.
                        if let Some(screen) = &self.screen {
                            screen.look();
                        }
                        if self.type_in(&bytes) == Typed::Quit {
                            ending.tell(End::Quit);
                            return;
                        }
                    }
                    Got::Nothing => {}
                    Got::End => open = false,
                }
            } else {
                std::thread::sleep(std::time::Duration::from_millis(10));
            }
            fed = self.keyboard.feed();
        }
    }

    /// Reads at most `room` bytes, waiting at most so many milliseconds.
    fn read(&self, room: usize, wait: Option<i64>) -> Got {
        let timeout = wait.map(|ms| Timespec {
            tv_sec: 0,
            tv_nsec: ms * 1_000_000,
        });
        let mut one = [PollFd::new(&self.fd, PollFlags::IN)];
        match poll(&mut one, timeout.as_ref()) {
            Ok(0) | Err(Errno::INTR) => return Got::Nothing,
            Ok(_) => {}
            Err(_) => return Got::End,
        }
        let mut buffer = [0; 1024];
        // An escaped byte can bring one more than was read.
        let most = buffer.len().min(room.saturating_sub(1)).max(1);
        match rustix::io::read(&self.fd, &mut buffer[..most]) {
            Ok(0) => Got::End,
            Ok(n) => Got::Bytes(buffer[..n].to_vec()),
            Err(Errno::INTR | Errno::AGAIN) => Got::Nothing,
            Err(_) => Got::End,
        }
    }

    fn type_in(&mut self, bytes: &[u8]) -> Typed {
        let Some(escape) = &mut self.escape else {
            self.keyboard.input(bytes);
            return Typed::Sent;
        };
        for &byte in bytes {
            match escape.next(byte) {
                Key::Send(keys) => {
                    self.keyboard.input(&keys);
                }
                Key::Quit => return Typed::Quit,
            }
        }
        Typed::Sent
    }
}

enum Got {
    Bytes(Vec<u8>),
    Nothing,
    End,
}

#[derive(PartialEq, Eq)]
enum Typed {
    Sent,
    Quit,
}

const CTRL_A: u8 = 1;

/// What was typed, in view of the escape sequence.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Key {
    Send(Vec<u8>),
    Quit,
}

/// Looks for the escape sequence.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Escape {
    pending: bool,
}

impl Escape {
    fn next(&mut self, byte: u8) -> Key {
        match (std::mem::take(&mut self.pending), byte) {
            (false, CTRL_A) => {
                self.pending = true;
                Key::Send(Vec::new())
            }
            (false, byte) => Key::Send(vec![byte]),
            (true, b'x' | b'X') => Key::Quit,
            (true, CTRL_A) => Key::Send(vec![CTRL_A]),
            (true, byte) => Key::Send(vec![CTRL_A, byte]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn typed(bytes: &[u8]) -> (Vec<u8>, bool) {
        let mut escape = Escape::default();
        let mut sent = Vec::new();
        for &byte in bytes {
            match escape.next(byte) {
                Key::Send(keys) => sent.extend(keys),
                Key::Quit => return (sent, true),
            }
        }
        (sent, false)
    }

    #[test]
    fn only_the_escape_sequence_is_kept_from_the_guest() {
        assert_eq!(typed(b"ax\x01\x01x"), (b"ax\x01x".to_vec(), false));
        assert_eq!(typed(b"a\x01b"), (b"a\x01b".to_vec(), false));
        assert_eq!(typed(b"a\x01xz"), (b"a".to_vec(), true));
    }
}
