//! The guest's console: this terminal or pipe, a file, or a pseudo-terminal of its own.
//!
//! On a terminal every key goes to the guest, but for an escape sequence (`input`).

use std::fs::File;
use std::io::{self, IsTerminal};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;

use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, ptsname, unlockpt};

use super::BootError;
use super::end::Ending;
use super::input::{self, Escape, Input};
use super::output::{Full, copy};
use super::terminal::RawMode;
use crate::devices::keyboard::{Keyboard, ScreenSize};

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

    /// The screen, if the console is one: where its size comes from, and who is told.
    ///
    /// # Errors
    /// The host has no descriptor left.
    pub fn screen(&self, keyboard: &Arc<dyn Keyboard>) -> Result<Option<Screen>, BootError> {
        let Some(_) = self.size() else {
            return Ok(None);
        };
        Ok(Some(Screen {
            fd: copy(&self.output).map_err(BootError::Thread)?,
            keyboard: Arc::clone(keyboard),
        }))
    }

    /// How large the screen is, if the console is one.
    #[must_use]
    pub fn size(&self) -> Option<ScreenSize> {
        size(&self.output)
    }

    /// Starts the thread that brings input to the guest, if there can be any.
    ///
    /// # Errors
    /// No thread.
    pub fn start_input(
        &mut self,
        keyboard: &Arc<dyn Keyboard>,
        ending: &Arc<Ending>,
    ) -> Result<(), BootError> {
        let Some(fd) = self.input.take() else {
            return Ok(());
        };
        let screen = self.screen(keyboard)?;
        let keyboard = Arc::clone(keyboard);
        let escape = self.interactive.then(Escape::default);
        input::start(Input::new(fd, escape, keyboard, screen), ending).map_err(BootError::Thread)
    }
}

/// A terminal that shows what a guest writes.
#[derive(Debug)]
pub struct Screen {
    fd: OwnedFd,
    keyboard: Arc<dyn Keyboard>,
}

impl Screen {
    /// Looks how large it is, and tells the guest if that has changed.
    pub fn look(&self) {
        if let Some(size) = size(&self.fd) {
            self.keyboard.resize(size);
        }
    }
}

fn size(terminal: impl AsFd) -> Option<ScreenSize> {
    let size = rustix::termios::tcgetwinsize(terminal).ok()?;
    Some(ScreenSize {
        columns: size.ws_col,
        rows: size.ws_row,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::output::Output;

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
