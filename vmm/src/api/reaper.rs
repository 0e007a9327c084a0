//! The thread of this process that takes down guests that share a machine, when they have ended.
//!
//! It is there once for all of them: a guest has no thread of its own. Whoever drops a guest takes it down himself, if he
//! comes first.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{self, JoinHandle};

use super::host::{Finish, Played, Tells};
use super::ready::Bell;
use crate::linux::sched::Sched;
use crate::locks::{Mutex, rank};
use crate::machine::take_no_signals;

/// What the thread is told.
enum Message {
    /// A guest has ended; perhaps it was told before.
    Ended(u64),
    /// Nobody is left.
    Over,
}

/// The thread. It ends when this is dropped.
pub(super) struct Reaper {
    sender: Sender<Message>,
    guests: Arc<Guests>,
    /// Numbers are not used again.
    next: AtomicU64,
    thread: Option<JoinHandle<()>>,
}

/// Those that have not been taken down.
type Guests = Mutex<rank::HostDesk, HashMap<u64, (Arc<Played>, Tells)>>;

/// A guest's number here.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ticket(u64);

impl Reaper {
    /// Starts it.
    ///
    /// # Errors
    /// The host has no thread.
    pub(super) fn start() -> io::Result<Self> {
        let (sender, receiver) = channel();
        let guests = Arc::new(Guests::default());
        let known = Arc::clone(&guests);
        let thread = thread::Builder::new().name("reaper".into());
        let thread = thread.spawn(move || run(&receiver, &known))?;
        Ok(Self {
            sender,
            guests,
            next: AtomicU64::new(0),
            thread: Some(thread),
        })
    }

    /// Will hear of a guest's end; to be said before it runs.
    pub(super) fn announce(&self, sched: &Sched) -> Ticket {
        let ticket = Ticket(self.next.fetch_add(1, Ordering::Relaxed));
        let sender = self.sender.clone();
        // Nobody hears when nobody is left.
        sched.at_end(Box::new(move || _ = sender.send(Message::Ended(ticket.0))));
        ticket
    }

    /// Takes a guest down that was announced, when it has ended, unless somebody else does. Its end is told, and `bell` is rung
    /// then.
    pub(super) fn watch(
        &self,
        ticket: Ticket,
        guest: &Arc<Played>,
        bell: Arc<Bell>,
    ) -> Arc<Finish> {
        let finish = Arc::new(Finish::default());
        let tells = Tells {
            finish: Arc::clone(&finish),
            bell,
        };
        let known = (Arc::clone(guest), tells);
        self.guests.lock().insert(ticket.0, known);
        if guest.kernel.sched.has_ended() {
            // Perhaps before it was known.
            let _ = self.sender.send(Message::Ended(ticket.0));
        }
        finish
    }
}

fn run(receiver: &Receiver<Message>, guests: &Guests) {
    take_no_signals();
    while let Ok(Message::Ended(number)) = receiver.recv() {
        let ended = guests.lock().remove(&number);
        if let Some((guest, tells)) = ended {
            tells.take_down(&guest);
        }
    }
}

impl Drop for Reaper {
    fn drop(&mut self) {
        let _gone = self.sender.send(Message::Over);
        if let Some(thread) = self.thread.take() {
            // A panic has said itself what it was.
            let _ = thread.join();
        }
    }
}
