//! Accesses, reads, pins, forks and exits.

use shadow_mm::{
    Access, Denied, FaultOutcome, ForkError, FrameStore, IoFailed, IoTicket, PAGE_SIZE, Pfn,
    PinOutcome, Progress,
};

use super::common::{Cpu, Sim, vpn};
use super::ops::ReadEnd;
use super::verbs::{agree, fresh};
use super::world::{At, Bytes, Outcome, PageModel, Pinned, SLOTS, Undone, World};

impl World {
    pub(crate) fn access(
        &mut self,
        which: usize,
        page: u64,
        access: Access,
        change: impl Fn(&mut Bytes),
    ) -> Outcome {
        let verdict = self.verdict(which, page, access);
        let frame = match (self.touch(which, page, access)?, verdict) {
            (Some(Ok(frame)), Ok(())) => frame,
            (Some(Err(denied)), Err(expected)) => return agree("denied", denied, expected),
            (None, _) => return Ok(()),
            (got, expected) => return Err(format!("access gave {got:?}, expected {expected:?}")),
        };
        if access == Access::Write {
            self.owned(which, page);
        }
        let (Some(model), Some(at)) = (
            self.processes[which].pages.get(&page).copied(),
            self.holder(which, page),
        ) else {
            return Err("no model".into());
        };
        let expected = self.content(&model);
        agree("content", self.bytes(frame), expected)?;
        if access == Access::Write {
            let mut now = expected;
            change(&mut now);
            // What lies beyond the end of a file is nobody's.
            if let At::File(file, page) = at {
                let valid = self.files[file].valid(page);
                let all = SLOTS.iter().zip(&mut now).zip(expected);
                all.filter(|((slot, _), _)| **slot >= valid)
                    .for_each(|((_, now), old)| *now = old);
            }
            self.put(at, now);
            SLOTS
                .iter()
                .zip(now)
                .for_each(|(slot, byte)| self.mm.store().write(frame, *slot, &[byte]));
            for pinned in self.pins.iter_mut().filter(|p| p.at == Some(at)) {
                pinned.tainted = true;
            }
        }
        Ok(())
    }

    /// Accesses until it succeeds or is denied; `None` if memory ran out.
    fn touch(
        &mut self,
        which: usize,
        page: u64,
        access: Access,
    ) -> Result<Option<Result<Pfn, Denied>>, String> {
        let at = vpn(page).va();
        // The two vCPUs take turns.
        let process = &mut self.processes[which];
        core::mem::swap(&mut process.cpu, &mut process.other);
        for _ in 0..6 {
            let process = &mut self.processes[which];
            if let Ok(found) = process.cpu.mmu.translate(self.mm.store(), at, access) {
                return Ok(Some(Ok(found.frame)));
            }
            let mut outcome = self.mm.fault(&process.cpu.space, at, access);
            if let FaultOutcome::Read(ticket) = outcome {
                outcome = self.fill(ticket, ReadEnd::Whole);
            } else if let FaultOutcome::PageIn(ticket) = outcome {
                outcome = self.fill_page_in(ticket, ReadEnd::Whole);
            }
            match outcome {
                FaultOutcome::Wait(pending) => {
                    agree("pending", pending.progress(), Progress::UnderWay)?;
                    while !self.reads.is_empty() {
                        self.finish_read(0, ReadEnd::Whole)?;
                    }
                    agree("pending", pending.progress(), Progress::Ended)?;
                }
                FaultOutcome::Resolved(done) => self.flush(which, done.flush),
                // As when memory runs out.
                FaultOutcome::Denied(Denied::NoSpace) => return Ok(None),
                FaultOutcome::Denied(denied) => return Ok(Some(Err(denied))),
                FaultOutcome::Thaw(thaw) => {
                    if !self.thaw(&thaw) {
                        return Ok(None);
                    }
                }
                FaultOutcome::NoMemory | FaultOutcome::Collided => return Ok(None),
                FaultOutcome::Read(_) | FaultOutcome::PageIn(_) => {
                    return Err("a read after a read".into());
                }
            }
        }
        Err("the fault never ends".into())
    }

    pub(crate) fn fill(&mut self, ticket: IoTicket<Sim>, end: ReadEnd) -> FaultOutcome<Sim> {
        let file = self.files.iter().find(|f| f.section == *ticket.section());
        let file = file.expect("a section of the model");
        for (n, frame) in ticket.frames().iter().enumerate() {
            // What the read does not reach must not show.
            self.mm.store().write(*frame, 0, &[0xee; PAGE_SIZE]);
            let page = ticket.offset() / PAGE_SIZE as u64 + n as u64;
            for (slot, byte) in SLOTS.iter().zip(file.on_disk(page)) {
                if n * PAGE_SIZE + slot < ticket.length() {
                    self.mm.store().write(*frame, *slot, &[byte]);
                }
            }
        }
        let length = ticket.length();
        let result = match end {
            ReadEnd::Whole => Ok(length),
            ReadEnd::Short => Ok(length / PAGE_SIZE / 2 * PAGE_SIZE),
            ReadEnd::Failed | ReadEnd::Dropped => Err(IoFailed),
        };
        self.mm.complete_read(ticket, result)
    }

    pub(crate) fn start_read(&mut self, which: usize, page: u64) -> Outcome {
        match self.mm.fault(
            &self.processes[which].cpu.space,
            vpn(page).va(),
            Access::Read,
        ) {
            FaultOutcome::Read(ticket) => self.leave_read(which, page, Access::Read, ticket),
            FaultOutcome::PageIn(ticket) => self.page_ins.push(ticket),
            FaultOutcome::Resolved(done) => self.flush(which, done.flush),
            FaultOutcome::Denied(_)
            | FaultOutcome::NoMemory
            | FaultOutcome::Wait(_)
            | FaultOutcome::Thaw(_)
            | FaultOutcome::Collided => {}
        }
        Ok(())
    }

