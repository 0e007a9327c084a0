//! A person at a terminal: types, waits for what should appear, and sees how it ends.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Signal, kill_process_group};
use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

use crate::context::Context;
use crate::process::{find_program, pid_of, shell_status};

/// Ctrl-C.
pub const CTRL_C: &str = "\x03";
/// Ctrl-D.
pub const CTRL_D: &str = "\x04";
/// Ctrl-Z.
pub const CTRL_Z: &str = "\x1a";
/// Ctrl-\.
pub const CTRL_BACKSLASH: &str = "\x1c";

fn size(rows: u16, columns: u16) -> Winsize {
    Winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    }
}

/// A pseudo-terminal with a session on it.
#[derive(Debug)]
pub struct Terminal {
    master: File,
    child: Child,
    arriving: Receiver<Vec<u8>>,
    unread: String,
    all: String,
    patience: Duration,
}

impl Terminal {
    /// Starts a command in a session of its own whose controlling terminal is a new one, of 30 rows
    /// and 100 columns.
    ///
    /// # Errors
    /// No terminal, or no such command.
    pub fn start(context: &Context, words: &[String]) -> Result<Self, String> {
        Self::open(context, words).map_err(|e| format!("terminal: {e}"))
    }

    fn open(context: &Context, words: &[String]) -> std::io::Result<Self> {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let master = openpt(flags)?;
        grantpt(&master)?;
        unlockpt(&master)?;
        let peer: OwnedFd = ioctl_tiocgptpeer(&master, flags)?;
        tcsetwinsize(&peer, size(30, 100))?;
        // setsid makes the session and gives it the terminal.
        let setsid = find_program("setsid").unwrap_or_else(|| "/rig/bin/setsid".into());
        let mut all = vec![setsid.to_string_lossy().into_owned(), "-c".to_owned()];
        all.extend_from_slice(words);
        let mut command: Command = context.command(&all);
        let child = command
            .stdin(Stdio::from(peer.try_clone()?))
            .stdout(Stdio::from(peer.try_clone()?))
            .stderr(Stdio::from(peer))
            .spawn()?;
        drop(command); // it holds the terminal open
        let master = File::from(master);
        let mut reader = master.try_clone()?;
        let (sender, arriving) = mpsc::channel();
        thread::spawn(move || {
            let mut chunk = [0; 4096];
            while let Ok(n @ 1..) = reader.read(&mut chunk) {
                if sender.send(chunk[..n].to_vec()).is_err() {
                    break;
                }
            }
        });
        let patience = context.timeout / 4;
        let (unread, all) = Default::default();
        Ok(Self {
            master,
            child,
            arriving,
            unread,
            all,
            patience,
        })
    }

    /// Makes it another size.
    ///
    /// # Errors
    /// The terminal is gone.
    pub fn resize(&self, rows: u16, columns: u16) -> Result<(), String> {
        tcsetwinsize(&self.master, size(rows, columns)).map_err(|e| format!("resizing: {e}"))
    }

    /// Types.
    ///
    /// # Errors
    /// The terminal is gone.
    pub fn send(&mut self, text: &str) -> Result<(), String> {
        self.master
            .write_all(text.as_bytes())
            .map_err(|e| format!("typing {text:?}: {e}"))
    }

    /// Waits until the text has appeared after what was waited for last.
    ///
    /// # Errors
    /// It does not come.
    pub fn expect(&mut self, text: &str) -> Result<(), String> {
        let until = Instant::now() + self.patience;
        loop {
            if let Some(at) = self.unread.find(text) {
                self.unread.drain(..at + text.len());
                return Ok(());
            }
            let left = until.saturating_duration_since(Instant::now());
            match self.arriving.recv_timeout(left) {
                Ok(bytes) => self.add(&bytes),
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                    return Err(format!(
                        "{text:?} did not appear; the terminal:\n{}",
                        self.all
                    ));
                }
            }
        }
    }

    /// Types again and again until the text appears: for what shows nothing when it is ready.
    ///
    /// # Errors
    /// It does not come.
    pub fn until(&mut self, typed: &str, text: &str) -> Result<(), String> {
        let patience = self.patience;
        let until = Instant::now() + patience;
        self.patience = Duration::from_secs(2);
        let mut result = Err(String::new());
        while result.is_err() && Instant::now() < until {
            result = self.send(typed).and_then(|()| self.expect(text));
        }
        self.patience = patience;
        result
    }

    fn add(&mut self, bytes: &[u8]) {
        let text = String::from_utf8_lossy(bytes);
        self.unread.push_str(&text);
        self.all.push_str(&text);
    }

    /// Lets time pass, for things that show nothing when they have happened.
    pub fn pause(&self, milliseconds: u64) {
        let factor = if self.patience > Duration::from_secs(30) {
            4
        } else {
            1
        };
        thread::sleep(Duration::from_millis(milliseconds * factor));
    }

    /// Waits for the end.
    ///
    /// # Errors
    /// It does not end, or with another status.
    pub fn ends_with(&mut self, want: i32) -> Result<(), String> {
        let until = Instant::now() + self.patience;
        loop {
            if let Some(status) = self.child.try_wait().map_err(|e| e.to_string())? {
                while let Ok(bytes) = self.arriving.recv_timeout(Duration::from_millis(50)) {
                    self.add(&bytes);
                }
                let got = shell_status(status);
                return if got == want {
                    Ok(())
                } else {
                    Err(format!(
                        "status {got}, not {want}; the terminal:\n{}",
                        self.all
                    ))
                };
            }
            if Instant::now() > until {
                return Err(format!("did not end; the terminal:\n{}", self.all));
            }
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Everything that appeared.
    #[must_use]
    pub fn all(&self) -> &str {
        &self.all
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        if let Some(pid) = pid_of(&self.child) {
            let _ = kill_process_group(pid, Signal::KILL);
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
