//! Address spaces and sections kept as they were, while the guest they are of goes on: how its pages are written down without it
//! standing still ([`shadow_mm::Manager::keep`], [`shadow_mm::Manager::keep_section`]).
//!
//! A kept space is promised no memory. As long as one is there, whatever the guest stores to needs a frame that it would
//! not have needed before; so who finds none while a copy is under way waits for its end, and is told that there is none
//! only afterwards ([`super::reclaim`]). Who copies must therefore want no frames, and no lock that a system call may hold.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use shadow_mm::{BeingKept, Flush, ForkError, Section, SectionError};

use super::{Backing, Memory, Space, VmmPlatform};

/// How often who waits for the end of a copy looks.
const LOOK: Duration = Duration::from_millis(2);

/// A space that is as another one was. It goes when this is dropped.
#[derive(Debug)]
pub struct Kept<'a> {
    memory: &'a Memory,
    space: Arc<Space<VmmPlatform>>,
}

impl Kept<'_> {
    /// The space.
    #[must_use]
    pub fn space(&self) -> &Arc<Space<VmmPlatform>> {
        &self.space
    }
}

impl Drop for Kept<'_> {
    fn drop(&mut self) {
        self.memory.delete_space(&self.space);
    }
}

/// A copy of kept spaces, under way as long as this lives. They go before it does.
#[derive(Debug)]
pub struct Copying<'a>(&'a Memory);

impl Drop for Copying<'_> {
    fn drop(&mut self) {
        // What the kept spaces had is to be there for those who waited for it.
        if self.0.manager.available() < self.0.low() {
            self.0.finish_flushes();
        }
        self.0.reclaim.copies.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Memory {
    /// Keeps a space as it is. Nothing may run in it meanwhile. No lock may be held.
    ///
    /// # Errors
    /// As [`shadow_mm::Manager::keep`]; nothing has changed then.
    pub fn keep(&self, space: &Arc<Space<VmmPlatform>>) -> Result<Kept<'_>, ForkError> {
        let kept = self.manager.keep(space)?;
        let space = self.forked(space, kept);
        Ok(Kept {
            memory: self,
            space,
        })
    }

    /// The guest goes on, and the spaces that are kept of it are copied.
    #[must_use]
    pub fn begin_copy(&self) -> Copying<'_> {
        self.reclaim.copies.fetch_add(1, Ordering::SeqCst);
        Copying(self)
    }

    /// Whether a copy is under way.
    pub(super) fn is_copying(&self) -> bool {
        self.reclaim.copies.load(Ordering::SeqCst) > 0
    }

    /// Sets where a section ends, and has the flushes of that done. Whoever cuts off what is still to be copied waits for it,
    /// perhaps with locks held: who copies wants none that a system call may hold.
    ///
    /// # Errors
    /// As [`shadow_mm::Manager::resize_section`], but for that.
    pub fn resize_section(
        &self,
        section: &Section<Backing>,
        bytes: u64,
    ) -> Result<(), SectionError> {
        let flushes = self.unless_kept(|| match self.manager.resize_section(section, bytes) {
            Err(SectionError::BeingKept(kept)) => Err(kept),
            other => Ok(other),
        })?;
        flushes.into_iter().for_each(|flush| self.submit(flush));
        Ok(())
    }

    /// Makes pages of a section zeroes, and has the flushes of that done. It may wait as [`Self::resize_section`] does.
    pub fn punch_section(&self, section: &Section<Backing>, pages: Range<u64>) {
        let punch = || self.manager.punch_section(section, pages.clone());
        let flushes: Vec<Flush> = self.unless_kept(punch);
        flushes.into_iter().for_each(|flush| self.submit(flush));
    }

    /// Waits for the end of what says that it cannot be done before a copy is.
    fn unless_kept<T>(&self, mut done: impl FnMut() -> Result<T, BeingKept>) -> T {
        loop {
            match done() {
                Ok(done) => return done,
                Err(BeingKept) => {
                    self.flushes.call_spare();
                    std::thread::sleep(LOOK);
                }
            }
        }
    }

    /// Waits until no copy is under way; false if none was.
    pub(super) fn wait_for_copies(&self) -> bool {
        let since = Instant::now();
        while self.is_copying() {
            std::thread::sleep(LOOK);
        }
        since.elapsed() >= LOOK
    }
}
