//! The threads that look after a machine's memory. They are started when they are first wanted: most machines that wait for
//! something never want them.
//!
//! A thread is there from its first call until the machine ends, or it finds nothing more to do (the zeroer): then the next
//! call starts another one. One that the host refuses is asked for again at the next call; whoever wanted it makes do
//! without it meanwhile.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::thread::{self, JoinHandle};

use super::Memory;
use crate::locks::{Mutex, rank};

/// Where a thread is in its life.
#[derive(Debug, Default)]
enum State {
    /// It cannot be called: not yet, or not any more.
    #[default]
    Closed,
    Ready(Weak<Memory>),
    Running(JoinHandle<()>),
}

/// One of the threads.
#[derive(Debug)]
struct Aide {
    name: &'static str,
    body: fn(&Memory),
    /// Which of all it is.
    of: fn(&Aides) -> &Self,
    /// It was started: nothing is to be done for it.
    there: AtomicBool,
    state: Mutex<rank::Aide, State>,
}

impl Aide {
    fn new(name: &'static str, body: fn(&Memory), of: fn(&Aides) -> &Self) -> Self {
        Self {
            name,
            body,
            of,
            there: AtomicBool::new(false),
            state: Mutex::default(),
        }
    }

    /// Starts it, if that was not done. False if it is not there.
    fn call(&self) -> bool {
        if self.there.load(Ordering::Acquire) {
            return true;
        }
        let mut state = self.state.lock();
        let memory = match &*state {
            State::Closed => return false,
            State::Running(_) => return true,
            State::Ready(memory) => memory.upgrade(),
        };
        let Some(memory) = memory else { return false };
        let (name, body, of) = (self.name, self.body, self.of);
        let thread = thread::Builder::new().name(name.into()).spawn(move || {
            crate::machine::take_no_signals();
            body(&memory);
            of(&memory.aides).is_done(&memory);
        });
        match thread {
            Ok(handle) => {
                *state = State::Running(handle);
                self.there.store(true, Ordering::Release);
                true
            }
            Err(error) => {
                tracing::warn!(%error, name, "no thread to look after memory");
                false
            }
        }
    }

    /// Its thread ends, and is waited for by nobody, unless the machine ends too.
    fn is_done(&self, memory: &Arc<Memory>) {
        let mut state = self.state.lock();
        if matches!(*state, State::Running(_)) {
            self.there.store(false, Ordering::Release);
            *state = State::Ready(Arc::downgrade(memory));
        }
    }

    /// It cannot be called any more; gives back the thread, to be waited for once it has been told to end.
    fn close(&self) -> Option<JoinHandle<()>> {
        self.there.store(false, Ordering::Release);
        match std::mem::take(&mut *self.state.lock()) {
            State::Running(thread) => Some(thread),
            State::Closed | State::Ready(_) => None,
        }
    }
}

/// All of them.
#[derive(Debug)]
pub(super) struct Aides {
    pager: Aide,
    zeroer: Aide,
    writeback: Aide,
    /// Flushes that were acknowledged.
    acknowledged: AtomicU64,
}

/// Flushes, each with frames that come back, after which it is looked whether the zeroer has something to do.
const ZEROER_CALLS: u64 = 8;

impl Default for Aides {
    fn default() -> Self {
        Self {
            pager: Aide::new("pager", Memory::run_pager, |all| &all.pager),
            zeroer: Aide::new("zeroer", Memory::run_zeroer, |all| &all.zeroer),
            writeback: Aide::new("writeback", Memory::run_writeback, |all| &all.writeback),
            acknowledged: AtomicU64::new(0),
        }
    }
}

impl Memory {
    /// From now on the threads that look after this memory are started when they are wanted.
    pub fn open_aides(self: &Arc<Self>) {
        let Aides {
            pager,
            zeroer,
            writeback,
            ..
        } = &self.aides;
        for aide in [pager, zeroer, writeback] {
            *aide.state.lock() = State::Ready(Arc::downgrade(self));
        }
    }

    /// Ends those that were started, and waits for them. What is left to write back to files is written by
    /// [`super::Sections::close`].
    pub fn close_aides(&self) {
        let Aides {
            pager,
            zeroer,
            writeback,
            ..
        } = &self.aides;
        let threads = [writeback, pager, zeroer].map(Aide::close);
        self.bell.end();
        self.end_paging();
        for thread in threads.into_iter().flatten() {
            // A panic has said itself what it was.
            let _ = thread.join();
        }
    }

    /// Frames have come back with so many flushes: calls the zeroer now and then if there are some to zero.
    pub(super) fn frames_came_back(&self, flushes: u64) {
        let before = self
            .aides
            .acknowledged
            .fetch_add(flushes, Ordering::Relaxed);
        let due = before / ZEROER_CALLS != (before + flushes) / ZEROER_CALLS;
        if due && !self.aides.zeroer.there.load(Ordering::Acquire) && self.has_frames_to_zero() {
            self.aides.zeroer.call();
        }
    }

    /// Calls the pager. False if there is none.
    pub(super) fn call_pager(&self) -> bool {
        self.aides.pager.call()
    }

    /// Calls the thread that writes mapped files back.
    pub(super) fn call_writeback(&self) {
        self.aides.writeback.call();
    }
}

#[cfg(test)]
mod tests {
    use super::super::{PageFile, paging_tests};
    use super::*;

    #[test]
    fn thread_that_is_done_is_started_by_the_next_call() {
        let file = PageFile::create(&std::env::temp_dir(), 1 << 20).unwrap();
        let memory = paging_tests::memory(file);
        memory.open_aides();
        let zeroer = &memory.aides.zeroer;
        for _ in 0..2 {
            assert!(zeroer.call());
            zeroer.is_done(&memory);
            assert!(matches!(*zeroer.state.lock(), State::Ready(_)));
        }
        assert!(zeroer.call());
        memory.close_aides();
        zeroer.is_done(&memory);
        assert!(!zeroer.call(), "after the end");
    }

    #[test]
    fn thread_is_there_from_its_first_call_to_the_end() {
        let file = PageFile::create(&std::env::temp_dir(), 1 << 20).unwrap();
        let memory = paging_tests::memory(file);
        assert!(!memory.call_pager(), "before anybody may call it");
        memory.open_aides();
        for _ in 0..2 {
            assert!(memory.call_pager());
        }
        let running = |aide: &Aide| matches!(*aide.state.lock(), State::Running(_));
        assert!(running(&memory.aides.pager) && !running(&memory.aides.writeback));
        memory.views_changed();
        assert!(running(&memory.aides.writeback));
        memory.close_aides();
        assert!(!memory.call_pager(), "after the end");
        assert_eq!(Arc::strong_count(&memory), 1);
    }
}
