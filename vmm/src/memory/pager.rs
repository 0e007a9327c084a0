//! Performs the reads the memory manager asks for.

use std::io;

use shadow_mm::{FaultOutcome, FrameStore, IoFailed, IoTicket};

use super::pool::FRAME;
use super::{Memory, VmmPlatform};

/// Reads the file's bytes into the ticket's frames, through a bounce buffer and with no lock held,
/// and hands the ticket back.
pub(super) fn fill(memory: &Memory, ticket: IoTicket<VmmPlatform>) -> FaultOutcome<VmmPlatform> {
    let result = read(memory, &ticket).map_err(|error| {
        let path = ticket.section().backing().map(|b| b.0.path());
        let path = path.unwrap_or_default();
        tracing::warn!(%error, file = %String::from_utf8_lossy(&path), "a mapped file could not be read");
        IoFailed
    });
    let outcome = memory.manager.complete_read(ticket, result);
    memory.reads.notify();
    outcome
}

fn read(memory: &Memory, ticket: &IoTicket<VmmPlatform>) -> io::Result<usize> {
    let Some(backing) = ticket.section().backing() else {
        return Ok(0);
    };
    let mut buffer = vec![0_u8; ticket.length()];
    let mut done = 0;
    while done < buffer.len() {
        match backing
            .0
            .read_at(ticket.offset() + done as u64, &mut buffer[done..])?
        {
            0 => break,
            n => done += n,
        }
    }
    buffer.truncate(done);
    for (frame, bytes) in ticket.frames().iter().zip(buffer.chunks(FRAME)) {
        memory.manager.store().write(*frame, 0, bytes);
    }
    Ok(done)
}
