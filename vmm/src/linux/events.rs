//! The thread that watches host descriptors for guest threads that wait for one.
//!
//! It polls exactly what someone waits for: [`Events::arm`] adds a descriptor, and its being ready
//! removes it again and wakes [`WaitKey::HostFd`]. It is started when the first descriptor is
//! armed. A descriptor armed for a wait that ended otherwise is reported once to nobody.
//!
//! The guests of one machine share it, and may share descriptors.

use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, OnceLock, Weak};
use std::thread::JoinHandle;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

use super::Errno;
use super::call::WaitKey;
use super::file::Ready;
use super::sched::Sched;
use super::sched::roster::GuestId;
use crate::locks::{Mutex, rank};

/// Host descriptors that guest threads wait for.
#[derive(Debug, Default)]
pub struct Events {
    shared: Arc<Shared>,
    thread: Mutex<rank::EventThread, Option<JoinHandle<()>>>,
}

#[derive(Debug, Default)]
struct Shared {
    set: Mutex<rank::EventSet, Set>,
    /// Written to make the thread look at the set again; there as long as the thread was ever started.
    changed: OnceLock<OwnedFd>,
}

#[derive(Debug, Default)]
struct Set {
    armed: BTreeMap<i32, Armed>,
    stopping: bool,
}

/// A descriptor somebody waits for.
struct Armed {
    fd: Arc<OwnedFd>,
    flags: PollFlags,
    guests: BTreeMap<GuestId, Weak<Sched>>,
}

impl std::fmt::Debug for Armed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Armed")
            .field("fd", &self.fd)
            .field("flags", &self.flags)
            .finish_non_exhaustive()
    }
}

impl Events {
    /// Wakes [`WaitKey::HostFd`] of the guest once when `fd` becomes ready for any of `interest`, or hangs up.
    /// If it is already, at once.
    pub fn arm(&self, sched: &Arc<Sched>, fd: &Arc<OwnedFd>, interest: Ready) {
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
        let slot = set.armed.entry(fd.as_raw_fd()).or_insert_with(|| Armed {
            fd: Arc::clone(fd),
            flags: PollFlags::empty(),
            guests: BTreeMap::new(),
        });
        slot.flags |= flags;
        slot.guests.insert(sched.guest(), Arc::downgrade(sched));
        drop(set);
        self.start();
        self.shared.signal();
    }

    /// A guest has ended: it waits for nothing, and keeps no descriptor open.
    pub fn forget(&self, guest: GuestId) {
        let mut set = self.shared.set.lock();
        let before = set.armed.len();
        set.armed.retain(|_, armed| {
            armed.guests.remove(&guest);
            !armed.guests.is_empty()
        });
        let fewer = set.armed.len() < before;
        drop(set);
        if fewer {
            self.shared.signal();
        }
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
            if self.shared.changed.get().is_none() {
                match eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK) {
                    // The lock of the thread is held: nobody else comes first.
                    Ok(changed) => _ = self.shared.changed.set(changed),
                    Err(error) => {
                        tracing::error!(%error, "cannot watch the host's descriptors");
                        return;
                    }
                }
            }
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
        if let Some(changed) = self.changed.get() {
            // It fails only when the counter is full, and then the thread has been told.
            let _ = rustix::io::write(changed, &1_u64.to_ne_bytes());
        }
    }

    fn run(&self) {
        let Some(changed) = self.changed.get() else {
            debug_assert!(false, "it is made before the thread");
            return;
        };
        loop {
            let watched: Vec<(Arc<OwnedFd>, PollFlags)> = {
                let set = self.set.lock();
                if set.stopping {
                    return;
                }
                let armed = set.armed.values();
                armed.map(|a| (Arc::clone(&a.fd), a.flags)).collect()
            };
            let mut fds = vec![PollFd::new(changed, PollFlags::IN)];
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
                let _ = rustix::io::read(changed, &mut count);
            }
            let fired: Vec<(i32, PollFlags)> = watched
                .iter()
                .zip(&fds[1..])
                .filter(|(_, p)| !p.revents().is_empty())
                .map(|((fd, _), p)| (fd.as_raw_fd(), p.revents()))
                .collect();
            for (fd, revents) in fired {
                for sched in self.disarm(fd, revents) {
                    sched.wake(WaitKey::HostFd(fd));
                }
            }
        }
    }

    /// The guests that wait for it.
    fn disarm(&self, fd: i32, revents: PollFlags) -> Vec<Arc<Sched>> {
        let mut set = self.set.lock();
        let Some(armed) = set.armed.get_mut(&fd) else {
            return Vec::new();
        };
        armed.flags.remove(revents);
        let guests = armed.guests.values().filter_map(Weak::upgrade).collect();
        let over = revents.intersects(PollFlags::HUP | PollFlags::ERR | PollFlags::NVAL);
        if over || armed.flags.is_empty() {
            set.armed.remove(&fd);
        }
        guests
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
        let events = Events::default();
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let reader = Arc::new(reader);
        events.arm(&sched, &reader, Ready::IN);
        let before = sched.epoch();
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(sched.epoch(), before);
        rustix::io::write(&writer, b"x").unwrap();
        assert!(wait_for_epoch(&sched, before));
        assert!(events.shared.set.lock().armed.is_empty());
        events.arm(&sched, &reader, Ready::IN);
        assert!(wait_for_epoch(&sched, before + 1));
        events.stop();
    }

    #[test]
    fn hangup_is_reported() {
        let sched = Arc::new(Sched::default());
        let events = Events::default();
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let before = sched.epoch();
        events.arm(&sched, &Arc::new(reader), Ready::IN);
        drop(writer);
        assert!(wait_for_epoch(&sched, before));
    }

    #[test]
    fn descriptor_that_guests_share_is_reported_to_each() {
        let roster = Arc::default();
        let scheds = [(); 3].map(|()| Arc::new(Sched::new(&roster)));
        let events = Events::default();
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let reader = Arc::new(reader);
        for sched in &scheds {
            events.arm(sched, &reader, Ready::IN);
        }
        let before = scheds.each_ref().map(|sched| sched.epoch());
        events.forget(scheds[1].guest());
        rustix::io::write(&writer, b"x").unwrap();
        assert!(wait_for_epoch(&scheds[0], before[0]));
        assert!(wait_for_epoch(&scheds[2], before[2]));
        assert_eq!(scheds[1].epoch(), before[1]);
        events.arm(&scheds[0], &reader, Ready::OUT);
        events.forget(scheds[0].guest());
        assert!(events.shared.set.lock().armed.is_empty());
        events.stop();
        assert_eq!(Arc::strong_count(&reader), 1, "it is kept open");
    }
}
