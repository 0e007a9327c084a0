//! Trims, and transfers to and from the page file.

use shadow_mm::{FaultOutcome, FrameStore, IoFailed, PAGE_SIZE, PageIn, TrimMode};

use super::common::Sim;
use super::ops::ReadEnd;
use super::world::{Outcome, SLOTS, World, Writing};

impl World {
    pub(crate) fn trim(&mut self, which: usize, goal: u64, mode: TrimMode) -> Outcome {
        let trimmed = self.mm.trim(&self.processes[which].cpu.space, goal, mode);
        self.flush(which, trimmed.flush);
        if trimmed.pages > goal {
            return Err(format!("{} pages trimmed, {goal} wanted", trimmed.pages));
        }
        Ok(())
    }

    pub(crate) fn start_write(&mut self) -> Outcome {
        if let Some(ticket) = self.mm.start_write() {
            let bytes = ticket.frames().iter().map(|pfn| self.bytes(*pfn)).collect();
            self.writes.push(Writing { ticket, bytes });
        }
        Ok(())
    }

    pub(crate) fn finish_write(&mut self, n: usize, written: bool) -> Outcome {
        if self.writes.is_empty() {
            return Ok(());
        }
        let Writing { ticket, bytes } = self.writes.swap_remove(n % self.writes.len());
        let offset = ticket.offset();
        for (page, bytes) in (0u64..).zip(bytes) {
            // A failed write leaves anything behind.
            let bytes = if written { bytes } else { [0xdd; 3] };
            self.page_file
                .insert(offset + page * PAGE_SIZE as u64, bytes);
        }
        let pages = ticket.frames().len() as u64;
        let done = self
            .mm
            .complete_write(ticket, written.then_some(()).ok_or(IoFailed));
        if done.stored + done.kept != pages || (!written && done.stored > 0) {
            return Err(format!("{done:?} of {pages} pages, written: {written}"));
        }
        Ok(())
    }

    pub(crate) fn finish_page_in(&mut self, n: usize, end: ReadEnd) -> Outcome {
        if self.page_ins.is_empty() {
            return Ok(());
        }
        let ticket = self.page_ins.swap_remove(n % self.page_ins.len());
        match self.fill_page_in(ticket, end) {
            FaultOutcome::Resolved(done) => self.flush_space(done.flush),
            FaultOutcome::Denied(_) | FaultOutcome::NoMemory | FaultOutcome::Wait(_) => {}
            FaultOutcome::Read(_)
            | FaultOutcome::PageIn(_)
            | FaultOutcome::Thaw(_)
            | FaultOutcome::Collided => {
                return Err("a read after a read".into());
            }
        }
        Ok(())
    }

    pub(crate) fn fill_page_in(&mut self, ticket: PageIn<Sim>, end: ReadEnd) -> FaultOutcome<Sim> {
        let length = match end {
            ReadEnd::Whole => ticket.length(),
            ReadEnd::Short => ticket.length() / PAGE_SIZE / 2 * PAGE_SIZE + 100,
            ReadEnd::Failed | ReadEnd::Dropped => 0,
        };
        for (page, frame) in ticket.frames().iter().enumerate() {
            let store = self.mm.store();
            store.write(*frame, 0, &[0xee; PAGE_SIZE]);
            let at = ticket.offset() + (page * PAGE_SIZE) as u64;
            if (page + 1) * PAGE_SIZE <= length {
                let bytes = self.page_file.get(&at).copied().unwrap_or([0xcc; 3]);
                let slots = SLOTS.iter().zip(bytes);
                slots.for_each(|(slot, byte)| store.write(*frame, *slot, &[byte]));
            }
        }
        let result = if matches!(end, ReadEnd::Failed | ReadEnd::Dropped) {
            Err(IoFailed)
        } else {
            Ok(length)
        };
        self.mm.complete_page_in(ticket, result)
    }
}
