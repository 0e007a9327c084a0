//! What a guest leaves in its machine for the next guest of the same template: address spaces as the template has them
//! ([`KeptMemory`]), and the host's part of the file tree, open. A machine in which nothing is left has neither.
//!
//! The next guest need not be of that template, and the host's files may have changed meanwhile: [`Bare::take_kept`] looks. What does
//! not fit is given up, and the machine is as new.

use std::sync::Arc;

use super::bare::Bare;
use super::worker::Shared;
use crate::linux::fs::Vfs;
use crate::memory::Memory;
use crate::snapshot::image::{Image, KeptMemory};
use crate::snapshot::records::Records;

/// What was left.
pub(crate) struct Kept {
    pub(super) memory: KeptMemory,
    /// Its parts in memory are empty.
    pub(super) tree: Vfs,
}

/// Frames and promises of what was left.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Holdings {
    /// Page tables.
    pub(super) tables: u64,
    /// Pages promised.
    pub(super) charged: u64,
    /// Sections: those of files that are mapped, of shared memory, and the snapshot's.
    pub(super) sections: u64,
    /// Pages that spaces have for themselves.
    pub(super) private: u64,
    /// Pages that they should have.
    pub(super) pages: u64,
}

impl Kept {
    /// Whether a guest of `image` and `records` can have it.
    fn fits(&self, image: &Arc<Image>, records: &Records) -> bool {
        Arc::ptr_eq(self.memory.image(), image)
            && self
                .memory
                .files()
                .all(|(at, file)| records.is_still(at, file))
    }

    /// What it has of the machine.
    pub(super) fn holdings(&self, memory: &Memory) -> Holdings {
        let mut all = Holdings {
            sections: 1 + memory.sections.count(),
            pages: self.memory.pages(),
            ..Holdings::default()
        };
        for section in self.memory.sections() {
            all.sections += 1;
            all.charged += memory.manager.section_charged(section);
        }
        for space in self.memory.spaces() {
            let usage = memory.manager.usage(space);
            all.tables += usage.tables;
            all.charged += usage.charged;
            all.private += usage.private;
        }
        all
    }
}

impl Bare {
    /// What the last guest has left, if a guest of `image` can have it. Otherwise nothing of it is left.
    pub(super) fn take_kept(&mut self, image: &Arc<Image>, records: &Records) -> Option<Kept> {
        let mut kept = self.kept.take()?;
        if kept.fits(image, records) {
            return Some(kept);
        }
        kept.memory.discard();
        self.give_up(kept.memory);
        None
    }

    /// Lets go of a guest's memory, whose spaces are gone.
    pub(super) fn give_up(&self, kept: KeptMemory) {
        drop(kept);
        let memory = &self.hardware.memory;
        memory.sections.close(memory);
        memory.finish_flushes();
    }
}

/// Takes down a guest that has ended, but for what the next one can have.
pub(super) fn leave(guest: &Shared, mut memory: KeptMemory) -> Option<Kept> {
    let kernel = &guest.kernel;
    let tree = kernel.vfs.another();
    let left = kernel.leave_spaces(|space| memory.wants(space));
    kernel.take_down();
    let report = memory.take_back(&left);
    tracing::debug!(?report, "a guest has left");
    kernel.memory.sections.release(&kernel.memory);
    match tree {
        Ok(tree) => Some(Kept { memory, tree }),
        Err(error) => {
            tracing::debug!(%error, "a file tree is not kept");
            memory.discard();
            None
        }
    }
}

#[cfg(test)]
mod tests;
