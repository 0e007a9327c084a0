//! Faults on mapped files: hand out a read, take what it brought.
//!
//! Pages of a private file view that were just read for this space are seen by nobody else, so they are
//! its own frames from the start: entries of a writable mapping are writable at once, with the dirty bit
//! clear. The dirty bit, not a fault, then tells whether the page still equals the file.

use alloc::sync::Arc;
use alloc::vec::Vec;

use crate::access::{Access, Denied};
use crate::addr::{Level, PAGE_SIZE, Vpn, VpnRange};
use crate::backend::Platform;
use crate::manager::{Demand, Manager};
use crate::outcome::{FaultKind, FaultOutcome, IoFailed, IoTicket};
use crate::pfn::{FreeFrame, Original, Owner, ReadyFrame, Taken, Want};
use crate::pte::{Entry, EntryFlags, ValidEntry};
use crate::space::fault::{resolution, used};
use crate::space::{Space, SpaceState};
use crate::stats::add;
use crate::vad::{MapKind, Vad};

/// Pages of the aligned window one read may fill: 64 KiB. It never crosses a leaf table.
const CLUSTER_PAGES: u64 = 16;

impl<P: Platform> Manager<P> {
    /// Reserves frames for the page and its neighbours, and says what to read into them.
    pub(super) fn start_read(
        &self,
        space: &Arc<Space<P>>,
        state: &SpaceState<P::Backing>,
        wanted: Vpn,
        access: Access,
    ) -> FaultOutcome<P> {
        let Some(vad) = state.vads.find(wanted) else {
            return FaultOutcome::Denied(Denied::NotMapped);
        };
        let Some(backed) = backed_pages(vad).filter(|pages| pages.contains(wanted)) else {
            return FaultOutcome::Denied(Denied::BeyondEnd);
        };
        let cluster = self.absent_cluster(space, backed, wanted);
        let ahead = cluster.end() - wanted.get() - 1;
        let behind = wanted.get() - cluster.start().get();
        let (data, extra) = (behind as usize + 1, ahead as usize);
        let full = Demand {
            tables: 0,
            data,
            extra,
            want: Want::Anything,
        };
        let alone = Demand::one_page();
        let short = self.pfns.lock().short();
        let (reserve, first) = match if short { None } else { self.reserve(full) } {
            Some(reserve) => (reserve, cluster.start()),
            None => match self.reserve(alone) {
                Some(reserve) => (reserve, wanted),
                None => return FaultOutcome::NoMemory,
            },
        };
        let tokens: Vec<_> = reserve
            .data
            .into_iter()
            .map(Taken::forget_content)
            .collect();
        match ticket(space, vad, first, wanted, access, tokens) {
            Some(ticket) => FaultOutcome::Read(ticket),
            None => FaultOutcome::Denied(Denied::BeyondEnd),
        }
    }

    /// The pages around `wanted` in its aligned window that are backed by the file and not resident.
    fn absent_cluster(&self, space: &Space<P>, backed: VpnRange, wanted: Vpn) -> VpnRange {
        let cursor = space.cursor(&self.store);
        let base = wanted.get() - wanted.get() % CLUSTER_PAGES;
        let alone = VpnRange::new(wanted, 1);
        let window = Vpn::new(base).and_then(|base| VpnRange::new(base, CLUSTER_PAGES));
        let window = window.and_then(|window| window.intersect(backed)).or(alone);
        let window = window.expect("a page is a range");
        let absent = |vpn: Vpn| cursor.lookup(vpn).is_none_or(|(_, _, e)| e == Entry::Empty);
        let mut start = wanted.get();
        while start > window.start().get() && Vpn::new(start - 1).is_some_and(absent) {
            start -= 1;
        }
        let mut end = wanted.get() + 1;
        while end < window.end() && Vpn::new(end).is_some_and(absent) {
            end += 1;
        }
        Vpn::new(start)
            .and_then(|start| VpnRange::between(start, end))
            .unwrap_or(window)
    }

    /// Takes what a read brought: `result` says how many bytes, counted from the ticket's start.
    ///
    /// If the mapping has changed meanwhile, the frames are freed and the answer is
    /// [`FaultKind::Spurious`]: the access must be tried again. A page the read did not reach is
    /// [`Denied::BeyondEnd`] (the file became shorter), a failed read [`Denied::IoError`].
    pub fn complete_read(
        &self,
        ticket: IoTicket<P>,
        result: Result<usize, IoFailed>,
    ) -> FaultOutcome<P> {
        let outcome = self.finish_read(ticket, result);
        self.count(&outcome);
        outcome
    }

    fn finish_read(
        &self,
        mut ticket: IoTicket<P>,
        result: Result<usize, IoFailed>,
    ) -> FaultOutcome<P> {
        let tokens = core::mem::take(&mut ticket.tokens);
        let denied = match result {
            Err(IoFailed) => Some(Denied::IoError),
            Ok(bytes) => {
                let read = bytes.min(ticket.length).div_ceil(PAGE_SIZE) as u64;
                let reached = ticket.first.get() + read > ticket.wanted.get();
                (!reached).then_some(Denied::BeyondEnd)
            }
        };
        if let Some(denied) = denied {
            self.free_unread(tokens);
            return FaultOutcome::Denied(denied);
        }
        let bytes = result.map_or(0, |bytes| bytes.min(ticket.length));
        let mut ready = Vec::with_capacity(tokens.len());
        let mut beyond = Vec::new();
        for (page, frame) in tokens.into_iter().enumerate() {
            match bytes.saturating_sub(page * PAGE_SIZE).min(PAGE_SIZE) {
                0 => beyond.push(frame),
                valid => ready.push(frame.read_in(valid, &self.store)),
            }
        }
        self.free_unread(beyond);
        let space = Arc::clone(&ticket.space);
        self.map_read(&space, &ticket, ready)
    }

