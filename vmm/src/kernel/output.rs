//! What the guest writes to its console, on its way out: a bounded buffer and the thread that empties
//! it. A processor that writes more than the reader takes waits here for room, until the machine ends.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use super::end::{End, Ending, Watch};

/// Bytes on their way.
const CAPACITY: usize = 64 << 10;

#[derive(Debug, Default)]
struct State {
    bytes: Vec<u8>,
    /// The writer has taken some and has not written them yet.
    writing: bool,
    /// No more will come; nobody waits any more.
    closed: bool,
}

/// The buffer.
#[derive(Debug, Default)]
pub struct Output {
    state: Mutex<State>,
    changed: Condvar,
}

/// What to do when the reader takes nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Full {
    /// Wait for it.
    Wait,
    /// Forget what does not fit: nobody may be there.
    Drop,
}

impl Output {
    /// The buffer, and a thread that writes it to `fd`.
    ///
    /// # Errors
    /// No thread.
    pub fn start(fd: OwnedFd, full: Full, ending: &Arc<Ending>) -> io::Result<Arc<Self>> {
        let output = Arc::new(Self::default());
        let (reader, ending) = (Arc::clone(&output), Arc::clone(ending));
        std::thread::Builder::new()
            .name("console-output".to_owned())
            .spawn(move || {
                let _watch = Watch {
                    ending: &ending,
                    thread: "console output",
                };
                reader.empty_into(&fd, full, &ending);
            })?;
        Ok(output)
    }

    fn empty_into(&self, fd: &OwnedFd, full: Full, ending: &Ending) {
        let mut chunk = Vec::new();
        let mut gone = false;
        loop {
            {
                let mut state = self.state.lock();
                state.writing = false;
                self.changed.notify_all();
                while state.bytes.is_empty() {
                    if state.closed {
                        return;
                    }
                    self.changed.wait(&mut state);
                }
                chunk.clear();
                std::mem::swap(&mut chunk, &mut state.bytes);
                state.writing = true;
            }
            self.changed.notify_all();
            if !gone && let Err(error) = write_all(fd, &chunk, full) {
                gone = true;
                ending.tell(End::Console(error.to_string()));
            }
        }
    }

    /// Takes bytes, waiting for room while the machine lives.
    pub fn push(&self, mut bytes: &[u8]) {
        let mut state = self.state.lock();
        while !bytes.is_empty() && !state.closed {
            let room = CAPACITY.saturating_sub(state.bytes.len());
            if room == 0 {
                self.changed.wait(&mut state);
                continue;
            }
            let (now, later) = bytes.split_at(bytes.len().min(room));
            state.bytes.extend_from_slice(now);
            bytes = later;
            self.changed.notify_all();
        }
    }

    /// Lets nobody wait any more, and gives what is on its way some time to arrive.
    pub fn finish(&self, patience: Duration) {
        let until = Instant::now() + patience;
        let mut state = self.state.lock();
        state.closed = true;
        self.changed.notify_all();
        while state.writing || !state.bytes.is_empty() {
            if self.changed.wait_until(&mut state, until).timed_out() {
                return;
            }
        }
    }
}

fn write_all(fd: &OwnedFd, mut bytes: &[u8], full: Full) -> io::Result<()> {
    while !bytes.is_empty() {
        match rustix::io::write(fd, bytes) {
            Ok(written) => bytes = &bytes[written..],
            Err(Errno::INTR) => {}
            // It was given to us like that, or it is ours and may be dropped.
            Err(Errno::AGAIN) => match full {
                Full::Drop => return Ok(()),
                Full::Wait => {
                    let mut one = [PollFd::new(fd, PollFlags::OUT)];
                    match poll(&mut one, None) {
                        Ok(_) | Err(Errno::INTR) => {}
                        Err(error) => return Err(error.into()),
                    }
                }
            },
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// The writing end, for a device.
#[derive(Clone, Debug)]
pub struct Writer(pub Arc<Output>);

impl io::Write for Writer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.push(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A copy of a descriptor of this process.
///
/// # Errors
/// It is closed, or there is no room for another.
pub fn copy(fd: impl AsFd) -> io::Result<OwnedFd> {
    fd.as_fd().try_clone_to_owned()
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn everything_arrives_even_when_the_reader_is_slow() {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let ending = Arc::new(Ending::default());
        let output = Output::start(writer, Full::Wait, &ending).unwrap();
        let sent: Vec<u8> = (0..4 * CAPACITY).map(|i| i as u8).collect();
        let expected = sent.clone();
        let thread = std::thread::spawn(move || {
            output.push(&sent);
            output.finish(Duration::from_secs(10));
        });
        std::thread::sleep(Duration::from_millis(20));
        let mut got = Vec::new();
        std::fs::File::from(reader).read_to_end(&mut got).unwrap();
        thread.join().unwrap();
        assert_eq!(got, expected);
        assert_eq!(ending.get(), None);
    }

    #[test]
    fn reader_that_has_gone_ends_the_machine() {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        drop(reader);
        let ending = Arc::new(Ending::default());
        let output = Output::start(writer, Full::Wait, &ending).unwrap();
        output.push(b"x");
        assert!(matches!(ending.wait(None), End::Console(_)));
        output.push(&[0; 3 * CAPACITY]);
        output.finish(Duration::from_secs(1));
    }
}
