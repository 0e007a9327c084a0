//! The thread that freezes a guest when the guest asks for it ([`crate::linux::freezes`]): a worker cannot, it
//! would wait for itself. It sleeps until it is asked, and ends when it is dropped.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use crate::linux::freezes::Freezes;

/// What the thread is told.
enum Message {
    Freeze,
    End,
}

/// The thread.
#[derive(Debug)]
pub(super) struct Freezer {
    sender: Sender<Message>,
    thread: Option<JoinHandle<()>>,
}

impl Freezer {
    /// Starts it for the guest `name`. `freeze` settles what it was asked for, and is called as often as the guest
    /// asks.
    ///
    /// # Errors
    /// The host has no thread for it.
    pub(super) fn start(
        freezes: &Arc<Freezes>,
        name: &str,
        freeze: Box<dyn Fn() + Send>,
    ) -> io::Result<Self> {
        let (sender, receiver) = channel();
        let thread = std::thread::Builder::new()
            .name("freezer".into())
            .spawn(move || run(&receiver, &*freeze))?;
        // What it is asked for is bounded by `freezes`, so what is in the channel is too.
        let asks = sender.clone();
        // After its end nobody is left who waits.
        let ask = Box::new(move || drop(asks.send(Message::Freeze)));
        freezes.allow(name, ask);
        Ok(Self {
            sender,
            thread: Some(thread),
        })
    }
}

fn run(receiver: &Receiver<Message>, freeze: &dyn Fn()) {
    while let Ok(Message::Freeze) = receiver.recv() {
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
        let freeze = Box::new(move || {
            counted.fetch_add(1, Ordering::SeqCst);
        });
        let freezer = Freezer::start(&freezes, "warm", freeze).unwrap();
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