    fn leave_read(&mut self, which: usize, page: u64, access: Access, ticket: IoTicket<Sim>) {
        let at = (self.processes[which].id, page);
        self.reads.push(Undone { ticket, at, access });
    }

    pub(crate) fn finish_read(&mut self, n: usize, end: ReadEnd) -> Outcome {
        if self.reads.is_empty() {
            return Ok(());
        }
        let Undone { ticket, at, access } = self.reads.swap_remove(n % self.reads.len());
        if matches!(end, ReadEnd::Dropped) {
            drop(ticket);
            return Ok(());
        }
        match self.fill(ticket, end) {
            FaultOutcome::Resolved(done) => {
                let which = self.processes.iter().position(|p| p.id == at.0);
                if let (Some(which), Access::Write) = (which, access) {
                    self.owned(which, at.1);
                }
                self.flush_space(done.flush);
            }
            // Frames were so short that the page went before it could be mapped.
            FaultOutcome::Read(ticket) => drop(ticket),
            // The place is something else by now.
            FaultOutcome::PageIn(ticket) => self.page_ins.push(ticket),
            // Nobody has stored there yet.
            FaultOutcome::Thaw(_)
            | FaultOutcome::Denied(_)
            | FaultOutcome::NoMemory
            | FaultOutcome::Wait(_)
            | FaultOutcome::Collided => {}
        }
        // Before anybody stores to the pages that were copied.
        self.note_copies();
        Ok(())
    }

    pub(crate) fn fork(&mut self, which: usize) -> Outcome {
        if self.is_full() {
            return Ok(());
        }
        let forked = match self.mm.fork(&self.processes[which].cpu.space) {
            Ok(forked) => forked,
            Err(
                ForkError::NoMemory { .. }
                | ForkError::NoCommit { .. }
                | ForkError::NoCloneBlocks { .. },
            ) => return Ok(()),
            Err(other) => return Err(other.to_string()),
        };
        self.flush(which, forked.flush);
        let pages = self.processes[which].pages.iter();
        let inherited = pages.filter(|(_, page)| !page.dont_fork).map(|(at, page)| {
            let own = if page.wipe {
                fresh(page.view)
            } else {
                page.own
            };
            let image = page.image.filter(|_| !page.wipe);
            (
                *at,
                PageModel {
                    own,
                    image,
                    ..*page
                },
            )
        });
        let inherited = inherited.collect();
        let quota = self.processes[which].quota.inherited();
        self.add(Cpu::new(&forked.child), inherited);
        if let Some(child) = self.processes.last_mut() {
            child.quota = quota;
        }
        Ok(())
    }

    pub(crate) fn exit(&mut self, which: usize) -> Outcome {
        let process = self.processes.remove(which);
        let flush = self.mm.delete_space(&process.cpu.space);
        self.unacknowledged.push(flush);
        self.move_pins(process.id, |_| None);
        agree(
            "second exit",
            self.mm.delete_space(&process.cpu.space).is_empty(),
            true,
        )
    }

    pub(crate) fn pin(&mut self, which: usize, page: u64, write: bool) -> Outcome {
        let access = if write { Access::Write } else { Access::Read };
        let verdict = self.verdict(which, page, access);
        match self
            .mm
            .pin(&self.processes[which].cpu.space, vpn(page), access)
        {
            PinOutcome::Pinned(pin, flush) => {
                self.flush(which, flush);
                if write {
                    self.owned(which, page);
                }
                let model = self.processes[which].pages.get(&page).copied();
                let bytes = model.map(|m| self.content(&m)).unwrap_or_default();
                agree("pinned content", self.bytes(pin.pfn()), bytes)?;
                let at = self.holder(which, page);
                self.pins.push(Pinned {
                    pin,
                    at,
                    bytes,
                    tainted: false,
                });
                agree("pin", Ok(()), verdict)
            }
            PinOutcome::Read(ticket) => {
                self.leave_read(which, page, access, ticket);
                agree("pin", Ok(()), verdict)
            }
            PinOutcome::Wait(_) => agree("pin", Ok(()), verdict),
            PinOutcome::PageIn(ticket) => {
                self.page_ins.push(ticket);
                agree("pin", Ok(()), verdict)
            }
            PinOutcome::Denied(Denied::NoSpace) => Ok(()),
            PinOutcome::Denied(denied) => agree("pin", Err(denied), verdict),
            PinOutcome::Again(flush) => {
                self.flush(which, flush);
                agree("pin", Ok(()), verdict)
            }
            PinOutcome::Thaw(thaw) => {
                self.thaw(&thaw);
                agree("pin", Ok(()), verdict)
            }
            PinOutcome::NoMemory | PinOutcome::Collided => Ok(()),
        }
    }

    pub(crate) fn unpin(&mut self, n: usize, byte: u8) -> Outcome {
        if self.pins.is_empty() {
            return Ok(());
        }
        let Pinned {
            pin,
            at,
            bytes,
            tainted,
        } = self.pins.swap_remove(n % self.pins.len());
        if pin.is_write() {
            // The embedder's store: the page's own space sees it, or who has a view; nobody else.
            self.mm.store().write(pin.pfn(), SLOTS[0], &[byte]);
            let now = self.bytes(pin.pfn());
            if let Some(at) = at {
                self.put(at, now);
            }
            self.pins
                .iter_mut()
                .filter(|p| p.pin.pfn() == pin.pfn())
                .for_each(|p| p.tainted = true);
        } else if !tainted {
            agree("pinned bytes", self.bytes(pin.pfn()), bytes)?;
        }
        self.mm.unpin(pin);
        Ok(())
    }
}
