//! Counts those who hold something that others want to be rid of, so that these can wait for them.

use parking_lot::Condvar;

use crate::locks::{WaitMutex, rank};

/// Who looks at something.
#[derive(Debug, Default)]
pub(super) struct Looks {
    count: WaitMutex<rank::FileLooks, usize>,
    none: Condvar,
}

/// One who does, until it is dropped.
#[derive(Debug)]
pub(super) struct Look<'a>(&'a Looks);

impl Looks {
    /// One more. To be called before what is looked at is taken hold of, and dropped after that.
    pub(super) fn begin(&self) -> Look<'_> {
        *self.count.lock() += 1;
        Look(self)
    }

    /// Waits until nobody looks. What was put away before is then held by nobody. Not for who looks.
    pub(super) fn wait(&self) {
        let mut count = self.count.lock();
        while *count > 0 {
            count.wait(&self.none);
        }
    }
}

impl Drop for Look<'_> {
    fn drop(&mut self) {
        let mut count = self.0.count.lock();
        *count -= 1;
        if *count == 0 {
            self.0.none.notify_all();
        }
    }
}
