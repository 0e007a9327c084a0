//! The threads of a virtio device: one sleeps until a queue is announced, and answers it. A concurrent device has
//! several, of which one waits at the doorbells at a time: it takes one request, leaves the place to the next, and
//! answers it. So a request that takes long holds up others only when as many take long as there are threads.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use parking_lot::Mutex;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use vmm_sys_util::eventfd::EventFd;

use super::mmio::Transport;
use super::mmio::flight::Flight;
use super::queue::Left;

/// Threads of a concurrent device, and so the most requests it has in flight.
pub const HANDS: usize = 4;

/// Starts them. `doorbells` become readable when the driver announces the queue of the same
/// index, `stop` when the machine ends; `failed` is called if a thread ends before that.
///
/// # Errors
/// No thread.
pub fn start(
    name: &str,
    transport: &Arc<Transport>,
    doorbells: Vec<EventFd>,
    stop: EventFd,
    failed: impl FnOnce() + Clone + Send + 'static,
) -> io::Result<()> {
    let hands = if transport.is_concurrent() { HANDS } else { 1 };
    let doors = Arc::new(Mutex::new(Doors {
        doorbells,
        stop,
        rung: Vec::new(),
    }));
    for _ in 0..hands {
        let (transport, doors) = (Arc::clone(transport), Arc::clone(&doors));
        let failed = failed.clone();
        let work = move || {
            let mut guard = Guard(Some(failed));
            let done = if transport.is_concurrent() {
                take_turns(&transport, &doors)
            } else {
                run(&transport, &doors)
            };
            match done {
                Ok(()) => guard.0 = None,
                Err(error) => tracing::warn!(%error, "a virtio device stopped"),
            }
        };
        std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(work)?;
    }
    Ok(())
}

/// Where a device is told of work.
struct Doors {
    doorbells: Vec<EventFd>,
    stop: EventFd,
    /// Queues that were announced, and not found empty since.
    rung: Vec<usize>,
}

/// Calls its function when dropped.
struct Guard<F: FnOnce()>(Option<F>);

impl<F: FnOnce()> Drop for Guard<F> {
    fn drop(&mut self) {
        if let Some(failed) = self.0.take() {
            failed();
        }
    }
}

fn run(transport: &Transport, doors: &Mutex<Doors>) -> io::Result<()> {
    let doors = doors.lock();
    loop {
        let queues = match wait(&doors.doorbells, &doors.stop)? {
            Woken::Stop => return Ok(()),
            Woken::Queues(queues) => queues,
        };
        for index in queues {
            while transport.serve(index) == Left::More {
                std::thread::yield_now();
                if stopped(&doors.stop) {
                    return Ok(());
                }
            }
        }
    }
}

fn take_turns(transport: &Transport, doors: &Mutex<Doors>) -> io::Result<()> {
    loop {
        let flight = doors.lock().next(transport)?;
        match flight {
            Some(flight) => flight.finish(),
            None => return Ok(()),
        }
    }
}

impl Doors {
    /// The next request; None when the machine ends.
    fn next<'a>(&mut self, transport: &'a Transport) -> io::Result<Option<Flight<'a>>> {
        loop {
            let Some(&index) = self.rung.last() else {
                match wait(&self.doorbells, &self.stop)? {
                    Woken::Stop => return Ok(None),
                    Woken::Queues(queues) => self.rung = queues,
                }
                continue;
            };
            if stopped(&self.stop) {
                return Ok(None);
            }
            match transport.take(index) {
                Some(flight) => return Ok(Some(flight)),
                None => _ = self.rung.pop(),
            }
        }
    }
}

enum Woken {
    Stop,
    Queues(Vec<usize>),
}

fn wait(doorbells: &[EventFd], stop: &EventFd) -> io::Result<Woken> {
    let mut fds: Vec<PollFd<'_>> = std::iter::once(stop)
        .chain(doorbells)
        .map(|event| PollFd::from_borrowed_fd(borrow(event), PollFlags::IN))
        .collect();
    match poll(&mut fds, None) {
        Ok(_) => {}
        Err(Errno::INTR) => return Ok(Woken::Queues(Vec::new())),
        Err(error) => return Err(error.into()),
    }
    let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
    if ready[0] {
        return Ok(Woken::Stop);
    }
    let rung = ready[1..].iter().enumerate().filter(|(_, ready)| **ready);
    let queues: Vec<usize> = rung.map(|(index, _)| index).collect();
    for &index in &queues {
        // Before the queue is looked at, so that a ring while it is looked at is not lost.
        let _ = doorbells[index].read();
    }
    Ok(Woken::Queues(queues))
}

fn stopped(stop: &EventFd) -> bool {
    let mut one = [PollFd::from_borrowed_fd(borrow(stop), PollFlags::IN)];
    matches!(
        poll(&mut one, Some(&rustix::event::Timespec::default())),
        Ok(1)
    )
}

#[expect(
    unsafe_code,
    reason = "the event type of vmm-sys-util lends only a raw descriptor"
)]
fn borrow(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is `event`'s, which outlives what is borrowed here.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}
