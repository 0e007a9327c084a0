//! The guest's console: this terminal or pipe, a file, or a pseudo-terminal of its own.
//!
//! On a terminal every key goes to the guest; `Ctrl-A x` ends the machine, `Ctrl-A Ctrl-A` sends one
//! `Ctrl-A`.

use std::fs::File;
use std::io::{self, IsTerminal};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, ptsname, unlockpt};

use super::BootError;
use super::end::{End, Ending, Watch};
use super::output::{Full, copy};
use super::terminal::RawMode;
use crate::devices::serial::Serial;

/// Where a console goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ConsoleChoice {
    /// Standard input and output.
    Stdio,
    /// A file, from its beginning; no input.
    File(PathBuf),
    /// A new pseudo-terminal, whose name is said.
    Pty,
}

/// An open console.
#[derive(Debug)]
pub struct Console {
    /// Where the guest's output goes.
    pub output: OwnedFd,
    /// What to do when nobody takes it.
    pub full: Full,
    /// Where input comes from.
    input: Option<OwnedFd>,
    /// Input is a person's terminal: the escape sequence works.
    interactive: bool,
    /// Keeps a pseudo-terminal whole while nobody else has it open.
    _peer: Option<OwnedFd>,
    /// What a person should know.
    pub notice: Option<String>,
}

impl Console {
    /// Opens it. The terminal stays as it is until [`Console::enter`].
    ///
    /// # Errors
    /// It cannot be opened.
    pub fn open(choice: &ConsoleChoice) -> Result<Self, BootError> {
        let (name, opened) = match choice {
            ConsoleChoice::Stdio => ("stdio".to_owned(), Self::stdio()),
            ConsoleChoice::File(path) => (path.display().to_string(), Self::file(path)),
            ConsoleChoice::Pty => ("pty".to_owned(), Self::pty()),
        };
        opened.map_err(|source| BootError::Console { name, source })
    }

    fn stdio() -> io::Result<Self> {
        let interactive = io::stdin().is_terminal();
        Ok(Self {
            output: copy(io::stdout())?,
            full: Full::Wait,
            // A closed standard input is no input.
            input: copy(io::stdin()).ok(),
            interactive,
            _peer: None,
            notice: interactive.then(|| "Ctrl-A x ends the machine".to_owned()),
        })
    }

    fn file(path: &PathBuf) -> io::Result<Self> {
        Ok(Self {
            output: File::create(path)?.into(),
            full: Full::Wait,
            input: None,
            interactive: false,
            _peer: None,
            notice: None,
        })
    }

    fn pty() -> io::Result<Self> {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let controller = openpt(flags)?;
        grantpt(&controller)?;
        unlockpt(&controller)?;
        let name = ptsname(&controller, Vec::new())?;
        let peer = ioctl_tiocgptpeer(&controller, flags)?;
        let mut modes = rustix::termios::tcgetattr(&peer)?;
        modes.make_raw();
        rustix::termios::tcsetattr(&peer, rustix::termios::OptionalActions::Now, &modes)?;
        rustix::io::ioctl_fionbio(&controller, true)?;
        Ok(Self {
            output: copy(&controller)?,
            full: Full::Drop,
            input: Some(controller),
            interactive: false,
            _peer: Some(peer),
            notice: Some(format!("the console is {}", name.to_string_lossy())),
        })
    }

    /// Makes the terminal raw, if there is one.
    ///
    /// # Errors
    /// It refuses.
    pub fn enter(&self) -> Result<Option<RawMode>, BootError> {
        match &self.input {
            Some(input) if self.interactive => {
                RawMode::enter(input.as_fd())
                    .map(Some)
                    .map_err(|source| BootError::Console {
                        name: "stdio".to_owned(),
                        source,
                    })
            }
            _ => Ok(None),
        }
    }

    /// Starts the thread that brings input to the guest, if there can be any.
    ///
    /// # Errors
    /// No thread.
    pub fn start_input(
        &mut self,
        serial: &Arc<Serial>,
        ending: &Arc<Ending>,
    ) -> Result<(), BootError> {
        let Some(fd) = self.input.take() else {
            return Ok(());
        };
        let input = Input {
            fd,
            escape: self.interactive.then(Escape::default),
            serial: Arc::clone(serial),
        };
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
            .map_err(BootError::Thread)?;
        Ok(())
    }
}

/// The input thread's.
struct Input {
    fd: OwnedFd,
    escape: Option<Escape>,
    serial: Arc<Serial>,
}

impl Input {
    fn run(mut self, ending: &Ending) {
        // The guest has been given what there is.
        let mut fed = true;
        let mut open = true;
        while !ending.has_come() && (open || !fed) {
            let room = self.serial.room();
            if open && room > 0 {
                match self.read(room, if fed { None } else { Some(10) }) {
                    Got::Bytes(bytes) => {
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
            fed = self.serial.feed();
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
            self.serial.input(bytes);
            return Typed::Sent;
        };
        for &byte in bytes {
            match escape.next(byte) {
                Key::Send(keys) => {
                    self.serial.input(&keys);
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
struct Escape {
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
    use crate::kernel::output::Output;

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

    #[test]
    fn pseudo_terminal_has_a_name_and_nobody_needs_to_open_it() {
        let console = Console::open(&ConsoleChoice::Pty).unwrap();
        assert!(console.notice.unwrap().contains("/dev/pts/"));
        let ending = Arc::new(Ending::default());
        let output = Output::start(console.output, console.full, &ending).unwrap();
        output.push(&[b'x'; 100_000]);
        output.finish(std::time::Duration::from_secs(5));
        assert_eq!(ending.get(), None);
    }
}
