//! Watches host descriptors for guest threads that wait for one.
//!
//! It polls exactly what someone waits for: [`Events::arm`] adds a descriptor, and its being ready
//! removes it again and wakes [`WaitKey::HostFd`]. A descriptor armed for a wait that ended otherwise is reported once to
//! nobody.
//!
//! The guests of one machine share it, and may share descriptors. It has no thread of its own: the machine's clock thread
//! looks ([`Events::look`]) while it has no round to make.

use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Weak};
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use super::Errno;
use super::call::WaitKey;
use super::file::Ready;
use super::sched::Sched;
use super::sched::roster::GuestId;
use super::tty::host_job::in_background_of;
use crate::locks::{Mutex, rank};

/// Host descriptors that guest threads wait for.
#[derive(Debug)]
pub struct Events {
    set: Mutex<rank::EventSet, BTreeMap<i32, Armed>>,
    /// Written to end a look that is under way, or the next one.
    changed: OwnedFd,
}

/// How long a host that cannot poll is let alone.
const TROUBLE: Duration = Duration::from_millis(100);
/// How often it is asked whether a terminal that another job has is ours to read.
const FOREGROUND: Duration = Duration::from_millis(200);

/// A descriptor somebody waits for.
struct Armed {
    fd: Arc<OwnedFd>,
    flags: PollFlags,
    /// It is one: nobody is told of what is typed for another job.
    terminal: bool,
    guests: BTreeMap<GuestId, Weak<Sched>>,
}

impl Armed {
    /// What to poll it for now, and whether to ask again before that comes.
    fn wanted(&self) -> (PollFlags, bool) {
        let later =
            self.terminal && self.flags.contains(PollFlags::IN) && in_background_of(&*self.fd);
        let flags = if later {
            self.flags - PollFlags::IN
        } else {
            self.flags
        };
        (flags, later)
    }
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
    /// Nothing is waited for yet.
    ///
    /// # Errors
    /// The host has no descriptor left.
    pub fn new() -> std::io::Result<Self> {
        Ok(Self {
            set: Mutex::default(),
            changed: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        })
    }

    /// Wakes [`WaitKey::HostFd`] of the guest once when `fd` becomes ready for any of `interest`, or hangs up.
    /// If it is already, at once. A terminal (the second of `interest`) is not ready to be read while another job has it.
    pub fn arm(&self, sched: &Arc<Sched>, fd: &Arc<OwnedFd>, (interest, terminal): (Ready, bool)) {
        let mut flags = PollFlags::empty();
        flags.set(
            PollFlags::IN,
            interest.intersects(Ready::IN | Ready::RDNORM),
        );
        flags.set(
            PollFlags::OUT,
            interest.intersects(Ready::OUT | Ready::WRNORM),
        );
        let mut set = self.set.lock();
        let slot = set.entry(fd.as_raw_fd()).or_insert_with(|| Armed {
            fd: Arc::clone(fd),
            flags: PollFlags::empty(),
            terminal,
            guests: BTreeMap::new(),
        });
        slot.flags |= flags;
        slot.guests.insert(sched.guest(), Arc::downgrade(sched));
        drop(set);
        self.wake();
    }

    /// A guest has ended: it waits for nothing, and keeps no descriptor open.
    pub fn forget(&self, guest: GuestId) {
        let mut set = self.set.lock();
        let before = set.len();
        set.retain(|_, armed| {
            armed.guests.remove(&guest);
            !armed.guests.is_empty()
        });
        let fewer = set.len() < before;
        drop(set);
        if fewer {
            self.wake();
        }
    }

    /// Ends a look.
    pub fn wake(&self) {
        // It fails only when the counter is full, and then it has been told.
        let _ = rustix::io::write(&self.changed, &1_u64.to_ne_bytes());
    }

