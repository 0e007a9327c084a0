//! A page file, and getting pages into it.

use std::collections::BTreeMap;

use shadow_mm::{FrameStore, PAGE_SIZE, PageIn, TrimMode, WriteTicket};

use super::{BASE, Cpu, Mm, RW, Sim, map_anon};

/// A page file that keeps the first byte of each page.
#[derive(Default)]
pub(crate) struct File(pub(crate) BTreeMap<u64, u8>);

impl File {
    pub(crate) fn take(&mut self, mm: &Mm, ticket: &WriteTicket) {
        for (n, frame) in (0u64..).zip(ticket.frames()) {
            let mut byte = [0];
            mm.store().read(*frame, 0, &mut byte);
            self.0
                .insert(ticket.offset() + n * PAGE_SIZE as u64, byte[0]);
        }
    }

    /// Writes all that is modified.
    pub(crate) fn write_all(&mut self, mm: &Mm) -> u64 {
        let mut stored = 0;
        while let Some(ticket) = mm.start_write() {
            self.take(mm, &ticket);
            stored += mm.complete_write(ticket, Ok(())).stored;
        }
        stored
    }

    pub(crate) fn read(&self, mm: &Mm, ticket: &PageIn<Sim>) {
        for (n, frame) in (0u64..).zip(ticket.frames()) {
            let byte = self.0[&(ticket.offset() + n * PAGE_SIZE as u64)];
            mm.store().write(*frame, 0, &[byte]);
        }
    }
}

pub(crate) fn trim(mm: &Mm, cpu: &mut Cpu, goal: u64) -> u64 {
    let trimmed = mm.trim(&cpu.space, goal, TrimMode::Any);
    cpu.flush(mm, trimmed.flush);
    trimmed.pages
}

/// Takes every frame that can be taken, so that what is on standby is used for something else.
pub(crate) fn evict_all(mm: &Mm) {
    let space = mm.create_space().expect("a space");
    map_anon(mm, &space, BASE, 1000, RW);
    let mut cpu = Cpu::new(&space);
    let mut page = BASE;
    while mm.available() > 0 {
        cpu.store(mm, page, 9).expect("a frame");
        page += 1;
    }
    let flush = mm.delete_space(&space);
    mm.flushed(flush);
}