    /// Frees frames a read did not fill.
    fn free_unread(&self, tokens: Vec<FreeFrame>) {
        if !tokens.is_empty() {
            let mut db = self.pfns.lock();
            tokens
                .into_iter()
                .for_each(|frame| db.give_back(Taken::Free(frame)));
        }
    }

    /// Maps the pages that still belong where they were read for; the rest is freed.
    fn map_read(
        &self,
        space: &Arc<Space<P>>,
        ticket: &IoTicket<P>,
        ready: Vec<ReadyFrame>,
    ) -> FaultOutcome<P> {
        let mut state = space.state.lock();
        let cursor = space.cursor(&self.store);
        let vad = state
            .vads
            .find(ticket.wanted)
            .filter(|vad| still_wanted(vad, ticket));
        let Some((prot, backed)) = vad.and_then(|vad| Some((vad.prot, backed_pages(vad)?))) else {
            self.discard_read(ready);
            return FaultOutcome::Resolved(resolution(space, FaultKind::Spurious, 0));
        };
        let missing = cursor.missing_tables(ticket.wanted);
        let Some(mut reserve) = self.reserve(Demand::tables(missing)) else {
            self.discard_read(ready);
            return FaultOutcome::NoMemory;
        };
        let mut kind = FaultKind::Spurious;
        let mut mapped = 0;
        let mut db = self.pfns.lock();
        for (page, frame) in ready.into_iter().enumerate() {
            let vpn = ticket.first.checked_add(page as u64);
            let absent = |vpn: &Vpn| {
                let entry = cursor.lookup(*vpn).map(|(_, _, entry)| entry);
                cfg!(mutant = "skipped_recheck") || entry.is_none_or(|e| e == Entry::Empty)
            };
            let Some(vpn) = vpn.filter(|vpn| backed.contains(*vpn)).filter(absent) else {
                db.discard(frame);
                continue;
            };
            let mut flags = EntryFlags::private(prot);
            if vpn == ticket.wanted {
                flags |= used(ticket.access);
                kind = FaultKind::FileRead;
            }
            let table = cursor.ensure_leaf(&mut db, vpn, &mut reserve.tables);
            let index = vpn.index(Level::Leaf);
            let frame = db.activate_clean(frame, Owner::Entry { table, index }, Original::File);
            cursor.install(&mut db, table, index, ValidEntry { frame, flags });
            mapped += 1;
        }
        drop(db);
        state.tables += (missing - reserve.tables.len()) as u64;
        self.give_back(reserve);
        state.gained_private(mapped);
        add(&self.counters.entries_written, mapped);
        FaultOutcome::Resolved(resolution(space, kind, mapped as u32))
    }

    fn discard_read(&self, ready: Vec<ReadyFrame>) {
        let mut db = self.pfns.lock();
        ready.into_iter().for_each(|frame| db.discard(frame));
    }
}

/// The pages of a file mapping that begin before the file's end.
fn backed_pages<B>(vad: &Vad<B>) -> Option<VpnRange> {
    match vad.kind {
        MapKind::Anonymous => None,
        MapKind::PrivateFile { length, .. } => {
            let pages = length.div_ceil(PAGE_SIZE as u64).min(vad.range.count());
            VpnRange::new(vad.range.start(), pages)
        }
    }
}

/// Where in the file a mapping's part of it ends.
fn file_end<B>(vad: &Vad<B>) -> Option<u64> {
    match vad.kind {
        MapKind::Anonymous => None,
        MapKind::PrivateFile { offset, length, .. } => Some(offset + length),
    }
}

/// Whether the mapping still shows the bytes the ticket read where it read them for.
fn still_wanted<P: Platform>(vad: &Vad<P::Backing>, ticket: &IoTicket<P>) -> bool {
    let ahead = (ticket.wanted.get() - ticket.first.get()) * PAGE_SIZE as u64;
    let backed = backed_pages(vad).is_some_and(|pages| pages.contains(ticket.wanted));
    let same = vad.file_page(ticket.wanted) == Some((&ticket.backing, ticket.offset + ahead));
    // A longer mapping of the same bytes shows more of the last page than was read.
    backed && same && file_end(vad) == Some(ticket.file_end) && vad.prot.allows(ticket.access)
}

fn ticket<P: Platform>(
    space: &Arc<Space<P>>,
    vad: &Vad<P::Backing>,
    first: Vpn,
    wanted: Vpn,
    access: Access,
    tokens: Vec<FreeFrame>,
) -> Option<IoTicket<P>> {
    let MapKind::PrivateFile {
        backing,
        offset,
        length,
    } = &vad.kind
    else {
        return None;
    };
    let ahead = (first.get() - vad.range.start().get()) * PAGE_SIZE as u64;
    let room = (tokens.len() * PAGE_SIZE) as u64;
    Some(IoTicket {
        space: Arc::clone(space),
        backing: backing.clone(),
        offset: offset + ahead,
        file_end: offset + length,
        length: room.min(length - ahead) as usize,
        first,
        wanted,
        access,
        frames: tokens.iter().map(FreeFrame::pfn).collect(),
        tokens,
    })
}