    /// Waits until a descriptor is ready, what is waited for changes, [`Self::wake`] is called or a time has passed; wakes
    /// who waits for what is ready. For one thread.
    pub fn look(&self, time: Option<Duration>) {
        let mut time = time;
        let watched: Vec<(Arc<OwnedFd>, PollFlags)> = {
            let set = self.set.lock();
            let wanted = set.values().map(|armed| {
                let (flags, later) = armed.wanted();
                if later {
                    time = Some(time.map_or(FOREGROUND, |time| time.min(FOREGROUND)));
                }
                (Arc::clone(&armed.fd), flags)
            });
            wanted.collect()
        };
        let mut fds = vec![PollFd::new(&self.changed, PollFlags::IN)];
        fds.extend(watched.iter().map(|(fd, flags)| PollFd::new(fd, *flags)));
        let time = time.map(|time| Timespec {
            tv_sec: i64::try_from(time.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: time.subsec_nanos().into(),
        });
        match poll(&mut fds, time.as_ref()) {
            Ok(0) | Err(Errno::INTR) => return,
            Ok(_) => {}
            Err(errno) => {
                tracing::error!(%errno, "cannot watch the host's descriptors");
                // The host's trouble; not to be asked without end.
                std::thread::sleep(TROUBLE);
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
            for sched in self.disarm(fd, revents) {
                sched.wake(WaitKey::HostFd(fd));
            }
        }
    }

    /// The guests that wait for it.
    fn disarm(&self, fd: i32, revents: PollFlags) -> Vec<Arc<Sched>> {
        let mut set = self.set.lock();
        let Some(armed) = set.get_mut(&fd) else {
            return Vec::new();
        };
        armed.flags.remove(revents);
        let guests = armed.guests.values().filter_map(Weak::upgrade).collect();
        let over = revents.intersects(PollFlags::HUP | PollFlags::ERR | PollFlags::NVAL);
        if over || armed.flags.is_empty() {
            set.remove(&fd);
        }
        guests
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::Instant;

    use super::*;

    fn wait_for_epoch(sched: &Sched, past: u64) -> bool {
        let until = Instant::now() + Duration::from_secs(5);
        while sched.epoch() == past && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(1));
        }
        sched.epoch() != past
    }

    /// Ends the thread that looks.
    struct End<'a>(&'a Events, &'a AtomicBool);

    impl Drop for End<'_> {
        fn drop(&mut self) {
            self.1.store(true, Ordering::SeqCst);
            self.0.wake();
        }
    }

    /// Does something while a thread looks.
    fn watched(does: impl FnOnce(&Events)) {
        let (events, ended) = (Events::new().unwrap(), AtomicBool::new(false));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !ended.load(Ordering::SeqCst) {
                    events.look(None);
                }
            });
            let _end = End(&events, &ended);
            does(&events);
        });
    }

    #[test]
    fn armed_descriptor_is_reported_once() {
        let sched = Arc::new(Sched::default());
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let reader = Arc::new(reader);
        watched(|events| {
            events.arm(&sched, &reader, (Ready::IN, false));
            let before = sched.epoch();
            std::thread::sleep(Duration::from_millis(20));
            assert_eq!(sched.epoch(), before);
            rustix::io::write(&writer, b"x").unwrap();
            assert!(wait_for_epoch(&sched, before));
            assert!(events.set.lock().is_empty());
            events.arm(&sched, &reader, (Ready::IN, false));
            assert!(wait_for_epoch(&sched, before + 1));
        });
    }

    #[test]
    fn hangup_is_reported() {
        let sched = Arc::new(Sched::default());
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let before = sched.epoch();
        watched(|events| {
            events.arm(&sched, &Arc::new(reader), (Ready::IN, false));
            drop(writer);
            assert!(wait_for_epoch(&sched, before));
        });
    }

    #[test]
    fn descriptor_that_guests_share_is_reported_to_each() {
        let roster = Arc::default();
        let scheds = [(); 3].map(|()| Arc::new(Sched::new(&roster)));
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let reader = Arc::new(reader);
        watched(|events| {
            for sched in &scheds {
                events.arm(sched, &reader, (Ready::IN, false));
            }
            let before = scheds.each_ref().map(|sched| sched.epoch());
            events.forget(scheds[1].guest());
            rustix::io::write(&writer, b"x").unwrap();
            assert!(wait_for_epoch(&scheds[0], before[0]));
            assert!(wait_for_epoch(&scheds[2], before[2]));
            assert_eq!(scheds[1].epoch(), before[1]);
            events.arm(&scheds[0], &reader, (Ready::OUT, false));
            events.forget(scheds[0].guest());
            assert!(events.set.lock().is_empty());
        });
        assert_eq!(Arc::strong_count(&reader), 1, "it is kept open");
    }
}
