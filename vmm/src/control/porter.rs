//! The thread that hears who knocks at the sockets of the guests of this process.
//!
//! A process may run a hundred guests, each with a socket, and most are never asked anything: one thread waits at all of them. It
//! does nothing itself: whoever knocks gets a thread that serves him to the end, so that a guest that takes its time to answer
//! (a snapshot, a freeze) holds up nobody but those who ask the same guest. Of those who ask at one socket only so many are served
//! at a time (one, if the socket is a guest's); the others wait there.
//!
//! The thread is started with the first socket, and is there as long as the process.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};

use crate::locks::{Mutex, rank};

/// Serves one who has knocked, to the end.
pub(super) type Serve = Box<dyn Fn(UnixStream) + Send + Sync>;

/// Sockets that are looked at at a time.
const KNOCKS: usize = 16;
/// How long a host that cannot wait, or has no thread or descriptor, is let alone.
const TROUBLE: Duration = Duration::from_millis(100);

/// A guest's socket, or that of several. Dropping it hangs up on nobody, but waits until who is served has gone.
#[derive(Debug)]
pub(super) struct Door {
    number: u64,
    inside: Arc<Inside>,
}

/// What is behind it.
struct Inside {
    listener: UnixListener,
    serve: Serve,
    /// Who is served at a time at most.
    most: usize,
    visits: Mutex<rank::Visit, Visits>,
}

#[derive(Debug, Default)]
struct Visits {
    /// Nobody is let in any more.
    closed: bool,
    /// How many are served.
    served: usize,
    /// Those who are, and some who were.
    threads: Vec<JoinHandle<()>>,
}

impl std::fmt::Debug for Inside {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Inside")
            .field("listener", &self.listener)
            .finish_non_exhaustive()
    }
}

/// The process's one.
struct Porter {
    epoll: OwnedFd,
    doors: Mutex<rank::Doors, HashMap<u64, Arc<Inside>>>,
    /// Numbers are not used again.
    next: AtomicU64,
}

/// It, started if it is not there.
fn porter() -> io::Result<Arc<Porter>> {
    static PORTER: Mutex<rank::Porter, Option<Arc<Porter>>> = Mutex::new(None);
    let mut there = PORTER.lock();
    if let Some(porter) = &*there {
        return Ok(Arc::clone(porter));
    }
    let porter = Arc::new(Porter {
        epoll: epoll::create(CreateFlags::CLOEXEC)?,
        doors: Mutex::default(),
        next: AtomicU64::new(0),
    });
    let waits = Arc::clone(&porter);
    Builder::new().name("control".into()).spawn(move || {
        crate::machine::take_no_signals();
        waits.run();
    })?;
    Ok(Arc::clone(there.insert(porter)))
}

impl Door {
    /// Serves who knocks from now on, `most` at a time.
    ///
    /// # Errors
    /// The host has no descriptor or thread for it.
    pub(super) fn open(listener: UnixListener, serve: Serve, most: usize) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let porter = porter()?;
        let number = porter.next.fetch_add(1, Ordering::Relaxed);
        let inside = Arc::new(Inside {
            listener,
            serve,
            most,
            visits: Mutex::default(),
        });
        porter.doors.lock().insert(number, Arc::clone(&inside));
        let door = Self { number, inside };
        let data = EventData::new_u64(number);
        epoll::add(&porter.epoll, &door.inside.listener, data, once())?;
        Ok(door)
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        if let Ok(porter) = porter() {
            drop(porter.doors.lock().remove(&self.number));
            // One that could not be added is not there.
            let _ = epoll::delete(&porter.epoll, &self.inside.listener);
        }
        let mut visits = self.inside.visits.lock();
        visits.closed = true;
        let threads = std::mem::take(&mut visits.threads);
        drop(visits);
        for thread in threads {
            if thread.join().is_err() {
                tracing::error!("the thread that answers on the socket failed");
            }
        }
    }
}

/// A knock is told of once, until [`Porter::listen`].
fn once() -> EventFlags {
    EventFlags::IN | EventFlags::ONESHOT
}

impl Porter {
    fn run(self: &Arc<Self>) {
        loop {
            let mut knocks = Vec::with_capacity(KNOCKS);
            let spare = rustix::buffer::spare_capacity(&mut knocks);
            match epoll::wait(&self.epoll, spare, None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => {
                    tracing::error!(%error, "cannot wait at the guests' sockets");
                    std::thread::sleep(TROUBLE);
                }
            }
            for Event { data, .. } in knocks {
                let inside = self.doors.lock().get(&data.u64()).map(Arc::clone);
                if let Some(inside) = inside {
                    self.let_in(data.u64(), &inside);
                }
            }
        }
    }

    /// Gives who knocks a thread.
    fn let_in(self: &Arc<Self>, number: u64, inside: &Arc<Inside>) {
        let stream = match inside.listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) => {
                if error.kind() != io::ErrorKind::WouldBlock {
                    tracing::warn!(%error, "who asks on a guest's socket cannot be heard");
                    std::thread::sleep(TROUBLE);
                }
                return self.listen(number, inside);
            }
        };
        let mut visits = inside.visits.lock();
        if visits.closed {
            return;
        }
        visits.threads.retain(|thread| !thread.is_finished());
        let (porter, visited) = (Arc::clone(self), Arc::clone(inside));
        let thread = Builder::new().name("answer".into()).spawn(move || {
            crate::machine::take_no_signals();
            (visited.serve)(stream);
            visited.visits.lock().served -= 1;
            porter.listen(number, &visited);
        });
        match thread {
            Ok(thread) => {
                visits.threads.push(thread);
                visits.served += 1;
            }
            // Who knocked is hung up on.
            Err(error) => tracing::warn!(%error, "no thread for who asks on a guest's socket"),
        }
        let more = visits.served < inside.most;
        drop(visits);
        if more {
            self.listen(number, inside);
        }
    }

    /// Hears the next one who knocks.
    fn listen(&self, number: u64, inside: &Inside) {
        let data = EventData::new_u64(number);
        // A door that was closed is not there any more.
        let _ = epoll::modify(&self.epoll, &inside.listener, data, once());
    }
}
