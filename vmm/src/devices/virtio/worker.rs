//! A thread for each virtio device: sleeps until a queue is announced, and answers it.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use vmm_sys_util::eventfd::EventFd;

use super::mmio::Transport;
use super::queue::Left;

/// Starts the thread. `doorbells` become readable when the driver announces the queue of the same
/// index, `stop` when the machine ends; `failed` is called if the thread ends before that.
///
/// # Errors
/// No thread.
pub fn start(
    name: &str,
    transport: Arc<Transport>,
    doorbells: Vec<EventFd>,
    stop: EventFd,
    failed: impl FnOnce() + Send + 'static,
) -> io::Result<()> {
    std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(move || {
            let mut guard = Guard(Some(failed));
            match run(&transport, &doorbells, &stop) {
                Ok(()) => guard.0 = None,
                Err(error) => tracing::warn!(%error, "a virtio device stopped"),
            }
        })
        .map(drop)
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

fn run(transport: &Transport, doorbells: &[EventFd], stop: &EventFd) -> io::Result<()> {
    loop {
        let queues = match wait(doorbells, stop)? {
            Woken::Stop => return Ok(()),
            Woken::Queues(queues) => queues,
        };
        for index in queues {
            while transport.serve(index) == Left::More {
                std::thread::yield_now();
                if stopped(stop) {
                    return Ok(());
                }
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
