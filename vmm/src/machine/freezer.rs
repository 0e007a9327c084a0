//! The thread that freezes guests when they ask for it ([`crate::linux::freezes`]): a worker cannot, it
//! would wait for itself. It sleeps until it is asked, and ends when it is dropped.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use crate::linux::freezes::Freezes;

/// Settles what a guest has asked for.
pub(super) type Freeze = Arc<dyn Fn() + Send + Sync>;

/// What the thread is told.
enum Message {
    Freeze(Freeze),
    End,
}

/// The thread.
#[derive(Debug)]
pub(crate) struct Freezer {
    sender: Sender<Message>,
    thread: Option<JoinHandle<()>>,
}

impl Freezer {
    /// Starts it.
    ///
    /// # Errors
    /// The host has no thread for it.
    pub(crate) fn start() -> io::Result<Self> {
        let (sender, receiver) = channel();
        let thread = std::thread::Builder::new()
            .name("freezer".into())
            .spawn(move || run(&receiver))?;
        Ok(Self {
            sender,
            thread: Some(thread),
        })
    }

    /// Freezes the guest `name` too. `freeze` settles what it was asked for, and is called as often as the guest asks; it
    /// does not keep the guest, which keeps it.
    pub(super) fn serve(&self, freezes: &Freezes, name: &str, freeze: Freeze) {
        // What it is asked for is bounded by `freezes`, so what is in the channel is too.
        let asks = self.sender.clone();
        // After its end nobody is left who waits.
        let ask = Box::new(move || drop(asks.send(Message::Freeze(Arc::clone(&freeze)))));
        freezes.allow(name, ask);
    }
}

fn run(receiver: &Receiver<Message>) {
    crate::machine::take_no_signals();
    while let Ok(Message::Freeze(freeze)) = receiver.recv() {
        freeze();
    }
}

impl Drop for Freezer {
    fn drop(&mut self) {
        let _gone = self.sender.send(Message::End);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that freezes the guest failed");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::linux::call::WaitKey;

    #[test]
    fn every_request_is_seen_to_and_the_end_is_the_end() {
        let freezes = Arc::new(Freezes::new(WaitKey::Object(1)));
        let count = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&count);
        let freeze = Arc::new(move || {
            counted.fetch_add(1, Ordering::SeqCst);
        });
        let freezer = Freezer::start().unwrap();
        freezer.serve(&freezes, "warm", freeze);
        for _ in 0..3 {
            freezes.ask().unwrap();
        }
        drop(freezer);
        assert_eq!(count.load(Ordering::SeqCst), 3);
        assert_eq!(freezes.name(), Some("warm"));
        // Who asks now waits for the machine's end.
        freezes.ask().unwrap();
    }
}
