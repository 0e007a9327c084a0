//! The thread that watches host descriptors for guest threads that wait for one.
//!
//! It polls exactly what someone waits for: [`Events::arm`] adds a descriptor, and its being ready
//! removes it again and wakes [`WaitKey::HostFd`]. It is started when the first descriptor is
//! armed. A descriptor armed for a wait that ended otherwise is reported once to nobody.

use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::thread::JoinHandle;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

use super::Errno;
use super::call::WaitKey;
use super::file::Ready;
use super::sched::Sched;
use crate::locks::{Mutex, rank};

/// Host descriptors that guest threads wait for.
#[derive(Debug)]
pub struct Events {
    shared: Arc<Shared>,
    thread: Mutex<rank::EventThread, Option<JoinHandle<()>>>,
}

struct Shared {
    set: Mutex<rank::EventSet, Set>,
    /// Written to make the thread look at the set again.
    changed: OwnedFd,
    sched: Arc<Sched>,
}

#[derive(Debug, Default)]
struct Set {
    armed: BTreeMap<i32, (Arc<OwnedFd>, PollFlags)>,
    stopping: bool,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared")
            .field("set", &self.set)
            .finish_non_exhaustive()
    }
}

impl Events {
    /// Nothing is watched yet.
    ///
    /// # Errors
    /// The host has no descriptor left.
    pub fn new(sched: &Arc<Sched>) -> std::io::Result<Self> {
        let changed = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let shared = Shared {
            set: Mutex::default(),
            changed,
            sched: Arc::clone(sched),
        };
        Ok(Self {
            shared: Arc::new(shared),
            thread: Mutex::new(None),
        })
    }

    /// Wakes [`WaitKey::HostFd`] once when `fd` becomes ready for any of `interest`, or hangs up.
    /// If it is already, at once.
    pub fn arm(&self, fd: &Arc<OwnedFd>, interest: Ready) {
        let mut flags = PollFlags::empty();
        flags.set(
            PollFlags::IN,
            interest.intersects(Ready::IN | Ready::RDNORM),
        );
        flags.set(
            PollFlags::OUT,
            interest.intersects(Ready::OUT | Ready::WRNORM),
        );
        let mut set = self.shared.set.lock();
        let slot = set
            .armed
            .entry(fd.as_raw_fd())
            .or_insert_with(|| (Arc::clone(fd), PollFlags::empty()));
        slot.1 |= flags;
        drop(set);
        self.start();
        self.shared.signal();
    }

    /// Ends the thread. What is armed afterwards is never reported.
    pub fn stop(&self) {
        self.shared.set.lock().stopping = true;
        self.shared.signal();
        if let Some(thread) = self.thread.lock().take() {
            // A panic in it has been reported; there is nothing left to do for it.
            let _ = thread.join();
        }
    }

    fn start(&self) {
        let mut thread = self.thread.lock();
        if thread.is_none() && !self.shared.set.lock().stopping {
            let shared = Arc::clone(&self.shared);
            let spawned = std::thread::Builder::new()
                .name("events".into())
                .spawn(move || shared.run());
            match spawned {
                Ok(handle) => *thread = Some(handle),
                Err(error) => tracing::error!(%error, "cannot start the event thread"),
            }
        }
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Shared {
    fn signal(&self) {
        // It fails only when the counter is full, and then the thread has been told.
        let _ = rustix::io::write(&self.changed, &1_u64.to_ne_bytes());
    }

    fn run(&self) {
        loop {
            let watched: Vec<(Arc<OwnedFd>, PollFlags)> = {
                let set = self.set.lock();
                if set.stopping {
                    return;
                }
                set.armed.values().cloned().collect()
            };
            let mut fds = vec![PollFd::new(&self.changed, PollFlags::IN)];
            fds.extend(watched.iter().map(|(fd, flags)| PollFd::new(fd, *flags)));
            match poll(&mut fds, None) {
                Ok(_) => {}
                Err(Errno::INTR) => continue,
                Err(errno) => {
                    tracing::error!(%errno, "cannot watch the host's descriptors");
                    return;
                }
            }
            if !fds[0].revents().is_empty() {
                let mut count = [0_u8; 8];
                // Nothing to read means that it was read already.
                let _ = rustix::io::read(&self.changed, &mut count);
            }
            let fired: Vec<(i32, PollFlags)> = watched
                .iter()
                .zip(&fds[1..])
                .filter(|(_, p)| !p.revents().is_empty())
                .map(|((fd, _), p)| (fd.as_raw_fd(), p.revents()))
                .collect();
            for (fd, revents) in fired {
                self.disarm(fd, revents);
                self.sched.wake(WaitKey::HostFd(fd));
            }
        }
    }

    fn disarm(&self, fd: i32, revents: PollFlags) {
        let mut set = self.set.lock();
        if let Some((_, flags)) = set.armed.get_mut(&fd) {
            flags.remove(revents);
            let over = revents.intersects(PollFlags::HUP | PollFlags::ERR | PollFlags::NVAL);
            if over || flags.is_empty() {
                set.armed.remove(&fd);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    fn wait_for_epoch(sched: &Sched, past: u64) -> bool {
        let until = Instant::now() + Duration::from_secs(5);
        while sched.epoch() == past && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(1));
        }
        sched.epoch() != past
    }

    #[test]
    fn armed_descriptor_is_reported_once() {
        let sched = Arc::new(Sched::default());
        let events = Events::new(&sched).unwrap();
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let reader = Arc::new(reader);
        events.arm(&reader, Ready::IN);
        let before = sched.epoch();
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(sched.epoch(), before);
        rustix::io::write(&writer, b"x").unwrap();
        assert!(wait_for_epoch(&sched, before));
        assert!(events.shared.set.lock().armed.is_empty());
        events.arm(&reader, Ready::IN);
        assert!(wait_for_epoch(&sched, before + 1));
        events.stop();
    }

    #[test]
    fn hangup_is_reported() {
        let sched = Arc::new(Sched::default());
        let events = Events::new(&sched).unwrap();
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let before = sched.epoch();
        events.arm(&Arc::new(reader), Ready::IN);
        drop(writer);
        assert!(wait_for_epoch(&sched, before));
    }
}
